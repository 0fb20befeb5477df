"""What attribution needs of a network: pairs of prompts, and one differentiable run of its blocks.

A site is read as the whole tensor in which it lives, the very one that the network goes on with: no
copy is made, and the gradient at a residual counts all of its readers, the skip connection as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp.contexts import Context
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention, intervening
from mechinterp.model_checks import check_sites
from mechinterp.patching.memory import in_batches, memory_budget
from mechinterp.patching.metrics import Metric
from mechinterp.patching.pairs import (
    base_and_source,
    check_attention_mask,
    check_pairs,
    decision_positions,
)
from mechinterp.progress import progress_bar
from mechinterp.sites import Site

_Result = TypeVar("_Result")


@dataclass(frozen=True, eq=False)
class PromptPairs:
    """Prompts into which activations are patched (`base`) and those they come from (`source`).

    `items[r]` is the number by which the metric knows row r, `decision[r]` the position it reads.
    """

    base: Int[Tensor, "rows positions"]
    source: Int[Tensor, "rows positions"]
    items: Int[Tensor, " rows"]
    decision: Int[Tensor, " rows"]
    attention_mask: Int[Tensor, "rows positions"] | None
    metric: Metric

    def __len__(self) -> int:
        return len(self.items)

    def select(self, rows: slice | Int[Tensor, " chosen"]) -> PromptPairs:
        """Some of the rows, or some of them several times."""
        mask = self.attention_mask
        return replace(
            self,
            base=self.base[rows],
            source=self.source[rows],
            items=self.items[rows],
            decision=self.decision[rows],
            attention_mask=None if mask is None else mask[rows],
        )

    def score(
        self, model: HookedModel, final: Float[Tensor, "rows positions d_model"]
    ) -> Float[Tensor, " rows"]:
        """The metric of residuals that enter the final norm."""
        rows = torch.arange(len(self), device=final.device)
        read = final[rows, self.decision]
        return self.metric(model.unembed(model.final_norm(read), self.metric.token_ids), self.items)


def make_pairs(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    direction: str,
    attention_mask: Int[Tensor, "items positions"] | None,
    decision: int | Int[Tensor, " items"],
) -> PromptPairs:
    """Pairs on the model's device, with the direction resolved into base and source.

    Raises:
        AnalysisError: unknown direction, shapes that differ, a decision outside the prompts.
    """
    check_pairs(clean, corrupt)
    base, source = (x.to(model.device) for x in base_and_source(clean, corrupt, direction))
    return PromptPairs(
        base=base,
        source=source,
        items=torch.arange(len(base), device=model.device),
        decision=decision_positions(decision, base),
        attention_mask=check_attention_mask(attention_mask, base),
        metric=metric,
    )


@dataclass(frozen=True, eq=False)
class Gradients:
    """Gradients at sites, at what each layer's MLP reads, and at what enters the final norm."""

    sites: dict[Site, Tensor]
    mlp_inputs: dict[int, Tensor]
    final: Tensor


@dataclass(frozen=True, eq=False)
class LiveRun:
    """A run with its autograd graph: what left the last block, and the tensors that hold `sites`.

    `mlp_inputs[layer]` is what the layer's MLP reads and nothing else does: the gradient there
    lacks the skip connection.
    """

    model: HookedModel
    tensors: dict[Site, Tensor]
    mlp_inputs: dict[int, Tensor]
    final: Float[Tensor, "rows positions d_model"]

    def score(self, pairs: PromptPairs) -> Float[Tensor, " rows"]:
        """The metric of every row, differentiable."""
        with torch.enable_grad():
            return pairs.score(self.model, self.final)

    def activation(self, site: Site) -> Tensor:
        """The values at a site, without gradients."""
        return self._view(site)(self.tensors[site].detach())

    def gradients(
        self,
        score: Float[Tensor, " rows"],
        *,
        sites: Iterable[Site] | None = None,
        retain_graph: bool = False,
    ) -> Gradients:
        """Gradients of each row's score, at all sites or some of them."""
        chosen = {site: self.tensors[site] for site in (self.tensors if sites is None else sites)}
        live = [*chosen.values(), *self.mlp_inputs.values(), self.final]
        distinct = {id(tensor): tensor for tensor in live}  # q, k and v may share a tensor
        found = torch.autograd.grad(
            score,
            list(distinct.values()),
            torch.ones_like(score),
            retain_graph=retain_graph,
            materialize_grads=True,
        )
        by_id = dict(zip(distinct, found, strict=True))
        return Gradients(
            {site: self._view(site)(by_id[id(tensor)]) for site, tensor in chosen.items()},
            {layer: by_id[id(tensor)] for layer, tensor in self.mlp_inputs.items()},
            by_id[id(self.final)],
        )

    def _view(self, site: Site) -> Callable[[Tensor], Tensor]:
        return self.model.architecture.blocks[site.layer].location(site).view


