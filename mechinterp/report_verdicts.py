"""What the report shows of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pandas as pd

from figures.arm_styles import arm_label, costs_label
from figures.style import regime_label
from figures.tables import arms_in, costs_of, final_steps, settings_in, where
from mechinterp.report_cells import (
    LOSSES,
    REFERENCES,
    ReportTable,
    p_value,
    plain,
    points,
    title,
)

SIDES = ("learning", "choosing", "discarded")
RUNGS = ("raw", "bias", "head", "depth", "latents", "oracle")  # JSON does not keep their order

FORGETTING = {
    "damaged": "forgotten",
    "improved": "more is known",
    "intact": "kept",
    "inconclusive": "inconclusive",
    "not powered": "not powered",
    "void": "void",
}


def verdict_tables(tables: Mapping[str, pd.DataFrame]) -> list[ReportTable]:
    """A study's verdicts: where each arm ends, per reference, and the words along training."""
    if "verdicts" not in tables:
        return []
    verdicts = tables["verdicts"]
    ends = final_steps(verdicts)
    made = [_ends_table(where(ends, reference=name), words) for name, words in REFERENCES.items()]
    words = where(verdicts, side="learning")
    return [
        *made,
        *(_words_table(where(words, task=task)) for task in dict.fromkeys(words["task"])),
    ]


def _ends_table(ends: pd.DataFrame, reference: str) -> ReportTable:
    by_side = {side: _by_cell(where(ends, side=side)) for side in SIDES}
    lost = {
        cell[:2] + cell[3:]: row for cell, row in _by_cell(where(ends, side="forgetting")).items()
    }
    lines = []
    for cell, learning in by_side["learning"].items():
        rows = [by_side[side].get(cell) for side in SIDES]
        task, regime, costs, arm = cell
        lines.append(
            [
                *(task.replace("_", " "), regime_label(regime), costs_label(costs), arm_label(arm)),
                learning["verdict"],
                *(_state(row, points) for row in rows),
                _state(lost.get((task, regime, arm)), plain),
                str(learning["n_seeds"]),
            ]
        )
    return ReportTable(
        title=f"Verdicts where each arm ends, against {reference}",
        note="Increase of each loss with its 95% t interval over seeds, in hundredths of (oracle − "
        "best constant action) of expected log score; forgetting in bits. States hold after Holm's "
        "adjustment for all of the study's arms at their ends; the word names the damaged sides. "
        "Costs that an arm does not serve are there for comparison.",
        columns=[
            *("Task", "Regime", "Costs", "Arm", "Verdict"),
            *("Learning", "Choosing", "Discarded", "Forgetting", "Seeds"),
        ],
        rows=lines,
        n_labels=5,
    )


def _words_table(words: pd.DataFrame) -> ReportTable:
    """At its own costs against the ex-post arm, at others against the control."""
    own = words["costs"] == words["arm"].map(costs_of)
    wanted = own.map({True: "ex_post", False: "control"})
    shown = words[words["reference"] == wanted]
    lines = []
    for task, regime in settings_in(shown):
        here = where(shown, task=task, regime=regime)
        for arm in arms_in(here):
            for costs, rows in where(here, arm=arm).groupby("costs"):
                along = rows.sort_values("step")
                told = [
                    f"{step}: {word}"
                    for step, word in zip(along["step"], along["verdict"], strict=True)
                ]
                labels = (regime_label(regime), costs_label(str(costs)), arm_label(arm))
                lines.append([*labels, "; ".join(told)])
    name = str(words["task"].iloc[0]).replace("_", " ")
    return ReportTable(
        title=f"Verdicts by training length: {name}",
        note="The word at each step; at the costs that an arm serves against the control adjusted "
        "to them ex post, at others against the control as it is.",
        columns=["Regime", "Costs", "Arm", "Steps: verdict"],
        rows=lines,
        n_labels=4,
    )


def _by_cell(rows: pd.DataFrame) -> dict[tuple[str, ...], dict[Any, Any]]:
    """By (task, regime, costs, arm), in the order of the figures."""
    return {
        (task, regime, str(costs), arm): cell.to_dict("records")[0]
        for task, regime in settings_in(rows)
        for arm in arms_in(where(rows, task=task, regime=regime))
        for costs, cell in where(rows, task=task, regime=regime, arm=arm).groupby("costs")
    }


