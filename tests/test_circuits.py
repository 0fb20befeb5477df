"""Runs with edges ablated, path patching and edge effects, against plain forward hooks."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from circuit_oracle import hooked_run, writers_of
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import D_VOCAB, FAMILIES, random_tokens, shared_model, tiny_model

from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.patching.circuits import (
    completeness,
    edge_effects,
    edges_of_nodes,
    faithfulness_curve,
    minimality,
    patch_path,
    run_circuits,
)
from mechinterp.patching.circuits.runs import MaskedRun
from mechinterp.patching.graph import Graph
from mechinterp.patching.metrics import log_prob, logit_difference

N_ITEMS, N_POSITIONS = 3, 6
RIGHT, WRONG = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])
METRIC = logit_difference(correct=RIGHT, wrong=WRONG)
NOISING = {"direction": "noising"}
ATOL = 2e-4  # of logits of several units; wrong code is off by tenths


def pairs(first: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    """Clean and corrupt prompts that differ in two tokens, from position `first` on."""
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=1)
    corrupt = clean.clone()
    for item, position in enumerate([3, first, 2]):
        corrupt[item, position] = (corrupt[item, position] + 3) % D_VOCAB
        corrupt[item, 4] = (corrupt[item, 4] + 9) % D_VOCAB
    return clean, corrupt


def score(logits: torch.Tensor, decision=-1, metric=METRIC) -> torch.Tensor:
    rows = torch.arange(len(logits))
    logits = logits[rows, torch.as_tensor(decision).expand(len(logits))]
    return metric(logits if metric.token_ids is None else logits[:, metric.token_ids], rows)


def random_circuits(graph: Graph, n: int, *, seed: int = 0) -> torch.Tensor:
    """Of few to many edges."""
    generator = torch.Generator().manual_seed(seed)
    shares = torch.linspace(0.1, 0.95, n)[:, None, None]
    return (torch.rand(n, *graph.mask.shape, generator=generator) < shares) & graph.mask


def names(graph: Graph, circuit: torch.Tensor) -> list[tuple[str, str]]:
    return [(str(graph.writers[w]), str(graph.readers[r])) for w, r in circuit.nonzero().tolist()]


def oracle(model: HookedModel, tokens, reference, circuit, mask=None) -> torch.Tensor:
    graph = Graph.of(model)
    ablated = names(graph, graph.mask & ~circuit)
    return hooked_run(model.model, tokens, reference, ablated, mask)[0]


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert float(expected.std()) > 0.05  # or the comparison would say nothing
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("family", FAMILIES)
def test_full_is_the_model_and_empty_is_the_reference(family, ablation):
    model, (clean, corrupt) = shared_model(family), pairs()
    mask = Graph.of(model).mask
    full, empty = run_circuits(
        model, clean, corrupt, [mask, torch.zeros_like(mask)], METRIC, ablation=ablation
    )
    assert_equal(full, score(model.forward(clean)))
    if ablation == "resample":
        assert_equal(empty, score(model.forward(corrupt)))
    assert float((full - empty).abs().min()) > 1e-3


@pytest.mark.parametrize("first", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_random_circuits_equal_plain_hooks(family, first):
    model, (clean, corrupt) = shared_model(family), pairs(first)
    circuits = random_circuits(Graph.of(model), 5)
    reference = writers_of(model.model, corrupt)
    expected = [score(oracle(model, clean, reference, circuit)) for circuit in circuits]
    actual = run_circuits(model, clean, corrupt, circuits, METRIC)
    assert_equal(actual, torch.stack(expected))


@pytest.mark.parametrize("family", ["llama_tied_bias", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("ablation", ["mean", "zero"])
def test_mean_and_zero_ablation_equal_plain_hooks(family, ablation):
    # In doubles: the oracle subtracts, and a norm blows up the rounding of what should be zero.
    model, (clean, corrupt) = HookedModel(tiny_model(family, dtype="float64")), pairs()
    circuits = random_circuits(Graph.of(model), 4, seed=1)
    others = random_tokens(7, N_POSITIONS, seed=5)
    reference = writers_of(model.model, others)
    if ablation == "mean":
        reference = {name: value.mean(0, keepdim=True) for name, value in reference.items()}
        tokens = others
    else:
        reference = {name: torch.zeros_like(value[:1]) for name, value in reference.items()}
        tokens = None
    expected = [score(oracle(model, clean, reference, circuit)) for circuit in circuits]
    actual = run_circuits(
        model, clean, corrupt, circuits, METRIC, ablation=ablation, reference_tokens=tokens
    )
    assert_equal(actual, torch.stack(expected))


def test_nodes_make_something_of_mean_inputs():
    """A node whose inputs are all means does not give the mean of its outputs."""
    model, (clean, corrupt) = shared_model("llama"), pairs()
    graph = Graph.of(model)
    kept = [("mlp.1", "logits"), ("head.0.1", "logits"), ("head.0.1", "mlp.2")]
    circuit = torch.zeros_like(graph.mask)
    for writer, reader in kept:
        circuit[graph.writer_index(writer), graph.reader_index(reader)] = True
    reference = {
        name: value.mean(0, keepdim=True)
        for name, value in writers_of(model.model, corrupt).items()
    }
    expected = score(oracle(model, clean, reference, circuit))
    options = {"ablation": "mean"}
    actual, empty = run_circuits(
        model, clean, corrupt, [circuit, torch.zeros_like(circuit)], METRIC, **options
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)
    assert float((actual - empty).abs().max()) > 0.01


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3", "gpt_neox"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_plain_hooks(family, side):
    model, (clean, corrupt) = shared_model(family), pairs()
    lengths = torch.tensor([6, 5, 4])
    position = torch.arange(N_POSITIONS)
    if side == "left":
        mask, decision = (position >= N_POSITIONS - lengths[:, None]).long(), -1
    else:
        mask, decision = (position < lengths[:, None]).long(), lengths - 1
    circuits = random_circuits(Graph.of(model), 3, seed=2)
    reference = writers_of(model.model, corrupt, mask)
    expected = [
        score(oracle(model, clean, reference, circuit, mask), decision) for circuit in circuits
    ]
    options = {"attention_mask": mask, "decision": decision}
    actual = run_circuits(model, clean, corrupt, circuits, METRIC, **options)
    assert_equal(actual, torch.stack(expected))
    alone = []
    for item, length in enumerate(lengths.tolist()):
        real = slice(N_POSITIONS - length, None) if side == "left" else slice(length)
        metric = logit_difference(correct=RIGHT[[item]], wrong=WRONG[[item]])
        rows = clean[item : item + 1, real], corrupt[item : item + 1, real]
        alone.append(run_circuits(model, *rows, circuits, metric)[:, 0])
    assert_equal(actual, torch.stack(alone, dim=1))


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_sdpa_and_another_decision_and_metric(family):
    eager, (clean, corrupt) = shared_model(family), pairs()
    sdpa = shared_model(family, "sdpa")
    metric, decision = log_prob(torch.tensor([3, 1, 2])), torch.tensor([2, 5, 3])
    circuits = random_circuits(Graph.of(eager), 3, seed=3)
    reference = writers_of(eager.model, corrupt)
    expected = [score(oracle(eager, clean, reference, c), decision, metric) for c in circuits]
    actual = run_circuits(sdpa, clean, corrupt, circuits, metric, decision=decision)
    assert_equal(actual, torch.stack(expected))


def test_chunks_change_nothing():
    model, (clean, corrupt) = shared_model("llama"), pairs()
    circuits = random_circuits(Graph.of(model), 6, seed=4)
    whole = run_circuits(model, clean, corrupt, circuits, METRIC)
    items = []
    for i in range(N_ITEMS):
        metric = logit_difference(correct=RIGHT[[i]], wrong=WRONG[[i]])
        items.append(run_circuits(model, clean[[i]], corrupt[[i]], circuits, metric)[:, 0])
    torch.testing.assert_close(whole, torch.stack(items, dim=1), rtol=0, atol=ATOL)
    small = run_circuits(model, clean, corrupt, circuits, METRIC, memory_mb=0)
    torch.testing.assert_close(whole, small, rtol=0, atol=ATOL)


def test_out_of_memory_halves_the_chunk(monkeypatch):
    model, (clean, corrupt) = shared_model("gpt2"), pairs()
    circuits = random_circuits(Graph.of(model), 4)
    whole = run_circuits(model, clean, corrupt, circuits, METRIC)
    final, rows = MaskedRun.final, []

    def small(run, keep, extra=None):
        rows.append(len(keep) * len(run.embed))
        if rows[-1] > 2:
            raise torch.OutOfMemoryError("out of memory")
        return final(run, keep, extra)

    monkeypatch.setattr(MaskedRun, "final", small)
    again = run_circuits(model, clean, corrupt, circuits, METRIC)
    torch.testing.assert_close(again, whole, rtol=0, atol=ATOL)
    assert max(rows) > 2 >= min(rows)


def test_half_precision():
    model, (clean, corrupt) = HookedModel(tiny_model("llama", dtype="bfloat16")), pairs()
    exact = shared_model("llama")
    circuits = random_circuits(Graph.of(model), 3)
    for ablation in ("resample", "mean"):
        rough, fine = (
            run_circuits(m, clean, corrupt, circuits, METRIC, ablation=ablation)
            for m in (model, exact)
        )
        assert rough.dtype == torch.bfloat16
        assert float((rough - fine).abs().max()) < 0.1 * float(fine.abs().max())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "olmo2"])
def test_an_ablated_node_is_a_patched_site(family):
    """With all edges out of one writer ablated, it is as if its activation had been exchanged."""
    model, (clean, corrupt) = shared_model(family), pairs()
    graph = Graph.of(model)
    nodes = [node for node in graph.writers if node.layer == 1 and node.head in (None, 2)]
    given = model.capture(corrupt, [node.site for node in nodes])
    expected, circuits = [], []
    for node in nodes:
        kept = torch.ones(len(graph.writers), dtype=torch.bool)
        kept[graph.writer_index(node)] = False
        circuits.append(edges_of_nodes(graph, kept))
        change = Intervention(node.site, given[node.site])
        expected.append(score(model.run_with_interventions(clean, [change])))
    actual = run_circuits(model, clean, corrupt, circuits, METRIC)
    assert_equal(actual, torch.stack(expected))


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied_bias", "gpt2", "gpt_neox", "gemma2", "qwen3", "olmo2", "phi3"]
)
def test_edge_effects_equal_plain_hooks_one_edge_at_a_time(family):
    model, (clean, corrupt) = shared_model(family), pairs()
    graph = Graph.of(model)
    reference = writers_of(model.model, corrupt)
    base = score(model.forward(clean))
    effects = edge_effects(model, clean, corrupt, METRIC, **NOISING, keep_items=True)
    assert bool(effects[:, ~graph.mask].isnan().all())
    expected = torch.full_like(effects, torch.nan)
    for w, r in graph.mask.nonzero().tolist():
        edge = (str(graph.writers[w]), str(graph.readers[r]))
        expected[:, w, r] = score(hooked_run(model.model, clean, reference, [edge])[0]) - base
    assert_equal(effects[:, graph.mask], expected[:, graph.mask])
    mean = edge_effects(model, clean, corrupt, METRIC, **NOISING)
    torch.testing.assert_close(mean, effects.mean(0), equal_nan=True)
    reverse = edge_effects(model, corrupt, clean, METRIC, keep_items=True)
    torch.testing.assert_close(reverse, effects, rtol=0, atol=ATOL, equal_nan=True)
    edges = [("embed", "mlp.1"), ("mlp.0", "logits")]
    some = edge_effects(model, clean, corrupt, METRIC, **NOISING, edges=edges, memory_mb=0)
    assert int((~some.isnan()).sum()) == 2
    torch.testing.assert_close(some[~some.isnan()], mean[~some.isnan()], rtol=0, atol=ATOL)


def test_one_ablated_edge_is_the_same_either_way():
    model, (clean, corrupt) = shared_model("llama"), pairs()
    graph = Graph.of(model)
    effects = edge_effects(model, clean, corrupt, METRIC, **NOISING, keep_items=True)
    edges = graph.mask.nonzero()[::7]
    circuits = []
    for w, r in edges.tolist():
        circuits.append(graph.mask.clone())
        circuits[-1][w, r] = False
    values = run_circuits(model, clean, corrupt, [graph.mask, *circuits], METRIC)
    assert_equal(values[1:] - values[0], effects[:, edges[:, 0], edges[:, 1]].T)


PATHS = {
    "llama": [
        (["head.0.1"], ["q.1.0"]),
        (["head.0.1", "mlp.0"], ["k.1.0", "v.2.1", "mlp.1"]),
        (["mlp.1"], ["logits"]),
        (["head.1.3", "head.0.0"], ["v.1.1", "q.2.3", "logits"]),
    ],
    "gpt2": [(["head.0.2"], ["v.1.1"]), (["mlp.0"], ["q.2.0", "k.2.0", "mlp.2"])],
    "gpt_neox": [(["head.0.2"], ["v.1.1"]), (["embed", "mlp.1"], ["mlp.1", "q.2.0"])],
    "gemma2": [(["attn.0"], ["k.1.1"]), (["mlp.0", "embed"], ["v.1.0", "q.2.2", "mlp.1"])],
}


@pytest.mark.parametrize(
    ("family", "senders", "receivers"), [(f, *path) for f, paths in PATHS.items() for path in paths]
)
def test_path_patching_equals_plain_hooks(family, senders, receivers):
    """Wang et al.'s four steps, written out: two plain runs, what the receivers then read, and a
    run in which they read that."""
    model, (clean, corrupt) = shared_model(family), pairs()
    graph = Graph.of(model)
    own, other = (writers_of(model.model, tokens) for tokens in (clean, corrupt))
    changes = {}
    for reader in receivers:
        before = {str(writer) for writer in graph.writers_before(reader)}
        direct = [other[s] - own[s] for s in senders if s in before]
        changes[reader] = sum(direct, torch.zeros_like(own["embed"]))
    expected = score(hooked_run(model.model, clean, own, [], fixed=changes)[0])
    actual = patch_path(model, clean, corrupt, senders, receivers, METRIC)
    assert_equal(actual, expected)
    assert float((actual - score(model.forward(clean))).abs().max()) > 1e-3


def test_the_direct_path_to_the_logits_is_an_edge():
    model, (clean, corrupt) = shared_model("llama"), pairs()
    for sender in ("head.1.2", "mlp.2", "embed"):
        value = patch_path(model, clean, corrupt, [sender], ["logits"], METRIC)
        effect = edge_effects(
            model, clean, corrupt, METRIC, **NOISING, edges=[(sender, "logits")], keep_items=True
        )
        effect = effect[:, Graph.of(model).writer_index(sender), -1]
        torch.testing.assert_close(value - score(model.forward(clean)), effect, rtol=0, atol=ATOL)


def test_own_values_change_nothing():
    model, (clean, _) = shared_model("qwen3"), pairs()
    circuits = random_circuits(Graph.of(model), 3)
    plain = score(model.forward(clean))
    values = run_circuits(model, clean, clean, circuits, METRIC)
    torch.testing.assert_close(values, plain.expand(3, -1), rtol=0, atol=1e-5)
    effects = edge_effects(model, clean, clean, METRIC)
    assert bool((effects[~effects.isnan()] == 0).all())
    patched = patch_path(model, clean, clean, ["embed"], ["v.1.0"], METRIC)
    torch.testing.assert_close(patched, plain, rtol=0, atol=1e-5)


@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_circuit_of_any_prompts(data):
    family = data.draw(st.sampled_from(["llama", "gpt2", "gpt_neox", "gemma3"]))
    model = shared_model(family)
    n_items, length = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 6))
    seeds = st.integers(0, 10_000)
    clean, corrupt = (random_tokens(n_items, length, seed=data.draw(seeds)) for _ in range(2))
    circuits = random_circuits(Graph.of(model), 2, seed=data.draw(seeds))
    reference = writers_of(model.model, corrupt)
    expected = torch.stack([score(oracle(model, clean, reference, c)) for c in circuits])
    actual = run_circuits(model, clean, corrupt, circuits, METRIC)
    torch.testing.assert_close(actual, expected, rtol=0, atol=ATOL)


@cache
def curve_inputs():
    model, (clean, corrupt) = shared_model("llama"), pairs()
    return model, clean, corrupt, edge_effects(model, clean, corrupt, METRIC, **NOISING)


def test_faithfulness_curve_is_its_definition():
    model, clean, corrupt, scores = curve_inputs()
    sizes = (0.05, 0.2, 0.6, 1.0)
    curve = faithfulness_curve(model, clean, corrupt, METRIC, scores, sizes=sizes, n_random=2)
    full, empty = score(model.forward(clean)), score(model.forward(corrupt))
    torch.testing.assert_close(curve.full, full, rtol=0, atol=ATOL)
    torch.testing.assert_close(curve.empty, empty, rtol=0, atol=ATOL)
    graph = Graph.of(model)
    edges = sorted(
        names(graph, graph.mask),
        key=lambda e: -abs(scores[graph.writer_index(e[0]), graph.reader_index(e[1])]),
    )
    reference = writers_of(model.model, corrupt)
    f = []
    for i, size in enumerate(sizes):  # unpruned: pruning must not matter under resampling
        ablated = edges[round(size * len(edges)) :]
        values = score(hooked_run(model.model, clean, reference, ablated)[0])
        torch.testing.assert_close(curve.values[i], values, rtol=0, atol=ATOL)
        f.append(float((values.mean() - empty.mean()) / (full.mean() - empty.mean())))
    torch.testing.assert_close(curve.faithfulness, torch.tensor(f).double(), rtol=0, atol=1e-3)
    areas = [
        sum((b - a) * (x + y) / 2 for a, b, x, y in zip(sizes, sizes[1:], g, g[1:], strict=False))
        for g in (f, [abs(1 - y) for y in f])
    ]
    assert (curve.cpr, curve.cmd) == pytest.approx(tuple(areas), abs=1e-3)
    assert curve.random_values.shape == (2, 4, N_ITEMS)
    table = curve.to_table(n_resamples=200)
    assert list(table[table["kind"] == "scored"]["share"]) == list(sizes)
    assert len(table) == 12
    assert bool((table["low"] <= table["high"]).all())
    summary = curve.summary(n_resamples=200)
    assert summary["cpr"][0] == pytest.approx(curve.cpr)
    assert summary["cmd"][2] == pytest.approx(float(curve.random_cmd[1]))


@pytest.mark.parametrize("ablation", ["resample", "mean", "zero"])
@pytest.mark.parametrize("method", ["top", "greedy"])
def test_curves_end_at_one(ablation, method):
    model, clean, corrupt, scores = curve_inputs()
    curve = faithfulness_curve(
        model, clean, corrupt, METRIC, scores, sizes=(0.1, 1), ablation=ablation, method=method
    )
    assert float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-4)
    assert float(curve.random_faithfulness[0, -1]) == pytest.approx(1, abs=1e-4)


def test_node_scores_make_node_circuits():
    model, clean, corrupt, scores = curve_inputs()
    nodes = scores.abs().nansum(1)
    curve = faithfulness_curve(model, clean, corrupt, METRIC, nodes, sizes=(0.5, 1.0))
    assert float(curve.faithfulness[-1]) == pytest.approx(1, abs=1e-4)
    graph = Graph.of(model)
    kept = torch.zeros(len(nodes), dtype=torch.bool)
    kept[nodes.argsort(descending=True)[:8]] = True
    value = run_circuits(model, clean, corrupt, [edges_of_nodes(graph, kept)], METRIC)
    torch.testing.assert_close(curve.values[0], value[0], rtol=0, atol=ATOL)


def test_a_point_costs_at_most_a_forward_pass():
    model, clean, corrupt, scores = curve_inputs()
    rows = []  # items through an MLP
    handles = [
        block.mlp.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
        for block in model.architecture.blocks
    ]
    sizes = [0.1 * i for i in range(1, 11)]
    try:
        faithfulness_curve(model, clean, corrupt, METRIC, scores, sizes=sizes, n_random=0)
    finally:
        for handle in handles:
            handle.remove()
    empty, two_plain_runs, check = N_ITEMS, 2 * N_ITEMS, 3
    most = len(sizes) * N_ITEMS + empty + two_plain_runs + check
    assert sum(rows) <= most * model.n_layers


def test_minimality_and_completeness_equal_plain_hooks():
    model, clean, corrupt, scores = curve_inputs()
    graph = Graph.of(model)
    circuit = scores.nan_to_num().abs() > scores.nan_to_num().abs().flatten().topk(40).values[-1]
    reference = writers_of(model.model, corrupt)

    def value(kept: torch.Tensor) -> torch.Tensor:
        return score(oracle(model, clean, reference, kept & graph.mask))

    by_edge = minimality(model, clean, corrupt, METRIC, circuit)
    w, r = circuit.nonzero()[5].tolist()
    without = circuit.clone()
    without[w, r] = False
    assert by_edge.parts[5] == f"{graph.writers[w]} -> {graph.readers[r]}"
    torch.testing.assert_close(
        by_edge.effect[5], value(circuit) - value(without), rtol=0, atol=ATOL
    )
    table = by_edge.to_table()
    assert len(table) == int(circuit.sum())
    assert table["effect"].abs().is_monotonic_decreasing
    by_node = minimality(model, clean, corrupt, METRIC, circuit, by="node")
    assert by_node.parts[0] == "embed"
    without = circuit.clone()
    without[0] = False
    torch.testing.assert_close(by_node.values[0], value(without), rtol=0, atol=ATOL)

    complete = completeness(model, clean, corrupt, METRIC, circuit, n_random=2)
    assert complete.subsets[0] == "nothing"
    node = complete.subsets[2]
    gone = torch.zeros_like(graph.mask)
    gone[graph.writer_index(node)] = True
    for actual, whole in ((complete.circuit_values, circuit), (complete.model_values, graph.mask)):
        torch.testing.assert_close(actual[2], value(whole & ~gone), rtol=0, atol=ATOL)
    assert set(complete.to_table()["subset"]) == set(complete.subsets)
    named = completeness(
        model, clean, corrupt, METRIC, circuit, subsets={"both": ["mlp.0", "mlp.1"]}
    )
    assert named.subsets == ("both",)


def test_errors_are_one_line():
    model, (clean, corrupt) = shared_model("llama"), pairs()
    graph = Graph.of(model)
    for arguments, options, message in (
        ((clean, corrupt[:2], [graph.mask]), {}, "equal shape"),
        ((clean, corrupt, [graph.mask[:3]]), {}, "expected booleans"),
        ((clean, corrupt, [graph.mask]), {"ablation": "noise"}, "expected one of resample"),
        ((clean, corrupt, [graph.mask]), {"decision": 6}, "decision"),
        ((clean, corrupt, [graph.mask]), {"reference_tokens": clean}, "for mean ablation only"),
    ):
        with pytest.raises(AnalysisError, match=message) as caught:
            run_circuits(model, *arguments, METRIC, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(AnalysisError, match="a sender must come before"):
        patch_path(model, clean, corrupt, ["mlp.2"], ["q.1.0"], METRIC)
    with pytest.raises(AnalysisError, match="no edge mlp"):
        edge_effects(model, clean, corrupt, METRIC, edges=[("mlp.2", "q.1.0")])
    scores = torch.zeros(graph.mask.shape)
    with pytest.raises(AnalysisError, match="ascending shares"):
        faithfulness_curve(model, clean, corrupt, METRIC, scores, sizes=(0.5, 0.2))


def test_a_network_with_another_path_is_refused():
    """Attention that looks at its input besides the projections cannot be run reader by reader."""
    raw = tiny_model("llama")
    clean, corrupt = pairs()
    model = HookedModel(raw)
    attention = raw.model.layers[1].self_attn
    plain = attention.o_proj.forward

    def leak(x):
        return plain(x) + 0.1 * attention.leak

    def see(module, args, kwargs):
        attention.leak = kwargs["hidden_states"]

    attention.register_forward_pre_hook(see, with_kwargs=True)
    attention.o_proj.forward = leak
    with pytest.raises(ModelError, match="cannot be run"):
        run_circuits(model, clean, corrupt, [Graph.of(model).mask], METRIC)


def test_an_adapter_is_refused():
    raw = tiny_model("llama")
    model = HookedModel(raw)
    attention = raw.model.layers[0].self_attn

    class Adapter(torch.nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, x):
            return self.inner(x)

    attention.q_proj = Adapter(attention.q_proj)
    model = HookedModel(raw)
    clean, corrupt = pairs()
    with pytest.raises(ModelError, match="merge adapters"):
        run_circuits(model, clean, corrupt, [Graph.of(model).mask], METRIC)
