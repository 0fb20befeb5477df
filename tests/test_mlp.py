"""The MLP probe: what it reads that linear probes cannot, and that problems do not touch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError
from probes.lda import LDAProbe
from probes.mlp import MLPConfig, MLPProbe, fit_mlp_many


def xor(n=1200, d=10, seed=0):
    """Two planted features of which the label is the exclusive or; activations far from 0."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d))
    labels = ((X[:, 0] > 0) ^ (X[:, 1] > 0)).astype(int)
    return X * rng.gamma(1, size=d) + 30 * rng.normal(size=d), labels


def test_reads_xor_and_linear_probes_do_not():
    X, labels = xor(2500)
    train, test = slice(0, 1500), slice(1500, None)
    assert MLPProbe().fit(X[train], labels[train]).score(X[test], labels[test]) > 0.93
    linear = LDAProbe().fit(X[train], labels[train]).score(X[test], labels[test])
    assert linear == pytest.approx(0.5, abs=0.05)
    noise = np.random.default_rng(1).permutation(labels)
    score = MLPProbe().fit(X[train], noise[train]).score(X[test], noise[test])
    assert score == pytest.approx(0.5, abs=0.05)


def test_reads_three_classes_as_probabilities():
    X, labels = xor()
    labels = labels + (X[:, 2] > np.median(X[:, 2]))
    probe = MLPProbe().fit(X[:800], np.array(["a", "b", "c"])[labels[:800]])
    p = probe.predict_proba(X[800:])
    np.testing.assert_allclose(p.sum(1), 1)
    assert (np.array(["a", "b", "c"])[p.argmax(1)] == probe.predict(X[800:])).all()
    linear = LDAProbe().fit(X[:800], labels[:800]).score(X[800:], labels[800:])
    assert (p.argmax(1) == labels[800:]).mean() > linear + 0.1
    log_loss = -np.log(p[np.arange(400), labels[800:]]).mean()
    assert log_loss == pytest.approx(probe.fits_.validation_loss.item(), abs=0.15)


def test_problems_side_by_side_are_trained_as_if_alone():
    X, labels = xor(400)
    X, other = torch.tensor(X), torch.tensor(np.random.default_rng(2).permutation(labels))
    both = torch.stack([torch.tensor(labels), other], 1)
    weights = torch.rand(400, 2, dtype=torch.float64) * (torch.arange(400) % 5 != 0)[:, None]
    config = MLPConfig(width=16, max_epochs=30)
    together = fit_mlp_many(X, both, weights=weights, config=config)
    for j in range(2):
        part = fit_mlp_many(X, both[:, [j]], weights=weights[:, [j]], config=config)
        assert part.epoch[0] == together.epoch[j]
        torch.testing.assert_close(
            part.logits(X)[:, 0], together.logits(X)[:, j], atol=1e-3, rtol=0
        )
    again = fit_mlp_many(X, both, weights=weights, config=config)
    assert torch.equal(again.hidden, together.hidden)
    seeded = fit_mlp_many(X, both, weights=weights, config=replace(config, seed=1))
    assert not torch.equal(seeded.hidden, together.hidden)


def test_items_without_weight_are_not_seen():
    X, labels = xor(300)
    X, labels = torch.tensor(X), torch.tensor(labels)[:, None]
    left_out = torch.arange(300) % 3 == 0
    weights = (~left_out).double()[:, None]
    config = MLPConfig(width=8, max_epochs=10)
    fits = fit_mlp_many(X, labels, weights=weights, config=config)
    changed = torch.where(left_out[:, None], 1 - labels, labels)
    same = fit_mlp_many(X, changed, weights=weights, config=config)
    assert torch.equal(fits.hidden, same.hidden)
    # Nor do the activations of those items matter (their mean and deviation only round otherwise).
    moved = torch.where(left_out[:, None], X + 1.0, X)
    near = fit_mlp_many(moved, labels, weights=weights, config=config)
    torch.testing.assert_close(fits.logits(X), near.logits(X), atol=1e-2, rtol=0)


def test_stops_at_the_least_loss_on_the_items_held_out():
    rng = np.random.default_rng(0)
    X, labels = torch.tensor(rng.normal(size=(120, 40))), torch.tensor(rng.integers(0, 2, (120, 1)))
    groups = torch.arange(120) // 12
    config = MLPConfig(width=16, max_epochs=200, patience=15, weight_decay=0.0)
    fits = fit_mlp_many(X, labels, groups=groups, config=config)
    assert fits.epoch[0] < 50  # noise: learning soon means memorising
    assert fits.validation_loss[0] < 0.75
    rows = torch.isin(groups, torch.tensor(held_groups(X, labels, groups, config)))
    log_p = fits.logits(X)[rows, 0].log_softmax(1)
    loss = -log_p.gather(1, labels[rows]).mean()
    assert loss.item() == pytest.approx(fits.validation_loss[0].item(), abs=1e-5)


def held_groups(X, labels, groups, config):
    """The groups whose labels the first epoch's parameters do not depend on."""
    start = fit_mlp_many(X, labels, groups=groups, config=replace(config, max_epochs=1))
    held = []
    for group in groups.unique().tolist():
        flipped = torch.where((groups == group)[:, None], 1 - labels, labels)
        fits = fit_mlp_many(X, flipped, groups=groups, config=replace(config, max_epochs=1))
        if torch.equal(fits.hidden, start.hidden):
            held.append(group)
    assert len(held) == 2  # a fifth of 10
    return held


def test_invalid_input_is_named():
    X, labels = xor(50)
    X, labels = torch.tensor(X), torch.tensor(labels)
    with pytest.raises(AnalysisError, match=r"labels: expected whole numbers of shape \[50, k\]"):
        fit_mlp_many(X, labels)
    with pytest.raises(AnalysisError, match="X, weights: must be finite"):
        fit_mlp_many(X * torch.nan, labels[:, None])
    with pytest.raises(AnalysisError, match="no items to train on"):
        fit_mlp_many(X, labels[:, None], weights=torch.zeros(50, 1))
    with pytest.raises(AnalysisError, match="width: must be at least 1"):
        MLPConfig(width=0)
    with pytest.raises(AnalysisError, match="validation: must lie between"):
        MLPConfig(validation=1.0)


# Which items are held out depends on how many there are, so that a weight of 2 is no copy.
_HELD_OUT = {"check_sample_weight_equivalence_on_dense_data": "items are held out by number"}


@parametrize_with_checks([MLPProbe(8, max_epochs=50)], expected_failed_checks=lambda _: _HELD_OUT)
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
