"""Similarity of representations: formulas written out, and relations whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.spatial import procrustes
from sklearn.linear_model import Ridge

from mechinterp.errors import AnalysisError
from probes.predictivity import linear_predictivity, r2_interval, ridge_errors
from probes.similarity import (
    CrossMoments,
    compare_representations,
    linear_cka,
    permuted_groups,
    procrustes_distance,
)


def gaussian(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def rotation(d, seed=0):
    return torch.linalg.qr(gaussian(d, d, seed=seed)).Q


def naive_hsic(X, Y):
    """Song et al. 2012, equation 5, with the kernels written out."""
    n = len(X)
    K, L = (X @ X.T).fill_diagonal_(0), (Y @ Y.T).fill_diagonal_(0)
    one = torch.ones(n, dtype=X.dtype)
    total = torch.trace(K @ L) + (one @ K @ one) * (one @ L @ one) / ((n - 1) * (n - 2))
    return (total - 2 / (n - 2) * (one @ K @ L @ one)) / (n * (n - 3))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(5, 30), d=st.integers(1, 40), e=st.integers(1, 40), seed=st.integers(0, 999))
def test_cka_is_the_u_statistic_written_out(n, d, e, seed):
    X, Y = gaussian(n, d, seed=seed) + 3, gaussian(n, e, seed=seed + 1) - 2
    xx, yy = naive_hsic(X, X), naive_hsic(Y, Y)
    if min(xx, yy) < 1e-2:
        return  # the ratio of two estimates near zero says nothing
    expected = float(naive_hsic(X, Y) / (xx * yy).sqrt())
    assert linear_cka(X, Y) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_biased_cka_is_that_of_centred_kernels():
    X, Y = gaussian(50, 8), gaussian(50, 5, seed=1)
    H = torch.eye(50) - 1 / 50
    K, L = H.double() @ X @ X.T @ H.double(), H.double() @ Y @ Y.T @ H.double()
    expected = float((K * L).sum() / (K.norm() * L.norm()))
    assert linear_cka(X, Y, debiased=False) == pytest.approx(expected)


@pytest.mark.parametrize(("n", "d"), [(60, 200), (300, 40)])
def test_independent_noise_has_cka_zero_also_where_n_is_below_d(n, d):
    draws = [linear_cka(gaussian(n, d, seed=s), gaussian(n, d, seed=500 + s)) for s in range(60)]
    error = np.std(draws, ddof=1) / np.sqrt(len(draws))
    assert abs(np.mean(draws)) < 3 * error
    biased = linear_cka(gaussian(n, d), gaussian(n, d, seed=500), debiased=False)
    assert biased > d / (n + d) - 0.1


@pytest.mark.parametrize(("n", "d"), [(100, 12), (20, 50)])
def test_a_rotated_scaled_and_shifted_copy_is_the_same(n, d):
    X = gaussian(n, d) * torch.linspace(0.1, 3, d)
    Y = 2.5 * X @ rotation(d) + 7
    assert linear_cka(X, Y) == pytest.approx(1)
    assert procrustes_distance(X, Y) == pytest.approx(0, abs=1e-9)


def test_procrustes_is_scipys():
    X, Y = gaussian(40, 6), gaussian(40, 6, seed=1)
    # scipy scales Y as well: its disparity is 1 - |X'Y|_*^2
    _, _, disparity = procrustes(X.numpy(), Y.numpy())
    assert procrustes_distance(X, Y) == pytest.approx(2 - 2 * np.sqrt(1 - disparity))


def test_sums_without_a_block_are_those_of_the_others():
    X, Y = gaussian(50, 7) + 5, gaussian(50, 9, seed=1)
    rows = torch.arange(50) % 4 == 1
    rest = CrossMoments.of(X, Y).without(rows)
    assert rest.cka() == pytest.approx(linear_cka(X[~rows], Y[~rows]))
    assert rest.procrustes() == pytest.approx(procrustes_distance(X[~rows], Y[~rows]))


def test_ridge_is_scikit_learns_fold_by_fold():
    X = gaussian(90, 6) * torch.tensor([5.0, 1, 1, 1, 1, 0.1])
    Y = X @ gaussian(6, 4, seed=1) + gaussian(90, 4, seed=2)
    folds = torch.arange(90) % 3
    order = torch.randperm(90, generator=torch.Generator().manual_seed(0))
    strengths = (10.0, 0.1, 0.001)
    orders = torch.stack([torch.arange(90), order])
    residual, total = ridge_errors(X, Y, folds=folds, orders=orders, strengths=strengths)
    for row, y in enumerate((Y.numpy(), Y[order].numpy())):
        for f in range(3):
            inner, test = folds == (f + 1) % 3, folds == f

            def errors(train, rows, strength, y=y):
                x = X[train] - X[train].mean(0)
                alpha = strength * float(x.square().sum()) / 6
                model = Ridge(alpha=alpha, solver="svd").fit(X[train], y[train])
                return ((model.predict(X[rows]) - y[rows]) ** 2).sum(1)

            tried = [errors(~(inner | test), inner, s).sum() for s in strengths]
            expected = errors(~test, test, strengths[int(np.argmin(tried))])
            np.testing.assert_allclose(residual[row, test], expected, rtol=1e-6)
            deviation = ((y[test] - y[~test].mean(0)) ** 2).sum(1)
            np.testing.assert_allclose(total[row, test], deviation, rtol=1e-6)


def test_predictivity_is_the_share_of_variance_that_theory_gives():
    X = gaussian(3000, 10)
    Y = X @ rotation(10) + gaussian(3000, 10, seed=1)  # half signal, half noise
    folds = torch.arange(3000) % 3
    assert linear_predictivity(X, Y, folds=folds) == pytest.approx(0.5, abs=0.02)
    assert linear_predictivity(X, gaussian(3000, 10, seed=2), folds=folds) == pytest.approx(
        0, abs=0.01
    )
    with pytest.raises(AnalysisError, match="at least 3"):
        linear_predictivity(X, Y, folds=folds.clamp_max(1))


def test_the_interval_of_r2_covers():
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        scale = rng.gamma(2, size=200)
        total = torch.tensor(scale * rng.chisquare(4, size=200))
        residual = torch.tensor(scale * 0.3 * rng.chisquare(4, size=200))
        low, high = r2_interval(residual, total, torch.arange(200))
        covered += low <= 0.7 <= high
    assert covered >= 87


def test_the_null_keeps_groups_together():
    groups = torch.tensor([5, 3, 3, 5, 8, 8, 1, 1])
    order = permuted_groups(groups, torch.Generator().manual_seed(1))
    assert sorted(order.tolist()) == list(range(8))
    moved = {(int(a), int(b)) for a, b in zip(groups, groups[order], strict=True)}
    assert len(moved) == 4  # each group meets one other group, whole


def test_table_of_noise_of_a_copy_and_of_two_groups_only():
    X, groups = gaussian(120, 10), torch.arange(120) // 2
    noise = compare_representations(X, gaussian(120, 10, seed=1), groups=groups)
    row = noise.set_index("measure")
    assert row.low["cka"] < 0 < row.high["cka"]
    assert row.null_low["cka"] < 0 < row.null_high["cka"]
    assert row.p["cka"] > 0.05
    assert abs(row.value["procrustes"] - row.null["procrustes"]) < 0.1
    assert row.value["r2_forward"] < 0.02
    assert row.value["r2_back"] < 0.02
    copy = compare_representations(X, X @ rotation(10), groups=groups).set_index("measure")
    assert copy.value["cka"] == pytest.approx(1)
    assert copy.p["cka"] == pytest.approx(1 / 21)
    assert copy.value["r2_forward"] > 0.99
    assert copy.value["r2_back"] > 0.99
    assert copy.null["r2_forward"] < 0.02
    with pytest.raises(AnalysisError, match="at least 3"):
        compare_representations(X, X, groups=torch.arange(120) % 2)


def test_direction_of_r2():
    """Before holds all of after and more: it predicts after, and not the other way."""
    X = gaussian(300, 10)
    row = compare_representations(X, X[:, :3], groups=torch.arange(300)).set_index("measure")
    assert row.value["r2_forward"] > 0.99
    assert row.value["r2_back"] == pytest.approx(0.3, abs=0.05)


def test_invalid_input_is_named():
    with pytest.raises(AnalysisError, match="same n >= 4 items"):
        linear_cka(torch.zeros(5, 2), torch.zeros(6, 2))
    with pytest.raises(AnalysisError, match="NaN"):
        linear_cka(torch.full((5, 2), torch.nan), torch.zeros(5, 2))
    assert np.isnan(linear_cka(torch.ones(5, 2), gaussian(5, 2)))
