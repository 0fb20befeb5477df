"""Inference over a map against scipy, TransformerLens, `mechinterp.statistics` cell by cell, plain
loops, and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformer_lens.utilities.statistics import bootstrap_ci, sign_flip_permutation_pvalue

from mechinterp import statistics
from mechinterp.errors import AnalysisError
from mechinterp.patching.inference import (
    adjust_false_discovery,
    compare_maps,
    infer_map,
    mean_intervals,
    sign_flip_p_values,
)
from mechinterp.randomness import derive_rng

SHAPE = (3, 4)  # layers, positions


def effects(n_items: int, *, seed: int = 0, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    """Skewed, correlated between cells, and with a mean in some."""
    rng = np.random.default_rng(seed)
    x = rng.exponential(1, (n_items, *shape)) - 1 + rng.normal(0, 1, (n_items, *[1] * len(shape)))
    return torch.tensor(x + np.linspace(0, 1.5, int(np.prod(shape))).reshape(shape))


def cells(x: torch.Tensor) -> np.ndarray:
    return x.flatten(1).T.numpy()


# ---- intervals -----------------------------------------------------------------------------------


def test_bca_is_scipys():
    """With the same resamples, the same interval, cell by cell."""
    x = effects(15)
    low, high = mean_intervals(x, interval="bca", n_resamples=1_000, seed=3)
    expected = scipy.stats.bootstrap(
        (x.numpy(),), np.mean, n_resamples=1_000, method="BCa", rng=derive_rng(3, "bootstrap")
    ).confidence_interval
    np.testing.assert_allclose(low, expected.low, atol=1e-9)
    np.testing.assert_allclose(high, expected.high, atol=1e-9)


@pytest.mark.parametrize("grouped", [False, True])
def test_bootstrap_t_of_each_cell_is_that_of_its_items_alone(grouped):
    x = effects(30)
    groups = np.arange(30) // 2 + 100 if grouped else None
    low, high = mean_intervals(x, groups=groups, seed=2, level=0.9)
    for i, values in enumerate(cells(x)):
        one = statistics.bootstrap_t_interval(values, groups=groups, seed=2, level=0.9)
        assert (low.flatten()[i], high.flatten()[i]) == pytest.approx((one.low, one.high), abs=1e-9)


def test_student_is_the_t_interval():
    x = effects(12)
    low, high = mean_intervals(x, interval="student")
    for i, values in enumerate(cells(x)):
        one = statistics.t_interval(values)
        assert (low.flatten()[i], high.flatten()[i]) == pytest.approx((one.low, one.high))


@pytest.mark.parametrize("interval", ["bootstrap_t", "bca"])
def test_intervals_of_many_symmetric_items_are_transformer_lenss(interval):
    x = torch.randn(400, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    low, high = mean_intervals(x, interval=interval)
    expected = bootstrap_ci(x, dim=0, n_resamples=4_000)
    for found, bound in zip((low, high), expected, strict=True):
        assert float((found - bound).abs().max()) < 0.06 * float((high - low).mean())


@pytest.mark.parametrize("interval", ["bootstrap_t", "bca", "student"])
def test_absent_items_are_left_out(interval):
    """A cell with absent items has about the interval of its other items; and the other cells are
    what they were."""
    x = effects(200)
    x[150:, 1, 2] = torch.nan
    low, high = mean_intervals(x, interval=interval)
    alone = mean_intervals(x[:150, 1, 2], interval=interval)
    width = float(alone[1] - alone[0])
    assert (float(low[1, 2]), float(high[1, 2])) == pytest.approx(
        [float(bound) for bound in alone], abs=0.06 * width
    )
    x[:, 1, 2] = 0
    complete = mean_intervals(x, interval=interval)
    for bound, expected in zip((low, high), complete, strict=True):
        bound[1, 2] = expected[1, 2]
        torch.testing.assert_close(bound, expected)


@pytest.mark.parametrize("interval", ["bootstrap_t", "bca", "student"])
def test_cells_that_say_little(interval):
    x = effects(10)
    x[:, 0, 0] = 0.0
    x[:, 0, 1] = 2.0
    x[:, 0, 2] = torch.nan
    x[1:, 0, 3] = torch.nan
    found = infer_map(x, interval=interval, n_resamples=200)
    for name, expected in {
        "mean": [0, 2, np.nan, float(x[0, 0, 3])],
        "low": [0, 2, np.nan, np.nan],
        "high": [0, 2, np.nan, np.nan],
        "n": [10, 10, 0, 1],
        "p": [1, 2**-9, np.nan, 1],
        "smallest_p": [2**-9, 2**-9, np.nan, 1],
    }.items():
        np.testing.assert_allclose(getattr(found, name)[0], expected, atol=1e-12, err_msg=name)
    assert found.q[0, 0] == found.p_familywise[0, 0] == 1
    assert np.isnan([found.q[0, 2], found.p_familywise[0, 2]]).all()
    # What cannot have an effect is no test.
    rest = x.flatten(1)[:, [1, *range(3, 12)]]
    torch.testing.assert_close(
        found.q.flatten()[[1, *range(3, 12)]], infer_map(rest, n_resamples=10).q
    )


@pytest.mark.parametrize("interval", ["bootstrap_t", "bca"])
def test_memory_bounds_change_nothing(interval, monkeypatch):
    x, groups = effects(40), np.arange(40) // 2
    options = {"groups": groups, "interval": interval, "n_resamples": 700, "n_flips": 1_500}
    expected = infer_map(x, **options)
    monkeypatch.setattr("mechinterp.patching.resampling._cells_per_chunk", lambda *_: 5)
    found = infer_map(x, **options)
    for name in ("low", "high", "p", "p_familywise"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


def test_intervals_cover():
    """Simulation: 600 cells of skewed effects are 600 trials. Bootstrap-t covers where the
    percentile bootstrap does not."""
    x = torch.tensor(np.random.default_rng(0).exponential(1, (20, 600)))
    coverage = {}
    for interval in ("bootstrap_t", "bca"):
        low, high = mean_intervals(x, interval=interval, n_resamples=1_000)
        coverage[interval] = float(((low <= 1) & (high >= 1)).double().mean())
    low, high = bootstrap_ci(x, dim=0)
    percentile = float(((low <= 1) & (high >= 1)).double().mean())
    assert abs(coverage["bootstrap_t"] - 0.95) < 0.025
    assert percentile < coverage["bca"] < coverage["bootstrap_t"]


# ---- p-values ------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_items", [7, 30])
def test_p_values_of_each_cell_are_those_of_its_items_alone(n_items):
    x = effects(n_items)
    p, _ = sign_flip_p_values(x, seed=5)
    for i, values in enumerate(cells(x)):
        assert float(p.flatten()[i]) == statistics.sign_flip_test(values, seed=5)


def test_p_values_are_scipys_and_transformer_lenss():
    x = effects(9)
    p, _ = sign_flip_p_values(x)
    expected = scipy.stats.permutation_test(
        (x.numpy(), np.zeros_like(x.numpy())),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    np.testing.assert_allclose(p, expected.pvalue)
    torch.testing.assert_close(p, sign_flip_permutation_pvalue(x, dim=0))


def test_groups_flip_together():
    x, groups = effects(12), np.array([3, 1, 1, 2, 2, 2, 0, 3, 5, 4, 4, 0])
    p, _ = sign_flip_p_values(x, groups=torch.tensor(groups))
    sums = torch.stack([x[torch.tensor(groups == g)].sum(0) for g in np.unique(groups)])
    torch.testing.assert_close(p, sign_flip_p_values(sums)[0])


def plain_step_down(x: np.ndarray) -> np.ndarray:
    """Westfall and Young's procedure, written out: all sign flips of items x cells."""
    flips = [np.array(s) for s in itertools.product((1, -1), repeat=len(x))]
    scale = np.sqrt((x**2).sum(0))

    def statistic(signs: np.ndarray) -> np.ndarray:
        return np.abs((signs[:, None] * x).sum(0)) / scale

    observed = statistic(np.ones(len(x)))
    flipped = np.array([statistic(signs) for signs in flips])
    adjusted, remaining, so_far = np.empty(x.shape[1]), set(range(x.shape[1])), 0.0
    for cell in np.argsort(-observed, kind="stable"):
        largest = flipped[:, sorted(remaining)].max(1)
        so_far = max(so_far, float(np.mean(largest >= observed[cell] - 1e-9)))
        adjusted[cell] = so_far
        remaining.remove(cell)
    return adjusted


