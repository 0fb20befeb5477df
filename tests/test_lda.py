"""LDA against scikit-learn, against refitting without each item, and against what theory gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError
from probes.lda import LDAProbe, fit_lda_many

SHRINKAGES = (0.02, 0.3, 1.0)


def classes(n=60, d=6, n_classes=3, seed=0, signal=1.0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes).repeat(2), rng.integers(0, n_classes, n)])[:n]
    X = rng.normal(size=(n, d)) * rng.gamma(1, size=d) + 4
    return X + signal * rng.normal(size=(n_classes, d))[labels], labels


def oracle(X, labels, shrinkage):
    return LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(X, labels)


def log_probabilities(model, X):
    """scikit-learn's own clips small probabilities."""
    z = model.decision_function(X)
    return log_softmax(np.stack([0 * z, z], 1) if z.ndim == 1 else z, axis=1)


def fit(X, labels, shrinkages=SHRINKAGES, weights=None):
    weights = None if weights is None else torch.tensor(weights)
    return fit_lda_many(torch.tensor(X), torch.tensor(labels), shrinkages, weights=weights)


@pytest.mark.filterwarnings("ignore:Only one sample available")
@settings(max_examples=15, deadline=None)
@given(st.integers(10, 40), st.integers(1, 60), st.integers(2, 4), st.integers(0, 99))
def test_leave_one_out_equals_refits(n, d, n_classes, seed):
    X, labels = classes(n, d, n_classes, seed)
    other = np.random.default_rng(seed).permutation(labels)
    fits = fit(X, np.stack([labels, other], 1))
    for s, shrinkage in enumerate(SHRINKAGES):
        for j, y in enumerate((labels, other)):
            for i in np.random.default_rng(seed).choice(n, 5, replace=False):
                kept = np.arange(n) != i
                model = oracle(X[kept], y[kept], shrinkage)
                expected = log_probabilities(model, X[i : i + 1])[0]
                np.testing.assert_allclose(fits.held_out[s, i, j], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize(("n", "d"), [(80, 6), (30, 70)])
@pytest.mark.parametrize("shrinkage", [0.0, 0.1, 1.0])
def test_probe_equals_scikit_learn(n, d, n_classes, shrinkage):
    X, labels = classes(n, d, n_classes)
    names = np.array(["ant", "bee", "cat"])[labels]
    if shrinkage == 0 and d > n:
        with pytest.raises(AnalysisError, match=r"covariance within the classes .* no inverse"):
            LDAProbe((shrinkage,)).fit(X, names)
        return
    probe, expected = LDAProbe((shrinkage,)).fit(X, names), oracle(X, names, shrinkage)
    difference = expected.coef_ - expected.coef_.mean(0) * (n_classes > 2)
    found = probe.coef_ - probe.coef_.mean(0) * (n_classes > 2)
    np.testing.assert_allclose(found, difference, rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(probe.predict_proba(X), expected.predict_proba(X), atol=1e-8)
    assert probe.score(X, names) == expected.score(X, names)


def test_weights_are_counts_and_class_weights_are_weights():
    X, labels = classes()
    counts = np.random.default_rng(3).integers(1, 4, size=len(X))
    weighted = LDAProbe((0.1,)).fit(X, labels, sample_weight=counts)
    expected = oracle(X.repeat(counts, 0), labels.repeat(counts), 0.1)
    np.testing.assert_allclose(weighted.predict_proba(X), expected.predict_proba(X), atol=1e-9)
    by_class = LDAProbe((0.1,), class_weight={0: 2.0}).fit(X, labels)
    same = LDAProbe((0.1,)).fit(X, labels, sample_weight=np.where(labels == 0, 2.0, 1.0))
    np.testing.assert_allclose(by_class.coef_, same.coef_, atol=1e-9)
    # An item of weight 2 is left out whole.
    fits = fit(X, labels[:, None], (0.1,), weights=counts.astype(float))
    for i in range(8):
        rows = np.arange(len(X)) != i
        model = oracle(X[rows].repeat(counts[rows], 0), labels[rows].repeat(counts[rows]), 0.1)
        expected = log_probabilities(model, X[i : i + 1])[0]
        np.testing.assert_allclose(fits.held_out[0, i, 0], expected, rtol=1e-7)


def test_chosen_shrinkage_has_the_least_loss_of_leave_one_out():
    X, labels = classes(40, 60, 2, signal=0.5)
    probe = LDAProbe(SHRINKAGES).fit(X, labels)
    losses = []
    for shrinkage in SHRINKAGES:
        kept = [np.arange(40) != i for i in range(40)]
        models = [oracle(X[rows], labels[rows], shrinkage) for rows in kept]
        log_p = [log_probabilities(m, X[i : i + 1])[0, labels[i]] for i, m in enumerate(models)]
        losses.append(-np.mean(log_p))
    assert probe.shrinkage_ == SHRINKAGES[int(np.argmin(losses))]
    np.testing.assert_allclose(
        -probe.held_out_[np.arange(40), labels].mean(), min(losses), rtol=1e-7
    )


def test_the_only_item_of_a_class_is_impossible_without_it():
    X, _ = classes()
    labels = (np.arange(60) == 3).astype(int)
    held_out = fit(X, labels[:, None], (0.1,)).held_out[0, :, 0]
    assert held_out[3].tolist() == [0.0, -torch.inf]
    kept = np.arange(60) != 7
    expected = LDAProbe((0.1,)).fit(X[kept], labels[kept]).predict_log_proba(X[7:8])
    np.testing.assert_allclose(held_out[7], expected[0], rtol=1e-7)


def test_labellings_may_differ_in_the_classes_they_have():
    X, labels = classes(n_classes=4)
    fits = fit(X, np.stack([labels, labels % 2], 1), (0.1,))
    alone = fit(X, labels[:, None] % 2, (0.1,))
    assert (fits.held_out[0, :, 1, 2:] == -torch.inf).all()
    torch.testing.assert_close(fits.held_out[0, :, 1, :2], alone.held_out[0, :, 0])


@pytest.mark.parametrize("distance", [1.0, 2.0])
def test_accuracy_on_gaussian_classes_is_what_theory_gives(distance):
    """Phi(distance / 2) with many items; with n items of two equal classes and identity covariance
    Phi(distance^2 sqrt(1 - g) / (2 sqrt(distance^2 + 4 g))), g = d / n (Raudys and Young 2004,
    J. Multivariate Analysis 89).
    """
    rng = np.random.default_rng(0)
    d, n_test = 40, 40_000
    test_labels = np.arange(n_test) % 2
    axis = np.ones(d) / np.sqrt(d) * distance
    test = rng.normal(size=(n_test, d)) + test_labels[:, None] * axis
    for n, repeats in ((8000, 1), (160, 12)):
        accuracies = []
        for _ in range(repeats):
            labels = np.arange(n) % 2
            X = rng.normal(size=(n, d)) + labels[:, None] * axis
            accuracies.append(LDAProbe((0.0,)).fit(X, labels).score(test, test_labels))
        g = d / n
        expected = norm.cdf(distance**2 * np.sqrt(1 - g) / (2 * np.sqrt(distance**2 + 4 * g)))
        assert np.mean(accuracies) == pytest.approx(expected, abs=0.015)
        if n == 8000:
            assert accuracies[0] == pytest.approx(norm.cdf(distance / 2), abs=0.01)


def test_invalid_input_is_named():
    X, labels = classes()
    column = labels[:, None]
    with pytest.raises(AnalysisError, match="shrinkages: must lie between 0 and 1"):
        fit(X, column, (1.5,))
    with pytest.raises(AnalysisError, match=r"labels: expected whole numbers .* \[60, k\]"):
        fit(X, labels)
    with pytest.raises(AnalysisError, match="column 1 needs two classes"):
        fit(X, np.stack([labels, 0 * labels], 1))
    with pytest.raises(AnalysisError, match="of at least 2 items"):
        fit(X, (np.arange(60) == 3)[:, None].astype(int))
    with pytest.raises(AnalysisError, match="X: does not vary within the classes"):
        fit(column.astype(float), column)


@parametrize_with_checks([LDAProbe((0.1,))])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
