"""Is least known where knowing pays least? Incentive to learn and divergence by posterior."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles, costs_label
from figures.tables import (
    KEYS,
    Tables,
    arms_in,
    costs_in,
    costs_of,
    final_steps,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    where,
)
from mechinterp.arm_names import kind_and_weights

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Incentive to learn and what is known, by posterior. Upper strips: predicted incentive to "
    "learn at each costs relative to symmetric ones (dotted line), in the colour of the arm that "
    "serves them. Panels: mean KL divergence of the network's report from the posterior, after a "
    "refit of one constant at symmetric costs, by nearest integer of the posterior log-odds, at "
    "each arm's last step; intervals are cut below zero. If weighting starved learning as "
    "predicted, an arm would be further above the symmetric one where its strip is lower."
)
NEEDS = {"incentives": (*KEYS, "costs", "log_odds", "posterior", "predicted", "divergence")}
MAX_COLUMNS = 4
TICKS = np.array([0.0001, 0.01, 0.1, 0.5, 0.9, 0.99, 0.9999])
DODGE = 0.12  # log-odds between arms
LINESTYLES = ("-", "--", "-.", ":")


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("incentives", _named(read_tables(source, NEEDS)["incentives"]), max_settings=8)


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """A strip and a panel per task and regime: the symmetric arm, weighted ones, those of pairs."""
    table = final_steps(read_tables(source, NEEDS, task=task, arms=arms)["incentives"])
    table = _named(table)
    settings = settings_in(table)
    n_columns = min(len(settings), MAX_COLUMNS)
    n_blocks = -(-len(settings) // n_columns)
    figure, axes = style.grid(
        2 * n_blocks,
        n_columns,
        width=min(style.FULL_WIDTH, 1.3 + 2.0 * n_columns),
        row_height=1.1,
        height_ratios=[1, 1.8] * n_blocks,
    )
    looks = arm_styles(arms_in(table))
    strips = axes[0::2].reshape(-1)
    panels = axes[1::2].reshape(-1)
    lines = _costs_lines(table, looks)
    summaries = []
    for strip, panel, (task, regime) in zip(strips, panels, settings, strict=False):
        rows = where(table, task=task, regime=regime)
        at = _log_odds(rows.groupby("log_odds")["posterior"].mean())  # by bin
        _strip(strip, rows, at, lines)
        summaries.append(_panel(panel, rows, at, looks))
        strip.set_title(style.setting_label(task, regime))
        strip.sharex(panel)
        strip.tick_params(labelbottom=False)
    for unused in (*strips[len(settings) :], *panels[len(settings) :]):
        unused.set_visible(False)
    for strip, panel in axes.reshape(n_blocks, 2, n_columns)[:, :, 0]:
        strip.set_ylabel("Relative\nincentive")
        panel.set_ylabel("KL (nats)")
    figure.supxlabel("Posterior of the last label (log-odds scale)", fontsize=7)
    style.letter_panels(axes[0::2])
    handles = style.arm_handles(list(looks))
    handles += [
        style.handle(costs_label(costs), **line)
        for costs, line in lines.items()
        if line["color"] == "black"
    ]
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _named(table: pd.DataFrame) -> pd.DataFrame:
    kinds = {arm: kind_and_weights(arm)[0] for arm in table["arm"].unique()}
    named = table["arm"].map(kinds).isin(["symmetric", "weighted"])
    return table[named | (table["regime"] == "pair")]


def _costs_lines(table: pd.DataFrame, looks: Mapping[str, ArmStyle]) -> dict[str, dict[str, Any]]:
    """How each costs is drawn: as the first arm that serves it, black where there is none."""
    lines = {}
    for costs, linestyle in zip(costs_in(table), itertools.cycle(LINESTYLES), strict=False):
        look = next((looks[arm] for arm in looks if costs_of(arm) == costs), None)
        lines[costs] = {
            "color": look.color if look else "black",
            "ls": look.linestyle if look else linestyle,
        }
    return lines


def _log_odds(posterior: Any) -> Any:
    return np.log(posterior) - np.log1p(-posterior)


def _strip(
    ax: Axes, rows: pd.DataFrame, at: pd.Series, lines: Mapping[str, Mapping[str, Any]]
) -> None:
    ax.axhline(1, color=style.GREY, lw=0.6, ls=":", zorder=0)
    for costs, line in lines.items():
        predicted = where(rows, costs=costs).groupby("log_odds")["predicted"].mean()
        ax.plot(at[predicted.index], predicted, **line)
    ax.set_yscale("log")


def _panel(
    ax: Axes, rows: pd.DataFrame, at: pd.Series, looks: Mapping[str, ArmStyle]
) -> pd.DataFrame:
    summary = over_seeds(rows, ["arm", "log_odds"], "divergence")
    summary["at"] = summary["log_odds"].map(at)
    arms = arms_in(summary)
    for index, arm in enumerate(arms):
        cells = where(summary, arm=arm)
        # Side by side, so that no bar hides another.
        cells = cells.assign(at=cells["at"] + DODGE * (index - (len(arms) - 1) / 2))
        style.curve(ax, cells, "at", looks[arm], markersize=3, markevery=1)
    ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
    ax.set_ylim(bottom=-0.04 * ax.get_ylim()[1])  # a divergence is never negative
    low, high = ax.get_xlim()
    ticks = _log_odds(TICKS)
    inside = (ticks > low) & (ticks < high)
    ax.set_xticks(ticks[inside], [f"{tick:g}" for tick in TICKS[inside]])
    ax.set_xlim(low, high)
    return summary


if __name__ == "__main__":
    from figures import run_script

    run_script("incentives")
