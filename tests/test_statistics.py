"""Intervals and tests against scipy, closed forms and enumeration; coverage by simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp import statistics
from mechinterp.errors import AnalysisError

values = st.lists(st.floats(-10, 10, width=32), min_size=2, max_size=9)


@pytest.mark.filterwarnings("ignore:Precision loss")
@settings(deadline=None)
@given(values, st.sampled_from([0.8, 0.95, 0.99]))
def test_t_interval_is_scipys(x, level):
    found = statistics.t_interval(x, level=level)
    expected = scipy.stats.ttest_1samp(x, 0).confidence_interval(level)
    assert found.n == len(x)
    if np.std(x) > 1e-6:
        assert (found.low, found.high) == pytest.approx(tuple(expected), rel=1e-9, abs=1e-9)
        p = scipy.stats.ttest_1samp(x, 0).pvalue
        assert statistics.t_test(x) == pytest.approx(p, rel=1e-6, abs=1e-12)


def test_groups_of_one_size_are_their_means_and_others_weigh_by_their_items():
    x = np.random.default_rng(0).normal(0.1, 1, (20, 3))
    groups = np.repeat(np.arange(20), 3)
    own, means = (
        statistics.t_interval(values, **how)
        for values, how in ((x.ravel(), {"groups": groups}), (x.mean(1), {}))
    )
    assert (own.mean, own.low, own.n) == pytest.approx((means.mean, means.low, means.n))
    assert statistics.t_test(x.ravel(), groups=groups) == pytest.approx(
        statistics.t_test(x.mean(1))
    )
    y, sizes = x[:, 0], np.arange(1, 21)
    found = statistics.t_interval(y.repeat(sizes), groups=np.arange(20).repeat(sizes))
    mean = np.average(y, weights=sizes)
    error = np.sqrt(np.sum((sizes * (y - mean)) ** 2) * 20 / 19) / sizes.sum()  # linearised ratio
    assert found.mean == pytest.approx(mean)
    assert found.high - mean == pytest.approx(scipy.stats.t.ppf(0.975, 19) * error)


def test_a_single_value_has_no_interval():
    for interval in (statistics.t_interval([2.0]), statistics.bootstrap_t_interval([2.0])):
        assert interval.mean == 2
        assert np.isnan([interval.low, interval.high]).all()


@settings(deadline=None)
@given(st.lists(st.integers(-9, 9).map(lambda eighths: eighths / 8), min_size=1, max_size=9))
def test_sign_flip_test_enumerates(x):
    """Multiples of 1/8, whose sums are exact, so that ties are."""
    observed = abs(sum(x))
    flipped = [
        abs(sum(s * v for s, v in zip(signs, x, strict=True)))
        for signs in itertools.product((1, -1), repeat=len(x))
    ]
    expected = np.mean([value >= observed for value in flipped])
    assert statistics.sign_flip_test(x) == pytest.approx(expected)


def test_sign_flip_test_agrees_with_scipys_permutation_test():
    x = np.random.default_rng(0).normal(0.4, 1, 10)
    expected = scipy.stats.permutation_test(
        (x, np.zeros(10)),
        lambda a, b, axis: np.mean(a - b, axis=axis),
        permutation_type="samples",
        vectorized=True,
        n_resamples=np.inf,
    )
    assert statistics.sign_flip_test(x) == pytest.approx(expected.pvalue)


def test_sign_flip_test_has_a_floor_and_samples_beyond_sixteen():
    assert statistics.sign_flip_test([1.0, 2.0, 3.0, 4.0]) == 2 / 16
    x = np.random.default_rng(1).normal(0.2, 1, 18)
    all_sums = np.array(list(itertools.product((1, -1), repeat=18))) @ x
    exact = np.mean(np.abs(all_sums) >= abs(x.sum()) - 1e-9)
    assert statistics.sign_flip_test(x) == pytest.approx(exact, abs=0.006)
    assert statistics.sign_flip_test(np.full(40, 1.0)) == pytest.approx(1 / 100_001)


def test_bootstrap_t_is_the_t_interval_for_normal_values():
    x = np.random.default_rng(0).normal(0.3, 2, 400)
    found = statistics.bootstrap_t_interval(x)
    expected = statistics.t_interval(x)
    width = expected.high - expected.low
    assert abs(found.low - expected.low) < 0.05 * width
    assert abs(found.high - expected.high) < 0.05 * width


def test_bootstrap_t_is_a_plain_loop():
    """The matrix products against resampling one group at a time."""
    rng = np.random.default_rng(3)
    groups = rng.integers(0, 15, 60)
    x = rng.exponential(1, 60) + groups / 10
    members = [x[groups == g] for g in np.unique(groups)]
    mean = x.mean()

    def linearised_error(sample):
        pooled = np.concatenate(sample)
        residuals = np.array([(m - pooled.mean()).sum() for m in sample])
        n = len(sample)
        return np.sqrt(n / (n - 1) * (residuals**2).sum()) / len(pooled)

    studentised = []
    for _ in range(4_000):
        sample = [members[i] for i in rng.integers(0, len(members), len(members))]
        studentised.append((np.concatenate(sample).mean() - mean) / linearised_error(sample))
    low, high = mean - np.quantile(studentised, [0.975, 0.025]) * linearised_error(members)
    found = statistics.bootstrap_t_interval(x, groups=groups)
    assert found.n == len(members)
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_groups_widen_the_interval_of_repeated_items():
    x = np.random.default_rng(0).normal(0, 1, 50)
    once = statistics.bootstrap_t_interval(x)
    repeated = np.repeat(x, 10)
    grouped = statistics.bootstrap_t_interval(repeated, groups=np.repeat(np.arange(50), 10))
    naive = statistics.bootstrap_t_interval(repeated)
    assert (grouped.low, grouped.high) == pytest.approx((once.low, once.high), rel=1e-9)
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_equivalence_is_two_one_sided_tests():
    x = np.random.default_rng(0).normal(0.01, 0.05, 12)
    found = statistics.equivalence_test(x, margin=0.05)
    below = scipy.stats.ttest_1samp(x, -0.05, alternative="greater").pvalue
    above = scipy.stats.ttest_1samp(x, 0.05, alternative="less").pvalue
    assert found.p == pytest.approx(max(below, above))
    inside = found.interval.low > -0.05 and found.interval.high < 0.05
    assert found.equivalent == inside


def test_equivalence_is_not_the_absence_of_evidence():
    assert not statistics.equivalence_test([-1.0, 1.0, -0.9, 0.9], margin=0.05).equivalent
    assert statistics.equivalence_test([0.0, 0.0, 0.0], margin=0.05).equivalent
    assert not statistics.equivalence_test([0.2, 0.2, 0.2], margin=0.05).equivalent
    assert not statistics.equivalence_test([0.0], margin=0.05).equivalent


def test_holm_by_hand():
    np.testing.assert_allclose(statistics.holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(statistics.holm([0.6, 0.7]), [1, 1])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_holm_rejects_what_the_step_down_procedure_rejects(p):
    adjusted = statistics.holm(p)
    rejected = set()
    for rank, index in enumerate(np.argsort(p, kind="stable")):
        if p[index] * (len(p) - rank) > 0.05:
            break
        rejected.add(index)
    assert rejected == set(np.flatnonzero(adjusted <= 0.05))


@pytest.mark.parametrize("bad", [[], [1.0, float("nan")], [[1.0, 2.0]], [float("inf")]])
def test_what_is_not_a_list_of_numbers_is_refused(bad):
    with pytest.raises(AnalysisError, match="finite numbers"):
        statistics.t_interval(bad)


@pytest.mark.slow
def test_coverage():
    """Seeds: t covers at its level even for few. Items: bootstrap-t beats the percentile bootstrap
    on skewed differences, where the mean's own skewness matters."""
    rng = np.random.default_rng(0)
    n_trials = 1_000
    for n in (4, 8):
        hits = sum(
            interval.low <= 0 <= interval.high
            for interval in (statistics.t_interval(rng.normal(size=n)) for _ in range(n_trials))
        )
        assert abs(hits / n_trials - 0.95) < 0.025
    bootstrap_t = percentile = 0
    for trial in range(n_trials):
        x = rng.lognormal(0, 1, 40)
        found = statistics.bootstrap_t_interval(x, n_resamples=1_000, seed=trial)
        bootstrap_t += found.low <= np.exp(0.5) <= found.high
        means = x[rng.integers(0, 40, (1_000, 40))].mean(axis=1)
        low, high = np.quantile(means, [0.025, 0.975])
        percentile += low <= np.exp(0.5) <= high
    assert bootstrap_t / n_trials > 0.92
    assert percentile / n_trials < bootstrap_t / n_trials
