"""Exact patches of a few cells, to measure estimates by: one run from the patched layer on each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from einops import einsum, rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention, intervening
from mechinterp.patching.attribution_result import Attribution
from mechinterp.patching.axes import AXES
from mechinterp.patching.gradients import (
    PromptPairs,
    budget_mb,
    make_pairs,
    repeat_rows,
    rows_that_fit,
    with_progress,
)
from mechinterp.patching.metrics import Metric
from mechinterp.patching.trust import Screened, choose_cells, measure_trust
from mechinterp.sites import Site

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Screening(Screened):
    """An attribution map of which some cells were patched exactly.

    Attributes:
        attribution: the map, with its `trust`.
        cells: (layer, unit...) of the exact cells: the selected ones in order of their estimate,
            then the sample.
        selected: which of them the attribution selected.
        effect: exact change of the metric, per item.
    """

    attribution: Attribution
    cells: Int[Tensor, "cells axes"]
    selected: Bool[Tensor, " cells"]
    effect: Float[Tensor, "items cells"]

    @property
    def estimated(self) -> Float[Tensor, "items cells"]:
        """The attribution of the exact cells."""
        return self.attribution.effect[(slice(None), *self.cells.unbind(1))]

    def to_table(self) -> pd.DataFrame:
        """One row per exact cell: grain, direction, the axes, selected, estimated and effect (means
        over items), stderr (of the exact one), n_items."""
        import pandas as pd

        axes = zip(self.attribution.axes[1:], self.cells.cpu().numpy().T, strict=True)
        return pd.DataFrame(
            {
                "grain": self.attribution.grain,
                "direction": self.attribution.direction,
                **dict(axes),
                **self._columns("estimated", self.estimated.mean(0)),
            }
        )


def patch_some(
    model: HookedModel,
    found: Attribution,
    *,
    top_k: int = 0,
    n_sampled: int,
    generator: torch.Generator,
    level: float = 0.95,
    **prompts: Any,
) -> Screening:
    """Exact patches of a map's `top_k` cells and of `n_sampled` others, drawn from `generator`.

    Cells whose activations are the same in both runs have no effect for certain: they are neither
    selected nor sampled. `prompts` as of `patch_cells`.
    """
    cells, selected, n_cells = choose_cells(
        found.size, top_k=top_k, n_sampled=n_sampled, generator=generator
    )
    effect = patch_cells(
        model, grain=found.grain, cells=cells, direction=found.direction, **prompts
    )
    trust = measure_trust(
        found.mean[tuple(cells.unbind(1))],
        effect.mean(0),
        selected,
        n_cells=n_cells,
        signed=found.signed,
        level=level,
    )
    return Screening(replace(found, trust=trust), cells, selected, effect)


@torch.no_grad()
def patch_cells(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    grain: str,
    cells: Int[Tensor, "cells axes"],
    metric: Metric,
    direction: str = "denoising",
    source: HookedModel | None = None,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
) -> Float[Tensor, "items cells"]:
    """Exact change of the metric by each of a few patches; arguments as of
    `mechinterp.patching.attribution.attribute_grains`.

    Args:
        cells: rows (layer, position), (layer, head or neuron) or (layer, head or neuron, position).
    """
    pairs = make_pairs(
        model,
        clean=clean,
        corrupt=corrupt,
        metric=metric,
        direction=direction,
        attention_mask=attention_mask,
        decision=decision,
    )
    giver = model if source is None else source
    rows = rows_that_fit(model, corrupt.shape[1], budget_mb(model, memory_mb))
    batches = with_progress(
        f"patching {grain}",
        len(pairs),
        rows,
        lambda part: _patch(model, giver, pairs.select(part), grain, cells, rows),
    )
    return torch.cat(batches)


def _patch(
    model: HookedModel,
    giver: HookedModel,
    pairs: PromptPairs,
    grain: str,
    cells: Int[Tensor, "cells axes"],
    rows: int,
) -> Float[Tensor, "items cells"]:
    layers: Sequence[int] = cells[:, 0].unique().tolist()
    written = "head" if grain == "pattern" else grain
    sites = {layer: Site(written, layer) for layer in layers}
    entering = {layer: Site("resid_pre", layer) for layer in layers}
    last = Site("resid_post", model.n_layers - 1)
    mask = pairs.attention_mask
    values = {Site("v", layer) for layer in layers if grain == "pattern"}
    own = model.capture(pairs.base, {*entering.values(), *values, last}, attention_mask=mask)
    given = giver.capture(
        pairs.source, [Site(grain, layer) for layer in layers], attention_mask=mask
    )
    base = pairs.score(model, own[last])
    effects = base.new_empty(len(pairs), len(cells))
    size = max(1, rows // len(pairs))
    for layer in layers:
        new = given[Site(grain, layer)].to(own[last])
        if grain == "pattern":  # it acts through the outputs that it gives its head
            new = _head_outputs(new, own[Site("v", layer)])
        for some in (cells[:, 0] == layer).nonzero()[:, 0].split(size):
            items = repeat_rows(len(pairs), len(some), model.device)
            where = _where(written, cells[some, 1:].repeat_interleave(len(pairs), 0), new.shape)
            value = new[items]

            def write(old: Tensor, where: Tensor = where, value: Tensor = value) -> Tensor:
                return torch.where(where, value, old)

            patch = Intervention(sites[layer], write)
            with intervening(model.architecture.blocks, [patch]):
                final = model.resid_from_layer(
                    layer,
                    own[entering[layer]][items],
                    attention_mask=None if mask is None else mask[items],
                )
            score = pairs.select(items).score(model, final)
            effects[:, some] = rearrange(score, "(c i) -> i c", c=len(some)) - base[:, None]
    return effects


def _head_outputs(
    pattern: Float[Tensor, "items heads query key"],
    values: Float[Tensor, "items key kv_heads d_head"],
) -> Float[Tensor, "items query heads d_head"]:
    group = pattern.shape[1] // values.shape[2]
    values = values.repeat_interleave(group, dim=2)
    return einsum(pattern, values, "i h query key, i key h d -> i query h d")


def _where(
    grain: str, units: Int[Tensor, "rows units"], shape: Sequence[int]
) -> Bool[Tensor, " rows *site"]:
    """Which entries of a site's activations [items, ...] belong to each row's cell."""
    unit = AXES[grain][1]
    names = ("position",) if unit == "feature" else (unit, "position")
    where = torch.ones(len(units), *[1] * (len(shape) - 1), dtype=torch.bool, device=units.device)
    for name, chosen in zip(names, units.unbind(1), strict=False):
        dim = 1 + AXES[grain].index(name)
        index = torch.arange(shape[dim], device=units.device)
        index = index.reshape(-1, *[1] * (len(shape) - 1 - dim))
        where = where & (index == chosen.reshape(-1, *[1] * (len(shape) - 1)))
    return where
