"""Slower, or worse for good? How much later an arm learns, against how much less it has learnt."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.axes import hide_unused, percent_axis
from figures.tables import Tables, arms_in, costs_of, over_seeds, read_tables, where
from mechinterp.arm_names import CONTROL
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Slower, or worse for good? From initialisation: how many times as many steps as symmetric "
    "training an arm takes to half of what the latter learns in all (right: later; an arm that "
    "never gets there counts with its last step), against how much more learning loss it is left "
    "with at the end (up: less learnt; % of oracle − constant), both at the costs that the arm "
    "serves. Pale markers are single seeds. To the right but within the grey band: slower only."
)
MARGIN = 5.0  # % of (oracle - constant), as in `dissociation`
PLANE = ["steps_to_learn", "learning"]
N_COLUMNS = 4
NEEDS = {"measures": ("task", "regime", "arm", "costs", "seed", "measure", "value")}


@style.styled
def draw(source: str | Path | Tables) -> Figure:
    """One panel per task."""
    changes = _changes(read_tables(source, NEEDS)["measures"])
    if changes.empty:
        raise AnalysisError("table 'measures' has no arm trained from init beside a control")
    tasks = list(dict.fromkeys(changes["task"]))
    n_columns = min(len(tasks), N_COLUMNS)
    n_rows = -(-len(tasks) // n_columns)
    figure, axes = style.grid(
        n_rows,
        n_columns,
        width=style.FULL_WIDTH if n_columns > 2 else style.SINGLE_COLUMN * 1.3,
        row_height=2.4 if n_rows == 1 else 1.9,
        sharex=True,
        sharey=True,
    )
    looks = arm_styles(arms_in(changes))
    summaries = []
    for ax, task in zip(axes.flat, tasks, strict=False):
        panel = where(changes, task=task)
        summaries += [_panel(ax, where(panel, arm=arm), looks[arm]) for arm in arms_in(panel)]
        ax.set_title(style.wrap(task))
    hide_unused(axes, len(tasks))
    held = {
        measure: np.concatenate(
            [changes[measure], *(s[measure][side] for s in summaries for side in ("low", "high"))]
        )
        for measure in PLANE
    }
    for ax in axes.flat:
        percent_axis(
            ax,
            "y",
            held["learning"],
            signed=True,
            at_least=2.5 * MARGIN,
            log_above=np.inf,
        )
        _doublings_axis(ax, held["steps_to_learn"])
    figure.supxlabel("Steps to half of the control's learning, times the control's", fontsize=7)
    figure.supylabel("More learning loss at the end\n(%)", fontsize=7)
    style.letter_panels(axes)
    note = style.seeds_note(*(s for summary in summaries for s in summary.values()))
    style.legend(figure, style.arm_handles(arms_in(changes)), note)
    return figure


def _changes(measures: pd.DataFrame) -> pd.DataFrame:
    """Both measures of every arm that serves costs, less the control's of the same seed."""
    measures = measures[(measures["regime"] == "from_init") & measures["measure"].isin(PLANE)]
    keys = ["task", "costs", "seed"]
    wide = measures.pivot_table(index=[*keys, "arm"], columns="measure", values="value")
    if not set(PLANE) <= set(wide.columns):
        return pd.DataFrame(columns=[*keys, "arm", *PLANE])
    wide = wide.dropna().reset_index()
    control = wide.loc[wide["arm"] == CONTROL, [*keys, *PLANE]]
    own = [costs_of(arm) == costs for arm, costs in zip(wide["arm"], wide["costs"], strict=True)]
    arms = wide[np.array(own, dtype=bool) & ~wide["arm"].str.startswith("ex_post")]
    both = arms.merge(control, on=keys, suffixes=("", "_control"))
    for measure in PLANE:
        both[measure] -= both.pop(f"{measure}_control")
    return both.assign(learning=100 * both["learning"])


def _panel(ax: Axes, seeds: pd.DataFrame, look: ArmStyle) -> dict[str, pd.DataFrame]:
    """One arm: its seeds and their mean, with the intervals of both measures."""
    ax.axhspan(-MARGIN, MARGIN, color=style.PALE, lw=0, zorder=0)
    ax.axvline(0, color=style.GREY, lw=0.5, zorder=0)
    ax.scatter(seeds["steps_to_learn"], seeds["learning"], s=5, c=look.color, alpha=0.3, lw=0)
    summary = {measure: over_seeds(seeds, ["task", "arm"], measure) for measure in PLANE}
    x, y = (summary[measure] for measure in PLANE)
    ax.errorbar(
        x["mean"],
        y["mean"],
        xerr=style.errors(x),
        yerr=style.errors(y),
        color=look.color,
        marker=look.marker,
        ms=5,
        mec="white",
        mew=0.4,
        elinewidth=0.8,
        zorder=5,
    )
    return summary


def _doublings_axis(ax: Axes, doublings: np.ndarray) -> None:
    """log2 ratios as ratios: 1/2, 1, 2, 4, with room for at least half a doubling."""
    from matplotlib.ticker import FixedLocator, FuncFormatter

    low, high = np.nanmin([*doublings, -0.5]), np.nanmax([*doublings, 0.5])
    ax.set_xlim(low - 0.1, high + 0.1)
    ax.xaxis.set_major_locator(FixedLocator(np.arange(np.ceil(low), np.floor(high) + 1)))
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda x, _: f"{2**x:g}×" if x >= 0 else f"1/{2**-x:g}×")
    )


if __name__ == "__main__":
    from figures import run_script

    run_script("speed")
