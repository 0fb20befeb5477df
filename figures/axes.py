"""The axes that several figures share: percent of the scale, training steps, layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def hide_unused(axes: np.ndarray, n_used: int) -> None:
    """Leave out all panels but the first `n_used`; the lowest of each column then has tick labels,
    which shared axes give to the last row alone."""
    for ax in axes.flat[n_used:]:
        ax.set_visible(False)
    for ax in axes.flat[max(0, n_used - axes.shape[1]) : n_used]:
        ax.tick_params(labelbottom=True)


def percent_axis(
    ax: Axes,
    which: str,
    values: Any,
    *,
    signed: bool = False,
    at_least: float = 0,
    headroom: float = 0,
    log_above: float = 100,
) -> None:
    """Scale, limits and ticks of an axis in percent, made to hold `values` and ±`at_least`.

    Linear; where values go past ±`log_above`, linear within ±10% and logarithmic beyond. `headroom`
    is the share of the axis left free at its upper end, for words.
    """
    from matplotlib.ticker import (
        FixedLocator,
        FuncFormatter,
        MaxNLocator,
        NullFormatter,
        NullLocator,
    )

    values = np.append(np.asarray(values, float), [-at_least, at_least])
    values = values[np.isfinite(values)]
    wide = np.abs(values).max() > log_above
    axis = ax.xaxis if which == "x" else ax.yaxis
    if wide:
        getattr(ax, f"set_{which}scale")("symlog", linthresh=10, linscale=1)
    ends = axis.get_transform().transform([values.min(), values.max()])
    span = ends[1] - ends[0] or 1.0  # values that are all the same still need an axis
    pad = 0.07 * span
    limits = (
        axis.get_transform().inverted().transform([ends[0] - pad, ends[1] + pad + headroom * span])
    )
    getattr(ax, f"set_{which}lim")(*limits)
    if wide:
        decades = [10, 100, 1e3, 1e4] if np.abs(values).max() < 500 else [10, 1e3, 1e5]
        axis.set_major_locator(FixedLocator([*(-d for d in decades), 0, *decades]))
        axis.set_minor_locator(FixedLocator([-1e4, -100, 100, 1e4]))
    else:
        axis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        axis.set_minor_locator(NullLocator())

    def text(value: float, _: int) -> str:
        sign = "+" if signed and value > 0 else ""
        return f"{sign}{value:,.10g}".replace("-", "−")

    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_formatter(NullFormatter())


def step_axis(ax: Axes, steps: Sequence[int]) -> None:
    """A logarithmic axis of training steps on which step 0 has a place."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    steps = sorted({int(step) for step in steps})
    positive = [step for step in steps if step > 0]
    if not positive:
        ax.set_xticks(steps)
        return
    ax.set_xscale("symlog", linthresh=positive[0], linscale=0.5)
    first, last = positive[0], positive[-1]
    ticks = {first, last} | ({0} & set(steps))
    if last / first > 8:
        ticks.add(positive[len(positive) // 2])
    ax.xaxis.set_minor_locator(FixedLocator([s for s in steps if s not in ticks]))
    ax.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda v, _: _short(v)))


def _short(number: float) -> str:
    return f"{number / 1000:g}k" if number >= 1000 else f"{number:g}"


def layer_axis(ax: Axes, n_layers: int) -> None:
    """Whole layers as ticks, at most about eight of them."""
    from matplotlib.ticker import MultipleLocator

    stride = next(s for s in (1, 2, 4, 5, 8, 10, 20, 40) if n_layers / s <= 8)
    ax.xaxis.set_major_locator(MultipleLocator(stride))
