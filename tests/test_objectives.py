"""Losses against torch's own and sums written out by hand; gradients against finite differences."""

from __future__ import annotations

import json
import math

import pytest
import torch

from mechinterp import objectives
from mechinterp.decisions import diagonal_utility, expected_utility
from mechinterp.errors import SpecError


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    return logits, torch.randint(0, 3, (12,), generator=generator)


def test_symmetric_utility_is_cross_entropy(batch):
    symmetric = objectives.get("utility_weighted", utility=diagonal_utility((1, 1, 1)))
    torch.testing.assert_close(symmetric(*batch), objectives.get("cross_entropy")(*batch))


def test_diagonal_utility_is_torchs_weighted_cross_entropy(batch):
    weights = (0.2, 1.8, 1.0)
    weighted = objectives.get("utility_weighted", utility=diagonal_utility(weights))
    expected = torch.nn.functional.cross_entropy(
        *batch, weight=torch.tensor(weights, dtype=torch.float64), reduction="none"
    )
    torch.testing.assert_close(weighted(*batch), expected)


def test_general_utility_is_the_sum_written_out(batch):
    utility = [[2.0, -1.0, 0.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]]
    logits, labels = batch
    loss = objectives.get("utility_weighted", utility=utility)(logits, labels)
    for i, label in enumerate(labels.tolist()):
        worst = min(row[label] for row in utility)
        log_p = logits[i] - logits[i].exp().sum().log()
        by_hand = -sum((utility[a][label] - worst) * log_p[a] for a in range(3))
        torch.testing.assert_close(loss[i], by_hand)


def optimum(objective, posterior: float) -> float:
    """The log-odds that minimise the expected loss of one item, by descent on two logits."""
    z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    weights = torch.tensor([1 - posterior, posterior], dtype=torch.float64)
    search = torch.optim.LBFGS([z], max_iter=200, line_search_fn="strong_wolfe")

    def loss():
        search.zero_grad()
        logits = torch.stack([-z / 2, z / 2], 1).expand(2, 2)
        value = (weights * objective(logits, torch.tensor([0, 1]))).sum()
        value.backward()
        return value

    search.step(loss)
    return float(z.detach())


@pytest.mark.parametrize("posterior", [0.03, 0.4, 0.8])
def test_logit_adjustment_learns_the_ex_post_shift(posterior):
    w = (0.2, 1.8)
    adjusted = objectives.get("logit_adjusted", priors=[1 / weight for weight in w])
    weighted = objectives.get("utility_weighted", utility=diagonal_utility(w))
    expected = math.log(posterior / (1 - posterior)) + math.log(w[1] / w[0])
    assert optimum(adjusted, posterior) == pytest.approx(expected, abs=1e-3)
    assert optimum(weighted, posterior) == pytest.approx(expected, abs=1e-3)


def test_focal_without_focus_is_weighted_cross_entropy(batch):
    alpha = (0.2, 1.0, 1.8)
    weighted = objectives.get("utility_weighted", utility=diagonal_utility(alpha))
    focal = objectives.get("focal", gamma=0.0, alpha=alpha)
    torch.testing.assert_close(focal(*batch), weighted(*batch))


def test_focal_by_hand(batch):
    logits, labels = batch
    p = logits.softmax(1)[torch.arange(12), labels]
    expected = -((1 - p) ** 2) * p.log()
    torch.testing.assert_close(objectives.get("focal")(logits, labels), expected)


def test_focal_optimum_is_less_confident(batch):
    # The condition for a minimum at report p, written out for two labels and gamma = 2.
    posterior = 0.9
    p = 1 / (1 + math.exp(-optimum(objectives.get("focal"), posterior)))
    slope = lambda p: 2 * (1 - p) * math.log(p) - (1 - p) ** 2 / p  # noqa: E731
    assert posterior * slope(p) == pytest.approx((1 - posterior) * slope(1 - p), rel=1e-4)
    assert 0.5 < p < posterior


@pytest.mark.parametrize(("share", "n_kept"), [(0.25, 3), (0.3, 4), (1.0, 12)])
def test_hard_examples_average_the_largest_losses(batch, share, n_kept):
    plain = objectives.get("cross_entropy")(*batch)
    hard = objectives.get("hard_examples", share=share)(*batch)
    assert int((hard > 0).sum()) == n_kept
    torch.testing.assert_close(hard.mean(), plain.sort(descending=True).values[:n_kept].mean())


def test_smoothed_regret_tends_to_the_regret_of_the_decision(batch):
    utility = [[1.0, 0.0, -2.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]]
    logits, labels = batch
    cold = objectives.get("smoothed_regret", utility=utility, temperature=1e-3)
    u = torch.tensor(utility, dtype=torch.float64)
    regret = u[labels, labels] - expected_utility(logits, labels, utility)
    torch.testing.assert_close(cold(logits, labels), regret)
    warm = objectives.get("smoothed_regret", utility=utility)(logits, labels)
    for i, label in enumerate(labels.tolist()):
        p = logits[i].exp() / logits[i].exp().sum()
        by_hand = max(row[label] for row in utility) - sum(
            p[a] * utility[a][label] for a in range(3)
        )
        torch.testing.assert_close(warm[i], by_hand)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("focal", {"gamma": -1.0}, "focal: gamma must not be negative"),
        ("focal", {"alpha": (1.0, 2.0)}, "alpha needs 3 weights"),
        ("hard_examples", {"share": 0.0}, r"share must be in \(0, 1\]"),
        ("logit_adjusted", {"priors": (1.0, 0.0, 1.0)}, "priors needs 3 positive numbers"),
        ("smoothed_regret", {"utility": [[1] * 3] * 3, "temperature": 0.0}, "must be positive"),
    ],
)
def test_settings_out_of_range(batch, name, settings, message):
    with pytest.raises(SpecError, match=message):
        objectives.get(name, **settings)(*batch)


@pytest.mark.parametrize(
    "objective",
    [
        objectives.get("cross_entropy"),
        objectives.get("utility_weighted", utility=[[1, 0, -2], [0.5, 1, 0], [0, 0, 3]]),
        objectives.get("logit_adjusted", priors=(0.2, 0.5, 1.3), tau=0.7),
        objectives.get("focal", gamma=1.5, alpha=(0.2, 1.0, 1.8)),
        objectives.get("hard_examples", share=0.3),
        objectives.get("smoothed_regret", utility=[[1, 0, -2], [0.5, 1, 0], [0, 0, 3]]),
    ],
)
def test_gradients(objective, batch):
    logits, labels = batch
    assert torch.autograd.gradcheck(lambda x: objective(x, labels), logits)


def test_descriptions_are_json():
    objective = objectives.get("utility_weighted", utility=diagonal_utility((0.2, 1.8)))
    assert json.loads(json.dumps(objective.describe())) == {
        "name": "utility_weighted",
        "utility": [[0.2, 0.0], [0.0, 1.8]],
    }


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("crossentropy", {}, "does not exist; choose one of: cross_entropy, focal"),
        ("utility_weighted", {}, r"takes the settings \['utility'\], got \[\]"),
        ("focal", {"beta": 2}, r"takes the settings \['alpha', 'gamma'\], got \['beta'\]"),
        ("cross_entropy", {"weight": 2}, r"takes the settings \[\], got \['weight'\]"),
    ],
)
def test_unknown_names_and_settings(name, settings, message):
    with pytest.raises(SpecError, match=message):
        objectives.get(name, **settings)
