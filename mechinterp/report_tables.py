"""The tables of the report: chosen rows, sensible precision, one line per arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from figures.arm_styles import arm_label, costs_label
from figures.style import regime_label
from figures.tables import (
    arms_in,
    at_own_costs,
    costs_in,
    final_steps,
    over_seeds,
    settings_in,
    where,
    without_starts,
)
from mechinterp.report_cells import (
    LOSSES,
    REFERENCES,
    ReportTable,
    number,
    p_value,
    plain,
    points,
    title,
)
from mechinterp.report_verdicts import verdict_tables

Tables = Mapping[str, pd.DataFrame]
CELL = ["task", "regime", "costs", "arm"]
CELL_TITLES = ("Task", "Regime", "Costs", "Arm")


def detail_tables(tables: Tables) -> list[ReportTable]:
    """Every table of the report whose source is there."""
    made = [
        *verdict_tables(tables),
        *contrast_tables(tables),
        losses_table(tables, "log_score"),
        losses_table(tables, "utility"),
        *probe_tables(tables),
        crossing_table(tables),
        calibration_table(tables),
    ]
    return [table for table in made if table is not None and table.rows]


def contrast_tables(tables: Tables) -> list[ReportTable]:
    """By how much more each arm loses, one table per reference."""
    if "contrasts" not in tables:
        return []
    contrasts = at_own_costs(where(tables["contrasts"], currency="log_score"))
    losses = ("learning", "choosing", "discarded", "total")
    made = []
    for reference, name in REFERENCES.items():
        changes = where(contrasts, reference=reference)
        by_cell = _by_key(changes, [*CELL, "loss"])
        lines = []
        for cell in _cells(changes):
            rows = [by_cell.get((*cell, loss)) for loss in losses]
            sides = [row or {} for row in rows[:2]]
            p = [p_value(side.get("p")) for side in sides]
            seeds = str(max(row["n_seeds"] for row in rows if row))
            shown = [points(row, signed=True) for row in rows]
            lines.append([*_labels(*cell), *shown, *p, seeds])
        table = ReportTable(
            title=f"Changes of the losses against {name}",
            note="Hundredths of (oracle − best constant action) of expected log score; positive "
            "is worse; brackets are 95% intervals over seeds, for a single pair over items. p is "
            "of no change: over seeds an exact sign-flip test, which with n seeds cannot fall "
            "below 2 / 2^n; for a single pair a t test over groups of items. Nothing here is "
            "adjusted for the number of rows: which side is damaged is said by the verdict.",
            columns=[
                *(*CELL_TITLES, *(title(loss) for loss in losses)),
                *("p, learning", "p, choosing", "Seeds"),
            ],
            rows=lines,
            n_labels=4,
        )
        made.append(table)
    return made


def losses_table(tables: Tables, currency: str) -> ReportTable | None:
    """All losses at each arm's last step."""
    source = tables.get("losses_in_full", tables.get("losses"))
    if source is None:
        return None
    ends = at_own_costs(final_steps(where(without_starts(source), currency=currency)))
    losses = [loss for loss in LOSSES if loss in set(ends["loss"])]
    means = _by_key(over_seeds(ends, [*CELL, "loss"]), [*CELL, "loss"])
    lines = [
        [*_labels(*cell), *(points(means.get((*cell, loss))) for loss in losses)]
        for cell in _cells(ends)
    ]
    name = {"log_score": "expected log score"}.get(currency, currency)
    return ReportTable(
        title=f"Losses at the last step, in {name}",
        note="Hundredths of (oracle − best constant action) with 95% intervals. Learning = not "
        "encoded + not combined; choosing = threshold + readout; total = learning + discarded + "
        "choosing. Where the oracle is not known learning is counted from a bound.",
        columns=[*CELL_TITLES, *(title(loss) for loss in losses)],
        rows=lines,
        n_labels=4,
    )


def probe_tables(tables: Tables) -> list[ReportTable]:
    """AUROC of each latent at the last layer and step, one table per task."""
    if "probes" not in tables:
        return []
    probes = where(without_starts(tables["probes"]), kind="latent", measure="auroc")
    made = []
    for task in dict.fromkeys(probes["task"]):
        rows = final_steps(where(probes, task=task, layer=where(probes, task=task)["layer"].max()))
        means = _by_key(over_seeds(rows, ["regime", "arm", "latent"]), ["regime", "arm", "latent"])
        needed = rows.groupby("latent", sort=False)["needed"].first()
        lines = [
            [
                *(regime_label(regime), arm_label(arm)),
                *(plain(means.get((regime, arm, latent))) for latent in needed.index),
            ]
            for _, regime in settings_in(rows)
            for arm in arms_in(where(rows, regime=regime))
        ]
        table = ReportTable(
            title=f"What probes read at the last layer: {task.replace('_', ' ')}",
            note="AUROC with 95% intervals over seeds, at each arm's last step.",
            columns=[
                *("Regime", "Arm"),
                *(f"{z}" if needed[z] else f"{z} (not needed)" for z in needed.index),
            ],
            rows=lines,
            n_labels=2,
        )
        made.append(table)
    return made


