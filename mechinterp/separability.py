"""Are two functions of a network separable by pruning? Areas between curves, and an index of them.

Components are pruned in the order of their importance for a *target*, by increasing share s, and
*outcomes* y are measured: the value of the decision, and the information about the latents. With
v_ty(s) the mean over items of an outcome's value, scaled so that 0 is nothing (chance),

    lost            d_ty(s) = 1 - v_ty(s) / v_y(0)
    area            A_ty = the mean of d_ty over log s, from the smallest share to all (trapezoids)
    excess area     e_ty = (A_ty - A_ry) / (1 - A_ry),   r: random components of equal numbers

so that e is 0 where the target's components matter to the outcome no more than random ones, and 1
where the first of them are all that it needs (corrected for chance as Cohen's kappa is). For one
target, with its own outcome and the other one,

    separability    S = (own - other) / max(own, other),   own, other = max(e, 0)

is 0 where pruning costs both alike, 1 where it costs what was not aimed at no more than random
pruning does, and negative where it costs the other more (-1: the other alone). The index of the
network takes both targets together,

    own = max(e_DD, 0) + max(e_LL, 0),   other = max(e_DL, 0) + max(e_LD, 0)

with D the decision and L the latents: 0 to 1, or -1 to 0 where each is hurt more by what the other
needs. Outcomes of unlike fragility cancel in it, as their main effects do in an interaction. It is
undefined (NaN) where max(own, other) is below `MIN_EXCESS` per target, or an outcome was next to
nothing before anything was pruned (`MIN_BASE`) or is after random components are (1 - A_ry below
`MIN_LEFT`: choose smaller shares).

Intervals are percentiles of a bootstrap over groups of items, which draws the random components
anew as well. They speak of this network and these probes as fitted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng

DECISION, LATENTS = "decision", "latents"
INDICES = ("both", DECISION, LATENTS)
MIN_BASE = 0.05  # of the decision's scale (oracle - constant), or bits
MIN_EXCESS = 0.02
MIN_LEFT = 0.02  # by random components, of what there was


@dataclass(frozen=True, eq=False)
class PruningValues:
    """Per item, what is left of every outcome; `base` with nothing pruned. 0 is chance.

    `targeted` has a row per target in `targets`, `random` one per draw of random components.
    """

    targets: tuple[str, ...]
    outcomes: tuple[str, ...]
    shares: tuple[float, ...]
    base: Float[np.ndarray, "outcomes items"]
    targeted: Float[np.ndarray, "targets shares outcomes items"]
    random: Float[np.ndarray, "draws shares outcomes items"]

    def __post_init__(self) -> None:
        if len(self.shares) < 2 or not self.shares[0] > 0 or np.any(np.diff(self.shares) <= 0):
            raise AnalysisError(
                f"shares: expected at least two rising shares above 0, got {list(self.shares)}"
            )


@dataclass(frozen=True, eq=False)
class Areas:
    """Areas per resample; the first is the sample itself."""

    targets: tuple[str, ...]
    outcomes: tuple[str, ...]
    targeted: Float[np.ndarray, "resamples targets outcomes"]
    random: Float[np.ndarray, "resamples outcomes"]

    @property
    def excess(self) -> Float[np.ndarray, "resamples targets outcomes"]:
        """What aiming costs beyond chance, of what it could; NaN where chance leaves next to
        nothing, or (by probes that do worse than a constant) less than that."""
        random = self.random[:, None]
        left = np.where(1 - random >= MIN_LEFT, 1 - random, np.nan)
        return (self.targeted - random) / left

    def index(self) -> dict[str, Float[np.ndarray, " resamples"]]:
        """The network's index ("both") and that of either target: does pruning the components of
        the decision spare the latents, and the reverse?"""
        excess = np.maximum(self.excess, 0)
        at = {
            (target, outcome): excess[:, self.targets.index(target), self.outcomes.index(outcome)]
            for target in (DECISION, LATENTS)
            for outcome in (DECISION, LATENTS)
        }
        own = {target: at[target, target] for target in (DECISION, LATENTS)}
        other = {DECISION: at[DECISION, LATENTS], LATENTS: at[LATENTS, DECISION]}
        sums = (own[DECISION] + own[LATENTS], other[DECISION] + other[LATENTS])
        return {
            "both": separability(*sums, least=2 * MIN_EXCESS),
            **{target: separability(own[target], other[target]) for target in own},
        }


def separability(
    own: Float[np.ndarray, "..."], other: Float[np.ndarray, "..."], *, least: float = MIN_EXCESS
) -> Float[np.ndarray, "..."]:
    """S of the module's docstring, -1 to 1; NaN where both are below `least`."""
    own, other = np.maximum(own, 0), np.maximum(other, 0)
    larger = np.maximum(own, other)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(larger >= least, (own - other) / larger, np.nan)


