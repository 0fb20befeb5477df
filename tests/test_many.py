"""`fit_many` against a loop over scikit-learn, and the ways in which it can be called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import accuracy_score, log_loss
from sklearn.preprocessing import StandardScaler

from mechinterp.errors import AnalysisError, ConvergenceError
from probes import LogisticProbe, fit_many
from probes.folds import grouped_folds

STRENGTHS = (0.1, 3.0)


def data(n_layers=2, n=150, d=7, classes=(2, 2, 3), seed=0):
    """Layers [layer item feature] and targets [target item] that they hold more or less."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n_layers, n, d)) * rng.gamma(2, size=d) + rng.normal(size=d)
    Y = [(X[0] @ rng.normal(size=(d, a)) + rng.gumbel(size=(n, a))).argmax(1) for a in classes]
    for target, a in zip(Y, classes, strict=True):
        target[: 4 * a] = np.arange(4 * a) % a
    return torch.tensor(X), torch.tensor(np.stack(Y))


def loop(X, Y, folds, weights=None, class_weight=None, strengths=STRENGTHS, scale=False):
    """The same by scikit-learn: {(layer, target, strength, fold): (accuracy, log-loss, coef)}."""
    X, Y, folds = X.numpy(), Y.numpy(), folds.numpy()
    weights = np.ones(len(folds)) if weights is None else weights.numpy()
    results = {}
    for layer, target, s, fold in np.ndindex(len(X), len(Y), len(strengths), folds.max() + 1):
        train = folds != fold
        model = LogisticRegression(
            C=1 / strengths[s], class_weight=class_weight, solver="newton-cholesky", tol=1e-10
        )
        x, y = X[layer], Y[target]
        scaler = StandardScaler(with_mean=scale, with_std=scale)
        x = scaler.fit(x[train]).transform(x)
        model.fit(x[train], y[train], sample_weight=weights[train])
        args = {"sample_weight": weights[~train]}
        p = model.predict_proba(x[~train])
        results[layer, target, s, fold] = (
            accuracy_score(y[~train], p.argmax(1), **args),
            log_loss(y[~train], p, labels=model.classes_, **args),
            model.coef_ / (scaler.scale_ if scale else 1.0),
        )
    return results


def assert_equal(fits, expected, atol=1e-4):
    assert len(expected) == fits.scores.numel()
    for index, (accuracy, loss, coef) in expected.items():
        assert fits.scores[index] == pytest.approx(accuracy, abs=1e-6)
        assert fits.log_loss[index] == pytest.approx(loss, abs=atol)
        np.testing.assert_allclose(fits.coef[index][: len(coef)], coef, atol=atol)
        assert fits.coef[index][len(coef) :].isnan().all()


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 2.0}])
@pytest.mark.parametrize("scale", [False, True])
def test_equals_a_loop_over_scikit_learn(scale, class_weight):
    X, Y = data()
    folds = grouped_folds(torch.arange(150), Y.T, 3)
    weights = torch.tensor(np.random.default_rng(1).exponential(size=150))
    fits = fit_many(
        X,
        Y,
        strengths=STRENGTHS,
        folds=folds,
        weights=weights,
        class_weight=class_weight,
        standardise=scale,
        tol=1e-8,
    )
    assert fits.scores.shape == (2, 3, 2, 3)
    assert fits.coef.shape == (2, 3, 2, 3, 3, 7)
    assert (fits.gradient_norm <= 1e-8).all()
    assert_equal(fits, loop(X, Y, folds, weights, class_weight, scale=scale))


def test_equals_a_loop_over_probes():
    X, Y = data(n_layers=1)
    fits = fit_many(X, Y, strengths=STRENGTHS, folds=3, tol=1e-9)
    for target, s, fold in np.ndindex(3, 2, 3):
        train = fits.folds != fold
        probe = LogisticProbe(C=1 / STRENGTHS[s]).fit(X[0, train], Y[target, train])
        index = 0, target, s, fold
        rows = len(probe.coef_)
        np.testing.assert_allclose(fits.coef[index][:rows], probe.coef_, atol=1e-6)
        np.testing.assert_allclose(fits.intercept[index][:rows], probe.intercept_, atol=1e-6)
        score = probe.score(X[0, ~train], Y[target, ~train])
        assert fits.scores[index] == pytest.approx(score)


