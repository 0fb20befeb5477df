"""Nodes, edges, and that the graph's claim holds: every reader reads the sum of its writers."""

from __future__ import annotations

import pytest
import torch
from tiny_models import FAMILIES, N_HEADS, N_KV_HEADS, N_LAYERS, random_tokens, shared_model

from mechinterp.errors import AnalysisError
from mechinterp.patching.graph import Graph, Node
from mechinterp.sites import Site


def test_grouped_query_graph():
    graph = Graph.of(shared_model("llama"))
    assert len(graph.writers) == 1 + N_LAYERS * (N_HEADS + 1)
    assert len(graph.readers) == N_LAYERS * (N_HEADS + 2 * N_KV_HEADS + 1) + 1
    assert [str(node) for node in graph.writers[:7]] == [
        "embed", "head.0.0", "head.0.1", "head.0.2", "head.0.3", "mlp.0", "head.1.0",
    ]  # fmt: skip
    assert [str(node) for node in graph.readers[:10]] == [
        "q.0.0", "q.0.1", "q.0.2", "q.0.3", "k.0.0", "k.0.1", "v.0.0", "v.0.1", "mlp.0", "q.1.0",
    ]  # fmt: skip
    assert str(graph.readers[-1]) == "logits"


@pytest.mark.parametrize("family", FAMILIES)
def test_edges_written_out(family):
    graph = Graph.of(shared_model(family))
    post_norm = family.startswith(("gemma", "olmo2"))
    assert graph.heads_write != post_norm
    expected = set()
    for reader in map(str, graph.readers):
        kind, *place = reader.split(".")
        layer = int(place[0]) if place else N_LAYERS
        expected.add(("embed", reader))
        for before in range(N_LAYERS):
            own_attention = before == layer and kind == "mlp" and family != "gpt_neox"
            if before < layer or own_attention:
                heads = [f"attn.{before}"]
                if not post_norm:
                    heads = [f"head.{before}.{head}" for head in range(N_HEADS)]
                expected |= {(head, reader) for head in heads}
            if before < layer:
                expected.add((f"mlp.{before}", reader))
    assert {(str(w), str(r)) for w, r in graph.edges()} == expected
    assert graph.n_edges == len(expected)
    for reader in graph.readers:
        named = [str(w) for w in graph.writers_before(reader)]
        assert named == [w for w in map(str, graph.writers) if (w, str(reader)) in expected]


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gpt_neox"])
def test_indices_and_slices_point_at_their_nodes(family):
    graph = Graph.of(shared_model(family))
    for i, node in enumerate(graph.writers):
        assert graph.writer_index(node) == graph.writer_index(str(node)) == i
    for i, node in enumerate(graph.readers):
        assert graph.reader_index(node) == graph.reader_index(str(node)) == i
    for layer in range(N_LAYERS):
        for part in "qkv":
            nodes = graph.readers[graph.attention_readers(layer, part)]
            assert {(n.kind, n.layer) for n in nodes} == {(part, layer)}
        assert str(graph.readers[graph.mlp_reader(layer)]) == f"mlp.{layer}"
        assert str(graph.writers[graph.mlp_writer(layer)]) == f"mlp.{layer}"


def test_readers_feed_their_writers():
    graph = Graph.of(shared_model("llama"))

    def fed(reader: str) -> list[str]:
        row = graph.feeds[graph.reader_index(reader)]
        return [str(node) for node, yes in zip(graph.writers, row.tolist(), strict=True) if yes]

    assert fed("q.1.2") == ["head.1.2"]
    assert fed("k.1.1") == fed("v.1.1") == ["head.1.2", "head.1.3"]
    assert fed("mlp.2") == ["mlp.2"]
    assert fed("logits") == []
    graph = Graph.of(shared_model("gemma2"))
    assert fed("k.1.0") == fed("q.1.3") == ["attn.1"]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_streams_are_the_sum_of_the_writers_before(family):
    model = shared_model(family)
    graph = Graph.of(model)
    tokens = random_tokens(2, 6)
    grains = ("resid_pre", "head", "attn_out", "mlp_out", "resid_post")
    seen = model.capture(tokens, [site for grain in grains for site in model.sites(grain)])
    written, biases = [seen[Site("resid_pre", 0)]], []
    for block in model.architecture.blocks:
        if graph.heads_write:
            z, weight = seen[Site("head", block.layer)], block.output_weight()
            written += [z[:, :, head] @ weight[head] for head in range(N_HEADS)]
            biases.append(block.attn_out(torch.zeros_like(z[:1, :1])))
        else:
            written.append(seen[Site("attn_out", block.layer)])
            biases.append(torch.zeros(1, 1, model.d_model))
        written.append(seen[Site("mlp_out", block.layer)])
    assert len(written) == len(graph.writers)
    for layer in range(N_LAYERS + 1):
        reader = "logits" if layer == N_LAYERS else f"v.{layer}.0"
        total = sum(written[: graph.n_writers_before(reader)]) + sum(biases[:layer])
        grain = ("resid_post", N_LAYERS - 1) if layer == N_LAYERS else ("resid_pre", layer)
        torch.testing.assert_close(total, seen[Site(*grain)], rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_projections_by_head(family):
    model = shared_model(family)
    tokens = random_tokens(2, 6)
    grains = ("resid_pre", "q", "k", "v")
    seen = model.capture(tokens, [site for grain in grains for site in model.sites(grain)])
    for block in model.architecture.blocks:
        resid = seen[Site("resid_pre", block.layer)]
        read = resid if block.attention_norm is None else block.attention_norm(resid)
        for part in "qkv":
            weight, bias = block.qkv_weight(part)
            value = torch.einsum("bpd,dhe->bphe", read, weight)
            value = value if bias is None else value + bias
            expected = seen[Site(part, block.layer)]
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-4)


def test_nodes_are_parsed_and_checked():
    for name in ("embed", "head.2.5", "attn.2", "mlp.3", "q.2.5", "k.2.1", "logits"):
        assert str(Node.parse(name)) == name
    assert Node.parse("head.2.5").site == Site("head", 2, 5)
    assert Node.parse("attn.2").site == Site("attn_out", 2)
    for name in ("head.2", "mlp.1.2", "embed.0", "neuron.1", "head 2", "q.1.x"):
        with pytest.raises(AnalysisError):
            Node.parse(name)
    with pytest.raises(AnalysisError, match="no site"):
        _ = Node("embed").site
    graph = Graph.of(shared_model("llama"))
    with pytest.raises(AnalysisError, match=r"k\.0\.3 is no reader of this network"):
        graph.reader_index("k.0.3")
    with pytest.raises(AnalysisError, match="is no writer"):
        graph.writer_index("logits")
