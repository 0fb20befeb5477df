"""Inference over a whole patching map: intervals, p-values and error control for all cells at once.

All cells share their resamples and their sign flips, so that cells, and maps of the same items, can
be compared, and so that the largest statistic over the map has a distribution for free. A cell's
numbers are those that `mechinterp.statistics` gives for its items alone. The unit is the item or,
where `groups` are given, the group; it speaks of these networks, not of the training that made
them, which takes seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from numpy.typing import ArrayLike
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.patching.resampling import Units, intervals, sign_flips
from mechinterp.statistics import MAX_EXACT

FALSE_DISCOVERY = ("bh", "by")


@dataclass(frozen=True)
class MapInference:
    """What a map of per-item effects says about the mean effect in each cell. Made by `infer_map`.

    `p` is two-sided, of the hypothesis that effects are symmetric about zero; `q` is `p` adjusted
    to control the share of false discoveries in the map, `p_familywise` to control the chance of
    any. `smallest_p` is the least that `p` can be with so many units: where it is not far below
    the level divided by the number of cells, more items are needed before the map can say much.
    Cells without items are NaN; cells whose effect is zero for every item have p = 1 and do not
    count as tests.
    """

    mean: Float[Tensor, " *cells"]
    low: Float[Tensor, " *cells"]
    high: Float[Tensor, " *cells"]
    p: Float[Tensor, " *cells"]
    q: Float[Tensor, " *cells"]
    p_familywise: Float[Tensor, " *cells"]
    smallest_p: Float[Tensor, " *cells"]
    n: Int[Tensor, " *cells"]  # units (items, or groups of items) present
    level: float
    interval: str
    false_discovery: str

    def to_table(
        self, axes: Sequence[str], labels: Mapping[str, Sequence[Any]] | None = None
    ) -> pd.DataFrame:
        """One row per cell: a column for each of `axes` (a name per dimension of the map, with its
        index or `labels[name]`), then mean, low, high, p, q, p_familywise, n.

        Raises:
            AnalysisError: the names or labels do not fit the map.
        """
        shape = self.mean.shape
        if len(axes) != len(shape) or len(set(axes)) < len(axes):
            raise AnalysisError(f"axes: expected {len(shape)} different names, got {list(axes)}")
        columns: dict[str, Any] = {}
        for name, size, index in zip(axes, shape, np.indices(tuple(shape)), strict=True):
            values = np.arange(size) if labels is None or name not in labels else labels[name]
            if len(values) != size:
                raise AnalysisError(f"labels: {name} has {size} entries, got {len(values)} labels")
            columns[name] = np.asarray(values)[index.ravel()]
        for name in ("mean", "low", "high", "p", "q", "p_familywise", "n"):
            columns[name] = getattr(self, name).flatten().numpy()
        return pd.DataFrame(columns)


def infer_map(
    effects: Float[Tensor, " items *cells"],
    *,
    groups: Shaped[ArrayLike, " items"] | None = None,
    level: float = 0.95,
    interval: str = "bootstrap_t",
    false_discovery: str = "bh",
    n_resamples: int = 4_000,
    n_flips: int = 100_000,
    seed: int = 0,
    memory_mb: int = 256,
) -> MapInference:
    """Intervals, p-values and error control for the mean over items in every cell of a map.

    Args:
        effects: one number per item and cell; NaN where the item is absent from the cell.
        groups: items of one group (the same image) are resampled and flipped together.
        interval: see `mean_intervals`.
        false_discovery: see `adjust_false_discovery`.
        n_resamples: of the bootstrap, the same for all cells.
        n_flips: random sign vectors, where there are more than 16 units.
        seed: names the random streams; they are those of `mechinterp.statistics`.
        memory_mb: bound on the working memory, beyond a few copies of `effects` in float64.

    Raises:
        AnalysisError: effects are infinite or of no item, or an option is unknown.
    """
    units = Units.of(effects, groups)
    shape = effects.shape[1:]
    low, high = intervals(units, interval, level, n_resamples, seed, memory_mb)
    p, p_familywise = sign_flips(units, n_flips, seed, memory_mb)
    q = np.where(np.isnan(p), np.nan, 1.0)
    tested = units.varied
    q[tested] = adjust_false_discovery(p[tested], method=false_discovery)
    n = units.present.sum(0)
    floor = 2.0 ** (1 - np.maximum(n, 1))
    if units.n > MAX_EXACT:
        floor = np.maximum(floor, 1 / (n_flips + 1))
    floor = np.where(n > 0, floor, np.nan)

    def tensor(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.broadcast_to(values, units.mean.shape).copy()).reshape(shape)

    return MapInference(
        mean=tensor(units.mean),
        low=tensor(low),
        high=tensor(high),
        p=tensor(p),
        q=tensor(q),
        p_familywise=tensor(p_familywise),
        smallest_p=tensor(floor),
        n=tensor(n.astype(np.int64)),
        level=level,
        interval=interval,
        false_discovery=false_discovery,
    )


def compare_maps(
    before: Float[Tensor, " items *cells"], after: Float[Tensor, " items *cells"], **options: Any
) -> MapInference:
    """Inference on after - before, item by item: two maps of the same items, such as of two
    checkpoints. Items absent from either are absent. Options as of `infer_map`.

    Raises:
        AnalysisError: the maps' shapes differ, or as `infer_map` does.
    """
    if before.shape != after.shape:
        raise AnalysisError(
            f"compare_maps: expected maps of the same items and cells, got shapes "
            f"{tuple(before.shape)} and {tuple(after.shape)}"
        )
    return infer_map(after.double() - before.double().to(after.device), **options)


def mean_intervals(
    effects: Float[Tensor, " items *cells"],
    *,
    groups: Shaped[ArrayLike, " items"] | None = None,
    level: float = 0.95,
    interval: str = "bootstrap_t",
    n_resamples: int = 4_000,
    seed: int = 0,
    memory_mb: int = 256,
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """(low, high) of the mean over items in every cell; NaN where fewer than two units are present.

    Args:
        interval: "bootstrap_t" and "bca" (Efron and Tibshirani 1993, chapters 12.5 and 14.3) are
            second-order correct, where the percentile bootstrap is not; "student" is the t interval
            with the linearised standard error of a mean of groups, enough for thousands of units.
            It also stands in for bootstrap-t where a cell rests on few units, (sum |x|)^2 / sum x^2
            below a third of 16 or of those present: their studentised resamples explode.
    """
    units = Units.of(effects, groups)
    bounds = intervals(units, interval, level, n_resamples, seed, memory_mb)
    low, high = (torch.from_numpy(bound).reshape(effects.shape[1:]) for bound in bounds)
    return low, high


def sign_flip_p_values(
    effects: Float[Tensor, " items *cells"],
    *,
    groups: Shaped[ArrayLike, " items"] | None = None,
    n_flips: int = 100_000,
    seed: int = 0,
    memory_mb: int = 256,
) -> tuple[Float[Tensor, " *cells"], Float[Tensor, " *cells"]]:
    """Two-sided p-values per cell, and the same adjusted for the whole map (family-wise).

    Per cell: "symmetric about zero", from the means under sign flips, all of them up to 16 units,
    else `n_flips` random ones and the observed signs among them (Phipson and Smyth 2010). For the
    map: free step-down maxT (Westfall and Young 1993; Ge, Dudoit and Speed 2003) with the
    statistic |sum| / sqrt(sum of squares), whose null variance is 1 in every cell and whose order
    under flips is that of |t|. Any dependence between cells is taken into account.
    """
    p, familywise = sign_flips(Units.of(effects, groups), n_flips, seed, memory_mb)
    shape = effects.shape[1:]
    return torch.from_numpy(p).reshape(shape), torch.from_numpy(familywise).reshape(shape)


def adjust_false_discovery(
    p_values: Float[ArrayLike, " *cells"], *, method: str = "bh"
) -> Float[np.ndarray, " *cells"]:
    """q-values over the whole map: rejecting q <= a keeps the expected share of false ones at a.

    NaN stay NaN and do not count as tests.

    Args:
        method: "bh" (Benjamini and Hochberg 1995) for independent or positively dependent cells,
            which neighbouring sites mostly are; "by" (Benjamini and Yekutieli 2001) for any
            dependence, at the price of a factor of about log(number of cells).

    Raises:
        AnalysisError: another method, or p-values outside 0 to 1.
    """
    from scipy.stats import false_discovery_control

    if method not in FALSE_DISCOVERY:
        raise AnalysisError(
            f"false_discovery: expected one of {', '.join(FALSE_DISCOVERY)}, got {method!r}"
        )
    p = np.array(p_values, dtype=float)
    tested = ~np.isnan(p)
    if ((p[tested] < 0) | (p[tested] > 1)).any():
        raise AnalysisError("p-values: expected numbers from 0 to 1")
    if tested.any():
        p[tested] = false_discovery_control(p[tested], method=method)
    return p
