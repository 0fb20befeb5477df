"""Items within seeds, and arms against each other: against plain loops, scipy and simulation."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.stats
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp import statistics
from mechinterp.errors import AnalysisError


def nested(n_seeds: int, n_items: int, *, between: float, seed: int = 0):
    """Skewed items: values [seeds * items], and the seed of each."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, between, n_seeds)[:, None] + rng.exponential(1, (n_seeds, n_items))
    return x.ravel(), np.repeat(np.arange(n_seeds), n_items)


def plain_hierarchical_bounds(x, seeds, groups, n_resamples, rng):
    """Nothing but loops: every resampled seed is a list of resampled groups."""
    members = {
        s: [x[(seeds == s) & (groups == g)] for g in np.unique(groups[seeds == s])]
        for s in np.unique(seeds)
    }
    means = {s: x[seeds == s].mean() for s in members}
    variances = []
    for s, lists in members.items():
        residuals = np.array([(values - means[s]).sum() for values in lists])
        k = len(lists)
        variances.append(k / (k - 1) * (residuals**2).sum() / (seeds == s).sum() ** 2)
    centre, n = np.mean(list(means.values())), len(members)
    spread = np.array(list(means.values())) - centre
    between = max((spread**2).sum() / (n - 1) - np.mean(variances), 0)
    shrink = np.sqrt(between / (spread**2).mean())
    studentised = []
    for _ in range(n_resamples):
        drawn_means = []
        for s in rng.choice(list(members), n):
            lists = members[s]
            k = len(lists)
            drawn = np.concatenate([lists[i] for i in rng.integers(0, k, k)])
            noise = (drawn.mean() - means[s]) * np.sqrt(k / (k - 1))
            drawn_means.append(shrink * (means[s] - centre) + noise)
        studentised.append(np.mean(drawn_means) / (np.std(drawn_means, ddof=1) / np.sqrt(n)))
    error = np.sqrt((spread**2).sum() / (n - 1) / n)
    return centre - np.quantile(studentised, [0.975, 0.025]) * error


@pytest.mark.parametrize(("between", "n_groups"), [(0.0, 9), (0.3, 9), (0.5, 2)])
def test_hierarchical_bootstrap_is_a_plain_loop(between, n_groups):
    x, seeds = nested(6, 24, between=between)
    groups = np.random.default_rng(1).integers(0, n_groups, len(x))
    low, high = plain_hierarchical_bounds(x, seeds, groups, 4_000, np.random.default_rng(2))
    found = statistics.hierarchical_bootstrap_interval(
        x, seeds=seeds, groups=groups, n_resamples=20_000
    )
    assert found.n == 6
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.06 * (high - low))


def test_without_noise_of_items_it_is_the_bootstrap_of_seeds_means():
    means = np.random.default_rng(0).exponential(1, 9)
    found = statistics.hierarchical_bootstrap_interval(
        np.repeat(means, 5), seeds=np.repeat(np.arange(9), 5), seed=3
    )
    expected = statistics.bootstrap_t_interval(means, seed=3)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), rel=1e-6)


def test_with_normal_noise_alone_it_is_students_interval_of_seeds_means():
    """What it is studentised by is the spread of the seeds' means: t with seeds - 1 degrees."""
    x = np.random.default_rng(1).normal(0, 1, (5, 400))
    x -= 0.9 * (x.mean(1, keepdims=True) - x.mean())  # no more spread than items explain
    found = statistics.hierarchical_bootstrap_interval(
        x.ravel(), seeds=np.repeat(np.arange(5), 400), n_resamples=20_000
    )
    expected = statistics.t_interval(x.mean(1))
    width = expected.high - expected.low
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high), abs=0.04 * width)


def test_seeds_count_the_same_whatever_their_items():
    x = [1.0, 1.5, 2.0, 2.5, 6.0, 7.0, 8.0]
    found = statistics.hierarchical_bootstrap_interval(x, seeds=list("aaaabbb"))
    assert found.mean == pytest.approx((1.75 + 7.0) / 2)
    alone = statistics.hierarchical_bootstrap_interval(x, seeds=["a"] * 7)
    assert np.isnan([alone.low, alone.high]).all()


def test_repeated_items_are_one_item():
    x, seeds = nested(8, 20, between=0.05)
    items = np.arange(len(x))
    once = statistics.hierarchical_bootstrap_interval(x, seeds=seeds)
    again = statistics.hierarchical_bootstrap_interval(
        np.repeat(x, 3), seeds=np.repeat(seeds, 3), groups=np.repeat(items, 3)
    )
    assert (again.low, again.high) == pytest.approx((once.low, once.high), rel=1e-6)


