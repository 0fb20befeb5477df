"""Ridge against scikit-learn and against refitting without each item or fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import Ridge, RidgeClassifier, RidgeClassifierCV, RidgeCV
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError
from probes.ridge import RidgeClassifierProbe, RidgeProbe, fit_ridge_many

STRENGTHS = (0.01, 1.0, 30.0)


def regression(n=60, d=8, k=3, seed=0, scale=True):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) * (rng.gamma(1, size=d) if scale else 1) + 5
    X[:, -1] = 7.3  # a constant feature
    Y = (X - 5) @ rng.normal(size=(d, k)) + rng.normal(size=(n, k)) * 2 + 1
    return X, Y, rng.gamma(0.5, size=n) * (rng.uniform(size=n) < 0.9)


def refitted(X, Y, strength, weights, folds):
    """Each fold predicted by scikit-learn's ridge fitted to the others."""
    predicted = np.zeros_like(Y)
    for fold in np.unique(folds):
        rows = folds == fold
        model = Ridge(alpha=strength, solver="cholesky")
        model.fit(X[~rows], Y[~rows], weights[~rows])
        predicted[rows] = model.predict(X[rows]).reshape(-1, Y.shape[1])
    return predicted


def fit(X, Y, strengths=STRENGTHS, **options):
    options = {name: torch.tensor(value) for name, value in options.items()}
    return fit_ridge_many(torch.tensor(X), torch.tensor(Y), strengths, **options)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(6, 40),
    st.integers(2, 50),
    st.integers(1, 3),
    st.integers(2, 40),
    st.integers(0, 99),
)
def test_held_out_predictions_equal_refits(n, d, k, n_folds, seed):
    X, Y, weights = regression(n, d, k, seed)
    weights[:6] = 1.0
    folds = np.arange(n) % min(n_folds, n)
    alone = fit(X, Y, weights=weights)
    by_fold = fit(X, Y, weights=weights, folds=folds)
    for s, strength in enumerate(STRENGTHS):
        expected = refitted(X, Y, strength, weights, np.arange(n))
        np.testing.assert_allclose(alone.held_out[s], expected, rtol=1e-7, atol=1e-7)
        expected = refitted(X, Y, strength, weights, folds)
        np.testing.assert_allclose(by_fold.held_out[s], expected, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize(("n", "d"), [(60, 8), (30, 90)])
def test_equals_ridge_cv_for_each_target(n, d):
    X, Y, _ = regression(n, d)
    fits = fit(X, Y)
    expected = RidgeCV(alphas=STRENGTHS, alpha_per_target=True).fit(X, Y)
    np.testing.assert_array_equal(fits.strength, expected.alpha_)
    np.testing.assert_allclose(fits.coef, expected.coef_, atol=1e-8)
    np.testing.assert_allclose(fits.intercept, expected.intercept_, atol=1e-7)


def test_coefficients_of_every_strength_equal_ridge():
    X, Y, weights = regression()
    fits = fit(X, Y, weights=weights)
    for s, strength in enumerate(STRENGTHS):
        expected = Ridge(alpha=strength, solver="cholesky").fit(X, Y, weights)
        np.testing.assert_allclose(fits.coefs[s], expected.coef_, atol=1e-9)
        np.testing.assert_allclose(fits.intercepts[s], expected.intercept_, atol=1e-8)


def test_a_feature_of_enormous_variance_costs_no_precision():
    """What eigenvectors of the Gram matrix would lose (residual streams have such features)."""
    X, Y, weights = regression(seed=2, scale=False)
    X[:, 0] *= 1e8
    augmented = np.concatenate([X - np.average(X, 0, weights), np.eye(8)])
    root = np.sqrt(np.concatenate([weights, np.full(8, 1e-3)]))
    centred = np.concatenate([Y - np.average(Y, 0, weights), np.zeros((8, 3))])
    expected = np.linalg.lstsq(root[:, None] * augmented, root[:, None] * centred, rcond=0)[0]
    found = fit(X, Y, (1e-3,), weights=weights).coef
    np.testing.assert_allclose(found.T[1:], expected[1:], rtol=1e-6, atol=1e-9)


def test_probe_equals_ridge_cv():
    X, Y, weights = regression()
    for y in (Y, Y[:, 0]):
        probe = RidgeProbe(STRENGTHS).fit(X, y, weights)
        assert probe.coef_.shape == Ridge().fit(X, y).coef_.shape
        assert probe.held_out_.shape == y.shape
    # RidgeCV averages the errors of targets and items without weights: one target, no weights.
    expected = RidgeCV(alphas=STRENGTHS, store_cv_results=True).fit(X, Y[:, 0])
    probe = RidgeProbe(STRENGTHS).fit(X, Y[:, 0])
    assert probe.strength_ == expected.alpha_
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-9)
    assert probe.score(X, Y[:, 0]) == pytest.approx(expected.score(X, Y[:, 0]))
    errors = (probe.held_out_ - Y[:, 0]) ** 2
    chosen = STRENGTHS.index(expected.alpha_)
    np.testing.assert_allclose(errors, expected.cv_results_[:, chosen], atol=1e-9)


