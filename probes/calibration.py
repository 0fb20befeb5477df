"""Calibration error: how far predicted probabilities are from the frequencies that come true.

In bins of the prediction, the mean of |observed - predicted| is above 0 by chance alone, the more
so the fewer items a bin has. Every bin's sampling noise is therefore estimated and taken off: from
the absolute error its expectation under calibrated resampling (Roelofs et al. 2022,
arXiv:2012.08668, discuss this bias), from the squared error its variance (the debiased estimator of
Kumar et al. 2019, arXiv:1909.10155, section 5, with the noise of observed - predicted in place
of that of observed, so that bins need not be narrow).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

ABSOLUTE_NORMAL = (2 / torch.pi) ** 0.5  # mean of |x| for a standard normal x


@dataclass(frozen=True)
class Reliability:
    """A reliability diagram: means by bin, of the bins that have items.

    `noise` is the standard error of observed - predicted; `error` is plugged in, biased upwards.
    `bin_of_item` indexes these bins, `residual` is observed - predicted less its bin's mean.
    """

    bins: Int[Tensor, " bins"]
    mass: Float[Tensor, " bins"]
    predicted: Float[Tensor, " bins"]
    observed: Float[Tensor, " bins"]
    noise: Float[Tensor, " bins"]
    n_items: Int[Tensor, " bins"]
    bin_of_item: Int[Tensor, " items"]
    share: Float[Tensor, " items"]
    residual: Float[Tensor, " items"]

    @property
    def gap(self) -> Float[Tensor, " bins"]:
        return self.observed - self.predicted

    @property
    def diagram(self) -> dict[str, Tensor]:
        """The columns of a table with a row per bin."""
        return {
            "bin": self.bins,
            "predicted": self.predicted,
            "observed": self.observed,
            "n_items": self.n_items,
        }

    @property
    def error(self) -> float:
        """The expected calibration error as most papers have it: mean of |gap|."""
        return float(self.mass @ self.gap.abs())

    @property
    def error_by_chance(self) -> float:
        """The mean of `error` over resampled outcomes of a calibrated prediction."""
        return float(self.mass @ self.noise) * ABSOLUTE_NORMAL

    @property
    def debiased_error(self) -> float:
        """`error` less what it has by chance: 0 on average under calibration, so at times below."""
        return self.error - self.error_by_chance

    @property
    def debiased_squared_error(self) -> float:
        """An unbiased estimate of the mean squared gap; may be below 0."""
        return float(self.mass @ (self.gap.square() - self.noise.square()))

    @property
    def influence(self) -> Float[Tensor, " items"]:
        """Of each item on `error`, to first order."""
        within = self.share * self.mass[self.bin_of_item]
        return self.gap.sign()[self.bin_of_item] * self.residual * within


def reliability(
    predicted: Float[Tensor, " items"],
    observed: Float[Tensor, " items"],
    bins: Int[Tensor, " items"],
    *,
    weights: Float[Tensor, " items"] | None = None,
    groups: Int[Tensor, " items"] | None = None,
) -> Reliability:
    """The reliability diagram of predictions in [0, 1] of what is `observed`, by bin.

    Items count with their `weights`. Items of one group are not independent: noise is that of group
    totals. A bin with a single group has its squared gap as noise, so that its debiased error is 0.
    """
    predicted, observed = predicted.double(), observed.double()
    found, bin_of_item, n_items = bins.unique(return_inverse=True, return_counts=True)
    weights = torch.ones_like(predicted) if weights is None else weights.double()
    if groups is None:
        n_groups, group = len(bins), torch.arange(len(bins), device=bins.device)
    else:
        found_groups, group = groups.to(bins.device).unique(return_inverse=True)
        n_groups = len(found_groups)

    def total(values: Tensor) -> Tensor:
        return values.new_zeros(len(found)).index_add(0, bin_of_item, values)

    mass = total(weights)
    share = weights / mass[bin_of_item]
    gap = total(share * (observed - predicted))
    residual = observed - predicted - gap[bin_of_item]
    cells, cell_of_item = (bin_of_item * n_groups + group).unique(return_inverse=True)
    sums = residual.new_zeros(len(cells)).index_add(0, cell_of_item, share * residual)
    bin_of_cell = cells // n_groups
    n_here = torch.bincount(bin_of_cell, minlength=len(found)).double()
    variance = gap.new_zeros(len(found)).index_add(0, bin_of_cell, sums.square())
    variance = torch.where(n_here > 1, variance * n_here / (n_here - 1), gap.square())
    return Reliability(
        bins=found,
        mass=mass / mass.sum(),
        predicted=total(share * predicted),
        observed=total(share * observed),
        noise=variance.sqrt(),
        n_items=n_items,
        bin_of_item=bin_of_item,
        share=share,
        residual=residual,
    )


def equal_width_bins(predicted: Float[Tensor, " items"], n_bins: int) -> Int[Tensor, " items"]:
    """The bin 0..n_bins-1 of each prediction, all bins equally wide.

    A lower edge belongs to its bin, and so does what single precision makes of it: 0.7 is kept as
    0.69999999.
    """
    return (predicted.double() * n_bins + 1e-6).long().clamp(0, n_bins - 1)


def equal_mass_bins(predicted: Float[Tensor, " items"], n_bins: int) -> Int[Tensor, " items"]:
    """The bin 0..n_bins-1 of each prediction, about equally many items in each; ties stay together.

    Of the usual choices this is the one with the least bias (Roelofs et al. 2022).
    """
    ordered = predicted.sort().values
    starts = torch.arange(1, n_bins, device=predicted.device) * len(predicted) // n_bins
    return torch.searchsorted(ordered[starts].contiguous(), predicted.contiguous(), right=True)
