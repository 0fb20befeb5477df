"""Run a network with edges ablated: exactly, batched, one forward pass per circuit.

Every reader gets the sum of the writers it reads: over a kept edge with the value that the writer
has in this run, over an ablated one with its value in the reference run. With D[w] a writer's
difference from its reference value, a reader's input is what it reads in the reference run plus the
sum of D over its kept edges: one matrix product per layer. Memory holds D of every writer once, and
the inputs of one layer's readers; nothing grows with the number of edges.

What cannot differ from the reference is not computed: under resample ablation the positions before
the first token that differs (their keys and values are the reference's), and layers that no kept
edge reaches or that nobody reads. Where most edges are kept, the ablated ones are subtracted from
the sum over all instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.contexts import Context, KeyValues
from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.attention import attend
from mechinterp.patching.circuits.prompts import Prompts, rows_per_batch
from mechinterp.patching.circuits.reference import (
    ABLATIONS,
    Ablation,
    Reference,
    mean_reference,
    reference_run,
    zero_reference,
)
from mechinterp.patching.graph import Graph
from mechinterp.patching.memory import in_batches
from mechinterp.patching.metrics import Metric
from mechinterp.progress import progress_bar

Circuit = Bool[Tensor, "writers readers"]
# Of the largest residual, when the full circuit is compared to the plain model.
TOLERANCE, TOLERANCE_IN_HALF_PRECISION = 1e-4, 5e-2


@dataclass(frozen=True)
class MaskedRun:
    """A batch of items, ready to be run with any circuit against one reference.

    All tensors are about the positions from the first on that can differ; `decision` counts from
    there.
    """

    model: HookedModel
    graph: Graph
    embed: Float[Tensor, "items pos d_model"]
    context: Context
    padded: bool
    reference: Reference
    decision: Int[Tensor, " items"]

    @classmethod
    def of(cls, prompts: Prompts, rows: slice, reference: Reference, start: int = 0) -> MaskedRun:
        """For the clean prompts of some items from position `start` on; `reference` holds these
        items and positions, or one item for all."""
        model, mask = prompts.model, prompts.mask_of(rows)
        embed, context = model.embed(prompts.clean[rows], attention_mask=mask)
        return cls(
            model,
            Graph.of(model),
            embed[:, start:],
            context.suffix(start),
            mask is not None,
            reference,
            prompts.decision[rows] - start,
        )

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
        deltas = _Deltas.of(self, keep.to(self.embed.device), extra)
        n_items = len(self.embed)
        for layer, block in enumerate(self.model.architecture.blocks):
            rows, columns = graph.attention_writers(layer), graph.attention_readers(layer)
            heads = None
            if deltas.active(rows, columns, rows.start):
                inputs = deltas.read(columns, rows.start, reference.resid_pre[layer])
                heads = self._attention(block, inputs)
                deltas.write(rows, heads, count=not graph.parallel)
            row, column = graph.mlp_writer(layer), graph.mlp_reader(layer)
            before = rows.start if graph.parallel else row
            if deltas.active(slice(row, row + 1), slice(column, column + 1), before):
                reading = deltas.read(slice(column, column + 1), before, reference.resid_mid[layer])
                out = block.mlp_out(rearrange(reading, "c i 1 p d -> (c i) p d"))
                out = rearrange(out, "(c i) p d -> c i 1 p d", i=n_items)
                out = out - rearrange(reference.mlp[layer], "i p d -> i 1 p d")
                deltas.write(slice(row, row + 1), out)
            if heads is not None and graph.parallel:
                deltas.total += heads.sum(2)
        items = torch.arange(n_items, device=self.embed.device)
        base = reference.final.expand(n_items, -1, -1)[items, self.decision]
        at = deltas.values[:, items, :, self.decision]  # [items circuits sources d_model]
        return base + einsum(deltas.keep[:, :, -1].to(at.dtype), at, "c w, i c w d -> c i d")

    def _attention(
        self, block: Block, inputs: Float[Tensor, "circuits items readers pos d_model"]
    ) -> Float[Tensor, "circuits items writers pos d_model"]:
        """What one layer's heads write, less what they write in the reference."""
        n_circuits, n_items = inputs.shape[:2]
        if block.attention_norm is not None:
            inputs = block.attention_norm(inputs)
        inputs = rearrange(inputs, "c i r p d -> (c i) r p d")
        items = torch.arange(n_items, device=inputs.device).repeat(n_circuits)
        context = self.context.rows(items) if self.padded else self.context
        cache = None
        if self.reference.prefix:
            cache = KeyValues(*(x[items] for x in self.reference.prefix[block.layer]))
        z = attend(block, inputs, context.arguments[block.layer], cache)
        z = rearrange(z, "(c i) p h e -> c i p h e", i=n_items)
        reference = self.reference.attention[block.layer]
        if self.graph.heads_write:
            return einsum(z - reference, block.output_weight(), "c i p h e, h e d -> c i h p d")
        return rearrange(block.attn_out(z) - reference, "c i p d -> c i 1 p d")


