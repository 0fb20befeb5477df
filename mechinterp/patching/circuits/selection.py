"""From scores to circuits: which edges to keep."""

from __future__ import annotations

import heapq
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.patching.graph import Graph

Scores = Float[Tensor, "writers readers"]
Circuit = Bool[Tensor, "writers readers"]
Selection = Literal["top", "greedy"]


def select_edges(
    graph: Graph,
    scores: Scores,
    n: int,
    *,
    method: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
) -> Circuit:
    """The `n` edges with the largest |score|, as MIB and EAP-IG select them.

    Args:
        scores: NaN where there is no edge, or where an edge was not scored: those come last.
        method: "top" takes the largest whatever they connect; "greedy" starts from the logits and
            takes, one by one, the largest edge into a node that the circuit has (Hanna et al.
            2024), so that every edge leads to the logits.
        absolute: rank by |score|; False ranks by the score itself.
        prune: drop edges that do not connect the embedding to the logits; fewer than `n` may stay.

    Raises:
        AnalysisError: the scores do not fit the graph, or `n` is not 0 .. n_edges.
    """
    if scores.shape != graph.mask.shape:
        raise AnalysisError(
            f"scores: expected [writers readers] {tuple(graph.mask.shape)}, got "
            f"{tuple(scores.shape)}"
        )
    if not 0 <= n <= graph.n_edges:
        raise AnalysisError(f"a circuit of {n} edges: this network has 0 to {graph.n_edges}")
    if method not in ("top", "greedy"):
        raise AnalysisError(f"selection: expected 'top' or 'greedy', got {method!r}")
    size = scores.detach().cpu().double()
    size = (size.abs() if absolute else size).nan_to_num(nan=-torch.inf)
    circuit = _greedy(graph, size, n) if method == "greedy" else _top(graph, size, n)
    return prune_edges(graph, circuit) if prune else circuit


def prune_edges(graph: Graph, circuit: Circuit) -> Circuit:
    """The edges on a path from the embedding to the logits.

    A path goes on from a reader to the writers that it feeds: a head is reached by an edge into its
    queries, keys or values. Edges that do not lead to the logits never matter. Edges that do not
    come from the embedding carry reference values; so pruning changes nothing under resample
    ablation, and may under mean or zero ablation, where a node computes something of its own from
    ablated inputs.
    """
    kept = circuit.cpu() & graph.mask
    feeds = graph.feeds
    while True:
        reached = _any(kept.any(0), feeds)
        reached[0] = True  # the embedding
        useful = _any(kept.any(1), feeds.T)
        useful[-1] = True  # the logits
        pruned = kept & rearrange(reached, "w -> w 1") & useful
        if torch.equal(pruned, kept):
            return kept
        kept = pruned


def edges_of_nodes(graph: Graph, writers: Bool[Tensor, " writers"]) -> Circuit:
    """A node circuit: all edges out of the writers kept."""
    if writers.shape != (len(graph.writers),) or writers.dtype != torch.bool:
        raise AnalysisError(
            f"node circuit: expected booleans [writers] ({len(graph.writers)},), got "
            f"{writers.dtype} {tuple(writers.shape)}"
        )
    return graph.mask & rearrange(writers.cpu(), "w -> w 1")


def nodes_of_edges(graph: Graph, circuit: Circuit) -> Bool[Tensor, " writers"]:
    """The writers with an edge of the circuit going out."""
    return (circuit.cpu() & graph.mask).any(1)


def random_scores(graph: Graph, generator: torch.Generator) -> Scores:
    """A score for every edge from a uniform distribution: selected from, a random circuit."""
    scores = torch.rand(graph.mask.shape, generator=generator, dtype=torch.float64)
    return scores.masked_fill(~graph.mask, torch.nan)


def _any(present: Bool[Tensor, " nodes"], leads: Bool[Tensor, "nodes others"]) -> Tensor:
    """The others that a present node leads to."""
    return (rearrange(present, "n -> n 1") & leads).any(0)


def _top(graph: Graph, size: Scores, n: int) -> Circuit:
    edges = graph.mask.nonzero()
    order = size[graph.mask].argsort(descending=True, stable=True)[:n]
    circuit = torch.zeros_like(graph.mask)
    circuit[tuple(edges[order].T)] = True
    return circuit


def _greedy(graph: Graph, size: Scores, n: int) -> Circuit:
    circuit = torch.zeros_like(graph.mask)
    feeding = [column.nonzero().flatten().tolist() for column in graph.feeds.T]
    before = [graph.n_writers_before(reader) for reader in graph.readers]
    heap: list[tuple[float, int, int]] = []
    entered = set()

    def enter(reader: int) -> None:
        if reader not in entered:
            entered.add(reader)
            for writer, value in enumerate(size[: before[reader], reader].tolist()):
                heapq.heappush(heap, (-value, writer, reader))

    enter(len(graph.readers) - 1)
    for _ in range(n):
        if not heap:
            break
        _, writer, reader = heapq.heappop(heap)
        circuit[writer, reader] = True
        for read in feeding[writer]:
            enter(read)
    return circuit
