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
decision does not need) are states of their own, by the same rule, and never damage. Intervals are
over items: they speak of these two networks, not of the objective that made them, which takes seeds
(`mechinterp.arm_verdicts`).

Two sides, one word: why nothing is adjusted for that here. "Damaged" uses one end of a 95%
interval, hence 2.5% per side, so that by Bonferroni a word names a side that is not damaged in at
most 5% of pairs. "None" claims both sides at once: an intersection-union test (Berger 1982), at 5%
when each of its parts is. Holm's procedure would test the second side at 5% where the first is
damaged; a state would then no longer follow from the interval printed beside it, and would depend
on the other side. `p` is of no change at all and decides nothing.

docs/verdict.md has the reasons for the rule and the fields of verdict.json, whose schema is
docs/verdict.schema.json: `python -m mechinterp.verdict > docs/verdict.schema.json`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.statistics import Interval, bootstrap_t_interval, t_interval, t_test

MARGIN = 0.05  # of (oracle - best constant)
INFORMATION_MARGIN = 0.02  # bits, of a latent's information
SIDES = ("learning", "choosing")
MANY_GROUPS = 2_000

State = Literal["damaged", "improved", "intact", "inconclusive"]
Word = Literal["none", "learning", "choosing", "both", "inconclusive"]


class _Closed:
    """A record of verdict.json: no keys but its own."""

    __pydantic_config__: ClassVar = {"extra": "forbid"}


@dataclass(frozen=True)
class Side(_Closed):
    """`delta`, an increase of a loss, with its 95% interval, and what follows from it."""

    delta: float
    ci: tuple[float, float]
    p: float
    state: State


@dataclass(frozen=True)
class Change(_Closed):
    """`delta` with its 95% interval, and the p-value of no change."""

    delta: float
    ci: tuple[float, float]
    p: float


@dataclass(frozen=True)
class CrossingShares(_Closed):
    """Where the `change` of one readout's value from before to after sits: before or behind `cut`.

    The shares are None where the interaction leaves them without meaning.
    """

    cut: int
    change: Change
    phi_front: Change | None
    phi_back: Change | None
    interaction: Change


@dataclass(frozen=True)
class Components(_Closed):
    """`rungs`: changes of each rung's value, more is better. `losses`: increases of each loss, more
    is worse. `crossing`, by readout: always of after against before."""

    rungs: Mapping[str, Change]
    losses: Mapping[str, Side]
    crossing: Mapping[str, CrossingShares] = field(default_factory=dict)


@dataclass(frozen=True)
class Verdict(_Closed):
    """What verdict.json holds, in units of (oracle - best constant).

    `forgetting` has a Side per latent that the decision does not need, in bits of information lost
    at the best layer. `minimum_detectable` is the smallest increase of each side that would have
    been called damage, `evidence` says which tables and figures stand behind what, and
    `disagreements` where evidence beside the ladder excludes what the ladder says.
    """

    verdict: Word
    learning: Side
    choosing: Side
    discarded: Side
    forgetting: Mapping[str, Side]
    components: Components
    minimum_detectable: Mapping[str, float]
    evidence: Mapping[str, str]
    disagreements: tuple[str, ...]
    reference: Literal["before", "control"]
    costs: str
    currency: Literal["log_score"]
    margin: float
    information_margin: float
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


def change_of(delta: Float[Tensor, " items"], groups: Int[Tensor, " items"]) -> Change:
    """The mean of per-item changes; items of a group go together."""
    wide = _interval(delta, groups, level=0.95)
    return Change(wide.mean, (float(wide.low), float(wide.high)), _p_value(delta, groups))


def word(learning: Side, choosing: Side) -> Word:
    """The verdict in one word, from the two sides."""
    states = (learning.state, choosing.state)
    if states == ("damaged", "damaged"):
        return "both"
    if learning.state == "damaged":
        return "learning"
    if choosing.state == "damaged":
        return "choosing"
    return "none" if set(states) <= {"intact", "improved"} else "inconclusive"


def minimum_detectable(side: Side, margin: float) -> float:
    """The smallest increase that this interval's width would have called damage."""
    return margin + (side.delta - side.ci[0])


def state_of(wide: tuple[float, float], narrow: tuple[float, float], margin: float) -> State:
    """The state that a 95% and a 90% interval of an increase allow."""
    if wide[0] > margin:
        return "damaged"
    if wide[1] < -margin:
        return "improved"
    if -margin < narrow[0] and narrow[1] < margin:
        return "intact"
    return "inconclusive"


def schema() -> dict[str, Any]:
    """The JSON schema of verdict.json."""
    from pydantic import TypeAdapter

    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **TypeAdapter(Verdict).json_schema(),
    }


def _interval(delta: Tensor, groups: Tensor, *, level: float) -> Interval:
    """Of the mean over items: bootstrap-t where skewness can matter, Student's t beyond."""
    many = len(groups.unique()) > MANY_GROUPS
    return (t_interval if many else bootstrap_t_interval)(
        delta.double().numpy(), groups=groups.numpy(), level=level
    )


def _p_value(delta: Tensor, groups: Tensor) -> float:
    return t_test(delta.double().numpy(), groups=groups.numpy())


if __name__ == "__main__":
    import json

    print(json.dumps(schema(), indent=2, sort_keys=True))
