"""Linear predictivity: how much of one representation a ridge regression on another predicts."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.patching.inference import mean_intervals

STRENGTHS = (1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)


def linear_predictivity(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n e"],
    *,
    folds: Int[Tensor, " n"],
    strengths: tuple[float, ...] = STRENGTHS,
) -> float:
    """Out-of-fold R^2 of Y from X, over all features of Y together; errors as of `ridge_errors`."""
    residual, total = ridge_errors(X, Y, folds=folds, strengths=strengths)
    return float(1 - residual.sum() / total.sum())


def ridge_errors(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n e"],
    *,
    folds: Int[Tensor, " n"],
    orders: Int[Tensor, "orders n"] | None = None,
    strengths: tuple[float, ...] = STRENGTHS,
) -> tuple[Float[Tensor, "orders n"], Float[Tensor, "orders n"]]:
    """Squared errors of Y[order] predicted from X, and squared distances from the training mean.

    Ridge regression in closed form on each fold's complement; all strengths and all `orders` of Y
    (by default the given one) share its decomposition. `strengths` are relative to the mean
    variance of the features of X; for fold f the one is taken that does best on the next fold,
    fitted without either.

    Raises AnalysisError where there are fewer than three folds.
    """
    X, Y = X.double(), Y.double()
    names = folds.unique().tolist()
    if len(names) < 3:
        raise AnalysisError(f"folds: linear predictivity needs at least 3, got {len(names)}")
    orders = torch.arange(len(X))[None] if orders is None else orders
    residual, total = X.new_empty(orders.shape), X.new_empty(orders.shape)
    for f, following in zip(names, [*names[1:], names[0]], strict=True):
        held_out, inner = folds == f, folds == following
        tried = _errors(X, Y, orders, ~(held_out | inner), inner, [strengths] * len(orders))
        chosen = [(strengths[int(squares.sum(1).argmin())],) for squares, _ in tried]
        fitted = _errors(X, Y, orders, ~held_out, held_out, chosen)
        for row, (squares, deviations) in enumerate(fitted):
            residual[row, held_out], total[row, held_out] = squares[0], deviations
    return residual, total


def _errors(
    X: Float[Tensor, "n d"],
    Y: Float[Tensor, "n e"],
    orders: Int[Tensor, "orders n"],
    train: Bool[Tensor, " n"],
    test: Bool[Tensor, " n"],
    strengths: list[tuple[float, ...]],
) -> Iterator[tuple[Float[Tensor, "m test"], Float[Tensor, " test"]]]:
    """Per order, the squared errors at each strength and the squared deviations of test items."""
    centre = X[train].mean(0)
    design = X[train] - centre
    variance, axes = torch.linalg.eigh(design.T @ design)
    variance, test_design = variance.clamp_min(0), (X[test] - centre) @ axes
    for order, own in zip(orders, strengths, strict=True):
        y = Y[order]
        mean = y[train].mean(0)
        products, truth = axes.T @ (design.T @ (y[train] - mean)), y[test] - mean
        errors = []
        for strength in own:
            shrunk = test_design / (variance + strength * variance.mean())
            errors.append((truth - shrunk @ products).square().sum(1))
        yield torch.stack(errors), truth.square().sum(1)


def r2_interval(
    residual: Float[Tensor, " items"],
    total: Float[Tensor, " items"],
    groups: Int[Tensor, " items"],
    *,
    level: float = 0.95,
) -> tuple[float, float]:
    """Student's interval over groups for 1 - sum residual / sum total, a ratio of two means.

    From the ratio's linearisation; the fitted regressions are taken as given.
    """
    ratio = residual.sum() / total.sum()
    linear = 1 - ratio - (residual - ratio * total) / total.mean()
    low, high = mean_intervals(linear, groups=groups, level=level, interval="student")
    return float(low), float(high)
