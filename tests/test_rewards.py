"""Rewards against their closed forms, and what a learner that is paid by them comes to say."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.advantages import centred, routed
from mechinterp.errors import SpecError, TrainingError
from mechinterp.policy_gradient import policy_loss
from mechinterp.randomness import derive_generator
from mechinterp.rewards import (
    SCORES,
    binary,
    brier,
    calibrated,
    group_calibration,
    log_score,
    spherical,
)

GRID = torch.linspace(0, 1, 1001, dtype=torch.float64)
LOG_LIMIT = 1 / (1 + math.e)  # below it a better answer earns less under the log score

# S(p), the expected score of the report p at the probability p of being right.
BEST_VALUE = {
    "brier": lambda p: -p * (1 - p),
    "spherical": lambda p: math.hypot(p, 1 - p),
    "log": lambda p: p * math.log(p) + (1 - p) * math.log(1 - p),
}


def expected(reward, p, reports=GRID):
    """The mean reward of each report when the answer is right with probability p."""
    right = torch.ones_like(reports)[None]
    return (p * reward(right, reports[None]) + (1 - p) * reward(0 * right, reports[None]))[0]


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("p", [0.001, 0.2, 0.5, 0.73, 0.999])
def test_the_best_report_is_the_probability_of_being_right(score, p):
    values = expected(SCORES[score], p)
    assert float(GRID[values.argmax()]) == pytest.approx(p, abs=1e-9)
    assert float(values.max()) == pytest.approx(BEST_VALUE[score](p), abs=1e-9)


@settings(max_examples=50, deadline=None)
@given(
    score=st.sampled_from(sorted(SCORES)),
    p=st.floats(0, 1),
    report=st.floats(0, 1),
)
def test_no_report_beats_the_truth(score, p, report):
    reports = torch.tensor([p, report], dtype=torch.float64)
    truth, other = expected(SCORES[score], p, reports).tolist()
    assert truth >= other - 1e-5  # the floor of the log score costs up to 1e-6 * log(1e6)


def test_a_binary_reward_does_not_see_confidence():
    correct = torch.tensor([[True, False, True]])
    assert binary(correct).tolist() == [[1.0, 0.0, 1.0]]
    assert binary(correct.double()).dtype == torch.float64


def test_scores_by_hand():
    correct, confidence = torch.tensor([[True, False]]), torch.tensor([[0.8, 0.6]])
    torch.testing.assert_close(brier(correct, confidence), torch.tensor([[-0.04, -0.36]]))
    torch.testing.assert_close(
        spherical(correct, confidence),
        torch.tensor([[0.8 / math.sqrt(0.68), 0.4 / math.sqrt(0.52)]]),
    )
    torch.testing.assert_close(
        log_score(correct, confidence), torch.tensor([[math.log(0.8), math.log(0.4)]])
    )
    torch.testing.assert_close(calibrated(correct, confidence), torch.tensor([[0.96, -0.36]]))
    assert calibrated(correct, confidence, weight=0.0).tolist() == binary(correct).tolist()


def best_total(score, p, weight=1.0):
    return float(expected(lambda c, q: calibrated(c, q, score=score, weight=weight), p).max())


def test_rlcr_pays_the_square_of_the_probability():
    for p in (0.0, 0.1, 0.5, 0.9, 1.0):
        assert best_total("brier", p) == pytest.approx(p**2, abs=1e-9)


@pytest.mark.parametrize("score", ["brier", "spherical"])
def test_a_better_answer_earns_more_up_to_a_weight_of_one(score):
    values = [best_total(score, p) for p in GRID[::10].tolist()]
    assert all(a < b for a, b in itertools.pairwise(values))
    # "Bounded" alone does not do it: twice the weight, and a worse answer pays.
    assert best_total(score, 0.1, weight=2.0) < best_total(score, 0.0, weight=2.0)


def test_the_log_score_pays_for_answers_that_are_surely_wrong():
    assert best_total("log", 0.5) == pytest.approx(0.5 - math.log(2), abs=1e-6)  # -0.193
    assert best_total("log", 0.0) == pytest.approx(0.0, abs=1e-5)
    falling = [best_total("log", p) for p in (0.01, 0.1, 0.2, LOG_LIMIT)]
    rising = [best_total("log", p) for p in (LOG_LIMIT, 0.3, 0.6, 0.99)]
    assert all(a > b for a, b in itertools.pairwise(falling))
    assert all(a < b for a, b in itertools.pairwise(rising))


@pytest.mark.parametrize("own_share", [0.0, 0.5, 1.0])
def test_group_calibration_is_best_at_p_with_a_quieter_target(own_share):
    """Exact means over all outcomes of a group."""
    p, n_samples = 0.3, 5
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n_samples))).double()
    chance = (p**outcomes * (1 - p) ** (1 - outcomes)).prod(1)

    def value(report):
        reports = torch.full_like(outcomes, report)
        rewards = group_calibration(outcomes, reports, own_share=own_share, weight=1.0)
        return float(chance @ rewards[:, 0])

    reports = [i / 20 for i in range(21)]
    assert max(reports, key=value) == pytest.approx(p)
    noise = p * (1 - p) * (own_share**2 + (1 - own_share**2) / n_samples)
    assert value(p) == pytest.approx(-noise)


def test_group_calibration_of_a_sample_alone_is_the_brier_score():
    correct, confidence = torch.tensor([[True, False]]), torch.tensor([[0.8, 0.6]])
    alone = group_calibration(correct, confidence, own_share=1.0, weight=1.0)
    torch.testing.assert_close(alone, brier(correct, confidence))
    # 0.5 (0.5 c + 0.5 mean - q)^2 written out: targets 0.75 and 0.25.
    torch.testing.assert_close(
        group_calibration(correct, confidence),
        torch.tensor([[-0.5 * 0.05**2, -0.5 * 0.35**2]]),
    )


@pytest.mark.parametrize("bad", [1.1, -0.1, float("nan")])
@pytest.mark.parametrize("reward", [*SCORES.values(), calibrated, group_calibration])
def test_confidence_that_is_none(reward, bad):
    with pytest.raises(TrainingError, match=r"\[0, 1\].* at \[1, 0\] \(prompt, sample\)"):
        reward(torch.ones(2, 2), torch.tensor([[0.5, 0.5], [bad, 0.5]]))


@pytest.mark.parametrize(
    ("reward", "settings", "message"),
    [
        (calibrated, {"score": "linear"}, "one of brier, spherical, log"),
        (calibrated, {"weight": -1.0}, "not negative"),
        (log_score, {"floor": 0.0}, r"floor must be in \(0, 0.5\)"),
        (group_calibration, {"own_share": 1.5}, r"own_share must be in \[0, 1\]"),
    ],
)
def test_settings_out_of_range(reward, settings, message):
    with pytest.raises(SpecError, match=message):
        reward(torch.ones(1, 2), torch.full((1, 2), 0.5), **settings)


# A bandit whose every sample is two tokens: an answer, then a confidence given the answer.
CHANCES = torch.tensor([0.5, 0.0])  # of being right
REPORTS = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
CONFIDENCE_TOKENS = torch.tensor([False, True])


class Bandit(torch.nn.Module):
    """Indifferent at first; reports lean to the truth by `honesty` logits."""

    def __init__(self, honesty):
        super().__init__()
        self.answer = torch.nn.Parameter(torch.zeros(len(CHANCES)))
        self.confidence = torch.nn.Parameter(honesty * (CHANCES[:, None] == REPORTS).float())

    def log_probs(self, tokens):
        answer, report = tokens.unbind(-1)
        by_answer = self.answer.log_softmax(-1)[answer]
        return torch.stack([by_answer, self.confidence.log_softmax(-1)[answer, report]], -1)


def train(advantages_of, *, honesty=0.0, steps=250, n_prompts=16, n_samples=16):
    """What the bandit does in the end: probability of the better answer, its favourite answer, and
    that answer's favourite report.

    `advantages_of` correctness and confidence are those of samples or of tokens.
    """
    bandit, generator = Bandit(honesty), derive_generator(0, "bandit")
    optimiser = torch.optim.Adam(bandit.parameters(), lr=0.1)
    n = n_prompts * n_samples
    mask = torch.ones(n_prompts, n_samples, 2, dtype=torch.bool)
    for _ in range(steps):
        answer = bandit.answer.softmax(-1).multinomial(n, True, generator=generator)
        by_answer = bandit.confidence.softmax(-1)[answer]
        report = by_answer.multinomial(1, generator=generator)[:, 0]
        correct = torch.rand(n, generator=generator) < CHANCES[answer]
        tokens = torch.stack([answer, report], -1).view(n_prompts, n_samples, 2)
        shape = n_prompts, n_samples
        advantages = advantages_of(correct.view(shape), REPORTS[report].view(shape))
        loss = policy_loss(bandit.log_probs(tokens), advantages, mask, by="constant")
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    favourite = int(bandit.answer.argmax())
    report = float(REPORTS[bandit.confidence[favourite].argmax()])
    return float(bandit.answer.softmax(-1)[0].detach()), favourite, report


@pytest.mark.parametrize("score", ["brier", "spherical"])
def test_a_learner_under_a_bounded_score_is_right_and_says_how_often(score):
    better, favourite, report = train(lambda c, q: centred(calibrated(c, q, score=score)))
    assert (favourite, report) == (0, 0.5)
    assert better > 0.95


def test_a_learner_under_the_log_score_prefers_to_be_surely_wrong():
    """Once reports are about right, that is. From reports at random the first thing to learn is to
    avoid 0 and 1, which cost most where the answer is surely wrong, and the better answer is taken
    before the worse one's report is good."""
    better, favourite, report = train(
        lambda c, q: centred(calibrated(c, q, score="log")), honesty=5.0
    )
    assert (favourite, report) == (1, 0.0)
    assert better < 0.05


@pytest.mark.parametrize("reward", [log_score, group_calibration])
def test_routed_advantages_keep_the_score_of_confidence_from_choosing_the_answer(reward):
    better, favourite, report = train(
        lambda c, q: routed(
            centred(binary(c)), centred(reward(c, q)), CONFIDENCE_TOKENS.expand(*c.shape, 2)
        )
    )
    assert (favourite, report) == (0, 0.5)
    assert better > 0.95
