"""Intervals, tests and equivalence. The unit is the seed; items count only within a single pair.

All functions take plain one-dimensional numbers and refuse NaN. Nothing here rounds a p-value up or
down into a verdict: that is the caller's, with margins and levels fixed beforehand.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float
from numpy.typing import ArrayLike

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng

# With fewer seeds an interval is wide and the smallest exact p-value is large (0.125 at four).
MIN_SEEDS = 8
MAX_EXACT = 16
NO_SPREAD = 1e-6  # of the observed error: what rounding leaves of a resample of equal values
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


@dataclass(frozen=True)
class DoubleDissociation:
    """Of arms a and b, paired by seed: `learning` is how much more a increases the learning loss
    than b does, `choosing` how much more b increases the choosing loss than a, `interaction` their
    sum. Intervals have level 1 - 2 alpha: `dissociated` is both simple effects' above the margin.
    """

    dissociated: bool
    p: float
    margin: float
    learning: Interval
    choosing: Interval
    interaction: Interval


@dataclass(frozen=True)
class VarianceComponents:
    """`between` seeds' true means, and `within` a seed: of one item about the seed's mean."""

    between: float
    within: float = 0.0

    def of_seed_mean(self, n_items: int) -> float:
        """The variance of one seed's mean over `n_items`."""
        return self.between + self.within / n_items


def t_interval(
    values: ArrayLike, *, groups: ArrayLike | None = None, level: float = 0.95
) -> Interval:
    """Student's interval for the mean of independent values, such as one number per seed, or of
    items whose `groups` are independent (`bootstrap_t_interval` for few or skewed ones).

    From a single value or group there is no interval: its bounds are NaN.
    """
    from scipy.stats import t

    mean, error, n = _mean_and_error(_numbers(values), groups)
    half = float(t.ppf(0.5 + level / 2, n - 1) * error) if n > 1 else float("nan")
    return Interval(mean, mean - half, mean + half, level, n)


def t_test(values: ArrayLike, *, groups: ArrayLike | None = None) -> float:
    """Two-sided p-value of mean zero, as `t_interval` has it; NaN from one value or group, 1 where
    all are zero."""
    from scipy.stats import t

    mean, error, n = _mean_and_error(_numbers(values), groups)
    if n < 2:
        return float("nan")
    if error == 0:
        return 1.0 if mean == 0 else 0.0
    return float(2 * t.sf(abs(mean) / error, n - 1))


def proportion_interval(successes: int, n: int, *, level: float = 0.95) -> tuple[float, float]:
    """Clopper and Pearson's (1934) exact interval of a proportion; (0, 1) of nothing."""
    from scipy.stats import binomtest

    if n == 0:
        return 0.0, 1.0
    found = binomtest(successes, n).proportion_ci(level, method="exact")
    return float(found.low), float(found.high)


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
    mean = float(x.mean())
    sums, sizes = _by_group(x - mean, groups)  # centred: resampled means are then deviations
    n = len(sizes)
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), level, n)
    rng = derive_rng(seed, "bootstrap")
    rows = max(1, _CHUNK // n)
    observed = _ratio(np.ones((1, n)), sums, sizes)[1].item()
    studentised = []
    for begin in range(0, n_resamples, rows):
        size = min(rows, n_resamples - begin)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n).astype(float)
        deviation, error = _ratio(counts, sums, sizes)
        studentised.append(deviation / np.where(error > NO_SPREAD * observed, error, np.inf))
    return _studentised_interval(mean, observed, np.concatenate(studentised), level, n)


