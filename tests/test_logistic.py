"""The solver against scikit-learn and scipy, and its certificate against the definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize, minimize_scalar
from scipy.special import expit, logsumexp
from sklearn.linear_model import LogisticRegression
from sklearn.utils.estimator_checks import parametrize_with_checks

import probes.logistic
from mechinterp.errors import AnalysisError, ConvergenceError
from probes import LogisticProbe
from probes.logistic import fit_logistic, fit_softmax


def problem(n=300, d=6, k=3, seed=0, signal=1.5, scale=None):
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ (rng.normal(size=(d, d)) / d**0.5 + 0.3 * np.eye(d)) + 0.5
    X = X if scale is None else X * scale
    standard = (X - X.mean(0)) / X.std(0)
    z = standard @ rng.normal(size=(d, k)) * signal / d**0.5 + 0.3
    Y = (rng.uniform(size=(n, k)) < expit(z)).astype(float)
    return torch.tensor(X), torch.tensor(Y)


def oracle(X, y, l2, weights=None):
    """scikit-learn at a tolerance at which its own error no longer shows."""
    model = LogisticRegression(C=1 / l2, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    return model.fit(X.numpy(), y.numpy(), sample_weight=weights)


def scipy_minimum(X, targets, weights, offset, l2):
    """Column 0 written out again, minimised by scipy's BFGS."""
    X, t, w, o = X.numpy(), targets.numpy(), weights.numpy(), offset.numpy()

    def objective(theta):
        z = X @ theta[:-1] + theta[-1] + o
        residual = w * (expit(z) - t)
        value = np.sum(w * (np.logaddexp(0, z) - t * z)) + 0.5 * l2 * theta[:-1] @ theta[:-1]
        return value, np.append(X.T @ residual + l2 * theta[:-1], residual.sum())

    start = np.zeros(X.shape[1] + 1)
    return minimize(objective, start, jac=True, method="BFGS", options={"gtol": 1e-8})


def gradient_from_definition(X, targets, weights, offset, l2, fit):
    residual = weights * (fit.logits(X, offset).sigmoid() - targets)
    coef_part = residual.T @ X + l2[:, None] * fit.coef
    largest = torch.maximum(coef_part.abs().amax(1), residual.sum(0).abs())
    return largest / weights.sum(0)


def test_equals_scikit_learn_for_many_columns_and_strengths():
    X, Y = problem(k=4)
    l2 = torch.tensor([0.01, 1.0, 30.0, 1000.0])
    fit = fit_logistic(X, Y, l2=l2, tol=1e-10)
    for j in range(4):
        expected = oracle(X, Y[:, j], l2[j].item())
        np.testing.assert_allclose(fit.coef[j], expected.coef_[0], atol=1e-7)
        np.testing.assert_allclose(fit.intercept[j], expected.intercept_[0], atol=1e-7)
        z = expected.decision_function(X.numpy())
        value = np.sum(np.logaddexp(0, z) - Y[:, j].numpy() * z)
        value = value + 0.5 * l2[j].item() * np.sum(expected.coef_**2)
        np.testing.assert_allclose(fit.objective[j], value, rtol=1e-10)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 3e3])
def test_badly_scaled_features_reach_the_same_optimum(scale):
    column_scale = torch.logspace(-1, 1, 6, dtype=torch.float64).numpy() * scale
    X, Y = problem(k=1, scale=column_scale)
    l2 = scale**2
    fit = fit_logistic(X, Y, l2=l2, tol=1e-9 * scale)
    expected = oracle(X / scale, Y[:, 0], 1.0)
    np.testing.assert_allclose(fit.coef[0] * scale, expected.coef_[0], atol=1e-6)


def test_a_strength_per_feature_is_a_scale_per_feature():
    X, Y = problem(k=2)
    scale = torch.tensor([[1.0, 2.0, 0.5, 1.0, 3.0, 1.0], [0.3, 1.0, 1.0, 4.0, 1.0, 1.0]])
    fit = fit_logistic(X, Y, l2=2.0 / scale**2, tol=1e-10)
    for j in range(2):
        expected = oracle(X * scale[j], Y[:, j], 2.0)
        np.testing.assert_allclose(fit.coef[j] / scale[j], expected.coef_[0], atol=1e-7)


