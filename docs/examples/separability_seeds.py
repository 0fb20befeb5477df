"""Several runs of `mechinterp separate` as one: the index by arm, and its change, over seeds.

usage: python docs/examples/separability_seeds.py OUT...
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from mechinterp.files import read_table
from mechinterp.statistics import MIN_SEEDS, t_interval


def main(*folders: str) -> None:
    """Print a table of means over seeds (one folder each), with 95% t intervals."""
    tables = [
        read_table(Path(folder) / "tables" / "separability_index.parquet") for folder in folders
    ]
    index = pd.concat([table.assign(seed=seed) for seed, table in enumerate(tables)])
    print("| ablation | index | " + " | ".join(index["arm"].unique()) + " | change |")
    print("|---|---|" + "---|" * (index["arm"].nunique() + 1))
    for (ablation, name), cell in index.groupby(["ablation", "index"], sort=False):
        values = [_mean(own["value"]) for _, own in cell.groupby("arm", sort=False)]
        print(f"| {ablation} | {name} | " + " | ".join([*values, _mean(cell["change"])]) + " |")
    if len(folders) < MIN_SEEDS:
        print(f"\n{len(folders)} seeds: not powered (claims take {MIN_SEEDS}).")


def _mean(values: pd.Series) -> str:
    found = t_interval(values.dropna())
    return f"{found.mean:.2f} [{found.low:.2f}, {found.high:.2f}]"


if __name__ == "__main__":
    main(*sys.argv[1:])
