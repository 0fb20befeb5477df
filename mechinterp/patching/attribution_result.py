"""What attribution patching leaves: estimated effects per item, and how far they can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.patching.maps import PatchingMap
from mechinterp.patching.trust import Trust, rank_cells, say_trust, trust_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Attribution(PatchingMap):
    """Estimated effects of one grain's patches, per item.

    Attributes:
        grain, direction: as of an exact sweep.
        method: how it was estimated, such as "AtP", "IG(8 inputs)" or "AtP + attention fix".
        axes: names of the dimensions of `effect`: item, layer, then position, head, kv_head (k and
            v of grouped-query models) or neuron; for heads and neurons by position, both.
        effect: estimated change of the metric. With GradDrop magnitudes, which have no sign.
        changed: where the two runs' activations differ; elsewhere the effect is 0 for certain.
        corrupt_metric, clean_metric: of the unpatched runs.
        trust: how far exact patches of some cells bear it out; None if none were asked for.
    """

    grain: str
    direction: str
    method: str
    axes: tuple[str, ...]
    effect: Float[Tensor, "items layers *units"]
    changed: Bool[Tensor, "items layers *units"]
    corrupt_metric: Float[Tensor, " items"]
    clean_metric: Float[Tensor, " items"]
    trust: Trust | None = None

    @property
    def signed(self) -> bool:
        """Whether `effect` has a sign."""
        return "GradDrop" not in self.method

    @property
    def title(self) -> str:
        return f"{self.grain}, estimated: {say_trust(self.trust)}"

    @property
    def values(self) -> Float[Tensor, " items layers *units"]:
        """The metric that each patch is estimated to leave."""
        return self.effect + self._per_item(self.baseline)

    @property
    def size(self) -> Float[Tensor, " layers *units"]:
        """Magnitude of the mean effect; NaN where no item's activations differ."""
        return self.mean.abs().masked_fill(~self.changed.any(0), torch.nan)

    def top_cells(self, k: int) -> Int[Tensor, "cells axes"]:
        """The cells (layer, unit...) of the largest mean magnitude, largest first; only changed."""
        return rank_cells(self.size)[:k]

    def to_table(self) -> pd.DataFrame:
        """One row per cell: grain, direction, method, the axes, effect (mean over items), stderr
        (of that mean), n_items, and of the whole map, as of `Trust`: pearson, spearman, miss_rate,
        n_exact."""
        import pandas as pd

        shape = self.mean.shape
        index = np.indices(shape).reshape(len(shape), -1)
        return pd.DataFrame(
            {
                "grain": self.grain,
                "direction": self.direction,
                "method": self.method,
                **dict(zip(self.axes[1:], index, strict=True)),
                "effect": self.mean.flatten().cpu().numpy(),
                "stderr": self.stderr.flatten().cpu().numpy(),
                "n_items": len(self.effect),
                **trust_columns(self.trust),
            }
        )
