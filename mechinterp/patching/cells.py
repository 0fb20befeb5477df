"""The kinds of patch that a sweep makes, as rows that enter a block with a changed residual."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.interventions import Intervention, intervening
from mechinterp.patching.plan import RESIDUAL_GRAINS, Plan
from mechinterp.patching.suffix import RecordedRun, Suffix
from mechinterp.sites import Site

Cells = Int[Tensor, "cells 3"]  # (layer, unit, item), sorted by layer
Resid = Float[Tensor, "rows suffix d_model"]


class Patches(ABC):
    """Every cell of a plan, patched with the activations `new`, one tensor per layer.

    `delay` is how many blocks lie between the block patched and the block that a row enters.
    """

    delay = 1
    # Is a patch in the last block read at later positions too, or at its own position only?
    meets_later = False

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        self.run, self.new, self.plan = run, new, plan

    @staticmethod
    def of(run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> Patches:
        made = {"head": HeadPatches, "pattern": PatternPatches, "neuron": NeuronPatches}
        others = PositionPatches if plan.grain in RESIDUAL_GRAINS else ProjectionPatches
        return made.get(plan.grain, others)(run, new, plan)

    def cells(self, *, skip_equal: bool) -> tuple[Cells, Int[Tensor, " cells"]]:
        """The cells that can have an effect, and the position where the suffix of each starts."""
        plan = self.plan
        changed = self._changed()  # [layers items positions kinds]
        if not skip_equal:
            changed = torch.ones_like(changed)
        positions = torch.arange(changed.shape[2], device=changed.device)[:, None]
        reachable = positions[:, 0] <= plan.decision[:, None]
        if plan.attention_mask is not None:
            reachable &= plan.attention_mask.bool()
        changed = changed & reachable[..., None]
        if not self.meets_later:  # after the last attention only the decision position is read
            changed[-1] &= positions == plan.decision[:, None, None]
        if plan.positions is None:
            n_positions = changed.shape[2]
            first = torch.where(changed, positions, n_positions).amin(dim=(0, 2, 3))
            cells = rearrange(changed.any(2), "layers items kinds -> layers kinds items").nonzero()
            return cells, first[cells[:, 2]]
        at = plan.positions[None, :, :, None].expand(len(changed), -1, -1, changed.shape[3])
        changed = changed.gather(2, at)
        changed = rearrange(changed, "layers items columns kinds -> layers (kinds columns) items")
        cells = changed.nonzero()
        return cells, plan.positions[cells[:, 2], cells[:, 1] % plan.n_columns]

    @abstractmethod
    def residuals(
        self,
        suffix: Suffix,
        layer: int,
        units: Int[Tensor, " rows"],
        items: Int[Tensor, " rows"],
    ) -> Resid:
        """What enters block `layer + delay` of rows with one cell of block `layer` patched."""

    def _kinds(self, units: Int[Tensor, " rows"]) -> Int[Tensor, " rows"]:
        return units.div(self.plan.n_columns, rounding_mode="floor")

    def _old(self, layer: int) -> Float[Tensor, "items positions *site"]:
        return self.run.activations[Site(self.plan.grain, layer)]

    def _changed(self) -> Bool[Tensor, "layers items positions kinds"]:
        """Where a patch is not the identity."""
        differs = [(new != self._old(layer)) for layer, new in enumerate(self.new)]
        return torch.stack([self._by_kind(d) for d in differs])

    def _by_kind(
        self, differs: Bool[Tensor, "items positions *site"]
    ) -> Bool[Tensor, "items positions kinds"]:
        return differs.any(-1)

    def _write(
        self,
        rows: Float[Tensor, "rows suffix places *site"],
        new: Float[Tensor, "items positions kinds *site"],
        kinds: Int[Tensor, " rows"],
        items: Int[Tensor, " rows"],
        start: int,
        *,
        places: Int[Tensor, " kinds"] | None = None,
    ) -> None:
        """Write `new` over each row's kind, at all of its positions or, by position, at `start`.

        `places` says where the kinds stand in `rows`, if not all of what stands there is patched.
        """
        at = torch.arange(len(items), device=items.device)
        place = kinds if places is None else places[kinds]
        if self.plan.positions is None:
            rows[at, :, place] = new[items, start:, kinds]
        else:
            rows[at, 0, place] = new[items, start, kinds]


class PositionPatches(Patches):
    """Patches of the residual stream, or of what is added to it, at one position each.

    What follows the attention in a block goes position by position, so it is run there alone. With
    directions, only the component along one of them is exchanged.
    """

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(run, new, plan)
        self.delay = 0 if plan.grain == "resid_pre" else 1
        self.meets_later = plan.grain == "resid_pre"

    def _by_kind(self, differs: Tensor) -> Tensor:
        return differs.any(-1, keepdim=True).expand(-1, -1, self.plan.n_kinds)

    def residuals(self, suffix: Suffix, layer: int, units: Tensor, items: Tensor) -> Resid:
        x = self.run.resid[layer + self.delay][:, suffix.start :].index_select(0, items)
        x[:, :1] = self._patched(
            layer, self._new(layer, units, items, suffix.start), items, suffix.start
        )
        return x

    def _new(
        self, layer: int, units: Tensor, items: Tensor, position: int
    ) -> Float[Tensor, "rows 1 d_model"]:
        given = self.new[layer][items, position]
        if self.plan.directions is not None:
            old, along = self._old(layer)[items, position], self.plan.directions[self._kinds(units)]
            given = old + ((given - old) * along).sum(-1, keepdim=True) * along
        return given[:, None]

    def _patched(
        self, layer: int, new: Float[Tensor, "rows 1 d_model"], items: Tensor, position: int
    ) -> Float[Tensor, "rows 1 d_model"]:
        block, at = self.run.model.architecture.blocks[layer], slice(position, position + 1)
        if self.plan.grain == "attn_out":
            return _after_attention(block, self.run.resid[layer][items, at], new)
        if self.plan.grain == "resid_mid":
            return new + block.mlp_out(new)
        if self.plan.grain == "mlp_out":
            attn_out = self.run.activations[Site("attn_out", layer)]
            return self.run.resid[layer][items, at] + attn_out[items, at] + new
        return new


class HeadPatches(Patches):
    """Patches of heads' outputs."""

    def residuals(self, suffix: Suffix, layer: int, units: Tensor, items: Tensor) -> Resid:
        z = self._z(layer)[:, suffix.start :].index_select(0, items)
        self._write(z, self.new[layer], self._kinds(units), items, suffix.start)
        resid = self.run.resid[layer][:, suffix.start :].index_select(0, items)
        block = self.run.model.architecture.blocks[layer]
        return _after_attention(block, resid, block.attn_out(z))

    def _z(self, layer: int) -> Float[Tensor, "items positions heads d_head"]:
        return self.run.activations[Site("head", layer)]


