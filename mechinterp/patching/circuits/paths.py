"""Path patching: what a node does to others directly, and what comes of it (Wang et al. 2022)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from einops import einsum, rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.prompts import Prompts, rows_per_batch
from mechinterp.patching.circuits.reference import Reference, reference_run
from mechinterp.patching.circuits.runs import MaskedRun, checked_start
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.memory import in_batches
from mechinterp.patching.metrics import Metric


@torch.no_grad()
def patch_path(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    senders: Sequence[Node | str],
    receivers: Sequence[Node | str],
    metric: Metric,
    *,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int = 256,
) -> Float[Tensor, " items"]:
    """Every item's metric in the clean run with the senders' corrupt values on these paths alone.

    As Wang et al. (2022, IOI, appendix B): each receiver's input is that of the clean run with the
    senders before it exchanged for their corrupt values, everything else frozen; the receivers are
    set to what follows, and the rest of the network runs on from them. Among receivers nothing is
    passed on, and no path goes through an MLP unless that MLP is a receiver.

    Args:
        senders: writers, such as "head.9.6", "mlp.3", "embed".
        receivers: readers, such as "q.10.0", "v.8.6", "mlp.11", "logits".

    Raises:
        AnalysisError: a node is not of this network, or no sender comes before any receiver.
    """
    prompts = Prompts.of(
        model, clean, corrupt, metric, attention_mask=attention_mask, decision=decision
    )
    graph = Graph.of(model)
    rows = [graph.writer_index(sender) for sender in senders]
    columns = [graph.reader_index(receiver) for receiver in receivers]
    direct = graph.mask[rows][:, columns]
    if not direct.any():
        raise AnalysisError(
            f"no edge from {', '.join(map(str, senders))} to {', '.join(map(str, receivers))}: a "
            "sender must come before a receiver"
        )
    first = checked_start(prompts, None)
    keep = graph.mask.clone()
    keep[:, columns] = False
    sending = torch.zeros(len(rows), len(graph.readers), dtype=torch.bool)
    sending[:, columns] = direct
    keep = rearrange(torch.cat([sending, keep]), "sources readers -> 1 sources readers")
    size = rows_per_batch(prompts, memory_mb, extra=len(rows), start=first)
    values = torch.empty(len(prompts.clean), dtype=model.dtype, device=model.device)

    def run(part: slice, size: int) -> None:
        own, other = (
            reference_run(model, tokens[part], attention_mask=prompts.mask_of(part), start=first)
            for tokens in (prompts.clean, prompts.corrupt)
        )
        change = writer_changes(model, graph, own, other, rows)
        final = MaskedRun.of(prompts, part, own, first).final(keep, change)[0]
        items = torch.arange(part.start, part.stop, device=model.device)
        values[part] = prompts.score(final, items)

    in_batches(run, len(values), size)
    return values


def writer_changes(
    model: HookedModel,
    graph: Graph,
    before: Reference,
    after: Reference,
    rows: Sequence[int],
) -> Float[Tensor, "writers items pos d_model"]:
    """What some writers, by row of the graph, write in one run less what they write in another."""
    changes = []
    for row in rows:
        node = graph.writers[row]
        if node.kind == "embed":
            changes.append(after.embed - before.embed)
            continue
        assert node.layer is not None
        if node.kind == "mlp":
            changes.append(after.mlp[node.layer] - before.mlp[node.layer])
            continue
        change = after.attention[node.layer] - before.attention[node.layer]
        if node.kind == "head":
            weight = model.architecture.blocks[node.layer].output_weight()[node.head]
            change = einsum(change[:, :, node.head], weight, "i p e, e d -> i p d")
        changes.append(change)
    return torch.stack(changes)
