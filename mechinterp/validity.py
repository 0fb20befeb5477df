"""How often is the verdict right? Rates with exact intervals, from the pairs of a validation study.

A pair is *right* where the verdict names the damaged side (for a discarded latent: "none", and the
state *discarded* is damaged), *opposite* where it names choosing for learning or the reverse. On
undamaged pairs it is right where it says "none", and a *false alarm* where it names a side.
"inconclusive" is never right. Damage is *judged* from a set cost on; of damage on both sides each
must cost as much. Pairs that share a network are not independent, so that the
Clopper-Pearson intervals are somewhat too narrow; rates by network stand beside them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechinterp import files
from mechinterp.page_places import fill_places
from mechinterp.statistics import proportion_interval

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.validation import ValidationSpec

SIDES = ("choosing", "learning", "both", "discarded", "none")
VERDICTS = ("choosing", "learning", "both", "none", "inconclusive")
OPPOSITE = {"choosing": "learning", "learning": "choosing"}
COST_EDGES = (-np.inf, 0.02, 0.05, 0.1, 0.2, 0.4, np.inf)


def validity_tables(pairs: pd.DataFrame, spec: ValidationSpec) -> dict[str, pd.DataFrame]:
    """`pairs` with columns outcome and judged; `rates` by half, and by half and kind or
    network; `confusion` by half; `sensitivity` by half, kind and range of cost.

    Doses of a kind that leave a network the same are one pair: half of one latent is one latent.
    """
    pairs = pairs.drop_duplicates([column for column in pairs if column != "dose"])
    pairs = pairs.assign(
        outcome=[_outcome(row) for row in pairs.to_dict("records")],
    )
    choosing = pairs["cost_utility_choosing"]
    smaller = np.minimum(choosing, pairs["cost_utility"] - choosing)
    cost = pairs["cost_utility"].where(pairs["side"] != "both", smaller)
    pairs["bin"] = np.digitize(cost, COST_EDGES[1:-1])
    pairs["judged"] = pairs["competent"] & ((pairs["side"] == "none") | (cost >= spec.cost))
    sound = pairs[pairs["competent"]]
    judged = pairs[pairs["judged"]]
    damaged = sound[sound["side"] != "none"]
    confusion = (
        judged.groupby(["half", "side", "verdict"], sort=False).size().rename("n").reset_index()
    )
    sensitivity = _rates(damaged, ["half", "kind", "side", "bin"], ["right"]).assign(
        low_cost=lambda t: [COST_EDGES[i] for i in t["bin"]],
        high_cost=lambda t: [COST_EDGES[i + 1] for i in t["bin"]],
    )
    return {
        "pairs": pairs,
        "rates": _all_rates(judged),
        "confusion": confusion,
        "sensitivity": sensitivity,
    }


def _outcome(row: dict[Any, Any]) -> str:
    """right, opposite, alarm, missed (none or inconclusive where there is damage) or other."""
    side, verdict = row["side"], row["verdict"]
    if side == "none":
        return {"none": "right", "inconclusive": "inconclusive"}.get(verdict, "alarm")
    if side == "discarded":
        if verdict == "none":
            return "right" if row["discarded_state"] == "damaged" else "missed"
        return "missed" if verdict == "inconclusive" else "other"
    if verdict == side:
        return "right"
    if verdict in ("none", "inconclusive"):
        return "missed"
    return "opposite" if verdict == OPPOSITE.get(side) else "other"


def _all_rates(judged: pd.DataFrame) -> pd.DataFrame:
    """One row per half, group ("all", "kind" or "network"), member of it, and rate."""
    import pandas as pd

    damaged = judged[judged["side"] != "none"]
    sound = judged[judged["side"] == "none"]
    tables = []
    for group in ("all", "kind", "network"):
        by = ["half"] if group == "all" else ["half", group]
        for table, outcomes in ((damaged, ["right", "opposite"]), (sound, ["right", "alarm"])):
            rates = _rates(table, by, outcomes)
            rates = rates.rename(columns={group: "member"}) if group != "all" else rates
            of = "damaged" if table is damaged else "undamaged"
            tables.append(rates.assign(group=group, of=of))
    joined = pd.concat(tables, ignore_index=True)
    return joined.assign(member=joined["member"].fillna("all"))


def _rates(table: pd.DataFrame, by: list[str], outcomes: Sequence[str]) -> pd.DataFrame:
    import pandas as pd

    rows = []
    for key, some in table.groupby(by, sort=False):
        labels = dict(zip(by, key, strict=True))
        for outcome in outcomes:
            n = int((some["outcome"] == outcome).sum())
            low, high = proportion_interval(n, len(some))
            rows.append(
                {**labels, "rate": outcome, "n": n, "of_n": len(some), "value": n / len(some)}
                | {"low": low, "high": high}
            )
    columns = [*by, "rate", "n", "of_n", "value", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


def fill_validity_page(path: str | Path, tables: dict[str, pd.DataFrame]) -> None:
    """Rewrite the places `rates`, `confusion`, `kinds` and `networks` of a page."""
    texts = {
        "rates": rates_text(tables["rates"]),
        "confusion": confusion_text(tables["confusion"]),
        "kinds": members_text(tables["rates"], "kind"),
        "networks": members_text(tables["rates"], "network"),
        "sensitivity": sensitivity_text(tables["sensitivity"]),
    }
    files.write_text(path, fill_places(path, "validity", texts))


def rates_text(rates: pd.DataFrame) -> str:
    """The four rates that the instrument is judged by, per half."""
    lines = ["| kinds | pairs | rate | n | share | 95% interval |", "|---|---|---|---|---|---|"]
    for row in rates[rates["group"] == "all"].to_dict("records"):
        lines.append(
            f"| {row['half'].replace('_', ' ')} | {row['of']} | {row['rate']} "
            f"| {row['n']} of {row['of_n']} | {_percent(row)} |"
        )
    return "\n".join(lines)


def members_text(rates: pd.DataFrame, group: str) -> str:
    """Right verdicts by kind of damage, or by network."""
    lines = [
        f"| {group} | kinds | pairs | right | share | 95% interval |",
        "|---|---|---|---|---|---|",
    ]
    rows = rates[(rates["group"] == group) & (rates["rate"] == "right")]
    for row in rows.to_dict("records"):
        lines.append(
            f"| {row['member'].replace('_', ' ')} | {row['half'].replace('_', ' ')} | {row['of']} "
            f"| {row['n']} of {row['of_n']} | {_percent(row)} |"
        )
    return "\n".join(lines)


def confusion_text(confusion: pd.DataFrame) -> str:
    """What was done against what was said, held-out kinds."""
    own = confusion[confusion["half"] == "held_out"]
    lines = [
        f"| done | {' | '.join(VERDICTS)} |",
        "|---" * (1 + len(VERDICTS)) + "|",
    ]
    for side in SIDES:
        counts = own[own["side"] == side].set_index("verdict")["n"]
        if len(counts):
            cells = [str(counts.get(verdict, "")) for verdict in VERDICTS]
            lines.append(f"| {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def sensitivity_text(sensitivity: pd.DataFrame) -> str:
    """Right of all pairs by what the damage costs in utility."""
    keys = ["half", "side", "low_cost", "high_cost"]
    total = sensitivity.groupby(keys, sort=True)[["n", "of_n"]].sum().reset_index()
    found = {
        (row["half"], row["side"], row["low_cost"]): f"{row['n']} of {row['of_n']}"
        for row in total.to_dict("records")
    }
    bins = sorted(dict(zip(total["low_cost"], total["high_cost"], strict=True)).items())
    titles = [_bin_title(low, high) for low, high in bins]
    lines = [f"| kinds | side | {' | '.join(titles)} |", "|---" * (2 + len(bins)) + "|"]
    for half, side in dict.fromkeys((half, side) for half, side, _ in found):
        cells = [found.get((half, side, low), "") for low, _ in bins]
        lines.append(f"| {half.replace('_', ' ')} | {side} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _bin_title(low: float, high: float) -> str:
    if low == -np.inf:
        return f"below {high:.0%}"
    return f"{low:.0%} and more" if high == np.inf else f"{low:.0%} to {high:.0%}"


def _percent(row: dict[Any, Any]) -> str:
    return f"{row['value']:.1%} | {row['low']:.1%} to {row['high']:.1%}"
