"""Are learning and choosing separable? What pruning one of them costs both, and the index."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
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
    "Pruning. Attention heads and MLP neurons are taken away in the order of their estimated "
    "importance for the decision (two columns on the left) or for the needed latents (the next "
    "two), the same share of either kind. Lost: the share of the intact network's value that is "
    "gone at the decision: of the decision its log score after an affine readout is fitted again, "
    "of the needed latents the bits that fresh probes read (below 0: more than before). Thin "
    "lines: random components of equal numbers, mean over draws and their range. Right: the "
    "separability index, 1 where pruning the components of one costs the other no more than random "
    "pruning does, 0 where it costs both alike, below 0 where it costs the other more; of each "
    "target, and of both together. Rows: what the pruned components carry instead, "
    "their mean or their activation in another prompt."
)
NEEDS = {
    "separability": (
        *("task", "regime", "arm", "seed", "step", "ablation", "target", "draw", "share"),
        *("outcome", "measure", "lost", "low", "high"),
    ),
    "separability_index": (
        *("task", "regime", "arm", "seed", "step", "ablation", "index", "value", "low", "high"),
    ),
}
MEASURES = {"decision": "log_score_refit", "latents": "information"}
PANELS = (
    ("decision", "decision"),
    ("decision", "latents"),
    ("latents", "latents"),
    ("latents", "decision"),
)
ABLATIONS = {"mean": "Lost, mean ablation", "resample": "Lost, resample ablation"}
INDICES = {"decision": "decision\npruned", "latents": "latents\npruned", "both": "both"}


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, in the first regime at hand."""
    return files_by_task("separability", read_tables(source, NEEDS)["separability"])


@style.styled
def draw(
    source: str | Path | Tables, *, task: str | None = None, regime: str | None = None
) -> Figure:
    """Rows: ablations. Columns: what is pruned and what is lost, then the index."""
    tables = read_tables(source, NEEDS)
    first = next(iter(variants(tables).values()))
    at = {"task": task or first["task"], "regime": regime or first["regime"]}
    curves, indices = (final_steps(where(tables[name], **at)) for name in NEEDS)
    lost = curves[
        [MEASURES.get(o) == m for o, m in zip(curves["outcome"], curves["measure"], strict=True)]
    ]
    arms = arms_in(curves)
    looks = arm_styles(arms)
    figure, axes = style.grid(
        2, len(PANELS) + 1, row_height=1.6, width_ratios=[1.0] * len(PANELS) + [1.15]
    )
    least = float(np.clip(lost["lost"].min(), -1, 0))
    summaries = []
    for row, (ablation, label) in enumerate(ABLATIONS.items()):
        here = where(lost, ablation=ablation)
        for ax, (target, outcome) in zip(axes[row], PANELS, strict=False):
            panel = where(here, outcome=outcome)
            for arm in arms:
                own = where(panel, arm=arm)
                _random(ax, where(own, target="random"), looks[arm])
                summaries.append(over_seeds(where(own, target=target), ["share"], "lost"))
                style.curve(ax, summaries[-1], "share", looks[arm], markersize=3)
            _share_axis(ax)
            ax.set_ylim(least - 0.12, 1.12)
            ax.set_yticks([tick for tick in (-1, -0.5, 0, 0.5, 1) if tick >= least - 0.12])
            if ax is not axes[row, 0]:
                ax.set_yticklabels([])
            if row == 0:
                ax.set_title(f"{target} pruned:\n{outcome} lost")
            else:
                ax.set_xlabel("Share pruned")
        axes[row, 0].set_ylabel(label)
        summaries += _indices(axes[row, -1], where(indices, ablation=ablation), arms)
    axes[0, -1].set_title("separability\nindex")
    style.letter_panels(axes)
    handles = [
        *style.arm_handles(arms),
        style.handle("random components", color=style.GREY, lw=0.7),
    ]
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _random(ax: Axes, rows: pd.DataFrame, look: ArmStyle) -> None:
    draws = rows.groupby(["draw", "share"])["lost"].mean().unstack("draw")
    ax.plot(draws.index, draws.mean(axis=1), color=look.color, lw=0.6, zorder=1)
    ends = draws.min(axis=1), draws.max(axis=1)
    ax.fill_between(draws.index, *ends, color=look.color, alpha=0.15, lw=0, zorder=0)


def _indices(ax: Axes, rows: pd.DataFrame, arms: list[str]) -> list[pd.DataFrame]:
    for level in (0, 1):
        ax.axhline(level, color=style.GREY, lw=0.5, zorder=0)
    looks, places = arm_styles(arms), np.arange(len(INDICES))
    summaries = []
    for offset, arm in zip(np.linspace(-0.2, 0.2, len(arms)), arms, strict=True):
        summary = over_seeds(where(rows, arm=arm), ["index"])
        summaries.append(summary)
        summary = summary.set_index("index").reindex(list(INDICES)).reset_index()
        x = places + (offset if len(arms) > 1 else 0)
        look = looks[arm]
        ax.errorbar(
            x,
            summary["mean"],
            yerr=style.errors(summary),
            color=look.color,
            marker=look.marker,
            ls="none",
            markersize=3.5,
            elinewidth=0.6,
        )
    ax.set_xticks(places, list(INDICES.values()))
    ax.set_xlim(-0.5, len(INDICES) - 0.5)
    low = np.nanmin([0.0, *rows["value"], *rows["low"]])
    ax.set_ylim(max(low - 0.1, -1.1), 1.12)
    return summaries


def _share_axis(ax: Axes) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    ax.set_xscale("log")
    low = ax.dataLim.x0
    decades = [tick for tick in (0.001, 0.01, 0.1, 1) if tick >= low * 0.99]
    ax.xaxis.set_major_locator(FixedLocator(decades))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}%"))
    ax.xaxis.set_minor_formatter(NullFormatter())


if __name__ == "__main__":
    from figures import run_script

    run_script("separability")
