"""Intervals by leaving out blocks of groups, for statistics of a whole set of items.

The delete-a-group jackknife (Efron and Tibshirani 1993, chapter 11.5; Busing et al. 1999): it asks
for smooth statistics, such as ranks of a covariance or CKA, and few evaluations of them.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.folds import grouped_folds


def blocks_of_groups(
    groups: Int[Tensor, " items"], *, n_blocks: int = 20, seed: int = 0
) -> Int[Tensor, " items"]:
    """The block of each item: blocks of about equal size, at most one for each group."""
    n = min(n_blocks, len(groups.unique()))
    return grouped_folds(groups, torch.zeros_like(groups), n, seed)


def jackknife_interval(
    left_out: Float[Tensor, "blocks *cells"],
    *,
    centre: Float[Tensor, "*cells"] | None = None,
    level: float = 0.95,
) -> tuple[Float[Tensor, "*cells"], Float[Tensor, "*cells"]]:
    """Student's interval around `centre` (by default the mean) from a statistic without each block.

    Raises AnalysisError where there are fewer than two blocks.
    """
    from scipy.stats import t

    n = len(left_out)
    if n < 2:
        raise AnalysisError(f"jackknife: needs at least two blocks of groups, got {n}")
    mean = left_out.mean(0)
    error = ((n - 1) / n * (left_out - mean).square().sum(0)).sqrt()
    half = float(t.ppf(0.5 + level / 2, n - 1)) * error
    centre = mean if centre is None else centre
    return centre - half, centre + half
