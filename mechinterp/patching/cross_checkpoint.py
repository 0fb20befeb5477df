"""One checkpoint's activations in another, on the same prompts, beside random steps of equal size.

What an activation of A does inside B, where B computed another, shows which sites carry the change
between the two. Any patch that large changes something; so each site has a control, the same step
taken in a random direction.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.memory import items_per_batch, memory_budget
from mechinterp.patching.metrics import Metric
from mechinterp.patching.plan import Plan, Positions, make_plan
from mechinterp.patching.result import (
    PatchingResult,
    average_by_role,
    make_result,
    pooled_recovery,
)
from mechinterp.patching.suffix import find_obstacle
from mechinterp.patching.sweeps import check_source, patch_sites
from mechinterp.randomness import derive_generator

Roles = Shaped[np.ndarray, "items positions"]


@dataclass(frozen=True)
class CrossPatching:
    """Patches of `source` activations into `target`, and the same with random directions.

    In every `PatchingResult` the target's own metric stands as corrupt and the source's as clean.
    """

    patched: PatchingResult
    controls: tuple[PatchingResult, ...]
    roles: Roles | None

    def to_table(self) -> pd.DataFrame:
        """One row per (layer, unit) and patch; a unit is a role, a position or a head, as a string.

        Columns: grain, layer, unit, control, draw (0 for the patch itself; controls count from 0),
        effect (sum of effects over sum of gaps between the checkpoints, each item oriented so that
        its gap is positive; NaN where there is no gap), stderr, low and high (95%, delta method
        over items), raw_effect (mean change of the metric, in its own unit), n_items.
        """
        tables = [self._table(self.patched, control=False, draw=0)]
        tables += [self._table(c, control=True, draw=i) for i, c in enumerate(self.controls)]
        return pd.concat(tables, ignore_index=True)

    def _table(self, result: PatchingResult, *, control: bool, draw: int) -> pd.DataFrame:
        effect = result.effect.double().cpu()
        if self.roles is not None and result.positions is not None:
            units, effect = average_by_role(result, self.roles, effect)
        else:
            units = _unit_names(result)
        ratio, stderr = pooled_recovery(effect, result.gap.double().cpu())
        _, n_layers, n_units = effect.shape
        return pd.DataFrame(
            {
                "grain": result.grain,
                "layer": np.repeat(np.arange(n_layers), n_units),
                "unit": np.tile(units, n_layers),
                "control": control,
                "draw": draw,
                "effect": ratio.flatten().numpy(),
                "stderr": stderr.flatten().numpy(),
                "low": (ratio - 1.96 * stderr).flatten().numpy(),
                "high": (ratio + 1.96 * stderr).flatten().numpy(),
                "raw_effect": effect.nanmean(0).flatten().numpy(),
                "n_items": (~effect.isnan()).sum(0).flatten().numpy(),
            }
        )


@torch.no_grad()
def patch_across(
    source: HookedModel,
    target: HookedModel,
    tokens: Int[Tensor, "items positions"],
    *,
    grain: str,
    metric: Metric,
    source_metric: Metric | None = None,
    roles: Roles | None = None,
    positions: Positions = None,
    n_controls: int = 1,
    seed: int = 0,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int | None = None,
) -> CrossPatching:
    """Patch `source`'s activations into `target`, both run on `tokens`, one site at a time.

    A control adds to the target's own activation a step of the length that the patch takes, in a
    direction drawn once per layer and role (without roles: per position or head) and shared by all
    items, as a change of the weights is. One control draw makes as many control sites as sites.

    Args:
        source_metric: what the source is scored by, where that is not `metric`: a shift that one of
            the two adds to its logits is part of the gap, though of no activation.
        roles: what stands at each position; the table is then by role.
        n_controls: control draws.
        seed: names the stream of the directions, with the grain and the draw.

    Raises:
        AnalysisError: the networks' shapes differ, or the arguments do not fit together.
    """
    check_source(source, target)
    tokens = tokens.to(target.device)
    if roles is not None and np.shape(roles) != tuple(tokens.shape):
        raise AnalysisError(
            f"roles: expected one per token, {tuple(tokens.shape)}, got {np.shape(roles)}"
        )
    plan = make_plan(
        target,
        tokens,
        grain=grain,
        metric=metric,
        positions=positions,
        decision=decision,
        attention_mask=attention_mask,
    )
    giver = plan if source_metric is None else replace(plan, metrics={"metric": source_metric})
    obstacle = find_obstacle(target, tokens)
    budget = memory_budget(target.device, memory_mb)
    draws = [_Directions.draw(target, plan, tokens, roles, seed, i) for i in range(n_controls)]
    values: list[list[Tensor]] = [[] for _ in range(1 + n_controls)]
    target_scores, source_scores = [], []
    for rows, part in plan.batches(items_per_batch(target, tokens, 1, budget)):
        given, score = giver.select(rows).capture(source, tokens[rows].to(source.device))
        given = [activations.to(target.device, target.dtype) for activations in given]
        own, own_score = part.capture(target, tokens[rows])
        source_scores.append(score.to(target.device))
        target_scores.append(own_score)
        patches = [given] + [directions.step(rows, own, given) for directions in draws]
        for kept, new in zip(values, patches, strict=True):
            patched, _ = patch_sites(
                target, tokens[rows], new, part, obstacle=obstacle, budget=budget
            )
            kept.append(patched)
    results = [
        make_result(
            plan,
            torch.cat(kept, dim=-1)[0],
            torch.cat(target_scores, dim=-1)[0],
            torch.cat(source_scores, dim=-1)[0],
            direction="denoising",
            method="suffix" if obstacle is None else f"loop: {obstacle}",
        )
        for kept in values
    ]
    return CrossPatching(results[0], tuple(results[1:]), roles)


def patch_both_ways(
    before: HookedModel,
    after: HookedModel,
    tokens: Int[Tensor, "items positions"],
    *,
    grain: str,
    metric: Metric,
    after_metric: Metric | None = None,
    **options: Any,
) -> pd.DataFrame:
    """Both directions in one table with a column `direction`; options as of `patch_across`.

    `after_metric` is what `after` is scored by, where that is not `metric`.
    """
    first, second = (before, metric), (after, after_metric or metric)
    pairs = {"after_into_before": (second, first), "before_into_after": (first, second)}
    tables = []
    for direction, ((source, source_metric), (target, own_metric)) in pairs.items():
        options |= {"metric": own_metric, "source_metric": source_metric}
        result = patch_across(source, target, tokens, grain=grain, **options)
        table = result.to_table()
        table.insert(0, "direction", direction)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


@dataclass(frozen=True)
class _Directions:
    """Unit vectors of one control draw, and which of them stands where."""

    vectors: Float[Tensor, "layers kinds width"]
    kinds: Int[Tensor, "items positions"] | None  # None: one kind per head

    @classmethod
    def draw(
        cls,
        model: HookedModel,
        plan: Plan,
        tokens: Int[Tensor, "items positions"],
        roles: Roles | None,
        seed: int,
        number: int,
    ) -> _Directions:
        if plan.positions is None:
            kinds, n_kinds, width = None, model.n_heads, model.d_head
        elif roles is None:
            n_kinds, width = tokens.shape[1], model.d_model
            kinds = torch.arange(n_kinds, device=model.device).expand(len(tokens), -1)
        else:
            names, codes = np.unique(np.asarray(roles).astype(str), return_inverse=True)
            kinds = torch.as_tensor(codes.reshape(tokens.shape), device=model.device)
            n_kinds, width = len(names), model.d_model
        generator = derive_generator(seed, "random direction", plan.grain, number)
        vectors = torch.randn(model.n_layers, n_kinds, width, generator=generator)
        vectors = torch.nn.functional.normalize(vectors, dim=-1)
        return cls(vectors.to(model.device, model.dtype), kinds)

    def step(self, rows: slice, own: list[Tensor], given: list[Tensor]) -> list[Tensor]:
        """`own`, moved as far as `given` is from it, in these directions."""
        moved = []
        for vectors, start, end in zip(self.vectors, own, given, strict=True):
            direction = vectors if self.kinds is None else vectors[self.kinds[rows]]
            moved.append(start + (end - start).norm(dim=-1, keepdim=True) * direction)
        return moved


def _unit_names(result: PatchingResult) -> np.ndarray:
    n_units = result.values.shape[2]
    if result.positions is None:
        return np.array([f"head {head}" for head in range(n_units)])
    if bool((result.positions == result.positions[:1]).all()):
        return np.array([f"position {p}" for p in result.positions[0].tolist()])
    return np.array([f"unit {u}" for u in range(n_units)])
