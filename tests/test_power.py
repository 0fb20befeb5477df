"""Power against simulation, scipy, and published tables; planning against its own definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats

from mechinterp import power
from mechinterp.errors import AnalysisError
from mechinterp.statistics import VarianceComponents, equivalence_test, t_interval

TRIALS = 2_000


def simulated(mean: float, sd: float, n: int) -> np.ndarray:
    return np.random.default_rng(0).normal(mean, sd, (TRIALS, n))


@pytest.mark.parametrize(("n", "effect"), [(3, 0.3), (8, 0.12), (16, 0.08)])
def test_power_to_see_damage_is_how_often_it_is_seen(n, effect):
    draws = simulated(effect, 0.06, n)
    seen = np.mean([t_interval(x).low > 0.05 for x in draws])
    assert power.power_damaged(effect, sd=0.06, n_seeds=n) == pytest.approx(seen, abs=0.025)


@pytest.mark.parametrize(("n", "effect"), [(3, 0.0), (8, 0.0), (8, 0.02), (16, -0.03)])
def test_power_to_see_intact_is_how_often_it_is_seen(n, effect):
    draws = simulated(effect, 0.05, n)
    seen = np.mean([equivalence_test(x, margin=0.05).equivalent for x in draws])
    assert power.power_intact(effect, sd=0.05, n_seeds=n) == pytest.approx(seen, abs=0.025)


def test_at_the_margin_power_is_the_size_of_the_test():
    for n in (2, 3, 8, 100):
        assert power.power_damaged(0.05, sd=0.2, n_seeds=n) == pytest.approx(0.025)
    assert power.power_intact(0.05, sd=0.001, n_seeds=8) == pytest.approx(0.05)
    assert power.power_intact(0.05, sd=0.2, n_seeds=8) < 0.05


@settings(deadline=None, max_examples=15)
@given(
    st.integers(2, 200),
    st.floats(-0.04, 0.04),
    st.floats(0.01, 0.2),
    st.sampled_from([0.01, 0.05]),
)
def test_power_of_equivalence_is_the_plain_double_integral(n, effect, sd, alpha):
    """Over the sample variance, by another quadrature and in another variable."""
    error, critical = sd / np.sqrt(n), stats.t.ppf(1 - alpha, n - 1)

    def at(quantile: float) -> float:
        s = np.sqrt(stats.chi2.ppf(quantile, n - 1) / (n - 1)) * error
        room = max(0.05 - critical * s, 0)
        normal = stats.norm(effect, error)
        return normal.cdf(room) - normal.cdf(-room)

    expected = integrate.quad(at, 0, 1, limit=200, epsabs=1e-8)[0]
    found = power.power_intact(effect, sd=sd, n_seeds=n, alpha=alpha)
    assert found == pytest.approx(expected, abs=1e-5)


def test_power_of_equivalence_is_a_difference_of_noncentral_t_where_power_is_high():
    """Phillips' (1990) approximation, which needs the interval to fit whatever its width."""
    n, sd = 20, 0.05
    critical, shift = stats.t.ppf(0.95, n - 1), 0.05 / sd * np.sqrt(n)
    expected = stats.nct.cdf(-critical, n - 1, -shift) - stats.nct.cdf(critical, n - 1, shift)
    assert power.power_intact(0.0, sd=sd, n_seeds=n) == pytest.approx(expected, abs=1e-6)


def test_seeds_for_a_t_test_are_those_of_the_tables():
    """Paired t test, two-sided 5%, power 80%: Cohen's d = 0.5 takes 34 pairs, 0.8 takes 15."""
    for d, expected in ((0.5, 34), (0.8, 15), (0.2, 199)):
        found = power.seeds_needed(
            lambda n, d=d: power.power_damaged(d, sd=1.0, n_seeds=n, margin=0.0)
        )
        assert found == expected


def test_the_detectable_effect_has_the_power_asked_for():
    for n in (2, 3, 8, 16):
        found = power.minimum_detectable_effect(sd=0.1, n_seeds=n, margin=0.05, power=0.9)
        assert power.power_damaged(found, sd=0.1, n_seeds=n) == pytest.approx(0.9)
    large = power.minimum_detectable_effect(sd=1.0, n_seeds=power.MAX_SEEDS)
    assert large == pytest.approx((stats.norm.ppf(0.975) + stats.norm.ppf(0.8)) / 100, rel=1e-3)
    assert power.minimum_detectable_effect(sd=0.0, n_seeds=8, margin=0.05) == 0.05


def test_the_margin_for_intact_has_the_power_asked_for():
    for n in (2, 3, 8, 16):
        margin = power.minimum_intact_margin(sd=0.1, n_seeds=n)
        found = power.power_intact(0.0, sd=0.1, n_seeds=n, margin=margin)
        assert found == pytest.approx(0.8)


@settings(deadline=None, max_examples=20)
@given(st.floats(0.01, 0.3), st.floats(0.06, 0.3))
def test_one_seed_fewer_than_needed_is_too_few(sd, effect):
    plan = power.plan_power(VarianceComponents(sd**2), n_seeds=8, effect=effect)
    for n, power_of in (
        (plan.seeds_damaged, lambda n: power.power_damaged(effect, sd=sd, n_seeds=n)),
        (plan.seeds_intact, lambda n: power.power_intact(0.0, sd=sd, n_seeds=n)),
    ):
        assert n is None or (power_of(n) >= 0.8 and (n == 2 or power_of(n - 1) < 0.8))


def test_items_help_until_the_seeds_are_all_that_varies():
    pilot = VarianceComponents(between=0.03**2, within=1.0)
    few, many, endless = (
        power.plan_power(pilot, n_seeds=8, n_items=n) for n in (100, 10_000, 10**9)
    )
    assert few.sd == pytest.approx(np.sqrt(0.03**2 + 1 / 100))
    assert few.detectable > many.detectable > endless.detectable
    alone = power.plan_power(VarianceComponents(0.03**2), n_seeds=8)
    assert endless.detectable == pytest.approx(alone.detectable)
    assert alone.power_damaged == pytest.approx(power.power_damaged(0.1, sd=0.03, n_seeds=8))


def test_what_is_within_the_margin_is_never_damage():
    plan = power.plan_power(VarianceComponents(0.01), n_seeds=8, effect=0.05)
    assert plan.seeds_damaged is None
    assert plan.power_damaged < 0.03


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_seeds": 1}, "at least two seeds, got 1"),
        ({"n_seeds": 8, "n_items": 0}, "at least one item, got 0"),
        ({"n_seeds": 8, "power": 1.0}, "power: expected a number between alpha and 1"),
        ({"n_seeds": 8, "alpha": 0.0}, "alpha: expected"),
        ({"n_seeds": 8, "margin": 0.0}, "margin must be positive"),
    ],
)
def test_impossible_plans_are_refused(options, message):
    with pytest.raises(AnalysisError, match=message):
        power.plan_power(VarianceComponents(0.01), **options)
