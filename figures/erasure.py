"""Is what is decodable used? A latent's decodability by layer, and what erasing it there costs."""

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
    "Erasure of one latent at one layer, at the decision position. Above: what a fresh probe reads "
    "of it there, with and without the erasure. Below: what the decision loses of its log score at "
    "the task's utility (0: the latent is not used there, or is fetched again later), beside two "
    "controls that remove as many directions: those of the control task's random labels, and "
    "random ones, mean of three. Erasers (LEACE) are fitted on other items."
)
NEEDS = {
    "erasure": (
        *("task", "regime", "arm", "seed", "step", "layer", "latent", "needed"),
        *("kind", "draw", "measure", "value", "base", "loss", "low", "high"),
    )
}
CONTROLS = {"control": (":", "control labels erased"), "random": ("--", "random directions erased")}


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, in the first regime at hand."""
    return files_by_task("erasure", read_tables(source, NEEDS)["erasure"])


@style.styled
def draw(
    source: str | Path | Tables, *, task: str | None = None, regime: str | None = None
) -> Figure:
    """Rows: AUROC and loss of log score. Columns: latents, those that are needed first."""
    erasure = read_tables(source, NEEDS)["erasure"]
    first = next(iter(variants({"erasure": erasure}).values()))
    rows = where(erasure, task=task or first["task"], regime=regime or first["regime"])
    rows = final_steps(rows)
    arms = arms_in(rows)
    latents = rows[["latent", "needed"]].drop_duplicates()
    latents = latents.sort_values("needed", ascending=False, kind="stable").to_numpy().tolist()
    figure, axes = style.grid(2, len(latents), row_height=1.5, sharex=True, sharey="row")
    summaries = []
    for (latent, needed), (above, below) in zip(latents, axes.T, strict=True):
        own = where(rows, latent=latent)
        _readable(above, own, arms)
        summaries += _losses(below, own, arms)
        above.set_title(style.wrap(f"latent {latent}" + ("" if needed else ", not needed")))
        layer_axis(below, int(rows["layer"].max()))
        below.set_xlabel("Layer")
    axes[0, 0].set_ylabel("AUROC at the site")
    axes[0, 0].set_ylim(min(0.45, float(where(rows, measure="auroc")["value"].min()) - 0.03), 1.03)
    axes[1, 0].set_ylabel("Log score lost (nats)")
    style.letter_panels(axes)
    handles = [
        *style.arm_handles(arms),
        style.handle("latent erased (above)", color=style.GREY, ls="-", lw=0.7),
        *(style.handle(label, ls=dashes, lw=0.8) for dashes, label in CONTROLS.values()),
    ]
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _readable(ax: Axes, rows: pd.DataFrame, arms: list[str]) -> None:
    """AUROC as it is, with markers, and as it is left, without."""
    auroc = where(rows, measure="auroc", kind="latent").drop(columns=["low", "high"])
    looks = arm_styles(arms)
    ax.axhline(0.5, color=style.GREY, lw=0.5, zorder=0)
    for arm in arms:
        own = where(auroc, arm=arm)
        style.curve(ax, over_seeds(own, ["layer"], "base"), "layer", looks[arm], markersize=3)
        left = over_seeds(own, ["layer"])
        ax.plot(left["layer"], left["mean"], color=looks[arm].color, lw=0.7, alpha=0.6)


def _losses(ax: Axes, rows: pd.DataFrame, arms: list[str]) -> list[pd.DataFrame]:
    lost = where(rows, measure="log_score")
    looks = arm_styles(arms)
    ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
    summaries = []
    for arm in arms:
        own = where(lost, arm=arm)
        for kind, (dashes, _) in CONTROLS.items():
            control = where(own, kind=kind).groupby("layer")["loss"].mean()
            ax.plot(control.index, control, color=looks[arm].color, ls=dashes, lw=0.8, zorder=1)
        summaries.append(over_seeds(where(own, kind="latent"), ["layer"], "loss"))
        style.curve(ax, summaries[-1], "layer", looks[arm], markersize=3)
    return summaries


if __name__ == "__main__":
    from figures import run_script

    run_script("erasure")
