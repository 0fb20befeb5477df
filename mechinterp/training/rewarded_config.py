"""What training by reward is, as plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from mechinterp.errors import TrainingError
from mechinterp.training.config import TrainingConfig

Method = Literal["policy_gradient", "rejection"]
Advantage = Literal["standardised", "centred", "leave_one_out", "reinforce"]
Aggregation = Literal["sample", "token", "constant"]
Score = Literal["brier", "spherical", "log", "group"]


@dataclass(frozen=True)
class Reward:
    """What a completion earns: 1 if right, or what the task's own scorer gives (`Marks.score`), and
    `weight` times the score of its confidence.

    `score` None is the answer's reward alone. The others are those of `mechinterp.rewards`;
    "group" is DCPO's `group_calibration`. With `routed` the score goes to the tokens that state
    the confidence and right answers to all others, each with advantages of its own (DCPO,
    `advantages.routed`); without, both are one reward of the whole completion (RLCR). A
    completion that states no confidence is scored as if it had stated the worst.
    """

    score: Score | None = None
    weight: float = 1.0
    routed: bool = False

    def __post_init__(self) -> None:
        _require("reward: score", self.score, (None, *get_args(Score)))
        if self.weight < 0:
            raise TrainingError(f"reward: weight must not be negative, got {self.weight}")
        if self.score is None and self.routed:
            raise TrainingError("reward: routed needs a score of the confidence")
        if self.score == "group" and not self.routed:
            raise TrainingError("reward: score 'group' is for confidence tokens: set routed")


@dataclass(frozen=True)
class RewardedConfig:
    """Sampling, advantages and loss; the defaults are GRPO with a binary reward.

    Each of `optimizer.n_steps` steps samples `n_samples` completions of `optimizer.batch_size`
    prompts, at `temperature`, and takes `n_updates` optimiser steps on them. `max_new_tokens` None
    is the task's. Method "rejection" is expert iteration: cross-entropy on the right completions.

    Of method "policy_gradient": `advantage` is one of `mechinterp.advantages`, `baseline` that of
    "reinforce"; `aggregation` is that of `mechinterp.policy_gradient` ("constant" divides by
    `length`); `clip` is (low, high) of the ratio to the probabilities at sampling, which are those
    of the network itself in the first update; `kl_weight` pulls to the start, per token.
    Where it is 0 the KL is measured for the log every `kl_every` steps; 0 is never.
    """

    optimizer: TrainingConfig = field(
        default_factory=lambda: TrainingConfig(
            n_steps=200, batch_size=24, learning_rate=3e-4, warmup_steps=10, weight_decay=0.0
        )
    )
    method: Method = "policy_gradient"
    reward: Reward = field(default_factory=Reward)
    n_samples: int = 8
    temperature: float = 1.0
    max_new_tokens: int | None = None
    advantage: Advantage = "standardised"
    baseline: float = 0.0
    aggregation: Aggregation = "sample"
    length: float = 1.0
    kl_weight: float = 0.0
    kl_every: int = 10
    n_updates: int = 1
    clip: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        _require("method", self.method, get_args(Method))
        _require("advantage", self.advantage, get_args(Advantage))
        _require("aggregation", self.aggregation, get_args(Aggregation))
        for name in ("n_samples", "temperature", "n_updates", "length"):
            if not getattr(self, name) > 0:
                raise TrainingError(f"rewarded: {name} must be positive, got {getattr(self, name)}")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise TrainingError(f"rewarded: max_new_tokens must be positive or none: {self}")
        if self.kl_weight < 0 or self.kl_every < 0:
            raise TrainingError("rewarded: kl_weight and kl_every must not be negative")
        if self.n_samples < 2 and self.method != "rejection" and self.advantage != "reinforce":
            raise TrainingError(
                f"rewarded: advantage {self.advantage!r} compares samples of a prompt; n_samples "
                f"must be at least 2, got {self.n_samples}"
            )
        if self.clip is not None:
            low, high = self.clip
            if not (0 <= low <= 1 and high >= 0):
                raise TrainingError(
                    f"rewarded: clip must be (low in [0, 1], high not negative), got {self.clip}"
                )
            object.__setattr__(self, "clip", (float(low), float(high)))

    def as_inputs(self) -> dict[str, Any]:
        """Its fields as a JSON file has them; `from_inputs` makes it again."""
        return {
            **asdict(self),
            "optimizer": self.optimizer.as_inputs(),
            "clip": None if self.clip is None else list(self.clip),
        }

    @classmethod
    def from_inputs(cls, inputs: Mapping[str, Any]) -> RewardedConfig:
        nested = {
            "optimizer": TrainingConfig(**inputs["optimizer"]),
            "reward": Reward(**inputs["reward"]),
        }
        return cls(**{**inputs, **nested})


def _require(name: str, value: object, known: tuple[object, ...]) -> None:
    if value not in known:
        raise TrainingError(
            f"rewarded: {name} must be one of {', '.join(map(str, known))}; got {value!r}"
        )
