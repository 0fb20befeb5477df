"""What can be read out where along the prompt? Maps of decodability by layer and position."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.arm_styles import arm_label
from figures.colormaps import diverging_map, sequential_map
from figures.tables import (
    Tables,
    files_by_task,
    final_steps,
    natural_order,
    over_seeds,
    read_tables,
    strongest_arm,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.collections import QuadMesh
    from matplotlib.figure import Figure

CAPTION = (
    "What linear probes read by layer (0 is the embedding) and position of the prompt: AUROC out "
    "of fold, of each latent and of its control task with random labels; with a second network, "
    "before, after and the change. The lowest rows are read from the tokens alone: the one at the "
    "position, the counts of all up to there, and each in its place. Grey: all items are the same "
    "there, and nothing can be read. Crosses: not distinguishable from chance (from no change) at "
    "5%; a latent's AUROC and its change over all cells of a map, by permuted labels and by random "
    "signs of groups, the others one by one, by their 95% intervals."
)
NEEDS = {
    "probe_positions": (
        *("task", "regime", "arm", "seed", "step", "layer", "unit", "position"),
        *("latent", "needed", "kind", "measure", "value", "low", "high", "p_map"),
    )
}
SURFACE_LAYER = -1  # of what is read from the tokens
SURFACE = ("surface_token", "surface_bag", "surface_ordered")
SURFACE_LABELS = ("token here", "tokens so far", "and their order")
ALPHA = 0.05
CHANCE = 0.5


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task: the arm with the strongest weight, branched where that was done."""
    table = read_tables(source, NEEDS)["probe_positions"]
    return {
        name: {**setting, "arm": strongest_arm(where(table, **setting))}
        for name, setting in files_by_task("probe_positions", table).items()
    }


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    regime: str | None = None,
    arm: str | None = None,
) -> Figure:
    """Rows: latents. Columns: the latent and its control task; of a pair before, after, change.

    Task, regime and arm default to those of the first variant.
    """
    table = read_tables(source, NEEDS)["probe_positions"]
    first = next(iter(variants({"probe_positions": table}).values()))
    task, regime, arm = task or first["task"], regime or first["regime"], arm or first["arm"]
    rows = final_steps(where(table, task=task, regime=regime))
    after = where(rows, arm=arm)
    columns = _columns(where(rows, arm="before"), after, arm_label(arm))
    latents = after[["latent", "needed"]].drop_duplicates()
    latents = latents.sort_values("needed", ascending=False, kind="stable").to_numpy().tolist()
    places = _Places(_units(after), sorted(set(after["layer"]) - {SURFACE_LAYER}))
    figure, axes = style.grid(
        len(latents),
        len(columns),
        row_height=float(np.clip(0.13 * places.height, 1.2, 1.6)),
        margin=1.5,
        sharex=True,
        sharey=True,
    )
    summaries = []
    for panels, (title, cells) in zip(axes.T, columns.items(), strict=True):
        by = ["kind", "layer", "unit"]
        drawn = [over_seeds(where(cells, latent=latent), by) for latent, _ in latents]
        summaries += drawn
        scale = {"cmap": sequential_map(), "vmin": CHANCE, "vmax": 1.0}
        if title == "change":
            span = max(float(each["mean"].abs().max()) for each in drawn)
            scale = {"cmap": diverging_map(), "vmin": -max(span, 0.05), "vmax": max(span, 0.05)}
        for ax, (latent, _), summary in zip(panels, latents, drawn, strict=True):
            image = _map(ax, summary, places, scale)
            _crosses(ax, where(cells, latent=latent), places)
        label = "Change of AUROC" if title == "change" else "AUROC"
        options = {"location": "bottom", "aspect": 30, "pad": 0.02}
        extend = "neither" if title == "change" else "min"
        bar = figure.colorbar(image, ax=list(panels), label=label, extend=extend, **options)
        bar.outline.set_visible(False)  # type: ignore[union-attr]
        panels[0].set_title(title)
    for ax, (latent, needed) in zip(axes[:, 0], latents, strict=True):
        ax.set_ylabel(style.wrap(latent + ("" if needed else ", not needed"), 18))
    figure.align_ylabels(axes[:, 0])
    places.label(axes)
    style.letter_panels(axes)
    setting = style.wrap(task) if regime == "pair" else style.setting_line(task, regime)
    note = f"{setting}. {style.seeds(*summaries)}"
    note += "; layers above, the tokens alone below; crosses: not distinguishable from chance"
    style.legend(figure, [], f"{note}; grey: nothing varies.")
    return figure


