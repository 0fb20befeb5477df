"""Mass-mean probes against the means written out, scikit-learn, and what theory gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import expit
from scipy.stats import norm
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.neighbors import NearestCentroid
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError
from probes.mass_mean import MassMeanProbe, fit_mass_mean_many


def classes(n=80, d=5, n_classes=3, seed=0):
    rng = np.random.default_rng(seed)
    labels = np.concatenate([np.arange(n_classes).repeat(2), rng.integers(0, n_classes, n)])[:n]
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + 3
    return X + rng.normal(size=(n_classes, d))[labels], labels


def test_two_classes_are_the_papers_formula():
    X, labels = classes(n_classes=2)
    means = np.stack([X[labels == a].mean(0) for a in (0, 1)])
    direction, midpoint = means[1] - means[0], means.mean(0)
    covariance = np.cov((X - means[labels]).T, bias=True)
    for corrected in (False, True):
        theta = np.linalg.solve(covariance, direction) if corrected else direction
        probe = MassMeanProbe(covariance=corrected).fit(X, labels)
        np.testing.assert_allclose(probe.coef_[0], theta, rtol=1e-9)
        np.testing.assert_allclose(
            probe.predict_proba(X)[:, 1], expit((X - midpoint) @ theta), atol=1e-10
        )


def test_more_classes_are_the_nearest_mean_or_lda_of_equal_priors():
    X, labels = classes(n_classes=4)
    np.testing.assert_array_equal(
        MassMeanProbe().fit(X, labels).predict(X), NearestCentroid().fit(X, labels).predict(X)
    )
    # scikit-learn weights the covariances of classes by their priors: equally frequent classes.
    labels = np.arange(len(X)) % 4
    expected = LinearDiscriminantAnalysis(solver="lsqr").fit(X, labels)
    probe = MassMeanProbe(covariance=True).fit(X, labels)
    np.testing.assert_allclose(probe.predict_proba(X), expected.predict_proba(X), atol=1e-8)


def test_more_features_than_items_take_the_pseudo_inverse():
    X, labels = classes(n=20, d=40, n_classes=2)
    probe = MassMeanProbe(covariance=True).fit(X, labels)
    means = np.stack([X[labels == a].mean(0) for a in (0, 1)])
    inverse = np.linalg.pinv(np.cov((X - means[labels]).T, bias=True), rcond=1e-10)
    np.testing.assert_allclose(probe.coef_[0], inverse @ (means[1] - means[0]), rtol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 30), st.integers(1, 40), st.integers(2, 4), st.integers(0, 99))
def test_leave_one_out_equals_refits(n, d, n_classes, seed):
    X, labels = classes(n, d, n_classes, seed)
    rng = np.random.default_rng(seed)
    both, weights = np.stack([labels, rng.permutation(labels)], 1), rng.uniform(0.1, 2, size=n)
    fits = fit_mass_mean_many(torch.tensor(X), torch.tensor(both), weights=torch.tensor(weights))
    for j in range(2):
        for i in range(n):
            kept = np.arange(n) != i
            distances = []
            for a in range(n_classes):
                rows = kept & (both[:, j] == a)
                distances.append(((X[i] - np.average(X[rows], 0, weights[rows])) ** 2).sum())
            expected = -0.5 * np.array(distances)
            found = fits.held_out[i, j].numpy()
            np.testing.assert_allclose(
                found - found[0], expected - expected[0], rtol=1e-8, atol=1e-7
            )


@pytest.mark.parametrize("distance", [1.0, 2.0])
@pytest.mark.parametrize("n", [8000, 100])
def test_accuracy_on_gaussian_classes_is_what_theory_gives(distance, n):
    """With identity covariance and n items of two equal classes it is Phi(distance^2 /
    (2 sqrt(distance^2 + 4 d / n))), which tends to Phi(distance / 2) (Raudys and Young 2004).
    """
    rng = np.random.default_rng(0)
    d, n_test = 40, 40_000
    axis, labels = np.ones(d) / np.sqrt(d) * distance, np.arange(n_test) % 2
    test = rng.normal(size=(n_test, d)) + labels[:, None] * axis
    accuracies = []
    for _ in range(1 if n == 8000 else 12):
        X = rng.normal(size=(n, d)) + labels[:n, None] * axis
        accuracies.append(MassMeanProbe().fit(X, labels[:n]).score(test, labels))
    expected = norm.cdf(distance**2 / (2 * np.sqrt(distance**2 + 4 * d / n)))
    assert np.mean(accuracies) == pytest.approx(expected, abs=0.015)


def test_weights_and_absent_classes():
    X, labels = classes()
    counts = np.random.default_rng(3).integers(0, 4, size=len(X))
    for covariance in (False, True):
        weighted = MassMeanProbe(covariance=covariance).fit(X, labels, sample_weight=counts)
        repeated = MassMeanProbe(covariance=covariance).fit(
            X.repeat(counts, 0), labels.repeat(counts)
        )
        np.testing.assert_allclose(weighted.coef_, repeated.coef_, atol=1e-9)
    only = torch.tensor((np.arange(len(X)) == 3).astype(int) * 2)
    held_out = fit_mass_mean_many(torch.tensor(X), only[:, None]).held_out[:, 0]
    assert (held_out[:, 1] == -torch.inf).all()
    assert held_out[:, 2].isinf().nonzero().tolist() == [[3]]
    with pytest.raises(AnalysisError, match="column 0 needs two classes"):
        fit_mass_mean_many(torch.tensor(X), 0 * only[:, None])


@parametrize_with_checks([MassMeanProbe(), MassMeanProbe(covariance=True)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
