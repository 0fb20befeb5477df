"""Supervised training on right texts: what a network needs before rewards can teach it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange

from mechinterp.adapters import Adapters
from mechinterp.checkpoints import Checkpoint, Trajectory
from mechinterp.policy_gradient import aggregate
from mechinterp.rollouts import completion_log_probs
from mechinterp.tasks.written import Problems, WrittenTask
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.problem_batches import ProblemRun, ProblemSource, check_length
from mechinterp.training.run import Row

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def warm_up(
    task: WrittenTask,
    *,
    config: TrainingConfig,
    out: str | Path,
    problems: Problems | None = None,
    levels: Sequence[int] | None = None,
    planted: float = 0.0,
    seed: int = 0,
    data_order: int = 0,
    model: ModelConfig | None = None,
    start: Checkpoint | None = None,
    adapters: Adapters | None = None,
) -> Trajectory:
    """Train on the problems' solutions; leave checkpoints, as `supervised.train` does.

    The loss is the cross-entropy of the solutions' tokens, the end token included, averaged over
    all of a batch; the prompts are not learned. Problems are fresh ones of `levels`, a share
    `planted` with a shortcut, or those of the pool `problems`. Training begins at a random `model`
    or branches from `start`, and changes all weights or `adapters` alone, which are saved merged.
    """
    run = _WarmUpRun(
        task=task,
        config=config,
        out=Path(out),
        seed=seed,
        data_order=data_order,
        model=ModelConfig() if model is None and start is None else model,
        start=start,
        adapters=adapters,
        source=ProblemSource(pool=problems, levels=levels, planted=planted),
    )
    return run.finish()


@dataclass(frozen=True, kw_only=True)
class _WarmUpRun(ProblemRun):
    def objective(self) -> dict[str, Any]:
        return {"name": "solutions"}

    def update(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> Row:
        began = time.perf_counter()
        problems = self.batches(step)
        check_length(model, problems, problems.solutions.shape[1])
        solutions = rearrange(problems.solutions, "problems tokens -> problems 1 tokens")
        mask = rearrange(problems.solution_mask, "problems tokens -> problems 1 tokens")
        log_probs = completion_log_probs(model, problems.tokens, problems.mask, solutions)
        loss = aggregate(-log_probs, mask, by="token")
        optimizer.zero_grad()
        loss.backward()
        norm = self.descend(optimizer, step)
        return self.row(step, loss=loss.item(), norm=norm, began=began)
