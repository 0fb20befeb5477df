"""From what was sampled to what is learned from it: rewards and the advantage of every token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp import advantages, rewards
from mechinterp.rollouts import Rollouts
from mechinterp.tasks.marking import guarded
from mechinterp.tasks.written import Marks, Problems
from mechinterp.training.rewarded_config import Reward, RewardedConfig

# (a problem's entry, the token ids of a completion, end token included) -> reward
RewardFunction = Callable[[Any, list[int]], float]


@dataclass(frozen=True)
class Signal:
    """What a group of samples earns, and what that makes of its tokens.

    `rewards` are of whole completions: where a reward is routed, the sum of both parts.
    """

    rewards: Float[Tensor, "prompts samples"]
    advantages: Float[Tensor, "prompts samples tokens"]

    @property
    def teaches(self) -> Bool[Tensor, " prompts"]:
        """Groups with an advantage that is not 0: all others have no gradient."""
        return (self.advantages != 0).flatten(1).any(1)


def make_signal(
    config: RewardedConfig,
    rollouts: Rollouts,
    marks: Marks,
    given: Float[Tensor, "prompts samples"] | None = None,
) -> Signal:
    """The signal of marked rollouts, or of the rewards `given`."""
    mask = rollouts.mask
    if given is None and config.reward.routed:
        answer = _answer(marks)
        confidence = _score(config.reward, marks)
        by_token = advantages.routed(
            _advantages(config, answer), _advantages(config, confidence), marks.confidence_tokens
        )
        return Signal(answer + confidence, by_token.masked_fill(~mask, 0.0))
    if given is None:
        given = _answer(marks)
        if config.reward.score is not None:
            given = given + _score(config.reward, marks)
    by_token = repeat(_advantages(config, given), "p s -> p s t", t=mask.shape[2])
    return Signal(given, by_token.masked_fill(~mask, 0.0))


def rewards_by_function(
    function: RewardFunction,
    problems: Problems,
    rollouts: Rollouts,
    *,
    seconds: float,
    step: int,
) -> Float[Tensor, "prompts samples"]:
    """What `function` gives for each completion; raises TaskError, which names the item, where it
    raises, takes longer than `seconds` or returns no finite number."""
    values = [
        [
            guarded(
                function,
                entry,
                completion[kept].tolist(),
                item=f"step {step}, problem {p} {entry!r:.60}, sample {s}",
                seconds=seconds,
            )
            for s, (completion, kept) in enumerate(zip(completions, masks, strict=True))
        ]
        for p, (entry, completions, masks) in enumerate(
            zip(problems.entries, rollouts.completions, rollouts.mask, strict=True)
        )
    ]
    return torch.tensor(values)


def _answer(marks: Marks) -> Float[Tensor, "prompts samples"]:
    """What the answer itself earns: the score of a task's own scorer, else 1 if it is right."""
    return rewards.binary(marks.correct) if marks.score is None else marks.score


def _score(reward: Reward, marks: Marks) -> Float[Tensor, "prompts samples"]:
    """The weighted score of stated confidences; 1 where wrong, 0 where right in place of none."""
    right = rewards.binary(marks.correct)
    confidence = torch.where(marks.confidence.isnan(), 1 - right, marks.confidence).to(right)
    if reward.score == "group":
        return rewards.group_calibration(right, confidence, weight=reward.weight)
    return reward.weight * rewards.SCORES[reward.score or "brier"](right, confidence)


def _advantages(
    config: RewardedConfig, given: Float[Tensor, "prompts samples"]
) -> Float[Tensor, "prompts samples"]:
    if config.advantage == "reinforce":
        return advantages.reinforce(given, baseline=config.baseline)
    return getattr(advantages, config.advantage)(given)
