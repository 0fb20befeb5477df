"""Which weights carry a change? One part of a network exchanged at a time, both ways."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import arm_styles, costs_label
from figures.axes import layer_axis
from figures.colormaps import diverging_map
from figures.tables import Tables, arms_in, costs_in, read_tables, settings_in, where

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Grafts: the weights of one part of the network exchanged between the checkpoints before and "
    "after, at each costs, as change of the expected log score from before to after, in % of "
    "oracle − best constant action. Left: by layer and kind of part, the mean of both directions; "
    "crosses: in neither direction distinguishable from zero at a false discovery rate of 5% over "
    "all parts (sign flips over items). Right: the parts with the largest effects; filled: what "
    "the part of after brings into before, hollow: what before's part takes from after; bars: 95% "
    "bootstrap-t intervals over items; vertical line: what exchanging the whole network does. "
    "Grafts need not add up: where filled and hollow disagree the part's effect depends on the "
    "rest."
)
NEEDS = {
    "grafts": (
        *("task", "regime", "arm", "seed", "step"),
        *("component", "kind", "layer", "head", "direction", "costs", "currency"),
        *("change", "low", "high", "q", "total", "scale"),
    )
}
FALSE_DISCOVERY_RATE = 0.05
MOST_PARTS = 12
KINDS = {  # from the input of a block to its output, as the rows of the map
    "block": "block",
    "attention": "attention",
    "attention_norm": "attention norm",
    "head": "head",
    "kv_head": "key/value head",
    "q_norm": "query norm",
    "k_norm": "key norm",
    "attention_bias": "attention bias",
    "attention_post_norm": "attention post-norm",
    "mlp_norm": "MLP norm",
    "mlp": "MLP",
    "mlp_post_norm": "MLP post-norm",
    "other": "other",
    "embed+unembed": "embedding, unembedding",
    "embed": "embedding",
    "pos_embed": "position embedding",
    "final_norm": "final norm",
    "unembed": "unembedding",
}


@style.styled
def draw(source: str | Path | Tables) -> Figure:
    """Rows: task and costs. Columns: the map by layer, the parts with the largest effects."""
    grafts = read_tables(source, NEEDS)["grafts"]
    grafts = _oriented(where(grafts, currency="log_score"))
    grafts = grafts.astype({"layer": float, "head": float})  # NaN: none
    cells = [
        (task, regime, arm, costs)
        for task, regime in settings_in(grafts)
        for costs in costs_in(grafts)
        for arm in arms_in(grafts)
    ]
    parts = [
        where(grafts, task=task, regime=regime, arm=arm, costs=costs)
        for task, regime, arm, costs in cells
    ]
    n_rows = max(len(_map(rows)[0]) for rows in parts)
    figure, axes = style.grid(
        len(cells), 2, row_height=max(1.9, 0.13 * n_rows + 0.7), width_ratios=[1.0, 1.1]
    )
    for panels, rows, (task, regime, _, costs) in zip(axes, parts, cells, strict=True):
        _draw_map(figure, panels[0], rows)
        _draw_largest(panels[1], rows)
        panels[0].set_ylabel(f"{style.setting_label(task, regime)}\n{costs_label(costs)}")
    for ax in axes[-1]:
        ax.set_xlabel("Layer" if ax is axes[-1, 0] else "Change of the log score (%)")
    style.letter_panels(axes)
    handles = [
        style.handle("after's part in before", marker="o", ls="none"),
        style.handle("before's part out of after", marker="o", mfc="white", ls="none"),
        style.handle("the whole network", color=style.GREY),
        style.handle("not distinguishable from zero", marker="x", ms=2.5, mew=0.6, ls="none"),
    ]
    note = (
        "Changes from before to after in % of oracle − constant; maps: mean of both directions; "
        "bars: 95% interval over items."
    )
    style.legend(figure, handles, note)
    return figure


def _oriented(rows: pd.DataFrame) -> pd.DataFrame:
    """Changes from before to after, in %: taking before's part out of after counts in reverse."""
    rows = rows.copy()
    back = rows["direction"] == "before_into_after"
    low, high = rows["low"].copy(), rows["high"].copy()
    rows["low"], rows["high"] = low.where(~back, -high), high.where(~back, -low)
    for name in ("change", "total"):
        rows[name] = rows[name].where(~back, -rows[name])
    for name in ("change", "total", "low", "high"):
        rows[name] = 100 * rows[name] / rows["scale"]
    return rows