def run_live(
    model: HookedModel,
    resid: Float[Tensor, "rows positions d_model"],
    context: Context,
    sites: Iterable[Site],
    *,
    start: int = 0,
    mlp_inputs: bool = False,
    interventions: Sequence[Intervention] = (),
) -> LiveRun:
    """Run blocks `start` onwards on `resid`, differentiably; `sites` lie in those blocks.

    Raises:
        SiteError: the network has no such site (or, without eager attention, no patterns).
    """
    blocks = model.architecture.blocks
    tensors: dict[Site, Tensor] = {}
    read_by_mlp: dict[int, Tensor] = {}
    with torch.enable_grad(), ExitStack() as hooks:
        hooks.enter_context(intervening(blocks, interventions))
        for site in check_sites(model, sites):
            location = replace(blocks[site.layer].location(site), view=_whole)

            def keep(tensor: Tensor, site: Site = site) -> None:
                tensors[site] = tensor

            hooks.callback(location.on_read(keep).remove)
        for block in blocks[start:] if mlp_inputs else ():

            def separate(_: nn.Module, args: tuple[Any, ...], layer: int = block.layer) -> tuple:
                read_by_mlp[layer] = args[0].view_as(args[0])
                return (read_by_mlp[layer], *args[1:])

            first = block.mlp_norm or block.mlp
            hooks.callback(first.register_forward_pre_hook(separate).remove)
        resid = resid.detach().requires_grad_()
        for layer in range(start, model.n_layers):
            resid = model.block(layer, resid, context)
    return LiveRun(model, tensors, read_by_mlp, resid)


@contextmanager
def dropping_gradients(run: LiveRun) -> Iterator[Callable[[int | None], None]]:
    """Yield `drop(layer)`: from then on no gradient passes what that layer adds to the stream.

    The run must have kept attn_out and mlp_out of all layers (GradDrop, Kramar et al. 2024).
    """
    dropped: list[int | None] = [None]
    with ExitStack() as hooks:
        for site, tensor in run.tensors.items():
            if site.grain in ("attn_out", "mlp_out"):

                def gate(gradient: Tensor, layer: int = site.layer) -> Tensor | None:
                    return torch.zeros_like(gradient) if dropped[0] == layer else None

                hooks.callback(tensor.register_hook(gate).remove)
        yield lambda layer: dropped.__setitem__(0, layer)


def path_points(n_steps: int) -> list[tuple[float, float]]:
    """Where on the way from base (0) to source (1) gradients are taken, and with which weights.

    One step is the base itself; more are Gauss-Legendre points, whose mean converges faster than
    that of equal steps.

    Raises:
        AnalysisError: not a positive number.
    """
    if n_steps < 1:
        raise AnalysisError(f"n_steps: expected at least 1, got {n_steps}")
    if n_steps == 1:
        return [(0.0, 1.0)]
    nodes, weights = np.polynomial.legendre.leggauss(n_steps)
    return [(float(x + 1) / 2, float(w) / 2) for x, w in zip(nodes, weights, strict=True)]


def path_rows(
    base: Float[Tensor, " items *rest"],
    source: Float[Tensor, " items *rest"],
    points: Sequence[tuple[float, float]],
) -> Float[Tensor, " rows *rest"]:
    """Activations at points of the way, one row per point and item (items run fastest)."""
    steps = [torch.lerp(base, source, where) for where, _ in points]
    return torch.cat(steps)


def mean_over_path(
    values: Float[Tensor, " rows *rest"], points: Sequence[tuple[float, float]]
) -> Float[Tensor, " items *rest"]:
    """Weighted sum over the points, of rows as made by `path_rows`."""
    weights = torch.tensor([w for _, w in points], dtype=values.dtype, device=values.device)
    return torch.tensordot(weights, values.unflatten(0, (len(points), -1)), dims=1)


def repeat_rows(n_items: int, n_times: int, device: torch.device) -> Int[Tensor, " rows"]:
    """The item of each row of `path_rows`."""
    return repeat(torch.arange(n_items, device=device), "items -> (times items)", times=n_times)


def budget_mb(model: HookedModel, memory_mb: float | None) -> float:
    """The memory asked for, or a part of what is free."""
    return memory_budget(model.device, memory_mb) / 2**20


def rows_that_fit(model: HookedModel, n_positions: int, memory_mb: float) -> int:
    """How many rows can run differentiably at a time: what autograd keeps of every block."""
    heads = model.n_heads * model.d_head
    per_token = 16 * model.d_model + 6 * model.d_mlp + 8 * heads + 4 * model.n_heads * n_positions
    per_row = model.n_layers * n_positions * per_token * model.dtype.itemsize
    return max(1, int(memory_mb * 2**20 / per_row))


def with_progress(
    label: str, n_rows: int, size: int, run: Callable[[slice], _Result]
) -> list[_Result]:
    """`mechinterp.patching.memory.in_batches` under a progress bar."""
    with progress_bar(label, n_rows, unit="rows") as advance:

        def step(rows: slice, _: int) -> _Result:
            result = run(rows)
            advance(rows.stop - rows.start)
            return result

        return in_batches(step, n_rows, size)


def _whole(tensor: Tensor) -> Tensor:
    return tensor
