"""A quick look at a patching result; the figures of papers are made from tables, in `figures`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from mechinterp.errors import AnalysisError
from mechinterp.patching.maps import PatchingMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_map(result: PatchingMap, *, normalized: bool = True, ax: Axes | None = None) -> Axes:
    """The mean over items by layer (rows) and unit (columns), on a scale centred on zero.

    Raises AnalysisError for results with more than one axis after the layer: index `values` first.
    """
    import matplotlib.pyplot as plt

    if len(result.axes) != 3:
        raise AnalysisError(
            f"plot: needs axes item, layer and one more, got {', '.join(result.axes)}; "
            "average or select along one of them first"
        )
    values = result.normalized if normalized else result.effect
    means = values.double().nanmean(0).cpu()
    reach = float(torch.nan_to_num(means).abs().max()) or 1.0
    if ax is None:
        _, ax = plt.subplots(layout="constrained")
    image = ax.imshow(means, aspect="auto", origin="lower", cmap="PuOr_r", vmin=-reach, vmax=reach)
    name = result.axes[2]
    labels = result.labels(name)
    step = max(1, len(labels) // 16)
    ax.set_xticks(range(0, len(labels), step), labels[::step])
    ax.set(xlabel=name.replace("_", " "), ylabel="layer", title=result.title)
    label = f"recovery ({result.direction})" if normalized else "effect on the metric"
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax
