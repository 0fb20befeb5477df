"""Which items a step sees: all alike, or chosen. Pure functions of candidates and a generator.

by_weight      in proportion to a weight per label: weighting by resampling
random_share   a random part of every batch: what weighting leaves of the effective sample size
hardest_share  those with the largest loss under the network that training starts from
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SpecError
from mechinterp.tasks.base import Items

Losses = Callable[[Items], Float[Tensor, " items"]]  # of the network that training starts from
CANDIDATES = 2  # by_weight draws from so many times the items that it returns


def by_weight(
    draw: Callable[[int], Items],
    n: int,
    *,
    weights: Sequence[float],
    generator: torch.Generator,
    **_: Any,
) -> Items:
    """`n` items drawn with replacement with probability proportional to the weight of their label.

    The expected gradient is that of the loss with class weights `weights`, up to a scale.
    """
    items = draw(CANDIDATES * n)
    chances = torch.tensor(weights, dtype=torch.float64)[items.labels]
    return items.select(chances.multinomial(n, replacement=True, generator=generator))


def random_share(draw: Callable[[int], Items], n: int, *, share: float, **_: Any) -> Items:
    """`share` of `n` items, rounded: smaller batches, the same number of steps."""
    return draw(max(1, round(share * n)))


def hardest_share(
    draw: Callable[[int], Items], n: int, *, share: float, losses: Losses, **_: Any
) -> Items:
    """The `n` items with the largest `losses` of n / share candidates."""
    items = draw(math.ceil(n / share))
    return items.select(losses(items).argsort(descending=True, stable=True)[:n])


_SAMPLINGS = {function.__name__: function for function in (by_weight, random_share, hardest_share)}
_GIVEN = {"generator", "losses"}  # by the run, not by the user


@dataclass(frozen=True)
class Sampling:
    """A named choice of items with its settings."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def needs_losses(self) -> bool:
        return self.name == "hardest_share"

    def __call__(
        self,
        draw: Callable[[int], Items],
        n: int,
        *,
        generator: torch.Generator,
        losses: Losses | None = None,
    ) -> Items:
        """What stands for a batch of `n`; `draw(m)` gives m fresh items."""
        given = {"generator": generator, "losses": losses}
        return _SAMPLINGS[self.name](draw, n, **self.settings, **given)

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for a provenance file."""
        return {"name": self.name, **self.settings}


def get(name: str, **settings: Any) -> Sampling:
    """The sampling `name`; raises SpecError for an unknown sampling or setting."""
    if name not in _SAMPLINGS:
        raise SpecError(f"sampling {name!r} does not exist; choose one of: {', '.join(_SAMPLINGS)}")
    parameters = inspect.signature(_SAMPLINGS[name]).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - _GIVEN
    if set(settings) != known:
        raise SpecError(
            f"sampling {name!r} takes the settings {sorted(known)}, got {sorted(settings)}"
        )
    if not 0 < settings.get("share", 1.0) <= 1:
        raise SpecError(f"sampling {name!r}: share must be in (0, 1], got {settings['share']}")
    if min(settings.get("weights", [0.0])) < 0:
        raise SpecError(f"sampling {name!r}: weights must not be negative")
    return Sampling(name, settings)


def effective_share(weights: Sequence[float], base_rates: Float[Tensor, " labels"]) -> float:
    """(sum w)^2 / (n sum w^2): what is left of n items when they count by their weights."""
    w = torch.tensor(weights, dtype=torch.float64)
    rates = base_rates.double() / base_rates.sum()
    return float((rates @ w) ** 2 / (rates @ w.square()))


def symmetric_losses(model: Any, actions: Sequence[int], batch_size: int = 2048) -> Losses:
    """Cross-entropy per item of a Hugging Face model on the task's actions."""

    @torch.no_grad()
    def losses(items: Items) -> Float[Tensor, " items"]:
        parts = []
        for start in range(0, len(items), batch_size):
            tokens: Int[Tensor, "batch positions"] = items.tokens[start : start + batch_size]
            logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
            parts.append(
                torch.nn.functional.cross_entropy(
                    logits[:, list(actions)],
                    items.labels[start : start + batch_size],
                    reduction="none",
                )
            )
        return torch.cat(parts)

    return losses
