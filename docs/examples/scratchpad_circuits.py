"""Where a decision is carried before and after training by reward, and which part holds the change.

usage: python docs/examples/scratchpad_circuits.py results/hard_samples/tables
"""

from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd

from mechinterp.files import read_table
from mechinterp.statistics import t_interval

PLACES = {
    "last sum's units": "sum 4 units",
    "changed number": "changed term",
    "decision": "decision",
}


def main(tables: str) -> None:
    """Print two tables, a row per arm: means over seeds with 95% t intervals."""
    recovery = read_table(Path(tables, "patching.parquet"))
    recovery = recovery[(recovery["grain"] == "resid_pre") & (recovery["latent"] == "all")]
    layers = sorted(recovery["layer"].unique())
    print(
        "Recovery of resid_pre, after less before, by place and layer; the largest anywhere last."
    )
    cells = [(name, unit, layer) for name, unit in PLACES.items() for layer in (0, layers[-1])]
    _print_header("arm", *(f"{name}, {layer}" for name, _, layer in cells), "largest")
    for arm, rows in recovery.groupby("arm", sort=False):
        change = _change(rows)
        largest = change.groupby(["layer", "unit"]).mean().abs().max()
        _print_row(
            arm,
            *(_mean(change.xs((layer, u), level=(0, 1))) for _, u, layer in cells),
            f"{largest:.2f}",
        )
    crossing = read_table(Path(tables, "crossing.parquet"))
    crossing = crossing[(crossing["currency"] == "log_score") & (crossing["readout"] == "raw")]
    cuts = sorted(crossing["cut"].unique())
    print("\nLog score that goes with the layers before a cut, in parts of (oracle - constant).")
    _print_header("arm", *(f"before layer {cut}" for cut in cuts), "all")
    for arm, rows in crossing.groupby("arm", sort=False):
        by_cut = {cut: rows[rows["cut"] == cut] for cut in cuts}
        fronts = [_mean(some["phi_front"] / some["scale"]) for some in by_cut.values()]
        whole = by_cut[cuts[0]]
        _print_row(arm, *fronts, _mean((whole["u_bb"] - whole["u_aa"]) / whole["scale"]))


def _change(rows: pd.DataFrame) -> pd.Series:
    """After less before, by layer, place and seed."""
    by_side = rows.pivot_table(
        index=["layer", "unit", "seed"], columns="checkpoint", values="recovery"
    )
    return by_side["after"] - by_side["before"]


def _mean(values: pd.Series) -> str:
    found = t_interval(values)
    return f"{found.mean:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"


def _print_header(*names: object) -> None:
    _print_row(*names)
    print("|---" * len(names) + "|")


def _print_row(*cells: object) -> None:
    print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main(*sys.argv[1:])
