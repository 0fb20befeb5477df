"""Mean and covariance of rows that come in blocks, in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Statistics:
    """Of what is stored at one site, over items and their real positions, in float64.

    `variance` and `covariance` divide by count - 1; the covariance's features are the site's,
    flattened. It is None where the site is too wide, or has too few rows, for it to be kept.
    """

    count: int
    mean: Float[Tensor, "*site"]
    variance: Float[Tensor, "*site"]
    covariance: Float[Tensor, "features features"] | None


class Moments:
    """Running count, mean and sum of squared deviations; whole matrix or its diagonal.

    Blocks are centred on their own mean and merged by the pairwise update of Chan, Golub and
    LeVeque (1983), so that no large sums of squares are subtracted from one another.
    """

    def __init__(self, n_features: int, *, covariance: bool) -> None:
        self.count = 0
        self.mean = torch.zeros(n_features, dtype=torch.float64)
        self._has_covariance = covariance
        shape = (n_features, n_features) if covariance else (n_features,)
        self._deviations = torch.zeros(shape, dtype=torch.float64)

    def update(self, rows: Float[Tensor, "rows features"]) -> None:
        n = len(rows)
        if n == 0:
            return
        rows = rows.double()
        mean = rows.mean(0)
        centred = rows - mean
        gap, weight = mean - self.mean, self.count * n / (self.count + n)
        if self._has_covariance:
            self._deviations.addmm_(centred.T, centred).addr_(gap, gap, alpha=weight)
        else:
            self._deviations += centred.square().sum(0) + weight * gap.square()
        self.count += n
        self.mean += gap * (n / self.count)

    @property
    def covariance(self) -> Float[Tensor, "features features"] | None:
        return self._scaled if self._has_covariance else None

    @property
    def variance(self) -> Float[Tensor, " features"]:
        return self._scaled.diagonal() if self._has_covariance else self._scaled

    @property
    def _scaled(self) -> Tensor:
        return self._deviations / max(1, self.count - 1)