class PatternPatches(HeadPatches):
    """Patches of attention patterns: the heads' outputs that they give with the run's own values.

    A column of a result is a query position.
    """

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(run, new, plan)
        self.patterns = new
        self.new = []
        for layer, pattern in enumerate(new):
            values = run.activations.key_values[layer].values
            assert values is not None
            values = values.repeat_interleave(run.model.n_heads // run.model.n_kv_heads, dim=1)
            self.new.append(rearrange(pattern.to(values) @ values, "i h q d -> i q h d"))

    def _changed(self) -> Bool[Tensor, "layers items positions heads"]:
        pairs = [(new, self._old(layer)) for layer, new in enumerate(self.patterns)]
        differs = torch.stack([(new != old).any(-1) for new, old in pairs])
        return rearrange(differs, "layers items heads query -> layers items query heads")


class ProjectionPatches(Patches):
    """Patches of queries, keys or values: the block's own attention goes on from them.

    So norms of queries and keys, rotary embedding, soft caps and windows are the network's.
    """

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        super().__init__(run, new, plan)
        self.meets_later = plan.grain in ("k", "v")

    def residuals(self, suffix: Suffix, layer: int, units: Tensor, items: Tensor) -> Resid:
        def write(projected: Float[Tensor, "rows suffix heads d_head"]) -> Tensor:
            self._write(projected, self.new[layer], self._kinds(units), items, suffix.start)
            return projected

        patch = Intervention(Site(self.plan.grain, layer), write)
        resid = self.run.resid[layer][:, suffix.start :].index_select(0, items)
        with intervening(self.run.model.architecture.blocks, [patch]):
            return suffix.block(layer, resid, items)


class NeuronPatches(Patches):
    """Patches of MLP neurons, after the activation function and gate."""

    def __init__(self, run: RecordedRun, new: Sequence[Tensor], plan: Plan) -> None:
        assert plan.neurons is not None
        super().__init__(run, [values[..., plan.neurons] for values in new], plan)
        self.neurons = plan.neurons

    def _old(self, layer: int) -> Float[Tensor, "items positions neurons"]:
        return super()._old(layer)[..., self.neurons]

    def _by_kind(self, differs: Tensor) -> Tensor:
        return differs

    def residuals(self, suffix: Suffix, layer: int, units: Tensor, items: Tensor) -> Resid:
        kinds, start = self._kinds(units), suffix.start
        active = self.run.activations[Site("neuron", layer)][:, start:].index_select(0, items)
        self._write(active, self.new[layer], kinds, items, start, places=self.neurons)
        block = self.run.model.architecture.blocks[layer]
        mlp_out = block.mlp_projection(active)
        if block.mlp_post_norm is not None:
            mlp_out = block.mlp_post_norm(mlp_out)
        attn_out = self.run.activations[Site("attn_out", layer)]
        resid = self.run.resid[layer]
        before = (resid[:, start:] + attn_out[:, start:]).index_select(0, items)
        return before + mlp_out


def sites_needed(plan: Plan) -> set[str]:
    """Grains that a recorded run must keep for a plan's patches."""
    extra = {"mlp_out": "attn_out", "neuron": "attn_out", "pattern": "head"}
    return {plan.grain, extra.get(plan.grain, plan.grain)}


def _after_attention(
    block: Block,
    resid: Float[Tensor, "rows positions d_model"],
    attn_out: Float[Tensor, "rows positions d_model"],
) -> Float[Tensor, "rows positions d_model"]:
    """What leaves a block, from what enters it and what its attention adds."""
    mid = resid + attn_out
    return mid + block.mlp_out(resid if block.parallel else mid)
