"""The identities of mechinterp.decisions, against sums written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.optimize import minimize
from scipy.special import entr, rel_entr

from mechinterp import decisions
from mechinterp.errors import AnalysisError, TaskError

finite = st.floats(-5, 5, width=32)


def posteriors(n_items: int, n_labels: int, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.dirichlet(np.ones(n_labels), size=n_items))


@st.composite
def problems(draw):
    """A utility matrix of any shape and values, and some posteriors for it."""
    n_actions, n_labels = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    utility = draw(hnp.arrays(float, (n_actions, n_labels), elements=finite))
    raw = draw(hnp.arrays(float, (5, n_labels), elements=st.floats(0.015625, 1, width=32)))
    return utility.tolist(), torch.from_numpy(raw / raw.sum(axis=1, keepdims=True))


def expected_utility_by_hand(utility, q: np.ndarray) -> np.ndarray:
    return np.array(
        [[sum(q_i[y] * row[y] for y in range(len(q_i))) for row in utility] for q_i in q]
    )


@settings(max_examples=200, deadline=None)
@given(problems())
def test_bayes_action_maximises_expected_utility_for_any_matrix(problem):
    utility, posterior = problem
    by_hand = expected_utility_by_hand(utility, posterior.numpy())
    reached = decisions.expected_utility(
        decisions.bayes_logits(posterior, utility), posterior, utility
    )
    np.testing.assert_allclose(reached, by_hand.max(axis=1), atol=1e-9)


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_no_report_beats_the_bayes_report_on_the_log_score(problem, seed):
    utility, posterior = problem
    best = decisions.log_score(decisions.bayes_logits(posterior, utility), posterior, utility)
    other = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, len(utility))))
    assert (decisions.log_score(other, posterior, utility) <= best + 1e-9).all()


@settings(max_examples=100, deadline=None)
@given(problems(), st.integers(0, 2**32 - 1))
def test_score_under_a_posterior_is_the_expectation_over_labels(problem, seed):
    utility, posterior = problem
    logits = torch.from_numpy(np.random.default_rng(seed).normal(size=(5, len(utility))))
    for measure in (decisions.log_score, decisions.expected_utility):
        by_label = torch.stack(
            [
                measure(logits, torch.full((5,), label), utility)
                for label in range(posterior.shape[1])
            ],
            dim=1,
        )
        expected = (by_label * posterior).sum(dim=1)
        torch.testing.assert_close(measure(logits, posterior, utility), expected)


def test_weighted_optimum_is_the_minimum_of_the_weighted_loss():
    weights = np.array([0.2, 1.8, 0.7])
    q = np.array([0.5, 0.2, 0.3])

    def loss(free):
        logits = np.append(free, 0.0)
        return -(weights * q * (logits - np.log(np.exp(logits).sum()))).sum()

    found = np.append(minimize(loss, np.zeros(2), tol=1e-12).x, 0.0)
    found = np.exp(found) / np.exp(found).sum()
    logits = decisions.bayes_logits(
        torch.tensor(q)[None], decisions.diagonal_utility(weights.tolist())
    )
    np.testing.assert_allclose(logits.exp().squeeze(0), found, atol=1e-5)
    np.testing.assert_allclose(logits.exp().squeeze(0), weights * q / (weights @ q), atol=1e-12)


def test_log_score_splits_into_learning_and_choosing():
    weights = np.array([0.02, 1.98])
    utility = decisions.diagonal_utility(weights.tolist())
    q = posteriors(50, 2)
    logits = torch.from_numpy(np.random.default_rng(1).normal(size=(50, 2)))
    p = logits.softmax(dim=1).numpy()
    total = (q.numpy() * weights).sum(axis=1)
    optimum = q.numpy() * weights / total[:, None]
    learning = total * entr(optimum).sum(axis=1)
    choosing = total * rel_entr(optimum, p).sum(axis=1)
    np.testing.assert_allclose(
        -decisions.log_score(logits, q, utility), learning + choosing, rtol=1e-10
    )


@pytest.mark.parametrize("weights", [(0.2, 1.8), (0.02, 1.98), (1.0, 2.0, 0.5)])
def test_ex_post_shift_turns_the_symmetric_posterior_into_the_weighted_optimum(weights):
    q = posteriors(40, len(weights))
    utility = decisions.diagonal_utility(weights)
    shift = decisions.ex_post_shift(utility)
    assert abs(shift.sum()) < 1e-12
    torch.testing.assert_close(
        (q.log() + shift).log_softmax(dim=1), decisions.bayes_logits(q, utility)
    )
    if len(weights) == 2:
        assert shift[1] - shift[0] == pytest.approx(np.log(weights[1] / weights[0]))


def test_the_threshold_of_a_weighted_decision():
    # Choose 1 iff q > w0 / (w0 + w1).
    q = torch.linspace(0.001, 0.999, 999, dtype=torch.float64)
    logits = decisions.bayes_logits(
        torch.stack([1 - q, q], dim=1), decisions.diagonal_utility((0.2, 1.8))
    )
    assert torch.equal(logits.argmax(dim=1) == 1, q > 0.1 + 1e-9)


def test_a_utility_that_is_not_diagonal_has_no_shift():
    with pytest.raises(AnalysisError, match="not diagonal"):
        decisions.ex_post_shift([[1, 0, 0.5], [0, 1, 0], [0, 0.5, 1]])
    with pytest.raises(AnalysisError, match="no finite shift"):
        decisions.ex_post_shift([[1, 0], [1, 1]])


def test_two_actions_are_always_diagonal():
    # Costs on both sides: v = [[3, 0], [0, 1]].
    shift = decisions.ex_post_shift([[1.0, -1.0], [-2.0, 0.0]])
    assert shift[0] - shift[1] == pytest.approx(np.log(3))


def test_best_constant_beats_every_other_constant():
    utility = [[1.0, 0.0, -2.0], [0.2, 1.5, 0.0], [0.0, 0.3, 1.0]]
    labels = torch.tensor([0] * 5 + [1] * 2 + [2] * 4)
    best = decisions.best_constant(labels, utility)
    by_action = [np.mean([row[y] for y in labels.tolist()]) for row in utility]
    assert best.action == int(np.argmax(by_action))
    assert best.value.utility == pytest.approx(max(by_action))
    grid = [
        (a / 20, b / 20, 1 - (a + b) / 20)
        for a, b in itertools.product(range(1, 19), repeat=2)
        if a + b < 20
    ]
    scores = [
        float(decisions.log_score(torch.tensor(p).log().expand(11, 3), labels, utility).mean())
        for p in grid
    ]
    assert max(scores) <= best.value.log_score
    nearest = grid[int(np.argmax(scores))]
    np.testing.assert_allclose(best.report, nearest, atol=0.05)


def test_best_constant_from_labels_is_that_from_their_one_hot_posterior():
    labels = torch.tensor([0, 1, 1, 1])
    posterior = torch.nn.functional.one_hot(labels, 2).double()
    utility = decisions.diagonal_utility((1.8, 0.2))
    first = decisions.best_constant(labels, utility)
    second = decisions.best_constant(posterior, utility)
    assert first.value == second.value
    assert first.action == 0


def test_oracle_is_at_least_any_report_and_at_least_the_constant():
    q = posteriors(200, 2)
    utility = decisions.diagonal_utility((0.2, 1.8))
    oracle = decisions.oracle_value(q, utility)
    constant = decisions.best_constant(q, utility).value
    noisy = decisions.value(torch.randn(200, 2).double(), q, utility)
    for worse in (constant, noisy):
        assert oracle.utility >= worse.utility
        assert oracle.log_score >= worse.log_score


def test_certain_posteriors_give_finite_scores():
    posterior = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    utility = decisions.diagonal_utility((1, 1))
    assert decisions.oracle_value(posterior, utility).log_score == 0
    assert decisions.bayes_logits(posterior, [[1, 0], [1, 0]]).softmax(1).eq(0.5).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: decisions.log_score(torch.zeros(3, 2), torch.zeros(3).long(), [[1, 0]]), "1 act"),
        (lambda: decisions.action_weights(torch.tensor([0, 2]), [[1, 0], [0, 1]]), "up to 2"),
        (lambda: decisions.action_weights(torch.ones(4, 3), [[1, 0], [0, 1]]), "posterior has"),
        (lambda: decisions.relative_utility([[1, float("nan")], [0, 1]]), "finite"),
        (lambda: decisions.relative_utility([1.0, 2.0]), "finite"),
    ],
)
def test_bad_inputs_are_named(call, message):
    with pytest.raises(TaskError, match=message):
        call()