def _columns(before: pd.DataFrame, after: pd.DataFrame, name: str) -> dict[str, pd.DataFrame]:
    """Title -> rows of AUROC."""
    before, after = where(before, measure="auroc"), where(after, measure="auroc")
    change, control = where(after, kind="change"), where(after, kind="control")
    own = [rows[rows["kind"].isin(["latent", *SURFACE])] for rows in (before, after)]
    if change.empty:
        return {"latent": own[1], "control task": control}
    shown = {"before": own[0], name: own[1], "change": change}
    return {title: cells for title, cells in shown.items() if not cells.empty}


def _units(rows: pd.DataFrame) -> list[str]:
    """In the order of the prompt where roles keep their place, else by name."""
    found = rows[["unit", "position"]].drop_duplicates("unit")
    if found["position"].notna().all():
        return found.sort_values("position")["unit"].tolist()
    return sorted(found["unit"], key=natural_order)


class _Places:
    """Where cells are drawn: a column per unit; layers upwards from 0, surface rows below them."""

    def __init__(self, units: list[str], layers: list[int]) -> None:
        self.units, self.layers = units, layers
        self.step = max(1.0, len(layers) / 10)  # of surface rows, high enough for their labels
        self.height = len(layers) + (len(SURFACE) + 0.5) * self.step

    def x(self, unit: str) -> int:
        return self.units.index(unit)

    def y(self, kind: str, layer: int) -> float:
        if kind in SURFACE:
            return -0.5 + (SURFACE.index(kind) - len(SURFACE)) * self.step
        return self.layers.index(layer)

    def label(self, axes: np.ndarray) -> None:
        stride = next(s for s in (1, 2, 5, 10, 20) if len(self.layers) / s <= 7)
        shown = self.layers[::stride]
        ticks = [*(self.y(kind, -1) for kind in SURFACE), *(self.y("", layer) for layer in shown)]
        axes[0, 0].set_yticks(ticks, [*SURFACE_LABELS, *map(str, shown)])
        for ax in axes[-1]:
            ax.set_xticks(range(len(self.units)), self.units, rotation=90)


def _map(ax: Axes, summary: pd.DataFrame, places: _Places, scale: dict[str, Any]) -> QuadMesh:
    """The layers' cells, and below them, where there are any, those of the tokens."""
    x = np.arange(len(places.units) + 1) - 0.5
    layers = np.full((len(places.layers), len(places.units)), np.nan)
    surface = np.full((len(SURFACE), len(places.units)), np.nan)
    for kind, layer, unit, mean in summary[["kind", "layer", "unit", "mean"]].to_numpy():
        if kind in SURFACE:
            surface[SURFACE.index(kind), places.x(unit)] = mean
        else:
            layers[places.layers.index(layer), places.x(unit)] = mean
    image = _mesh(ax, x, np.arange(len(layers) + 1) - 0.5, layers, scale)
    if np.isfinite(surface).any():
        bottom = places.y(SURFACE[0], SURFACE_LAYER) - places.step / 2
        _mesh(ax, x, bottom + places.step * np.arange(len(SURFACE) + 1), surface, scale)
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return image


def _mesh(
    ax: Axes, x: np.ndarray, y: np.ndarray, field: np.ndarray, scale: dict[str, Any]
) -> QuadMesh:
    ax.fill_between(x[[0, -1]], y[0], y[-1], color=style.PALE, lw=0, zorder=0)
    return ax.pcolormesh(x, y, np.ma.masked_invalid(field), rasterized=True, **scale)


def _crosses(ax: Axes, own: pd.DataFrame, places: _Places) -> None:
    """Where there is no p value corrected for the map, the interval decides."""
    found = own.groupby(["kind", "layer", "unit"], sort=False)[["p_map", "low"]].mean()
    unsure = np.where(found["p_map"].notna(), found["p_map"] > ALPHA, found["low"] <= CHANCE)
    cells = found.index[unsure]
    x = [places.x(unit) for _, _, unit in cells]
    y = [places.y(kind, layer) for kind, layer, _ in cells]
    ax.plot(x, y, "x", color=style.GREY, ms=1.8, mew=0.5)


if __name__ == "__main__":
    from figures import run_script

    run_script("probe_positions")
