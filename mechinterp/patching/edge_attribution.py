"""Edge attribution patching: what exchanging an edge would do to the metric, for all at once.

To first order the edge writer -> reader carries (source - own) of what the writer adds to the
stream, times the metric's gradient at what the reader reads (EAP, Syed et al. 2023). A reader's
gradient is that at its q, k or v, pulled back through the projection's slice and the norm; an MLP's
is that of its branch alone. EAP-IG (Hanna et al. 2024) averages the gradients over a way from the
patched run to the source: of the embeddings ("inputs"), or of one layer's attention or MLP output
at a time ("activations"); then the edges out of the embedding, respectively of each such group, add
up to the exact effect of exchanging it.

All edges into a layer come from one product of the writers' differences [writers, positions *
d_model] with the layer's reader gradients, so memory grows with writers times tokens and not with
edges times tokens. Keys and values of grouped-query models are readers at their own grain.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.contexts import Context
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.patching.edge_attribution_result import EdgeAttribution
from mechinterp.patching.exact_edges import patch_some_edges
from mechinterp.patching.gradients import (
    Gradients,
    LiveRun,
    PromptPairs,
    budget_mb,
    make_pairs,
    mean_over_path,
    path_points,
    path_rows,
    repeat_rows,
    rows_that_fit,
    run_live,
    with_progress,
)
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.metrics import Metric
from mechinterp.patching.trust import N_EXACT, check_count
from mechinterp.randomness import derive_generator
from mechinterp.sites import Site

METHODS = ("EAP", "EAP-IG-inputs", "EAP-IG-activations")
Points = list[tuple[float, float]]
AT_BASE: Points = path_points(1)


def attribute_edges(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    method: str = "EAP",
    n_steps: int | None = None,
    direction: str = "denoising",
    per_item: bool = False,
    by_position: bool = False,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    n_exact: int = N_EXACT,
    generator: torch.Generator | None = None,
) -> EdgeAttribution:
    """Attribution of every edge of the network's graph.

    Args:
        clean, corrupt: token ids; row i of each is one counterfactual pair.
        method: one of `METHODS`; EAP-IG-inputs costs `n_steps` backward passes, EAP-IG-activations
            `n_steps` for each layer's attention and MLP, from that layer on.
        n_steps: Gauss-Legendre points of the integral (5).
        direction: "denoising" patches clean edges into the corrupt run, "noising" the reverse.
        per_item: keep [items, writers, readers].
        by_position: keep [writers, readers, positions].
        attention_mask: 1 for real tokens; the same for both runs.
        decision: the position whose logits the metric reads, for all items or per item.
        memory_mb: bound on the memory of one batch, approximately; None is a part of what is free.
            Where memory runs out all the same, batches are halved.
        n_exact: how many edges, drawn at random among those whose score is not 0, are patched
            exactly for `trust`; each costs about half a forward pass. 0 for scores alone.
        generator: draws them; None draws the same ones every time.

    Raises:
        AnalysisError: the arguments do not fit together.
    """
    if method not in METHODS:
        raise AnalysisError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
    if method == "EAP" and n_steps not in (None, 1):
        raise AnalysisError("n_steps: EAP has one; use EAP-IG-inputs or EAP-IG-activations")
    check_count("n_exact", n_exact)
    n_steps = 1 if method == "EAP" else 5 if n_steps is None else n_steps
    pairs = make_pairs(
        model,
        clean=clean,
        corrupt=corrupt,
        metric=metric,
        direction=direction,
        attention_mask=attention_mask,
        decision=decision,
    )
    size, rows = _sizes(model, corrupt.shape[1], budget_mb(model, memory_mb))
    task = _Task(model, Graph.of(model), path_points(n_steps), rows, by_position)
    run = task.by_activations if method == "EAP-IG-activations" else task.by_inputs
    kept: list[Tensor] = []

    def batch(part: slice) -> tuple[Tensor, Tensor, Tensor]:
        scores, base, source = run(pairs.select(part))  # positions last: all, or their sum
        if per_item:
            kept.append(scores.sum(-1))
        return scores.sum(0), base, source

    totals, *metrics = zip(*with_progress(method, len(pairs), size, batch), strict=True)
    base_metric, source_metric = (torch.cat(values) for values in metrics)
    absent = ~task.graph.mask.to(model.device)
    scores = torch.stack(totals).sum(0) / len(pairs)
    parts = scores.masked_fill(absent[..., None], torch.nan) if by_position else None
    found = EdgeAttribution(
        graph=task.graph,
        method=method,
        n_steps=n_steps,
        direction=direction,
        scores=scores.sum(-1).masked_fill(absent, torch.nan),
        item_scores=torch.cat(kept).masked_fill(absent, torch.nan) if per_item else None,
        position_scores=parts,
        corrupt_metric=base_metric if direction == "denoising" else source_metric,
        clean_metric=source_metric if direction == "denoising" else base_metric,
    )
    if n_exact == 0:
        return found
    return patch_some_edges(
        model,
        found,
        clean=clean,
        corrupt=corrupt,
        metric=metric,
        n_sampled=n_exact,
        generator=generator or derive_generator(0, "trust", "edges"),
        attention_mask=attention_mask,
        decision=decision,
        memory_mb=memory_mb,
    ).attribution


@dataclass(frozen=True)
class _Task:
    """The edges of a network, the points of the integral, and how many rows run at a time."""

    model: HookedModel
    graph: Graph
    points: Points
    rows: int
    by_position: bool

    def by_inputs(self, pairs: PromptPairs) -> tuple[Tensor, Tensor, Tensor]:
        """EAP, and EAP-IG along the way of the embeddings: scores as of `_empty`, metrics."""
        model, last = self.model, Site("resid_post", self.model.n_layers - 1)
        writing, reading = self._writer_sites(), _reader_sites(model, 0)
        given = model.capture(pairs.source, [*writing, last], attention_mask=pairs.attention_mask)
        resid, context = self._embed(pairs)
        if len(self.points) == 1:
            run = run_live(model, resid, context, [*writing, *reading], mlp_inputs=True)
            score = run.score(pairs)
            own = {site: run.activation(site) for site in writing}
            found = run.gradients(score, sites=reading)
            differences = self._differences({s: given[s] - own[s] for s in writing})
            scores = self._empty(differences)
            self._add(scores, differences, run, found, self.points)
            base_metric = score.detach()
        else:
            base = model.capture(pairs.base, [*writing, last], attention_mask=pairs.attention_mask)
            differences = self._differences({s: given[s] - base[s] for s in writing})
            scores = self._empty(differences)
            for some in self._steps(len(pairs)):
                rows = repeat_rows(len(pairs), len(some), model.device)
                moved = path_rows(resid, given[Site("resid_pre", 0)], some)
                run = run_live(model, moved, context.rows(rows), reading, mlp_inputs=True)
                found = run.gradients(run.score(pairs.select(rows)), sites=reading)
                self._add(scores, differences, run, found, some)
            base_metric = self._metric(pairs, base[last])
        return scores, base_metric, self._metric(pairs, given[last])

    def by_activations(self, pairs: PromptPairs) -> tuple[Tensor, Tensor, Tensor]:
        """EAP-IG along the ways of single layers' outputs, each from the patched run's own."""
        model, graph = self.model, self.graph
        last = Site("resid_post", model.n_layers - 1)
        writing = self._writer_sites()
        attention, stream = model.sites("attn_out"), model.sites("resid_pre")
        sites = {*writing, *attention, last}
        given = model.capture(pairs.source, sites, attention_mask=pairs.attention_mask)
        own = model.capture(pairs.base, {*sites, *stream}, attention_mask=pairs.attention_mask)
        context = self._embed(pairs)[1]
        steps = {site: given[site] - own[site] for site in sites}
        differences = self._differences({site: steps[site] for site in writing})
        scores = self._empty(differences)
        entering = [own[site] for site in (*stream, last)]

        def along(writers: slice, layer: int, step: Tensor, *, at: Site | None = None) -> None:
            for some in self._steps(len(pairs)):
                rows = repeat_rows(len(pairs), len(some), model.device)
                resid, patches = entering[layer][rows], []
                if at is None:
                    resid = path_rows(entering[layer], entering[layer] + step, some)
                else:
                    patches = [Intervention(at, path_rows(own[at], own[at] + step, some))]
                run = run_live(
                    model,
                    resid,
                    context.rows(rows),
                    _reader_sites(model, layer),
                    start=layer,
                    mlp_inputs=True,
                    interventions=patches,
                )
                found = run.gradients(run.score(pairs.select(rows)))
                self._add(scores, differences, run, found, some, writers)

        along(slice(0, 1), 0, steps[Site("resid_pre", 0)])
        for layer, site in enumerate(attention):
            along(graph.attention_writers(layer), layer, steps[site], at=site)
            mlp = graph.mlp_writer(layer)
            along(slice(mlp, mlp + 1), layer + 1, steps[Site("mlp_out", layer)])
        return scores, self._metric(pairs, own[last]), self._metric(pairs, given[last])

    def _add(
        self,
        scores: Float[Tensor, "items writers readers sums"],
        differences: Float[Tensor, "items writers positions d_model"],
        run: LiveRun,
        found: Gradients,
        points: Points,
        writers: slice | None = None,
    ) -> None:
        """Add some points' share of the integral: all writers before each reader, or a few.

        Products with readers before a writer stand in `scores`, too; the graph's mask removes them.
        """
        graph = self.graph

        def add(rows: slice, columns: slice, readers: Float[Tensor, "rows readers p d"]) -> None:
            gradient = readers if points == AT_BASE else mean_over_path(readers, points)
            mine = differences[:, rows]
            if self.by_position:
                product = einsum(mine, gradient, "i w p d, i r p d -> i w r p")
            else:
                product = (mine.flatten(2) @ gradient.flatten(2).mT)[..., None]
            scores[:, rows, columns] += product

        for layer in found.mlp_inputs:
            mlp = rearrange(found.mlp_inputs[layer], "rows p d -> rows 1 p d")
            columns = graph.attention_readers(layer)
            block = self.model.architecture.blocks[layer]
            pulled = torch.cat([_pull_back(block, run, found), mlp], dim=1)
            before = slice(0, graph.n_writers_before(Node("mlp", layer)))
            add(writers or before, slice(columns.start, columns.stop + 1), pulled)
        final = rearrange(found.final, "rows p d -> rows 1 p d")
        logits = len(graph.readers) - 1
        add(writers or slice(0, len(graph.writers)), slice(logits, logits + 1), final)

    def _differences(
        self, steps: dict[Site, Tensor]
    ) -> Float[Tensor, "items writers positions d_model"]:
        """What the source run adds to the stream by each writer more than the patched run does."""
        parts = [rearrange(steps[Site("resid_pre", 0)], "i p d -> i 1 p d")]
        for layer, block in enumerate(self.model.architecture.blocks):
            if self.graph.heads_write:
                weight = block.output_weight().detach()
                z = steps[Site("head", layer)]
                parts.append(einsum(z, weight, "i p h e, h e d -> i h p d"))
            else:
                parts.append(rearrange(steps[Site("attn_out", layer)], "i p d -> i 1 p d"))
            parts.append(rearrange(steps[Site("mlp_out", layer)], "i p d -> i 1 p d"))
        return torch.cat(parts, dim=1)

    def _writer_sites(self) -> list[Site]:
        model = self.model
        attention = model.sites("head" if self.graph.heads_write else "attn_out")
        return [Site("resid_pre", 0), *attention, *model.sites("mlp_out")]

    def _empty(self, differences: Tensor) -> Float[Tensor, "items writers readers sums"]:
        """Nothing yet: [items, writers, readers, positions], or 1 for their sum."""
        n_items, n_writers, n_positions, _ = differences.shape
        n_sums = n_positions if self.by_position else 1
        return differences.new_zeros(n_items, n_writers, len(self.graph.readers), n_sums)

    def _steps(self, n_items: int) -> Sequence[Points]:
        size = max(1, self.rows // n_items)
        return [self.points[i : i + size] for i in range(0, len(self.points), size)]

    @torch.no_grad()
    def _embed(self, pairs: PromptPairs) -> tuple[Tensor, Context]:
        return self.model.architecture.embed(pairs.base, pairs.attention_mask)

    @torch.no_grad()
    def _metric(self, pairs: PromptPairs, final: Tensor) -> Float[Tensor, " items"]:
        return pairs.score(self.model, final)


def _reader_sites(model: HookedModel, start: int) -> list[Site]:
    """Where readers' gradients are taken, and the residuals at which norms are differentiated."""
    return [
        Site(grain, layer)
        for layer in range(start, model.n_layers)
        for grain in ("resid_pre", "q", "k", "v")
    ]


