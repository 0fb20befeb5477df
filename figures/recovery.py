"""Where does the decision's information run? Recovery maps before, after and their difference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from figures import style
from figures.axes import layer_axis
from figures.colormaps import diverging_map, sequential_map
from figures.tables import (
    Tables,
    arms_in,
    final_steps,
    last_number,
    over_seeds,
    read_tables,
    settings_in,
    weight_of,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.figure import Figure

CAPTION = (
    "Activation patching: normalised recovery of the decision's logit difference when one "
    "activation of the corrupt prompt is replaced by that of the clean prompt (0: nothing "
    "recovered, 1: all), by what stands at the position (rows; “changed” is the latent in which "
    "the two prompts differ) and layer (columns); for heads, all positions at once. Before, "
    "after, and after − before. Means over latents and seeds; dots mark differences whose 95% t "
    "interval over seeds excludes zero, not corrected for the number of cells."
)
NEEDS = {
    "patching": (
        *("task", "regime", "arm", "seed", "step", "checkpoint"),
        *("grain", "layer", "unit", "latent", "recovery"),
    )
}
GRAINS = {
    "resid_pre": "residual stream",
    "resid_mid": "residual stream (mid-block)",
    "resid_post": "residual stream (block output)",
    "attn_out": "attention output",
    "mlp_out": "MLP output",
    "head": "attention heads",
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, in the first regime at hand, for the arm with the strongest weight."""
    patching = read_tables(source, NEEDS)["patching"]
    files = {}
    for task, regime in settings_in(patching):
        rows = where(patching, task=task, regime=regime, checkpoint="after")
        if f"recovery_{task}" not in files and len(rows):
            options = {"task": task, "regime": regime, "arm": strongest_arm(rows)}
            files[f"recovery_{task}"] = options
    return files


def strongest_arm(rows: pd.DataFrame) -> str:
    """The arm named after the largest weight, else "after", else the last in the usual order."""
    arms = arms_in(rows)
    weighted = [arm for arm in arms if weight_of(arm)]
    if weighted:
        return max(weighted, key=lambda arm: float(weight_of(arm) or 0))
    return "after" if "after" in arms else arms[-1]


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    regime: str | None = None,
    arm: str | None = None,
) -> Figure:
    """Rows: grains. Columns: before, after, difference. Defaults: those of the first variant."""
    patching = read_tables(source, NEEDS)["patching"]
    first = next(iter(variants({"patching": patching}).values()))
    task, regime, arm = task or first["task"], regime or first["regime"], arm or first["arm"]
    rows = final_steps(where(patching, task=task, regime=regime))
    before = where(rows, checkpoint="before")
    before = where(before, arm=arm) if arm in set(before["arm"]) else before
    after = where(rows, checkpoint="after", arm=arm)
    grains = [grain for grain in GRAINS if grain in set(after["grain"])]
    maps = [_maps(where(before, grain=grain), where(after, grain=grain)) for grain in grains]
    heights = [max(len(each["units"]), 4) for each in maps]
    pitch = np.clip(7.0 / sum(heights), 0.1, 0.125)  # inches per unit: legible, and on one page
    figure, axes = style.grid(
        len(grains),
        3,
        row_height=float(pitch * np.mean(heights)) + 0.12,
        height_ratios=heights,
        sharex="row",
        sharey="row",
    )
    for panels, grain, each, height in zip(axes, grains, maps, heights, strict=True):
        _row(figure, panels, each, height)
        panels[0].set_ylabel(GRAINS[grain].replace(" ", "\n", 1))
    figure.align_ylabels(axes[:, 0])
    titles = ("before", style.arm_label(arm), f"{style.arm_label(arm)} − before")
    for ax, title in zip(axes[0], titles, strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("Layer")
    style.letter_panels(axes)
    changes = [each["change"] for each in maps]
    note = f"{style.setting_line(task, regime)}. {style.seeds(*changes)}"
    if any(np.isfinite(change["low"]).any() for change in changes):
        note += "; dots: the change's 95% t interval over seeds excludes zero"
    style.legend(figure, [], f"{note}.")
    return figure


def _maps(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Any]:
    """Units, layers, and per cell the recovery before, after and its change, with intervals."""
    import pandas as pd

    latents = set(after["latent"])
    cell = ["unit", "layer"]
    per_seed = {}
    for name, rows in (("before", before), ("after", after)):
        pairs = zip(rows["unit"], rows["latent"], strict=True)
        rows = rows.assign(unit=[_role(unit, latent, latents) for unit, latent in pairs])
        per_seed[name] = rows.groupby([*cell, "seed"], sort=False)["recovery"].mean()
    both = pd.DataFrame(per_seed).dropna()
    both["change"] = both["after"] - both["before"]
    both = both.reset_index()
    units = list(dict.fromkeys(per_seed["after"].index.get_level_values("unit")))
    if all(last_number(unit)[1] >= 0 for unit in units):
        units.sort(key=last_number)
    return {
        "units": units,
        "layers": sorted(both["layer"].unique()),
        **{name: over_seeds(both, cell, name) for name in ("before", "after", "change")},
    }


def _role(unit: str, latent: str, latents: set[str]) -> str:
    """ "value a" becomes "value (changed)" where the prompts differ in a, else "value (others)"."""
    kind, _, last = unit.rpartition(" ")
    if not kind or last not in latents:
        return unit
    return f"{kind} (changed)" if last == latent else f"{kind} (others)"


def _row(figure: Figure, panels: np.ndarray, maps: dict[str, Any], height: int) -> None:
    """One grain: before and after on one scale, their difference on its own, centred on zero."""
    units, layers = maps["units"], maps["layers"]
    fields = {
        name: maps[name].pivot(index="unit", columns="layer", values="mean").reindex(units)
        for name in ("before", "after", "change")
    }
    low = min(0.0, fields["before"].min().min(), fields["after"].min().min())
    high = max(fields["before"].max().max(), fields["after"].max().max())
    span = fields["change"].abs().max().max()
    for ax, (name, field) in zip(panels, fields.items(), strict=True):
        scale = {"cmap": sequential_map(), "vmin": low, "vmax": high}
        if name == "change":
            scale = {"cmap": diverging_map(), "vmin": -span, "vmax": span}
        image = ax.imshow(field, aspect="auto", interpolation="nearest", **scale)
        if name != "before":
            beside = panels[:2] if name == "after" else [ax]
            label = "Recovery" if name == "after" else "Change"
            bar = figure.colorbar(image, ax=beside, label=label, aspect=1.4 * height, pad=0.02)
            bar.outline.set_visible(False)  # type: ignore[union-attr]
            bar.ax.locator_params(nbins=4)
        ax.spines[:].set_visible(False)
        ax.tick_params(length=0)
        layer_axis(ax, len(layers) - 1)
    panels[0].set_yticks(range(len(units)), [style.wrap(unit, 30) for unit in units])
    change = maps["change"]
    sure = change[(change["low"] > 0) | (change["high"] < 0)]
    rank = {unit: place for place, unit in enumerate(units)}
    panels[2].plot(
        [layers.index(layer) for layer in sure["layer"]],
        [rank[unit] for unit in sure["unit"]],
        "o",
        color="black",
        ms=2,
        mec="white",
        mew=0.4,
    )


if __name__ == "__main__":
    from figures import run_script

    run_script("recovery")
