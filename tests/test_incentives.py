"""Incentives to learn: the curve against finite differences, knowledge against closed forms."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq
from scipy.special import entr, expit, logit, rel_entr
from scipy.stats import spearmanr

import figures
from analyses.incentives import (
    COLUMNS,
    SYMMETRIC,
    incentive_slope,
    log_odds_bins,
    measure_incentives,
    pair_tables,
    relative_incentive,
)
from analyses.pair import Pair
from analyses.streams import DecisionStreams
from mechinterp import decisions, tasks
from mechinterp.checkpoints import save_checkpoint
from mechinterp.spec import AnalysisSpec, TaskSpec
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

WEIGHTS = (0.02, 1.98)
COSTS = {"symmetric": SYMMETRIC, "w1.98": decisions.diagonal_utility(WEIGHTS)}
TASK = tasks.get("triage", linear=(1.0, 0.7), xor=(1.3,), base_log_odds=0.4)


@pytest.fixture(scope="module")
def items():
    return TASK.sample(3_000)


def streams_of(log_odds) -> DecisionStreams:
    z = torch.as_tensor(log_odds)
    return DecisionStreams({}, {}, torch.stack([-z / 2, z / 2], 1))


def posterior_log_odds(items) -> np.ndarray:
    return logit(items.posterior[:, 1].numpy())


@pytest.mark.parametrize("weights", [(0.02, 1.98), (0.2, 1.8), (3.0, 0.5)])
def test_the_curve_is_the_curvature_of_what_can_be_learnt(weights):
    """-G'' of G(q) = W(q) H(p_u(q)), relative to symmetric costs, at every q."""

    def curvature(q, w, step=1e-4):
        def learning(q):
            worth = w[1] * q + w[0] * (1 - q)
            p_u = w[1] * q / worth
            return worth * (entr(p_u) + entr(1 - p_u))

        return -(learning(q + step) - 2 * learning(q) + learning(q - step)) / step**2

    q = np.linspace(0.02, 0.98, 49)
    posterior = torch.tensor(np.stack([1 - q, q], 1))
    found = relative_incentive(posterior, torch.tensor(weights, dtype=torch.float64))
    mean_worth = np.mean(weights[1] * q + weights[0] * (1 - q))
    expected = curvature(q, weights) / curvature(q, (1.0, 1.0)) / mean_worth
    np.testing.assert_allclose(found, expected, rtol=2e-3)


def test_the_curve_at_the_reference_values():
    """papers.md: 0.67 at q = .02, 0.040 at .5, 0.020 at .98, before the division by E[W]."""
    q = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    posterior = torch.stack([1 - q, q], 1)
    found = relative_incentive(posterior, torch.tensor(WEIGHTS, dtype=torch.float64))
    np.testing.assert_allclose(found, [0.67, 0.040, 0.020], rtol=0, atol=1.2e-3)  # here E[W] is 1


@settings(max_examples=20, deadline=None)
@given(st.floats(-6, 6), st.floats(0.1, 10))
def test_neither_a_threshold_nor_the_scale_of_the_costs_matters(items, shift, scale):
    """An exact weighted optimum, or any other shift of the posterior, knows all there is."""
    scaled = {"w": decisions.diagonal_utility([scale * w for w in WEIGHTS])}
    found = measure_incentives(
        streams_of(posterior_log_odds(items) + shift), items, costs={**COSTS, **scaled}
    )
    assert found["divergence"].abs().max() < 1e-6
    by_costs = {name: rows["predicted"].to_numpy() for name, rows in found.groupby("costs")}
    np.testing.assert_allclose(by_costs["symmetric"], 1)
    np.testing.assert_allclose(by_costs["w"], by_costs["w1.98"])


def test_a_network_that_knows_less_against_a_plain_loop(items):
    rng = np.random.default_rng(0)
    q = items.posterior[:, 1].numpy()
    log_odds = 0.6 * logit(q) + 1.7 + rng.normal(size=len(q))
    found = measure_incentives(streams_of(log_odds), items, costs=COSTS)
    assert list(found.columns) == list(COLUMNS)
    bias = brentq(lambda b: (q - expit(log_odds + b)).sum(), -10, 10, xtol=1e-12)
    q_hat = expit(log_odds + bias)
    divergence = rel_entr(q, q_hat) + rel_entr(1 - q, 1 - q_hat)
    worth = WEIGHTS[1] * q + WEIGHTS[0] * (1 - q)
    predicted = {"symmetric": np.ones(len(q))}
    predicted["w1.98"] = np.prod(WEIGHTS) / worth / worth.mean()
    for row in found.itertuples():
        inside = (logit(q) >= row.log_odds - 0.5) & (logit(q) < row.log_odds + 0.5)
        assert row.n_items == inside.sum()
        assert row.posterior == pytest.approx(q[inside].mean())
        assert row.predicted == pytest.approx(predicted[row.costs][inside].mean())
        assert row.divergence == pytest.approx(divergence[inside].mean(), rel=1e-4)
        spread = divergence[inside].std(ddof=1) / inside.sum() ** 0.5
        assert row.stderr == pytest.approx(spread, rel=1e-3)
    assert found.groupby("costs")["n_items"].sum().eq(len(items)).all()


def test_one_constant_needs_no_cross_fitting(items):
    """The constant of one half of the items serves the other as well as its own does."""
    rng = np.random.default_rng(1)
    q = items.posterior[:, 1].numpy()
    log_odds = 0.6 * logit(q) + 1.7 + rng.normal(size=len(q))
    halves = [slice(0, None, 2), slice(1, None, 2)]

    def divergence(on, fitted_on):
        bias = brentq(lambda b: (q - expit(log_odds + b))[fitted_on].sum(), -10, 10)
        q_hat = expit(log_odds + bias)
        return (rel_entr(q, q_hat) + rel_entr(1 - q, 1 - q_hat))[on].mean()

    crossed = np.mean([divergence(one, other) for one, other in (halves, halves[::-1])])
    found = measure_incentives(streams_of(log_odds), items, costs={"symmetric": SYMMETRIC})
    ours = np.average(found["divergence"], weights=found["n_items"])
    assert crossed == pytest.approx(ours, rel=0.005)


def test_bins_do_not_divide_items_of_one_posterior():
    """The settings of the first finding put every item on a half."""
    centre = tasks.get("triage", linear=(1.5, 1.5), xor=(2.5,)).sample(2_000)
    halves = np.round(posterior_log_odds(centre), 6)
    bins = log_odds_bins(centre.posterior).numpy()
    expected = {-5.5: -5, -2.5: -2, -0.5: 0, 0.5: 1, 2.5: 3, 5.5: 6}
    assert set(zip(halves, bins, strict=True)) == set(expected.items())
    certain = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    assert log_odds_bins(certain).tolist() == [-10, 10]


def test_what_cannot_be_predicted_is_left_out(items):
    streams = streams_of(posterior_log_odds(items))
    unusual = {
        "one action": [[1.0, 1.0], [0.0, 0.0]],  # the first is best for either label
        "worthless": [[0.0, 0.0], [0.0, 1.0]],
        "both sides": [[1.0, -1.0], [-2.0, 0.0]],  # less each column's worst: (3, 1)
    }
    found = measure_incentives(streams, items, costs={**COSTS, **unusual})
    assert set(found["costs"]) == {*COSTS, "both sides"}
    unknown = TASK.sample(50)
    unknown = type(unknown)(**{**vars(unknown), "posterior": None})
    three = DecisionStreams({}, {}, torch.zeros(50, 3, dtype=torch.float64))
    for empty in (
        measure_incentives(streams.select(slice(0, 50)), unknown, costs=COSTS),
        measure_incentives(three, TASK.sample(50), costs=COSTS),
        measure_incentives(streams, items, costs={"one action": unusual["one action"]}),
    ):
        assert empty.empty
        assert list(empty.columns) == list(COLUMNS)


def study_table(excess) -> pd.DataFrame:
    """Two seeds of a control and a weighted arm whose divergence exceeds it by `excess`."""
    log_odds = np.arange(-4, 5)
    q = expit(log_odds)
    bins = pd.DataFrame({"log_odds": log_odds, "posterior": q, "n_items": 50 + 40 * log_odds**2})
    worth = WEIGHTS[1] * q + WEIGHTS[0] * (1 - q)
    predicted = {"symmetric": np.ones(9), "w1.98": np.prod(WEIGHTS) / worth}
    rng = np.random.default_rng(2)
    parts = []
    for seed in range(2):
        base = 0.02 + 0.01 * rng.uniform(size=9)
        for arm in ("symmetric", "weighted_1.98", "focal"):
            extra = excess(predicted["w1.98"]) if arm == "weighted_1.98" else 0.0
            for costs, values in predicted.items():
                table = bins.assign(costs=costs, predicted=values, divergence=base + extra)
                keys = {"task": "triage", "regime": "branched", "seed": seed, "step": 240}
                parts.append(table.assign(arm=arm, **keys))
    return pd.concat(parts, ignore_index=True)


def test_the_slope_of_a_harm_that_follows_the_incentive():
    found = incentive_slope(study_table(lambda predicted: 0.1 - 0.03 * np.log(predicted)))
    assert len(found) == 2
    assert set(found["arm"]) == {"weighted_1.98"}
    assert set(found["costs"]) == {"w1.98"}
    np.testing.assert_allclose(found["slope"], -0.03)
    np.testing.assert_allclose(found["correlation"], -1)


def test_the_slope_is_the_weighted_least_squares_one():
    noise = np.random.default_rng(3).normal(size=9)
    table = study_table(lambda predicted: 0.05 * predicted + 0.02 * noise)
    bins = table[(table["arm"] == "weighted_1.98") & (table["costs"] == "w1.98")]
    bins = bins[bins["seed"] == 0]
    excess = 0.05 * bins["predicted"] + 0.02 * noise
    x = np.log(bins["predicted"])
    slope, _ = np.polyfit(x, excess, 1, w=np.sqrt(bins["n_items"]))
    found = incentive_slope(table)
    np.testing.assert_allclose(found["slope"], slope)
    np.testing.assert_allclose(found["correlation"], spearmanr(x, excess).statistic)


def test_no_harm_has_no_correlation_and_no_control_no_rows():
    table = study_table(lambda predicted: 0.0 * predicted)
    found = incentive_slope(table)
    assert (found["slope"] == 0).all()
    assert found["correlation"].isna().all()
    assert incentive_slope(table[table["arm"] != "symmetric"]).empty


def test_a_pair_leaves_its_table_and_its_figure(tmp_path):
    config = ModelConfig(n_layers=1, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    for seed, name in enumerate(("before", "after")):
        save_checkpoint(initial_model(config, TASK, seed=seed), tmp_path / name)
    spec = TaskSpec(
        task="triage",
        settings={"linear": [1.0, 0.7], "xor": [1.3], "base_log_odds": 0.4},
        costs={"w1.98": WEIGHTS},
        analysis=AnalysisSpec(ladder_items=500),  # type: ignore[call-arg]
    )
    tables = pair_tables(Pair.open(tmp_path / "before", tmp_path / "after", task=spec))
    rows = tables["incentives"]
    assert set(zip(rows["arm"], rows["costs"], strict=True)) == {
        *(("before", costs) for costs in COSTS),
        *(("after", costs) for costs in COSTS),
    }
    assert (rows["low"] < rows["divergence"]).all()
    figure = figures.FIGURES["incentives"].draw(tables)
    assert len(figure.axes) == 2
