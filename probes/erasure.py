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


def fit_eraser(
    X: Float[Tensor, "n d"], Z: Float[Tensor, "n k"], *, tolerance: float = 1e-6
) -> Eraser:
    """The map that removes from `X` all that predicts `Z` linearly; one-hot `Z` for categories.

    Directions in which `X` has less than `tolerance` of its largest standard deviation count as
    constant, as do correlations with `Z` below `tolerance`.
    """
    if X.ndim != 2 or Z.ndim != 2 or len(X) != len(Z):
        raise AnalysisError(f"Z: expected shape [{len(X)}, k], got {list(Z.shape)}")
    X, Z = X.double(), Z.to(X.device).double()
    if not (X.isfinite().all() and Z.isfinite().all()):
        raise AnalysisError("X, Z: contain NaN or infinite values; remove those items")
    mean = X.mean(0)
    centred, concept = X - mean, Z - Z.mean(0)
    variance, axes = torch.linalg.eigh(centred.T @ centred / len(X))
    used = variance > tolerance**2 * variance.amax()
    deviation, axes = variance[used].sqrt(), axes[:, used]
    whiten, colour = (axes / deviation).T, axes * deviation
    spread = concept.square().mean(0).sqrt()
    concept = concept / torch.where(spread > 0, spread, 1.0)
    correlation = whiten @ (centred.T @ concept) / len(X)
    basis, strength, _ = torch.linalg.svd(correlation, full_matrices=False)
    basis = basis[:, strength > tolerance]
    removed = colour @ basis @ basis.T @ whiten
    return Eraser(torch.eye(X.shape[1]).to(X) - removed, removed @ mean, basis.shape[1])
