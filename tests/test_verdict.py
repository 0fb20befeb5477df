"""The verdict's rule on changes whose truth is known."""

from __future__ import annotations

import pytest
import torch

from mechinterp.verdict import MANY_GROUPS, Side, judge_side, minimum_detectable, state_of, word


def items(mean, *, spread=0.3, n=4000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return mean + spread * torch.randn(n, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(
    ("mean", "state"),
    [(0.2, "damaged"), (-0.2, "improved"), (0.0, "intact"), (0.05, "inconclusive")],
)
def test_states(mean, state):
    side = judge_side(items(mean), torch.arange(4000), margin=0.05)
    assert side.state == state
    assert side.ci[0] < mean < side.ci[1]


def test_few_noisy_items_cannot_tell():
    side = judge_side(items(0.0, spread=2.0, n=40), torch.arange(40), margin=0.05)
    assert side.state == "inconclusive"
    assert minimum_detectable(side, 0.05) > 0.5


def test_items_of_a_group_count_once():
    delta = items(0.1, n=50)
    alone = judge_side(delta, torch.arange(50))
    repeated = judge_side(delta.repeat_interleave(20), torch.arange(50).repeat_interleave(20))
    width = alone.ci[1] - alone.ci[0]
    assert repeated.ci[1] - repeated.ci[0] == pytest.approx(width, rel=0.3)
    assert repeated.p == pytest.approx(alone.p)


@pytest.mark.parametrize("n", [MANY_GROUPS, MANY_GROUPS + 2])
def test_the_mean_is_that_over_items_however_many_groups_there_are(n):
    sizes = torch.tensor([9, 1]).repeat(n // 2)
    delta = torch.tensor([0.06, 0.0], dtype=torch.float64).repeat(n // 2)
    side = judge_side(
        delta.repeat_interleave(sizes), torch.arange(n).repeat_interleave(sizes), margin=0.05
    )
    assert side.delta == pytest.approx(0.054)
    assert side.ci[0] < side.delta < side.ci[1]
    assert side.state == "damaged"


def test_p_agrees_with_the_interval_where_groups_differ_in_size():
    """Many items say nothing, one item each of many groups says much: the mean over items is about
    zero, that over groups is not."""
    noise = items(0.0, n=3000)
    delta = torch.cat([noise - noise.mean(), 0.5 + 0.01 * noise[:30]])
    groups = torch.cat([torch.arange(3000) // 100, 100 + torch.arange(30)])
    side = judge_side(delta, groups)
    assert side.ci[0] < 0 < side.ci[1]
    assert side.p > 0.05


def test_no_change_at_all():
    side = judge_side(torch.zeros(100, dtype=torch.float64), torch.arange(100))
    assert (side.state, side.delta, side.p) == ("intact", 0.0, 1.0)


@pytest.mark.parametrize(
    ("learning", "choosing", "expected"),
    [
        ("damaged", "damaged", "both"),
        ("damaged", "intact", "learning"),
        ("damaged", "inconclusive", "learning"),
        ("improved", "damaged", "choosing"),
        ("intact", "improved", "none"),
        ("intact", "inconclusive", "inconclusive"),
    ],
)
def test_word(learning, choosing, expected):
    sides = (Side(0.0, (0.0, 0.0), 1.0, state) for state in (learning, choosing))
    assert word(*sides) == expected


def test_edges_of_the_margin_belong_to_nobody():
    assert state_of((0.05, 0.2), (0.06, 0.19), 0.05) == "inconclusive"
    assert state_of((-0.2, -0.05), (-0.19, -0.06), 0.05) == "inconclusive"
    assert state_of((-0.06, 0.06), (-0.049, 0.049), 0.05) == "intact"
