"""Probes that read few features: L1-regularised logistic regression and k-sparse probing.

L1: the objective is scikit-learn's `LogisticRegression(l1_ratio=1, C=1 / strength)` with a free
intercept, solved by proximal Newton steps on a working set of features (Lee, Sun and Saunders 2014,
SIAM J. Optim. 24; Massias et al. 2018, arXiv:1802.07481). The certificate is the duality gap.

k-sparse: rank features by how far the means of classes lie apart, then refit on the first k
(Gurnee et al. 2023, arXiv:2305.01610, section 3.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.utils.validation import check_is_fitted
from torch import Tensor

from mechinterp.errors import AnalysisError, ConvergenceError
from probes.classifier import LogitClassifier
from probes.decomposition import check_items, check_strengths
from probes.logistic import fit_logistic, fit_softmax

_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
_MAX_HALVINGS = 40
_ROUNDING = 1e-15  # of the objective: near the optimum steps change it by no more
_MAX_SWEEPS = 300  # of coordinate descent in one step; with 30 collinear features take 550 steps
_DAMPING = 1e-12  # of the largest curvature, for features that are copies of each other
RANKINGS = ("mean_difference", "t")


@dataclass(frozen=True)
class L1Fits:
    """k L1-regularised logistic regressions at s strengths.

    `objective` is a sum over items; no coefficients have one lower by more than `gap`, the
    certificate, which is per unit of weight.
    """

    strengths: Float[Tensor, " s"]
    coefs: Float[Tensor, "s k d"]
    intercepts: Float[Tensor, "s k"]
    objective: Float[Tensor, "s k"]
    gap: Float[Tensor, "s k"]
    n_iter: int  # the most of any fit


def fit_l1_many(
    X: Float[Tensor, "n d"],
    targets: Float[Tensor, "n k"],
    strengths: Float[Tensor, " s"] | tuple[float, ...],
    *,
    weights: Float[Tensor, " n"] | None = None,
    tol: float = 1e-8,
    max_iter: int = 500,
) -> L1Fits:
    """Fit k targets in [0, 1] at s strengths, the strong first as starts for the weak, in float64.

    Minimises sum_i w_i CE(y_i, sigmoid(x_i . coef + intercept)) + strength |coef|_1.

    Raises AnalysisError for invalid input, such as a target that is constant, and ConvergenceError
    where the duality gap per unit of weight stays above `tol`.
    """
    X, weights = check_items(X, weights)
    grid = check_strengths("strengths", strengths, X.device)
    if targets.ndim != 2 or len(targets) != len(X):
        raise AnalysisError(f"targets: expected shape [{len(X)}, k], got {list(targets.shape)}")
    targets = targets.to(X)
    if not ((targets >= 0) & (targets <= 1)).all():
        raise AnalysisError("targets: must lie between 0 and 1; encode the two classes as 0 and 1")
    share = weights @ targets / weights.sum()
    if ((share <= 0) | (share >= 1)).any():
        column = int(((share <= 0) | (share >= 1)).nonzero()[0])
        raise AnalysisError(f"targets: column {column} is constant; leave it out or merge classes")
    mean = weights @ X / weights.sum()
    design = X - mean
    s, k = len(grid), targets.shape[1]
    coefs, intercepts = X.new_zeros(s, k, X.shape[1]), X.new_zeros(s, k)
    objective, gap = X.new_zeros(s, k), X.new_zeros(s, k)
    n_iter = 0
    for j in range(k):
        problem = _L1Problem(design, targets[:, j], weights)
        for index in grid.argsort(descending=True).tolist():
            strength = float(grid[index])
            gap[index, j], used = problem.descend(strength, tol, max_iter)
            n_iter = max(n_iter, used)
            if not gap[index, j] <= tol:
                raise ConvergenceError(
                    f"column {j}: the duality gap per unit of weight is {gap[index, j]:.1e} > tol "
                    f"= {tol:.0e} at strength {strength:g} after {used} iterations; "
                    "raise the strength, tol or max_iter"
                )
            coefs[index, j] = problem.coef
            intercepts[index, j] = problem.intercept - problem.coef @ mean
            objective[index, j] = problem.value(problem.logits, problem.coef, strength)
    return L1Fits(grid, coefs, intercepts, objective, gap, n_iter)


class _L1Problem:
    """One target on a centred design, at the parameters found last."""

    def __init__(
        self,
        design: Float[Tensor, "n d"],
        target: Float[Tensor, " n"],
        weights: Float[Tensor, " n"],
    ) -> None:
        self.design, self.target, self.weights = design, target, weights
        self.square = design.square()
        self.coef = design.new_zeros(design.shape[1])
        self.intercept = (weights @ target / weights.sum()).logit()

    @property
    def logits(self) -> Float[Tensor, " n"]:
        used = self.coef.nonzero()[:, 0]
        return self.design[:, used] @ self.coef[used] + self.intercept

    def value(self, z: Float[Tensor, " n"], coef: Float[Tensor, " d"], strength: float) -> Tensor:
        # threshold: torch's default is linear above 20, an error that the line search would feel.
        loss = torch.nn.functional.softplus(z, threshold=40) - self.target * z
        return self.weights @ loss + strength * coef.abs().sum()

    def descend(self, strength: float, tol: float, max_iter: int) -> tuple[float, int]:
        """Move to the optimum; returns the duality gap per unit of weight and the iterations."""
        gap = float("inf")
        for iteration in range(1, max_iter + 1):
            self._centre_intercept()
            z = self.logits
            residual = self.weights * (z.sigmoid() - self.target)
            gradient = residual @ self.design
            gap = self._gap(z, residual, gradient, strength)
            if gap <= tol or not self._step(z, gradient, strength):
                return gap, iteration
        return gap, max_iter

    def _centre_intercept(self) -> None:
        """The best intercept for these coefficients: residuals then sum to 0, which duality asks.

        Newton's method within the bracket that contains the root.
        """
        z = self.logits - self.intercept
        low, high = -z.amax() - 40, -z.amin() + 40
        for _ in range(100):
            p = (z + self.intercept).sigmoid()
            excess = self.weights @ (p - self.target)
            if excess.abs() <= 1e-15 * self.weights.sum():
                return
            low, high = (low, self.intercept) if excess > 0 else (self.intercept, high)
            moved = self.intercept - excess / (self.weights @ (p * (1 - p)))
            self.intercept = moved if low < moved < high else (low + high) / 2

    def _gap(self, z: Tensor, residual: Tensor, gradient: Tensor, strength: float) -> float:
        """Residuals scaled until no feature correlates with them by more than the strength are
        feasible for the dual, whose objective is the entropy of target + scaled residual.
        """
        scale = (strength / gradient.abs().amax()).clamp_max(1.0)
        p = self.target + scale * (z.sigmoid() - self.target)
        entropy = torch.special.entr(p) + torch.special.entr(1 - p)
        gap = self.value(z, self.coef, strength) - self.weights @ entropy
        return float(gap / self.weights.sum())

    def _step(self, z: Tensor, gradient: Tensor, strength: float) -> bool:
        """One proximal Newton step on a working set; False if nothing descends any more."""
        excess = (gradient.abs() - strength).masked_fill(self.coef != 0, torch.inf)
        n_used = int((self.coef != 0).sum())
        size = min(n_used + max(10, n_used), int((excess > 0).sum()))
        if size == 0:
            return False
        working = excess.topk(size).indices
        p = z.sigmoid()
        curvature = self.weights * p * (1 - p)
        columns = self.design[:, working]
        scaled = columns * curvature[:, None]
        # The best intercept for a step is eliminated: it centres the columns under the curvature.
        centre = scaled.sum(0) / curvature.sum()
        hessian = columns.T @ scaled - curvature.sum() * torch.outer(centre, centre)
        old, slope = self.coef[working], gradient[working]
        target = _minimise_quadratic(hessian, slope, old, strength)
        step = target - old
        moved = columns @ step - centre @ step
        predicted = slope @ step + strength * (target.abs().sum() - old.abs().sum())
        start = self.value(z, self.coef, strength)
        for halving in range(_MAX_HALVINGS):
            length = 0.5**halving
            coef = self.coef.index_copy(0, working, target if halving == 0 else old + length * step)
            ceiling = start + length * _SUFFICIENT_DECREASE * predicted + _ROUNDING * start
            if self.value(z + length * moved, coef, strength) <= ceiling:
                self.coef, self.intercept = coef, self.intercept - length * (centre @ step)
                return True
        return False


def _minimise_quadratic(
    hessian: Float[Tensor, "m m"], slope: Float[Tensor, " m"], start: Float[Tensor, " m"], strength
) -> Float[Tensor, " m"]:
    """Minimise slope . (u - start) + 1/2 (u - start)^T H (u - start) + strength |u|_1.

    Coordinate descent, in numpy, finds which coordinates are 0; with signs fixed, a linear system
    gives the rest. Where that would flip a sign, what coordinate descent has found must do.
    """
    H, u = hessian.cpu().numpy(), start.cpu().numpy().copy()
    H = H + _DAMPING * H.diagonal().max() * np.eye(len(H))
    gradient, diagonal = slope.cpu().numpy().copy(), H.diagonal()
    for _ in range(_MAX_SWEEPS):
        for j in range(len(u)):
            free = diagonal[j] * u[j] - gradient[j]
            new = np.sign(free) * max(abs(free) - strength, 0.0) / diagonal[j]
            if new != u[j]:
                change = new - u[j]
                gradient += change * H[j]
                u[j] = new
        kept = u.nonzero()[0]
        right = gradient[kept] + strength * np.sign(u[kept])
        exact = u[kept] - np.linalg.solve(H[np.ix_(kept, kept)], right)
        if (np.sign(exact) == np.sign(u[kept])).all():
            change = exact - u[kept]
            outside = np.abs(gradient + change @ H[kept])
            outside[kept] = 0
            if outside.max() <= strength * (1 + 1e-9):
                u[kept] = exact
                break
    return torch.from_numpy(u).to(start)


class L1Probe(LogitClassifier):
    """L1-regularised logistic regression: most coefficients are exactly 0.

    Finds the optimum of scikit-learn's `LogisticRegression(C, l1_ratio=1)`, the intercept being
    free; more than two classes are fitted one against the rest. Features are used as they are: put
    a `StandardScaler` before it where their scales differ. After `fit`: `classes_`, `coef_` [1 or
    classes, features], `intercept_`, `n_iter_` and `gap_`, the largest duality gap per unit of
    weight.

    Raises ConvergenceError where the gap stays above `tol`.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight=None,
        tol: float = 1e-8,
        max_iter: int = 500,
        device: str = "cpu",
    ):
        self.C = C
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.device = device

    def fit(self, X, y, sample_weight=None) -> L1Probe:
        data = self._encode(X, y, sample_weight)
        targets = data.one_hot[:, 1:] if len(self.classes_) == 2 else data.one_hot
        options = {"weights": data.weights, "tol": self.tol, "max_iter": self.max_iter}
        fits = fit_l1_many(data.X, targets, (1 / self.C,), **options)
        self.coef_, self.intercept_ = fits.coefs[0].cpu().numpy(), fits.intercepts[0].cpu().numpy()
        self.n_iter_, self.gap_ = fits.n_iter, float(fits.gap.max())
        return self

    def predict_log_proba(self, X) -> np.ndarray:
        """Log probabilities [n, classes]; of more than two, those against the rest normalised."""
        check_is_fitted(self)
        if len(self.classes_) == 2:
            return super().predict_log_proba(X)
        log_p = torch.nn.functional.logsigmoid(torch.from_numpy(self.decision_function(X)))
        return log_p.log_softmax(1).numpy()


