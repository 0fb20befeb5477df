"""Run a network with edges ablated: exactly, batched, one forward pass per circuit.

Every reader gets the sum of the writers it reads: over a kept edge with the value that the writer
has in this run, over an ablated one with its value in the reference run. With D[w] a writer's
difference from its reference value, a reader's input is what it reads in the reference run plus the
sum of D over its kept edges: one matrix product per layer. Memory holds D of every writer once, and
the inputs of one layer's readers; nothing grows with the number of edges.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechinterp.architectures import Block
from mechinterp.contexts import Context
from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.reference import (
    ABLATIONS,
    Ablation,
    Reference,
    mean_reference,
    reference_run,
    zero_reference,
)
from mechinterp.patching.graph import Graph
from mechinterp.patching.metrics import Metric
from mechinterp.progress import progress_bar
from mechinterp.sites import Site

Circuit = Bool[Tensor, "writers readers"]
TOLERANCE = 1e-4  # of the largest logit, when the full circuit is compared to the plain model


@dataclass(frozen=True)
class Prompts:
    """What circuits are run on: row i of `clean` and `corrupt` is one pair, read at `decision`."""

    model: HookedModel
    clean: Int[Tensor, "items pos"]
    corrupt: Int[Tensor, "items pos"]
    metric: Metric
    attention_mask: Int[Tensor, "items pos"] | None
    decision: Int[Tensor, " items"]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        clean: Int[Tensor, "items pos"],
        corrupt: Int[Tensor, "items pos"],
        metric: Metric,
        *,
        attention_mask: Int[Tensor, "items pos"] | None = None,
        decision: int | Int[Tensor, " items"] = -1,
    ) -> Prompts:
        """Checked, and on the model's device.

        Raises:
            AnalysisError: the arguments do not fit together.
        """
        if clean.shape != corrupt.shape or clean.ndim != 2 or not clean.numel():
            raise AnalysisError(
                "clean and corrupt: expected two [items, positions] of equal shape, got "
                f"{tuple(clean.shape)} and {tuple(corrupt.shape)}"
            )
        if attention_mask is not None and attention_mask.shape != clean.shape:
            raise AnalysisError(
                f"attention_mask: expected shape {tuple(clean.shape)}, got "
                f"{tuple(attention_mask.shape)}"
            )
        n_items, n_positions = clean.shape
        at = torch.full((n_items,), decision) if isinstance(decision, int) else decision
        at = torch.where(at < 0, at + n_positions, at)
        if at.shape != (n_items,) or not bool(((at >= 0) & (at < n_positions)).all()):
            raise AnalysisError(
                f"decision: expected one position of 0 .. {n_positions - 1} per item, got shape "
                f"{tuple(at.shape)}"
            )
        device = model.device
        mask = None if attention_mask is None else attention_mask.to(device)
        return cls(model, clean.to(device), corrupt.to(device), metric, mask, at.to(device))

    def score(
        self, final: Float[Tensor, "rows d_model"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The metric of residuals that enter the final norm; `final[r]` is of item `items[r]`."""
        model = self.model
        logits = model.unembed(model.final_norm(final), self.metric.token_ids)
        return self.metric(logits, items)

    def mask_of(self, rows: slice) -> Int[Tensor, "rows pos"] | None:
        """The attention mask of some items."""
        return None if self.attention_mask is None else self.attention_mask[rows]

    @torch.no_grad()
    def plain(self, tokens: Int[Tensor, "items pos"], size: int) -> Float[Tensor, " items"]:
        """The metric of the plain model on `tokens` (clean or corrupt), `size` items at a time."""
        values = []
        for start in range(0, len(tokens), size):
            rows = slice(start, start + size)
            resid, context = self.model.embed(tokens[rows], attention_mask=self.mask_of(rows))
            for layer in range(self.model.n_layers):
                resid = self.model.block(layer, resid, context)
            items = torch.arange(start, start + len(resid), device=resid.device)
            final = resid[items - start, self.decision[rows]]
            values.append(self.score(final, items))
        return torch.cat(values)