@dataclass
class _Deltas:
    """What the sources of a run differ from the reference by, and who reads them.

    Attributes:
        values: zero where nothing was written yet.
        total: the sum of what the graph's writers have written so far.
        live: the sources that may differ from the reference.
        first: the number of extra sources, which come before the graph's writers.
    """

    keep: Bool[Tensor, "circuits sources readers"]
    values: Float[Tensor, "circuits items sources pos d_model"]
    total: Float[Tensor, "circuits items pos d_model"]
    live: Bool[Tensor, " sources"]
    first: int
    is_run: bool

    @classmethod
    def of(
        cls,
        run: MaskedRun,
        keep: Bool[Tensor, "circuits sources readers"],
        extra: Float[Tensor, "extra items pos d_model"] | None,
    ) -> _Deltas:
        first = 0 if extra is None else len(extra)
        n_sources = first + len(run.graph.writers)
        n_items, *rest = run.embed.shape
        values = run.embed.new_zeros(len(keep), n_items, n_sources, *rest)
        if extra is not None:
            values[:, :, :first] = rearrange(extra, "extra items p d -> items extra p d")
        live = torch.zeros(n_sources, dtype=torch.bool, device=keep.device)
        live[:first] = True
        total = torch.zeros_like(values[:, :, 0])
        deltas = cls(keep, values, total, live, first, run.reference.is_run)
        change = run.embed - run.reference.embed
        if bool((change != 0).any()):
            deltas.write(slice(0, 1), rearrange(change, "i p d -> 1 i 1 p d"))
        return deltas

    def active(self, rows: slice, columns: slice, before: int) -> bool:
        """Whether these readers can make these writers other than the reference, and somebody reads
        them."""
        read = self.keep[:, rows.start + self.first : rows.stop + self.first].any()
        if not self.is_run:
            return bool(read)
        n = self.first + before
        changed = (self.keep[:, :n, columns] & rearrange(self.live[:n], "w -> w 1")).any()
        return bool(read and changed)

    def write(
        self,
        rows: slice,
        change: Float[Tensor, "#circuits items writers pos d_model"],
        *,
        count: bool = True,
    ) -> None:
        """Set what these writers differ from the reference by; `count`: in the total as well."""
        rows = slice(rows.start + self.first, rows.stop + self.first)
        self.values[:, :, rows] = change
        self.live[rows] = True
        if count:
            self.total += change.sum(2)

    def read(
        self, columns: slice, before: int, base: Float[Tensor, "items pos d_model"]
    ) -> Float[Tensor, "circuits items readers pos d_model"]:
        """What readers read: `base` and, over kept edges, what writers differ from it by.

        `before`: how many of the graph's writers they read.
        """
        n = self.first + before
        weights = self.keep[:, :n, columns].to(self.values.dtype)
        weights = weights * rearrange(self.live[:n], "w -> w 1")
        stream = rearrange(base, "i p d -> 1 i 1 p d")
        if self.is_run:
            # Not with other references: what is left may be small beside what is subtracted.
            absent = weights.clone()
            absent[:, self.first :] -= rearrange(self.live[self.first : n], "w -> w 1").to(absent)
            if _n_rows(absent) < _n_rows(weights):
                weights = absent
                stream = stream + rearrange(self.total, "c i p d -> c i 1 p d")
        shape = (len(weights), self.values.shape[1], weights.shape[2])
        used = (weights != 0).any(2).any(0).nonzero().flatten()
        if not len(used):
            return stream.expand(*shape, -1, -1)
        sources = self.values[:, :, :n]
        if len(used) < n // 2:  # else the copy costs more than it saves
            sources, weights = sources[:, :, used], weights[:, used]
        weights = repeat(weights, "c w r -> c i r w", i=shape[1])
        return (weights @ sources.flatten(-2)).unflatten(-1, stream.shape[-2:]) + stream