class KSparseProbe(LogitClassifier):
    """Logistic regression (L2, scikit-learn's C) on the `k` features that separate classes best.

    `ranking` "mean_difference" is the paper's: how far the means of the classes lie apart (for more
    than two, their deviation, classes counting as often as they occur). "t" divides it by the
    deviation within classes, for features of different scales. After `fit`: `features_` [k], the
    best first, `classes_`, `coef_` [1 or classes, features], 0 elsewhere, and `intercept_`.
    """

    def __init__(
        self,
        k: int = 16,
        C: float = 1.0,
        *,
        ranking: str = "mean_difference",
        class_weight=None,
        tol: float = 1e-8,
        device: str = "cpu",
    ):
        self.k = k
        self.C = C
        self.ranking = ranking
        self.class_weight = class_weight
        self.tol = tol
        self.device = device

    def fit(self, X, y, sample_weight=None) -> KSparseProbe:
        data = self._encode(X, y, sample_weight)
        if self.k < 1:
            raise AnalysisError(f"k: must be at least 1, got {self.k}")
        kept = rank_features(data.X, data.one_hot, data.weights, ranking=self.ranking)[: self.k]
        if len(self.classes_) == 2:
            options = {"weights": data.weights, "l2": 1 / self.C, "tol": self.tol}
            fit = fit_logistic(data.X[:, kept], data.one_hot[:, 1:], **options)
        else:
            targets = data.one_hot * data.weights[:, None]
            fit = fit_softmax(data.X[:, kept], targets, l2=1 / self.C, tol=self.tol)
        coef = data.X.new_zeros(len(fit.coef), data.X.shape[1])
        coef[:, kept] = fit.coef
        self.features_, self.coef_ = kept.cpu().numpy(), coef.cpu().numpy()
        self.intercept_ = fit.intercept.cpu().numpy()
        return self


def rank_features(
    X: Float[Tensor, "n d"],
    one_hot: Float[Tensor, "n a"],
    weights: Float[Tensor, " n"],
    *,
    ranking: str = "mean_difference",
) -> Int[Tensor, " d"]:
    """Features in descending order of the deviation of their class means, or of that over the
    deviation within classes ("t"); ties in the order of the features.
    """
    if ranking not in RANKINGS:
        raise AnalysisError(f"ranking: must be one of {', '.join(RANKINGS)}, got {ranking!r}")
    X, weights = check_items(X, weights)
    share = weights / weights.sum()
    centred = X - share @ X
    class_share = share @ one_hot
    means = (one_hot * share[:, None]).T @ centred / class_share[:, None]
    between = class_share @ means.square()
    if ranking == "t":
        within = share @ (centred - one_hot @ means).square()
        between = torch.where(between > 0, between / within, 0.0)
    return between.argsort(descending=True, stable=True)
