"""Ridge regression: all strengths, all targets and exact leave-one-out from one decomposition.

The objective is scikit-learn's: sum_i w_i (y_i - x_i . coef - intercept)^2 + strength |coef|^2.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, MultiOutputMixin, RegressorMixin
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.classifier import ProbeClassifier, check_device
from probes.decomposition import check_strengths, decompose


@dataclass(frozen=True)
class RidgeFits:
    """k ridge regressions at s strengths.

    `held_out` are predictions for each item by the fit without it (or without its fold), `errors`
    their weighted mean squares, and `best` indexes the strength with the least, at which `coef`
    and `intercept` are given; `coefs` and `intercepts` are those of all strengths.
    """

    strengths: Float[Tensor, " s"]
    held_out: Float[Tensor, "s n k"]
    errors: Float[Tensor, "s k"]
    coefs: Float[Tensor, "s k d"]
    intercepts: Float[Tensor, "s k"]

    @property
    def best(self) -> Int[Tensor, " k"]:
        return self.errors.argmin(0)

    @property
    def strength(self) -> Float[Tensor, " k"]:
        return self.strengths[self.best]

    @property
    def coef(self) -> Float[Tensor, "k d"]:
        return self.coefs[self.best, torch.arange(self.coefs.shape[1])]

    @property
    def intercept(self) -> Float[Tensor, " k"]:
        return self.intercepts[self.best, torch.arange(self.coefs.shape[1])]


def fit_ridge_many(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n k"],
    strengths: Float[Tensor, " s"] | tuple[float, ...],
    *,
    weights: Float[Tensor, " n"] | None = None,
    folds: Int[Tensor, " n"] | None = None,
) -> RidgeFits:
    """Fit k targets at s strengths, in float64 on X's device, from one decomposition of `X`.

    Strengths are scikit-learn's alpha. Each item is held out alone, or with its fold where `folds`
    are given; either is exact, and no model is refitted. More features than items are no obstacle.

    Raises AnalysisError for input that is not finite, for mismatched shapes, for strengths that are
    not positive, and where one fold holds all the weight.
    """
    decomposition = decompose(X, weights)
    grid = check_strengths("strengths", strengths, X.device)
    if Y.ndim != 2 or len(Y) != len(X):
        raise AnalysisError(f"Y: expected shape [{len(X)}, k], got {list(Y.shape)}")
    Y = Y.to(decomposition.scores)
    if not Y.isfinite().all():
        raise AnalysisError("Y: contains NaN or infinite values; remove those items")
    if folds is None:
        held_out = decomposition.leave_one_out(Y, grid)
    else:
        if len(folds) != len(X) or len(folds[decomposition.weights > 0].unique()) < 2:
            raise AnalysisError(f"folds: expected {len(X)} items in 2 folds or more with weight")
        held_out = torch.stack([decomposition.leave_fold_out(a, folds)(Y) for a in grid])
    share = decomposition.weights / decomposition.weights.sum()
    errors = torch.einsum("n,snk->sk", share, (held_out - Y).square())
    return RidgeFits(grid, held_out, errors, *decomposition.coef(Y, grid))


class RidgeProbe(MultiOutputMixin, RegressorMixin, BaseEstimator):
    """Ridge regression of a real latent, or of several, at the best of `strengths`.

    Equals scikit-learn's `RidgeCV(alphas=strengths)`. After `fit`: `coef_` [features] or [targets,
    features], `intercept_`, `strength_` and `held_out_`, the leave-one-out predictions of the items
    at that strength, one strength per target.
    """

    def __init__(self, strengths=(0.1, 1.0, 10.0), *, device: str = "cpu"):
        self.strengths = strengths
        self.device = device

    def fit(self, X, y, sample_weight=None) -> RidgeProbe:
        X, targets = validate_data(
            self, X, y, dtype=np.float64, multi_output=True, y_numeric=True, ensure_min_samples=2
        )
        targets = np.asarray(targets)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        device = check_device(self.device)
        fits = fit_ridge_many(
            torch.tensor(X, device=device),
            torch.tensor(targets.reshape(len(X), -1), device=device),
            self.strengths,
            weights=torch.tensor(weights, device=device),
        )
        held_out = fits.held_out[fits.best, :, torch.arange(len(fits.best))].T
        found = [x.cpu().numpy() for x in (fits.coef, fits.intercept, fits.strength, held_out)]
        if targets.ndim == 1:
            found = [found[0][0], found[1][0], found[2][0], found[3][:, 0]]
        self.coef_, self.intercept_, self.strength_, self.held_out_ = found
        return self

    def predict(self, X) -> np.ndarray:
        """Predictions [n] or [n, targets]."""
        check_is_fitted(self)
        return (
            validate_data(self, X, dtype=np.float64, reset=False) @ self.coef_.T + self.intercept_
        )


class RidgeClassifierProbe(ProbeClassifier):
    """Least squares on targets 1 and -1, one class against the rest where there are more than two.

    Equals scikit-learn's `RidgeClassifierCV(alphas=strengths)`: one strength for all classes, the
    one with the least squared error of leave-one-out. It gives scores, not probabilities. After
    `fit`: `classes_`, `coef_` [1 or classes, features], `intercept_`, `strength_` and `held_out_`
    [n, 1 or classes], the leave-one-out scores of the items with weight.
    """

    def __init__(self, strengths=(0.1, 1.0, 10.0), *, class_weight=None, device: str = "cpu"):
        self.strengths = strengths
        self.class_weight = class_weight
        self.device = device

    def fit(self, X, y, sample_weight=None) -> RidgeClassifierProbe:
        data = self._encode(X, y, sample_weight)
        signs = 2 * data.one_hot - 1
        signs = signs[:, 1:] if len(self.classes_) == 2 else signs
        fits = fit_ridge_many(data.X, signs, self.strengths, weights=data.weights)
        best = int(fits.errors.mean(1).argmin())
        self.coef_ = fits.coefs[best].cpu().numpy()
        self.intercept_ = fits.intercepts[best].cpu().numpy()
        self.strength_ = float(fits.strengths[best])
        self.held_out_ = fits.held_out[best].cpu().numpy()
        return self
