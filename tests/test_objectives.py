"""Losses against torch's own and sums written out by hand; gradients against finite differences."""

from __future__ import annotations

import json

import pytest
import torch

from mechinterp import objectives
from mechinterp.decisions import diagonal_utility
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


@pytest.mark.parametrize(
    "objective",
    [
        objectives.get("cross_entropy"),
        objectives.get("utility_weighted", utility=[[1, 0, -2], [0.5, 1, 0], [0, 0, 3]]),
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
        ("crossentropy", {}, "does not exist; choose one of: cross_entropy, utility_weighted"),
        ("utility_weighted", {}, r"takes the settings \['utility'\], got \[\]"),
        ("cross_entropy", {"weight": 2}, r"takes the settings \[\], got \['weight'\]"),
    ],
)
def test_unknown_names_and_settings(name, settings, message):
    with pytest.raises(SpecError, match=message):
        objectives.get(name, **settings)
