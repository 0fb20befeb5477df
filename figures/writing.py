"""What did each arm make of what the start writes? Change since the start, and along training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.axes import percent_axis, step_axis
from figures.claims import UNITS
from figures.tables import (
    Tables,
    arms_in,
    files_by_task,
    final_steps,
    over_seeds,
    read_tables,
    where,
)
from mechinterp.arm_names import ADVANTAGES, REORDERED, kind_and_advantage
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from figures.claims import _Unit

CAPTION = (
    "What each arm writes when sampled on fresh problems of several sets. By arm: the change at "
    "its last step since the start of the same seed; pale markers are single seeds, the grey band "
    "is the margin of ±5 points of measures that are shares. The favourite answer is the one "
    "given most often to whatever problem; its excess is over the share that it would have were "
    "all answers right. Steps are intermediate results of the scratchpad: not written, or, of "
    "those written, wrong. Along training (files named steps): the share of right answers "
    "(pass@1), all arms from the start of their seed at step 0, and side by side where they are "
    "more than four. Standardised: a group's rewards are divided by their standard deviation; "
    "centred: they are not. Symmetric: supervised training went on as before, without rewards."
)
NEEDS = {
    "writing": (
        *("task", "regime", "arm", "seed", "step"),
        *("problems", "measure", "value"),
    )
}
MEASURES = ("pass_1", "repetition", "steps_missing", "steps_wrong", "response_length")
MARGIN = 5.0  # points
PAGE, ROW, BETWEEN = 8.5, 0.17, 0.5  # inches: all panels of a column, an arm, below a panel


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """Per task a file of changes, or several of some measures each, and one of the course."""
    table = read_tables(source, NEEDS, starts=True)["writing"]
    files: dict[str, dict[str, Any]] = {}
    for stem, setting in files_by_task("writing", table).items():
        rows = where(table, **setting)
        measures = [measure for measure in MEASURES if measure in set(rows["measure"])]
        at_once = max(1, int(PAGE / (ROW * (rows["arm"].nunique() - 1) + BETWEEN)))
        for page, first in enumerate(range(0, len(measures), at_once)):
            ending = f"_{page + 1}" if page else ""
            chosen = tuple(measures[first : first + at_once])
            files[f"{stem}{ending}"] = {**setting, "measures": chosen}
        files[f"{stem}_steps"] = {**setting, "measures": None}
    return files


@style.styled
def draw(
    source: str | Path | Tables, *, task: str, regime: str, measures: Sequence[str] | None
) -> Figure:
    """Changes in `measures` by arm, or without any the share of right answers by step."""
    table = where(read_tables(source, NEEDS, task=task, starts=True)["writing"], regime=regime)
    if (table["arm"] == "before").all() or not (table["arm"] == "before").any():
        raise AnalysisError("table 'writing' has no arm beside its start, the arm 'before'")
    note = f"{style.setting_line(task, regime).capitalize()}. "
    return _draw_course(table, note) if measures is None else _draw_changes(table, measures, note)


def _draw_changes(table: pd.DataFrame, measures: Sequence[str], note: str) -> Figure:
    """Rows of panels: measures. Columns: sets of problems. Rows of a panel: arms."""
    changes = _changes(table)
    arms, sets = arms_in(changes), list(dict.fromkeys(changes["problems"]))
    figure, axes = style.grid(
        len(measures),
        len(sets),
        row_height=ROW * len(arms) + BETWEEN,
        margin=0.8,
        sharex="row",
        sharey=True,
    )
    looks, summaries = arm_styles(arms), []
    for panels, measure in zip(axes, measures, strict=True):
        unit = UNITS[f"change_{measure}"]
        rows = where(changes, measure=measure)
        summary = over_seeds(rows, ["problems", "arm"], scale=unit.scale)
        summaries.append(summary)
        reach = [summary[["mean", "low", "high"]].to_numpy().ravel(), unit.scale * rows["value"]]
        is_share = unit.unit == "%"
        if is_share:  # intervals of few seeds go beyond what there is
            reach = [np.clip(values, -100, 100) for values in reach]
        for ax, problems in zip(panels, sets, strict=True):
            if is_share:
                ax.axvspan(-MARGIN, MARGIN, color=style.PALE, lw=0, zorder=-1)
            ax.axvline(0, color=style.GREY, lw=0.5, zorder=0)
            points, means = (where(each, problems=problems) for each in (rows, summary))
            _dots(ax, points.assign(value=unit.scale * points["value"]), means, arms, looks)
            least = 1.2 * MARGIN if is_share else 0
            percent_axis(ax, "x", np.concatenate(reach), signed=True, at_least=least, log_above=1e9)
            ax.set_xlabel(style.wrap(_axis_label(unit), 80 // len(sets)))
    for ax, problems in zip(axes[0], sets, strict=True):
        ax.set_title(style.wrap(problems))
    style.letter_panels(axes)
    shares = any(UNITS[f"change_{measure}"].unit == "%" for measure in measures)
    handles = [
        style.handle("single seeds", color=style.GREY, marker="o", ms=2, alpha=0.5, ls="none")
    ]
    if shares:
        handles.append(style.patch_handle("margin: ±5 points", facecolor=style.PALE))
    style.legend(figure, handles, note + style.seeds_note(*summaries))
    return figure


def _changes(table: pd.DataFrame) -> pd.DataFrame:
    """Every arm's last step less the start of its seed; an interval over problems is no longer."""
    keys = ["seed", "problems", "measure"]
    starts = where(table, arm="before")[[*keys, "value"]]
    ends = final_steps(table[table["arm"] != "before"]).drop(
        columns=["low", "high"], errors="ignore"
    )
    changes = ends.merge(starts, on=keys, suffixes=("", "_before"))
    return changes.assign(value=changes["value"] - changes["value_before"])


