"""What a sweep leaves: one value per cell and item, and the tidy tables made from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechinterp.errors import AnalysisError

MIN_GAP = 1e-3  # in units of the metric; below it an item has no scale to normalise by


@dataclass(frozen=True)
class PatchingResult:
    """The metric after each patch, per item, with the two unpatched runs it lies between.

    `values[l, u, i]` is item i's metric with one site patched: layer l and, for the position
    grains, the position `positions[i, u]`; for grain "head", head u at all positions. `direction`
    is "denoising" (clean activations into the corrupt run) or "noising" (corrupt into clean).
    Across checkpoints the receiving network's run counts as corrupt, the giving network's as clean.
    `method` is "suffix" (the fast exact engine) or "loop" (one full forward per cell).
    """

    grain: str
    direction: str
    method: str
    values: Float[Tensor, "layers units items"]
    corrupt_metric: Float[Tensor, " items"]
    clean_metric: Float[Tensor, " items"]
    positions: Int[Tensor, "items units"] | None  # None for grain "head"

    @property
    def gap(self) -> Float[Tensor, " items"]:
        """What a perfect patch would change: clean - corrupt (denoising), or the negative."""
        gap = self.clean_metric - self.corrupt_metric
        return gap if self.direction == "denoising" else -gap

    @property
    def effect(self) -> Float[Tensor, "layers units items"]:
        """What each patch changed, in units of the metric."""
        return self.values - (
            self.corrupt_metric if self.direction == "denoising" else self.clean_metric
        )

    @property
    def recovery(self) -> Float[Tensor, "layers units items"]:
        """effect / gap: 0 if the patch did nothing, 1 if it did all; NaN where |gap| < MIN_GAP."""
        gap = torch.where(self.gap.abs() < MIN_GAP, torch.nan, self.gap)
        return self.effect / gap

    def select(self, index: Tensor | np.ndarray | slice) -> PatchingResult:
        """The result for the items at `index` (a slice, an index array or a mask)."""
        if isinstance(index, np.ndarray):
            index = torch.as_tensor(index)
        return replace(
            self,
            values=self.values[..., index],
            corrupt_metric=self.corrupt_metric[index],
            clean_metric=self.clean_metric[index],
            positions=None if self.positions is None else self.positions[index],
        )

    def to_table(self) -> pd.DataFrame:
        """One row per (layer, position) or (layer, head): see `by_role` for the columns.

        With positions that differ between items, `unit` is the column of `positions`.
        """
        n_units = self.values.shape[1]
        if self.positions is None:
            name, labels = "head", np.arange(n_units)
        elif bool((self.positions == self.positions[:1]).all()):
            name, labels = "position", self.positions[0].cpu().numpy()
        else:
            name, labels = "unit", np.arange(n_units)
        return self._summarise(name, labels, self.effect, self.recovery)

    def _summarise(
        self,
        name: str,
        labels: np.ndarray,
        effect: Float[Tensor, "layers units items"],
        recovery: Float[Tensor, "layers units items"],
    ) -> pd.DataFrame:
        effect, recovery = effect.double().cpu(), recovery.double().cpu()
        n_layers, n_units, _ = effect.shape
        pooled, pooled_stderr = pooled_recovery(effect, self.gap.double().cpu())
        mean, stderr, n_items = _mean_and_stderr(recovery)
        layers, units = np.meshgrid(np.arange(n_layers), np.arange(n_units), indexing="ij")
        return pd.DataFrame(
            {
                "grain": self.grain,
                "direction": self.direction,
                "layer": layers.ravel(),
                name: labels[units.ravel()],
                "recovery": mean.ravel().numpy(),
                "stderr": stderr.ravel().numpy(),
                "n_items": n_items.ravel().numpy(),
                "pooled_recovery": pooled.ravel().numpy(),
                "pooled_stderr": pooled_stderr.ravel().numpy(),
                "effect": effect.nanmean(-1).ravel().numpy(),
            }
        )


def by_role(result: PatchingResult, roles: Shaped[np.ndarray, "items positions"]) -> pd.DataFrame:
    """Average a position sweep over what stands at each position rather than over positions.

    `roles[i, p]` names what stands at position p of item i. Where several positions of an item have
    one role, their mean counts as one observation, so the unit of every standard error is the item.

    Columns: grain, direction, layer, role, recovery (mean over items of the per-item recovery),
    stderr (of that mean), n_items, pooled_recovery and pooled_stderr (see `pooled_recovery`;
    steadier where some items' gaps are small), effect (mean change of the metric).

    Raises:
        AnalysisError: the result is not by position, or `roles` does not cover its positions.
    """
    names, effect = average_by_role(result, roles, result.effect)
    _, recovery = average_by_role(result, roles, result.recovery)
    return result._summarise("role", names, effect, recovery)


def average_by_role(
    result: PatchingResult,
    roles: Shaped[np.ndarray, "items positions"],
    values: Float[Tensor, "layers units items"],
) -> tuple[np.ndarray, Float[Tensor, "layers roles items"]]:
    """The distinct roles at a result's positions, sorted, and each item's mean over each.

    NaN where an item lacks the role.

    Raises:
        AnalysisError: the result is not by position, or `roles` does not cover its positions.
    """
    if result.positions is None:
        raise AnalysisError(f"roles: a sweep over {result.grain} patches all positions together")
    positions = result.positions.cpu().numpy()
    roles = np.asarray(roles).astype(str)
    if roles.ndim != 2 or len(roles) != len(positions) or roles.shape[1] <= positions.max():
        raise AnalysisError(
            "roles: expected one string per item and position, at least "
            f"({len(positions)}, {positions.max() + 1}), got shape {roles.shape}"
        )
    names, codes = np.unique(np.take_along_axis(roles, positions, axis=1), return_inverse=True)
    codes = torch.as_tensor(rearrange(codes.reshape(positions.shape), "i u -> u i"))
    index = codes.expand(len(values), -1, -1)
    values = values.cpu()
    empty = values.new_zeros(len(values), len(names), values.shape[-1])
    total = empty.scatter_add(1, index, values)
    count = empty.scatter_add(1, index, torch.ones_like(values))
    return names, total / count  # 0 / 0 = NaN


def pooled_recovery(
    effect: Float[Tensor, "*cells items"], gap: Float[Tensor, " items"]
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """Ratio of means, mean(effect) / mean(gap), and its standard error (delta method over items).

    Each item counts with the sign that makes its gap positive, so that items whose metric moves in
    opposite directions do not cancel. NaN effects drop their item; NaN where the mean |gap| is
    below MIN_GAP or, for the standard error, with a single item.
    """
    oriented = effect * gap.sign()
    present = ~oriented.isnan()
    n = present.sum(-1).to(effect.dtype)
    size = torch.where(present, gap.abs(), 0.0)
    mean_size = size.sum(-1) / n
    mean_size = torch.where(mean_size < MIN_GAP, torch.nan, mean_size)
    ratio = oriented.nansum(-1) / n / mean_size
    residual = torch.where(present, oriented - ratio[..., None] * size, 0.0)
    variance = residual.square().sum(-1) / (n * (n - 1))  # n == 1: 0 / 0 = NaN
    return ratio, variance.sqrt() / mean_size


def _mean_and_stderr(
    values: Float[Tensor, "*cells items"],
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"], Int[Tensor, " *cells"]]:
    """Mean, standard error and count over the items that are not NaN."""
    present = ~values.isnan()
    n = present.sum(-1)
    mean = values.nanmean(-1)
    residual = torch.where(present, values - mean[..., None], 0.0)
    return mean, (residual.square().sum(-1) / (n * (n - 1))).sqrt(), n
