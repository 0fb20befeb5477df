"""The verdict on a pair: was learning damaged, was choosing damaged, both, neither, or who knows?

The rule, in full. Each side's *delta* is the increase of its loss (ladder, log score, in units of
oracle - best constant) from the reference to the after network, item by item: the reference is the
control where one is given, else the before network. With margin m and the 95% interval of the mean:

    damaged       the interval lies above +m
    improved      the interval lies below -m
    intact        the 90% interval lies within (-m, +m): two one-sided tests at 5%
    inconclusive  anything else

The word lists the damaged sides. "none" needs both sides intact or improved; anything else is
"inconclusive". *Discarded* (readable earlier, gone later) and *forgetting* (a latent that the
decision does not need) are states of their own, never damage. Intervals are over items: they speak
of these two networks, not of the objective that made them, which takes seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.statistics import Interval, bootstrap_t_interval, t_interval, t_test

MARGIN = 0.05
SIDES = ("learning", "choosing")
MANY_GROUPS = 2_000


@dataclass(frozen=True)
class Side:
    """One side of the verdict: `delta` with its 95% interval, and what follows from it."""

    delta: float
    ci: tuple[float, float]
    p: float
    state: str


@dataclass(frozen=True)
class Verdict:
    """`components` holds a Side for every part of the ladder; `minimum_detectable` is the smallest
    delta that would have been called damage, per side."""

    verdict: str
    learning: Side
    choosing: Side
    components: Mapping[str, Side]
    minimum_detectable: Mapping[str, float]
    evidence: Mapping[str, str]
    reference: str
    costs: str
    margin: float
    n_items: int

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def judge_side(
    delta: Float[Tensor, " items"],
    groups: Int[Tensor, " items"],
    *,
    margin: float = MARGIN,
) -> Side:
    """The state of one side from per-item increases of its loss; items of a group go together."""
    wide = _interval(delta, groups, level=0.95)
    narrow = _interval(delta, groups, level=0.90)
    return Side(
        delta=wide.mean,
        ci=(float(wide.low), float(wide.high)),
        p=_p_value(delta, groups),
        state=state_of((wide.low, wide.high), (narrow.low, narrow.high), margin),
    )


def word(learning: Side, choosing: Side) -> str:
    """The verdict in one word, from the two sides."""
    damaged = [
        name
        for name, side in zip(SIDES, (learning, choosing), strict=True)
        if side.state == "damaged"
    ]
    if len(damaged) == 2:
        return "both"
    if damaged:
        return damaged[0]
    unhurt = all(side.state in ("intact", "improved") for side in (learning, choosing))
    return "none" if unhurt else "inconclusive"


def minimum_detectable(side: Side, margin: float) -> float:
    """The smallest increase that this interval's width would have called damage."""
    return margin + (side.delta - side.ci[0])


def state_of(wide: tuple[float, float], narrow: tuple[float, float], margin: float) -> str:
    """The state that a 95% and a 90% interval of an increase allow."""
    if wide[0] > margin:
        return "damaged"
    if wide[1] < -margin:
        return "improved"
    if -margin < narrow[0] and narrow[1] < margin:
        return "intact"
    return "inconclusive"


def _interval(delta: Tensor, groups: Tensor, *, level: float) -> Interval:
    """Bootstrap-t where skewness can matter; Student's t on the groups' means beyond."""
    means = _group_means(delta, groups)
    if len(means) > MANY_GROUPS:
        return t_interval(means.numpy(), level=level)
    return bootstrap_t_interval(delta.numpy(), groups=groups.numpy(), level=level)


def _p_value(delta: Tensor, groups: Tensor) -> float:
    """Two-sided p-value of "no change", from the t statistic of the groups' means."""
    return t_test(_group_means(delta, groups).numpy())


def _group_means(delta: Tensor, groups: Tensor) -> Float[Tensor, " groups"]:
    index = torch.unique(groups, return_inverse=True)[1]
    total = torch.zeros(int(index.max()) + 1, dtype=torch.float64)
    return total.index_add(0, index, delta.double()) / torch.bincount(index)
