"""The shape of a cloud of activations: how many dimensions it fills, where it points, how long."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_generator
from probes.jackknife import blocks_of_groups, jackknife_interval
from probes.similarity import in_span, unbiased_hsic

MEASURES = ("effective_rank", "participation_ratio", "intrinsic_dimension", "anisotropy", "norm")
MAX_NEIGHBOURS = 1_000  # items among which nearest neighbours are sought
_SAME = 1e-12  # squared distance, relative to the mean one, below which two items are one


def effective_rank(X: Float[Tensor, "n d"]) -> float:
    """exp of the entropy of the covariance's normalised eigenvalues (Roy and Vetterli 2007).

    Their definition takes singular values, this one variances. Too small where n is not well above
    it; `participation_ratio` is not.
    """
    return _Cloud.of(X).effective_rank()


def participation_ratio(X: Float[Tensor, "n d"]) -> float:
    """(tr C)^2 / tr C^2 of the covariance C, tr C^2 without bias: right also where n < d.

    The plug-in value cannot exceed n - 1; this one takes tr C^2 as unbiased HSIC of X with itself.
    """
    return _Cloud.of(X).participation_ratio()


def intrinsic_dimension(X: Float[Tensor, "n d"], *, discard: float = 0.1) -> float:
    """TwoNN (Facco et al. 2017, arXiv:1803.06992): from the ratios of the distances to the second
    and to the first neighbour, of which the largest share `discard` is left out.

    Items with equal activations count once. NaN where fewer than three remain. Memory grows with
    the square of the number of items.
    """
    X = X.double() - X.double().mean(0)
    norms = X.square().sum(1)
    distance = norms[:, None] + norms - 2 * X @ X.T
    same = distance <= _SAME * distance.mean()
    kept = ~same.tril(-1).any(1)
    distance = distance[kept][:, kept]
    n = len(distance)
    if n < 3:
        return float("nan")
    nearest = distance.fill_diagonal_(torch.inf).topk(2, largest=False).values
    # Half, for these are squared distances.
    log_ratio = 0.5 * (nearest[:, 1] / nearest[:, 0]).log().sort().values
    n_fitted = max(1, min(n - 1, int(n * (1 - discard))))
    log_ratio = log_ratio[:n_fitted]
    # -log(1 - F(mu)) = dimension log(mu) with the empirical F: a line through the origin.
    survival = -torch.log1p(-torch.arange(1, n_fitted + 1).to(X) / n)
    return float(log_ratio @ survival / (log_ratio @ log_ratio))


def anisotropy(X: Float[Tensor, "n d"]) -> float:
    """Mean cosine between different items (Ethayarajh 2019, arXiv:1909.00512), over all pairs."""
    X = torch.nn.functional.normalize(X.double(), dim=1)
    n = len(X)
    return float((X.sum(0).square().sum() - X.square().sum()) / (n * (n - 1)))


def mean_norm(X: Float[Tensor, "n d"]) -> float:
    """Mean Euclidean length of an item's activation."""
    return float(X.double().norm(dim=1).mean())


@dataclass(frozen=True)
class _Cloud:
    """Items in coordinates of their span, with the sums of their products."""

    x: Float[Tensor, "n d"]
    products: Float[Tensor, "d d"]

    @classmethod
    def of(cls, X: Float[Tensor, "n d"]) -> _Cloud:
        x = in_span(X)
        return cls(x, x.T @ x)

    def without(self, rows: Bool[Tensor, " n"]) -> _Cloud:
        return _Cloud(self.x[~rows], self.products - self.x[rows].T @ self.x[rows])

    def scatter(self) -> Float[Tensor, "d d"]:
        mean = self.x.mean(0)
        return self.products - len(self.x) * torch.outer(mean, mean)

    def effective_rank(self) -> float:
        share = torch.linalg.eigvalsh(self.scatter()).clamp_min(0)
        return float(torch.special.entr(share / share.sum()).sum().exp())

    def participation_ratio(self) -> float:
        norms = (self.x - self.x.mean(0)).square().sum(1)
        variance = norms.sum() / (len(norms) - 1)
        return float(variance.square() / unbiased_hsic(self.scatter(), norms, norms))


def geometry(
    streams: Mapping[str, Float[Tensor, "items d"]],
    *,
    groups: Int[Tensor, " items"],
    n_blocks: int = 10,
    seed: int = 0,
) -> dict[tuple[str, str], tuple[float, float, float]]:
    """(stream, measure) -> value, low, high, and ("change", measure) where there are two streams:
    the second less the first.

    Intervals are 95%, by a jackknife over blocks of groups, the same blocks for both streams, so
    that those of the change are paired. Neighbours are sought among 1,000 random items.

    Raises AnalysisError where activations are not finite or lengths differ.
    """
    n = len(groups)
    for name, x in streams.items():
        if x.ndim != 2 or len(x) != n or not x.isfinite().all():
            raise AnalysisError(f"{name}: expected finite activations [{n}, d]")
    blocks = blocks_of_groups(groups, n_blocks=n_blocks, seed=seed)
    order = torch.randperm(n, generator=derive_generator(seed, "intrinsic dimension"))
    sample = torch.zeros(n, dtype=torch.bool).index_fill(0, order[:MAX_NEIGHBOURS], True)
    values, left_out = {}, {}
    for name, x in streams.items():
        cloud, nobody = _Cloud.of(x), torch.zeros(n, dtype=torch.bool)
        out = [nobody, *(blocks == block for block in blocks.unique())]
        values[name], *rest = [_measure(x, cloud, sample, rows) for rows in out]
        left_out[name] = torch.stack(rest)
    if len(streams) == 2:
        first, second = streams
        values["change"] = values[second] - values[first]
        left_out["change"] = left_out[second] - left_out[first]
    result = {}
    for name, value in values.items():
        low, high = jackknife_interval(left_out[name], centre=value)
        for index, measure in enumerate(MEASURES):
            cell = (float(value[index]), float(low[index]), float(high[index]))
            result[name, measure] = cell
    return result


def _measure(
    x: Float[Tensor, "items d"],
    cloud: _Cloud,
    sample: Bool[Tensor, " items"],
    left_out: Bool[Tensor, " items"],
) -> Float[Tensor, " measures"]:
    """The MEASURES of the items that are not left out."""
    rest, some = x[~left_out], x[sample & ~left_out]
    cloud = cloud.without(left_out)
    measured = (
        *(cloud.effective_rank(), cloud.participation_ratio()),
        *(intrinsic_dimension(some), anisotropy(rest), mean_norm(rest)),
    )
    return torch.tensor(measured, dtype=torch.float64)
