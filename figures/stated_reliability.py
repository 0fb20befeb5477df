"""Does the confidence that an arm states come true, and what could be read instead? Diagrams."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from figures import style
from figures.arm_styles import ArmStyle, arm_label
from figures.axes import hide_unused
from figures.tables import (
    Tables,
    arms_in,
    files_by_task,
    final_steps,
    over_seeds,
    read_tables,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Reliability of what a network says of its own answers, at each arm's last step and on "
    "questions like those it learned from: the share of right answers against the confidence, in "
    "ten bins of equal width. Readings of the same answers: the confidence as said; the same "
    "recalibrated (Platt's scaling); the probability of the answer, at a fitted temperature; and "
    "a logistic probe of the residual stream where the confidence is about to be said. All fits "
    "are on other questions. The area of a marker is the share of answers in its bin; bins that "
    "fewer than half of the seeds use are left out, and lines join neighbours only. Diagonal: "
    "perfect calibration. Colour is the reading here, not the arm."
)
NEEDS = {
    "stated_reliability": (
        *("task", "regime", "arm", "seed", "step", "questions", "reading"),
        *("bin", "predicted", "observed", "n_items"),
    )
}
N_COLUMNS = 4


class Reading(NamedTuple):
    color: str
    marker: str
    label: str


READINGS = {
    "said": Reading("#000000", "o", "as said"),
    "said_recalibrated": Reading("#0072B2", "s", "as said, recalibrated"),
    "answer_temperature": Reading("#E69F00", "^", "probability of the answer, temperature fitted"),
    "probe": Reading("#CC79A7", "D", "probe"),
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """A file per task."""
    table = read_tables(source, NEEDS, starts=True)["stated_reliability"]
    return dict(files_by_task("stated_reliability", table))


@style.styled
def draw(source: str | Path | Tables, *, task: str, regime: str) -> Figure:
    """A panel per arm."""
    table = read_tables(source, NEEDS, task=task, starts=True)["stated_reliability"]
    bins = final_steps(where(table, regime=regime, questions=table["questions"].iloc[0]))
    arms = arms_in(bins)
    n_columns = min(len(arms), N_COLUMNS)
    figure, axes = style.grid(
        -(-len(arms) // n_columns),
        n_columns,
        width=min(style.FULL_WIDTH, 0.4 + 1.7 * n_columns),
        row_height=1.75,
        sharex=True,
        sharey=True,
    )
    summaries = []
    for ax, arm in zip(axes.flat, arms, strict=False):
        summaries.append(_panel(ax, where(bins, arm=arm)))
        ax.set_title(style.wrap(arm_label(arm), 24))
    hide_unused(axes, len(arms))
    figure.supxlabel("Confidence", fontsize=7)
    figure.supylabel("Share of right answers", fontsize=7)
    style.letter_panels(axes)
    handles = [
        style.handle(each.label, color=each.color, marker=each.marker, lw=0.8)
        for reading, each in READINGS.items()
        if reading in set(bins["reading"])
    ]
    note = f"{style.setting_line(task, regime).capitalize()}. {style.seeds_note(*summaries)}"
    style.legend(figure, handles, note)
    return figure


def _panel(ax: Axes, bins: pd.DataFrame) -> pd.DataFrame:
    ax.plot([0, 1], [0, 1], color=style.GREY, lw=0.6, zorder=0)
    n_seeds = bins["seed"].nunique()
    summary = over_seeds(bins, ["reading", "bin"], "observed")
    summary = summary[2 * summary["n_seeds"] >= n_seeds]
    cells = bins.groupby(["reading", "bin"], observed=True)
    at = cells.agg(predicted=("predicted", "mean"), n_items=("n_items", "sum"))
    at["share"] = at["n_items"] / at.groupby("reading")["n_items"].transform("sum")
    summary = summary.merge(at.reset_index(), on=["reading", "bin"])
    for reading, each in READINGS.items():
        rows = where(summary, reading=reading)
        look = ArmStyle(each.color, each.marker, "-", each.label)
        gaps = rows["bin"].sort_values().diff().ne(1).cumsum()
        for _, neighbours in rows.groupby(gaps):
            style.curve(ax, neighbours, "predicted", look, marker=None, lw=0.8)
        area = 2 + 40 * rows["share"]
        ax.scatter(rows["predicted"], rows["mean"], s=area, c=each.color, marker=each.marker, lw=0)
    ax.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
    ax.set_box_aspect(1)
    return summary


if __name__ == "__main__":
    from figures import run_script

    run_script("stated_reliability")
