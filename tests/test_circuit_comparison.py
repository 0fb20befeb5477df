"""Overlap, node changes and crosswise curves against sums written out."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import rankdata
from tiny_models import random_tokens, shared_model, tiny_model

from analyses.circuits import pair_tables
from analyses.pair import Pair
from mechinterp import tasks
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuit_comparison import crosswise_faithfulness, node_changes, overlap
from mechinterp.patching.circuits import edge_effects, faithfulness_curve
from mechinterp.patching.graph import Graph
from mechinterp.patching.metrics import logit_difference
from mechinterp.spec import AnalysisSpec

GRAPH = Graph(2, 4, 2, parallel=False, heads_write=True)


def scores(seed: int, n_items: int = 12, *, noise: float = 1.0, share: float = 1.0) -> torch.Tensor:
    """A pattern that all items share, which `share` of it comes from seed 0, and noise."""
    shape = GRAPH.mask.shape
    common = torch.randn(shape, generator=torch.Generator().manual_seed(0)) ** 3
    own = torch.randn(shape, generator=torch.Generator().manual_seed(100 + seed)) ** 3
    items = torch.randn(n_items, *shape, generator=torch.Generator().manual_seed(200 + seed))
    result = share * common + (1 - share) * own + noise * items
    return result.masked_fill(~GRAPH.mask, torch.nan)


def test_overlap_is_its_definition():
    before, after = scores(1), scores(2, share=0.5)
    table = overlap(GRAPH, before, after, top_shares=(0.1,), n_resamples=50).set_index("measure")
    edges = [(w, r) for w, r in GRAPH.mask.nonzero().tolist()]
    a, b = ([abs(float(x[:, w, r].mean())) for w, r in edges] for x in (before, after))
    k = round(0.1 * len(edges))
    top = [set(sorted(range(len(edges)), key=lambda i: -x[i])[:k]) for x in (a, b)]
    expected = {
        "jaccard_top_0.1": len(top[0] & top[1]) / len(top[0] | top[1]),
        "spearman": np.corrcoef(rankdata(a), rankdata(b))[0, 1],
        "weighted_jaccard": sum(map(min, a, b)) / sum(map(max, a, b)),
    }
    for name, value in expected.items():
        assert table.loc[name, "value"] == pytest.approx(value, abs=1e-6)
    assert bool((table["low"] <= table["high"]).all())
    doubled = overlap(GRAPH, before, 2 * before, top_shares=(0.1,), n_resamples=5)
    doubled = doubled.set_index("measure")["value"]
    assert doubled["weighted_jaccard"] == pytest.approx(0.5)
    assert doubled["weighted_jaccard_normalized"] == pytest.approx(1)
    assert doubled["spearman"] == pytest.approx(1)


def test_across_falls_below_within_only_where_something_changed():
    """Both pairs are noisy, so their overlap is far from 1; only one pair differs."""
    options = {"top_shares": (0.1,), "n_resamples": 20}
    same = overlap(GRAPH, scores(1, noise=3), scores(2, noise=3), **options).set_index("measure")
    other = overlap(GRAPH, scores(1, noise=3), scores(2, noise=3, share=0), **options)
    other = other.set_index("measure")
    for name in ("weighted_jaccard_normalized", "spearman"):
        assert same.loc[name, "value"] < 0.9
        assert abs(same.loc[name, "across"] - same.loc[name, "within"]) < 0.06
        assert other.loc[name, "across"] < other.loc[name, "within"] - 0.1


def test_chance_overlap():
    rng = np.random.default_rng(0)
    n = GRAPH.n_edges
    table = overlap(GRAPH, scores(1)[0], scores(2)[0], top_shares=(0.2,))
    assert table["low"].isna().all()  # no items, no interval
    k = round(0.2 * n)
    drawn = [[set(rng.choice(n, k, replace=False).tolist()) for _ in range(2)] for _ in range(3000)]
    mean = np.mean([len(a & b) / len(a | b) for a, b in drawn])
    assert table["chance"][0] == pytest.approx(mean, rel=0.05)


def test_moved_nodes():
    before = scores(1, noise=0.01)
    after = before.clone()
    row = GRAPH.writer_index("head.0.2")
    after[:, row] *= 10
    table = node_changes(GRAPH, before, after, n_resamples=100)
    assert table["node"][0] == "head.0.2"
    assert table["low"][0] > 0
    assert table["rank_after"][0] == 1
    mean = before.mean(0).abs().nansum(1)
    expected = float(mean[row] / mean.sum())
    assert table["before"][0] == pytest.approx(expected, abs=1e-6)
    assert float(table["before"].sum()) == pytest.approx(1)
    readers = node_changes(GRAPH, before, after, role="reader", n_resamples=10)
    assert set(readers["node"]) == {str(node) for node in GRAPH.readers}


def test_crosswise_curves_are_the_single_ones():
    models = {"before": shared_model("llama"), "after": HookedModel(tiny_model("llama", seed=1))}
    clean, corrupt = random_tokens(3, 6, seed=1), random_tokens(3, 6, seed=2)
    metric = logit_difference(correct=torch.tensor([1, 2, 3]), wrong=torch.tensor([5, 6, 7]))
    found = {name: edge_effects(m, clean, corrupt, metric) for name, m in models.items()}
    result = crosswise_faithfulness(
        lambda: models["before"],
        models["after"],
        clean,
        corrupt,
        metric,
        found["before"],
        found["after"],
        sizes=(0.1, 0.5, 1.0),
    )
    alone = faithfulness_curve(
        models["after"], clean, corrupt, metric, found["before"], sizes=(0.1, 0.5, 1.0)
    )
    curve = result.curves["before", "after"]
    torch.testing.assert_close(curve.values, alone.values)
    torch.testing.assert_close(curve.random_values, alone.random_values)
    again = crosswise_faithfulness(  # the own curve that is given is not measured again
        *models.values(), clean, corrupt, metric, *found.values(), own={"after": alone},
        sizes=(0.1, 0.5, 1.0),
    )  # fmt: skip
    assert again.curves["after", "after"] is alone
    torch.testing.assert_close(again.curves["before", "after"].values, curve.values)
    summary = result.summary(n_resamples=50).query("kind == 'scored'")
    cmd = summary.set_index(["circuit", "model"])["cmd"]
    assert cmd["before", "after"] == pytest.approx(alone.cmd)
    assert cmd["before", "before"] < cmd["after", "before"]  # each explains its own best
    assert cmd["after", "after"] < cmd["before", "after"]
    assert len(result.to_table(n_resamples=50)) == 4 * 2 * 3
    with pytest.raises(AnalysisError, match="differ"):
        crosswise_faithfulness(
            models["before"],
            shared_model("gpt2"),
            clean,
            corrupt,
            metric,
            found["before"],
            found["after"],
        )


def test_arms_stand_in_the_order_in_which_they_were_given(monkeypatch):
    """A set's order would be another in every process."""
    table = pd.DataFrame({"measure": ["spearman"]})
    monkeypatch.setattr("analyses.circuits.measure_circuit", lambda *_, **__: (None, None, {}))
    monkeypatch.setattr("analyses.circuits._compare", lambda *_: {"circuit_overlap": table})
    arms = ["before", *(f"arm {i}" for i in range(9))]
    models = dict.fromkeys(arms, shared_model("llama"))
    tables = pair_tables(Pair(models, tasks.get("triage"), AnalysisSpec(), {}))
    assert tables["circuit_overlap"]["arm"].tolist() == arms[1:]


def test_errors():
    with pytest.raises(AnalysisError, match="expected"):
        overlap(GRAPH, torch.zeros(3, 4), torch.zeros(3, 4))
    with pytest.raises(AnalysisError, match="role"):
        node_changes(GRAPH, scores(1), scores(2), role="edge")
