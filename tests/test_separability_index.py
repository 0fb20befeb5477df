"""The separability index on curves made by hand, and its bootstrap against repeated items."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng
from mechinterp.separability import (
    PruningValues,
    area,
    measure_areas,
    separability,
    summarise,
)

SHARES = (0.01, 0.1, 1.0)
GONE, KEPT = (0.0, 0.0, 0.0), (1.0, 1.0, 0.0)  # with the first component, and with the last
GROUPS = np.arange(40) // 2
NAMES = ("decision", "latents")


def hand_made(curves, *, random=((1.0, 0.8, 0.0), (1.0, 0.8, 0.0)), noise=0.0) -> PruningValues:
    """`curves[target][outcome]`: what is left at each share, of 1; `random[outcome]` likewise."""
    rng = derive_rng(0, "hand-made")

    def items(left):  # [..., outcomes, shares] -> [..., shares, outcomes, items]
        left = np.moveaxis(np.asarray(left, float), -1, -2)[..., None]
        return left + noise * rng.normal(size=(*left.shape[:-1], len(GROUPS)))

    return PruningValues(
        targets=NAMES,
        outcomes=NAMES,
        shares=SHARES,
        base=items(np.ones((2, 1)))[0],
        targeted=items(curves),
        random=items([random, random, random]),
    )


def index_of(curves, **options) -> dict[str, float]:
    areas = measure_areas(hand_made(curves, **options), GROUPS, n_resamples=10)
    return {name: values[0] for name, values in areas.index().items()}


def test_disjoint_components_are_separable():
    assert index_of([[GONE, KEPT], [KEPT, GONE]]) == {"both": 1, "decision": 1, "latents": 1}


def test_the_same_components_are_not():
    assert index_of([[GONE, GONE], [GONE, GONE]]) == {"both": 0, "decision": 0, "latents": 0}


def test_one_way_dependence_is_told_by_the_two_targets():
    """What carries the latents carries the decision, which has components of its own as well."""
    found = index_of([[GONE, KEPT], [GONE, GONE]])
    assert found == {"both": pytest.approx(0.5), "decision": 1, "latents": 0}


def test_each_hurt_by_what_the_other_needs_is_minus_one():
    assert index_of([[KEPT, GONE], [GONE, KEPT]]) == {"both": -1, "decision": -1, "latents": -1}


def test_no_better_than_random_is_undefined():
    random = (1.0, 0.8, 0.0)
    assert all(np.isnan(v) for v in index_of([[random] * 2, [random] * 2]).values())


def test_random_components_that_leave_nothing_make_the_index_undefined():
    """Out of fold a probe of nothing does worse than a constant: a target that costs *less* than
    random components would come out as the one that costs all."""
    below = (-0.02, -0.02, -0.02)
    found = index_of([[(0.0, 0.0, 0.0), KEPT], [KEPT, GONE]], random=(below, (1.0, 0.8, 0.0)))
    assert np.isnan([found["both"], found["decision"]]).all()


def test_a_fragile_outcome_does_not_pass_for_a_shared_component():
    """The decision suffers from any pruning: only what goes beyond that counts."""
    fragile = ((0.1, 0.0, 0.0), (1.0, 0.8, 0.0))
    assert index_of([[GONE, KEPT], [fragile[0], GONE]], random=fragile)["latents"] == 1


def test_an_outcome_that_was_next_to_nothing_before_is_undefined():
    values = hand_made([[GONE, KEPT], [KEPT, GONE]])
    faint = PruningValues(
        **{**vars(values), "base": values.base * [[0.01], [1.0]]},
    )
    areas = measure_areas(faint, GROUPS, n_resamples=10)
    assert np.isnan(areas.targeted[0, :, 0]).all()
    assert np.isfinite(areas.targeted[0, :, 1]).all()
    value, low, high = summarise(areas.index()["both"])
    assert np.isnan([value, low, high]).all()


def test_area_is_the_mean_over_the_logarithm():
    """A loss of half the decades is half the area; against a fine sum."""
    assert area(np.array([0.0, 1.0, 1.0]), SHARES) == pytest.approx(0.75)
    lost, shares = np.array([0.2, 0.3, 0.9]), (0.02, 0.07, 1.0)
    fine = np.linspace(*np.log([shares[0], shares[-1]]), 200_001)
    assert area(lost, shares) == pytest.approx(np.interp(fine, np.log(shares), lost).mean(), 1e-4)


@given(st.floats(-3, 1), st.floats(-3, 1))
def test_separability_is_bounded_and_changes_sign_with_its_arguments(own, other):
    one, two = separability(np.array([own, other]), np.array([other, own]))
    if max(own, other) < 0.02:
        assert np.isnan([one, two]).all()
    else:
        assert one == -two
        assert -1 <= one <= 1
        assert (one >= 0) == (max(own, 0) >= max(other, 0))


def test_resamples_equal_repeating_items_and_draws():
    values = hand_made([[GONE, KEPT], [(0.5, 0.2, 0.0), GONE]], noise=0.3)
    areas = measure_areas(values, GROUPS, n_resamples=5, seed=3)
    rng = derive_rng(3, "separability")
    n_groups = len(np.unique(GROUPS))
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), 5)
    draws = rng.integers(0, 3, (5, 3))
    for resample, (count, drawn) in enumerate(zip(counts, draws, strict=True), 1):
        rows = np.concatenate(
            [np.repeat(np.flatnonzero(g == GROUPS), n) for g, n in enumerate(count)]
        )

        def areas_of(values_of, rows=rows):
            base = values.base[:, rows].mean(1)
            lost = 1 - values_of[..., rows].mean(-1) / base
            return area(np.moveaxis(lost, -2, -1), SHARES)

        expected = areas_of(values.targeted)
        np.testing.assert_allclose(areas.targeted[resample], expected)
        random = np.mean([areas_of(values.random[draw]) for draw in drawn], axis=0)
        np.testing.assert_allclose(areas.random[resample], random)
    np.testing.assert_allclose(
        areas.excess, (areas.targeted - areas.random[:, None]) / (1 - areas.random[:, None])
    )


def test_intervals_hold_the_value_and_narrow_with_the_noise():
    curves = [[GONE, (0.9, 0.5, 0.0)], [(0.9, 0.5, 0.0), GONE]]
    widths = []
    for noise in (0.05, 0.5):
        areas = measure_areas(hand_made(curves, noise=noise), GROUPS)
        value, low, high = summarise(areas.index()["both"])
        assert low < value < high
        widths.append(high - low)
    assert 5 < widths[1] / widths[0] < 20


def test_shares_that_do_not_rise_are_refused():
    values = hand_made([[GONE, KEPT], [KEPT, GONE]])
    with pytest.raises(AnalysisError, match="shares: expected at least two rising"):
        PruningValues(**{**vars(values), "shares": (0.1, 0.1, 1.0)})
