"""Pruning: runs of a network without a set of its attention heads and MLP neurons.

A pruned component carries, at every position, its mean over reference prompts ("mean"), or what it
carries in another prompt ("resample", the same prompt for all components of an item). Unlike a
circuit (`mechinterp.patching.circuits`), which cuts edges, pruning takes a component away from all
that read it. What is left is read at the decision, after every layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention, capturing, intervening
from mechinterp.patching.axes import sum_by_unit
from mechinterp.patching.gradients import (
    budget_mb,
    mean_over_path,
    path_points,
    path_rows,
    repeat_rows,
    rows_that_fit,
    run_live,
    with_progress,
)
from mechinterp.patching.pairs import check_pairs
from mechinterp.progress import progress_bar
from mechinterp.sites import Site

KINDS = ("head", "neuron")
ABLATIONS = ("mean", "resample")

Components = Mapping[str, Bool[Tensor, "layers units"]]  # by kind
Ranks = Mapping[str, Int[Tensor, "layers units"]]
Effects = Mapping[str, Float[Tensor, "layers units"]]


@dataclass(frozen=True)
class StreamScore:
    """A score of the final-norm'ed residual stream at the decision, after `layer` blocks.

    `score(stream [rows d_model], items [rows]) -> [rows]`, differentiable; rows come in any order,
    so what it knows of a row's item it looks up by `items`.
    """

    layer: int
    score: Callable[[Tensor, Tensor], Tensor]


def count_components(model: HookedModel) -> dict[str, tuple[int, int]]:
    """Layers and units per layer of each kind."""
    return {"head": (model.n_layers, model.n_heads), "neuron": (model.n_layers, model.d_mlp)}


def rank_components(effects: Effects, generator: torch.Generator) -> Ranks:
    """Ranks from 0, within each kind, by falling magnitude of the effect; ties in random order."""
    ranks = {}
    for kind, effect in effects.items():
        shuffled = torch.randperm(effect.numel(), generator=generator)
        size = effect.abs().flatten().cpu()[shuffled]
        order = shuffled[size.argsort(descending=True, stable=True)]
        ranks[kind] = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        ranks[kind] = ranks[kind].view(effect.shape)
    return ranks


def random_ranks(model: HookedModel, generator: torch.Generator) -> Ranks:
    """Every order of a kind's components is equally likely."""
    nothing = {kind: torch.zeros(shape) for kind, shape in count_components(model).items()}
    return rank_components(nothing, generator)


def first_share(ranks: Ranks, share: float) -> Components:
    """The first `share` (0 to 1) of each kind, rounded: 0 is nothing and 1 everything."""
    return {kind: rank < round(share * rank.numel()) for kind, rank in ranks.items()}


