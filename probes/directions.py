"""The angle between the directions along which two checkpoints hold a latent, with what to expect.

Probes are noisy, so that even one checkpoint's probes, fitted on two halves of the items, differ:
their cosine is the ceiling. The floor are probes of shuffled labels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.randomness import derive_generator
from probes.crossfit import CrossFit, ProbeConfig, fit_probes
from probes.folds import grouped_folds
from probes.jackknife import jackknife_interval

N_SPLITS = 4  # halvings of the items, for the ceiling
N_SHUFFLES = 20  # shuffled labels, for the floor


@dataclass(frozen=True)
class Direction:
    """The cosine of one latent at one layer, before against after; mean over folds.

    `low` and `high` are its 95% interval, a jackknife over folds. `halves` is the cosine between
    before fitted on one half of the items and after fitted on the other, `ceiling` that of each
    checkpoint with itself (the geometric mean of the two), both means over 4 halvings.
    `corrected` = halves / ceiling is about 1 where the direction is the same but for noise
    (Spearman 1904; NaN where the ceiling is not above the floor, that is, where there is nothing to
    be the same). `null_low` and `null_high` are the extremes of the cosines between before's
    direction and 20 probes of shuffled labels after.
    """

    cosine: float
    low: float
    high: float
    halves: float
    ceiling: float
    corrected: float
    null_low: float
    null_high: float


def compare_directions(
    streams: Mapping[str, Float[Tensor, "n d"]],
    fits: Mapping[str, CrossFit],
    labels: Int[Tensor, "n k"],
    n_values: int,
    groups: Int[Tensor, " n"],
    config: ProbeConfig,
) -> list[Direction]:
    """One `Direction` for each of k latents of `n_values` values; keys are "before" and "after".

    `fits` give the cosine and, by the median over folds, the strengths of all other fits.
    """
    own = {source: centred(fit.probes.coef) for source, fit in fits.items()}
    by_fold = cosine(own["before"], own["after"])
    value = by_fold.mean(0)
    low, high = jackknife_interval(by_fold, centre=value)

    strengths = {source: fit.strengths.median(0).values for source, fit in fits.items()}
    splits = range(config.seed, config.seed + N_SPLITS)
    first = torch.stack([grouped_folds(groups, labels, 2, seed) == 0 for seed in splits])
    train = torch.cat([first, ~first])
    coef = {
        source: rearrange(
            fit_directions(x, labels, n_values, train, strengths[source], config.tol),
            "(half split) k a d -> half split k a d",
            half=2,
        )
        for source, x in streams.items()
    }
    same = torch.stack([cosine(halves[0], halves[1]).mean(0) for halves in coef.values()])
    ceiling = same.clamp_min(0).prod(0).sqrt()
    halves = cosine(coef["before"], coef["after"].flip(0)).mean((0, 1))

    generator = derive_generator(config.seed, "shuffled directions")
    shuffled = [labels[torch.randperm(len(labels), generator=generator)] for _ in range(N_SHUFFLES)]
    everything = torch.ones_like(first[:1])
    noise = fit_directions(
        *(streams["after"], torch.cat(shuffled, 1), n_values, everything),
        *(strengths["after"].repeat(N_SHUFFLES), config.tol),
    )
    noise = rearrange(noise, "1 (s k) a d -> s k a d", s=N_SHUFFLES)
    null = cosine(own["before"].mean(0), noise)

    is_something = ceiling > null.amax(0)
    corrected = torch.where(is_something, halves / ceiling, torch.nan)
    columns = (value, low, high, halves, ceiling, corrected, null.amin(0), null.amax(0))
    return [Direction(*row) for row in torch.stack(columns, 1).tolist()]


def fit_directions(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    train: Bool[Tensor, "sets n"],
    strengths: Float[Tensor, " k"],
    tol: float,
) -> Float[Tensor, "sets k a d"]:
    """Coefficients of probes on each training set, in the coordinates of X."""
    each = strengths.expand(len(train), 1, -1)
    probes = fit_probes(X, labels, n_values, train=train, strengths=each, tol=tol)
    return centred(probes.coef[:, 0])


def centred(coef: Float[Tensor, "*k a d"]) -> Float[Tensor, "*k a d"]:
    """A direction common to all values changes no probability: without it."""
    return coef - coef.mean(-2, keepdim=True)


def cosine(a: Float[Tensor, "*k a d"], b: Float[Tensor, "*k a d"]) -> Float[Tensor, "*k"]:
    """Between all values' directions at once, in the coordinates of the stream."""
    return torch.nn.functional.cosine_similarity(a.flatten(-2), b.flatten(-2), dim=-1)
