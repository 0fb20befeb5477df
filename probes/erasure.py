"""Least-squares concept erasure (LEACE; Belrose et al. 2023, arXiv:2306.03819), in closed form.

r(x) = x - W^+ P W (x - E[x]),  W the whitening of x, P the orthogonal projection onto the columns
of W Cov(x, z). No linear predictor of z from r(x) beats a constant, and of all affine maps with
that property r moves x least, in mean square and in every other inner product.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import AnalysisError


@dataclass(frozen=True)
class Eraser:
    """The affine map x -> projection x + bias. `rank` is the number of directions it removes."""

    projection: Float[Tensor, "d d"]
    bias: Float[Tensor, " d"]
    rank: int

    def __call__(self, X: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return X @ self.projection.to(X).T + self.bias.to(X)


@dataclass(frozen=True)
class _Whitening:
    """Coordinates of used directions in which `centred` has unit covariance, and the way back."""

    centred: Float[Tensor, "n d"]
    mean: Float[Tensor, " d"]
    whiten: Float[Tensor, "r d"]
    colour: Float[Tensor, "d r"]

    def eraser(self, basis: Float[Tensor, "r k"]) -> Eraser:
        """Removes the span of these orthonormal directions."""
        removed = self.colour @ basis @ basis.T @ self.whiten
        identity = torch.eye(len(removed)).to(removed)
        return Eraser(identity - removed, removed @ self.mean, basis.shape[1])


def fit_eraser(
    X: Float[Tensor, "n d"], Z: Float[Tensor, "n k"], *, tolerance: float = 1e-6
) -> Eraser:
    """The map that removes from `X` all that predicts `Z` linearly; one-hot `Z` for categories.

    Directions in which `X` has less than `tolerance` of its largest standard deviation count as
    constant, as do correlations with `Z` below `tolerance`.
    """
    if X.ndim != 2 or Z.ndim != 2 or len(X) != len(Z):
        raise AnalysisError(f"Z: expected shape [{len(X)}, k], got {list(Z.shape)}")
    if not (X.isfinite().all() and Z.isfinite().all()):
        raise AnalysisError("X, Z: contain NaN or infinite values; remove those items")
    space, Z = _whiten(X, tolerance), Z.to(X.device).double()
    concept = Z - Z.mean(0)
    spread = concept.square().mean(0).sqrt()
    concept = concept / torch.where(spread > 0, spread, 1.0)
    correlation = space.whiten @ (space.centred.T @ concept) / len(X)
    basis, strength, _ = torch.linalg.svd(correlation, full_matrices=False)
    return space.eraser(basis[:, strength > tolerance])


def random_eraser(
    X: Float[Tensor, "n d"], rank: int, *, generator: torch.Generator, tolerance: float = 1e-6
) -> Eraser:
    """A control for `fit_eraser`: removes `rank` directions drawn uniformly after whitening `X`.

    Raises AnalysisError where `X` has fewer directions than that.
    """
    space = _whiten(X, tolerance)
    n_directions = len(space.whiten)
    if not 0 <= rank <= n_directions:
        raise AnalysisError(f"rank: must be 0 to {n_directions} here, got {rank}")
    drawn = torch.randn(n_directions, rank, generator=generator, dtype=torch.float64)
    return space.eraser(torch.linalg.qr(drawn.to(X.device)).Q)


def _whiten(X: Float[Tensor, "n d"], tolerance: float) -> _Whitening:
    X = X.double()
    mean = X.mean(0)
    centred = X - mean
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(X))
    used = variance > max(tolerance**2 * float(variance.amax()), torch.finfo(X.dtype).tiny)
    deviation, axes = variance[used].sqrt(), axes[:, used]
    return _Whitening(centred, mean, (axes / deviation).T, axes * deviation)