@dataclass(frozen=True)
class MaskedRun:
    """A batch of items, ready to be run with any circuit against one reference."""

    model: HookedModel
    graph: Graph
    embed: Float[Tensor, "items pos d_model"]
    context: Context
    padded: bool
    reference: Reference
    decision: Int[Tensor, " items"]

    @classmethod
    def of(cls, prompts: Prompts, rows: slice, reference: Reference) -> MaskedRun:
        """For the clean prompts of some items; `reference` holds these items, or one for all."""
        model, mask = prompts.model, prompts.mask_of(rows)
        embed, context = model.embed(prompts.clean[rows], attention_mask=mask)
        decision = prompts.decision[rows]
        return cls(model, Graph.of(model), embed, context, mask is not None, reference, decision)

    @torch.no_grad()
    def final(
        self,
        keep: Bool[Tensor, "circuits sources readers"],
        extra: Float[Tensor, "extra items pos d_model"] | None = None,
    ) -> Float[Tensor, "circuits items d_model"]:
        """What enters the final norm at the decision position, for every circuit and item.

        Args:
            extra: further sources besides the writers, of constant value (for path patching);
                rows of `keep` are these first, then the graph's writers.
        """
        graph, reference = self.graph, self.reference
        keep = keep.to(self.embed.device)
        n_circuits, n_items = len(keep), len(self.embed)
        first = 0 if extra is None else len(extra)
        n_sources = first + len(graph.writers)
        deltas = self.embed.new_zeros(n_circuits, n_items, n_sources, *self.embed.shape[1:])
        if extra is not None:
            deltas[:, :, :first] = rearrange(extra, "extra items p d -> items extra p d")
        deltas[:, :, first] = self.embed - reference.embed
        live = torch.zeros(n_sources, dtype=torch.bool, device=keep.device)
        live[:first] = True
        live[first] = bool((deltas[:, :, first] != 0).any())

        def active(columns: slice, rows: slice, before: int) -> bool:
            """Whether these readers can make these writers other than the reference, and somebody
            reads it."""
            read = keep[:, rows].any()
            changed = (keep[:, :before, columns] & rearrange(live[:before], "w -> w 1")).any()
            return bool(read and (changed or not reference.is_run))

        for layer, block in enumerate(self.model.architecture.blocks):
            columns = graph.attention_readers(layer)
            rows = _shifted(graph.attention_writers(layer), first)
            if active(columns, rows, rows.start):
                reading = keep[:, : rows.start, columns]
                inputs = _read(deltas[:, :, : rows.start], reading, reference.resid_pre[layer])
                deltas[:, :, rows] = self._attention(block, inputs, reference.attention[layer])
                live[rows] = True
            row = first + graph.mlp_writer(layer)
            before = rows.start if graph.parallel else row
            columns = slice(graph.mlp_reader(layer), graph.mlp_reader(layer) + 1)
            if active(columns, slice(row, row + 1), before):
                reading = keep[:, :before, columns]
                mid = _read(deltas[:, :, :before], reading, reference.resid_mid[layer])[:, :, 0]
                out = block.mlp_out(rearrange(mid, "c i p d -> (c i) p d"))
                out = rearrange(out, "(c i) p d -> c i p d", i=n_items)
                deltas[:, :, row] = out - reference.mlp[layer]
                live[row] = True
        items = torch.arange(n_items, device=keep.device)
        base = reference.final.expand(n_items, -1, -1)[items, self.decision]
        at = deltas[:, items, :, self.decision]  # [items circuits sources d_model]
        return base + einsum(keep[:, :, -1].to(at.dtype), at, "c w, i c w d -> c i d")

    def _attention(
        self,
        block: Block,
        inputs: Float[Tensor, "circuits items readers pos d_model"],
        reference: Float[Tensor, "items pos *site"],
    ) -> Float[Tensor, "circuits items writers pos d_model"]:
        """What one layer's heads write, less what they write in the reference."""
        n_circuits, n_items = inputs.shape[:2]
        if block.attention_norm is not None:
            inputs = block.attention_norm(inputs)
        inputs = rearrange(inputs, "c i r p d -> (c i) r p d")
        items = torch.arange(n_items, device=inputs.device).repeat(n_circuits)
        context = self.context.rows(items) if self.padded else self.context
        z = attend(block, inputs, context.arguments[block.layer])
        z = rearrange(z, "(c i) p h e -> c i p h e", i=n_items)
        if self.graph.heads_write:
            return einsum(z - reference, block.output_weight(), "c i p h e, h e d -> c i h p d")
        return rearrange(block.attn_out(z) - reference, "c i p d -> c i 1 p d")


