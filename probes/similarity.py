"""How alike are two representations of the same items? CKA, Procrustes, linear predictivity.

All three ignore rotations, which is why they complete `probes.transfer`, which does not. They work
on d x d sums over items, so that memory does not grow with the square of the number of items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_generator
from probes.jackknife import blocks_of_groups, jackknife_interval
from probes.predictivity import r2_interval, ridge_errors

MEASURES = ("cka", "procrustes", "r2_forward", "r2_back")
R2_ORDERS = 3  # of the null of R^2


def linear_cka(X: Float[Tensor, "n d"], Y: Float[Tensor, "n e"], *, debiased: bool = True) -> float:
    """Centred kernel alignment with linear kernels (Kornblith et al. 2019, arXiv:1905.00414).

    By default from unbiased HSIC (Song et al. 2012, JMLR 13, equation 5): independent
    representations give 0 on average however few the items, where the biased form goes to 1 as d
    grows past n. Then single values can be slightly below 0 or above 1. NaN where one is constant.

    Raises AnalysisError where the items differ in number, are fewer than 4, or not finite.
    """
    return CrossMoments.of(X, Y).cka(debiased=debiased)


def procrustes_distance(X: Float[Tensor, "n d"], Y: Float[Tensor, "n e"]) -> float:
    """|X - Y R|^2 after the best rotation R, both centred and scaled to norm 1: from 0 to 2.

    Equals 2 - 2 |X' Y|_*, the nuclear norm (Ding, Denain and Steinhardt 2021, arXiv:2108.01661).
    With d near n it is small even for noise: compare it with its null. Errors as of `linear_cka`.
    """
    return CrossMoments.of(X, Y).procrustes()


@dataclass(frozen=True)
class CrossMoments:
    """Two representations of n items with their sums of products."""

    x: Float[Tensor, "n d"]
    y: Float[Tensor, "n e"]
    xx: Float[Tensor, "d d"]
    xy: Float[Tensor, "d e"]
    yy: Float[Tensor, "e e"]

    @classmethod
    def of(cls, X: Float[Tensor, "n d"], Y: Float[Tensor, "n e"]) -> CrossMoments:
        if X.ndim != 2 or Y.ndim != 2 or len(X) != len(Y) or len(X) < 4:
            raise AnalysisError(
                f"similarity: expected [n, d] and [n, e] of the same n >= 4 items, got "
                f"{list(X.shape)} and {list(Y.shape)}"
            )
        x, y = in_span(X), in_span(Y)
        return cls(x, y, x.T @ x, x.T @ y, y.T @ y)

    def without(self, rows: Bool[Tensor, " n"]) -> CrossMoments:
        """The other items, at the cost of the items left out."""
        x, y = self.x[rows], self.y[rows]
        moments = (self.xx - x.T @ x, self.xy - x.T @ y, self.yy - y.T @ y)
        return CrossMoments(self.x[~rows], self.y[~rows], *moments)

    def reordered(self, order: Int[Tensor, " n"]) -> CrossMoments:
        """Item i of x with item order[i] of y."""
        y = self.y[order]
        return CrossMoments(self.x, y, self.xx, self.x.T @ y, self.yy)

    @cached_property
    def means(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " e"]]:
        return self.x.mean(0), self.y.mean(0)

    @cached_property
    def covariance(self) -> Float[Tensor, "d e"]:
        """Sum over items of centred x times centred y."""
        return self.xy - len(self.x) * torch.outer(*self.means)

    @cached_property
    def total_squares(self) -> tuple[Tensor, Tensor]:
        """Sums of squares of centred x and of centred y."""
        (x, y), n = self.means, len(self.x)
        return self.xx.trace() - n * x @ x, self.yy.trace() - n * y @ y

    def cka(self, *, debiased: bool = True) -> float:
        (x, y), n = self.means, len(self.x)
        own_x, own_y = self.xx - n * torch.outer(x, x), self.yy - n * torch.outer(y, y)
        norms_x, norms_y = (self.x - x).square().sum(1), (self.y - y).square().sum(1)
        if not debiased:
            cross, xx, yy = (m.square().sum() for m in (self.covariance, own_x, own_y))
        else:
            cross = unbiased_hsic(self.covariance, norms_x, norms_y)
            xx = unbiased_hsic(own_x, norms_x, norms_x)
            yy = unbiased_hsic(own_y, norms_y, norms_y)
        return float(cross / (xx * yy).clamp_min(0).sqrt()) if xx > 0 and yy > 0 else float("nan")

    def procrustes(self) -> float:
        x, y = self.total_squares
        return float(2 - 2 * torch.linalg.svdvals(self.covariance).sum() / (x * y).sqrt())


def unbiased_hsic(
    covariance: Float[Tensor, "d e"],
    norms_x: Float[Tensor, " n"],
    norms_y: Float[Tensor, " n"],
) -> Tensor:
    """Song et al.'s HSIC_1 of linear kernels K = X X', L = Y Y' of centred X and Y.

    `covariance` is X' Y; the squared norms of items are the kernels' diagonals. Rows of K sum to 0,
    so those of K without its diagonal sum to minus the diagonal, and equation 5 becomes this.
    """
    n, diagonals = len(norms_x), norms_x @ norms_y
    traces = norms_x.sum() * norms_y.sum() / ((n - 1) * (n - 2))
    return (covariance.square().sum() - n / (n - 2) * diagonals + traces) / (n * (n - 3))


def in_span(X: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
    """Centred `X` in coordinates of its own span where n < d: a rotation, which nothing here sees.

    Raises AnalysisError where `X` is not finite.
    """
    X = X.double()
    if not X.isfinite().all():
        raise AnalysisError("similarity: activations contain NaN or infinite values")
    X = X - X.mean(0)
    if X.shape[0] >= X.shape[1]:
        return X
    basis, scale, _ = torch.linalg.svd(X, full_matrices=False)
    return basis * scale


def permuted_groups(
    groups: Int[Tensor, " items"], generator: torch.Generator
) -> Int[Tensor, " items"]:
    """An order of the items in which whole groups, and the items within each, have changed places.

    Items of one group stay side by side, so that a null made with it keeps their dependence.
    """
    _, codes = groups.unique(return_inverse=True)
    place = torch.randperm(int(codes.max()) + 1, generator=generator)
    mixed = torch.randperm(len(codes), generator=generator)
    order = torch.empty_like(codes)
    order[codes.argsort(stable=True)] = mixed[place[codes[mixed]].argsort(stable=True)]
    return order


def compare_representations(
    before: Float[Tensor, "items d"],
    after: Float[Tensor, "items d"],
    *,
    groups: Int[Tensor, " items"],
    n_folds: int = 3,
    n_permutations: int = 20,
    n_blocks: int = 10,
    seed: int = 0,
) -> pd.DataFrame:
    """One row for each of MEASURES: measure, value, low, high, null, null_low, null_high, p.

    `r2_forward` is the share of the variance after that a ridge regression on before predicts, out
    of fold; `r2_back` the other way. Intervals are 95%, over groups: jackknife for CKA and
    Procrustes, Student's for R^2. The null pairs items with items of other groups: its mean and its
    extremes over `n_permutations`, and `p`, the share of orders (the true one among them) that make
    the two at least as alike. R^2 is 0 by construction where nothing is predicted; as a check, its
    null has three orders, and there is no `p`.

    Raises AnalysisError where shapes do not fit or groups are fewer than `n_folds`.
    """
    moments = CrossMoments.of(before, after)
    generator = derive_generator(seed, "similarity null")
    null_orders = [permuted_groups(groups, generator) for _ in range(n_permutations)]
    orders = torch.stack([torch.arange(len(groups)), *null_orders])
    # One at a time: each reordering is a copy of the activations.
    alike = [_cka_and_procrustes(moments.reordered(order)) for order in orders]
    blocks = blocks_of_groups(groups, n_blocks=n_blocks, seed=seed)
    rest = [_cka_and_procrustes(moments.without(blocks == block)) for block in blocks.unique()]
    left_out, centre = (
        torch.tensor(rest, dtype=torch.float64),
        torch.tensor(alike[0], dtype=torch.float64),
    )
    low, high = jackknife_interval(left_out, centre=centre)
    values: dict[str, Sequence[float]] = {}
    bounds: dict[str, tuple[float, float]] = {}
    for index, name in enumerate(("cka", "procrustes")):
        values[name] = [both[index] for both in alike]
        bounds[name] = (float(low[index]), float(high[index]))

    folds = blocks_of_groups(groups, n_blocks=n_folds, seed=seed)
    ways = {"r2_forward": (moments.x, moments.y), "r2_back": (moments.y, moments.x)}
    for name, (X, Y) in ways.items():
        residual, total = ridge_errors(X, Y, folds=folds, orders=orders[: 1 + R2_ORDERS])
        values[name] = (1 - residual.sum(1) / total.sum(1)).tolist()
        bounds[name] = r2_interval(residual[0], total[0], groups)

    rows = []
    for name in MEASURES:
        value, *null = values[name]
        spread = (sum(null) / len(null), min(null), max(null)) if null else (float("nan"),) * 3
        p = float("nan")
        if name in ("cka", "procrustes"):
            sign = -1 if name == "procrustes" else 1
            p = (1 + sum(sign * other >= sign * value for other in null)) / (1 + len(null))
        rows.append((name, value, *bounds[name], *spread, p))
    columns = ["measure", "value", "low", "high", "null", "null_low", "null_high", "p"]
    return pd.DataFrame(rows, columns=columns)


def _cka_and_procrustes(moments: CrossMoments) -> tuple[float, float]:
    return moments.cka(), moments.procrustes()