@pytest.mark.parametrize("seed", range(3))
def test_familywise_p_values_are_the_step_down_procedure(seed):
    x = effects(7, seed=seed)
    p, familywise = sign_flip_p_values(x)
    expected = plain_step_down(x.flatten(1).numpy())
    np.testing.assert_allclose(familywise.flatten(), expected)
    assert bool((familywise >= p).all())


def test_familywise_p_values_use_the_dependence():
    """The same cell many times over is one test; independent cells cost as Holm's method says."""
    one = effects(10)[:, 0, 3] + 0.5
    p, familywise = sign_flip_p_values(one[:, None].expand(-1, 50))
    torch.testing.assert_close(familywise, p)
    x = torch.randn(40, 30, generator=torch.Generator().manual_seed(0)).double() + 0.3
    p, familywise = sign_flip_p_values(x)
    assert float((familywise - torch.tensor(statistics.holm(p))).clamp(min=0).max()) < 0.01


def test_familywise_errors_are_controlled():
    """Simulation: of 200 maps without any effect about 5% have a cell called at .05."""
    called = []
    for seed in range(200):
        x = np.random.default_rng(seed).standard_t(3, (24, 12))
        found = infer_map(torch.tensor(x), n_flips=500, n_resamples=10, seed=seed)
        called.append([float(found.p_familywise.min()) <= 0.05, float(found.p.min()) <= 0.05])
    familywise, per_cell = np.mean(called, axis=0)
    assert 0.01 < familywise < 0.09
    assert per_cell > 0.3


