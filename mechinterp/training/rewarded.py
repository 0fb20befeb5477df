"""Training by reward on what a network writes itself: GRPO and its relatives, expert iteration."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.adapters import Adapters
from mechinterp.checkpoints import Checkpoint, Trajectory
from mechinterp.policy_gradient import aggregate, kl, policy_loss
from mechinterp.randomness import derive_generator
from mechinterp.rollouts import Rollouts, completion_log_probs, sample_answers
from mechinterp.tasks.written import Marks, Problems, WrittenTask
from mechinterp.training.problem_batches import ProblemRun, ProblemSource, check_length
from mechinterp.training.rewarded_config import Reward, RewardedConfig
from mechinterp.training.rewarded_log import gradient_norms, measure_samples
from mechinterp.training.rewarded_signal import (
    RewardFunction,
    Signal,
    make_signal,
    rewards_by_function,
)
from mechinterp.training.run import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["Reward", "RewardedConfig", "train_by_reward"]

# Logits that one pass with gradients may hold, in numbers: 256 MB in float32, and again for theirs.
LOGITS_AT_ONCE = 2**26


def train_by_reward(
    task: WrittenTask,
    *,
    start: Checkpoint,
    config: RewardedConfig,
    out: str | Path,
    problems: Problems | None = None,
    levels: Sequence[int] | None = None,
    planted: float = 0.0,
    seed: int = 0,
    data_order: int = 0,
    adapters: Adapters | None = None,
    reward: RewardFunction | None = None,
    reward_seconds: float = 10.0,
) -> Trajectory:
    """Train `start` on its own completions; leave checkpoints, as `supervised.train` does.

    Problems are fresh ones of `levels`, a share `planted` with a shortcut, or those of the pool
    `problems`. A step samples, marks, and takes `config.n_updates` optimiser steps on all weights,
    or on `adapters` alone, which are saved merged. `reward(entry, token ids)` replaces the rewards
    of `config.reward`, if given; it is part of the run's description by its name.

    `training.parquet` has a row per step: `rewarded_log.measure_samples`, the loss, learning rate
    and gradient norms of the last update (whole, and by layer), `kl` to the start in nats per
    token (estimate k3), and the wall seconds of sampling (with marking) and of the update.

    Resumes as `supervised.train` does. Raises TaskError, with the item's name, when `reward`
    raises, takes longer than `reward_seconds` or returns no finite number, and TrainingError when a
    loss or a gradient is not finite; the checkpoints up to there are kept.
    """
    run = RewardedRun(
        task=task,
        config=config.optimizer,
        out=Path(out),
        seed=seed,
        data_order=data_order,
        start=start,
        adapters=adapters,
        source=ProblemSource(pool=problems, levels=levels, planted=planted),
        rewarded=config,
        reward=reward,
        reward_seconds=reward_seconds,
    )
    return run.finish()


@dataclass(frozen=True, kw_only=True)
class RewardedRun(ProblemRun):
    """See `train_by_reward`; `update` is one step of it."""

    rewarded: RewardedConfig
    reward: RewardFunction | None
    reward_seconds: float

    def objective(self) -> dict[str, Any]:
        inputs = self.rewarded.as_inputs()
        del inputs["optimizer"], inputs["kl_every"]
        if self.reward is not None:
            inputs["reward"] = f"{self.reward.__module__}.{self.reward.__qualname__}"
        return {"name": "reward", **inputs}

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "kl_every": self.rewarded.kl_every}

    @cached_property
    def reference(self) -> PreTrainedModel:
        assert self.start is not None
        return self.start.load_model().requires_grad_(False)

    def update(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> Row:
        began = time.perf_counter()
        samples = self._sample(model, step)
        sampled = time.perf_counter()
        reference = self._reference_log_probs(samples, step)
        loss, norm, norms = 0.0, 0.0, {}
        for _ in range(self.rewarded.n_updates):
            loss = self._backward(model, optimizer, samples, reference)
            norms = gradient_norms(model)
            norm = self.descend(optimizer, step)
        return {
            **self.row(step, loss=loss, norm=norm, began=began),
            "seconds_sampling": sampled - began,
            **measure_samples(samples.problems, samples.rollouts, samples.marks, samples.signal),
            "kl": _mean_kl(samples.rollouts, reference),
            **norms,
        }

    def _sample(self, model: PreTrainedModel, step: int) -> _Samples:
        problems = self.batches(step)
        max_new_tokens = self.rewarded.max_new_tokens or self.task.max_new_tokens
        check_length(model, problems, max_new_tokens)
        rollouts = sample_answers(
            model,
            self.task,
            problems,
            n_samples=self.rewarded.n_samples,
            max_new_tokens=max_new_tokens,
            temperature=self.rewarded.temperature,
            generator=derive_generator(self.seed, "rollouts", self.stream, self.data_order, step),
        )
        marks = self.task.mark(problems, rollouts.completions, rollouts.mask)
        given = None
        if self.reward is not None:
            limits = {"seconds": self.reward_seconds, "step": step}
            given = rewards_by_function(self.reward, problems, rollouts, **limits)
        signal = make_signal(self.rewarded, rollouts, marks, given)
        return _Samples(problems, rollouts, marks, signal, self.rewarded.temperature)

    @torch.no_grad()
    def _reference_log_probs(
        self, samples: _Samples, step: int
    ) -> Float[Tensor, "prompts samples tokens"] | None:
        every = self.rewarded.kl_every
        if self.rewarded.kl_weight == 0 and not (every and step % every == 0):
            return None
        parts = samples.parts(self.reference, torch.arange(len(samples.problems)))
        return torch.cat([samples.log_probs(self.reference, index) for index in parts])

    def _backward(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        samples: _Samples,
        reference: Float[Tensor, "prompts samples tokens"] | None,
    ) -> float:
        """Leave the gradient of the loss in the parameters, and return the loss.

        Prompts without a gradient are not run: those without advantages where there is no KL, and
        those without a right sample in expert iteration.
        """
        for group in optimizer.param_groups:  # a step without any gradient is still AdamW's
            for parameter in group["params"]:
                parameter.grad = torch.zeros_like(parameter)
        if self.rewarded.method == "rejection":
            runs = samples.marks.correct.any(1)
        else:
            runs = samples.signal.teaches | (self.rewarded.kl_weight > 0)
        total = 0.0
        for index in samples.parts(model, runs.nonzero()[:, 0]):
            part = self._loss(samples.log_probs(model, index), samples, index, reference)
            part.backward()
            total += part.item()
        return total

    def _loss(
        self,
        log_probs: Float[Tensor, "chosen samples tokens"],
        samples: _Samples,
        index: Int[Tensor, " chosen"],
        reference: Float[Tensor, "prompts samples tokens"] | None,
    ) -> Float[Tensor, ""]:
        """What the prompts at `index` add to the loss of all prompts."""
        config, mask = self.rewarded, samples.rollouts.mask
        if config.method == "rejection":
            right = samples.marks.correct[..., None] & mask
            own = aggregate(-log_probs, right[index], by="token")
            return own * (right[index].sum() / right.sum())
        own = policy_loss(
            log_probs,
            samples.signal.advantages[index],
            mask[index],
            old_log_probs=samples.rollouts.log_probs[index] if config.n_updates > 1 else None,
            clip=config.clip,
            reference_log_probs=None if reference is None else reference[index],
            kl_weight=config.kl_weight,
            by=config.aggregation,
            length=config.length,
        )
        if config.aggregation == "token":
            return own * (mask[index].sum() / mask.sum())
        return own * (len(index) / len(mask))


@dataclass(frozen=True)
class _Samples:
    """What the network wrote in one step, and what that earned."""

    problems: Problems
    rollouts: Rollouts
    marks: Marks
    signal: Signal
    temperature: float

    def parts(
        self, model: PreTrainedModel, index: Int[Tensor, " prompts"]
    ) -> tuple[Int[Tensor, " part"], ...]:
        """Prompts that `log_probs` may run together."""
        numbers = self.rollouts.completions[0].numel() * model.config.get_text_config().vocab_size
        return index.split(max(1, LOGITS_AT_ONCE // numbers)) if len(index) else ()

    def log_probs(
        self, model: PreTrainedModel, index: Int[Tensor, " prompts"]
    ) -> Float[Tensor, "prompts samples tokens"]:
        return completion_log_probs(
            model,
            self.problems.tokens[index],
            self.problems.mask[index],
            self.rollouts.completions[index],
            temperature=self.temperature,
        )


def _mean_kl(
    rollouts: Rollouts, reference: Float[Tensor, "prompts samples tokens"] | None
) -> float:
    if reference is None:
        return float("nan")
    return float(kl(rollouts.log_probs, reference)[rollouts.mask].mean())
