"""Circuits written by hand are found, and nothing else is."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from micro_models import SINGLE, MicroTask, two_paths

from mechinterp.patching.circuits import (
    completeness,
    edge_effects,
    faithfulness_curve,
    minimality,
    patch_path,
    run_circuits,
    select_edges,
)
from mechinterp.patching.edge_attribution import attribute_edges
from mechinterp.patching.graph import Graph, Node

NEGLIGIBLE = 1e-3  # of the metric's gap; the norms are the identity to about 1e-5
TASKS = {make.__name__: make for make in (*SINGLE, two_paths)}


@cache
def task(name: str) -> MicroTask:
    return TASKS[name]()


def inputs(t: MicroTask) -> tuple:
    return t.model, t.clean, t.corrupt, t.metric


def mask_of(t: MicroTask, edges) -> torch.Tensor:
    graph = Graph.of(t.model)
    mask = torch.zeros_like(graph.mask)
    for writer, reader in edges:
        mask[graph.writer_index(writer), graph.reader_index(reader)] = True
    return mask


def gap(t: MicroTask) -> torch.Tensor:
    values = []
    for tokens in (t.clean, t.corrupt):
        logits = t.model.forward(tokens, positions=-1)
        values.append(t.metric(logits[:, t.metric.token_ids], torch.arange(len(tokens))))
    return values[0] - values[1]


@pytest.mark.parametrize("name", TASKS)
def test_the_model_does_its_task(name):
    t = task(name)
    for tokens, sign in ((t.clean, 1), (t.corrupt, -1)):
        logits = t.model.forward(tokens, positions=-1)
        values = t.metric(logits[:, t.metric.token_ids], torch.arange(len(tokens)))
        assert bool((sign * values > 1.5).all())


@pytest.mark.parametrize("name", TASKS)
def test_the_decoys_are_at_work(name):
    """Or it would be no feat not to find them."""
    t = task(name)
    assert len(t.decoys) >= 3
    sites = [Node.parse(node).site for node in t.decoys]
    clean, corrupt = (t.model.capture(tokens, sites) for tokens in (t.clean, t.corrupt))
    for site in sites:
        assert float((clean[site] - corrupt[site]).abs().max()) > 0.05, site


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("name", [make.__name__ for make in SINGLE])
def test_exact_effects_find_the_circuit_and_nothing_else(name, direction):
    t = task(name)
    effects = edge_effects(*inputs(t), direction=direction, keep_items=True)
    largest = effects.abs().amax(0)  # over items: in XOR an item changes one bit
    expected = mask_of(t, t.edges)
    scale = float(gap(t).abs().mean())
    assert bool((largest[expected] > 0.9 * scale).all())
    others = Graph.of(t.model).mask & ~expected
    assert float(largest[others].max()) < NEGLIGIBLE * scale


@pytest.mark.parametrize("name", [make.__name__ for make in SINGLE])
def test_the_circuit_alone_is_faithful(name):
    t = task(name)
    graph = Graph.of(t.model)
    circuit = mask_of(t, t.edges)
    kept, without = run_circuits(
        t.model, t.clean, t.corrupt, [circuit, graph.mask & ~circuit], t.metric
    )
    full = gap(t)
    empty = t.metric(
        t.model.forward(t.corrupt, positions=-1)[:, t.metric.token_ids], torch.arange(len(full))
    )
    torch.testing.assert_close(
        (kept - empty) / full, torch.ones_like(full), rtol=0, atol=NEGLIGIBLE
    )
    torch.testing.assert_close(without, empty, rtol=0, atol=NEGLIGIBLE * float(full.abs().max()))


@pytest.mark.parametrize("name", [make.__name__ for make in SINGLE])
def test_selection_by_exact_effects_is_the_circuit(name):
    t = task(name)
    graph = Graph.of(t.model)
    scores = edge_effects(*inputs(t), keep_items=True).abs().mean(0)
    for method in ("top", "greedy"):
        selected = select_edges(graph, scores, len(t.edges), method=method)
        assert torch.equal(selected, mask_of(t, t.edges)), method
    n = graph.n_edges
    curve = faithfulness_curve(*inputs(t), scores, sizes=(len(t.edges) / n, 1.0), n_random=3)
    assert float(curve.faithfulness[0]) == pytest.approx(1, abs=NEGLIGIBLE)
    assert curve.cmd < NEGLIGIBLE
    assert float(curve.random_cmd.min()) > 0.1


METHODS = ("EAP", "EAP-IG-inputs", "EAP-IG-activations")
SATURATED = ("induction_query", "EAP")  # see the next test


@pytest.mark.parametrize(
    ("name", "method"),
    [
        (make.__name__, method)
        for make in SINGLE
        for method in METHODS
        if (make.__name__, method) != SATURATED
    ],
)
def test_attribution_finds_the_circuit(name, method):
    t = task(name)
    found = attribute_edges(
        t.model, clean=t.clean, corrupt=t.corrupt, metric=t.metric, method=method, per_item=True
    )
    assert found.item_scores is not None
    scores = found.item_scores.abs().mean(0)
    selected = select_edges(Graph.of(t.model), scores, len(t.edges))
    assert torch.equal(selected, mask_of(t, t.edges))
    others = Graph.of(t.model).mask & ~mask_of(t, t.edges)
    assert float(scores[others].max()) < NEGLIGIBLE * float(gap(t).abs().mean())


def test_saturated_attention_hides_an_edge_from_the_plain_gradient():
    """Where a query attends with all its weight, the gradient at it is nil though the query decides
    the answer; the integrated gradient sees it."""
    t = task("induction_query")
    graph, scale = Graph.of(t.model), float(gap(t).mean())
    edge = graph.writer_index("embed"), graph.reader_index("q.1.1")
    score = {
        method: float(
            attribute_edges(
                t.model, clean=t.clean, corrupt=t.corrupt, metric=t.metric, method=method
            ).scores[edge]
        )
        for method in METHODS
    }
    assert score["EAP"] < NEGLIGIBLE * scale
    assert score["EAP-IG-inputs"] > 0.05 * scale
    assert float(edge_effects(*inputs(t))[edge]) == pytest.approx(scale, rel=NEGLIGIBLE)


@pytest.mark.parametrize("name", [make.__name__ for make in SINGLE])
def test_every_edge_of_the_circuit_is_needed(name):
    t = task(name)
    result = minimality(*inputs(t), mask_of(t, t.edges))
    assert bool((result.effect.amax(1) > 0.2 * gap(t).abs().mean()).all())
    wide = mask_of(t, t.edges)
    wide[:, -1] = True  # and some edges that are not
    table = minimality(*inputs(t), wide).to_table().set_index("part")["effect"]
    needed = {f"{writer} -> {reader}" for writer, reader in t.edges}
    assert float(table[[part for part in table.index if part not in needed]].abs().max()) < 0.01


def test_paths_of_the_induction_model():
    """Path patching: the head before matters for the keys of the induction head, and only there."""
    t = task("induction")
    model, full = t.model, gap(t)
    clean = t.metric(
        model.forward(t.clean, positions=-1)[:, t.metric.token_ids], torch.arange(len(full))
    )
    on_path = patch_path(model, t.clean, t.corrupt, ["head.0.0"], ["k.1.1"], t.metric)
    torch.testing.assert_close(clean - on_path, full, rtol=NEGLIGIBLE, atol=0)
    for receiver in ("q.1.1", "v.1.1", "k.1.0", "mlp.0", "mlp.1", "logits"):
        value = patch_path(model, t.clean, t.corrupt, ["head.0.0"], [receiver], t.metric)
        torch.testing.assert_close(value, clean, rtol=0, atol=NEGLIGIBLE * float(full.max()))
    for sender in ("head.0.1", "mlp.0", "embed"):
        value = patch_path(model, t.clean, t.corrupt, [sender], ["k.1.1"], t.metric)
        torch.testing.assert_close(value, clean, rtol=0, atol=NEGLIGIBLE * float(full.max()))


def test_a_redundant_path():
    """Either path is enough: noising finds neither, denoising both; a circuit with one of them is
    faithful, and completeness tells that the network has another."""
    t = task("two_paths")
    graph = Graph.of(t.model)
    scale = float(gap(t).mean())
    paths = {
        name: [e for e in t.edges if name in e[0] or e[1].startswith(f"v.{name[-3:]}")]
        for name in ("head.0.0", "head.1.0")
    }
    shared = ("mlp.1", "logits")
    noising = edge_effects(*inputs(t), direction="noising")
    denoising = edge_effects(*inputs(t), direction="denoising")
    expected = mask_of(t, t.edges)
    for edges in paths.values():
        assert len(edges) == 2
        part = mask_of(t, edges)
        assert float(noising[part].abs().max()) < NEGLIGIBLE * scale
        assert float(denoising[part].min()) > 0.9 * scale
    others = graph.mask & ~expected
    for effects in (noising, denoising):
        assert float(effects[others].abs().max()) < NEGLIGIBLE * scale

    one, other = (mask_of(t, [*edges, shared]) for edges in paths.values())
    neither = mask_of(t, [shared])
    values = run_circuits(t.model, t.clean, t.corrupt, [one, other, neither], t.metric)
    empty = values[2].mean()
    f = (values.mean(1) - empty) / scale
    torch.testing.assert_close(f, torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=NEGLIGIBLE)
    for circuit, cost in ((one, scale), (one | other, 0.0)):
        table = minimality(*inputs(t), circuit).to_table().set_index("part")["effect"]
        part = "head.0.0 -> mlp.1"
        assert float(table[part]) == pytest.approx(cost, abs=NEGLIGIBLE * scale)
    result = completeness(*inputs(t), one, n_random=0).to_table().set_index("subset")
    assert result["incompleteness"]["nothing"] == pytest.approx(0, abs=NEGLIGIBLE * scale)
    assert result["incompleteness"]["head.0.0"] == pytest.approx(scale, rel=NEGLIGIBLE)
    result = completeness(*inputs(t), one | other, n_random=4).to_table()
    assert float(result["incompleteness"].abs().max()) < NEGLIGIBLE * scale


def test_wrong_circuits_are_not_faithful():
    for make in SINGLE:
        t = task(make.__name__)
        graph = Graph.of(t.model)
        right = mask_of(t, t.edges)
        broken = right.clone()
        broken[tuple(right.nonzero()[0].tolist())] = False
        decoys = graph.mask & ~right
        values = run_circuits(t.model, t.clean, t.corrupt, [broken, decoys], t.metric)
        empty = run_circuits(
            t.model, t.clean, t.corrupt, [torch.zeros_like(right)], t.metric
        ).mean()
        f = (values.mean(1) - empty) / gap(t).mean()
        assert float(f[0]) < 0.6
        assert abs(float(f[1])) < NEGLIGIBLE