def test_more_features_than_items():
    X, Y = problem(n=40, d=90, k=2)
    fit = fit_logistic(X, Y, l2=1.0, tol=1e-10)
    for j in range(2):
        expected = oracle(X, Y[:, j], 1.0)
        np.testing.assert_allclose(fit.coef[j], expected.coef_[0], atol=1e-6)


def test_wide_design_of_few_dimensions():
    """Most features constant, as of a pruned network: fewer dimensions than items, which are
    fewer than features."""
    X, Y = problem(n=40, d=2, k=1)
    wide = torch.cat([X, torch.zeros(40, 63)], 1)
    fit = fit_logistic(wide, Y, l2=0.5, tol=1e-9)
    expected = oracle(X, Y[:, 0], 0.5)
    np.testing.assert_allclose(fit.coef[0, :2], expected.coef_[0], atol=1e-6)
    assert (fit.coef[0, 2:].abs() < 1e-9).all()
    assert float(fit.intercept[0]) == pytest.approx(expected.intercept_[0], abs=1e-6)


@pytest.mark.parametrize("spread", [1.0, 300.0, 3000.0])
def test_an_intercept_against_offsets_far_from_zero(spread):
    """As of a wildly overconfident network: the loss is flat where the search begins."""
    generator = torch.Generator().manual_seed(0)
    offset = 3 * spread + spread * torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    targets = (torch.rand(2000, 1, generator=generator) < 0.5).double()
    fit = fit_logistic(torch.zeros(2000, 1), targets, l2=1.0, offset=offset, tol=1e-5)

    def loss(intercept: float) -> float:
        z = offset[:, 0] + intercept
        return float((torch.nn.functional.softplus(z) - targets[:, 0] * z).sum())

    best = minimize_scalar(loss, bounds=(-10 * spread, 10 * spread), options={"xatol": 1e-9})
    assert loss(float(fit.intercept[0])) <= best.fun + 1e-3 * spread


def test_wide_design_at_the_default_tolerance():
    X, Y = problem(n=500, d=260, k=3)
    fit = fit_logistic(X, Y, l2=torch.tensor([1.0, 10.0, 100.0]))
    for j, l2 in enumerate((1.0, 10.0, 100.0)):
        expected = oracle(X, Y[:, j], l2)
        np.testing.assert_allclose(fit.coef[j], expected.coef_[0], atol=5e-4)


def test_soft_targets_equal_duplicated_rows_with_weights():
    X, _ = problem(k=1)
    rng = np.random.default_rng(1)
    soft = torch.tensor(rng.uniform(size=(len(X), 1)))
    fit = fit_logistic(X, soft, l2=2.0, tol=1e-10)
    twice = torch.cat([X, X])
    hard = torch.cat([torch.ones(len(X)), torch.zeros(len(X))])
    weights = torch.cat([soft[:, 0], 1 - soft[:, 0]]).numpy()
    expected = oracle(twice, hard, 2.0, weights)
    np.testing.assert_allclose(fit.coef[0], expected.coef_[0], atol=1e-7)


def test_offset_and_weights_equal_scipy():
    X, Y = problem(k=2, seed=3)
    rng = np.random.default_rng(4)
    weights = torch.tensor(rng.exponential(size=Y.shape))
    offset = torch.tensor(rng.normal(size=Y.shape) * 2)
    l2 = torch.tensor([0.5, 5.0], dtype=torch.float64)
    fit = fit_logistic(X, Y, l2=l2, weights=weights, offset=offset, tol=1e-10)
    for j in range(2):
        expected = scipy_minimum(X, Y[:, j], weights[:, j], offset[:, j], l2[j].item())
        np.testing.assert_allclose(fit.coef[j], expected.x[:-1], atol=1e-6)
        np.testing.assert_allclose(fit.intercept[j], expected.x[-1], atol=1e-6)
        np.testing.assert_allclose(fit.objective[j], expected.fun, rtol=1e-10)


