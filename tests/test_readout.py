"""The nested readouts on streams whose content is known, against scikit-learn and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechinterp import decisions
from mechinterp.errors import AnalysisError
from probes.readout import fit_readouts

SYMMETRIC = decisions.diagonal_utility([1.0, 1.0])
N = 3000


@pytest.fixture(scope="module")
def world():
    """Labels from a known log-odds s, and streams that hold s or nothing."""
    generator = torch.Generator().manual_seed(0)
    s = 2.0 * torch.randn(N, generator=generator, dtype=torch.float64)
    labels = (torch.rand(N, generator=generator, dtype=torch.float64) < torch.sigmoid(s)).long()
    noise = torch.randn(N, 6, generator=generator, dtype=torch.float64)
    informed = noise.clone()
    informed[:, 2] = s
    folds = torch.arange(N) % 3
    posterior = torch.stack([torch.sigmoid(-s), torch.sigmoid(s)], 1)
    return s, labels, noise, informed, folds, posterior


def score(logits, posterior, utility=SYMMETRIC):
    return float(decisions.log_score(logits, posterior, utility).mean())


def as_logits(log_odds):
    return torch.stack([torch.zeros_like(log_odds), log_odds], 1)


def weights_of(labels, utility=SYMMETRIC):
    return decisions.action_weights(labels, utility)


def test_a_shift_is_all_threshold(world):
    s, labels, noise, _, folds, posterior = world
    readouts = fit_readouts(as_logits(s + 1.5), {1: noise}, weights_of(labels), folds)
    raw, bias, head = (score(readouts.logits[r], posterior) for r in ("raw", "bias", "head"))
    oracle = score(as_logits(s), posterior)
    assert oracle - raw > 0.1
    assert abs(oracle - bias) < 2e-3
    assert abs(head - bias) < 5e-3


def test_a_rotation_is_all_readout(world):
    s, labels, noise, informed, folds, posterior = world
    rotated = 0.5 * s + 0.87 * 2.0 * noise[:, 0]
    readouts = fit_readouts(as_logits(rotated), {1: informed}, weights_of(labels), folds)
    raw, bias, head = (score(readouts.logits[r], posterior) for r in ("raw", "bias", "head"))
    oracle = score(as_logits(s), posterior)
    assert bias - raw < 0.02
    assert head - bias > 0.1
    assert oracle - head < 0.01


@pytest.mark.parametrize("temperature", [0.03, 0.3, 3.0, 30.0, 300.0])
def test_a_temperature_of_any_size_is_all_readout(world, temperature):
    """Where the stream holds nothing else, the report itself must be turned up or down."""
    s, labels, noise, _, folds, posterior = world
    readouts = fit_readouts(as_logits(temperature * s), {1: noise}, weights_of(labels), folds)
    raw, head = (score(readouts.logits[r], posterior) for r in ("raw", "head"))
    oracle = score(as_logits(s), posterior)
    assert oracle - raw > 0.05
    assert oracle - head < 5e-3


@pytest.mark.parametrize("temperature", [10.0, 100.0])
def test_a_temperature_on_three_actions_is_all_readout(world, temperature):
    _, _, noise, informed, folds, _ = world
    report = torch.stack([informed[:, 2], -informed[:, 2], 0.5 * noise[:, 0]], 1)
    p = report.softmax(1)
    generator = torch.Generator().manual_seed(1)
    labels = torch.multinomial(p, 1, generator=generator).squeeze(1)
    utility = decisions.diagonal_utility([1.0, 1.0, 1.0])
    weights = weights_of(labels, utility)
    readouts = fit_readouts(temperature * report, {1: noise}, weights, folds)
    raw, head = (score(readouts.logits[r], p, utility) for r in ("raw", "head"))
    oracle = score(report, p, utility)
    assert oracle - raw > 0.5
    assert oracle - head < 0.01


def test_what_only_an_earlier_layer_holds_is_discarded(world):
    s, labels, noise, informed, folds, posterior = world
    nothing = as_logits(torch.zeros_like(s))
    streams = {1: informed, 2: noise}
    readouts = fit_readouts(nothing, streams, weights_of(labels), folds)
    head, depth = (score(readouts.logits[r], posterior) for r in ("head", "depth"))
    assert depth - head > 0.1
    assert score(as_logits(s), posterior) - depth < 0.01
    assert all("layer 1" in choice for choice in readouts.chosen["depth"])


def test_one_block_can_discard_nothing(world):
    s, labels, _, informed, folds, _ = world
    readouts = fit_readouts(as_logits(0.5 * s), {1: informed}, weights_of(labels), folds)
    assert torch.equal(readouts.logits["depth"], readouts.logits["head"])
    assert set(readouts.chosen["depth"]) == {"no change"}


def test_what_no_layer_combines_is_found_through_the_latents(world):
    s, labels, noise, _, folds, posterior = world
    nothing = as_logits(torch.zeros_like(s))
    readouts = fit_readouts(
        nothing,
        {1: noise, 2: noise},
        weights_of(labels),
        folds,
        beliefs=lambda held_out, outer: posterior.log(),
    )
    depth, latents = (score(readouts.logits[r], posterior) for r in ("depth", "latents"))
    assert latents - depth > 0.1
    assert latents == pytest.approx(score(as_logits(s), posterior), abs=1e-9)


def test_nothing_to_gain_changes_nothing_much(world):
    """Rungs fall below the raw report only by the noise of choosing."""
    s, labels, noise, _, folds, posterior = world
    readouts = fit_readouts(as_logits(s), {1: noise, 2: noise}, weights_of(labels), folds)
    oracle = score(as_logits(s), posterior)
    for logits in readouts.logits.values():
        assert oracle - score(logits, posterior) < 5e-3


def test_out_of_fold_logits_equal_scikit_learns(world):
    """With one strength and no raw report the head is a ridge-penalised logistic regression."""
    s, labels, _, informed, folds, _ = world
    from probes.readout import ReadoutConfig

    config = ReadoutConfig(strengths=(1e-2,), tolerance=1e-8)
    nothing = as_logits(torch.zeros_like(s))
    readouts = fit_readouts(nothing, {1: informed}, weights_of(labels), folds, config=config)
    ours = readouts.logits["head"][:, 1] - readouts.logits["head"][:, 0]
    for fold in range(3):
        train, test = (folds != fold).numpy(), (folds == fold).numpy()
        x = informed.numpy()
        z = (x - x[train].mean(0)) / x[train].std(0, ddof=1)
        # Two mirrored weight vectors: a penalty on both is half of it on their difference.
        penalty = 1e-2 * train.sum() / 2
        reference = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000)
        reference.fit(z[train], labels.numpy()[train])
        np.testing.assert_allclose(ours[test], reference.decision_function(z[test]), atol=2e-4)


def test_weighted_costs_move_the_bias_to_the_weighted_optimum(world):
    s, labels, noise, _, folds, _posterior = world
    utility = decisions.diagonal_utility([0.2, 1.8])
    readouts = fit_readouts(as_logits(s), {1: noise}, weights_of(labels, utility), folds)
    moved = readouts.logits["bias"][:, 1] - readouts.logits["bias"][:, 0] - s
    assert float(moved.mean()) == pytest.approx(np.log(9), abs=0.15)


def test_three_actions(world):
    _, _, _noise, informed, folds, _ = world
    labels = torch.bucketize(informed[:, 2], torch.tensor([-1.0, 1.0], dtype=torch.float64))
    utility = decisions.diagonal_utility([1.0, 1.0, 1.0])
    nothing = torch.zeros(N, 3, dtype=torch.float64)
    readouts = fit_readouts(nothing, {1: informed}, weights_of(labels, utility), folds)
    accuracy = (readouts.logits["head"].argmax(1) == labels).double().mean()
    assert accuracy > 0.9


def test_two_folds_are_refused(world):
    s, labels, noise, *_ = world
    with pytest.raises(AnalysisError, match="at least 3 folds"):
        fit_readouts(as_logits(s), {1: noise}, weights_of(labels), torch.arange(N) % 2)
