"""One singular value decomposition that serves every strength, target and item left out.

For centred rows with sqrt(w) (X - mean) = U diag(s) V^T, ridge regression at strength a predicts
A A^T W y with A = [1 / sqrt(sum w), (X - mean) V diag(s^2 + a)^-1/2]; the first column is the
unpenalised intercept. From it, without the items F (any set of them),

    y_F = A_F (I - A_F^T W_F A_F)^-1 (A^T W y - A_F^T W_F y_F),

exactly what refitting on the others predicts for F; for a single item this is the well-known
(y_i - h_i y_i) / (1 - h_i) (Allen 1974, Technometrics 16; Hastie et al. 2009, eq. 7.64).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError


@dataclass(frozen=True)
class Decomposition:
    """`scores` are the rows of X - mean in the right singular vectors `axes`, rank r of them."""

    mean: Float[Tensor, " d"]
    axes: Float[Tensor, "d r"]
    scores: Float[Tensor, "n r"]
    scatter: Float[Tensor, " r"]  # squared singular values: sum_i w_i scores_ir^2
    weights: Float[Tensor, " n"]

    def coef(
        self, Y: Float[Tensor, "n k"], strengths: Float[Tensor, " s"]
    ) -> tuple[Float[Tensor, "s k d"], Float[Tensor, "s k"]]:
        """Coefficients and intercepts of ridge regression at every strength."""
        filtered = self._filtered(Y, strengths)
        coef = torch.einsum("srk,dr->skd", filtered, self.axes)
        return coef, self._average(Y) - coef @ self.mean

    def leave_one_out(
        self, Y: Float[Tensor, "n k"], strengths: Float[Tensor, " s"]
    ) -> Float[Tensor, "s n k"]:
        """What ridge regression fitted without item i predicts for item i."""
        fitted = self.scores @ self._filtered(Y, strengths) + self._average(Y)
        spread = self.scores.square() @ (1 / (self.scatter[:, None] + strengths))  # n s
        leverage = rearrange(spread + 1 / self.weights.sum(), "n s -> s n 1")
        leverage = leverage * self.weights[:, None]
        return (fitted - leverage * Y) / (1 - leverage)

    def leave_fold_out(
        self, strength: float | Tensor, folds: Int[Tensor, " n"]
    ) -> Callable[[Float[Tensor, "n k"]], Float[Tensor, "n k"]]:
        """A map from targets to what ridge regression without an item's fold predicts for it.

        Its cost per target is two products with the scores, whatever it is applied to.
        """
        intercept = self.weights.sum().rsqrt().expand(len(self.scores), 1)
        design = torch.cat([intercept, self.scores * (self.scatter + strength).rsqrt()], 1)
        blocks = []
        for fold in folds.unique():
            rows = (folds == fold).nonzero()[:, 0]
            part = design[rows]
            weighted = part * self.weights[rows, None]
            blocks.append((rows, part, weighted.T, self._solver(part, weighted)))

        def predict(Y: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
            moments = [weighted @ Y[rows] for rows, _, weighted, _ in blocks]
            total, predicted = torch.stack(moments).sum(0), torch.empty_like(Y)
            for (rows, part, _, solve), moment in zip(blocks, moments, strict=True):
                predicted[rows] = solve(part, total - moment)
            return predicted

        return predict

    @staticmethod
    def _solver(
        part: Float[Tensor, "m r"], weighted: Float[Tensor, "m r"]
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """(part, moment) -> part (I - part^T weighted)^-1 moment, by the smaller system."""
        m, r = part.shape
        if r <= m:
            eye = torch.eye(r, dtype=part.dtype, device=part.device)
            factor = torch.linalg.cholesky(eye - part.T @ weighted)
            return lambda part, moment: part @ torch.cholesky_solve(moment, factor)
        eye = torch.eye(m, dtype=part.dtype, device=part.device)
        system = torch.linalg.lu_factor(eye - part @ weighted.T)
        return lambda part, moment: torch.linalg.lu_solve(*system, part @ moment)

    def _filtered(
        self, Y: Float[Tensor, "n k"], strengths: Float[Tensor, " s"]
    ) -> Float[Tensor, "s r k"]:
        moment = self.scores.T @ (self.weights[:, None] * (Y - self._average(Y)))
        return moment / (self.scatter[:, None] + strengths[:, None, None])

    def _average(self, Y: Float[Tensor, "n k"]) -> Float[Tensor, " k"]:
        return self.weights @ Y / self.weights.sum()


def check_items(
    X: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None
) -> tuple[Float[Tensor, "n d"], Float[Tensor, " n"]]:
    """`X` and `weights` (1 by default) in float64; raises AnalysisError unless they are finite."""
    X = X.double()
    weights = X.new_ones(len(X)) if weights is None else weights.to(X)
    if X.ndim != 2 or weights.shape != X.shape[:1]:
        raise AnalysisError(
            f"X, weights: expected shapes [n, d] and [n], got {list(X.shape)} "
            f"and {list(weights.shape)}"
        )
    if not (X.isfinite().all() and weights.isfinite().all() and (weights >= 0).all()):
        raise AnalysisError("X, weights: must be finite, weights not negative; remove such items")
    if (weights > 0).sum() < 2:
        raise AnalysisError(
            f"X: needs at least 2 items with weight, got {int((weights > 0).sum())}"
        )
    return X, weights


def decompose(X: Float[Tensor, "n d"], weights: Float[Tensor, " n"] | None = None) -> Decomposition:
    """Decompose `X` in float64, in the span of its rows; `weights` of items default to 1.

    Raises AnalysisError for NaN, infinite or negative input and for fewer than two items.
    """
    X, weights = check_items(X, weights)
    mean = weights @ X / weights.sum()
    centred = X - mean
    # Not the eigenvectors of the Gram matrix, at a third of the time: they lose what lies 1e-8
    # below the largest feature, and residual streams have features that large.
    _, singular, rows = torch.linalg.svd(weights.sqrt()[:, None] * centred, full_matrices=False)
    floor = singular.amax() * max(X.shape) * torch.finfo(X.dtype).eps
    axes = rows[singular > floor].T
    return Decomposition(mean, axes, centred @ axes, singular[singular > floor].square(), weights)


def check_strengths(name: str, strengths: object, device: torch.device) -> Float[Tensor, " s"]:
    """`strengths` as a float64 vector; raises AnalysisError unless all are positive numbers."""
    values = torch.as_tensor(strengths, dtype=torch.float64, device=device)
    if values.ndim != 1 or not len(values) or not (values.isfinite() & (values > 0)).all():
        raise AnalysisError(f"{name}: must be one or more positive numbers, got {strengths}")
    return values
