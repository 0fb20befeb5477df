"""Is what is decodable used? A latent's decodability by layer, beside what steering does."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import style
from figures.arm_styles import arm_styles
from figures.axes import layer_axis
from figures.tables import (
    Tables,
    arms_in,
    files_by_task,
    final_steps,
    over_seeds,
    read_tables,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Decodability and use of one direction per latent and layer, at the decision position. Left: "
    "AUROC of the activations along the direction. Middle: how much the log-odds move, at dose 0, "
    "towards the action that more of the latent argues for, per standard deviation of the "
    "activations along the direction; shaded: 95% of random directions of the same length in the "
    "covariance of the activations. Right: the response to large doses, at the layer where the "
    "slope is largest; crosses: two random directions. Directions are differences of means and "
    "(thin lines, no markers) gradients of a logistic probe, fitted on other items; latents of "
    "several values: mean over values."
)
NEEDS = {
    "use_slopes": (
        *("task", "regime", "arm", "seed", "step", "layer", "latent", "needed", "value", "kind"),
        *("auroc", "auroc_low", "auroc_high", "slope", "low", "high", "null_low", "null_high"),
    ),
    "use": (
        *("task", "regime", "arm", "seed", "step", "layer", "latent", "needed", "value", "kind"),
        *("draw", "dose", "effect", "low", "high"),
    ),
}
KIND, OTHER = "mean_difference", "logistic"  # with markers, and thin
REFERENCES = ("before", "symmetric")  # whose largest slope chooses the layer of the response


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, in the first regime at hand."""
    return files_by_task("use", read_tables(source, NEEDS)["use_slopes"])


@style.styled
def draw(
    source: str | Path | Tables, *, task: str | None = None, regime: str | None = None
) -> Figure:
    """Rows: latents, those that are needed first. Columns: AUROC, slope, response to doses."""
    tables = read_tables(source, NEEDS)
    first = next(iter(variants(tables).values()))
    setting = {"task": task or first["task"], "regime": regime or first["regime"]}
    slopes, curves = (final_steps(where(tables[name], **setting)) for name in ("use_slopes", "use"))
    arms = arms_in(slopes)
    latents = slopes[["latent", "needed"]].drop_duplicates()
    latents = latents.sort_values("needed", ascending=False, kind="stable").to_numpy().tolist()
    figure, axes = style.grid(len(latents), 3, row_height=1.2, sharex="col", sharey="col")
    summaries = []
    for (latent, needed), (left, middle, right) in zip(latents, axes, strict=True):
        own = where(slopes, latent=latent)
        decodable = own.assign(low=own["auroc_low"], high=own["auroc_high"])
        left.axhline(0.5, color=style.GREY, lw=0.5, zorder=0)
        _by_layer(left, decodable, arms, "auroc")
        _null(middle, own, arms)
        summaries += _by_layer(middle, own, arms, "slope")
        _responses(right, where(curves, latent=latent), arms, _layer(own, arms))
        name = f"latent {latent}" + ("" if needed else ", not needed")
        left.set_ylabel(f"{style.wrap(name, 14)}\nAUROC")
        middle.set_ylabel("Slope (nats / s.d.)")
        right.set_ylabel("Effect (nats)")
    for ax in axes[-1, :2]:
        layer_axis(ax, int(slopes["layer"].max()))
        ax.set_xlabel("Layer")
    axes[-1, 2].set_xlabel("Dose (s.d.)")
    for ax, title in zip(axes[0], ("decodable?", "used?", "response to doses"), strict=True):
        ax.set_title(title)
    style.letter_panels(axes)
    handles = [
        *style.arm_handles(arms),
        style.handle("probe's gradient", color=style.GREY, lw=0.7),
        style.handle("random direction", color=style.GREY, ls="", marker="x", markersize=3),
        style.patch_handle("95% of random directions", color=style.GREY, alpha=0.3, lw=0),
    ]
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _by_layer(ax: Axes, rows: pd.DataFrame, arms: list[str], column: str) -> list[pd.DataFrame]:
    """Differences of means with markers and intervals, the probe's gradient without."""
    looks = arm_styles(arms)
    summaries = []
    for arm in arms:
        own = where(rows, arm=arm)
        summaries.append(over_seeds(where(own, kind=KIND), ["layer"], column))
        style.curve(ax, summaries[-1], "layer", looks[arm], markersize=3)
        thin = over_seeds(where(own, kind=OTHER), ["layer"], column)
        ax.plot(thin["layer"], thin["mean"], color=looks[arm].color, lw=0.7, alpha=0.6)
    return summaries


def _null(ax: Axes, rows: pd.DataFrame, arms: list[str]) -> None:
    looks = arm_styles(arms)
    ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
    for arm in arms:
        own = where(rows, arm=arm, kind=KIND).groupby("layer")[["null_low", "null_high"]].mean()
        ax.fill_between(
            own.index, own["null_low"], own["null_high"], color=looks[arm].color, alpha=0.12, lw=0
        )


def _layer(rows: pd.DataFrame, arms: list[str]) -> int:
    """Where the reference's slope is largest."""
    reference = next((arm for arm in REFERENCES if arm in arms), arms[0])
    slopes = over_seeds(where(rows, arm=reference, kind=KIND), ["layer"], "slope")
    return int(slopes["layer"].to_numpy()[slopes["mean"].abs().to_numpy().argmax()])


def _responses(ax: Axes, rows: pd.DataFrame, arms: list[str], layer: int) -> None:
    looks = arm_styles(arms)
    ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
    for arm in arms:
        own = where(rows, arm=arm, layer=layer)
        style.curve(
            ax,
            over_seeds(where(own, kind=KIND), ["dose"], "effect"),
            "dose",
            looks[arm],
            markersize=3,
        )
        thin = over_seeds(where(own, kind=OTHER), ["dose"], "effect")
        ax.plot(thin["dose"], thin["mean"], color=looks[arm].color, lw=0.7, alpha=0.6)
        random = where(own, kind="random").groupby(["draw", "dose"])["effect"].mean().reset_index()
        ax.plot(random["dose"], random["effect"], "x", color=looks[arm].color, ms=2.5, mew=0.5)
    ax.set_title(f"layer {layer}", loc="right", color=style.GREY)


if __name__ == "__main__":
    from figures import run_script

    run_script("use")
