"""Reduced-rank ridge regression: many targets read through few directions, in closed form.

Of all coefficients B of rank r, the least of |Y - X B|^2 + strength |B|^2 is the ridge solution
projected on the first r principal axes of its fitted values, augmented by the penalty (Mukherjee
and Zhu 2011, Stat. Anal. Data Mining 4, eq. 5; strength 0: Izenman 1975). One decomposition of the
activations and, for each strength, one of a matrix over targets serve all ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.classifier import ProbeClassifier, check_device
from probes.decomposition import check_strengths, decompose


@dataclass(frozen=True)
class LowRankFits:
    """Reduced-rank fits of k targets: rank-r coefficients are `coef @ axes_r axes_r^T`.

    `axes` are the principal axes of the targets, the most predictable first, and `gains` what each
    takes off the objective.
    """

    strengths: Float[Tensor, " s"]
    coefs: Float[Tensor, "s k d"]  # of full rank: ridge regression
    target_mean: Float[Tensor, " k"]
    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "s k k"]
    gains: Float[Tensor, "s k"]

    def at_rank(self, rank: int) -> tuple[Float[Tensor, "s k d"], Float[Tensor, "s k"]]:
        """Coefficients of rank at most `rank` and intercepts, at every strength."""
        kept = self.axes[..., :rank]
        coefs = kept @ (kept.mT @ self.coefs)
        return coefs, self.target_mean - coefs @ self.mean


def fit_low_rank_many(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n k"],
    strengths: Float[Tensor, " s"] | tuple[float, ...],
    *,
    weights: Float[Tensor, " n"] | None = None,
) -> LowRankFits:
    """Fit k targets together at s strengths (scikit-learn's alpha) and all ranks, in float64.

    Raises AnalysisError for input that is not finite, mismatched shapes, or strengths that are not
    positive.
    """
    decomposition = decompose(X, weights)
    grid = check_strengths("strengths", strengths, X.device)
    if Y.ndim != 2 or len(Y) != len(X) or not Y.isfinite().all():
        raise AnalysisError(f"Y: expected finite numbers [{len(X)}, k], got {list(Y.shape)}")
    Y = Y.to(decomposition.scores)
    weights = decomposition.weights
    target_mean = weights @ Y / weights.sum()
    moment = decomposition.scores.T @ (weights[:, None] * (Y - target_mean))
    filtered = moment / (decomposition.scatter[:, None] + grid[:, None, None])
    gains, axes = torch.linalg.eigh(moment.T @ filtered)
    coefs, _ = decomposition.coef(Y, grid)
    return LowRankFits(
        grid, coefs, target_mean, decomposition.mean, axes.flip(-1), gains.flip(-1).clamp_min(0)
    )


class LowRankProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Ridge regression of several targets through at most `rank` directions of the activations.

    `strength` is scikit-learn's alpha; at full rank this is `Ridge(alpha=strength)`. After `fit`:
    `coef_` [targets, features] or [features], `intercept_`, and `directions_` [rank, features], an
    orthogonal basis of what the coefficients read.
    """

    def __init__(self, rank: int = 1, strength: float = 1.0, *, device: str = "cpu"):
        self.rank = rank
        self.strength = strength
        self.device = device

    def fit(self, X, y, sample_weight=None) -> LowRankProbe:
        X, targets = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        targets = np.asarray(targets)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        device = check_device(self.device)
        coef, intercept = _fit_rank(
            torch.tensor(X, device=device),
            torch.tensor(targets.reshape(len(X), -1), device=device),
            torch.tensor(weights, device=device),
            self.rank,
            self.strength,
        )
        self.directions_ = _directions(coef, self.rank)
        self.coef_, self.intercept_ = coef.cpu().numpy(), intercept.cpu().numpy()
        if targets.ndim == 1:
            self.coef_, self.intercept_ = self.coef_[0], self.intercept_[0]
        return self

    def predict(self, X) -> np.ndarray:
        """Predictions [n] or [n, targets]."""
        check_is_fitted(self)
        X = np.asarray(validate_data(self, X, dtype=np.float64, reset=False))
        return X @ self.coef_.T + self.intercept_


class LowRankClassifierProbe(ProbeClassifier):
    """Many classes read through at most `rank` directions: reduced-rank least squares on one-hot
    targets, the class of the largest score. It gives scores, not probabilities.

    After `fit`: `classes_`, `coef_` [1 or classes, features], `intercept_`, and `directions_`
    [rank, features].
    """

    def __init__(
        self, rank: int = 1, strength: float = 1.0, *, class_weight=None, device: str = "cpu"
    ):
        self.rank = rank
        self.strength = strength
        self.class_weight = class_weight
        self.device = device

    def fit(self, X, y, sample_weight=None) -> LowRankClassifierProbe:
        data = self._encode(X, y, sample_weight)
        coef, intercept = _fit_rank(data.X, data.one_hot, data.weights, self.rank, self.strength)
        self.directions_ = _directions(coef, self.rank)
        self._set_logits(coef, intercept)
        return self


def _fit_rank(
    X: Tensor, Y: Tensor, weights: Tensor, rank: int, strength: float
) -> tuple[Float[Tensor, "k d"], Float[Tensor, " k"]]:
    if rank < 1:
        raise AnalysisError(f"rank: must be at least 1, got {rank}")
    coefs, intercepts = fit_low_rank_many(X, Y, (strength,), weights=weights).at_rank(rank)
    return coefs[0], intercepts[0]


def _directions(coef: Float[Tensor, "k d"], rank: int) -> np.ndarray:
    return torch.linalg.svd(coef, full_matrices=False)[2][:rank].cpu().numpy()