def test_without_penalty():
    X, Y = problem(k=1)
    fit = fit_logistic(X, Y, l2=0.0, tol=1e-10)
    expected = LogisticRegression(C=np.inf, solver="newton-cholesky", tol=1e-12, max_iter=1000)
    expected.fit(X.numpy(), Y[:, 0].numpy())
    np.testing.assert_allclose(fit.coef[0], expected.coef_[0], atol=1e-7)


def test_only_an_intercept():
    _, Y = problem(k=2)
    fit = fit_logistic(torch.zeros(len(Y), 0), Y, l2=0.0, tol=1e-10)
    torch.testing.assert_close(fit.intercept, Y.mean(0).logit(), atol=1e-8, rtol=0)


def test_constant_and_collinear_features_change_nothing():
    X, Y = problem(k=1)
    plain = fit_logistic(X, Y, l2=1.0, tol=1e-10)
    wide = torch.cat([X, torch.full((len(X), 1), 7.3), X[:, :1] / 3], 1)
    fit = fit_logistic(wide, Y, l2=torch.tensor([1e-9]), tol=1e-8)
    assert fit.coef[0, 6].abs() < 1e-6
    unpenalised = fit_logistic(X, Y, l2=1e-9, tol=1e-8)
    torch.testing.assert_close(fit.logits(wide), unpenalised.logits(X), atol=1e-4, rtol=0)
    again = fit_logistic(wide[:, :7], Y, l2=1.0, tol=1e-10)
    torch.testing.assert_close(again.coef[:, :6], plain.coef, atol=1e-8, rtol=0)