def _n_rows(weights: Float[Tensor, "circuits sources readers"]) -> int:
    return int((weights != 0).any(2).any(0).sum())


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
        ModelError: with all edges kept the run is not the plain model's (checked on the first
            item).
    """
    prompts = Prompts.of(
        model, clean, corrupt, metric, attention_mask=attention_mask, decision=decision
    )
    shared = shared_reference(prompts, ablation, reference_tokens, reference_mask)
    first = checked_start(prompts, shared)
    graph = Graph.of(model)
    keep = checked_circuits(graph, circuits)
    values = torch.empty(len(keep), len(prompts.clean), dtype=model.dtype, device=model.device)
    with progress_bar("circuits", values.numel(), unit="runs") as advance:

        def run(rows: slice, size: int) -> None:
            masked = MaskedRun.of(
                prompts, rows, batch_reference(prompts, rows, shared, first), first
            )
            items = torch.arange(rows.start, rows.stop, device=model.device)
            together = max(1, size // len(items))
            for begin in range(0, len(keep), together):
                part = slice(begin, begin + together)
                masks = torch.stack([mask & graph.mask for mask in keep[part]])
                final = rearrange(masked.final(masks), "c i d -> (c i) d")
                scores = prompts.score(final, items.repeat(len(masks)))
                values[part, rows] = scores.view(len(masks), len(items))
            advance(len(keep) * len(items))

        in_batches(run, len(prompts.clean), rows_per_batch(prompts, memory_mb, start=first))
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


@torch.no_grad()
def checked_start(prompts: Prompts, shared: Reference | None) -> int:
    """The first position that can differ from the reference, after a run with all edges kept.

    That is 0 with references other than runs, and where earlier positions do depend on later ones.

    Raises:
        ModelError: with all edges kept the first item's run is not the plain model's.
    """
    row = slice(0, 1)
    plain = prompts.final(row)
    first = 0
    if shared is None:
        differs = (prompts.clean != prompts.corrupt).any(0).nonzero().flatten()
        first = min([int(prompts.decision.min()), *differs[:1].tolist()])
    exact = prompts.model.dtype in (torch.float32, torch.float64)
    tolerance = TOLERANCE if exact else TOLERANCE_IN_HALF_PRECISION
    for start in sorted({first, 0}, reverse=True):
        reference = batch_reference(prompts, row, shared, start)
        run = MaskedRun.of(prompts, row, reference, start)
        error = float((run.final(run.graph.mask[None])[0] - plain).abs().max())
        scale = max(1.0, float(plain.abs().max()))
        if error <= tolerance * scale:
            return start
    raise ModelError(
        f"with all edges kept the run differs from the network's by {error:.2g} (values up to "
        f"{scale:.2g}), so circuits of {prompts.model.architecture.name} cannot be run"
    )


def batch_reference(
    prompts: Prompts, rows: slice, shared: Reference | None, start: int = 0
) -> Reference:
    """The reference for some items, which `MaskedRun.of` is given with the same arguments."""
    if shared is not None:
        return shared
    mask = prompts.mask_of(rows)
    return reference_run(prompts.model, prompts.corrupt[rows], attention_mask=mask, start=start)


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
