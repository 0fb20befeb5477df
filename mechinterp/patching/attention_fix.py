"""Queries and keys where attention is saturated: the pattern's own change, not its linearisation.

A softmax near 0 or 1 has hardly any gradient, so plain attribution misses queries and keys whose
exchange turns the attention round. AtP* (Kramar et al. 2024, their "QK fix") multiplies the change
of the attention probabilities with the gradient at them. The changed probabilities come from the
block's own attention, its queries or keys overwritten: rotary embeddings, norms of q and k, soft
caps, windows and masks are the network's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import partial

import torch
from einops import einsum, rearrange, reduce
from jaxtyping import Float
from torch import Tensor

from mechinterp.contexts import Context
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention, intervening
from mechinterp.sites import Site

Patterns = Float[Tensor, "rows heads query key"]


def saturated_effects(
    model: HookedModel,
    site: Site,
    own: Mapping[Site, Tensor],
    source: Float[Tensor, "items positions heads d_head"],
    gradients: Float[Tensor, "kinds items heads query key"],
    context: Context,
    *,
    by_position: bool,
    rows: int,
) -> Float[Tensor, "kinds items heads *positions"]:
    """What exchanging q or k at `site` does to the metric, through the change of the pattern.

    Args:
        own: resid_pre, pattern and `site` itself of the run that is patched.
        source: what is patched in.
        gradients: of the metric at the pattern, of one or several kinds.
        by_position: one position at a time, else a head's positions together.
        rows: how many rows go through the attention at a time.
    """
    run = partial(_effects, model, site, own, gradients=gradients, context=context)
    if not _coupled(model, site, own, context):
        return run(source, by_position=by_position, rows=rows)
    effects = []
    for head in range(source.shape[2]):
        alone = own[site].clone()
        alone[:, :, head] = source[:, :, head]
        effects.append(run(alone, by_position=by_position, rows=rows).sum(2))
    return torch.stack(effects, dim=2)


def _effects(
    model: HookedModel,
    site: Site,
    own: Mapping[Site, Tensor],
    source: Float[Tensor, "items positions heads d_head"],
    *,
    gradients: Float[Tensor, "kinds items heads query key"],
    context: Context,
    by_position: bool,
    rows: int,
) -> Float[Tensor, "kinds items heads *positions"]:
    """As `saturated_effects`, all heads exchanged at once; each moves its own patterns alone."""
    resid, pattern = own[Site("resid_pre", site.layer)], own[Site("pattern", site.layer)]
    if site.grain == "q" or not by_position:
        change = pattern_with(model, resid, {site: source}, context) - pattern
        by_query = einsum(gradients, change, "n i h q k, i h q k -> n i h q")
        if site.grain == "k":
            return _by_key_head(model, by_query.sum(-1))
        return by_query if by_position else by_query.sum(-1)  # a query moves its own row alone
    mine = own[site]
    effects = source.new_zeros(len(gradients), len(mine), mine.shape[2], mine.shape[1])
    cells = (source != mine).flatten(2).any(-1).nonzero()  # (item, position)
    for some in cells.split(rows) if len(cells) else ():
        items, positions = some.unbind(1)
        keys = mine[items]
        every = torch.arange(len(items), device=keys.device)
        keys[every, positions] = source[items, positions]
        changed = pattern_with(model, resid[items], {site: keys}, context.rows(items))
        change = changed - pattern[items]
        found = einsum(gradients[:, items], change, "n c h q k, c h q k -> n c h")
        found = rearrange(_by_key_head(model, found), "n c g -> c n g")
        effects[:, items, :, positions] = found  # indices apart from each other come first
    return effects


def _coupled(model: HookedModel, site: Site, own: Mapping[Site, Tensor], context: Context) -> bool:
    """Whether one head's queries or keys move other heads' patterns (OLMo 2: its norms of q and k
    span all heads), found by trying it on the first item."""
    first = torch.zeros(1, dtype=torch.long, device=model.device)
    moved = own[site][:1].clone()
    moved[:, :, 0] += 1
    resid = own[Site("resid_pre", site.layer)][:1]
    pattern = pattern_with(model, resid, {site: moved}, context.rows(first))
    group = model.n_heads // moved.shape[2]
    others = pattern[:, group:] - own[Site("pattern", site.layer)][:1, group:]
    return bool(others.abs().max() > 1e-4) if others.numel() else False


@torch.no_grad()
def pattern_with(
    model: HookedModel,
    resid: Float[Tensor, "rows positions d_model"],
    written: Mapping[Site, Float[Tensor, "rows positions heads d_head"]],
    context: Context,
) -> Patterns:
    """A layer's attention probabilities with its queries, keys or both overwritten."""
    (layer,) = {site.layer for site in written}
    blocks = model.architecture.blocks
    seen: list[Tensor] = []

    def stop(pattern: Tensor) -> None:
        seen.append(pattern)
        raise _PatternKnown

    handle = blocks[layer].location(Site("pattern", layer)).on_read(stop)
    interventions = [Intervention(site, value) for site, value in written.items()]
    try:
        # Suppressed inside, so that `intervening` still checks that its writes took place.
        with intervening(blocks, interventions), contextlib.suppress(_PatternKnown):
            blocks[layer].run(resid, context.arguments[layer])
    finally:
        handle.remove()
    return seen[0]


class _PatternKnown(Exception):
    """The attention has run, and nothing more is wanted of its block."""


def _by_key_head(
    model: HookedModel, effects: Float[Tensor, "*rest heads"]
) -> Float[Tensor, "*rest kv_heads"]:
    """Every query head reads the key of its group, so a key's effect is the sum over the group."""
    return reduce(effects, "n i (g r) -> n i g", "sum", g=model.n_kv_heads)
