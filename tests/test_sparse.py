"""L1 against scikit-learn and its certificate; k-sparse probes against the best subset."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

from mechinterp.errors import AnalysisError, ConvergenceError
from probes.sparse import KSparseProbe, L1Probe, fit_l1_many, rank_features


def planted(n=200, d=30, n_used=4, seed=0, correlation=0.5, signal=2.0):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) + correlation * rng.normal(size=(n, 1))
    coef = np.zeros(d)
    coef[:n_used] = signal * rng.choice([-1, 1], size=n_used)
    y = (rng.uniform(size=n) < expit(X @ coef - 0.5)).astype(int)
    y[:2] = [0, 1]
    return X + 1, y


def objective(X, y, coef, intercept, strength, weights):
    z = X @ coef + intercept
    return weights @ (np.logaddexp(0, z) - y * z) + strength * np.abs(coef).sum()


def certificate(X, y, coef, intercept, strength, weights):
    """The largest violation of the optimality conditions, from their definition."""
    residual = weights * (expit(X @ coef + intercept) - y)
    gradient = X.T @ residual
    zero = np.maximum(np.abs(gradient) - strength, 0)
    return max(
        np.where(coef == 0, zero, np.abs(gradient + strength * np.sign(coef))).max(),
        abs(residual.sum()),
    )


@pytest.mark.parametrize("C", [0.03, 0.3, 10.0])
@pytest.mark.parametrize(("n", "d"), [(200, 30), (60, 100)])
def test_equals_scikit_learn(C, n, d):
    X, y = planted(n, d)
    weights = np.random.default_rng(1).gamma(1, size=n)
    probe = L1Probe(C, tol=1e-10).fit(X, y, weights)
    model = LogisticRegression(C=C, l1_ratio=1, solver="liblinear", tol=1e-9, max_iter=20_000)
    model.intercept_scaling = 1e4  # it penalises the intercept; thus by next to nothing
    model.fit(X, y, weights)
    ones = objective(X, y, probe.coef_[0], probe.intercept_[0], 1 / C, weights)
    others = objective(X, y, model.coef_[0], model.intercept_[0], 1 / C, weights)
    assert ones <= others * (1 + 1e-9)
    assert ones == pytest.approx(others, rel=1e-5)
    np.testing.assert_allclose(probe.coef_, model.coef_, atol=1e-2)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(10, 150),
    st.integers(1, 80),
    st.floats(1e-3, 0.9),
    st.sampled_from([0.0, 0.5, 20.0]),
    st.sampled_from([0.0, 2.0, 30.0]),
    st.integers(0, 999),
)
@example(10, 5, 0.0078125, 20.0, 0.0, 0)  # features that are nearly one
def test_the_certificate_is_met_and_means_what_it_says(n, d, share, correlation, signal, seed):
    """Separable, correlated and wide problems; strengths from near the strongest that matters."""
    X, y = planted(n, d, min(d, 4), seed, correlation, signal)
    weights = np.random.default_rng(seed).gamma(1, size=n) + 0.01
    residual = weights * (weights @ y / weights.sum() - y)
    largest = np.abs(X.T @ residual).max()
    strengths = (share * largest, largest * 1.001)
    data = (torch.tensor(X), torch.tensor(y)[:, None].double())
    fits = fit_l1_many(*data, strengths, weights=torch.tensor(weights), tol=1e-10)
    assert (fits.coefs[1] == 0).all()
    coef, intercept = fits.coefs[0, 0].numpy(), fits.intercepts[0, 0].item()
    value = objective(X, y, coef, intercept, strengths[0], weights)
    assert value == pytest.approx(fits.objective[0, 0].item(), rel=1e-9)
    assert fits.gap[0, 0] <= 1e-10
    # Nothing near is better by more than the gap says.
    rng = np.random.default_rng(seed)
    for size in (1e-4, 1e-2, 1.0):
        other = coef + size * rng.normal(size=d) * (rng.uniform(size=d) < 0.2)
        moved = objective(X, y, other, intercept + size * rng.normal(), strengths[0], weights)
        assert moved >= value - 2e-10 * weights.sum() - 1e-9 * abs(value)
    assert certificate(X, y, coef, intercept, strengths[0], weights) <= 1e-3 * strengths[0] + 1e-6


def test_a_path_equals_its_parts_and_uses_ever_more_features():
    X, y = planted()
    targets = torch.tensor(np.stack([y, 1 - y], 1)).double()
    fits = fit_l1_many(torch.tensor(X), targets, (0.3, 30.0, 3.0), tol=1e-11)
    counts = (fits.coefs[:, 0] != 0).sum(1).tolist()
    assert counts[1] < counts[2] < counts[0]
    torch.testing.assert_close(fits.coefs[:, 0], -fits.coefs[:, 1], atol=1e-5, rtol=0)
    alone = fit_l1_many(torch.tensor(X), targets, (0.3,), tol=1e-11)
    torch.testing.assert_close(alone.coefs[0], fits.coefs[0], atol=1e-4, rtol=0)


def test_planted_features_are_selected():
    X, y = planted(n=2000, d=60, n_used=4, correlation=0.0)
    probe = L1Probe(0.02).fit(X, y)
    assert set(np.flatnonzero(probe.coef_[0])) == {0, 1, 2, 3}
    assert set(KSparseProbe(4).fit(X, y).features_) == {0, 1, 2, 3}


def test_more_classes_are_one_against_the_rest():
    X, y = planted(n=300)
    labels = y + (X[:, 5] > 1.5)
    probe = L1Probe(0.5, class_weight="balanced").fit(X, labels)
    assert probe.coef_.shape == (3, 30)
    weights = (300 / 3 / np.bincount(labels))[labels]
    alone = L1Probe(0.5).fit(X, labels == 2, weights)
    np.testing.assert_allclose(probe.coef_[2], alone.coef_[0], atol=1e-6)
    odds = expit(probe.decision_function(X))
    expected = odds / odds.sum(1, keepdims=True)
    np.testing.assert_allclose(probe.predict_proba(X), expected, atol=1e-12)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("ranking", ["mean_difference", "t"])
def test_k_sparse_ranks_by_class_means_and_refits(n_classes, ranking):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, n_classes, 150)
    X = rng.normal(size=(150, 8)) * rng.gamma(1, size=8) + rng.normal(size=(n_classes, 8))[labels]
    probe = KSparseProbe(3, 0.7, ranking=ranking).fit(X, labels)
    share = np.bincount(labels) / 150
    means = np.stack([X[labels == a].mean(0) for a in range(n_classes)])
    spread = share @ (means - X.mean(0)) ** 2
    if ranking == "t":
        spread = spread / ((X - means[labels]) ** 2).mean(0)
    kept = np.argsort(-spread)[:3]
    np.testing.assert_array_equal(probe.features_, kept)
    if n_classes == 2 and ranking == "mean_difference":
        np.testing.assert_array_equal(kept, np.argsort(-np.abs(means[1] - means[0]))[:3])
    expected = LogisticRegression(C=0.7, solver="newton-cholesky", tol=1e-10)
    expected.fit(X[:, kept], labels)
    np.testing.assert_allclose(probe.coef_[:, kept], expected.coef_, atol=1e-4)
    assert (np.delete(probe.coef_, kept, axis=1) == 0).all()
    np.testing.assert_allclose(
        probe.predict_proba(X), expected.predict_proba(X[:, kept]), atol=1e-4
    )


def test_k_sparse_is_near_the_best_subset_where_features_are_independent():
    """All subsets of two of seven features, fitted by scikit-learn; and with a signal that no
    feature has alone, ranking by means fails, as it must.
    """
    X, y = planted(n=600, d=7, n_used=2, correlation=0.0)

    def loss(features):
        model = LogisticRegression(C=1.0).fit(X[:, features], y)
        return -np.mean(model.predict_log_proba(X[:, features])[np.arange(600), y])

    best = min(combinations(range(7), 2), key=lambda features: loss(list(features)))
    assert set(KSparseProbe(2).fit(X, y).features_) == set(best) == {0, 1}
    hidden = np.random.default_rng(0).normal(size=600) * 5
    X[:, 5], X[:, 6] = hidden, hidden + 0.3 * (2 * y - 1)
    best = min(combinations(range(7), 2), key=lambda features: loss(list(features)))
    assert set(best) == {5, 6}
    assert set(KSparseProbe(2).fit(X, y).features_) != set(best)


def test_invalid_input_is_named():
    X, y = planted()
    data = (torch.tensor(X), torch.tensor(y)[:, None].double())
    with pytest.raises(AnalysisError, match=r"targets: expected shape \[200, k\]"):
        fit_l1_many(data[0], data[1][:, 0], (1.0,))
    with pytest.raises(AnalysisError, match="targets: must lie between 0 and 1"):
        fit_l1_many(data[0], data[1] * 2, (1.0,))
    with pytest.raises(AnalysisError, match="column 0 is constant"):
        fit_l1_many(data[0], data[1] * 0, (1.0,))
    with pytest.raises(ConvergenceError, match=r"column 0: the duality gap .* after 1 iterations"):
        fit_l1_many(*data, (0.1,), max_iter=1)
    with pytest.raises(AnalysisError, match="ranking: must be one of"):
        rank_features(data[0], data[1], torch.ones(200), ranking="best")
    with pytest.raises(AnalysisError, match="k: must be at least 1"):
        KSparseProbe(0).fit(X, y)


@parametrize_with_checks([L1Probe(tol=1e-12), KSparseProbe(2, tol=1e-11)])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)