def attend(
    block: Block,
    inputs: Float[Tensor, "rows readers pos d_model"],
    arguments: dict[str, Any],
) -> Float[Tensor, "rows pos heads d_head"]:
    """The heads' z when each query head and each key-value head reads an input of its own.

    Args:
        inputs: after the norm; query heads, then keys of the key-value heads, then values.
        arguments: the block's, from a `Context`.

    Raises:
        ModelError: the block does not use its projections exactly once.
    """
    counts = (block.n_heads, block.n_kv_heads, block.n_kv_heads)
    outputs: dict[nn.Module, Tensor] = {}
    for part, x in zip("qkv", inputs.split(counts, dim=1), strict=True):
        weight, bias = block.qkv_weight(part)
        value = einsum(x, weight, "n h p d, d h e -> n p h e")
        location = block.location(Site(part, block.layer))
        if location.module not in outputs:
            width = sum(counts) if len(block.qkv) == 1 else counts["qkv".index(part)]
            shape = (value.shape[0], value.shape[1], width * block.d_head)
            outputs[location.module] = value.new_empty(shape)
        location.view(outputs[location.module])[:] = value if bias is None else value + bias
    seen: list[Tensor] = []

    def collect(z: Tensor) -> None:
        seen.append(z)
        raise _Collected

    stream = inputs.new_zeros(1).expand(inputs.shape[0], *inputs.shape[2:])
    handle = block.location(Site("head", block.layer)).on_read(collect)
    try:
        with _answering(outputs), contextlib.suppress(_Collected):
            block.run(stream, arguments)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ModelError(f"block {block.layer}: its heads' outputs were not computed")
    return seen[0]


class _Collected(Exception):
    """The heads' outputs are there, and nothing more is wanted of the block."""