# ---- false discoveries ---------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["bh", "by"])
@given(p=st.lists(st.floats(0, 1), min_size=1, max_size=9))
@settings(deadline=None)
def test_q_values_reject_what_the_step_up_procedure_rejects(method, p):
    q = adjust_false_discovery(p, method=method)
    m = len(p)
    allowance = 0.1 / (1 if method == "bh" else sum(1 / i for i in range(1, m + 1)))
    ranked = np.sort(p)
    passing = [k for k in range(1, m + 1) if ranked[k - 1] <= allowance * k / m + 1e-12]
    threshold = ranked[passing[-1] - 1] if passing else -1
    np.testing.assert_array_equal(q <= 0.1 + 1e-11, np.array(p) <= threshold)


def test_q_values_are_statsmodelss():
    multitest = pytest.importorskip("statsmodels.stats.multitest")
    p = np.random.default_rng(0).uniform(size=40) ** 3
    for method, name in {"bh": "fdr_bh", "by": "fdr_by"}.items():
        expected = multitest.multipletests(p, method=name)[1]
        np.testing.assert_allclose(adjust_false_discovery(p, method=method), expected)


def test_q_values_keep_their_shape_and_leave_nan_out():
    p = np.array([[0.01, np.nan], [0.02, 0.5]])
    q = adjust_false_discovery(p)
    np.testing.assert_allclose(q, [[0.03, np.nan], [0.03, 0.5]])
    found = infer_map(effects(12), false_discovery="by", n_resamples=10)
    np.testing.assert_allclose(found.q, adjust_false_discovery(found.p, method="by"))


# ---- two maps, tables, refusals ------------------------------------------------------------------


def test_two_maps_of_the_same_items_are_compared_item_by_item():
    before, after = effects(20).float(), effects(20, seed=1).float()
    before[3, 0, 0] = torch.nan
    found = compare_maps(before, after, n_resamples=300)
    change = after.double() - before.double()
    assert int(found.n[0, 0]) == 19
    expected = infer_map(change, n_resamples=300)
    for name in ("mean", "low", "high", "p", "q"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))
    for i, values in enumerate(cells(change)[1:], start=1):
        assert float(found.p.flatten()[i]) == statistics.sign_flip_test(values)
    same = compare_maps(before, before)
    assert bool((same.p == 1).all())
    assert bool((same.mean == 0).all())


def test_table():
    found = infer_map(effects(10), n_resamples=50)
    table = found.to_table(["layer", "role"], {"role": ["a", "b", "c", "d"]})
    assert list(table.columns) == "layer role mean low high p q p_familywise n".split()
    row = table[(table["layer"] == 1) & (table["role"] == "c")].iloc[0]
    for name in ("mean", "low", "high", "p", "q", "p_familywise", "n"):
        assert row[name] == float(getattr(found, name)[1, 2])
    whole = infer_map(effects(10)[:, 0, 0], n_resamples=50)
    pd.testing.assert_frame_equal(
        whole.to_table([]).drop(columns=["q", "p_familywise"]),
        table.iloc[:1, 2:].drop(columns=["q", "p_familywise"]),
    )
    assert float(whole.q) == float(whole.p)


def test_refusals():
    x = effects(5)
    for bad, match in (
        (lambda: infer_map(torch.full((3, 2), torch.inf)), "infinite"),
        (lambda: infer_map(torch.zeros(0, 2)), "items"),
        (lambda: infer_map(x, groups=[1, 2]), "groups"),
        (lambda: infer_map(x, interval="percentile"), "interval"),
        (lambda: infer_map(x, level=95), "level"),
        (lambda: infer_map(x, false_discovery="holm"), "false_discovery"),
        (lambda: adjust_false_discovery([1.2]), "0 to 1"),
        (lambda: compare_maps(x, x[:4]), "same items"),
        (lambda: infer_map(x).to_table(["layer"]), "axes"),
        (lambda: infer_map(x).to_table(["a", "b"], {"a": [1]}), "labels"),
    ):
        with pytest.raises(AnalysisError, match=match):
            bad()


@pytest.mark.parametrize("n_touched", [1, 2, 4])
def test_a_few_effects_among_zeros_have_the_t_interval(n_touched):
    """Most pairs can be untouched by a patch; studentised resamples of the rest explode."""
    effects = torch.zeros(48, 2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(n_touched)
    effects[:n_touched] = 1 + torch.randn(n_touched, 2, generator=generator, dtype=torch.float64)
    found, student = infer_map(effects), infer_map(effects, interval="student")
    torch.testing.assert_close(found.high, student.high)
    torch.testing.assert_close(found.low, student.low)
    assert float(found.high.max()) < 3


def test_resamples_of_equal_values_do_not_explode():
    effects = torch.full((40, 1), 0.1, dtype=torch.float64)
    effects[:3] = torch.tensor([[0.4], [0.1 + 1e-3], [0.2]], dtype=torch.float64)
    found = infer_map(effects)
    assert -10 < float(found.low) < float(found.high) < 10
