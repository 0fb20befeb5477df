"""Several runs of `mechinterp repair` as one: what share of the lost log score each repair regains.

usage: python docs/examples/repair_seeds.py OUT     # which has OUT/<dose>/seed-<n>/tables
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from mechinterp.files import read_table
from mechinterp.statistics import MIN_SEEDS, t_interval

ADAPTERS = ("early", "late")
FEW, MANY = 8, 32  # steps


def main(out: str) -> None:
    """Print a table: a column per dose, means over seeds with 95% t intervals."""
    repairs = {
        **{
            f"{layers}, rank {rank}, {steps} steps": ("adapters", layers, rank, steps)
            for steps in (FEW, MANY)
            for layers in ADAPTERS
            for rank in (1, 8)
        },
        "all weights, 32 steps": ("weights", "all", None, MANY),
        "last layer, 256 items": ("refit", "crt", 256, 0),
        "last layer, 6,000 items": ("refit", "crt", 6000, 0),
    }
    columns: dict[str, list[str]] = {}
    for dose in sorted(path.name for path in Path(out).iterdir() if path.is_dir()):
        tables = sorted(Path(out, dose).glob("seed-*/tables/repair.parquet"))
        if not tables:
            continue
        runs = [_raw(read_table(path)) for path in tables]
        lost = [float(run["lost"].to_numpy()[0]) for run in runs]
        few = " (not powered)" if len(runs) < MIN_SEEDS else ""
        shares = [_mean([_share(run, *how) for run in runs]) for how in repairs.values()]
        columns[dose] = [f"{len(runs)}{few}", _mean(lost), *shares]
    print("| regained | " + " | ".join(columns) + " |")
    print("|---" * (1 + len(columns)) + "|")
    for row, name in enumerate(["seeds", "lost (nats)", *repairs]):
        print(f"| {name} | " + " | ".join(column[row] for column in columns.values()) + " |")


def _raw(table: pd.DataFrame) -> pd.DataFrame:
    return table[(table["currency"] == "log_score") & (table["readout"] == "raw")]


def _share(run: pd.DataFrame, kind: str, what: str, size: float | None, steps: int) -> float:
    rows = run[(run["kind"] == kind) & (run["steps"] == steps)]
    if kind == "adapters":
        rows = rows[(rows["layers"] == what) & (rows["part"] == "both") & (rows["rank"] == size)]
    elif kind == "refit":
        rows = rows[(rows["part"] == what) & (rows["n_items"] == size)]
    return float(rows["share"].to_numpy()[0])


def _mean(values: list[float]) -> str:
    found = t_interval(pd.Series(values).dropna())
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