def _map(rows: pd.DataFrame) -> tuple[list[str], pd.DataFrame, pd.DataFrame]:
    """Names of the map's rows; per row and layer the mean change, and whether it may be zero."""
    inside = rows[rows["layer"].notna()].copy()
    order = {kind: index for index, kind in enumerate(KINDS)}
    inside["place"] = inside["kind"].map(order) * 1000 + inside["head"].fillna(0).astype(int)
    cells = inside.groupby(["place", "layer"])
    mean = cells["change"].mean().unstack()
    unsure = (cells["q"].min() > FALSE_DISCOVERY_RATE).unstack(fill_value=False)
    firsts = inside.groupby("place")[["kind", "head"]].first()
    return [_name(kind, head) for kind, head in firsts.itertuples(index=False)], mean, unsure


def _draw_map(figure: Figure, ax: Axes, rows: pd.DataFrame) -> None:
    names, mean, unsure = _map(rows)
    span = float(np.nanmax(np.abs(mean.to_numpy()))) or 1.0
    image = ax.imshow(
        mean, aspect="auto", interpolation="nearest", cmap=diverging_map(), vmin=-span, vmax=span
    )
    y, x = np.nonzero(unsure.to_numpy(bool))
    ax.plot(x, y, "x", color=style.GREY, ms=1.8, mew=0.5)
    bar = figure.colorbar(image, ax=ax, pad=0.02, label="Change (%)")
    bar.outline.set_visible(False)  # type: ignore[union-attr]
    bar.ax.locator_params(nbins=4)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    ax.set_yticks(range(len(names)), names)
    layer_axis(ax, mean.shape[1] - 1)


def _draw_largest(ax: Axes, rows: pd.DataFrame) -> None:
    parts = rows[rows["kind"] != "whole"]
    largest = parts.groupby("component")["change"].agg(lambda change: change.abs().max())
    largest = largest.sort_values(ascending=False, kind="stable")[:MOST_PARTS]
    shown = list(largest.index[largest > 0]) or list(largest.index)
    color = arm_styles(list(rows["arm"].unique()))[rows["arm"].iloc[0]].color
    for direction, offset, fill in (
        ("after_into_before", -0.16, color),
        ("before_into_after", 0.16, "white"),
    ):
        own = where(parts, direction=direction).set_index("component").loc[shown]
        error = np.clip([own["change"] - own["low"], own["high"] - own["change"]], 0, None)
        ax.errorbar(
            own["change"],
            np.arange(len(shown)) + offset,
            xerr=error,
            fmt="o",
            color=color,
            mfc=fill,
            ms=2.6,
            mew=0.6,
            elinewidth=0.6,
        )
    ax.axvline(0, color="black", lw=0.5, zorder=0)
    ax.axvline(float(rows["total"].iloc[0]), color=style.GREY, lw=1.0, zorder=0)
    firsts = parts.groupby("component")[["kind", "layer", "head"]].first().loc[shown]
    names = [
        _name(kind, head) + ("" if np.isnan(layer) else f", layer {int(layer)}")
        for kind, layer, head in firsts.itertuples(index=False)
    ]
    ax.set_yticks(range(len(shown)), names)
    ax.invert_yaxis()


def _name(kind: str, head: float) -> str:
    return KINDS[kind] if np.isnan(head) else f"{KINDS[kind]} {int(head)}"


if __name__ == "__main__":
    from figures import run_script

    run_script("grafts")
