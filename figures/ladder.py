"""Where is value lost? The ladder's losses, stacked, by arm, in both currencies."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import arm_label, costs_label
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
    "Where value is lost, from the decision made (left) down to what the network never encoded "
    "(right), at each arm's last step, as % of oracle − best constant action. Threshold and "
    "readout are losses of choosing, not combined and not encoded of learning (one piece, "
    "learning, where the task does not say which); discarded was readable earlier in the network "
    "and is no longer. Pieces that estimation noise makes negative are stacked to the left of "
    "zero. Diamonds: their sum, with its interval. A bar beyond 100%, worse than a constant "
    "action, is cut and its sum written. † The oracle is not known: learning loss is counted from "
    "a bound."
)
NEEDS = {"losses": ("task", "regime", "arm", "seed", "step", "costs", "currency", "loss", "value")}
OPTIONAL = {"losses_in_full": NEEDS["losses"]}
CURRENCIES = {"log_score": "expected log score", "utility": "utility"}
BAR = ["task", "regime", "costs", "arm"]
BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
# Browns for choosing, grey for discarded, purples for learning: none is the colour of an arm.
PIECES = {
    "threshold": ("#E6D5BC", "", "threshold"),
    "readout": ("#A67C52", "", "readout"),
    "discarded": ("#D9D9D9", "/////", "discarded"),
    "not_combined": ("#BFB2DB", "", "not combined or routed"),
    "not_encoded": ("#5E4694", "", "not encoded"),
    "learning": ("#8E7CB8", r"\\\\\\", "learning, not divided"),
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("ladder", read_tables(source, NEEDS)["losses"])


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Rows: task and regime. Columns: currencies. One bar per arm at each costs."""
    tables = read_tables(source, NEEDS, OPTIONAL, task=task, arms=arms)
    losses = at_own_costs(final_steps(tables.get("losses_in_full", tables["losses"])))
    settings = settings_in(losses)
    lines = [_lines(where(losses, task=task, regime=regime)) for task, regime in settings]
    heights = [len(each) for each in lines]
    figure, axes = style.grid(
        len(settings),
        len(CURRENCIES),
        row_height=0.14 * float(np.mean(heights)) + 0.25,
        margin=1.0,
        height_ratios=heights,
    )
    sums: list[pd.DataFrame] = []
    seen: set[str] = set()
    for panels, (currency, label) in zip(axes.T, CURRENCIES.items(), strict=True):
        rows = where(losses, currency=currency)
        pieces = _pieces(rows)
        total = over_seeds(where(rows, loss="total"), BAR, scale=100)
        means = 100 * pieces.groupby(BAR).mean()
        limits = _limits(means, total)
        for ax, setting, each in zip(panels, settings, lines, strict=True):
            _panel(ax, means, total.set_index(BAR), [(*setting, *line) for line in each], limits)
        panels[-1].set_xlabel(f"Loss in {label} (% of oracle − constant)")
        sums.append(total)
        seen.update(pieces.columns[pieces.notna().any()])
    for ax, (task, regime), each in zip(axes[:, 0], settings, lines, strict=True):
        rows = where(losses, task=task, regime=regime)
        unknown = "oracle_known" in rows and not rows["oracle_known"].all()
        ax.set_title(style.setting_line(task, regime) + (" †" if unknown else ""))
        _label_lines(ax, each)
    style.letter_panels(axes)
    handles = [
        style.patch_handle(label, facecolor=color, edgecolor="white", hatch=hatch, lw=0)
        for piece, (color, hatch, label) in PIECES.items()
        if piece in seen
    ]
    handles.append(style.handle("sum", marker="D", ms=3.5, mfc="white", ls="-", lw=0.7))
    style.legend(figure, handles, style.seeds_note(*sums))
    return figure


def _lines(rows: pd.DataFrame) -> list[tuple[str, str]]:
    """What stands on each line from the top: (costs, "") for a heading, (costs, arm) for a bar."""
    lines = []
    for costs in costs_in(rows):
        lines += [(costs, ""), *((costs, arm) for arm in arms_in(where(rows, costs=costs)))]
    return lines


def _pieces(rows: pd.DataFrame) -> pd.DataFrame:
    """Losses by bar and seed, a column per piece; learning is one where it is not divided."""
    wide = rows.pivot_table(index=[*BAR, "seed"], columns="loss", values="value")
    wide = wide.reindex(columns=list(PIECES))
    divided = wide[["not_combined", "not_encoded"]].notna().all(axis=1)
    wide["learning"] = wide["learning"].mask(divided)
    wide.loc[~divided, ["not_combined", "not_encoded"]] = np.nan
    return wide


def _limits(means: pd.DataFrame, total: pd.DataFrame) -> tuple[float, float]:
    """One scale for a currency, set by the bars up to 100% where there are any."""
    ends = means.clip(lower=0).sum(axis=1)
    reach = np.fmax(ends, total.set_index(BAR)["high"].reindex(means.index))
    within = reach[ends <= 100]
    high = 1.05 * reach.max() if len(within) == len(ends) else 1.3 * max(within, default=80)
    return min(1.2 * means.clip(upper=0).sum(axis=1).min(), -0.01 * high), high


def _panel(
    ax: Axes,
    means: pd.DataFrame,
    total: pd.DataFrame,
    lines: list[tuple[str, str, str, str]],
    limits: tuple[float, float],
) -> None:
    for y, line in enumerate(lines):
        whole = total[total.index == line]
        if whole.empty:
            continue
        mean = float(whole["mean"].to_numpy()[0])
        ends = {True: 0.0, False: 0.0}  # positive pieces to the right of zero, negative to the left
        values = means[means.index == line].fillna(0).to_numpy(float)[0]
        for value, (color, hatch, _) in zip(values, PIECES.values(), strict=True):
            look = {"color": color, "hatch": hatch, "edgecolor": "white", "lw": 0.4}
            if value:
                ax.barh(y, value, left=ends[bool(value > 0)], height=0.78, **look)
            ends[bool(value > 0)] += value
        if mean > limits[1]:
            at = limits[0] + 0.97 * (limits[1] - limits[0])
            ax.text(at, y, f"{mean:,.0f}% →", ha="right", va="center", bbox=BOX)
        else:
            bar = style.errors(whole)
            ax.errorbar(mean, y, xerr=bar, fmt="D", ms=3, mfc="white", c="black", lw=0.7, mew=0.7)
    ax.axvline(0, color="black", lw=0.6)
    ax.spines["left"].set_visible(False)
    ax.set(xlim=limits, ylim=(len(lines) - 0.4, -0.6), yticks=[])


def _label_lines(ax: Axes, lines: list[tuple[str, str]]) -> None:
    labels = [arm_label(arm) if arm else costs_label(costs) for costs, arm in lines]
    ax.set_yticks(range(len(lines)), labels)
    ax.tick_params(axis="y", length=0)
    for label, (_, arm) in zip(ax.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if arm else "bold")


if __name__ == "__main__":
    from figures import run_script

    run_script("ladder")
