"""What a sweep leaves: one value per item and cell, and the tidy tables made from it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.patching.maps import MIN_GAP, PatchingMap
from mechinterp.patching.plan import Plan


@dataclass(frozen=True, repr=False)
class PatchingResult(PatchingMap):
    """The metric after each patch, per item, with the two unpatched runs it lies between.

    `axes` names the axes of `values`: item, layer, then what was patched there: position, head,
    kv_head, neuron or direction, and for a head, neuron or direction at one position each both.
    Along "position" item i has the columns `positions[i]`; `neurons` names those along "neuron".
    `direction` is "denoising" (clean activations into the corrupt run) or "noising" (corrupt into
    clean). Across checkpoints the receiving network's run counts as corrupt, the giving network's
    as clean. `method` is "suffix" (the fast exact engine) or "loop" (one full forward per cell),
    with the reason.
    """

    grain: str
    direction: str
    method: str
    axes: tuple[str, ...]
    values: Float[Tensor, "items layers *units"]
    corrupt_metric: Float[Tensor, " items"]
    clean_metric: Float[Tensor, " items"]
    positions: Int[Tensor, "items columns"] | None = None
    neurons: Int[Tensor, " neurons"] | None = None

    @property
    def effect(self) -> Float[Tensor, "items layers *units"]:
        """What each patch changed, in units of the metric."""
        return self.values - self._per_item(self.baseline)

    def select(self, index: Tensor | np.ndarray | slice) -> PatchingResult:
        """The result for the items at `index` (a slice, an index array or a mask)."""
        if isinstance(index, np.ndarray):
            index = torch.as_tensor(index)
        return replace(
            self,
            values=self.values[index],
            corrupt_metric=self.corrupt_metric[index],
            clean_metric=self.clean_metric[index],
            positions=None if self.positions is None else self.positions[index],
        )

    def labels(self, axis: str) -> np.ndarray:
        """What stands at each index of `axis`; columns of `positions` that differ between items
        are numbered."""
        positions = self.positions
        if axis == "position" and positions is not None and (positions == positions[:1]).all():
            return positions[0].cpu().numpy()
        if axis == "neuron" and self.neurons is not None:
            return self.neurons.cpu().numpy()
        return super().labels(axis)

    def to_table(self) -> pd.DataFrame:
        """One row per cell, with a column for each axis after item: see `by_role` for the others.

        With positions that differ between items, `position` is called `column`.
        """
        labels = {axis: self.labels(axis) for axis in self.axes[1:]}
        if self.positions is not None and bool((self.positions != self.positions[:1]).any()):
            labels = {"column" if axis == "position" else axis: x for axis, x in labels.items()}
        return self.summarise(labels, self.effect, self.normalized)

    def summarise(
        self,
        labels: dict[str, np.ndarray],
        effect: Float[Tensor, "items *cells"],
        normalized: Float[Tensor, "items *cells"],
    ) -> pd.DataFrame:
        """One row per cell of `effect`, whose axes after item are `labels`."""
        effect, normalized = effect.double().cpu(), normalized.double().cpu()
        pooled, pooled_stderr = pooled_recovery(effect, self.gap.double().cpu())
        mean, stderr, n_items = mean_and_stderr(normalized)
        grid = np.meshgrid(*labels.values(), indexing="ij")
        return pd.DataFrame(
            {
                "grain": self.grain,
                "direction": self.direction,
                **{name: values.ravel() for name, values in zip(labels, grid, strict=True)},
                "recovery": mean.ravel().numpy(),
                "stderr": stderr.ravel().numpy(),
                "n_items": n_items.ravel().numpy(),
                "pooled_recovery": pooled.ravel().numpy(),
                "pooled_stderr": pooled_stderr.ravel().numpy(),
                "effect": effect.nanmean(0).ravel().numpy(),
            }
        )


def make_result(
    plan: Plan,
    values: Float[Tensor, "layers units items"],
    base_metric: Float[Tensor, " items"],
    given_metric: Float[Tensor, " items"],
    *,
    direction: str,
    method: str,
) -> PatchingResult:
    """What the engine found, with its units unfolded and the two runs named."""
    metrics = (base_metric, given_metric)
    corrupt_metric, clean_metric = metrics if direction == "denoising" else metrics[::-1]
    by_item = rearrange(values, "layers units items -> items layers units")
    return PatchingResult(
        grain=plan.grain,
        direction=direction,
        method=method,
        axes=plan.axes,
        values=by_item.reshape(*by_item.shape[:2], *plan.unit_shape).contiguous(),
        corrupt_metric=corrupt_metric,
        clean_metric=clean_metric,
        positions=plan.positions,
        neurons=plan.neurons,
    )


def by_role(result: PatchingResult, roles: Shaped[np.ndarray, "items positions"]) -> pd.DataFrame:
    """Average a position sweep over what stands at each position rather than over positions.

    `roles[i, p]` names what stands at position p of item i. Where several positions of an item have
    one role, their mean counts as one observation, so the unit of every standard error is the item.

    Columns: grain, direction, layer, role, recovery (mean over items of the per-item recovery),
    stderr (of that mean), n_items, pooled_recovery and pooled_stderr (see `pooled_recovery`;
    steadier where some items' gaps are small), effect (mean change of the metric).

    Raises:
        AnalysisError: the result is not by layer and position, or `roles` does not cover it.
    """
    names, effect = average_by_role(result, roles, result.effect)
    _, normalized = average_by_role(result, roles, result.normalized)
    labels = {"layer": result.labels("layer"), "role": names}
    return result.summarise(labels, effect, normalized)


def average_by_role(
    result: PatchingResult,
    roles: Shaped[np.ndarray, "items positions"],
    values: Float[Tensor, "items layers columns"],
) -> tuple[np.ndarray, Float[Tensor, "items layers roles"]]:
    """The distinct roles at a result's positions, sorted, and each item's mean over each.

    NaN where an item lacks the role.

    Raises:
        AnalysisError: the result is not by layer and position, or `roles` does not cover it.
    """
    if result.positions is None or result.axes != ("item", "layer", "position"):
        raise AnalysisError(
            f"roles: a sweep over {result.grain} with axes {', '.join(result.axes)} is not by "
            "layer and position alone"
        )
    positions = result.positions.cpu().numpy()
    roles = np.asarray(roles).astype(str)
    if roles.ndim != 2 or len(roles) != len(positions) or roles.shape[1] <= positions.max():
        raise AnalysisError(
            "roles: expected one string per item and position, at least "
            f"({len(positions)}, {positions.max() + 1}), got shape {roles.shape}"
        )
    names, codes = np.unique(np.take_along_axis(roles, positions, axis=1), return_inverse=True)
    codes = torch.as_tensor(codes.reshape(positions.shape))
    values = values.cpu()
    index = codes[:, None].expand(-1, values.shape[1], -1)
    empty = values.new_zeros(*values.shape[:2], len(names))
    total = empty.scatter_add(2, index, values)
    count = empty.scatter_add(2, index, torch.ones_like(values))
    return names, total / count  # 0 / 0 = NaN


def pooled_recovery(
    effect: Float[Tensor, "items *cells"], gap: Float[Tensor, " items"]
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """Ratio of means, mean(effect) / mean(gap), and its standard error (delta method over items).

    Each item counts with the sign that makes its gap positive, so that items whose metric moves in
    opposite directions do not cancel. NaN effects drop their item; NaN where the mean |gap| is
    below MIN_GAP or, for the standard error, with a single item.
    """
    mean, stderr, _ = mean_and_stderr(recovery_contributions(effect, gap))
    return mean, stderr


def recovery_contributions(
    effect: Float[Tensor, "items *cells"], gap: Float[Tensor, " items"]
) -> Float[Tensor, "items *cells"]:
    """What each item contributes to `pooled_recovery`: numbers whose mean is the ratio and whose
    standard error is its delta-method one, for the tests of `mechinterp.patching.inference`."""
    gap = gap.reshape(-1, *[1] * (effect.ndim - 1))
    oriented = effect * gap.sign()
    present = ~oriented.isnan()
    n = present.sum(0).to(effect.dtype)
    size = torch.where(present, gap.abs(), 0.0)
    mean_size = size.sum(0) / n
    mean_size = torch.where(mean_size < MIN_GAP, torch.nan, mean_size)
    ratio = oriented.nansum(0) / n / mean_size
    return ratio + (oriented - ratio * size) / mean_size


def mean_and_stderr(
    values: Float[Tensor, "items *cells"],
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"], Int[Tensor, " *cells"]]:
    """Mean, standard error and count over the items that are not NaN."""
    present = ~values.isnan()
    n = present.sum(0)
    mean = values.nanmean(0)
    residual = torch.where(present, values - mean, 0.0)
    return mean, (residual.square().sum(0) / (n * (n - 1))).sqrt(), n
