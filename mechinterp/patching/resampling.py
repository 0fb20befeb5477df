"""Bootstraps and sign flips of many cells at once: the arithmetic behind `inference`.

Resamples are rows of counts, how often each unit was drawn, and flips are rows of signs; both are
multiplied into a matrix [units cells]. Rows and cells are taken in blocks, so that memory is
bounded, and the random draws are those that `mechinterp.statistics` makes for a single cell.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng
from mechinterp.statistics import MAX_EXACT, NO_SPREAD

INTERVALS = ("bootstrap_t", "bca", "student")
_ROWS = 512  # resamples or sign flips in one matrix product
_TIE = 1e-9  # relative; equal sums are rounded in different orders
_MANY = 16  # units; a cell that rests on a third of them, or of its own if fewer, can be resampled


@dataclass(frozen=True)
class Units:
    """A map's items summed by group. Where no item is absent, `sizes` has one column for all."""

    sums: Float[np.ndarray, "units cells"]
    sizes: Float[np.ndarray, "units columns"]  # items present in the unit
    mean: Float[np.ndarray, " cells"]

    @classmethod
    def of(cls, effects: Tensor, groups: Any) -> Units:
        if effects.ndim < 1 or not len(effects):
            raise AnalysisError(f"effects: expected [items, ...], got {tuple(effects.shape)}")
        x = effects.detach().double().cpu()
        x = x.flatten(1) if x.ndim > 1 else x[:, None]
        if bool(x.isinf().any()):
            raise AnalysisError("effects: some are infinite; only NaN (item absent) is understood")
        present = (~x.isnan()).double()
        complete = bool(present.all())
        sizes = present[:, :1] if complete else present
        sums = x if complete else x.nan_to_num(0.0)
        if groups is not None:
            labels = groups.cpu().numpy() if isinstance(groups, Tensor) else np.asarray(groups)
            if labels.shape != (len(x),):
                raise AnalysisError(f"groups: {len(x)} items but groups {labels.shape}")
            names, codes = np.unique(labels, return_inverse=True)
            index = torch.from_numpy(codes)

            def by_group(values: Tensor) -> Tensor:
                return values.new_zeros(len(names), values.shape[1]).index_add(0, index, values)

            sums, sizes = by_group(sums), by_group(sizes)
        total = sizes.sum(0)
        mean = torch.where(total > 0, sums.sum(0) / total, torch.nan)
        return cls(sums.numpy(), sizes.numpy(), mean.numpy())

    @property
    def n(self) -> int:
        return len(self.sums)

    @property
    def present(self) -> np.ndarray:
        """Which units have an item in which cell [units, columns]."""
        return self.sizes > 0

    @property
    def varied(self) -> np.ndarray:
        """Cells where not every effect is zero, or absent."""
        return (self.sums != 0).any(0)

    @property
    def effective(self) -> np.ndarray:
        """How many units a cell's effects rest on, (sum |x|)^2 / sum x^2: n if all are equal."""
        squares = (self.sums**2).sum(0)
        with np.errstate(invalid="ignore", divide="ignore"):
            return np.where(squares > 0, np.abs(self.sums).sum(0) ** 2 / squares, 0.0)

    def cells(self, chunk: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The deviations from the mean and the sizes of some cells."""
        sizes = self.sizes if self.sizes.shape[1] == 1 else self.sizes[:, chunk]
        return self.sums[:, chunk] - np.nan_to_num(self.mean[chunk]) * sizes, sizes


def intervals(
    units: Units, interval: str, level: float, n_resamples: int, seed: int, memory_mb: int
) -> tuple[np.ndarray, np.ndarray]:
    if interval not in INTERVALS:
        raise AnalysisError(f"interval: expected one of {', '.join(INTERVALS)}, got {interval!r}")
    if not 0 < level < 1:
        raise AnalysisError(f"level: expected a number between 0 and 1, got {level}")
    bounds = {"bootstrap_t": _bootstrap_t, "bca": _bca, "student": _student}[interval]
    n_cells = units.sums.shape[1]
    size = _cells_per_chunk(2 * n_resamples + 8 * _ROWS + 8 * units.n, memory_mb)
    low, high = np.empty(n_cells), np.empty(n_cells)
    for start in range(0, n_cells, size):
        chunk = slice(start, start + size)
        deviations, sizes = units.cells(chunk)
        below, above = bounds(deviations, sizes, level, n_resamples, seed)
        low[chunk], high[chunk] = units.mean[chunk] + below, units.mean[chunk] + above
    # Most units of a counterfactual map can be next to untouched by a patch. Resamples of a few
    # effects among zeros have an error near 0 again and again, and studentising by it explodes.
    n_present = units.present.sum(0)
    sparse = units.effective < np.minimum(n_present, _MANY) / 3
    if interval == "bootstrap_t" and sparse.any():
        below, above = _student(*units.cells(sparse), level)
        low[sparse], high[sparse] = units.mean[sparse] + below, units.mean[sparse] + above
    few = np.broadcast_to(n_present < 2, n_cells)
    low[few] = high[few] = np.nan
    return low, high


def _bootstrap_t(
    sums: np.ndarray, sizes: np.ndarray, level: float, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of the mean less its estimate; `sums` are deviations from it."""
    observed = _mean_and_error(np.ones((1, len(sums))), sums, sizes)[1][0]
    studentised = np.empty((n_resamples, sums.shape[1]))
    for rows, counts in _resamples(len(sums), n_resamples, seed):
        deviation, error = _mean_and_error(counts, sums, sizes)
        with np.errstate(invalid="ignore"):
            flat = error <= NO_SPREAD * observed
            studentised[rows] = deviation / np.where(flat, np.inf, error)
    tail = 0.5 - level / 2
    lower, upper = _quantiles(studentised, [tail, 1 - tail])
    return -upper * observed, -lower * observed


def _bca(
    sums: np.ndarray, sizes: np.ndarray, level: float, n_resamples: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """As `_bootstrap_t`; the acceleration is the jackknife's, leaving out one unit at a time."""
    from scipy.special import ndtr, ndtri

    deviations = np.empty((n_resamples, sums.shape[1]))
    for rows, counts in _resamples(len(sums), n_resamples, seed):
        with np.errstate(invalid="ignore", divide="ignore"):
            deviations[rows] = counts @ sums / (counts @ sizes)
    valid = ~np.isnan(deviations)
    n_valid = np.maximum(valid.sum(0), 1)
    tie = _TIE * np.abs(sums).sum(0) / np.maximum(sizes.sum(0), 1)
    below = ((deviations < -tie).sum(0) + (valid & (deviations <= tie)).sum(0)) / 2 / n_valid
    bias = ndtri(below)
    left = sizes.sum(0) - sizes
    counted = (sizes > 0) & (left > 0)
    with np.errstate(invalid="ignore", divide="ignore"):
        without = np.where(counted, (sums.sum(0) - sums) / left, 0.0)
        centre = without.sum(0) / counted.sum(0)
        influence = np.where(counted, centre - without, 0.0)
        cubes, squares = (influence**3).sum(0), (influence**2).sum(0)
        acceleration = np.where(squares > 0, cubes / 6 / squares**1.5, 0.0)
        z = ndtri(0.5 + np.array([[-level], [level]]) / 2)
        levels = ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
    deviations.sort(axis=0)  # NaN last
    place = np.nan_to_num(levels) * (n_valid - 1)
    floor = place.astype(int)
    lower = np.take_along_axis(deviations, floor, axis=0)
    upper = np.take_along_axis(deviations, np.minimum(floor + 1, n_valid - 1), axis=0)
    bounds = lower + (place - floor) * (upper - lower)
    bounds[:, squares == 0] = 0.0  # no spread: what a bootstrap of equal values gives
    return bounds[0], bounds[1]


def _student(
    sums: np.ndarray, sizes: np.ndarray, level: float, *_: int
) -> tuple[np.ndarray, np.ndarray]:
    from scipy.stats import t

    error = _mean_and_error(np.ones((1, len(sums))), sums, sizes)[1][0]
    half = t.ppf(0.5 + level / 2, np.maximum((sizes > 0).sum(0) - 1, 1)) * error
    return -half, half


def _mean_and_error(
    counts: np.ndarray, sums: np.ndarray, sizes: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Mean over items and its linearised standard error, per row of unit counts and cell: what
    `mechinterp.statistics` computes for one cell. NaN where fewer than two units are drawn."""
    with np.errstate(invalid="ignore", divide="ignore"):
        n = counts @ (sizes > 0)
        total = counts @ sizes
        mean = counts @ sums / total
        # sum of counts (sums - mean sizes)^2, multiplied out to stay in matrix products
        squares = counts @ sums**2
        squares -= 2 * mean * (counts @ (sums * sizes))
        squares += mean**2 * (counts @ sizes**2)
        return mean, np.sqrt(np.maximum(squares, 0) * n / (n - 1)) / total


def _quantiles(values: np.ndarray, levels: Sequence[float]) -> np.ndarray:
    """By column; NaN (resamples that say nothing of a cell with absent items) do not count."""
    incomplete = np.isnan(values).any(0)
    result = np.quantile(values, levels, axis=0)
    if incomplete.any():
        kept = ~np.isnan(values).all(0) & incomplete
        result[:, kept] = np.nanquantile(values[:, kept], levels, axis=0)
    return result


def _resamples(n: int, n_resamples: int, seed: int) -> Iterator[tuple[slice, np.ndarray]]:
    """How often each resample drew each of n units [rows, n], some rows at a time.

    The draws are those of `mechinterp.statistics.bootstrap_t_interval`, and are made anew rather
    than kept for every chunk of cells.
    """
    rng = derive_rng(seed, "bootstrap")
    for start in range(0, n_resamples, _ROWS):
        size = min(_ROWS, n_resamples - start)
        drawn = rng.integers(0, n, (size, n)) + n * np.arange(size)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=size * n).reshape(size, n)
        yield slice(start, start + size), counts.astype(float)


def sign_flips(
    units: Units, n_flips: int, seed: int, memory_mb: int
) -> tuple[np.ndarray, np.ndarray]:
    """p-values per cell and step-down maxT p-values, from the same flips."""
    tested = np.flatnonzero(units.varied)
    x = units.sums[:, tested]
    x = x / np.sqrt((x**2).sum(0))
    observed = np.abs(x.sum(0))
    order = np.argsort(observed, kind="stable")
    tested, x = tested[order], np.ascontiguousarray(x[:, order])
    threshold = observed[order] - _TIE * np.abs(x).sum(0)
    exact = units.n <= MAX_EXACT
    # With random flips the observed signs count as one of them.
    hits, hits_of_map = np.full((2, len(tested)), 0 if exact else 1)
    n_done = 0 if exact else 1
    size = _cells_per_chunk(4 * _ROWS, memory_mb)
    for signs in _all_signs(units.n) if exact else _random_signs(units.n, n_flips, seed):
        largest = np.zeros(len(signs))
        for start in range(0, len(tested), size):
            chunk = slice(start, start + size)
            flipped = signs @ x[:, chunk]
            np.abs(flipped, out=flipped)
            hits[chunk] += np.count_nonzero(flipped >= threshold[chunk], axis=0)
            # Step-down: a cell competes with the cells that are no stronger than it.
            np.maximum(flipped[:, 0], largest, out=flipped[:, 0])
            np.maximum.accumulate(flipped, axis=1, out=flipped)
            largest = flipped[:, -1].copy()
            hits_of_map[chunk] += np.count_nonzero(flipped >= threshold[chunk], axis=0)
        n_done += len(signs)
    absent = np.broadcast_to(~units.present.any(0), units.mean.shape)
    p = np.where(absent, np.nan, 1.0)
    familywise = p.copy()
    p[tested] = hits / n_done
    # No cell may be called before a stronger one.
    familywise[tested] = np.maximum.accumulate(hits_of_map[::-1])[::-1] / n_done
    return p, familywise


def _all_signs(n: int) -> Iterator[np.ndarray]:
    """All sign vectors of n units up to a common sign, which two-sided tests do not see."""
    for start in range(0, 2 ** (n - 1), _ROWS):
        numbers = np.arange(start, min(start + _ROWS, 2 ** (n - 1)))
        yield 1.0 - 2 * (numbers[:, None] >> np.arange(n) & 1)


def _random_signs(n: int, n_flips: int, seed: int) -> Iterator[np.ndarray]:
    """The draws of `mechinterp.statistics.sign_flip_test`, which has 1,000 to a block."""
    rng = derive_rng(seed, "sign flips")
    for start in range(0, n_flips, 1_000):
        yield 1.0 - 2 * rng.integers(0, 2, (min(1_000, n_flips - start), n))


def _cells_per_chunk(numbers_per_cell: int, memory_mb: int) -> int:
    return max(1, memory_mb * 2**20 // (8 * numbers_per_cell))