def _pull_back(
    block: Block, run: LiveRun, found: Gradients
) -> Float[Tensor, "rows readers positions d_model"]:
    """Gradients at what each of a layer's q, k and v reads from the residual stream."""
    parts = []
    for grain in "qkv":
        site = Site(grain, block.layer)
        weight = block.qkv_weight(grain)[0].detach()
        parts.append(einsum(found.sites[site], weight, "i p h e, d h e -> i h p d"))
    pulled = torch.cat(parts, dim=1)
    if block.attention_norm is None:
        return pulled
    resid = run.activation(Site("resid_pre", block.layer))
    with torch.enable_grad():
        copies = resid[:, None].expand_as(pulled).detach().requires_grad_()
        normed = block.attention_norm(copies)
    return torch.autograd.grad(normed, copies, pulled)[0]


def _sizes(model: HookedModel, n_positions: int, memory_mb: float) -> tuple[int, int]:
    """How many items at a time, and how many rows (items times points of the integral)."""
    n_writers = 1 + model.n_layers * (model.n_heads + 1)
    n_readers = model.n_heads + 2 * model.n_kv_heads + 1
    token = n_positions * model.d_model * model.dtype.itemsize
    per_item = 2 * n_writers * token / 2**20  # the differences, and parts of them being joined
    per_row = 6 * n_readers * token / 2**20 + memory_mb / rows_that_fit(
        model, n_positions, memory_mb
    )
    n_items = max(1, int(memory_mb / (per_item + per_row)))
    return n_items, max(1, int((memory_mb - n_items * per_item) / per_row))
