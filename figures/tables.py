"""Saved tables as the figures need them: read, averaged over seeds, cut to what is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechinterp.arm_names import ADVANTAGES, kind_and_advantage, kind_and_weights
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("task", "regime", "arm", "seed", "step")
CONTROLS = ("before", "symmetric", "symmetric_reordered", "control", "ex_post")  # kinds of arms
FAMILIES = {
    "weighting": (
        *("weighted", "weighted_tuned", "resampled", "subsampled"),
        *("logit_adjusted", "smoothed_regret"),
    ),
    "hard_examples": ("focal", "hard_batch", "hard_data"),
    "refits": ("crt", "lws", "tau_norm", "dfr"),
    "pools": (
        *("easy", "medium", "hard", "near_impossible", "near_impossible_shortcut"),
        *("impossible", "mixed"),
    ),
    "rewards": ("binary", "brier", "brier_routed", "log_score", "sft"),
}
KIND_ORDER = (*CONTROLS, *(kind for kinds in FAMILIES.values() for kind in kinds), "after")
MAX_ARMS, MAX_SETTINGS = 6, 4  # that one file can show, beside the controls
PART = (
    " With more arms or settings than one file can show, there is a file per task, and per family "
    "of arms: weighting, hard_examples, refits, pools of samples and rewards; of many in pieces. "
    "It has the arms of its family at the strongest weights beside the controls; those at milder "
    "weights are left out. More than four arms at one place are drawn side by side."
)
REGIME_ORDER = ("branched", "from_init", "pair")

Tables = Mapping[str, "pd.DataFrame"]
Columns = Mapping[str, Sequence[str]]


def read_tables(
    source: str | Path | Tables,
    needed: Columns,
    optional: Columns | None = None,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
    starts: bool = False,
) -> dict[str, pd.DataFrame]:
    """The tables that a figure needs, from a folder of saved tables or from tables in memory.

    Of one `task` and of some `arms`, or of all; with rows of the networks "before" if `starts`, see
    `without_starts`. Raises AnalysisError when a needed table, or a
    column of any of them, is absent.
    """
    tables = {}
    for name, columns in {**needed, **(optional or {})}.items():
        table = _read(source, name)
        if name not in needed and (table is None or table.empty):
            continue
        if table is None:
            raise AnalysisError(f"table {name!r} is absent; run the analysis that writes it first")
        missing = [column for column in columns if column not in table]
        if missing:
            raise AnalysisError(f"table {name!r} lacks the column(s) {', '.join(missing)}")
        if task is not None:
            table = where(table, task=task)
        if arms is not None:
            for column in {"arm", "objective"} & set(table.columns):
                table = table[table[column].isin(arms)]
        if table.empty and name not in needed:
            continue
        if table.empty:
            raise AnalysisError(f"table {name!r} is empty: there is nothing to draw")
        tables[name] = table if starts else without_starts(table)
    return tables


def without_starts(table: pd.DataFrame) -> pd.DataFrame:
    """A study's networks "before" are step 0 of every arm, so their own rows say nothing more."""
    if not {"arm", "regime"} <= set(table.columns):
        return table
    return table[(table["arm"] != "before") | (table["regime"] == "pair")]


def _read(source: str | Path | Tables, name: str) -> pd.DataFrame | None:
    if isinstance(source, Mapping):
        return source.get(name)
    path = Path(source) / f"{name}.parquet"
    if path.exists():
        from mechinterp.files import read_table

        return read_table(path)
    if path.with_suffix(".csv").exists():
        import pandas as pd

        return pd.read_csv(path.with_suffix(".csv"), keep_default_na=False, na_values=[""])
    return None


def over_seeds(
    table: pd.DataFrame, by: Sequence[str], value: str = "value", *, scale: float = 1.0
) -> pd.DataFrame:
    """Mean over seeds per cell of `by`, with its 95% t interval: mean, low, high, n_seeds.

    All are multiplied by `scale`, e.g. 100 for percent. The unit is the seed: its rows in a cell
    are averaged first. One seed has no interval of its own; the one over items in the table's
    columns `low` and `high` stands in, where there is one.
    """
    from scipy.special import stdtrit

    by = list(by)
    per_seed = table.groupby([*by, "seed"], sort=False, observed=True)[value].mean().dropna()
    cells = per_seed.groupby(by, sort=False, observed=True)
    summary = cells.agg(mean="mean", n_seeds="count")
    n = summary["n_seeds"].to_numpy()
    half = np.full(len(n), np.nan)
    many = n > 1
    half[many] = stdtrit(n[many] - 1, 0.975) * cells.std().to_numpy()[many] / np.sqrt(n[many])
    summary["low"], summary["high"] = summary["mean"] - half, summary["mean"] + half
    if {"low", "high"} <= set(table.columns):
        items = table.groupby(by, sort=False, observed=True)[["low", "high"]].mean()
        for side in ("low", "high"):
            stand_in = items[side].reindex(summary.index)
            summary[side] = summary[side].where(summary["n_seeds"] > 1, stand_in)
    summary[["mean", "low", "high"]] *= scale
    return summary.reset_index()


