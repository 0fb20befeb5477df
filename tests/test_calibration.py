"""Calibration of a decision at given costs: a report that is right has no error beyond chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from analyses.calibration import measure_calibration
from analyses.streams import DecisionStreams
from mechinterp import decisions
from mechinterp.tasks.base import Items

COSTS = {
    "symmetric": decisions.diagonal_utility([1.0, 1.0]),
    "w1.8": decisions.diagonal_utility([0.2, 1.8]),
}


def items_of(labels):
    n = len(labels)
    return Items(
        tokens=torch.zeros(n, 1, dtype=torch.long),
        labels=labels,
        latents={},
        groups=torch.arange(n),
        roles=np.full((n, 1), ""),
    )


@pytest.mark.parametrize("costs", COSTS)
def test_a_report_that_serves_its_costs_is_calibrated(costs):
    """Labels drawn from the posterior, the report p_u,a = sum_y q_y v(a, y) / W(q)."""
    rng = np.random.default_rng(0)
    q = rng.uniform(size=6000)
    posterior = torch.tensor(np.stack([1 - q, q], 1))
    logits = decisions.bayes_logits(posterior, COSTS[costs])
    found = []
    for _ in range(60):
        labels = torch.tensor((rng.uniform(size=6000) < q).astype(int))
        tables = measure_calibration(
            DecisionStreams({}, {}, logits), items_of(labels), costs={costs: COSTS[costs]}
        )
        found.append(tables["calibration_summary"].iloc[0])
    ece, floor, debiased = (
        np.array([row[name] for row in found]) for name in ("ece", "ece_floor", "ece_debiased")
    )
    assert floor.mean() == pytest.approx(ece.mean(), rel=0.06)
    np.testing.assert_allclose(debiased, ece - floor)
    assert abs(debiased.mean()) < 0.1 * ece.mean()


def test_a_shifted_report_has_an_error_and_the_diagram_shows_where():
    rng = np.random.default_rng(1)
    q = rng.uniform(size=4000)
    labels = torch.tensor((rng.uniform(size=4000) < q).astype(int))
    logits = torch.tensor(np.stack([np.log1p(-q), np.log(q)], 1)) + torch.tensor([0.0, 1.0])
    tables = measure_calibration(DecisionStreams({}, {}, logits), items_of(labels), costs=COSTS)
    summary = tables["calibration_summary"].set_index("costs").loc["symmetric"]
    predicted = logits.softmax(1)[:, 1].numpy()
    expected = np.abs(predicted - q).mean()
    assert summary.ece_debiased == pytest.approx(expected, abs=0.015)
    diagram = tables["calibration"].query("costs == 'symmetric'")
    assert list(diagram.columns) == ["costs", "bin", "predicted", "observed", "n_items"]
    assert (diagram.predicted > diagram.observed).all()
    assert diagram.n_items.sum() == 4000
