"""What maps of patches have in common, whether they were measured or estimated."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from mechinterp.patching.inference import MapInference

MIN_GAP = 1e-3  # in units of the metric; below it an item has no scale to normalise by


class PatchingMap:
    """Effects per item by layer and unit, between the two unpatched runs they lie between.

    A dataclass derived from it has the fields declared here, as fields or as properties.
    """

    grain: str
    direction: str
    method: str
    axes: tuple[str, ...]
    effect: Float[Tensor, "items layers *units"]  # of each patch, in units of the metric
    corrupt_metric: Float[Tensor, " items"]
    clean_metric: Float[Tensor, " items"]

    def __repr__(self) -> str:
        shape = zip(self.effect.shape, self.axes, strict=True)
        sizes = " x ".join(f"{size} {axis}" for size, axis in shape)
        return f"{type(self).__name__}({self.title}; {self.direction}; {self.method}; {sizes})"

    @property
    def title(self) -> str:
        """What a plot of the map is headed with."""
        return self.grain

    @property
    def gap(self) -> Float[Tensor, " items"]:
        """What a perfect patch would change: clean - corrupt (denoising), or the negative."""
        gap = self.clean_metric - self.corrupt_metric
        return gap if self.direction == "denoising" else -gap

    @property
    def baseline(self) -> Float[Tensor, " items"]:
        """The metric of the run that is patched."""
        return self.corrupt_metric if self.direction == "denoising" else self.clean_metric

    @property
    def normalized(self) -> Float[Tensor, "items layers *units"]:
        """effect / gap: 0 if the patch did nothing, 1 if it did all; NaN where |gap| < MIN_GAP."""
        gap = torch.where(self.gap.abs() < MIN_GAP, torch.nan, self.gap)
        return self.effect / self._per_item(gap)

    @property
    def mean(self) -> Float[Tensor, "layers *units"]:
        """The effect's mean over items."""
        return self.effect.mean(0)

    @property
    def stderr(self) -> Float[Tensor, "layers *units"]:
        """The standard error of `mean`; NaN for a single item."""
        if len(self.effect) == 1:
            return torch.full_like(self.mean, torch.nan)
        return self.effect.std(0) / len(self.effect) ** 0.5

    def labels(self, axis: str) -> np.ndarray:
        """What stands at each index of `axis`."""
        return np.arange(self.effect.shape[self.axes.index(axis)])

    def infer(self, **options: Any) -> MapInference:
        """Intervals, p-values and false-discovery control for every cell's mean effect; options as
        of `mechinterp.patching.inference.infer_map`."""
        from mechinterp.patching.inference import infer_map

        return infer_map(self.effect, **options)

    def plot(self, **options: Any) -> Axes:
        """A quick look: see `mechinterp.patching.plots.plot_map`."""
        from mechinterp.patching.plots import plot_map

        return plot_map(self, **options)

    def _per_item(self, values: Float[Tensor, " items"]) -> Float[Tensor, "items *ones"]:
        return values.reshape(-1, *[1] * (len(self.axes) - 1))