def test_warm_start_needs_fewer_steps_and_finds_the_same():
    X, Y = problem(k=2, n=500)
    cold = fit_logistic(X, Y, l2=1.0)
    warm = fit_logistic(X, Y, l2=1.0, init=cold)
    assert warm.n_iter == 0
    near = fit_logistic(X, Y, l2=2.0, init=cold, tol=1e-9)
    torch.testing.assert_close(
        near.coef, fit_logistic(X, Y, l2=2.0, tol=1e-9).coef, atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("quasi", [False, True])
def test_separable_targets_without_penalty_are_refused(quasi):
    X, _ = problem(k=1)
    Y = (X[:, :1] > 0.5).double()
    if quasi:  # one value of a binary feature decides, the other does not
        X = torch.cat([X, (torch.arange(len(X)) % 3 == 0).double()[:, None]], 1)
        Y = torch.where(X[:, -1:] == 1, 1.0, problem(k=1)[1])
    with pytest.raises(ConvergenceError, match=r"column 0.*separable"):
        fit_logistic(X, Y, l2=0.0)
    assert fit_logistic(X, Y, l2=1e-3).gradient_norm.item() <= 1e-6


def test_invalid_input_is_named():
    X, Y = problem(k=2)
    constant = torch.cat([Y[:, :1], torch.ones_like(Y[:, :1])], 1)
    with pytest.raises(AnalysisError, match="column 1 a class has no weight"):
        fit_logistic(X, constant, l2=1.0)
    with pytest.raises(AnalysisError, match="class has no weight"):
        fit_logistic(X, Y, l2=1.0, weights=Y)
    with pytest.raises(AnalysisError, match="targets: must lie"):
        fit_logistic(X, Y + 0.5, l2=1.0)
    with pytest.raises(AnalysisError, match="X: contains NaN"):
        fit_logistic(X / 0, Y, l2=1.0)
    with pytest.raises(AnalysisError, match="targets: must lie"):
        fit_logistic(X, Y * torch.nan, l2=1.0)
    with pytest.raises(AnalysisError, match="l2"):
        fit_logistic(X, Y, l2=-1.0)
    with pytest.raises(AnalysisError, match=r"expected one number, 2 or \[2, 6\]"):
        fit_logistic(X, Y, l2=torch.ones(3))
    with pytest.raises(AnalysisError, match=r"targets: expected shape \[300, k\]"):
        fit_logistic(X, Y[:, 0], l2=1.0)
    with pytest.raises(ConvergenceError, match="after 1 iterations"):
        fit_logistic(X, Y, l2=1e-3, max_iter=1, tol=1e-12)


@pytest.mark.parametrize("shape", ["heavy tails", "separable", "rare class", "near rank 5"])
@pytest.mark.parametrize("d", [20, 260])
def test_hard_problems_converge_and_equal_scikit_learn(shape, d):
    rng = np.random.default_rng(8)
    n, w = 400, rng.normal(size=d)
    X = rng.normal(size=(n, d))
    y = X @ w > 0
    if shape == "heavy tails":
        X = X * rng.standard_t(1.5, size=(n, 1))
        y = X @ w / np.linalg.norm(X, axis=1) + rng.normal(size=n) > 0
    if shape == "rare class":
        y = np.arange(n) < 3
    if shape == "near rank 5":
        X = X[:, :5] @ rng.normal(size=(5, d)) + 1e-3 * X
        y = rng.uniform(size=n) < expit(X[:, 0])
    X, y = torch.tensor(X), torch.tensor(y).double()
    fit = fit_logistic(X, y[:, None], l2=0.01, tol=1e-8)
    expected = oracle(X, y, 0.01)
    np.testing.assert_allclose(
        fit.logits(X)[:, 0], expected.decision_function(X.numpy()), rtol=1e-3, atol=1e-3
    )


problems = st.builds(
    problem,
    n=st.integers(20, 120),
    d=st.integers(1, 8),
    k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    signal=st.floats(0, 4),
)


@settings(max_examples=20, deadline=None)
@given(problems, st.floats(1e-3, 1e3), st.integers(0, 10**6))
def test_certificate_holds_by_its_definition(data, l2, seed):
    X, Y = data
    rng = np.random.default_rng(seed)
    weights = torch.tensor(rng.exponential(size=Y.shape))
    offset = torch.tensor(rng.normal(size=Y.shape))
    soft = 0.02 + 0.96 * Y
    strengths = torch.full((Y.shape[1],), l2, dtype=torch.float64)
    fit = fit_logistic(X, soft, l2=strengths, weights=weights, offset=offset)
    norm = gradient_from_definition(X, soft, weights, offset, strengths, fit)
    assert (norm <= 1.01e-6).all()
    torch.testing.assert_close(fit.gradient_norm, norm, atol=1e-9, rtol=1e-3)


@settings(max_examples=12, deadline=None)
@given(problems, st.integers(0, 10**6))
def test_row_order_weights_and_duplicates(data, seed):
    X, Y = data
    soft = 0.02 + 0.96 * Y
    rng = np.random.default_rng(seed)
    options = {"l2": 1.0, "tol": 1e-9}
    counts = torch.tensor(rng.integers(0, 4, size=len(X))).clamp_min(0)
    counts[0] = 1
    weighted = fit_logistic(X, soft, weights=counts.double(), **options)
    repeated = fit_logistic(
        X.repeat_interleave(counts, 0), soft.repeat_interleave(counts, 0), **options
    )
    torch.testing.assert_close(weighted.coef, repeated.coef, atol=1e-6, rtol=0)
    order = torch.tensor(rng.permutation(len(X)))
    permuted = fit_logistic(X[order], soft[order], weights=counts[order].double(), **options)
    torch.testing.assert_close(weighted.coef, permuted.coef, atol=1e-6, rtol=0)


def classes(n=400, d=5, a=4, seed=0):
    X, _ = problem(n=n, d=d, seed=seed)
    rng = np.random.default_rng(seed + 1)
    z = X.numpy() @ rng.normal(size=(d, a)) + rng.gumbel(size=(n, a))
    return X, torch.tensor(z.argmax(1))


def test_softmax_equals_scikit_learn():
    X, y = classes()
    targets = torch.nn.functional.one_hot(y).double()
    fit = fit_softmax(X, targets, l2=2.0, tol=1e-10)
    expected = oracle(X, y, 2.0)
    np.testing.assert_allclose(fit.coef, expected.coef_, atol=1e-7)
    np.testing.assert_allclose(fit.intercept, expected.intercept_, atol=1e-6)
    np.testing.assert_allclose(
        fit.logits(X).softmax(-1), expected.predict_proba(X.numpy()), atol=1e-8
    )


@pytest.mark.parametrize("n_classes", [2, 3])
def test_softmax_with_soft_weighted_targets_and_offset_equals_scipy(n_classes):
    X, _ = classes(n=120, d=3)
    rng = np.random.default_rng(7)
    targets = torch.tensor(rng.gamma(0.7, size=(120, n_classes)))
    targets[:5] = 0  # items of weight 0
    offset = torch.tensor(rng.normal(size=(120, n_classes)))
    fit = fit_softmax(X, targets, l2=0.7, offset=offset, tol=1e-10)

    def objective(theta):
        coef, intercept = theta[: 3 * n_classes].reshape(n_classes, 3), theta[3 * n_classes :]
        z = X.numpy() @ coef.T + intercept + offset.numpy()
        log_p = z - logsumexp(z, axis=1, keepdims=True)
        return -np.sum(targets.numpy() * log_p) + 0.35 * np.sum(coef**2)

    expected = minimize(objective, np.zeros(4 * n_classes), method="BFGS", options={"gtol": 1e-6})
    np.testing.assert_allclose(fit.objective, expected.fun, rtol=1e-9)
    np.testing.assert_allclose(fit.coef.flatten(), expected.x[: 3 * n_classes], atol=1e-4)


def test_softmax_problems_side_by_side_equal_one_by_one():
    X, y = classes()
    _, other = classes(seed=5)
    targets = torch.nn.functional.one_hot(torch.stack([y, other], 1)).double()
    both = fit_softmax(X, targets, l2=torch.tensor([1.0, 9.0]), tol=1e-9)
    for j, l2 in enumerate((1.0, 9.0)):
        alone = fit_softmax(X, targets[:, j], l2=l2, tol=1e-9)
        torch.testing.assert_close(both.coef[j], alone.coef, atol=1e-6, rtol=0)
        torch.testing.assert_close(both.logits(X)[:, j], alone.logits(X), atol=1e-6, rtol=0)
        assert fit_softmax(X, targets[:, j], l2=l2, init=alone).n_iter == 0


def test_softmax_of_two_classes_warm_starts():
    X, Y = problem(k=1)
    targets = torch.cat([1 - Y, Y], 1)
    fit = fit_softmax(X, targets, l2=1.0)
    assert fit_softmax(X, targets, l2=1.0, init=fit).n_iter == 0


def test_softmax_refuses_what_has_no_optimum():
    X, y = classes()
    targets = torch.nn.functional.one_hot(y, 5).double()
    with pytest.raises(AnalysisError, match="class has no weight"):
        fit_softmax(X, targets, l2=1.0)
    with pytest.raises(AnalysisError, match="l2 > 0"):
        fit_softmax(X, targets[:, :4], l2=0.0)
    with pytest.raises(AnalysisError, match="targets"):
        fit_softmax(X, targets[:-1], l2=1.0)
    intercepts = fit_softmax(X[:, :0], targets[:, :4], l2=0.0, tol=1e-9).intercept
    torch.testing.assert_close(intercepts.softmax(0), targets[:, :4].mean(0), atol=1e-8, rtol=0)


@parametrize_with_checks([LogisticProbe(), LogisticProbe(class_weight="balanced")])
def test_scikit_learn_conventions(estimator, check):
    check(estimator)


def test_probe_equals_scikit_learn_with_names_for_classes_and_weights():
    X, y = classes()
    names = np.array(["ant", "bee", "cat", "dog"])[y]
    weights = np.random.default_rng(0).exponential(size=len(y))
    probe = LogisticProbe(C=2, tol=1e-10).fit(X.numpy(), names, sample_weight=weights)
    expected = oracle(X, y, 0.5, weights)
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-7)
    np.testing.assert_allclose(
        probe.predict_log_proba(X.numpy()), expected.predict_log_proba(X.numpy()), atol=1e-6
    )
    assert probe.score(X.numpy(), names) == expected.score(X.numpy(), y.numpy())
    assert probe.gradient_norm_ <= 1e-10