def area(lost: Float[np.ndarray, "... shares"], shares: tuple[float, ...]) -> np.ndarray:
    """Mean of `lost` over the logarithm of the share, by the trapezoidal rule."""
    x = np.log(shares)
    return np.trapezoid(lost, x, axis=-1) / (x[-1] - x[0])


def measure_areas(
    values: PruningValues,
    groups: Int[np.ndarray, " items"],
    *,
    n_resamples: int = 2_000,
    seed: int = 0,
) -> Areas:
    """Areas of every target and outcome, of the sample and of resamples of groups and draws.

    The same `seed`, groups and number of draws give the same resamples, so that two networks'
    areas can be subtracted: their difference is then paired.
    """
    runs = np.concatenate([values.targeted, values.random])
    n_targets, n_draws = len(values.targeted), len(values.random)
    cells = np.concatenate([runs.reshape(-1, runs.shape[-1]), values.base])
    codes = np.unique(groups, return_inverse=True)[1]
    n_groups = codes.max() + 1
    one_hot = np.zeros((len(codes), n_groups))
    one_hot[np.arange(len(codes)), codes] = 1
    rng = derive_rng(seed, "separability")
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), n_resamples)
    counts = np.concatenate([np.ones((1, n_groups)), counts])
    means = counts @ (cells @ one_hot).T / (counts @ one_hot.sum(0))[:, None]
    left = means[:, : -len(values.base)].reshape(len(means), *runs.shape[:-1])
    base = means[:, None, None, -len(values.base) :]
    base = np.where(base[:1] >= MIN_BASE, base, np.nan)
    areas = area(np.moveaxis(1 - left / base, 2, 3), values.shares)
    drawn = rng.integers(0, n_draws, (n_resamples, n_draws))
    drawn = np.concatenate([np.arange(n_draws)[None], drawn])
    random = np.take_along_axis(areas[:, n_targets:], drawn[..., None], 1).mean(1)
    return Areas(values.targets, values.outcomes, areas[:, :n_targets], random)


def summarise(
    resamples: Float[np.ndarray, "resamples ..."], *, level: float = 0.95
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sample's value and its percentile interval, with NaN bounds where it is undefined, or
    in a tenth of the resamples."""
    tail = 0.5 - level / 2
    undefined = np.isnan(resamples[0]) | (np.isnan(resamples).mean(0) > 0.1)
    kept = np.where(undefined, 0.0, resamples)
    low, high = np.nanquantile(kept, [tail, 1 - tail], axis=0)
    return resamples[0], np.where(undefined, np.nan, low), np.where(undefined, np.nan, high)


def changes(
    before: Mapping[str, Float[np.ndarray, " resamples"]],
    after: Mapping[str, Float[np.ndarray, " resamples"]],
) -> dict[str, Float[np.ndarray, " resamples"]]:
    """How far each index moved, per resample."""
    return {name: after[name] - before[name] for name in INDICES}
