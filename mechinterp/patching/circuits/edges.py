"""The exact effect of each edge, one edge patched at a time.

An edge from a writer to a reader, patched, is for the reader another input and for everyone else
nothing. So the reader's block runs with that input, and the plain network goes on from there: all
edges into one reader are one batch, and no block before it is run. This is what edge attribution
approximates; it costs about half a forward pass per edge.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.contexts import Context
from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.paths import writer_changes
from mechinterp.patching.circuits.prompts import Prompts
from mechinterp.patching.circuits.reference import Reference, reference_run
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.memory import in_batches
from mechinterp.patching.metrics import Metric
from mechinterp.patching.pairs import base_and_source
from mechinterp.progress import progress_bar
from mechinterp.sites import Site


@torch.no_grad()
def edge_effects(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    metric: Metric,
    *,
    direction: str = "denoising",
    edges: Iterable[tuple[Node | str, Node | str]] | None = None,
    keep_items: bool = False,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int = 256,
) -> Float[Tensor, "*items writers readers"]:
    """What exchanging one edge's value changes in the metric, for every edge.

    Args:
        direction: "denoising": edges of the clean run into the corrupt one; "noising": the reverse,
            which finds no edge that has a backup.
        edges: only these (writer, reader); None is every edge.
        keep_items: values per item [items writers readers] rather than their mean.

    Returns NaN where there is no edge or none was asked for. Edges whose writer is the same in both
    runs, bit for bit, have effect 0 and are not run.

    Raises:
        AnalysisError: the arguments do not fit together, or an edge has no such nodes.
    """
    base, source = base_and_source(clean, corrupt, direction)
    prompts = Prompts.of(
        model, base, source, metric, attention_mask=attention_mask, decision=decision
    )
    graph = Graph.of(model)
    wanted = graph.mask
    if edges is not None:
        wanted = torch.zeros_like(graph.mask)
        for writer, reader in edges:
            place = graph.writer_index(writer), graph.reader_index(reader)
            if not graph.mask[place]:
                raise AnalysisError(
                    f"no edge {writer} -> {reader}: the writer does not come before"
                )
            wanted[place] = True
    n_items, n_positions = prompts.clean.shape
    per_item = n_positions * (len(graph.writers) + 6 * model.n_layers) * model.d_model
    most = max(1, memory_mb * 2**20 // (per_item * model.dtype.itemsize))
    most_rows = _rows_per_batch(model, n_positions, memory_mb)
    effects = torch.full((n_items, *graph.mask.shape), torch.nan, dtype=model.dtype)
    with progress_bar("edges", int(wanted.sum()) * n_items, unit="edges") as advance:

        def run(rows: slice, size: int) -> None:
            part = _ItemEdges(prompts, graph, rows, max(1, most_rows * size // most))
            for column in wanted.any(0).nonzero().flatten().tolist():
                writers = wanted[:, column].nonzero().flatten()
                effects[rows, writers, column] = part.into(column, writers).cpu()
                advance(len(writers) * len(part.items))

        in_batches(run, n_items, most)
    return effects if keep_items else effects.mean(0)


class _ItemEdges:
    """A batch of items, their own run, and what every writer changes from it to the other run."""

    def __init__(self, prompts: Prompts, graph: Graph, rows: slice, size: int) -> None:
        self.prompts, self.graph, self.model = prompts, graph, prompts.model
        mask = prompts.mask_of(rows)
        self.padded = mask is not None
        self.own: Reference = reference_run(self.model, prompts.clean[rows], attention_mask=mask)
        other = reference_run(self.model, prompts.corrupt[rows], attention_mask=mask)
        every = range(len(graph.writers))
        self.changes = writer_changes(self.model, graph, self.own, other, every)
        self.context = self.model.embed(prompts.clean[rows], attention_mask=mask)[1]
        self.items = torch.arange(rows.start, rows.start + len(self.own.embed))
        self.items = self.items.to(self.model.device)
        self.decision = prompts.decision[rows]
        self.base = self._score(self.own.final, torch.arange(len(self.items)))
        self.size = size

    def into(self, column: int, writers: Int[Tensor, " writers"]) -> Float[Tensor, "items writers"]:
        """The effects of edges into one reader."""
        reader = self.graph.readers[column]
        writers = writers.to(self.model.device)
        differs = (self.changes[writers] != 0).flatten(2).any(-1)  # [writers items]
        effects = torch.zeros_like(differs, dtype=self.model.dtype)
        cells = differs.nonzero()
        for start in range(0, len(cells), self.size):
            which, items = cells[start : start + self.size].unbind(1)
            final = self._patched(reader, self.changes[writers[which], items], items)
            effects[which, items] = self._score(final, items) - self.base[items]
        return rearrange(effects, "writers items -> items writers")

    def _patched(
        self, reader: Node, change: Float[Tensor, "rows pos d_model"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows pos d_model"]:
        """What enters the final norm when the reader's input is changed."""
        if reader.layer is None:
            return self.own.final[items] + change
        context = self.context.rows(items) if self.padded else self.context
        block = self.model.architecture.blocks[reader.layer]
        pre, mid = (of[reader.layer][items] for of in (self.own.resid_pre, self.own.resid_mid))
        if reader.kind == "mlp":
            # In a parallel block the attention's output is in the sum as well.
            others = self._post(reader.layer)[items] - self.own.mlp[reader.layer][items]
            resid = others + block.mlp_out(mid + change)
        else:
            resid = _with_input(block, reader, pre, pre + change, context)
        for layer in range(reader.layer + 1, self.model.n_layers):
            resid = self.model.block(layer, resid, context)
        return resid

    def _post(self, layer: int) -> Float[Tensor, "items pos d_model"]:
        """What leaves a block in the unpatched run."""
        last = layer + 1 == self.model.n_layers
        return self.own.final if last else self.own.resid_pre[layer + 1]

    def _score(
        self, final: Float[Tensor, "rows pos d_model"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        items = items.to(self.model.device)
        rows = torch.arange(len(items), device=items.device)
        return self.prompts.score(final[rows, self.decision[items]], self.items[items])


def _with_input(
    block: Block,
    reader: Node,
    resid: Float[Tensor, "rows pos d_model"],
    read: Float[Tensor, "rows pos d_model"],
    context: Context,
) -> Float[Tensor, "rows pos d_model"]:
    """The block on `resid`, but one head's queries, keys or values made from `read`."""
    assert reader.head is not None
    weight, bias = block.qkv_weight(reader.kind)
    normed = read if block.attention_norm is None else block.attention_norm(read)
    value = normed @ weight[:, reader.head]
    if bias is not None:
        value = value + bias[reader.head]
    site = Site(reader.kind, block.layer, reader.head)
    fired = []

    def write(tensor: Tensor) -> None:
        fired.append(site)
        tensor[:] = value

    handle = block.location(site).on_write(write)
    try:
        out = block.run(resid, context.arguments[block.layer])
    finally:
        handle.remove()
    if len(fired) != 1:
        raise ModelError(f"the patch at {site} fired {len(fired)} times in one run instead of once")
    return out


def _rows_per_batch(model: HookedModel, n_positions: int, memory_mb: int) -> int:
    per_token = 8 * model.d_model + 3 * model.d_mlp + 3 * model.n_heads * n_positions
    return max(1, memory_mb * 2**20 // (n_positions * per_token * model.dtype.itemsize))
