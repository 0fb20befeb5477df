"""Planning: with these seeds and items, what could be seen?

Answers for the rule by which verdicts and claims are made, for one cell (see `alpha`): an effect
is *damaged* where the t interval over seeds lies above the margin, *intact* where two one-sided
tests put it within. Seeds' means are taken to be normal with a spread known from a pilot. Effects,
spreads and margins are in one unit, such as shares of (oracle - best constant).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mechinterp.errors import AnalysisError
from mechinterp.statistics import VarianceComponents

MAX_SEEDS = 10_000  # more than this are not worth planning for
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(200)


@dataclass(frozen=True)
class PowerPlan:
    """What `n_seeds` runs measured on `n_items` each can show; made by `plan_power`.

    `detectable` is the smallest true effect called damaged with the power that was asked for,
    `intact_margin` the smallest margin within which no effect at all is called intact with it.
    `power_damaged` is the chance that `effect` is called damaged, `power_intact` that no effect at
    all is called intact, both at the plan's margin; `seeds_*` are the seeds that either needs, None
    where even 10,000 do not do.
    """

    n_seeds: int
    n_items: int
    sd: float
    detectable: float
    intact_margin: float
    power_damaged: float
    power_intact: float
    seeds_damaged: int | None
    seeds_intact: int | None


def plan_power(
    pilot: VarianceComponents,
    *,
    n_seeds: int,
    n_items: int = 1,
    margin: float = 0.05,
    effect: float | None = None,
    power: float = 0.8,
    alpha: float = 0.05,
) -> PowerPlan:
    """What a study of so many seeds and items could see, from the variances of a pilot.

    Args:
        pilot: see `mechinterp.statistics.variance_components`. From one number per seed there is
            `between` alone, the noise of that pilot's items included; `n_items` then has no part.
        effect: the true effect to be called damaged; default: twice the margin.
        power: the chance asked for.
        alpha: of the two-sided interval and of each one-sided test. For one of k cells under
            Bonferroni, which Holm is never worse than, give alpha / k.

    Raises:
        AnalysisError: fewer than two seeds, or a number out of its range.
    """
    if n_items < 1:
        raise AnalysisError(f"power: expected at least one item, got {n_items}")
    effect = 2 * margin if effect is None else effect
    sd = float(np.sqrt(pilot.of_seed_mean(n_items)))

    def damaged(n: int) -> float:
        return power_damaged(effect, sd=sd, n_seeds=n, margin=margin, alpha=alpha)

    def intact(n: int) -> float:
        return power_intact(0.0, sd=sd, n_seeds=n, margin=margin, alpha=alpha)

    return PowerPlan(
        n_seeds=n_seeds,
        n_items=n_items,
        sd=sd,
        detectable=minimum_detectable_effect(
            sd=sd, n_seeds=n_seeds, margin=margin, power=power, alpha=alpha
        ),
        intact_margin=minimum_intact_margin(sd=sd, n_seeds=n_seeds, power=power, alpha=alpha),
        power_damaged=damaged(n_seeds),
        power_intact=intact(n_seeds),
        seeds_damaged=seeds_needed(damaged, power),
        seeds_intact=seeds_needed(intact, power),
    )


def power_damaged(
    effect: float, *, sd: float, n_seeds: int, margin: float = 0.05, alpha: float = 0.05
) -> float:
    """The chance that the 1 - alpha t interval lies above `margin` if the mean is `effect`.

    The t statistic against the margin is noncentral t. With margin 0, the upper half of the power
    of the two-sided t test.
    """
    from scipy.stats import nct, t

    _check(sd, n_seeds, alpha)
    if sd == 0:
        return float(effect > margin)
    degrees = n_seeds - 1
    noncentrality = (effect - margin) / sd * np.sqrt(n_seeds)
    return float(nct.sf(t.ppf(1 - alpha / 2, degrees), degrees, noncentrality))


def power_intact(
    effect: float, *, sd: float, n_seeds: int, margin: float = 0.05, alpha: float = 0.05
) -> float:
    """The chance that two one-sided tests at `alpha` call a mean of `effect` within ±`margin`.

    Exact: given the sample's standard deviation the mean must fall into a known interval, and that
    is integrated over (Phillips 1990, equation 1; what Owen's Q function gives).
    """
    from scipy.special import ndtr
    from scipy.stats import chi, t

    _check(sd, n_seeds, alpha)
    if not margin > 0:
        raise AnalysisError(f"power: the margin must be positive, got {margin}")
    if sd == 0:
        return float(abs(effect) < margin)
    degrees = n_seeds - 1
    critical = t.ppf(1 - alpha, degrees)
    upper, lower = (np.array([margin, -margin]) - effect) / sd * np.sqrt(n_seeds)
    # s / sd, as far as the interval is not too wide to fit, and no further than 9 of its deviations
    reach = 9 / np.sqrt(2 * degrees)
    begin, end = max(1 - reach, 0), min(1 + reach, (upper - lower) / 2 / critical)
    if end <= begin:
        return 0.0
    ratio = begin + (end - begin) * (_NODES + 1) / 2
    density = chi.pdf(ratio * np.sqrt(degrees), degrees) * np.sqrt(degrees)
    within = ndtr(upper - critical * ratio) - ndtr(lower + critical * ratio)
    return float((end - begin) / 2 * (_WEIGHTS * density * within).sum())


def minimum_detectable_effect(
    *, sd: float, n_seeds: int, margin: float = 0.0, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest true mean of which the 1 - alpha t interval lies above `margin` with `power`.

    (`mechinterp.verdict.minimum_detectable` is what one interval's width would have called damage,
    hence has a power of about a half.)
    """
    _check(sd, n_seeds, alpha, power)

    def missing(effect: float) -> float:
        return power_damaged(effect, sd=1.0, n_seeds=n_seeds, margin=0.0, alpha=alpha) - power

    return margin + sd * _root(missing)


def minimum_intact_margin(
    *, sd: float, n_seeds: int, power: float = 0.8, alpha: float = 0.05
) -> float:
    """The smallest margin within which a mean of zero is called intact with `power`."""
    _check(sd, n_seeds, alpha, power)

    def missing(margin: float) -> float:
        return power_intact(0.0, sd=1.0, n_seeds=n_seeds, margin=margin, alpha=alpha) - power

    return sd * _root(missing)


def seeds_needed(power_of: Callable[[int], float], power: float = 0.8) -> int | None:
    """The fewest seeds, of 2 to 10,000, whose `power_of(n_seeds)`, increasing, reaches `power`."""
    low, high = 1, 2  # too few, and perhaps enough
    while power_of(high) < power:
        if high == MAX_SEEDS:
            return None
        low, high = high, min(2 * high, MAX_SEEDS)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if power_of(middle) >= power else (middle, high)
    return high


def _root(missing: Callable[[float], float]) -> float:
    """Where an increasing function of a positive number, below zero at zero, is zero."""
    from scipy.optimize import brentq

    beyond = 1.0
    while missing(beyond) < 0:
        beyond *= 2
    return float(brentq(missing, 1e-9, beyond))  # type: ignore[arg-type]


def _check(sd: float, n_seeds: int, alpha: float, power: float = 0.8) -> None:
    if n_seeds < 2:
        raise AnalysisError(f"power: expected at least two seeds, got {n_seeds}")
    if not (np.isfinite(sd) and sd >= 0):
        raise AnalysisError(f"power: expected a standard deviation, got {sd}")
    if not 0 < alpha < 1:
        raise AnalysisError(f"alpha: expected a number between 0 and 1, got {alpha}")
    if not alpha < power < 1:
        raise AnalysisError(f"power: expected a number between alpha and 1, got {power}")
