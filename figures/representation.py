"""What did training do to the representation? Information, directions, similarity and geometry."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_label, arm_styles
from figures.axes import layer_axis
from figures.colormaps import diverging_map
from figures.tables import (
    Tables,
    arms_in,
    costs_of,
    files_by_task,
    final_steps,
    over_seeds,
    read_tables,
    strength,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "The representation at the decision position, after against before, by layer. Top: changes of "
    "AUROC by latent (* not needed by the decision). Information: each network's own probes, after "
    "minus before. Direction: the other network's probe minus the own one, on the network after "
    "(forward) and on the one before (back); where only these fall, a latent is as readable as "
    "before, along another direction. Crosses: not distinguishable from zero (false discovery rate "
    "5% over the map). Top right: by how many layers later each latent's information first reaches "
    "95% of its best (lines: 95% intervals; latents that one network does not hold are left out). "
    "Middle: how alike the two are; dotted: the mean of item orders shuffled by group. Cosine of "
    "directions: that of the probes of before and of after on disjoint halves of the items, over "
    "that of one network with itself, mean over the latents that the decision needs. "
    "Bottom: the shape of the cloud of activations. Bars: 95% intervals over groups of items."
)
NEEDS = {
    "representation": (
        *("task", "regime", "arm", "seed", "step", "part", "layer", "latent", "needed"),
        *("measure", "value", "low", "high", "q", "null"),
    ),
    "latent_shifts": (
        *("task", "regime", "arm", "seed", "step", "latent", "needed"),
        *("statistic", "value", "low", "high"),
    ),
}
MAPS = {
    "own": "information, ΔAUROC",
    "moved_forward": "direction, forward",
    "moved_back": "direction, back",
}
SIMILARITIES = {"cka": "CKA", "procrustes": "Procrustes distance", "r2_forward": "$R^2$ forward"}
SHAPES = {
    "effective_rank": "effective rank",
    "intrinsic_dimension": "intrinsic dimension",
    "anisotropy": "anisotropy",
    "norm": "norm",
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, branched where that was done."""
    table = read_tables(source, {"representation": NEEDS["representation"]})["representation"]
    return files_by_task("representation", table)


@style.styled
def draw(
    source: str | Path | Tables, *, task: str | None = None, regime: str | None = None
) -> Figure:
    """Top: changes by latent and layer, of the arm with the strongest weight. Below: all arms."""
    tables = read_tables(source, NEEDS)
    table = tables["representation"]
    first = next(iter(variants({"representation": table}).values()))
    task, regime = task or first["task"], regime or first["regime"]
    rows = final_steps(where(table, task=task, regime=regime))
    arms = arms_in(rows)
    shown = max(arms, key=lambda arm: (strength(costs_of(arm)), arm == "after"))
    changes = where(rows, arm=shown, measure="auroc")
    latents = changes.groupby("latent", sort=False)["needed"].first()
    names = [style.wrap(str(z)) + ("" if needed else "*") for z, needed in latents.items()]
    pitch = 0.15 * max(name.count("\n") + 1 for name in names)  # inches
    map_height = max(pitch * len(names), 0.6)
    figure, axes = style.grid(
        3,
        4,
        row_height=(map_height + 2 * 1.15) / 3 + 0.1,
        height_ratios=[map_height, 1.15, 1.15],
    )
    looks = arm_styles(["before", *arms])
    summaries = [_maps(figure, axes[0], changes, list(latents.index))]
    axes[0, 0].set_yticks(range(len(names)), names)
    shifts = final_steps(where(tables["latent_shifts"], task=task, regime=regime))
    _shifts(axes[0, 3], where(shifts, statistic="reached"), looks, list(latents.index))
    for ax, (measure, title) in zip(axes[1], SIMILARITIES.items(), strict=False):
        similar = where(rows, part="similarity", measure=measure)
        summaries.append(_curves(ax, similar, looks, title))
        null = similar.groupby("layer")["null"].mean()
        ax.plot(null.index, null, color=style.GREY, ls=":", lw=0.9, zorder=1)
    directions = where(rows, part="direction", measure="corrected", needed=True)
    _curves(axes[1, 3], directions, looks, "cosine of directions")
    for ax, (measure, title) in zip(axes[2], SHAPES.items(), strict=True):
        after = where(rows, part="geometry_after", measure=measure)
        before = where(rows, part="geometry_before", measure=measure, arm=shown)
        _curves(ax, before.assign(arm="before"), looks, title)
        _curves(ax, after, looks, title)
        ax.set_xlabel("Layer")
    for ax in axes[1:].flat:
        layer_axis(ax, int(rows["layer"].max()))
    style.letter_panels(axes)
    handles = style.arm_handles(list(looks))
    handles.append(style.handle("shuffled items", color=style.GREY, ls=":"))
    note = f"{style.setting_line(task, regime)}. Maps: {arm_label(shown)} − before. "
    style.legend(figure, handles, note + style.seeds_note(*summaries))
    return figure


