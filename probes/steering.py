"""Directions to steer along: a probe's and the difference of means, as steps of one deviation.

A step is the unit vector along the direction times the standard deviation of the items along it, so
that doses mean the same at every layer and in every network.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.crossfit import ProbeConfig, cross_fit
from probes.directions import fit_directions
from probes.folds import grouped_folds
from probes.jackknife import blocks_of_groups
from probes.probe import encode

KINDS = ("logistic", "mean_difference")
N_BLOCKS = 10  # of items, each left out once: how far the fit of a direction depends on them
_CONSTANT = 1e-9  # of the root mean square of the stream: below, items do not differ


@dataclass(frozen=True)
class SteeringDirection:
    """Towards one value of a latent, away from its others. Made by `fit_steering_directions`.

    `step` is one standard deviation of the items along it; `left_out` are the steps of the same
    direction fitted without each block of items.
    """

    latent: str
    value: int
    kind: str
    step: Float[Tensor, " d"]
    left_out: Float[Tensor, "blocks d"]


def fit_steering_directions(
    X: Float[Tensor, "items d"],
    latents: Mapping[str, Int[Tensor, " items"]],
    *,
    groups: Int[Tensor, " items"],
    config: ProbeConfig,
) -> list[SteeringDirection]:
    """Directions of each kind for the values of each latent; of two values for the greater alone.

    "logistic" is the gradient of the probe's log-odds, its strength chosen by cross-validation as
    `cross_fit` does; "mean_difference" the mean of the items that have the value less that of the
    others (Marks and Tegmark 2023). The first is what tells values apart best, if need be where
    items hardly vary; the second is how items of different values do differ.

    Raises AnalysisError where a latent has one value only, or the items do not differ along a
    direction.
    """
    encoded = {name: encode(name, latent, len(groups)) for name, latent in latents.items()}
    batches: dict[int, list[str]] = {}  # equally many values are fitted together
    for name, (values, _) in encoded.items():
        batches.setdefault(len(values), []).append(name)
    labels = torch.stack([codes for _, codes in encoded.values()], 1)
    folds = grouped_folds(groups, labels, config.n_folds, config.seed, names=list(encoded))
    X = X.double()
    blocks = blocks_of_groups(groups, n_blocks=N_BLOCKS, seed=config.seed)
    everything = torch.ones_like(blocks, dtype=torch.bool)
    train = torch.stack([everything, *(blocks != block for block in blocks.unique())])
    found = []
    for n_values, names in batches.items():
        codes = torch.stack([encoded[name][1] for name in names], 1)
        fit = cross_fit(X, codes, n_values, folds, config)
        strengths = fit.strengths.median(0).values
        coef = fit_directions(X, codes, n_values, train, strengths, config.tol)
        indices = range(1, 2) if n_values == 2 else range(n_values)
        for (column, name), index in product(enumerate(names), indices):
            value = encoded[name][0][index]
            means = _difference_of_means(X, codes[:, column] == index, train)
            for kind, direction in zip(KINDS, (coef[:, column, index], means), strict=True):
                steps = one_deviation(direction, X, name=f"latent {name!r} ({kind})")
                found.append(SteeringDirection(name, value, kind, steps[0], steps[1:]))
    return found


def one_deviation(
    directions: Float[Tensor, "n d"], X: Float[Tensor, "items d"], *, name: str
) -> Float[Tensor, "n d"]:
    """Each direction at the length of one standard deviation of the items along it.

    Raises AnalysisError where they have none.
    """
    unit = torch.nn.functional.normalize(directions.double(), dim=1)
    deviation = (X.double() @ unit.T).std(0)
    if bool((deviation <= _CONSTANT * X.double().square().mean().sqrt()).any()):
        raise AnalysisError(
            f"{name}: the items do not differ along its direction, so there is no unit to steer "
            "by; use more items, or a layer at which the latent is readable"
        )
    return unit * deviation[:, None]


def random_directions(
    X: Float[Tensor, "items d"], n: int, *, generator: torch.Generator
) -> Float[Tensor, "n d"]:
    """Unit vectors along draws from a normal distribution with the covariance of the items."""
    X = X.double()
    drawn = torch.randn(n, len(X), generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize(drawn.to(X.device) @ (X - X.mean(0)), dim=1)


def _difference_of_means(
    X: Float[Tensor, "items d"], has: Bool[Tensor, " items"], train: Bool[Tensor, "sets items"]
) -> Float[Tensor, "sets d"]:
    inside, outside = (train & has).double(), (train & ~has).double()
    return inside @ X / inside.sum(1, keepdim=True) - outside @ X / outside.sum(1, keepdim=True)
