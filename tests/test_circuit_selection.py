"""Selecting and pruning edges, against plain searches over paths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import random_tokens, shared_model

from mechinterp.errors import AnalysisError
from mechinterp.patching.circuits import (
    edges_of_nodes,
    nodes_of_edges,
    prune_edges,
    random_scores,
    run_circuits,
    select_edges,
)
from mechinterp.patching.graph import Graph
from mechinterp.patching.metrics import logit_difference

GRAPHS = {
    "grouped": Graph(2, 4, 2, parallel=False, heads_write=True),
    "parallel": Graph(2, 2, 2, parallel=True, heads_write=True),
    "post_norm": Graph(2, 2, 1, parallel=False, heads_write=False),
}


def feeds(graph: Graph, reader: str) -> list[str]:
    """The writers that a reader's input goes into, by their names."""
    kind, *place = reader.split(".")
    if kind in ("mlp", "logits"):
        return [reader] if kind == "mlp" else []
    layer, head = map(int, place)
    if not graph.heads_write:
        return [f"attn.{layer}"]
    group = graph.n_heads // graph.n_kv_heads
    heads = [head] if kind == "q" else range(head * group, (head + 1) * group)
    return [f"head.{layer}.{h}" for h in heads]


def on_paths(graph: Graph, edges: set[tuple[str, str]]) -> set[tuple[str, str]]:
    """The edges on some path from embed to logits, by walking every path."""
    found = set()

    def walk(writer: str, path: list[tuple[str, str]]) -> None:
        for edge in edges:
            if edge[0] != writer:
                continue
            if edge[1] == "logits":
                found.update([*path, edge])
            for following in feeds(graph, edge[1]):
                walk(following, [*path, edge])

    walk("embed", [])
    return found


def names(graph: Graph, circuit: torch.Tensor) -> set[tuple[str, str]]:
    return {(str(graph.writers[w]), str(graph.readers[r])) for w, r in circuit.nonzero().tolist()}


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), share=st.floats(0.02, 0.3), name=st.sampled_from(list(GRAPHS)))
def test_pruning_keeps_what_is_on_a_path(seed, share, name):
    graph = GRAPHS[name]
    generator = torch.Generator().manual_seed(seed)
    circuit = (torch.rand(graph.mask.shape, generator=generator) < share) & graph.mask
    pruned = prune_edges(graph, circuit)
    assert names(graph, pruned) == on_paths(graph, names(graph, circuit))


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(0, 40), name=st.sampled_from(list(GRAPHS)))
def test_greedy_takes_the_largest_edge_into_the_circuit(seed, n, name):
    graph = GRAPHS[name]
    scores = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(seed))
    size = {edge: abs(float(scores[graph.writer_index(edge[0]), graph.reader_index(edge[1])]))
            for edge in names(graph, graph.mask)}  # fmt: skip
    chosen: set[tuple[str, str]] = set()
    n = min(n, graph.n_edges)
    for _ in range(n):
        inside = {writer for writer, _ in chosen}
        readers = {r for _, r in size if r == "logits" or inside & set(feeds(graph, r))}
        chosen.add(max((e for e in size if e[1] in readers and e not in chosen), key=size.get))
    selected = select_edges(graph, scores, n, method="greedy", prune=False)
    assert names(graph, selected) == chosen


def test_top_edges():
    graph = GRAPHS["grouped"]
    scores = torch.randn(graph.mask.shape, generator=torch.Generator().manual_seed(0))
    scores[~graph.mask] = 100.0  # no edges, whatever is written there
    edges = sorted(
        names(graph, graph.mask),
        key=lambda e: -scores[graph.writer_index(e[0]), graph.reader_index(e[1])],
    )
    selected = select_edges(graph, scores, 9, absolute=False, prune=False)
    assert names(graph, selected) == set(edges[:9])
    selected = select_edges(graph, scores, 9, prune=False)
    edges.sort(key=lambda e: -abs(scores[graph.writer_index(e[0]), graph.reader_index(e[1])]))
    assert names(graph, selected) == set(edges[:9])
    assert torch.equal(
        select_edges(graph, scores, 30), prune_edges(graph, select_edges(graph, scores, 30))
    )
    assert int(select_edges(graph, scores, graph.n_edges).sum()) == graph.n_edges
    scores[0, -1] = torch.nan
    assert not select_edges(graph, scores, graph.n_edges - 1, prune=False)[0, -1]


def test_pruning_changes_no_metric_under_resampling():
    model = shared_model("llama")
    graph = Graph.of(model)
    clean, corrupt = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
    metric = logit_difference(correct=torch.tensor([1, 2, 3]), wrong=torch.tensor([5, 6, 7]))
    circuits = [
        torch.rand(graph.mask.shape, generator=torch.Generator().manual_seed(i)) < 0.15
        for i in range(4)
    ]
    pruned = [prune_edges(graph, circuit) for circuit in circuits]
    assert any(
        int(p.sum()) < int((c & graph.mask).sum()) for p, c in zip(pruned, circuits, strict=True)
    )
    values = run_circuits(model, clean, corrupt, [*circuits, *pruned], metric)
    torch.testing.assert_close(values[:4], values[4:], rtol=0, atol=1e-4)


def test_nodes_and_random_scores():
    graph = GRAPHS["parallel"]
    kept = torch.zeros(len(graph.writers), dtype=torch.bool)
    kept[[0, 2]] = True
    circuit = edges_of_nodes(graph, kept)
    assert torch.equal(nodes_of_edges(graph, circuit), kept)
    assert {w for w, _ in names(graph, circuit)} == {"embed", "head.0.1"}
    scores = random_scores(graph, torch.Generator().manual_seed(3))
    assert torch.equal(scores.isnan(), ~graph.mask)
    assert torch.equal(scores[graph.mask], random_scores(
        graph, torch.Generator().manual_seed(3))[graph.mask])  # fmt: skip


def test_errors():
    graph = GRAPHS["grouped"]
    scores = torch.zeros(graph.mask.shape)
    with pytest.raises(AnalysisError, match="expected \\[writers readers\\]"):
        select_edges(graph, scores[1:], 3)
    with pytest.raises(AnalysisError, match="0 to"):
        select_edges(graph, scores, graph.n_edges + 1)
    with pytest.raises(AnalysisError, match="'top' or 'greedy'"):
        select_edges(graph, scores, 3, method="best")
    with pytest.raises(AnalysisError, match="expected booleans"):
        edges_of_nodes(graph, torch.ones(3))