def test_variance_components_are_those_of_the_analysis_of_variance():
    """Balanced, one item per group: mean squares of scipy's one-way F."""
    x, seeds = nested(7, 30, between=0.5)
    table = x.reshape(7, 30)
    found = statistics.variance_components(x, seeds=seeds)
    within = table.var(axis=1, ddof=1).mean()
    f = scipy.stats.f_oneway(*table).statistic
    assert found.within == pytest.approx(within)
    assert found.between == pytest.approx((f - 1) * within / 30)
    assert found.of_seed_mean(30) == pytest.approx(table.mean(1).var(ddof=1))


def test_variance_components_count_groups_and_never_fall_below_zero():
    x, seeds = nested(7, 30, between=0.0)
    means = np.repeat(x.reshape(7, 30).mean(1), 30)
    level = statistics.variance_components(x - means, seeds=seeds)
    assert level.between == 0
    once = statistics.variance_components(x, seeds=seeds)
    four = statistics.variance_components(
        np.repeat(x, 4), seeds=np.repeat(seeds, 4), groups=np.repeat(np.arange(len(x)), 4)
    )
    assert four.between == pytest.approx(once.between)
    assert four.within == pytest.approx(4 * once.within)
    with pytest.raises(AnalysisError, match="at least two seeds"):
        statistics.variance_components([1.0, 2.0], seeds=[0, 0])


def test_seeds_and_groups_must_fit_the_values():
    with pytest.raises(AnalysisError, match=r"2 values but seeds \(3,\)"):
        statistics.hierarchical_bootstrap_interval([1.0, 2.0], seeds=[0, 1, 2])


def test_few_seeds_leave_no_interval_to_rounding():
    """A resample of one seed thrice has no spread; what rounding leaves of it must not divide."""
    for seed in range(20):
        x = np.random.default_rng(seed).normal(3, 1, 3)
        by_seed = {"seeds": np.repeat(range(3), 5)}
        for found in (
            statistics.bootstrap_t_interval(x),
            statistics.hierarchical_bootstrap_interval(np.repeat(x, 5), **by_seed),
        ):
            assert found.high - found.low < 100 * np.ptp(x)


seeds_by_side = st.lists(st.tuples(*[st.floats(-2, 2, width=16)] * 4), min_size=2, max_size=9).map(
    np.array
)


@pytest.mark.filterwarnings("ignore:Precision loss")
@settings(deadline=None)
@given(seeds_by_side, st.sampled_from([0.0, 0.1]))
def test_double_dissociation_is_the_larger_of_two_one_sided_paired_t_tests(x, margin):
    a, b = x[:, :2], x[:, 2:]
    found = statistics.double_dissociation(a, b, margin=margin)
    effects = {"learning": a[:, 0] - b[:, 0], "choosing": b[:, 1] - a[:, 1]}
    if min(effect.std() for effect in effects.values()) > 1e-3:
        p = [scipy.stats.ttest_1samp(e, margin, alternative="greater") for e in effects.values()]
        assert found.p == pytest.approx(max(test.pvalue for test in p))
    above = min(found.learning.low, found.choosing.low)
    if abs(above - margin) > 1e-9:
        assert found.dissociated == (above > margin)
    contrast = (a[:, 0] - a[:, 1]) - (b[:, 0] - b[:, 1])
    expected = statistics.t_interval(contrast, level=0.9)
    assert found.interaction.low == pytest.approx(expected.low, abs=1e-9)
    if found.dissociated:  # and then the interaction needs no test of its own
        assert found.interaction.low > 2 * margin


def test_one_damage_of_two_sizes_is_no_double_dissociation():
    rng = np.random.default_rng(0)
    noisy = {
        name: np.array(means) + rng.normal(0, 0.02, (8, 2))
        for name, means in {
            "more": [0.4, 0.0],
            "less": [0.1, 0.0],
            "both": [0.4, 0.3],
            "choosing": [0.0, 0.3],
        }.items()
    }
    assert not statistics.double_dissociation(noisy["more"], noisy["less"]).dissociated
    assert not statistics.double_dissociation(noisy["both"], noisy["choosing"]).dissociated
    assert statistics.double_dissociation(noisy["more"], noisy["choosing"]).dissociated
    assert not statistics.double_dissociation(noisy["choosing"], noisy["more"]).dissociated


def test_an_effect_at_the_margin_without_spread_is_not_beyond_it():
    flat = np.zeros((4, 2))
    assert not statistics.double_dissociation(flat, flat).dissociated
    assert not statistics.equivalence_test([0.5, 0.5, 0.5], margin=0.5).equivalent


def test_a_single_seed_dissociates_nothing():
    found = statistics.double_dissociation([[1.0, 0.0]], [[0.0, 1.0]])
    assert not found.dissociated
    assert np.isnan(found.p)
    with pytest.raises(AnalysisError, match=r"\[seeds, 2\]"):
        statistics.double_dissociation([[1.0, 0.0]], [[0.0, 1.0], [0.0, 1.0]])
    with pytest.raises(AnalysisError, match="finite"):
        statistics.double_dissociation([[1.0, np.nan]], [[0.0, 1.0]])