@pytest.mark.parametrize("class_weight", [None, "balanced", {0: 3.0, 2: 0.5}])
@pytest.mark.parametrize("n_classes", [2, 3])
def test_class_weights_equal_scikit_learns(n_classes, class_weight):
    X, y = classes(a=n_classes)
    X, y = X.numpy(), np.where(y == 1, 1, np.minimum(y, n_classes - 1)).astype(int)
    if isinstance(class_weight, dict):
        class_weight = {value: weight for value, weight in class_weight.items() if value in set(y)}
    weights = np.random.default_rng(0).exponential(size=len(y))
    probe = LogisticProbe(C=0.3, class_weight=class_weight).fit(X, y, sample_weight=weights)
    expected = LogisticRegression(
        C=0.3, class_weight=class_weight, solver="newton-cholesky", tol=1e-12
    ).fit(X, y, sample_weight=weights)
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-6)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_float32_reaches_its_tolerance(n_classes):
    X, y = classes(n=600, a=n_classes)
    probe = LogisticProbe(dtype="float32").fit(X.numpy(), y.numpy())
    assert probe.coef_.dtype == np.float32
    assert probe.gradient_norm_ <= 1e-5
    np.testing.assert_allclose(probe.coef_, oracle(X, y, 1.0).coef_, atol=1e-3)


