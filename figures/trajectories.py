"""When do the losses fall or rise? Learning and choosing loss over training steps, by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles, costs_label
from figures.axes import percent_axis, step_axis
from figures.tables import (
    FAMILIES,
    Tables,
    arms_in,
    at_own_costs,
    costs_in,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    where,
)
from mechinterp.arm_names import kind_and_weights

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Losses over training. Learning loss (oracle − best readout of any layer) and choosing loss "
    "(that readout's counterpart at the end − the decision made: threshold + readout), in "
    "expected log score at the stated costs, as % of oracle − best constant action. Ex-post arms "
    "are the symmetric network with a shifted threshold, so their learning loss is the symmetric "
    "one. An axis that goes past ±100% is linear within ±10%, logarithmic beyond. † The oracle is "
    "not known: learning loss is counted from a bound, and only its differences mean anything."
)
LOSSES = ["learning", "choosing"]
NEEDS = {"losses": ("task", "regime", "arm", "seed", "step", "costs", "currency", "loss", "value")}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("trajectories", _courses(read_tables(source, NEEDS)["losses"]))


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Rows: task and regime. Columns: learning, then choosing loss, at each costs."""
    losses = _courses(read_tables(source, NEEDS, task=task, arms=arms)["losses"])
    losses = losses[(losses["currency"] == "log_score") & losses["loss"].isin(LOSSES)]
    losses = at_own_costs(losses)
    # At step 0 all arms are the network before: not yet adjusted, in no order of the data.
    later = losses["arm"].str.match("ex_post|symmetric_reordered")
    losses = losses[(losses["step"] > 0) | ~later]
    settings = settings_in(losses)
    columns = [(loss, costs) for loss in LOSSES for costs in costs_in(losses)]
    figure, axes = style.grid(
        len(settings),
        len(columns),
        width=style.FULL_WIDTH if len(columns) > 2 else 5.0,
        row_height=1.35 if len(settings) > 1 else 1.8,
    )
    summary = over_seeds(losses, ["task", "regime", "loss", "costs", "arm", "step"], scale=100)
    for panels, (task, regime) in zip(axes, settings, strict=True):
        row = where(summary, task=task, regime=regime)
        for ax, (loss, costs) in zip(panels, columns, strict=True):
            _panel(ax, where(row, loss=loss), costs, arm_styles(arms_in(losses)))
        source_rows = where(losses, task=task, regime=regime)
        unknown = "oracle_known" in source_rows and not source_rows["oracle_known"].all()
        panels[0].set_ylabel(style.setting_label(task, regime) + (" †" if unknown else ""))
    for ax, (loss, costs) in zip(axes[0], columns, strict=True):
        ax.set_title(f"{loss} loss\n{costs_label(costs)}")
    figure.supylabel("Loss (% of oracle − constant)", fontsize=7)
    if set(losses["regime"]) != {"pair"}:
        figure.supxlabel("Training step (logarithmic)", fontsize=7)
    style.letter_panels(axes)
    style.legend(figure, style.arm_handles(arms_in(losses)), style.seeds_note(summary))
    return figure


def _courses(losses: pd.DataFrame) -> pd.DataFrame:
    """Without refits, which are made of networks whose training has ended."""
    kinds = {arm: kind_and_weights(arm)[0] for arm in losses["arm"].unique()}
    return losses[~losses["arm"].map(kinds).isin(FAMILIES["refits"])]


def _panel(ax: Axes, summary: pd.DataFrame, costs: str, looks: dict[str, ArmStyle]) -> None:
    """One loss at `costs`, on the scale of that loss at all costs."""
    above = np.inf if (summary["loss"] == "learning").all() else 100
    percent_axis(ax, "y", summary[["mean", "low", "high"]].to_numpy(), log_above=above)
    ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
    summary = where(summary, costs=costs)
    arms = arms_in(summary)
    if (summary["regime"] == "pair").all():  # three checkpoints rather than a course of training
        summary = summary.assign(step=[arms.index(arm) for arm in summary["arm"]])
        ax.set_xticks(range(len(arms)), arms)
        ax.set_xlim(-0.5, len(arms) - 0.5)
    else:
        step_axis(ax, summary["step"].unique().tolist())
    shifts = style.beside(arms)
    for arm in arms:
        # Hollow ex-post markers, so that the symmetric ones they fall on stay visible.
        hollow = {"markerfacecolor": "white"} if arm.startswith("ex_post") else {}
        style.curve(
            ax,
            where(summary, arm=arm),
            "step",
            looks[arm],
            shift=shifts[arm],
            markersize=3,
            **hollow,
        )


if __name__ == "__main__":
    from figures import run_script

    run_script("trajectories")
