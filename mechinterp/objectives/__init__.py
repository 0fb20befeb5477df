"""Objectives by name: per-item losses of action logits. `get("utility_weighted", utility=u)`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SpecError
from mechinterp.objectives.cross_entropy import cross_entropy
from mechinterp.objectives.focal import focal
from mechinterp.objectives.hard_examples import hard_examples
from mechinterp.objectives.logit_adjusted import logit_adjusted
from mechinterp.objectives.smoothed_regret import smoothed_regret
from mechinterp.objectives.utility_weighted import utility_weighted

__all__ = [
    "Objective",
    "Shifted",
    "cross_entropy",
    "focal",
    "get",
    "hard_examples",
    "logit_adjusted",
    "smoothed_regret",
    "utility_weighted",
]

_OBJECTIVES: dict[str, Callable[..., Tensor]] = {
    function.__name__: function
    for function in (
        cross_entropy,
        focal,
        hard_examples,
        logit_adjusted,
        smoothed_regret,
        utility_weighted,
    )
}


@dataclass(frozen=True)
class Objective:
    """A named loss with its settings; call it with action logits and labels."""

    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __call__(
        self, action_logits: Float[Tensor, "batch actions"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        return _OBJECTIVES[self.name](action_logits, labels, **self.settings)

    def describe(self) -> dict[str, Any]:
        """Name and settings as plain values, for a provenance file."""
        return {"name": self.name, **self.settings}


@dataclass(frozen=True)
class Shifted:
    """An objective of the logits after an ex-post shift: what it teaches a network whose decision
    serves its costs already."""

    objective: Objective
    shift: Sequence[float]

    def __call__(
        self, action_logits: Float[Tensor, "batch actions"], labels: Int[Tensor, " batch"]
    ) -> Float[Tensor, " batch"]:
        return self.objective(action_logits + action_logits.new_tensor(self.shift), labels)


def get(name: str, **settings: Any) -> Objective:
    """The objective `name`; raises SpecError for an unknown objective or setting."""
    if name not in _OBJECTIVES:
        raise SpecError(
            f"objective {name!r} does not exist; choose one of: {', '.join(_OBJECTIVES)}"
        )
    parameters = inspect.signature(_OBJECTIVES[name]).parameters.values()
    known = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}
    required = {p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty}
    if not required <= set(settings) <= known:
        raise SpecError(
            f"objective {name!r} takes the settings {sorted(known)}, got {sorted(settings)}"
        )
    return Objective(name, settings)