@contextlib.contextmanager
def _answering(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Within, each of these modules returns its tensor, once, and computes nothing."""
    calls = dict.fromkeys(outputs, 0)
    replaced = {module: module.__dict__.get("forward") for module in outputs}

    def answer(module: nn.Module) -> Any:
        def forward(*_: Any, **__: Any) -> Tensor:
            calls[module] += 1
            return outputs[module]

        return forward

    try:
        for module in outputs:
            module.forward = answer(module)
        yield
    finally:
        for module, forward in replaced.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    if any(n != 1 for n in calls.values()):
        raise ModelError(
            f"projections of queries, keys and values ran {sorted(calls.values())} times instead "
            "of once; this network's attention is not laid out as its family's is"
        )


@torch.no_grad()
def run_circuits(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    circuits: Sequence[Circuit] | Bool[Tensor, "circuits writers readers"],
    metric: Metric,
    *,
    ablation: Ablation = "resample",
    reference_tokens: Int[Tensor, "reference pos"] | None = None,
    reference_mask: Int[Tensor, "reference pos"] | None = None,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int = 256,
) -> Float[Tensor, "circuits items"]:
    """Every item's metric with only the edges of each circuit kept.

    Args:
        circuits: edges kept; entries where the graph has no edge are ignored. Node circuits come
            from `edges_of_nodes`.
        ablation: what the other edges carry: the corrupt prompt's values ("resample"), the mean by
            position over `reference_tokens` (default: the corrupt prompts), or zero.
        attention_mask: 1 for real tokens; the same for both prompts.
        decision: the position whose logits the metric reads, for all items or per item.
        memory_mb: bound on the memory of one batch, approximately.

    Raises:
        AnalysisError: the arguments do not fit together.
        ModelError: with all edges kept the run is not the plain model, or with none not the
            reference (checked on the first items).
    """
    prompts = Prompts.of(
        model, clean, corrupt, metric, attention_mask=attention_mask, decision=decision
    )
    shared = shared_reference(prompts, ablation, reference_tokens, reference_mask)
    check_edges(prompts, shared)
    graph = Graph.of(model)
    keep = checked_circuits(graph, circuits)
    size = rows_per_batch(prompts, memory_mb)
    values = torch.empty(len(keep), len(prompts.clean), dtype=model.dtype, device=model.device)
    with progress_bar("circuits", values.numel(), unit="runs") as advance:
        for start in range(0, len(prompts.clean), size):
            rows = slice(start, start + size)
            run = MaskedRun.of(prompts, rows, batch_reference(prompts, rows, shared))
            n_items = len(run.embed)
            items = torch.arange(start, start + n_items, device=model.device)
            together = max(1, size // n_items)
            for begin in range(0, len(keep), together):
                part = slice(begin, begin + together)
                masks = torch.stack([mask & graph.mask for mask in keep[part]])
                final = rearrange(run.final(masks), "c i d -> (c i) d")
                scores = prompts.score(final, items.repeat(len(masks)))
                values[part, rows] = scores.view(len(masks), n_items)
                advance(len(masks) * n_items)
    return values


def shared_reference(
    prompts: Prompts,
    ablation: Ablation,
    tokens: Int[Tensor, "reference pos"] | None,
    mask: Int[Tensor, "reference pos"] | None = None,
) -> Reference | None:
    """The reference that all items share; None for resample ablation, where each has its own.

    Raises:
        AnalysisError: an unknown ablation, or reference prompts that do not fit.
    """
    if ablation not in ABLATIONS:
        raise AnalysisError(f"ablation: expected one of {', '.join(ABLATIONS)}, got {ablation!r}")
    if tokens is not None and ablation != "mean":
        raise AnalysisError(f"reference_tokens: for mean ablation only, not {ablation}")
    n_positions = prompts.clean.shape[1]
    if ablation == "zero":
        return zero_reference(prompts.model, n_positions)
    if ablation == "resample":
        return None
    if tokens is None:
        tokens, mask = prompts.corrupt, prompts.attention_mask
    elif tokens.shape[1:] != (n_positions,):
        raise AnalysisError(
            f"reference_tokens: expected prompts of {n_positions} positions as clean, got shape "
            f"{tuple(tokens.shape)}"
        )
    return mean_reference(prompts.model, tokens, attention_mask=mask)


def batch_reference(prompts: Prompts, rows: slice, shared: Reference | None) -> Reference:
    """The reference for some items, which `MaskedRun.of` is given together with `rows`."""
    if shared is not None:
        return shared
    return reference_run(prompts.model, prompts.corrupt[rows], attention_mask=prompts.mask_of(rows))


@torch.no_grad()
def check_edges(prompts: Prompts, shared: Reference | None) -> None:
    """Run the first two items with all edges and with none.

    Raises:
        ModelError: the first is not the plain model, or the second not the reference.
    """
    rows = slice(0, 2)
    reference = batch_reference(prompts, rows, shared)
    run = MaskedRun.of(prompts, rows, reference)
    model, mask = prompts.model, run.graph.mask
    full, empty = run.final(torch.stack([mask, torch.zeros_like(mask)]))
    plain = reference_run(model, prompts.clean[rows], attention_mask=prompts.mask_of(rows)).final
    items = torch.arange(len(plain), device=plain.device)
    bare = reference.final.expand(len(plain), -1, -1)
    for what, actual, expected in (
        ("all edges kept, the network", full, plain[items, run.decision]),
        ("no edge kept, the reference", empty, bare[items, run.decision]),
    ):
        error = float((actual - expected).abs().max())
        scale = float(expected.abs().max())
        if not error <= TOLERANCE * max(scale, 1.0):
            raise ModelError(
                f"with {what} is missed by {error:.2g} (values up to {scale:.2g}), so circuits of "
                f"{model.architecture.name} cannot be run"
            )


def checked_circuits(
    graph: Graph, circuits: Sequence[Circuit] | Bool[Tensor, "circuits writers readers"]
) -> list[Circuit]:
    """The circuits on the CPU.

    Raises:
        AnalysisError: one is not a mask over the graph's writers and readers.
    """
    checked = []
    for circuit in circuits:
        if circuit.dtype != torch.bool or circuit.shape != graph.mask.shape:
            raise AnalysisError(
                f"circuit: expected booleans [writers readers] {tuple(graph.mask.shape)}, got "
                f"{circuit.dtype} {tuple(circuit.shape)}"
            )
        checked.append(circuit.cpu())
    return checked


def rows_per_batch(prompts: Prompts, memory_mb: int, *, extra: int = 0) -> int:
    """How many rows (circuits times items) fit the memory."""
    model = prompts.model
    graph = Graph.of(model)
    n_readers = model.n_heads + 2 * model.n_kv_heads
    d_mlp = max(max(p.shape) for p in model.architecture.blocks[0].mlp_projection.parameters())
    n_positions = prompts.clean.shape[1]
    width = (len(graph.writers) + extra + 4 * n_readers + 6 * model.n_layers) * model.d_model
    per_token = width + 3 * d_mlp + 3 * model.n_heads * n_positions
    return max(1, memory_mb * 2**20 // (n_positions * per_token * model.dtype.itemsize))


def _read(
    deltas: Float[Tensor, "circuits items sources pos d_model"],
    keep: Bool[Tensor, "circuits sources readers"],
    base: Float[Tensor, "items pos d_model"],
) -> Float[Tensor, "circuits items readers pos d_model"]:
    """What readers read: `base` and, over kept edges, what writers differ from the reference by."""
    weights = repeat(keep.to(deltas.dtype), "c w r -> c i r w", i=deltas.shape[1])
    summed = weights @ deltas.flatten(-2)
    return summed.unflatten(-1, deltas.shape[-2:]) + rearrange(base, "i p d -> i 1 p d")


def _shifted(rows: slice, by: int) -> slice:
    return slice(rows.start + by, rows.stop + by)
