"""Screening: attribution over the whole map, exact patches of what it finds and of a sample beside.

Attribution patching is cheap and can be wrong. So its top cells are patched exactly, and so is a
random sample of the cells that it passed over: the first gives effects to report, the second says
how many the screen missed, with an exact binomial interval (after Kramar et al. 2024, who bound
what their screen misses by sampling, too).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention, intervening
from mechinterp.patching.attribution import AXES, Attribution, attribute
from mechinterp.patching.gradients import (
    PromptPairs,
    budget_mb,
    make_pairs,
    repeat_rows,
    rows_that_fit,
    with_progress,
)
from mechinterp.patching.metrics import Metric
from mechinterp.randomness import derive_generator
from mechinterp.sites import Site

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Trust:
    """How far an attribution map can be trusted, measured on exactly patched cells.

    Attributes:
        spearman, kendall, pearson: agreement of estimated and exact mean effects (magnitudes, where
            the estimate has no sign) over the selected cells and the sample; NaN below 3 cells.
        sample_pearson: the same on the sample alone, which the estimate did not choose.
        n_cells: how many cells there are whose activations differ between the runs.
        n_selected, n_sampled: how many of them were patched exactly: the top, and others at random.
        n_missed: sampled cells whose exact effect is larger in magnitude than the smallest exact
            effect of a selected one.
        miss_rate, miss_low, miss_high: n_missed / n_sampled with its Clopper-Pearson interval.
    """

    spearman: float
    kendall: float
    pearson: float
    sample_pearson: float
    n_cells: int
    n_selected: int
    n_sampled: int
    n_missed: int
    miss_rate: float
    miss_low: float
    miss_high: float
    level: float = 0.95

    def __str__(self) -> str:
        return (
            f"Spearman {self.spearman:.2f}, Kendall {self.kendall:.2f}, Pearson {self.pearson:.2f} "
            f"on {self.n_selected + self.n_sampled} of {self.n_cells} cells; missed "
            f"{self.n_missed} of {self.n_sampled} sampled ({self.miss_rate:.0%}, {self.level:.0%} "
            f"interval {self.miss_low:.0%} to {self.miss_high:.0%})"
        )


@dataclass(frozen=True)
class Screening:
    """An attribution map whose top cells, and a sample of the others, were patched exactly.

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
    def trust(self) -> Trust:
        assert self.attribution.trust is not None
        return self.attribution.trust

    @property
    def estimated(self) -> Float[Tensor, "items cells"]:
        """The attribution of the exact cells."""
        return self.attribution.effect[(slice(None), *self.cells.unbind(1))]

    def to_table(self) -> pd.DataFrame:
        """One row per exact cell: grain, direction, the axes, selected, estimated and effect (means
        over items), stderr (of the exact one), n_items."""
        import pandas as pd

        n = len(self.effect)
        exact = self.effect.double()
        spread = exact.std(0) if n > 1 else exact[0] * torch.nan
        axes = zip(self.attribution.axes[1:], self.cells.cpu().numpy().T, strict=True)
        return pd.DataFrame(
            {
                "grain": self.attribution.grain,
                "direction": self.attribution.direction,
                **dict(axes),
                "selected": self.selected.cpu().numpy(),
                "estimated": self.estimated.mean(0).cpu().numpy(),
                "effect": exact.mean(0).cpu().numpy(),
                "stderr": (spread / n**0.5).cpu().numpy(),
                "n_items": n,
            }
        )