@pytest.mark.parametrize("n_classes", [2, 3])
def test_fewer_items_than_features_work_in_their_span(n_classes, monkeypatch):
    X, y = classes(n=60, d=200, a=n_classes)
    X = X + 5  # so that the mean is no small part of the span
    sizes = []
    original = probes.logistic._descend
    monkeypatch.setattr(
        "probes.logistic._descend",
        lambda *args: sizes.append(args[0].design.shape) or original(*args),
    )
    probe = LogisticProbe(C=0.1).fit(X.numpy(), y.numpy())
    assert sizes == [(60, 61)]
    expected = oracle(X, y, 10.0)
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-6)
    z = X.numpy() @ probe.coef_.T + probe.intercept_  # the certificate bounds the true gradient
    p = np.stack([-z[:, 0], z[:, 0]], 1) if n_classes == 2 else z
    p = np.exp(p - logsumexp(p, axis=1, keepdims=True)) if n_classes > 2 else expit(p)
    residual = (p - np.eye(n_classes)[y])[:, -len(probe.coef_) :]
    gradient = residual.T @ X.numpy() + 10.0 * probe.coef_
    assert np.abs(gradient).max() / 60 <= probe.gradient_norm_ * 1.01 + 1e-12


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(12, 120),
    d=st.integers(1, 40),
    n_classes=st.integers(2, 10),
    kind=st.sampled_from(["plain", "separable", "constant column", "imbalanced", "weights"]),
    single=st.booleans(),
    C=st.floats(1e-3, 10),
    seed=st.integers(0, 10**6),
)
def test_same_optimum_as_scikit_learn(n, d, n_classes, kind, single, C, seed):
    """The objective within 1e-6, coefficients within 1e-4 of float64 at tolerance 1e-10."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5 + rng.normal(size=d)
    z = X @ rng.normal(size=(d, n_classes))
    y = (z if kind == "separable" else z + rng.gumbel(size=z.shape)).argmax(1)
    if kind == "imbalanced":
        y = np.where(np.arange(n) < 2, 1, 0)
    y[:2] = [0, 1]
    if kind == "constant column":
        X[:, 0] = 3.0
    X = X.astype(np.float32) if single else X
    weights = rng.exponential(size=n) if kind == "weights" else np.ones(n)
    probe = LogisticProbe(C=C).fit(X, y, sample_weight=weights)
    expected = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=1000)
    expected.fit(X.astype(float), y, sample_weight=weights)

    def objective(model):
        log_p = model.predict_log_proba(X.astype(float))
        index = np.searchsorted(model.classes_, y)
        loss = -(weights * log_p[np.arange(n), index]).sum()
        return loss + np.square(model.coef_).sum() / (2 * C)

    np.testing.assert_allclose(objective(probe), objective(expected), rtol=1e-6)
    np.testing.assert_allclose(probe.coef_, expected.coef_, atol=1e-4)
