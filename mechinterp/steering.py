"""Add a vector to the residual stream and see what the decision makes of it.

The effect of a dose of a direction is measured by runs (`steer`), its slope at dose 0 by the
gradient (`metric_gradients`): one backward pass gives the slopes of all directions at all layers,
so that a null of a thousand random ones costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Literal, get_args

import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SiteError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import Metric
from mechinterp.patching.suffix import Suffix, record
from mechinterp.progress import progress_bar

SteeredPositions = Literal["decision", "all"]


@torch.no_grad()
def steer(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    added: Mapping[int, Float[Tensor, "n d_model"]],
    metric: Metric,
    *,
    positions: SteeredPositions = "decision",
    batch_size: int = 512,
) -> dict[int, Float[Tensor, "n items"]]:
    """`metric` at the last position while each of `added[layer]` is added to that layer's stream.

    Layer l is the output of block l (`resid_post.{l-1}`), one vector at a time, at the last
    position alone or at all of them. A vector of zeros is the unpatched run itself. Earlier layers
    and positions stay as they are, so only what comes after is run, `batch_size` rows at once.

    Raises SiteError for a layer that the network does not have, or another word for positions.
    """
    check_sites(model, added, positions)
    found: dict[int, list[Tensor]] = {layer: [] for layer in added}
    with progress_bar("steered runs", len(tokens), unit="item") as advance:
        for own in torch.arange(len(tokens)).split(batch_size):
            run = record(model, tokens[own].to(model.device))
            suffix = run.suffix(_start(tokens, positions))
            unpatched = _measure(model, run.resid[-1], metric, own)
            for layer, vectors in added.items():
                values = unpatched.repeat(len(vectors), 1)
                moving = vectors.any(1).nonzero().flatten().tolist()
                n = max(1, batch_size // len(own))
                for some in (moving[i : i + n] for i in range(0, len(moving), n)):
                    steps = vectors[some].to(run.resid[layer])
                    x = run.resid[layer][:, suffix.start :] + steps[:, None, None]
                    rows = repeat(torch.arange(len(own)), "b -> (n b)", n=len(some))
                    x = rearrange(x, "n b p d -> (n b) p d")
                    x = _run_on(suffix, layer, x, rows.to(x.device))[-1]
                    values[some] = _measure(model, x, metric, own[rows]).view(len(some), len(own))
                found[layer].append(values)
            advance(len(own))
    return {layer: torch.cat(parts, 1) for layer, parts in found.items()}


def metric_gradients(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    layers: Collection[int],
    metric: Metric,
    *,
    positions: SteeredPositions = "decision",
    batch_size: int = 512,
) -> dict[int, Float[Tensor, "items d_model"]]:
    """Gradient of `metric` with respect to a vector added to each layer's stream, as `steer` adds.

    `gradient @ vector` is the slope, per item, of the response to doses of `vector` at dose 0. At
    all positions it is the sum of the positions' gradients. Raises SiteError as `steer`.
    """
    check_sites(model, layers, positions)
    found: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    first = min(layers)
    for own in torch.arange(len(tokens)).split(batch_size):
        run = record(model, tokens[own].to(model.device))
        suffix = run.suffix(_start(tokens, positions))
        with torch.enable_grad():
            x = run.resid[first][:, suffix.start :].clone().requires_grad_()
            streams = _run_on(suffix, first, x, torch.arange(len(own)).to(x.device))
            total = _measure(model, streams[-1], metric, own).sum()
            wanted = [streams[layer - first] for layer in layers]
            gradients = torch.autograd.grad(total, wanted)
        for layer, gradient in zip(layers, gradients, strict=True):
            found[layer].append(gradient.sum(1).double().cpu())
    return {layer: torch.cat(parts) for layer, parts in found.items()}


def check_sites(model: HookedModel, layers: Collection[int], positions: str) -> None:
    """Raise SiteError unless `steer` can add to these layers at these positions."""
    if positions not in get_args(SteeredPositions):
        raise SiteError(f"positions: expected decision or all, got {positions!r}")
    for layer in layers:
        if not 0 <= layer <= model.n_layers:
            raise SiteError(f"layer {layer}: this network has layers 0 to {model.n_layers}")


def _start(tokens: Int[Tensor, "items positions"], positions: str) -> int:
    return 0 if positions == "all" else tokens.shape[1] - 1


def _run_on(
    suffix: Suffix, layer: int, x: Float[Tensor, "rows suffix d"], rows: Int[Tensor, " rows"]
) -> list[Float[Tensor, "rows suffix d"]]:
    """The streams of `layer` and of all after it."""
    streams = [x]
    for block in range(layer, suffix.run.model.n_layers):
        streams.append(suffix.block(block, streams[-1], rows))
    return streams


def _measure(
    model: HookedModel,
    final: Float[Tensor, "rows suffix d"],
    metric: Metric,
    items: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    logits = model.unembed(model.final_norm(final[:, -1]), metric.token_ids)
    return metric(logits.double().cpu(), items)