def hierarchical_bootstrap_interval(
    values: ArrayLike,
    *,
    seeds: ArrayLike,
    groups: ArrayLike | None = None,
    level: float = 0.95,
    n_resamples: int = 4_000,
    seed: int = 0,
) -> Interval:
    """Bootstrap-t interval for the mean over seeds of the seeds' means, from every seed's items.

    Each resample draws seeds, then items (or `groups` of them) within each seed drawn, and is
    studentised by the spread of the drawn seeds' means. Those contain the noise of their items
    before it is drawn again; they are therefore shrunk to the variance between seeds
    (`variance_components`; Davison and Hinkley 1997, section 3.8; Carpenter, Goldstein and Rasbash
    2003). Second-order correct where the noise of items outweighs the spread between seeds, or is
    next to nothing beside it.

    Prefer `t_interval` on the seeds' means where they look symmetric or are fewer than 8: from few
    seeds the shape of what lies between them cannot be estimated, and t is exact for normal means.
    This one is for few or skewed items, whose noise can still be seen in a seed's mean. Both speak
    of the items in hand where all seeds were measured on the same ones.

    Args:
        values: paired differences (after - before, or arm - reference), one per item of each seed.
        seeds: the seed of each value. Seeds count the same, however many items they have.
        groups: the group of each value (the same image); resampled together, within a seed.
    """
    parts = _by_seed(_numbers(values), seeds, groups)
    n = len(parts)
    means = np.array([part.mean for part in parts])
    mean = float(means.mean())
    if n < 2:
        return Interval(mean, float("nan"), float("nan"), level, n)
    between = max(means.var(ddof=1) - np.mean([part.error**2 for part in parts]), 0.0)
    shrinkage = np.sqrt(between / means.var()) if np.ptp(means) > 0 else 0.0
    rng = derive_rng(seed, "bootstrap")
    drawn = rng.integers(0, n, (n_resamples, n))
    resampled = shrinkage * (means - mean)[drawn]
    for index, part in enumerate(parts):
        slots = drawn == index
        resampled[slots] += part.resampled(int(slots.sum()), rng)
    observed = float(means.std(ddof=1) / np.sqrt(n))
    error = resampled.std(axis=1, ddof=1) / np.sqrt(n)
    studentised = resampled.mean(axis=1) / np.where(error > NO_SPREAD * observed, error, np.inf)
    return _studentised_interval(mean, observed, studentised, level, n)


def variance_components(
    values: ArrayLike, *, seeds: ArrayLike, groups: ArrayLike | None = None
) -> VarianceComponents:
    """Variance between seeds, and within them per item, by the method of moments.

    A seed's own mean has the variance of its items about it, taken by group where `groups` are
    given; what the seeds' means vary beyond that is between them (0 if nothing is). Raises
    AnalysisError from a single seed.
    """
    x = _numbers(values)
    parts = _by_seed(x, seeds, groups)
    if len(parts) < 2:
        raise AnalysisError("variance components: expected at least two seeds, got one")
    squares = np.array([part.error**2 for part in parts])
    within = float(np.mean(squares * [part.sizes.sum() for part in parts]))
    between = float(np.var([part.mean for part in parts], ddof=1) - squares.mean())
    return VarianceComponents(max(between, 0.0), within)


def equivalence_test(values: ArrayLike, *, margin: float, alpha: float = 0.05) -> Equivalence:
    """Two one-sided t-tests (Schuirmann 1987) that the mean lies within ±`margin`."""
    x = _numbers(values)
    if not margin > 0:
        raise AnalysisError(f"equivalence: the margin must be positive, got {margin}")
    p = _upper_p(x, margin - abs(float(x.mean())))
    return Equivalence(p < alpha, p, margin, t_interval(x, level=1 - 2 * alpha))


def double_dissociation(
    a: Float[ArrayLike, "seeds 2"],
    b: Float[ArrayLike, "seeds 2"],
    *,
    margin: float = 0.0,
    alpha: float = 0.05,
) -> DoubleDissociation:
    """Does arm `a` damage learning more than arm `b` does, and `b` choosing more than `a`?

    Each row of `a` and `b` is the same seed's increase of the learning and of the choosing loss
    over a common reference. Arms are compared within a side, never sides within an arm: the two
    losses need no common scale. An intersection-union test (Berger 1982) of the two one-sided
    paired t tests: `p` is the larger of their p-values, and without correction the test is wrong
    in at most `alpha` of cases, whatever the truth (that much only where one effect is at the
    margin and the other large; in about alpha^2 where both are and vary independently). The
    interaction contrast costs nothing: its t is never below the smaller of the two others.

    Raises:
        AnalysisError: not the same seeds' numbers of two sides.
    """
    a, b = np.asarray(a, dtype=float), np.asarray(b, dtype=float)
    if a.shape != b.shape or a.ndim != 2 or a.shape[1] != 2:
        raise AnalysisError(
            f"double dissociation: expected [seeds, 2] of the same seeds, got shapes {a.shape} "
            f"and {b.shape}"
        )
    learning, choosing = _numbers(a[:, 0] - b[:, 0]), _numbers(b[:, 1] - a[:, 1])
    # The larger of the two, and NaN (a single seed) if either is.
    p = float(np.max([_upper_p(x, x.mean() - margin) for x in (learning, choosing)]))
    effects = (learning, choosing, learning + choosing)
    return DoubleDissociation(
        p < alpha, p, margin, *(t_interval(effect, level=1 - 2 * alpha) for effect in effects)
    )