@settings(max_examples=25, deadline=None)
@given(
    n=st.integers(40, 90),
    d=st.integers(1, 120),
    classes=st.lists(st.integers(2, 4), min_size=1, max_size=3),
    n_folds=st.integers(2, 4),
    strength=st.floats(0.01, 100),
    dtype=st.sampled_from(["float32", "float64"]),
    zeros=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_any_shape(n, d, classes, n_folds, strength, dtype, zeros, seed):
    X, Y = data(1, n, d, classes, seed)
    folds = torch.arange(n) // 4 % n_folds  # the first items have every class in every other fold
    rng = np.random.default_rng(seed)
    weights = torch.tensor(rng.exponential(size=n))
    if zeros:
        weights[20:] *= torch.tensor(rng.integers(0, 2, size=n - 20))
    fits = fit_many(
        X,
        Y,
        strengths=[strength],
        folds=folds,
        weights=weights,
        dtype=dtype,
        tol=1e-9 if dtype == "float64" else 1e-4,
    )
    if dtype == "float64":
        expected = loop(X, Y, folds, weights, strengths=[strength])
        for index, (_, loss, coef) in expected.items():
            assert fits.log_loss[index] == pytest.approx(loss, abs=1e-4)
            np.testing.assert_allclose(fits.coef[index][: len(coef)], coef, atol=1e-4)
    assert fits.scores.dtype == getattr(torch, dtype)


def test_layers_come_one_by_one_and_parts_change_nothing(monkeypatch):
    X, Y = data(3)
    options = {"strengths": STRENGTHS, "folds": 4, "tol": 1e-8}
    whole = fit_many(X, Y, **options)
    monkeypatch.setattr("probes.grid._MAX_LOGITS", 1000)
    parts = fit_many((layer.numpy() for layer in X), Y, keep_coef=False, **options)
    assert parts.coef is None
    torch.testing.assert_close(whole.log_loss, parts.log_loss, atol=1e-6, rtol=0)
    torch.testing.assert_close(whole.scores, parts.scores)
    again = fit_many(X, Y, folds=whole.folds, strengths=STRENGTHS, tol=1e-8)
    torch.testing.assert_close(again.coef, whole.coef, equal_nan=True)


def test_labels_keep_their_names():
    X, Y = data(1, classes=(2,))
    plain = fit_many(X, Y, strengths=[1.0])
    named = fit_many(X, Y * 7 - 3, strengths=[1.0])
    assert named.classes == ((-3, 4),)
    torch.testing.assert_close(plain.coef, named.coef)


def test_a_class_missing_from_a_fit_is_named():
    X, Y = data()
    folds = torch.arange(150) % 5
    Y[2] = torch.where(Y[2] == 2, 0, Y[2])
    Y[2, folds == 3] = torch.where(torch.arange(30) < 4, 2, Y[2, folds == 3])
    with pytest.raises(AnalysisError, match=r"Y\[2\]: the fit without fold 3 lacks class 2"):
        fit_many(X, Y, folds=folds)
    with pytest.raises(AnalysisError, match=r"Y\[1\]: has one class only"):
        fit_many(X, torch.stack([Y[0], Y[0] * 0]), folds=folds)


def test_a_fit_that_does_not_converge_is_named():
    X, Y = data()
    message = r"X\[0\], Y\[0\], strength 0.001, fold \d: the gradient per unit of weight is"
    with pytest.raises(ConvergenceError, match=message):
        fit_many(X, Y[:1], strengths=[1e-3], folds=3, tol=1e-12, max_iter=1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"strengths": [0.0]}, "strengths"),
        ({"strengths": []}, "strengths"),
        ({"dtype": "float16"}, "dtype"),
        ({"device": "cuda"}, "device"),
        ({"folds": torch.zeros(150).long()}, "folds: need two"),
        ({"folds": torch.arange(149) % 3}, "folds: expected 150"),
        ({"folds": 1}, "n_folds"),
        ({"weights": -torch.ones(150)}, "weights"),
        ({"class_weight": "even"}, "class_weight"),
    ],
)
def test_invalid_options_are_named(change, message):
    if change.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    X, Y = data()
    with pytest.raises(AnalysisError, match=message):
        fit_many(X, Y, **change)


def test_invalid_layers_are_named():
    X, Y = data()
    with pytest.raises(AnalysisError, match=r"X\[1\]: expected shape \[150, feature\]"):
        fit_many([X[0], X[1, :9]], Y)
    with pytest.raises(AnalysisError, match="X: contains NaN"):
        fit_many(X * torch.nan, Y)
    with pytest.raises(AnalysisError, match="X: has no layers"):
        fit_many([], Y)
    with pytest.raises(AnalysisError, match="Y: expected"):
        fit_many(X, Y[0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_equals_cpu():
    X, Y = data()
    folds = grouped_folds(torch.arange(150), Y.T, 3)
    options = {"strengths": STRENGTHS, "folds": folds, "tol": 1e-8}
    cpu, gpu = fit_many(X, Y, **options), fit_many(X, Y, device="cuda", **options)
    torch.testing.assert_close(cpu.coef, gpu.coef, atol=1e-5, rtol=0, equal_nan=True)
