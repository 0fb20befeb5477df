"""Where does the decision's information run? Recovery maps before, after and their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import arm_label
from figures.axes import layer_axis
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
    from matplotlib.figure import Figure

CAPTION = (
    "Activation patching: normalised recovery of the decision's logit difference when one "
    "activation of the corrupt prompt is replaced by that of the clean prompt (0: nothing "
    "recovered, 1: all), by what stands at the position (rows; “changed” is what the two prompts "
    "differ in) and layer (columns); for heads, all positions at once. Before, after, and after − "
    "before. Means over pairs and seeds. Crosses: not distinguishable from zero at a false "
    "discovery rate of 5% over the cells of a map (Benjamini-Hochberg; with several seeds from t "
    "tests over seeds, with one from sign flips over pairs)."
)
NEEDS = {
    "patching": (
        *("task", "regime", "arm", "seed", "step", "checkpoint"),
        *("grain", "layer", "unit", "latent", "recovery", "q"),
    )
}
FALSE_DISCOVERY_RATE = 0.05
GRAINS = {
    "resid_pre": "residual stream",
    "resid_mid": "residual stream (mid-block)",
    "resid_post": "residual stream (block output)",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "head": "attention heads",
    "q": "queries",
    "k": "keys",
    "v": "values",
    "pattern": "attention patterns",
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task: the arm with the strongest weight, branched where that was done."""
    table = read_tables(source, NEEDS)["patching"]
    return {
        name: {**setting, "arm": strongest_arm(where(table, **setting))}
        for name, setting in files_by_task("recovery", table).items()
    }


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    regime: str | None = None,
    arm: str | None = None,
) -> Figure:
    """Rows: grains. Columns: before, after, difference; a network alone has one column.

    Task, regime and arm default to those of the first variant.
    """
    patching = read_tables(source, NEEDS)["patching"]
    first = next(iter(variants({"patching": patching}).values()))
    task, regime, arm = task or first["task"], regime or first["regime"], arm or first["arm"]
    rows = final_steps(where(patching, task=task, regime=regime, arm=arm, latent="all"))
    grains = [grain for grain in GRAINS if grain in set(rows["grain"])]
    maps = [_maps(where(rows, grain=grain)) for grain in grains]
    heights = [max(len(each["after"]["unit"].unique()), 4) for each in maps]
    pitch = np.clip(7.0 / sum(heights), 0.1, 0.125)  # inches per unit: legible, and on one page
    figure, axes = style.grid(
        len(grains),
        len(maps[0]),
        width=style.FULL_WIDTH if len(maps[0]) > 1 else style.SINGLE_COLUMN,
        # In one column the note above the panels takes several lines from them.
        row_height=float(pitch * np.mean(heights)) + (0.12 if len(maps[0]) > 1 else 0.3),
        height_ratios=heights,
        sharex="row",
        sharey="row",
    )
    for panels, grain, each, height in zip(axes, grains, maps, heights, strict=True):
        _row(figure, panels, each, height)
        panels[0].set_ylabel(GRAINS[grain].replace(" ", "\n", 1))
    figure.align_ylabels(axes[:, 0])
    name = arm_label(arm)
    titles = {"before": "before", "after": name, "change": f"{name} − before"}
    for panels, shown in zip(axes.T, maps[0], strict=True):
        panels[0].set_title(titles[shown])
        panels[-1].set_xlabel("Layer")
    style.letter_panels(axes)
    changes = [each.get("change", each["after"]) for each in maps]
    note = f"{style.setting_line(task, regime)}. {style.seeds(*changes)}"
    note += "; crosses: not distinguishable from zero (false discovery rate 5% over the map)"
    style.legend(figure, [], f"{note}.")
    return figure


def _maps(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Recovery per unit and layer after, and where it was measured, before, with the change; each
    with its q-values."""
    cell = ["unit", "layer"]
    per_seed = rows.pivot_table(
        index=[*cell, "seed"], columns="checkpoint", values="recovery", observed=True
    ).reset_index()
    names = ["after"]
    if "before" in per_seed:
        names = ["before", "after", "change"]
        per_seed["change"] = per_seed["after"] - per_seed["before"]
    return {
        name: _with_q(over_seeds(per_seed, cell, name), where(rows, checkpoint=name))
        for name in names
    }


def _with_q(summary: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """The means with q-values over the map: the table's own for one seed, else of t over seeds."""
    from scipy.special import stdtr, stdtrit

    from mechinterp.patching.inference import adjust_false_discovery

    n = summary["n_seeds"].to_numpy()
    if n.max() == 1:
        return summary.merge(rows[["unit", "layer", "q"]], on=["unit", "layer"], how="left")
    mean = summary["mean"].to_numpy()
    error = (summary["high"].to_numpy() - mean) / stdtrit(np.maximum(n - 1, 1), 0.975)
    with np.errstate(divide="ignore", invalid="ignore"):
        p = 2 * stdtr(np.maximum(n - 1, 1), -np.abs(mean / error))
    p[(mean == 0) & (error == 0)] = 1.0
    return summary.assign(q=adjust_false_discovery(p))


def _row(figure: Figure, panels: np.ndarray, maps: dict[str, pd.DataFrame], height: int) -> None:
    """One grain: before and after on one scale, their difference on its own, centred on zero."""
    units = sorted(maps["after"]["unit"].unique(), key=natural_order)
    fields = {
        name: summary.pivot(index="unit", columns="layer", values="mean").loc[units]
        for name, summary in maps.items()
    }
    recoveries = np.stack([field for name, field in fields.items() if name != "change"])
    low, high = min(0.0, np.nanmin(recoveries)), np.nanmax(recoveries)
    for ax, (name, field) in zip(panels, fields.items(), strict=True):
        scale = {"cmap": sequential_map(), "vmin": low, "vmax": high}
        if name == "change":
            span = np.nanmax(np.abs(field))
            scale = {"cmap": diverging_map(), "vmin": -span, "vmax": span}
        image = ax.imshow(field, aspect="auto", interpolation="nearest", **scale)
        if name != "before":
            beside = [ax] if name == "change" else list(panels[:2])
            label = "Change" if name == "change" else "Recovery"
            bar = figure.colorbar(image, ax=beside, label=label, aspect=1.4 * height, pad=0.02)
            bar.outline.set_visible(False)  # type: ignore[union-attr]
            bar.ax.locator_params(nbins=4)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        layer_axis(ax, len(field.columns) - 1)
    panels[0].set_yticks(range(len(units)), [style.wrap(unit, 30) for unit in units])
    for ax, (name, summary) in zip(panels, maps.items(), strict=True):
        unsure = summary[summary["q"] > FALSE_DISCOVERY_RATE]
        x = [fields[name].columns.get_loc(layer) for layer in unsure["layer"]]
        y = [units.index(unit) for unit in unsure["unit"]]
        ax.plot(x, y, "x", color=style.GREY, ms=1.8, mew=0.5)


if __name__ == "__main__":
    from figures import run_script

    run_script("recovery")