def _state(row: Mapping[Any, Any] | None, amount: Callable[..., str]) -> str:
    if row is None:
        return "–"
    state = FORGETTING[row["state"]] if row["side"] == "forgetting" else row["state"]
    numbers = {"mean": row["delta"], "low": row["low"], "high": row["high"]}
    return f"{amount(numbers, signed=True)} {state}"


def verdict_view(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The word, tables of the sides, rungs and shares, and what else the verdict states."""
    facts = {
        key.replace("_", " "): value
        for key, value in verdict.items()
        if isinstance(value, str | int | float) and key != "verdict"
    }
    tables = [_sides_table(verdict), _rungs_table(verdict), _forgetting_table(verdict)]
    tables.append(_shares_table(verdict))
    return {
        "word": verdict["verdict"],
        "facts": facts,
        "tables": [table for table in tables if table.rows],
    }


def _sides_table(verdict: Mapping[str, Any]) -> ReportTable:
    stated = {**verdict, **verdict["components"]["losses"]}
    least = verdict["minimum_detectable"]
    return ReportTable(
        title="The sides and parts of the verdict",
        note="Increase of the loss in hundredths of (oracle − best constant action) with 95% "
        "intervals over items; positive is worse; p is of no change. Least detectable: the "
        "smallest increase that would have been called damage.",
        columns=["Loss", "State", "Increase", "p", "Least detectable"],
        rows=[
            [
                *(title(name), stated[name]["state"], _change(stated[name])),
                *(
                    p_value(stated[name]["p"]),
                    f"{100 * least[name]:.1f}" if name in least else "–",
                ),
            ]
            for name in LOSSES
            if name in stated
        ],
        n_labels=2,
    )


def _rungs_table(verdict: Mapping[str, Any]) -> ReportTable:
    rungs = verdict["components"]["rungs"]
    return ReportTable(
        title="The rungs of the ladder",
        note="Change of what each rung is worth, in hundredths of (oracle − best constant action); "
        "positive is better. Losses are differences of neighbouring rungs.",
        columns=["Rung", "Change", "p"],
        rows=[
            [title(name), _change(rungs[name]), p_value(rungs[name]["p"])]
            for name in RUNGS
            if name in rungs
        ],
        n_labels=1,
    )


def _forgetting_table(verdict: Mapping[str, Any]) -> ReportTable:
    return ReportTable(
        title="Latents that the decision does not need",
        note="Bits of information lost at the best layer; positive is forgetting, which is no "
        f"damage. The margin is {verdict['information_margin']:g} bits.",
        columns=["Latent", "State", "Bits lost", "p"],
        rows=[
            [
                *(name, FORGETTING[side["state"]]),
                plain(_interval(side), signed=True),
                p_value(side["p"]),
            ]
            for name, side in verdict["forgetting"].items()
        ],
        n_labels=2,
    )


def _shares_table(verdict: Mapping[str, Any]) -> ReportTable:
    return ReportTable(
        title="Where the change sits",
        note="The crossing: change of value from before to after, in hundredths of (oracle − best "
        "constant action), divided between the layers before the cut (front) and behind it (back). "
        "No shares where the interaction leaves them without meaning. They locate a change and "
        "never classify it.",
        columns=["Readout", "Cut", "Change", "Front", "Back", "Interaction"],
        rows=[
            [
                *(title(name), str(shares["cut"])),
                *(
                    _change(shares[part])
                    for part in ("change", "phi_front", "phi_back", "interaction")
                ),
            ]
            for name in RUNGS
            if (shares := verdict["components"]["crossing"].get(name))
        ],
        n_labels=2,
    )


def _change(change: Mapping[str, Any] | None) -> str:
    """In points, with its interval."""
    return points(change and _interval(change), signed=True)


def _interval(change: Mapping[str, Any]) -> dict[str, float]:
    low, high = change["ci"]
    return {"mean": change["delta"], "low": low, "high": high}
