"""Do the network's probabilities mean what they say? Reliability diagrams by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles, costs_label
from figures.tables import (
    Tables,
    arms_in,
    at_own_costs,
    costs_in,
    final_steps,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    where,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Calibration at each arm's last step: the share of the last action's label that is observed "
    "against the report for it, items counting with what they are worth at the stated costs, in "
    "bins of the report; the area of a marker is the share of items in its bin. Bins in which "
    "some seed has no items are left out. Diagonal: perfect calibration. Beside each panel: "
    "expected calibration error (ECE) over all bins, ± half of the 95% t interval over seeds. An "
    "arm that is not adjusted to the costs is off the diagonal by its threshold alone."
)
NEEDS = {
    "calibration": (
        *("task", "regime", "arm", "seed", "step", "costs"),
        *("predicted", "observed", "bin", "n_items"),
    )
}
OPTIONAL = {"calibration_summary": ("task", "regime", "arm", "seed", "step", "costs", "ece")}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("calibration", read_tables(source, NEEDS)["calibration"])


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Rows: task and regime. Columns: costs."""
    tables = read_tables(source, NEEDS, OPTIONAL, task=task, arms=arms)
    bins = at_own_costs(final_steps(tables["calibration"]))
    settings, costs = settings_in(bins), costs_in(bins)
    most = bins.groupby(["task", "regime", "costs"])["arm"].nunique().max()
    figure, axes = style.grid(
        len(settings),
        len(costs),
        width=min(style.FULL_WIDTH, max(0.6 + 2.4 * len(costs), 4.6 if most > 4 else 0)),
        row_height=max(1.6, 0.15 * most + 0.35),  # the errors beside a panel need a line each
    )
    looks = arm_styles(arms_in(bins))
    errors = tables.get("calibration_summary")
    summaries = []
    for panels, (task, regime) in zip(axes, settings, strict=True):
        for ax, cost in zip(panels, costs, strict=True):
            here = {"task": task, "regime": regime, "costs": cost}
            summaries.append(_panel(ax, where(bins, **here), looks))
            if errors is not None:
                _list_errors(ax, where(final_steps(errors), **here), looks, where(bins, **here))
        panels[0].set_ylabel(f"{style.setting_label(task, regime)}\nobserved share")
    for ax, cost in zip(axes[0], costs, strict=True):
        ax.set_title(costs_label(cost))
    for ax in axes[-1]:
        ax.set_xlabel("Reported probability")
    style.letter_panels(axes)
    style.legend(figure, style.arm_handles(list(looks)), style.seeds_note(*summaries))
    return figure


def _panel(ax: Axes, bins: pd.DataFrame, looks: dict[str, ArmStyle]) -> pd.DataFrame:
    ax.plot([0, 1], [0, 1], color=style.GREY, lw=0.6, zorder=0)
    summary = over_seeds(bins, ["arm", "bin"], "observed")
    summary = summary[summary["n_seeds"] == summary["n_seeds"].max()]
    at = bins.groupby(["arm", "bin"])[["predicted", "n_items"]].mean().reset_index()
    summary = summary.merge(at, on=["arm", "bin"])
    for arm in arms_in(summary):
        rows, look = where(summary, arm=arm), looks[arm]
        style.curve(ax, rows, "predicted", look, marker=None, lw=0.8)
        area = 2 + 60 * rows["n_items"] / rows["n_items"].sum()
        ax.scatter(rows["predicted"], rows["mean"], s=area, c=look.color, marker=look.marker, lw=0)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.set_box_aspect(1)
    return summary


def _list_errors(
    ax: Axes, errors: pd.DataFrame, looks: dict[str, ArmStyle], bins: pd.DataFrame
) -> None:
    """The arms' calibration errors to the right of the panel, beside their markers."""
    summary = over_seeds(errors, ["arm"], "ece")
    handles = []
    for arm in arms_in(bins):
        for mean, high in where(summary, arm=arm)[["mean", "high"]].to_numpy(float):
            text = f"{mean:.3f}" + (f" ± {high - mean:.3f}" if np.isfinite(high) else "")
            look = looks[arm]
            handles.append(style.handle(text, color=look.color, marker=look.marker, ls="none"))
    ax.legend(
        handles=handles,
        title="ECE",
        loc="upper left",
        bbox_to_anchor=(1.0, 1.0),
        handlelength=1,
        handletextpad=0.3,
        alignment="left",
    )


if __name__ == "__main__":
    from figures import run_script

    run_script("calibration")
