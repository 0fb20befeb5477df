"""The two kinds of patch that a sweep makes, as rows that enter a block with a changed residual."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.patching.plan import Plan
from mechinterp.patching.suffix import RecordedRun
from mechinterp.sites import Site

Cells = Int[Tensor, "cells 3"]  # (layer, unit, item), sorted by layer


class PositionPatches:
    """Patches of one position each: that position's residual is exchanged.

    Whatever follows the attention in a block goes position by position, so one pass over all
    positions gives the residual that each position's own patch would leave.
    """

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        assert plan.positions is not None
        self.run, self.new, self.plan, self.positions = run, new, plan, plan.positions
        self.n_units = plan.positions.shape[1]
        self.delay = 0 if plan.grain == "resid_pre" else 1  # from the block patched to that entered
        self.patched = [self._patched(layer) for layer in range(len(new))]

    def cells(self, *, skip_equal: bool) -> tuple[Cells, Int[Tensor, " cells"]]:
        """The cells that can have an effect, and the position where the suffix of each starts."""
        changed = _changed(self.run, self.new, self.plan, skip_equal=skip_equal)
        at = self.positions.T.expand(len(self.new), -1, -1)  # [layers units items]
        changed = changed.transpose(1, 2).gather(1, at)
        if self.delay:  # after the last block only the decision position is read
            changed[-1] &= at[-1] == self.plan.decision
        cells = changed.nonzero()
        return cells, self.positions[cells[:, 2], cells[:, 1]]

    def residuals(
        self, layer: int, units: Int[Tensor, " rows"], items: Int[Tensor, " rows"], start: int
    ) -> Float[Tensor, "rows suffix d_model"]:
        """What enters block `layer + delay`: patched at `start`, as recorded after it."""
        x = self.run.resid[layer + self.delay][:, start:].index_select(0, items)
        x[:, 0] = self.patched[layer][items, start]
        return x

    def _patched(self, layer: int) -> Float[Tensor, "items positions d_model"]:
        new, resid = self.new[layer], self.run.resid[layer]
        block = self.run.model.architecture.blocks[layer]
        if self.plan.grain == "attn_out":
            return _after_attention(block, resid, new)
        if self.plan.grain == "resid_mid":
            return new + block.mlp_out(new)
        if self.plan.grain == "mlp_out":
            return resid + self.run.activations[Site("attn_out", layer)] + new
        return new


class HeadPatches:
    """Patches of one head at all positions; suffixes start where the item's heads first differ."""

    delay = 1

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        self.run, self.new, self.plan = run, new, plan
        self.n_units = run.model.n_heads

    def cells(self, *, skip_equal: bool) -> tuple[Cells, Int[Tensor, " cells"]]:
        """As of `PositionPatches`."""
        changed = _changed(self.run, self.new, self.plan, skip_equal=skip_equal)
        n_positions = changed.shape[2]
        positions = torch.arange(n_positions, device=changed.device)[:, None]
        changed[-1] &= positions == self.plan.decision[:, None, None]
        first = torch.where(changed, positions, n_positions).amin(dim=(0, 2, 3))
        cells = changed.any(2).transpose(1, 2).nonzero()
        return cells, first[cells[:, 2]]

    def residuals(
        self, layer: int, units: Int[Tensor, " rows"], items: Int[Tensor, " rows"], start: int
    ) -> Float[Tensor, "rows suffix d_model"]:
        """What leaves block `layer` with one head of each row exchanged."""
        rows = torch.arange(len(items), device=items.device)
        z = self.run.activations[Site("head", layer)][:, start:].index_select(0, items)
        z[rows, :, units] = self.new[layer][items, start:, units]
        resid = self.run.resid[layer][:, start:].index_select(0, items)
        block = self.run.model.architecture.blocks[layer]
        return _after_attention(block, resid, block.attn_out(z))


def _changed(
    run: RecordedRun, new: Sequence[Tensor], plan: Plan, *, skip_equal: bool
) -> Bool[Tensor, "layers items positions *heads"]:
    """Where a patch is not the identity and stands at a token that the decision can depend on."""
    old = [run.activations[site] for site in run.model.sites(plan.grain)]
    pairs = zip(new, old, strict=True)
    changed = torch.stack([(after != before).any(-1) for after, before in pairs])
    if not skip_equal:
        changed[:] = True
    positions = torch.arange(changed.shape[2], device=changed.device)
    reachable = positions <= plan.decision[:, None]
    if plan.attention_mask is not None:
        reachable &= plan.attention_mask.bool()
    return changed & reachable.reshape(*reachable.shape, *[1] * (changed.ndim - 3))


def _after_attention(
    block: Block,
    resid: Float[Tensor, "rows positions d_model"],
    attn_out: Float[Tensor, "rows positions d_model"],
) -> Float[Tensor, "rows positions d_model"]:
    """What leaves a block, from what enters it and what its attention adds."""
    mid = resid + attn_out
    return mid + block.mlp_out(resid if block.parallel else mid)