@pytest.mark.parametrize("n_classes", [2, 4])
def test_classifier_equals_ridge_classifier_cv(n_classes):
    X, Y, weights = regression(80, k=n_classes)
    labels = np.array(["ant", "bee", "cat", "dog"])[Y.argmax(1)]
    probe = RidgeClassifierProbe(STRENGTHS).fit(X, labels)
    expected = RidgeClassifierCV(alphas=STRENGTHS).fit(X, labels)
    assert probe.strength_ == expected.alpha_
    np.testing.assert_allclose(probe.coef_, np.atleast_2d(expected.coef_), atol=1e-9)
    np.testing.assert_array_equal(probe.predict(X), expected.predict(X))
    assert probe.score(X, labels) == expected.score(X, labels)
    assert not hasattr(probe, "predict_proba")

    probe = RidgeClassifierProbe((2.0,), class_weight={"ant": 3.0}).fit(X, labels, weights)
    expected = RidgeClassifier(2.0, class_weight={"ant": 3.0}, solver="cholesky")
    expected.fit(X, labels, weights)
    np.testing.assert_allclose(probe.coef_, np.atleast_2d(expected.coef_), atol=1e-9)
    np.testing.assert_allclose(probe.intercept_, expected.intercept_, atol=1e-8)


def test_invalid_input_is_named():
    X, Y, _ = regression()
    with pytest.raises(AnalysisError, match="strengths: must be one or more positive"):
        fit(X, Y, (0.0, 1.0))
    with pytest.raises(AnalysisError, match="strengths"):
        fit(X, Y, ())
    with pytest.raises(AnalysisError, match=r"Y: expected shape \[60, k\]"):
        fit(X, Y[:, 0])
    with pytest.raises(AnalysisError, match="Y: contains NaN"):
        fit(X, Y * np.nan)
    with pytest.raises(AnalysisError, match="must be finite"):
        fit(X * np.inf, Y)
    with pytest.raises(AnalysisError, match="must be finite"):
        fit(X, Y, weights=-np.ones(60))
    with pytest.raises(AnalysisError, match="expected shapes"):
        fit(X, Y, weights=np.ones(59))
    with pytest.raises(AnalysisError, match="at least 2 items"):
        fit(X, Y, weights=np.eye(60)[0])
    with pytest.raises(AnalysisError, match="folds: expected 60 items in 2 folds"):
        fit(X, Y, folds=np.zeros(60))
    if not torch.cuda.is_available():
        with pytest.raises(AnalysisError, match="device: 'cuda' is not available"):
            RidgeProbe(device="cuda").fit(X, Y)


@parametrize_with_checks([RidgeProbe((1.0,)), RidgeClassifierProbe((1.0,))])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