def crossing_table(tables: Tables) -> ReportTable | None:
    """The shares of front and back at the cut that counts."""
    if "crossing" not in tables:
        return None
    crossing = where(tables["crossing"], stitch="identity")
    at_cut = where(crossing, currency="log_score", verdict_cut=True)
    if at_cut.empty:  # no layer of the before network said anything: there is no cut
        return None
    crossing = at_own_costs(at_cut)
    crossing = crossing.assign(change=crossing["u_bb"] - crossing["u_aa"])
    keys = [*CELL, "readout"]
    means = {}
    for name in ("change", "phi_front", "phi_back", "interaction"):
        crossing[name] = crossing[name] / crossing["scale"]
        means[name] = _by_key(over_seeds(crossing, keys, name), keys)
    lines = []
    for cell in _cells(crossing):
        for readout in dict.fromkeys(crossing["readout"]):
            rows = where(crossing, **dict(zip(keys, (*cell, readout), strict=True)))
            cuts = ", ".join(str(cut) for cut in sorted(rows["cut"].unique()))
            valid = f"{int(rows['shares_valid'].sum())} of {len(rows)}"
            shares = [points(mean.get((*cell, readout)), signed=True) for mean in means.values()]
            lines.append([*_labels(*cell), readout, *shares, cuts, valid])
    return ReportTable(
        title="The crossing at the verdict's cut",
        note="Change of the expected log score from before to after, in hundredths of (oracle − "
        "best constant action), divided between the layers before and after the cut, hybrids "
        "joined as they are. Where the "
        "interaction is too large the shares are not valid. The second data order is the null.",
        columns=[
            *(*CELL_TITLES, "Readout"),
            *("Change", "Front", "Back", "Interaction", "Cut", "Shares valid"),
        ],
        rows=lines,
        n_labels=5,
    )


def calibration_table(tables: Tables) -> ReportTable | None:
    """Calibration error, Brier score and log loss of each arm at its last step."""
    if "calibration_summary" not in tables:
        return None
    summary = at_own_costs(final_steps(tables["calibration_summary"]))
    titles = {"ece": "ECE", "ece_floor": "ECE by chance", "brier": "Brier", "log_loss": "Log loss"}
    means = {
        name: _by_key(over_seeds(summary, CELL, name), CELL) for name in titles if name in summary
    }
    return ReportTable(
        title="Calibration",
        note="Expected calibration error, Brier score and log loss (nats) at the stated costs, "
        "with 95% intervals over seeds. ECE by chance: what a calibrated report would score.",
        columns=[*CELL_TITLES, *(titles[name] for name in means)],
        rows=[
            [*_labels(*cell), *(plain(mean.get(cell)) for mean in means.values())]
            for cell in _cells(summary)
        ],
        n_labels=4,
    )


def competence_table(tables: Tables) -> ReportTable | None:
    """Does the symmetric network know the task, by task and regime?"""
    if "competence" not in tables:
        return None
    lines = []
    for (task, regime), rows in tables["competence"].groupby(["task", "regime"], sort=False):
        n, good = len(rows), int(rows["competent"].sum())
        low, high = rows["value"].min(), rows["value"].max()
        lines.append(
            [
                str(task).replace("_", " "),
                regime_label(str(regime)),
                str(rows["reference"].iloc[0]).replace("_", " "),
                number(low) if n == 1 else f"{number(low)} to {number(high)}",
                number(rows["threshold"].mean()),
                f"{good} of {n}" + ("" if good == n else ": void"),
            ]
        )
    return ReportTable(
        title="Competence gate",
        note="A study is void for a task that its symmetric networks do not know. Against the "
        "oracle: utility as a share of (oracle − best constant action); against logistic "
        "regression on the raw input: mean log score (nats).",
        columns=["Task", "Regime", "Measured against", "Value", "Threshold", "Competent"],
        rows=lines,
        n_labels=3,
    )


def _cells(table: pd.DataFrame) -> list[tuple[str, str, str, str]]:
    """The (task, regime, costs, arm) of a table, in the order of the figures."""
    return [
        (task, regime, costs, arm)
        for task, regime in settings_in(table)
        for costs in costs_in(where(table, task=task, regime=regime))
        for arm in arms_in(where(table, task=task, regime=regime, costs=costs))
    ]


def _by_key(table: pd.DataFrame, keys: list[str]) -> dict[tuple, dict[str, Any]]:
    """The rows of a table as mappings, by the values in `keys`."""
    return {tuple(row[key] for key in keys): row for row in table.to_dict("records")}  # type: ignore[misc]


def _labels(task: str, regime: str, costs: str, arm: str) -> list[str]:
    return [task.replace("_", " "), regime_label(regime), costs_label(costs), arm_label(arm)]
