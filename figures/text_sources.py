"""Is it the network that changed, or only its texts? The same decision on texts of each source."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.tables import Tables, arms_in, files_by_task, over_seeds, read_tables, where

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "The start (hollow) and each arm at its end (filled) on identical texts: right ones, those "
    "that the start wrote and those that the arm wrote. Accuracy: the likeliest action is the one "
    "that the prompt makes right, which after a slip is not the one that goes on from it; "
    "probability: of that action. Contradicting: texts whose last result was changed, and how "
    "often the likeliest action goes on from the text, or from the prompt. Lines join the two "
    "readers."
)
NEEDS = {
    "text_sources": (
        *("task", "regime", "arm", "seed", "reader", "source"),
        *("measure", "value"),
    )
}
ROW = 0.17  # inches


class _Panel(NamedTuple):
    source: str
    measure: str
    title: str
    label: str


PANELS = (
    (
        _Panel("right", "accuracy", "right texts", "Accuracy (%)"),
        _Panel("before", "accuracy", "the start's texts", "Accuracy (%)"),
        _Panel("after", "accuracy", "the arm's texts", "Accuracy (%)"),
        _Panel("contradicting", "follows_scratchpad", "contradicting texts", "Follow the text (%)"),
    ),
    (
        _Panel("right", "probability", "", "Mean probability (%)"),
        _Panel("before", "probability", "", "Mean probability (%)"),
        _Panel("after", "probability", "", "Mean probability (%)"),
        _Panel("contradicting", "follows_prompt", "", "Follow the prompt (%)"),
    ),
)


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """A file per task."""
    return dict(files_by_task("text_sources", read_tables(source, NEEDS)["text_sources"]))


@style.styled
def draw(source: str | Path | Tables, *, task: str, regime: str) -> Figure:
    """Columns: sources of texts. Rows of a panel: arms."""
    table = where(read_tables(source, NEEDS, task=task)["text_sources"], regime=regime)
    arms = arms_in(table)
    figure, axes = style.grid(2, 4, row_height=ROW * len(arms) + 0.45, margin=0.8, sharey=True)
    looks, summaries = arm_styles(arms), []
    for row, panels in zip(axes, PANELS, strict=True):
        for ax, panel in zip(row, panels, strict=True):
            rows = where(table, source=panel.source, measure=panel.measure)
            summaries.append(over_seeds(rows, ["arm", "reader"], scale=100))
            _dumbbells(ax, summaries[-1], looks)
            ax.set_title(panel.title)
            ax.set_xlabel(panel.label)
    style.letter_panels(axes)
    line = {"marker": "o", "ls": "none", "color": style.GREY}
    handles = [
        style.handle("read by the start", mfc="white", **line),
        style.handle("read by the arm", **line),
    ]
    note = f"{style.setting_line(task, regime).capitalize()}. {style.seeds_note(*summaries)}"
    style.legend(figure, handles, note)
    return figure


def _dumbbells(ax: Axes, summary: pd.DataFrame, looks: dict[str, ArmStyle]) -> None:
    ends = summary.pivot_table(index="arm", columns="reader", values="mean")
    for y, (arm, look) in enumerate(looks.items()):
        if arm in ends.index:
            ax.plot(ends.loc[arm, ["before", "after"]], [y, y], color=look.color, lw=0.6, alpha=0.5)
        for reader, face in (("before", "white"), ("after", look.color)):
            rows = where(summary, arm=arm, reader=reader)
            ax.errorbar(
                rows["mean"],
                np.full(len(rows), y),
                xerr=style.errors(rows),
                color=look.color,
                marker=look.marker,
                mfc=face,
                ms=3.5,
                mew=0.6,
                elinewidth=0.8,
                ls="none",
                zorder=3 if reader == "after" else 2,
            )
    ax.set_xlim(-3, 103)
    ax.set_xticks([0, 50, 100])
    ax.set_yticks(range(len(looks)), [look.label for look in looks.values()])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(looks) - 0.4, -0.6)


if __name__ == "__main__":
    from figures import run_script

    run_script("text_sources")