def holm(p_values: ArrayLike) -> np.ndarray:
    """Holm's (1979) adjusted p-values, in the given order; valid under any dependence."""
    p = _numbers(p_values)
    order = np.argsort(p, kind="stable")
    stepped = p[order] * np.arange(len(p), 0, -1)
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(stepped), 1)
    return adjusted


@dataclass(frozen=True)
class _Seed:
    """A seed's mean, and by group its deviations from it, summed, and its items, counted."""

    mean: float
    sums: np.ndarray
    sizes: np.ndarray
    error: float  # of the mean; 0 where a single group says nothing about it

    def resampled(self, n: int, rng: np.random.Generator) -> np.ndarray:
        """Deviations of `n` resampled means, of variance error^2."""
        n_groups = len(self.sums)
        if n_groups < 2:
            return np.zeros(n)
        rows = max(1, _CHUNK // n_groups)
        deviations = []
        for begin in range(0, n, rows):
            drawn = rng.integers(0, n_groups, (min(rows, n - begin), n_groups), dtype=np.uint32)
            equal = np.ptp(self.sizes) == 0  # as without groups: half the work
            total = n_groups * self.sizes[0] if equal else self.sizes[drawn].sum(axis=1)
            deviations.append(self.sums[drawn].sum(axis=1) / total)
        # A resample of n varies by (n - 1) / n of what the mean of n does.
        return np.concatenate([np.empty(0), *deviations]) * np.sqrt(n_groups / (n_groups - 1))


def _by_seed(x: np.ndarray, seeds: ArrayLike, groups: ArrayLike | None) -> list[_Seed]:
    seeds = np.asarray(seeds)
    labels = np.arange(len(x)) if groups is None else np.asarray(groups)
    if seeds.shape != x.shape or labels.shape != x.shape:
        raise AnalysisError(
            f"bootstrap: {len(x)} values but seeds {seeds.shape} and groups {labels.shape}"
        )
    parts = []
    for name in np.unique(seeds):
        own = x[seeds == name]
        sums, sizes = _by_group(own - own.mean(), labels[seeds == name])
        error = _ratio(np.ones((1, len(sizes))), sums, sizes)[1].item() if len(sizes) > 1 else 0.0
        parts.append(_Seed(float(own.mean()), sums, sizes, error))
    return parts


def _studentised_interval(
    mean: float, error: float, studentised: np.ndarray, level: float, n: int
) -> Interval:
    tail = 0.5 - level / 2
    lower, upper = np.quantile(studentised, [tail, 1 - tail])
    return Interval(mean, float(mean - upper * error), float(mean - lower * error), level, n)


def _upper_p(x: np.ndarray, distance: float) -> float:
    """One-sided p-value of a t test by which x's mean lies `distance` beyond a bound.

    NaN from a single value; without any spread it is 0 or 1.
    """
    from scipy.stats import t

    if len(x) < 2:
        return float("nan")
    error = x.std(ddof=1) / np.sqrt(len(x))
    if error == 0:
        return 0.0 if distance > 0 else 1.0
    return float(t.sf(distance / error, len(x) - 1))


def _by_group(x: np.ndarray, groups: ArrayLike | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the items of each group, or of each item."""
    if groups is None:
        return x, np.ones(len(x))
    labels = np.unique(groups, return_inverse=True)[1]
    if len(labels) != len(x):
        raise AnalysisError(f"statistics: {len(x)} values but {len(labels)} groups")
    return np.bincount(labels, x), np.bincount(labels).astype(float)


def _mean_and_error(x: np.ndarray, groups: ArrayLike | None) -> tuple[float, float, int]:
    """The mean over items, its standard error (NaN from one group), and the number of groups."""
    mean = float(x.mean())
    sums, sizes = _by_group(x - mean, groups)
    n = len(sizes)
    if np.ptp(x) == 0 and n > 1:  # where rounding must not look like spread
        return mean, 0.0, n
    error = _ratio(np.ones((1, n)), sums, sizes)[1].item() if n > 1 else float("nan")
    return mean, error, n


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