def final_steps(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of each arm's last step."""
    last = table.groupby(["task", "regime", "arm"], observed=True)["step"].transform("max")
    return table[table["step"] == last]


def with_full_ends(tables: Tables) -> pd.DataFrame:
    """Losses along training, each arm's end as measured on all items where that table exists."""
    import pandas as pd

    losses, full = tables["losses"], tables.get("losses_in_full")
    if full is None:
        return losses
    last = losses.groupby(["task", "regime"], observed=True)["step"].transform("max")
    return pd.concat([losses[losses["step"] < last], full[full["step"] > 0]], ignore_index=True)


def where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows in which each named column has the given value."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def arms_in(table: pd.DataFrame) -> list[str]:
    """The arms of a table, in the order in which every figure lists them."""
    known = {kind: rank for rank, kind in enumerate(KIND_ORDER)}

    def rank(arm: str) -> tuple[int, float, int, str]:
        kind, advantage = kind_and_advantage(kind_and_weights(arm)[0])
        weight = strength(costs_of(arm)) if kind in known else 0
        return known.get(kind, len(known)), weight, ("", *ADVANTAGES).index(advantage or ""), arm

    return sorted(table["arm"].unique(), key=rank)


def settings_in(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (task, regime) settings of a table: tasks as they come, regimes in a fixed order."""
    known = {regime: rank for rank, regime in enumerate(REGIME_ORDER)}
    tasks = list(dict.fromkeys(table["task"]))
    found = dict.fromkeys(zip(table["task"], table["regime"], strict=True))
    return sorted(found, key=lambda s: (tasks.index(s[0]), known.get(s[1], len(known)), s[1]))


def files_by_task(figure: str, table: pd.DataFrame) -> dict[str, dict[str, str]]:
    """ "<figure>_<task>" -> task and regime: a file per task, of the first of its regimes."""
    files: dict[str, dict[str, str]] = {}
    for task, regime in settings_in(table):
        files.setdefault(f"{figure}_{task}", {"task": task, "regime": regime})
    return files


def parts(
    figure: str,
    table: pd.DataFrame,
    *,
    max_arms: int = MAX_ARMS,
    max_settings: int = MAX_SETTINGS,
) -> dict[str, dict[str, Any]]:
    """The files of a figure of all arms and settings, with their `task` and `arms`.

    One, or where `table` has more than one can show a file per task, and of tasks with many arms
    one per family of them, or several where a family has more than `max_arms`.
    """
    groups = {
        task: arm_groups(where(table, task=task), max_arms) for task in dict.fromkeys(table["task"])
    }
    whole = all(list(each) == [""] for each in groups.values())
    if whole and len(settings_in(table)) <= max_settings:
        return {figure: {}}
    return {
        f"{figure}_{task}{ending}": {"task": task, "arms": arms}
        for task, each in groups.items()
        for ending, arms in each.items()
    }


def arm_groups(table: pd.DataFrame, max_arms: int = MAX_ARMS) -> dict[str, tuple[str, ...] | None]:
    """How a task's arms are spread over files: ending of the name -> arms; None: all of them."""
    kinds = {arm: kind_and_advantage(kind_and_weights(arm)[0])[0] for arm in arms_in(table)}
    own = [arm for arm, kind in kinds.items() if kind not in CONTROLS]
    if len(own) <= max_arms:
        return {"": None}
    strongest = max(strength(costs_of(arm)) for arm in kinds)
    shown = [arm for arm in kinds if strength(costs_of(arm)) in (0, strongest)]
    families = {kind: family for family, members in FAMILIES.items() for kind in members}
    groups: dict[str, tuple[str, ...] | None] = {}
    for family in (*FAMILIES, "others"):
        members = [arm for arm in own if families.get(kinds[arm], "others") == family]
        members = [arm for arm in members if arm in shown]
        # What serves no weights is seen at symmetric costs, for which ex-post arms were not made.
        serving = any(costs_of(arm) for arm in members)
        controls = [
            arm for arm in shown if kinds[arm] in CONTROLS and (serving or not costs_of(arm))
        ]
        for first in range(0, len(members), max_arms):
            page = f"_{first // max_arms + 1}" if first else ""
            groups[f"_{family}{page}"] = (*controls, *members[first : first + max_arms])
    return groups


def strongest_arm(table: pd.DataFrame) -> str:
    """The arm with the strongest weight; of a pair, "after"."""
    return max(arms_in(table), key=lambda arm: (strength(costs_of(arm)), arm == "after"))


def costs_of(arm: str) -> str | None:
    """The costs that an arm was made for: "w1.8" of "weighted_1.8" and "ex_post_1.8", else None."""
    weights = kind_and_weights(arm)[1]
    return f"w{weights}" if weights else None


def strength(costs: str | None) -> float:
    """The weight in the name of costs, 0 where there is none: what orders them."""
    match = re.fullmatch(r"w(\d+(?:\.\d+)?)", costs or "")
    return float(match.group(1)) if match else 0.0


def at_own_costs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows worth drawing: those at `costs_in`, without arms that were made for other costs."""
    shown = table[table["costs"].isin(costs_in(table))]
    pairs = zip(shown["arm"], shown["costs"], strict=True)
    return shown[[costs_of(arm) in (None, costs) for arm, costs in pairs]]


def costs_in(table: pd.DataFrame) -> list[str]:
    """The costs that get panels: those that arms were made for, the mildest weight first.

    Of arms that were made for none symmetric ones; for a pair those of its verdict, and then what
    else was asked for.
    """
    present: list[str] = sorted(set(table["costs"]), key=lambda costs: (strength(costs), costs))
    made_for = {costs_of(arm) for arm in table["arm"].unique()}
    if trained := [costs for costs in present if costs in made_for]:
        return trained
    judged = [costs for costs in ("task", "symmetric") if costs in present][:1]
    if judged == ["symmetric"] and not (table["regime"] == "pair").any():
        return judged
    return judged + [costs for costs in present if costs not in ("task", "symmetric")]


def natural_order(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "head 2" before "head 10", "start" first and "decision" last."""
    edge = {"start": -1, "decision": 1}.get(name, 0)
    parts = re.split(r"(\d+)", name)
    return [(edge, int(p), "") if p.isdigit() else (edge, -1, p) for p in parts]
