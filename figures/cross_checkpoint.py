"""Can one checkpoint's activations stand in for the other's? Patched both ways, by layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.axes import layer_axis
from figures.tables import (
    Tables,
    arms_in,
    final_steps,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    where,
)
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Cross-checkpoint patching: on the same prompts, the activation of one checkpoint at one "
    "layer and position is written into the other. Effect on the task metric as a share of the "
    "gap between the two (1: the receiving network behaves like the giving one), in both "
    "directions, at the position named in each panel: the decision where there is one, else the "
    "position with the largest effect. Hollow markers: random directions of equal norm at the "
    "same place. Arms without a gap to close are left out."
)
NEEDS = {
    "cross_checkpoint": (
        *("task", "regime", "arm", "seed", "step", "direction"),
        *("grain", "layer", "unit", "control", "effect"),
    )
}
DIRECTIONS = {"after_into_before": "after into before", "before_into_after": "before into after"}
GRAINS = ("resid_pre", "resid_post", "resid_mid", "attn_out", "mlp_out", "head")


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("cross_checkpoint", read_tables(source, NEEDS)["cross_checkpoint"])


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
    grain: str | None = None,
) -> Figure:
    """Rows: task and regime. Columns: directions. `grain` defaults to the residual stream."""
    table = final_steps(read_tables(source, NEEDS, task=task, arms=arms)["cross_checkpoint"])
    present = set(table["grain"])
    table = where(table, grain=grain or next((g for g in GRAINS if g in present), min(present)))
    if table["effect"].isna().all():
        raise AnalysisError("the two networks decide alike: there is no gap to take a share of")
    settings = settings_in(table)
    figure, axes = style.grid(
        len(settings),
        len(DIRECTIONS),
        width=4.8,
        row_height=1.2 if len(settings) > 1 else 1.7,
        sharex=True,
        sharey=True,
    )
    looks = arm_styles(arms_in(table.dropna(subset="effect")))
    summaries = []
    for panels, (task, regime) in zip(axes, settings, strict=True):
        rows = where(table, task=task, regime=regime)
        unit = _unit(rows)
        summary = over_seeds(
            where(rows, unit=unit), ["direction", "arm", "control", "layer"], "effect"
        )
        for ax, direction in zip(panels, DIRECTIONS, strict=True):
            _panel(ax, where(summary, direction=direction), looks)
        panels[0].set_ylabel(f"{style.setting_label(task, regime)}\nat {style.wrap(unit)}")
        summaries.append(summary)
    for ax, title in zip(axes[0], DIRECTIONS.values(), strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        layer_axis(ax, int(table["layer"].max()))
        ax.set_xlabel("Layer")
    figure.supylabel("Effect (share of the gap)", fontsize=7)
    style.letter_panels(axes)
    handles = style.arm_handles(list(looks))
    handles.append(style.handle("random direction", marker="o", mfc="white", ls=":", lw=0.7))
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _unit(rows: pd.DataFrame) -> str:
    """The position to draw: the decision, else where patching does most."""
    if (rows["unit"] == "decision").any():
        return "decision"
    effects = where(rows, control=False).groupby("unit")["effect"].mean().abs()
    return str(effects.idxmax()) if effects.notna().any() else str(rows["unit"].iloc[0])


def _panel(ax: Axes, summary: pd.DataFrame, looks: dict[str, ArmStyle]) -> None:
    for level in (0, 1):
        ax.axhline(level, color=style.GREY, lw=0.5, zorder=0)
    shifts = style.beside(list(looks))
    for arm, look in looks.items():
        rows, shift = where(summary, arm=arm), shifts[arm]
        random = {"markerfacecolor": "white", "linestyle": ":", "linewidth": 0.7, "markersize": 3}
        style.curve(ax, where(rows, control=True), "layer", look, shift=shift, **random)
        style.curve(ax, where(rows, control=False), "layer", look, shift=shift)
    if summary.empty:
        words = "no gap between\nthe checkpoints"
        ax.text(0.5, 0.5, words, transform=ax.transAxes, ha="center", va="center")


if __name__ == "__main__":
    from figures import run_script

    run_script("cross_checkpoint")