def screen(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    grain: str,
    top_k: int = 20,
    n_sampled: int = 40,
    by_position: bool = False,
    direction: str = "denoising",
    source: HookedModel | None = None,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    **options,
) -> Screening:
    """Attribution of every cell, then exact patches of the `top_k` and of `n_sampled` others.

    Cells whose activations are the same in both runs have no effect for certain: they are neither
    selected nor sampled. Arguments as of `mechinterp.patching.attribution.attribute_grains`, whose
    remaining `options` say how to estimate; `seed` draws the sample.

    Raises:
        AnalysisError: the arguments do not fit together; patterns, which cannot be patched.
    """
    if grain == "pattern":
        raise AnalysisError(
            "grain: attention patterns are not patched exactly; screen q, k or head"
        )
    if top_k < 1 or n_sampled < 0:
        raise AnalysisError(f"screen: top_k {top_k} and n_sampled {n_sampled} must be 1, 0 or more")
    shared = {
        "clean": clean,
        "corrupt": corrupt,
        "grain": grain,
        "metric": metric,
        "direction": direction,
        "source": source,
        "attention_mask": attention_mask,
        "decision": decision,
        "memory_mb": memory_mb,
    }
    found = attribute(model, by_position=by_position, **shared, **options)
    ranked = found.top_cells(found.mean.numel())
    selected, others = ranked[:top_k], ranked[top_k:]
    generator = derive_generator(seed, "screening", grain)
    drawn = torch.randperm(len(others), generator=generator)[:n_sampled].to(others.device)
    cells = torch.cat([selected, others[drawn]])
    effect = patch_cells(model, cells=cells, **shared)
    chosen = torch.arange(len(cells), device=cells.device) < len(selected)
    estimated = found.mean[tuple(cells.unbind(1))]
    exact = effect.mean(0)
    trust = measure_trust(
        estimated, exact, chosen, n_cells=len(ranked), signed=found.signed, level=level
    )
    return Screening(replace(found, trust=trust), cells, chosen, effect)


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
    """Exact change of the metric by each of a few patches; arguments as of `screen`.

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
    sites = {layer: Site(grain, layer) for layer in layers}
    entering = {layer: Site("resid_pre", layer) for layer in layers}
    last = Site("resid_post", model.n_layers - 1)
    mask = pairs.attention_mask
    own = model.capture(pairs.base, {*entering.values(), last}, attention_mask=mask)
    given = giver.capture(pairs.source, sites.values(), attention_mask=mask)
    base = pairs.score(model, own[last])
    effects = base.new_empty(len(pairs), len(cells))
    size = max(1, rows // len(pairs))
    for layer in layers:
        new = given[sites[layer]].to(own[last])
        for some in (cells[:, 0] == layer).nonzero()[:, 0].split(size):
            items = repeat_rows(len(pairs), len(some), model.device)
            where = _where(grain, cells[some, 1:].repeat_interleave(len(pairs), 0), new.shape)
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


def measure_trust(
    estimated: Float[Tensor, " cells"],
    exact: Float[Tensor, " cells"],
    selected: Bool[Tensor, " cells"],
    *,
    n_cells: int,
    signed: bool = True,
    level: float = 0.95,
) -> Trust:
    """`Trust` from the mean effects of exactly patched cells; `n_cells` there are in all."""
    from scipy import stats

    x, y = (values.double().cpu().numpy() for values in (estimated, exact))
    chosen = selected.cpu().numpy()
    sampled = np.abs(y[~chosen])
    n_missed = int((sampled > np.abs(y[chosen]).min()).sum()) if chosen.any() else 0
    interval = (0.0, 1.0)
    if len(sampled):
        proportion = stats.binomtest(n_missed, len(sampled)).proportion_ci(level, method="exact")
        interval = (float(proportion.low), float(proportion.high))
    if not signed:
        x, y = np.abs(x), np.abs(y)

    def agreement(measure, x: np.ndarray, y: np.ndarray) -> float:
        if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
            return float("nan")
        return float(measure(x, y).statistic)

    return Trust(
        spearman=agreement(stats.spearmanr, x, y),
        kendall=agreement(stats.kendalltau, x, y),
        pearson=agreement(stats.pearsonr, x, y),
        sample_pearson=agreement(stats.pearsonr, x[~chosen], y[~chosen]),
        n_cells=n_cells,
        n_selected=int(chosen.sum()),
        n_sampled=len(sampled),
        n_missed=n_missed,
        miss_rate=n_missed / len(sampled) if len(sampled) else float("nan"),
        miss_low=interval[0],
        miss_high=interval[1],
        level=level,
    )