def _dots(
    ax: Axes,
    points: pd.DataFrame,
    means: pd.DataFrame,
    arms: list[str],
    looks: dict[str, ArmStyle],
) -> None:
    for y, arm in enumerate(arms):
        look, summary = looks[arm], where(means, arm=arm)
        seeds = where(points, arm=arm)["value"]
        ax.scatter(seeds, np.full(len(seeds), y), s=4, c=look.color, alpha=0.3, lw=0, zorder=1)
        ax.errorbar(
            summary["mean"],
            np.full(len(summary), y),
            xerr=style.errors(summary),
            color=look.color,
            marker=look.marker,
            ms=4,
            mec="white",
            mew=0.3,
            elinewidth=1,
            ls="none",
            zorder=3,
        )
    ax.set_yticks(range(len(arms)), [looks[arm].label for arm in arms])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(arms) - 0.4, -0.6)


def _axis_label(unit: _Unit) -> str:
    what = unit.name.removesuffix(" since the start")
    measured = "points" if unit.unit == "%" else unit.unit
    return f"{what[0].upper()}{what[1:]} ({measured})"


def _draw_course(table: pd.DataFrame, note: str) -> Figure:
    """Rows: how rewards become advantages. Columns: sets of problems."""
    import pandas as pd

    table = where(table, measure="pass_1")
    table = table[table["arm"] != REORDERED]  # measured at its end only
    advantages = {arm: kind_and_advantage(arm)[1] for arm in arms_in(table)}
    found = [each for each in ADVANTAGES if each in advantages.values()] or [None]
    sets = list(dict.fromkeys(table["problems"]))
    figure, axes = style.grid(len(found), len(sets), row_height=1.7, sharex=True, sharey="row")
    starts, summaries = where(table, arm="before"), []
    for panels, advantage in zip(axes, found, strict=True):
        arms = [a for a, own in advantages.items() if own in (None, advantage) and a != "before"]
        courses = pd.concat([table[table["arm"].isin(arms)], *(starts.assign(arm=a) for a in arms)])
        summary = over_seeds(courses, ["problems", "arm", "step"], scale=100)
        summaries.append(summary)
        for ax, problems in zip(panels, sets, strict=True):
            percent_axis(ax, "y", summary[["mean", "low", "high"]].to_numpy())
            step_axis(ax, summary["step"].unique().tolist())
            shifts = style.beside(arms)
            for arm, look in arm_styles(arms).items():
                rows = where(summary, problems=problems, arm=arm)
                style.curve(ax, rows, "step", look, shift=shifts[arm], markersize=3)
        panels[0].set_ylabel(f"{advantage}\n" * (advantage is not None) + "right answers (%)")
    for ax, problems in zip(axes[0], sets, strict=True):
        ax.set_title(style.wrap(problems))
    figure.supxlabel("Training step (logarithmic)", fontsize=7)
    style.letter_panels(axes)
    handles = style.arm_handles([arm for arm in advantages if arm != "before"])
    style.legend(figure, handles, note + style.seeds_note(*summaries))
    return figure


if __name__ == "__main__":
    from figures import run_script

    run_script("writing")