@torch.no_grad()
def pruned_streams(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    pruned: Sequence[Components],
    *,
    layers: Sequence[int],
    ablation: str,
    reference: Int[Tensor, "references positions"],
    batch_size: int = 512,
    memory_mb: int = 256,
) -> Iterator[dict[int, Float[Tensor, "items d_model"]]]:
    """For each set of components: layer -> the residual stream at the last position without them.

    Args:
        layers: after how many blocks the stream is read, 1 to n_layers.
        ablation: "mean": components carry their mean by position over `reference`. "resample":
            item i's carry what they carry in prompt i of `reference`, of which there is one per
            item.
        memory_mb: bound on the streams that are held at once; with more sets the items are run
            several times.

    Raises:
        AnalysisError: an unknown ablation, or reference prompts that do not fit.
    """
    if ablation not in ABLATIONS:
        raise AnalysisError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {ablation!r}")
    if ablation == "resample":
        check_pairs(tokens, reference)
    elif reference.shape[1:] != tokens.shape[1:]:
        raise AnalysisError(
            f"reference: expected prompts of {tokens.shape[1]} positions, got shape "
            f"{tuple(reference.shape)}"
        )
    n_blocks = max(layers)  # what is pruned in later ones changes nothing that is read
    pruned = [{kind: mask[:n_blocks] for kind, mask in some.items()} for some in pruned]
    means = _means(model, reference, batch_size) if ablation == "mean" else None
    read = {layer: Site("resid_post", layer - 1) for layer in layers}
    bytes_per_set = len(tokens) * len(read) * model.d_model * model.dtype.itemsize
    size = max(1, memory_mb * 2**20 // bytes_per_set)
    with progress_bar("pruned runs", len(tokens) * len(pruned), unit="run") as advance:
        for start in range(0, len(pruned), size):
            some = pruned[start : start + size]
            parts: list[dict[int, list[Tensor]]] = [{layer: [] for layer in read} for _ in some]
            for rows in torch.arange(len(tokens)).split(batch_size):
                resid, context = model.embed(tokens[rows])
                carried = means or model.capture(reference[rows], _sites(model))
                for components, streams in zip(some, parts, strict=True):
                    with (
                        intervening(model.architecture.blocks, _replaced(components, carried)),
                        capturing(
                            model.architecture.blocks, read.values(), -1, grad=False
                        ) as captured,
                    ):
                        x = resid
                        for layer in range(n_blocks):
                            x = model.block(layer, x, context)
                    for layer, site in read.items():
                        streams[layer].append(captured[site].cpu())
                    advance(len(rows))
            for streams in parts:
                yield {layer: torch.cat(batches) for layer, batches in streams.items()}


def component_effects(
    model: HookedModel,
    *,
    tokens: Int[Tensor, "items positions"],
    source: Int[Tensor, "items positions"],
    scores: Mapping[str, StreamScore],
    n_steps: int = 5,
    memory_mb: float | None = None,
) -> dict[str, Effects]:
    """What exchanging each component's activations for those of `source` would do to each score.

    Attribution patching of heads and neurons, summed over positions and averaged over items, as
    `mechinterp.patching.attribution` does it for metrics of the logits (direction "noising",
    `n_steps` of its path "inputs"), for scores of the stream after any layer. Components that the
    score's stream does not depend on have effect 0.

    Raises:
        AnalysisError: shapes that differ, or no step.
    """
    check_pairs(tokens, source)
    points, sites = path_points(n_steps), _sites(model)
    read = {name: Site("resid_post", score.layer - 1) for name, score in scores.items()}
    size = rows_that_fit(model, tokens.shape[1], budget_mb(model, memory_mb))

    def estimate(rows: slice) -> dict[str, dict[Site, Tensor]]:
        """Sums over some items, by unit."""
        with torch.no_grad():
            own, given = (model.capture(x[rows], sites) for x in (tokens, source))
            (base, context), (far, _) = (model.embed(x[rows]) for x in (tokens, source))
        items = torch.arange(len(tokens), device=model.device)[rows]
        together = max(1, size // len(items))
        found = {
            name: {site: torch.zeros_like(value) for site, value in own.items()} for name in scores
        }
        for begin in range(0, len(points), together):
            some = points[begin : begin + together]
            repeated = repeat_rows(len(items), len(some), model.device)
            moved = path_rows(base, far, some)
            live = run_live(model, moved, context.rows(repeated), {*sites, *read.values()})
            for name, score in scores.items():
                with torch.enable_grad():
                    stream = model.final_norm(live.tensors[read[name]][:, -1])
                    value = score.score(stream, items[repeated])
                gradients = live.gradients(value, sites=sites, retain_graph=True).sites
                for site, gradient in gradients.items():
                    found[name][site] += mean_over_path(gradient, some)
        return {
            name: {
                site: sum_by_unit(site.grain, (given[site] - own[site]) * gradient, False).sum(0)
                for site, gradient in gradients.items()
            }
            for name, gradients in found.items()
        }

    batches = with_progress("attribution", len(tokens), size, estimate)
    return {
        name: {
            kind: torch.stack(
                [
                    torch.stack([batch[name][site] for batch in batches]).sum(0).cpu()
                    for site in model.sites(kind)
                ]
            )
            / len(tokens)
            for kind in KINDS
        }
        for name in scores
    }


def _sites(model: HookedModel) -> list[Site]:
    return [site for kind in KINDS for site in model.sites(kind)]


def _replaced(components: Components, carried: Mapping[Site, Tensor]) -> list[Intervention]:
    """Interventions that put `carried` in the components' place, in layers that have any."""
    interventions = []
    for kind, mask in components.items():
        for layer in mask.any(1).nonzero().flatten().tolist():
            value = carried[Site(kind, layer)]
            own = mask[layer].to(value.device)
            own = rearrange(own, "heads -> heads 1") if kind == "head" else own

            def edit(x: Tensor, own: Tensor = own, value: Tensor = value) -> Tensor:
                return torch.where(own, value, x)

            interventions.append(Intervention(Site(kind, layer), edit))
    return interventions


def _means(
    model: HookedModel, tokens: Int[Tensor, "items positions"], batch_size: int
) -> dict[Site, Float[Tensor, "positions *unit"]]:
    totals: dict[Site, Tensor] = {}
    for batch in tokens.split(batch_size):
        for site, value in model.capture(batch, _sites(model)).items():
            total = value.double().sum(0)
            totals[site] = totals[site] + total if site in totals else total
    return {site: (total / len(tokens)).to(model.dtype) for site, total in totals.items()}
