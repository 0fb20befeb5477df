"""Saved tables as the figures need them: read, averaged over seeds, cut to what is shown."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    import pandas as pd

KEYS = ("task", "regime", "arm", "seed", "step")
ARM_ORDER = (
    "before",
    "symmetric",
    "symmetric_reordered",
    "control",
    "ex_post_1.8",
    "ex_post_1.98",
    "weighted_1.8",
    "weighted_1.98",
    "after",
)
REGIME_ORDER = ("branched", "from_init", "pair")

Tables = Mapping[str, "pd.DataFrame"]
Columns = Mapping[str, Sequence[str]]


def read_tables(
    source: str | Path | Tables, needed: Columns, optional: Columns | None = None
) -> dict[str, pd.DataFrame]:
    """The tables that a figure needs, from a folder of parquet files or from tables in memory.

    Raises AnalysisError when a needed table, or a column of any of them, is absent.
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
        if table.empty:
            raise AnalysisError(f"table {name!r} is empty: there is nothing to draw")
        tables[name] = table
    return tables


def _read(source: str | Path | Tables, name: str) -> pd.DataFrame | None:
    if isinstance(source, Mapping):
        return source.get(name)
    path = Path(source) / f"{name}.parquet"
    if not path.exists():
        return None
    from mechinterp.files import read_table

    return read_table(path)


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


def where(table: pd.DataFrame, **values: Any) -> pd.DataFrame:
    """The rows in which each named column has the given value."""
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def arms_in(table: pd.DataFrame) -> list[str]:
    """The arms of a table, in the order in which every figure lists them."""
    known = {arm: rank for rank, arm in enumerate(ARM_ORDER)}
    return sorted(table["arm"].unique(), key=lambda arm: (known.get(arm, len(known)), arm))


def settings_in(table: pd.DataFrame) -> list[tuple[str, str]]:
    """The (task, regime) settings of a table: tasks as they come, regimes in a fixed order."""
    known = {regime: rank for rank, regime in enumerate(REGIME_ORDER)}
    tasks = list(dict.fromkeys(table["task"]))
    found = dict.fromkeys(zip(table["task"], table["regime"], strict=True))
    return sorted(found, key=lambda s: (tasks.index(s[0]), known.get(s[1], len(known)), s[1]))


def weight_of(name: str) -> str | None:
    """The weight in a name: "1.8" in "weighted_1.8", "ex_post_1.8" and "w1.8"."""
    match = re.search(r"(?:_|^w)(\d+(?:\.\d+)?)$", name)
    return match.group(1) if match else None


def at_own_costs(table: pd.DataFrame) -> pd.DataFrame:
    """The rows worth drawing: each weight's costs, met by the arms of that weight and of none.

    Where no costs are named after a weight: the task's own costs, else the symmetric ones.
    """
    costs = costs_in(table)
    table = table[table["costs"].isin(costs)]
    pairs = zip(table["arm"], table["costs"], strict=True)
    return table[[weight_of(arm) in (None, weight_of(cost)) for arm, cost in pairs]]


def costs_in(table: pd.DataFrame) -> list[str]:
    """The costs that get panels, mildest weight first: those that some arm is named after."""
    present = set(table["costs"])
    weighted = sorted((c for c in present if weight_of(c)), key=lambda c: float(weight_of(c) or 0))
    arms = {weight_of(arm) for arm in table["arm"].unique()}
    trained = [costs for costs in weighted if weight_of(costs) in arms]
    return trained or weighted or sorted(present & {"task"}) or sorted(present)


def last_number(name: str) -> tuple[str, int]:
    """Sort key that puts "head 2" before "head 10"."""
    match = re.search(r"(\d+)$", name)
    return (name[: match.start()], int(match.group(1))) if match else (name, -1)
