"""Reduced-rank regression: its optimum against alternating minimisation, its ends against ridge."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError
from probes.low_rank import LowRankClassifierProbe, LowRankProbe, fit_low_rank_many


def planted(n=80, d=10, k=6, rank=2, seed=0, noise=1.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) + 2
    B = rng.normal(size=(d, rank)) @ rng.normal(size=(rank, k))
    return X, X @ B + noise * rng.normal(size=(n, k)) - 3, B


def objective(X, Y, coef, weights, strength):
    centred, targets = X - np.average(X, 0, weights), Y - np.average(Y, 0, weights)
    residual = targets - centred @ coef.T
    return (weights[:, None] * residual**2).sum() + strength * (coef**2).sum()


def alternating(X, Y, rank, weights, strength, seed):
    """The least objective over B = P Q^T of rank r, one factor at a time: Q orthonormal."""
    rng = np.random.default_rng(seed)
    root = np.sqrt(weights)[:, None]
    A, T = root * (X - np.average(X, 0, weights)), root * (Y - np.average(Y, 0, weights))
    Q = np.linalg.qr(rng.normal(size=(Y.shape[1], rank)))[0]
    inverse = np.linalg.inv(A.T @ A + strength * np.eye(X.shape[1]))
    for _ in range(500):
        P = inverse @ A.T @ T @ Q
        left, _, right = np.linalg.svd(T.T @ A @ P, full_matrices=False)
        Q = left @ right
    return objective(X, Y, Q @ P.T, weights, strength)


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 4), st.sampled_from([0.1, 5.0, 100.0]), st.sampled_from([10, 120]))
def test_no_coefficients_of_that_rank_are_better(rank, strength, d):
    X, Y, _ = planted(d=d, k=4, noise=2.0)
    weights = np.random.default_rng(1).gamma(1, size=len(X))
    probe = LowRankProbe(rank, strength).fit(X, Y, weights)
    assert np.linalg.matrix_rank(probe.coef_, tol=1e-8) <= rank
    found = objective(X, Y, probe.coef_, weights, strength)
    best = min(alternating(X, Y, rank, weights, strength, seed) for seed in range(3))
    assert found <= best * (1 + 1e-9)
    assert found == pytest.approx(best, rel=1e-4)


def test_gains_are_what_each_rank_takes_off_the_objective():
    X, Y, _ = planted()
    weights = np.ones(len(X))
    fits = fit_low_rank_many(torch.tensor(X), torch.tensor(Y), (0.5, 20.0))
    values = [objective(X, Y, np.zeros((6, 10)), weights, 0.0)] * np.ones((2, 1))
    for rank in range(1, 7):
        coefs, _ = fits.at_rank(rank)
        value = [
            [objective(X, Y, c.numpy(), weights, a)]
            for c, a in zip(coefs, (0.5, 20.0), strict=True)
        ]
        values = np.concatenate([values, value], 1)
    np.testing.assert_allclose(-np.diff(values), fits.gains, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("d", [10, 120])
def test_full_rank_is_ridge(d):
    X, Y, _ = planted(d=d)
    weights = np.random.default_rng(1).gamma(1, size=len(X))
    for y in (Y, Y[:, 0]):
        probe = LowRankProbe(6, 3.0).fit(X, y, weights)
        expected = Ridge(3.0).fit(X, y, weights)
        np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-9)
        np.testing.assert_allclose(probe.predict(X), expected.predict(X), atol=1e-8)


def test_planted_directions_are_found_and_a_low_rank_predicts_better():
    X, Y, B = planted(n=400, d=60, k=30, rank=2, noise=20.0)
    test = np.random.default_rng(5).normal(size=(2000, 60))
    errors = {}
    for rank in (1, 2, 30):
        probe = LowRankProbe(rank, 1e-3).fit(X, Y)
        errors[rank] = ((test @ (probe.coef_.T - B)) ** 2).mean()
        if rank == 2:
            basis = np.linalg.svd(B, full_matrices=False)[0][:, :2]
            cosines = np.linalg.svd(probe.directions_ @ basis)[1]
    assert errors[2] < 0.5 * errors[30]
    assert errors[2] < errors[1]
    assert cosines.min() > 0.9
    # Theory: noise in 2 (60 + 30 - 2) of 60 x 30 directions.
    assert errors[2] / errors[30] == pytest.approx(2 * (60 + 30 - 2) / (60 * 30), rel=0.3)


def test_classifier_of_full_rank_is_the_ridge_classifier():
    X, Y, _ = planted(k=4)
    labels = Y.argmax(1)
    probe = LowRankClassifierProbe(4, 2.0).fit(X, labels)
    expected = RidgeClassifier(2.0).fit(X, labels)
    np.testing.assert_array_equal(probe.predict(X), expected.predict(X))
    np.testing.assert_allclose(2 * probe.coef_, expected.coef_, atol=1e-9)
    low = LowRankClassifierProbe(1, 2.0, class_weight="balanced").fit(X, labels)
    assert np.linalg.matrix_rank(low.coef_, tol=1e-8) == 1
    with pytest.raises(AnalysisError, match="rank: must be at least 1"):
        LowRankClassifierProbe(0).fit(X, labels)


@parametrize_with_checks([LowRankProbe(2), LowRankClassifierProbe(2)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