def _maps(
    figure: Figure, panels: np.ndarray, changes: pd.DataFrame, latents: list[str]
) -> pd.DataFrame:
    """The changes of AUROC, all on one scale that is centred on zero."""
    summary = over_seeds(changes, ["part", "latent", "layer"])
    q = changes.groupby(["part", "latent", "layer"], sort=False)["q"].mean().reset_index()
    summary = summary.merge(q, on=["part", "latent", "layer"])
    span = max(float(summary["mean"].abs().max()), 0.01)
    look = {"cmap": diverging_map(), "vmin": -span, "vmax": span, "interpolation": "nearest"}
    for ax, (part, title) in zip(panels, MAPS.items(), strict=False):
        found = where(summary, part=part)
        field, uncertain = (
            found.pivot(index="latent", columns="layer", values=name).loc[latents]
            for name in ("mean", "q")
        )
        image = ax.imshow(field, aspect="auto", **look)
        y, x = np.nonzero(~(uncertain.to_numpy() < 0.05))
        ax.plot(x, y, ls="", marker="x", color=style.GREY, ms=2.5, mew=0.5)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        stride = max(1, -(-field.shape[1] // 5))
        layers = [str(layer) for layer in field.columns[::stride]]
        ax.set_xticks(range(0, field.shape[1], stride), layers)
        ax.set_yticks([])
        ax.set_title(title)
        if part == "moved_back":
            beside = ax.inset_axes((1.04, 0, 0.06, 1))
            edge = float(f"{0.9 * span:.0e}")
            bar = figure.colorbar(image, cax=beside, ticks=[-edge, 0, edge])
            bar.outline.set_visible(False)  # type: ignore[union-attr]
    return summary


def _shifts(ax: Axes, shifts: pd.DataFrame, looks: dict[str, ArmStyle], latents: list[str]) -> None:
    """By how many layers later each latent is reached, on the rows of the maps."""
    summary = over_seeds(shifts, ["arm", "latent"])
    ax.axvline(0, color=style.GREY, lw=0.5, zorder=0)
    arms = arms_in(summary) if len(summary) else []
    for place, arm in enumerate(arms):
        rows = where(summary, arm=arm)
        offset = 0.5 * ((place + 0.5) / len(arms) - 0.5)
        ax.errorbar(
            rows["mean"].to_numpy(float),
            [latents.index(latent) + offset for latent in rows["latent"]],
            xerr=style.errors(rows),
            color=looks[arm].color,
            marker=looks[arm].marker,
            ls="",
            ms=3,
            elinewidth=0.6,
        )
    ax.set_ylim(len(latents) - 0.5, -0.5)
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_title("layers later")


def _curves(ax: Axes, rows: pd.DataFrame, looks: dict[str, ArmStyle], title: str) -> pd.DataFrame:
    ax.set_title(title)
    summary = over_seeds(rows, ["arm", "layer"])
    for arm, look in looks.items():
        style.curve(ax, where(summary, arm=arm), "layer", look, markersize=3)
    return summary


if __name__ == "__main__":
    from figures import run_script

    run_script("representation")
