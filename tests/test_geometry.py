"""The shape of clouds that were made to have it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics.pairwise import cosine_similarity
from sklearn.neighbors import NearestNeighbors

from mechinterp.errors import AnalysisError
from mechinterp.statistics import t_interval
from probes.geometry import (
    anisotropy,
    effective_rank,
    geometry,
    intrinsic_dimension,
    participation_ratio,
)
from probes.jackknife import blocks_of_groups, jackknife_interval


def gaussian(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).normal(size=shape))


def embedded(n, k, d, seed=0):
    """A Gaussian cloud in k dimensions, turned into d."""
    return gaussian(n, k, seed=seed) @ torch.linalg.qr(gaussian(d, d, seed=99)).Q[:k] + 4


@pytest.mark.parametrize("k", [2, 5, 10])
def test_a_gaussian_in_k_dimensions_has_k(k):
    X = embedded(2000, k, 40)
    assert effective_rank(X) == pytest.approx(k, rel=0.01)
    assert participation_ratio(X) == pytest.approx(k, rel=0.02)
    assert intrinsic_dimension(X[:1000]) == pytest.approx(k, rel=0.2)


def test_ranks_by_their_formulas():
    X = gaussian(500, 6) * torch.tensor([3.0, 2, 1, 1, 0.5, 0.1])
    eigenvalues = np.linalg.eigvalsh(np.cov(X.numpy().T))
    share = eigenvalues / eigenvalues.sum()
    assert effective_rank(X) == pytest.approx(np.exp(-(share * np.log(share)).sum()))
    plug_in = eigenvalues.sum() ** 2 / (eigenvalues**2).sum()
    assert participation_ratio(X) == pytest.approx(plug_in, rel=0.02)
    assert effective_rank(X[:4]) == pytest.approx(effective_rank(torch.cat([X[:4], X[:4]])))


def test_participation_ratio_is_right_where_items_are_few():
    ratios = [participation_ratio(gaussian(60, 200, seed=s)) for s in range(20)]
    assert np.mean(ratios) == pytest.approx(200, rel=0.05)
    assert effective_rank(gaussian(60, 200)) < 60


def test_two_nearest_neighbours_written_out():
    X = gaussian(300, 4)
    distances, _ = NearestNeighbors(n_neighbors=3).fit(X.numpy()).kneighbors(X.numpy())
    mu = np.sort(distances[:, 2] / distances[:, 1])[:270]
    y = -np.log(1 - np.arange(1, 271) / 300)
    slope = np.linalg.lstsq(np.log(mu)[:, None], y, rcond=None)[0][0]
    assert intrinsic_dimension(X) == pytest.approx(slope)
    assert intrinsic_dimension(torch.cat([X, X[:50]])) == pytest.approx(slope)
    assert np.isnan(intrinsic_dimension(torch.ones(10, 3)))


def test_a_curve_has_one_dimension():
    angle = torch.tensor(np.random.default_rng(0).uniform(0, 6, size=1000))
    spiral = torch.stack([angle.cos(), angle.sin(), angle], 1)
    assert intrinsic_dimension(spiral) == pytest.approx(1, abs=0.1)
    assert effective_rank(spiral) > 1.5


def test_anisotropy_is_the_mean_over_pairs():
    X = gaussian(80, 5) + 1
    pairs = cosine_similarity(X.numpy())[np.triu_indices(80, 1)]
    assert anisotropy(X) == pytest.approx(pairs.mean())
    assert abs(anisotropy(gaussian(500, 50))) < 0.01
    assert anisotropy(gaussian(100, 5) + 100) > 0.99


def test_the_jackknife_of_a_mean_is_students_interval():
    x = gaussian(20)
    left_out = torch.stack([x[torch.arange(20) != i].mean() for i in range(20)])
    low, high = jackknife_interval(left_out)
    expected = t_interval(x.numpy())
    assert (float(low), float(high)) == pytest.approx((expected.low, expected.high))
    with pytest.raises(AnalysisError, match="two blocks"):
        jackknife_interval(x[:1])


def test_blocks_keep_groups_whole():
    groups = torch.arange(100) // 7
    blocks = blocks_of_groups(groups, n_blocks=5)
    assert len(blocks.unique()) == 5
    for group in groups.unique():
        assert len(blocks[groups == group].unique()) == 1
    assert len(blocks_of_groups(torch.arange(9) % 3).unique()) == 3


def test_intervals_cover_and_changes_are_paired():
    covered = 0
    for seed in range(40):
        X = gaussian(200, 8, seed=seed)
        found = geometry({"before": X, "after": 2 * X}, groups=torch.arange(200))
        _, low, high = found["before", "norm"]
        covered += low <= 2.7416 <= high  # mean of chi with 8 degrees of freedom
    assert covered >= 33
    # Doubling changes length and nothing else, and does so without any noise of its own.
    for measure in ("effective_rank", "participation_ratio", "intrinsic_dimension", "anisotropy"):
        assert found["change", measure] == pytest.approx((0, 0, 0), abs=1e-6)
    assert found["change", "norm"][0] == pytest.approx(found["before", "norm"][0])


def test_the_jackknife_leaves_out_what_a_direct_evaluation_would():
    X, groups = gaussian(120, 6), torch.arange(120) // 3
    blocks = blocks_of_groups(groups, n_blocks=10)
    left_out = torch.tensor([effective_rank(X[blocks != b]) for b in range(10)]).double()
    low, high = jackknife_interval(left_out, centre=torch.tensor(effective_rank(X)).double())
    found = geometry({"before": X}, groups=groups)["before", "effective_rank"]
    assert found == pytest.approx((effective_rank(X), float(low), float(high)), rel=1e-5)


def test_invalid_input_is_named():
    with pytest.raises(AnalysisError, match=r"after: expected finite activations \[5, d\]"):
        geometry({"before": torch.ones(5, 2), "after": torch.ones(4, 2)}, groups=torch.arange(5))
