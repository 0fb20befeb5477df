"""From scores to circuits: which edges to keep."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Literal

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
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
    return select_nested(graph, scores, [n], method=method, absolute=absolute, prune=prune)[0]


def select_nested(
    graph: Graph,
    scores: Scores,
    sizes: Sequence[int],
    *,
    method: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
) -> list[Circuit]:
    """`select_edges` for several sizes, each circuit within the next larger (but for pruning)."""
    if scores.shape != graph.mask.shape:
        raise AnalysisError(
            f"scores: expected [writers readers] {tuple(graph.mask.shape)}, got "
            f"{tuple(scores.shape)}"
        )
    if wrong := [n for n in sizes if not 0 <= n <= graph.n_edges]:
        raise AnalysisError(f"a circuit of {wrong[0]} edges: this network has 0 to {graph.n_edges}")
    if method not in ("top", "greedy"):
        raise AnalysisError(f"selection: expected 'top' or 'greedy', got {method!r}")
    size = scores.detach().cpu().double()
    size = (size.abs() if absolute else size).nan_to_num(nan=-torch.inf)
    edges = (_greedy if method == "greedy" else _top)(graph, size, max(sizes))
    circuits = []
    for n in sizes:
        circuit = torch.zeros_like(graph.mask)
        circuit[edges[:n, 0], edges[:n, 1]] = True
        circuits.append(prune_edges(graph, circuit) if prune else circuit)
    return circuits


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


def _top(graph: Graph, size: Scores, n: int) -> Int[Tensor, "n 2"]:
    edges = graph.mask.nonzero()
    return edges[size[graph.mask].argsort(descending=True, stable=True)[:n]]


def _greedy(graph: Graph, size: Scores, n: int) -> Int[Tensor, "n 2"]:
    chosen: list[tuple[int, int]] = []
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
    while heap and len(chosen) < n:
        _, writer, reader = heapq.heappop(heap)
        chosen.append((writer, reader))
        for read in feeding[writer]:
            enter(read)
    return torch.tensor(chosen, dtype=torch.long).reshape(-1, 2)
