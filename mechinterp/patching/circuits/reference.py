"""What ablated edges carry: every writer's value in a reference run, and the streams it adds up to.

A reference is a run on other prompts (resample ablation, also called interchange or patching), the
mean of such runs by position, or zero. Heads are kept as z, a d_model per layer rather than one per
head: means and differences pass through the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.graph import Graph
from mechinterp.sites import Site

Ablation = Literal["resample", "mean", "zero"]
ABLATIONS: tuple[Ablation, ...] = ("resample", "mean", "zero")


@dataclass(frozen=True)
class Reference:
    """Writers' values and the sums that readers read of them; `items` is 1 where all share them.

    Attributes:
        attention: per layer, the heads' z [items pos heads d_head]; of post-normed attention what
            it adds to the stream [items pos d_model].
        is_run: the values are those of a run, so a writer whose inputs are all ablated keeps its
            reference value; of a mean of runs this does not hold.
        prefix: per layer, keys and values [items kv_heads prefix d_head] of the positions before
            those that the rest is about; empty if these start at 0.
    """

    embed: Float[Tensor, "items pos d_model"]
    attention: tuple[Float[Tensor, "items pos *site"], ...]
    mlp: tuple[Float[Tensor, "items pos d_model"], ...]
    resid_pre: tuple[Float[Tensor, "items pos d_model"], ...]
    resid_mid: tuple[Float[Tensor, "items pos d_model"], ...]  # what the MLP's norm reads
    final: Float[Tensor, "items pos d_model"]
    is_run: bool
    prefix: tuple[tuple[Tensor, Tensor], ...] = ()

    def map(self, change: Callable[..., Tensor], *others: Reference) -> Reference:
        """Every tensor changed by `change`, which is also given those of `others`."""
        every = (self, *others)

        def each(name: str) -> tuple[Tensor, ...]:
            return tuple(map(change, *(getattr(reference, name) for reference in every)))

        return Reference(
            change(*(reference.embed for reference in every)),
            each("attention"),
            each("mlp"),
            each("resid_pre"),
            each("resid_mid"),
            change(*(reference.final for reference in every)),
            self.is_run,
            self.prefix,
        )


@torch.no_grad()
def reference_run(
    model: HookedModel,
    tokens: Int[Tensor, "items pos"],
    *,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    start: int = 0,
) -> Reference:
    """The run on `tokens`, for resample ablation; at positions `start` onwards."""
    graph = Graph.of(model)
    grains = {"head", "attn_out"} if graph.heads_write else {"attn_out"}
    sites = [site for g in (*grains, "resid_pre", "mlp_out") for site in model.sites(g)]
    last = Site("resid_post", model.n_layers - 1)
    seen = model.capture(
        tokens, [*sites, last], attention_mask=attention_mask, key_values=start > 0
    )
    layers = range(model.n_layers)
    pre = tuple(seen[Site("resid_pre", layer)] for layer in layers)
    if graph.parallel:
        mid = pre
    else:
        mid = tuple(pre[layer] + seen[Site("attn_out", layer)] for layer in layers)
    grain = "head" if graph.heads_write else "attn_out"
    run = Reference(
        embed=pre[0],
        attention=tuple(seen[Site(grain, layer)] for layer in layers),
        mlp=tuple(seen[Site("mlp_out", layer)] for layer in layers),
        resid_pre=pre,
        resid_mid=mid,
        final=seen[last],
        is_run=True,
        prefix=tuple(
            (cache.keys[:, :, :start], cache.values[:, :, :start])
            for cache in seen.key_values
            if cache.keys is not None and cache.values is not None
        ),
    )
    return run.map(lambda tensor: tensor[:, start:]) if start else run


@torch.no_grad()
def mean_reference(
    model: HookedModel,
    tokens: Int[Tensor, "items pos"],
    *,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    items_per_batch: int = 32,
) -> Reference:
    """The mean over runs on `tokens`, position by position (prompts of one template).

    Padding does not enter; where no prompt has a token the mean is zero.
    """
    mask = torch.ones_like(tokens) if attention_mask is None else attention_mask
    mask = mask.to(model.device, torch.float64)
    total = None
    for start in range(0, len(tokens), items_per_batch):
        rows = slice(start, start + items_per_batch)
        part_mask = None if attention_mask is None else attention_mask[rows]
        part = reference_run(model, tokens[rows], attention_mask=part_mask)

        def summed(x: Tensor, weight: Tensor = mask[rows]) -> Tensor:
            x = x.double() * weight.reshape(*weight.shape, *[1] * (x.ndim - 2))
            return x.sum(0, keepdim=True)

        part = part.map(summed)
        total = part if total is None else total.map(torch.add, part)
    if total is None:
        raise AnalysisError("mean ablation: the reference set is empty")
    count = mask.sum(0).clamp(min=1)
    mean = total.map(lambda x: (x / count.reshape(1, -1, *[1] * (x.ndim - 2))).to(model.dtype))
    return Reference(**{**mean.__dict__, "is_run": False})


@torch.no_grad()
def zero_reference(model: HookedModel, n_positions: int) -> Reference:
    """Every writer at zero; attention's output biases, no writer's, stay in the stream."""
    graph = Graph.of(model)
    blocks = model.architecture.blocks
    zero = torch.zeros(1, n_positions, model.d_model, device=model.device, dtype=model.dtype)
    z = zero.new_zeros(1, n_positions, model.n_heads, model.d_head)
    pre, mid, resid = [], [], zero
    for block in blocks:
        pre.append(resid)
        if graph.heads_write:
            resid = resid + block.attn_out(z)
        mid.append(pre[-1] if graph.parallel else resid)
    n = model.n_layers
    return Reference(
        embed=zero,
        attention=((z if graph.heads_write else zero),) * n,
        mlp=(zero,) * n,
        resid_pre=tuple(pre),
        resid_mid=tuple(mid),
        final=resid,
        is_run=False,
    )
