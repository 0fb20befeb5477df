"""How good is a confidence, said or read, in and out of distribution? Measures by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.arm_styles import arm_label
from figures.stated_reliability import READINGS
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
    "What confidences are worth, at each arm's last step. Rows: the questions as learned from, "
    "then as the network has not seen them. Calibration error: in ten bins, less what chance "
    "gives it. AUROC: of telling right from wrong answers; dashed: chance. Resolution: variance "
    "of the share of right answers over the bins. Saturated: within 0.05 of 0 or 1. Distance from "
    "truth: mean distance from the probability that the answer is right, which the task knows. "
    "What is fitted (recalibration, temperature, probe) is fitted on other questions, as learned "
    "from. Pale markers are single seeds. A confidence that is not said to half of the questions "
    "is not drawn. Colour is the reading here, not the arm."
)
NEEDS = {
    "stated_confidence": (
        *("task", "regime", "arm", "seed", "step"),
        *("questions", "reading", "measure", "value"),
    )
}
ROW = 0.32  # inches for an arm and its readings
SPREAD = 0.2  # of an arm's row, between two readings


class _Measure(NamedTuple):
    title: str
    nothing: float  # its value where a confidence is worth nothing, or has no fault


MEASURES = {
    "ece_debiased": _Measure("calibration error", 0),
    "auroc": _Measure("AUROC", 0.5),
    "resolution": _Measure("resolution", 0),
    "saturated": _Measure("saturated (share)", 0),
    "truth_gap": _Measure("distance from truth", 0),
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """A file per task."""
    table = read_tables(source, NEEDS, starts=True)["stated_confidence"]
    return dict(files_by_task("stated_confidence", table))


@style.styled
def draw(source: str | Path | Tables, *, task: str, regime: str) -> Figure:
    """Rows of panels: questions. Columns: measures. Rows of a panel: arms."""
    table = read_tables(source, NEEDS, task=task, starts=True)["stated_confidence"]
    table = final_steps(where(table, regime=regime))
    arms, questions = arms_in(table), list(dict.fromkeys(table["questions"]))
    figure, axes = style.grid(
        len(questions),
        len(MEASURES),
        row_height=ROW * len(arms) * 0.75 + 0.3,
        margin=0.7,
        sharex="col",
        sharey=True,
    )
    summaries = []
    for panels, asked in zip(axes, questions, strict=True):
        for ax, (name, measure) in zip(panels, MEASURES.items(), strict=True):
            rows = where(table, questions=asked, measure=name)
            summaries.append(_panel(ax, rows, arms))
            look = {"color": style.GREY, "lw": 0.6, "zorder": 0}
            ax.axvline(measure.nothing, ls="--" if measure.nothing else "-", **look)
        panels[0].set_yticks(range(len(arms)), [arm_label(arm) for arm in arms])
        panels[0].set_ylabel(style.wrap(f"questions: {asked}"))
    for ax, measure in zip(axes[-1], MEASURES.values(), strict=True):
        ax.set_xlabel(measure.title[0].upper() + measure.title[1:])
    style.letter_panels(axes)
    handles = [
        style.handle(each.label, color=each.color, marker=each.marker, ls="none")
        for reading, each in READINGS.items()
        if reading in set(table["reading"])
    ]
    note = f"{style.setting_line(task, regime).capitalize()}. {style.seeds_note(*summaries)}"
    style.legend(figure, handles, note)
    return figure


def _panel(ax: Axes, rows: pd.DataFrame, arms: list[str]) -> pd.DataFrame:
    from matplotlib.ticker import MaxNLocator

    summary = over_seeds(rows, ["arm", "reading"])
    shifts = SPREAD * (np.arange(len(READINGS)) - (len(READINGS) - 1) / 2)
    for shift, (reading, each) in zip(shifts, READINGS.items(), strict=True):
        seeds, means = (where(table, reading=reading) for table in (rows, summary))
        at = seeds["arm"].map(arms.index) + shift
        ax.scatter(seeds["value"], at, s=3, c=each.color, alpha=0.25, lw=0, zorder=1)
        ax.errorbar(
            means["mean"],
            means["arm"].map(arms.index) + shift,
            xerr=style.errors(means),
            color=each.color,
            marker=each.marker,
            ms=3,
            mec="white",
            mew=0.2,
            elinewidth=0.8,
            ls="none",
            zorder=3,
        )
    for y in np.arange(len(arms) - 1) + 0.5:
        ax.axhline(y, color=style.PALE, lw=0.5, zorder=-1)
    ax.xaxis.set_major_locator(MaxNLocator(3, steps=[1, 2, 2.5, 5, 10]))
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(arms) - 0.5, -0.5)
    return summary


if __name__ == "__main__":
    from figures import run_script

    run_script("stated_confidence")
