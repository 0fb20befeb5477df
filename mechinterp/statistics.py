"""Intervals, tests and equivalence. The unit is the seed; items count only within a single pair.

All functions take plain one-dimensional numbers and refuse NaN. Nothing here rounds a p-value up or
down into a verdict: that is the caller's, with margins and levels fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng

# With fewer seeds an interval is wide and the smallest exact p-value is large (0.125 at four).
MIN_SEEDS = 8
MAX_EXACT = 16
_CHUNK = 2**22  # numbers in memory at once, in resampling


@dataclass(frozen=True)
class Interval:
    """A mean with its confidence interval; `n` units (seeds, items or groups) entered it."""

    mean: float
    low: float
    high: float
    level: float
    n: int


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided tests: `p` small means that the mean lies within ±`margin`.

    `interval` has level 1 - 2 alpha; it lies within the margin exactly when p < alpha.
    """

    equivalent: bool
    p: float
    margin: float
    interval: Interval


def t_interval(values: ArrayLike, *, level: float = 0.95) -> Interval:
    """Student's interval for the mean of independent values, such as one number per seed.

    From a single value there is no interval: its bounds are NaN.
    """
    from scipy.stats import t

    x = _numbers(values)
    mean = float(x.mean())
    if len(x) < 2:
        return Interval(mean, float("nan"), float("nan"), level, len(x))
    half = float(t.ppf(0.5 + level / 2, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Interval(mean, mean - half, mean + half, level, len(x))


def sign_flip_test(values: ArrayLike, *, seed: int = 0) -> float:
    """Two-sided p-value of "symmetric about zero", from the means under all 2^n sign flips.

    Exact up to 16 values, hence never below 2^(1-n); above, 100,000 random flips and the observed
    signs among them (Phipson and Smyth 2010), which is still a valid p-value.
    """
    x = _numbers(values)
    n = len(x)
    if n <= MAX_EXACT:
        # Flipping all signs changes nothing on both sides: the last sign can stay.
        bits = np.arange(2 ** (n - 1))[:, None] >> np.arange(n - 1) & 1
        sums = (1 - 2 * bits) @ x[:-1] + x[-1]
    else:
        rng = derive_rng(seed, "sign flips")
        drawn = [(1 - 2 * rng.integers(0, 2, (1_000, n))) @ x for _ in range(100)]
        sums = np.concatenate([x.sum(keepdims=True), *drawn])
    # Ties must count although their sums are rounded in different orders.
    tolerance = 1e-9 * np.abs(x).sum()
    return float(np.mean(np.abs(sums) >= abs(x.sum()) - tolerance))


def bootstrap_t_interval(
    values: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 4_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap-t interval for the mean over items, e.g. of paired differences after - before.

    Items of one group (the same image) are resampled together. Second-order correct where the
    percentile bootstrap is not (Efron and Tibshirani 1993, chapter 12.5); for the mean over seeds
    prefer `t_interval`.
    """
    x = _numbers(values)
    labels = np.arange(len(x)) if groups is None else np.unique(groups, return_inverse=True)[1]
    if len(labels) != len(x):
        raise AnalysisError(f"bootstrap: {len(x)} values but {len(labels)} groups")
    sizes = np.bincount(labels).astype(float)
    n = len(sizes)
    mean = float(x.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), level, n)
    sums = np.bincount(labels, x - mean)  # centred: resampled means are then deviations
    rng = derive_rng(seed, "bootstrap")
    rows = max(1, _CHUNK // n)
    studentised = []
    for begin in range(0, n_resamples, rows):
        size = min(rows, n_resamples - begin)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)
        deviation, error = _ratio(counts, sums, sizes)
        studentised.append(deviation / np.where(error > 0, error, np.inf))
    tail = 0.5 - level / 2
    lower, upper = np.quantile(np.concatenate(studentised), [tail, 1 - tail])
    error = _ratio(np.ones((1, n)), sums, sizes)[1].item()
    return Interval(mean, mean - upper * error, mean - lower * error, level, n)


def equivalence_test(values: ArrayLike, *, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t-tests (Schuirmann 1987) that the mean lies within ±`margin`."""
    from scipy.stats import t

    x = _numbers(values)
    if not margin > 0:
        raise AnalysisError(f"equivalence: the margin must be positive, got {margin}")
    interval = t_interval(x, level=1 - 2 * alpha)
    if len(x) < 2:
        return Equivalence(False, float("nan"), margin, interval)
    error = x.std(ddof=1) / np.sqrt(len(x))
    distance = margin - abs(interval.mean)
    # Without any spread the statistic is infinite, on the side on which the mean lies.
    statistic = distance / error if error > 0 else np.copysign(np.inf, distance)
    p = float(t.sf(statistic, len(x) - 1))
    return Equivalence(p < alpha, p, margin, interval)


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p-values, in the given order; valid under any dependence."""
    p = _numbers(p_values)
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


def _ratio(
    counts: np.ndarray, sums: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over items and its standard error, for each row of group counts [rows, groups].

    The mean is the ratio of two group totals; the error is linearised (with groups of one item it
    is the usual s / sqrt(n)).
    """
    n = counts.sum(axis=1)
    total = counts @ sizes
    mean = counts @ sums / total
    # sum of counts (sums - mean sizes)^2, multiplied out to stay in matrix products
    squares = (
        counts @ sums**2 - 2 * mean * (counts @ (sums * sizes)) + mean**2 * (counts @ sizes**2)
    )
    return mean, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total


def _numbers(values: ArrayLike | Sequence[float]) -> np.ndarray:
    x = np.asarray(values, dtype=float)
    if x.ndim != 1 or len(x) == 0 or not np.isfinite(x).all():
        raise AnalysisError(
            f"statistics: expected a list of finite numbers, got shape {x.shape} with "
            f"{int((~np.isfinite(x)).sum())} non-finite; drop or repair them first"
        )
    return x
