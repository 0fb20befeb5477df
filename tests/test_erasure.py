"""Erasure leaves nothing to read and moves no more than it must."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss, roc_auc_score

from mechinterp.errors import AnalysisError
from probes.erasure import fit_eraser, random_eraser
from probes.logistic import fit_logistic


def data(n=500, d=8, n_values=3, seed=0, rank=None):
    rng = np.random.default_rng(seed)
    codes = rng.integers(0, n_values, size=n)
    noise = rng.normal(size=(n, rank or d)) @ rng.normal(size=(rank or d, d))
    X = noise + np.eye(n_values)[codes] @ rng.normal(size=(n_values, d)) * 2 + 5
    return torch.tensor(X), torch.nn.functional.one_hot(torch.tensor(codes), n_values).double()


def test_no_probe_beats_the_base_rate_in_sample():
    X, Z = data()
    eraser = fit_eraser(X, Z)
    assert eraser.rank == 2  # three values, one of which follows from the others
    erased = eraser(X)
    covariance = (erased - erased.mean(0)).T @ (Z - Z.mean(0)) / len(X)
    assert covariance.abs().max() < 1e-10
    rate = Z.mean(0)
    entropy = -(rate * rate.log() + (1 - rate) * (1 - rate).log()) * len(X)
    readable = fit_logistic(X, Z, l2=1e-6).objective
    left = fit_logistic(erased, Z, l2=1e-6, tol=1e-9).objective
    assert (readable < 0.8 * entropy).all()
    torch.testing.assert_close(left, entropy, rtol=1e-6, atol=0)


def test_scikit_learn_finds_nothing_left():
    """In sample and all but unpenalised: constant predictions, the loss of the base rates."""
    X, Z = data()
    labels = Z.argmax(1).numpy()
    for features, found in ((X, True), (fit_eraser(X, Z)(X), False)):
        features = ((features - features.mean(0)) / features.std(0)).numpy()
        probe = LogisticRegression(C=1e6, tol=1e-10, max_iter=5000).fit(features, labels)
        p = probe.predict_proba(features)
        base = np.tile(Z.mean(0), (len(X), 1))
        ratio = log_loss(labels, p) / log_loss(labels, base)
        spread = p.std(0).max()
        if found:
            assert ratio < 0.7
            assert roc_auc_score(labels, p, multi_class="ovr") > 0.8
        else:
            assert ratio == pytest.approx(1, abs=1e-6)
            assert spread < 1e-3  # no scores to rank: the AUROC is that of rounding


def test_a_random_eraser_removes_as_many_directions_and_leaves_the_concept():
    X, Z = data(d=40)
    own = fit_eraser(X, Z)
    generator = torch.Generator().manual_seed(0)
    control = random_eraser(X, own.rank, generator=generator)
    assert control.rank == own.rank == 2
    covariance = torch.linalg.matrix_rank(torch.cov(control(X).T), rtol=1e-9)
    assert covariance == 40 - 2
    assert fit_eraser(control(X), Z).rank == 2
    torch.testing.assert_close(control(control(X)), control(X))
    torch.testing.assert_close(control(X).mean(0), X.mean(0))
    with pytest.raises(AnalysisError, match="rank: must be 0 to 40 here, got 41"):
        random_eraser(X, 41, generator=generator)


def test_equals_the_solution_by_lagrange_multipliers():
    """min E|Px + b - x|^2 subject to P Cov(x, z) = 0, written out for an invertible Cov(x)."""
    X, Z = data(n_values=2)
    z = Z[:, 1:]
    eraser = fit_eraser(X, z)
    Xc, zc = X - X.mean(0), z - z.mean(0)
    covariance, cross = Xc.T @ Xc / len(X), Xc.T @ zc / len(X)
    solved = torch.linalg.solve(covariance, cross)
    expected = torch.eye(8) - cross @ torch.linalg.inv(cross.T @ solved) @ solved.T
    torch.testing.assert_close(eraser.projection, expected, atol=1e-8, rtol=0)
    torch.testing.assert_close(eraser(X).mean(0), X.mean(0))


def test_erasing_twice_is_erasing_once():
    X, Z = data()
    eraser = fit_eraser(X, Z)
    torch.testing.assert_close(eraser(eraser(X)), eraser(X))
    again = fit_eraser(eraser(X), Z)
    assert again.rank == 0
    torch.testing.assert_close(again(X), X)


def test_moves_less_than_orthogonal_projection_in_every_norm():
    X, Z = data()
    Xc = X - X.mean(0)
    directions = torch.linalg.qr(Xc.T @ (Z - Z.mean(0))[:, 1:]).Q
    moved = fit_eraser(X, Z)(X) - X
    moved_orthogonally = -Xc @ directions @ directions.T
    rng = np.random.default_rng(0)
    whitening = torch.linalg.inv(torch.linalg.cholesky(Xc.T @ Xc / len(X))).T
    for norm in (torch.eye(8).double(), whitening, torch.tensor(rng.normal(size=(8, 8)))):
        assert (moved @ norm).square().sum() < (moved_orthogonally @ norm).square().sum()


def test_features_without_variance_stay_as_they_are():
    X, Z = data(rank=4)
    X = torch.cat([X, torch.full((len(X), 1), 3.0)], 1)
    erased = fit_eraser(X, Z)(X)
    torch.testing.assert_close(erased[:, -1], X[:, -1])
    covariance = (erased - erased.mean(0)).T @ (Z - Z.mean(0)) / len(X)
    assert covariance.abs().max() < 1e-8


def test_an_eraser_applies_to_activations_of_any_shape_and_precision():
    X, Z = data()
    stream = X.float().view(50, 10, 8)
    assert fit_eraser(X, Z)(stream).dtype == torch.float32
    torch.testing.assert_close(
        fit_eraser(X, Z)(stream).view(-1, 8), fit_eraser(X, Z)(X).float(), atol=1e-4, rtol=1e-4
    )


def test_invalid_input_is_named():
    X, Z = data()
    with pytest.raises(AnalysisError, match=r"Z: expected shape \[500, k\]"):
        fit_eraser(X, Z[:-1])
    with pytest.raises(AnalysisError, match="NaN"):
        fit_eraser(X / 0, Z)
