"""One training run at the best of several learning rates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mechinterp.checkpoints import Trajectory
from mechinterp.objectives import Objective
from mechinterp.tasks.base import Task
from mechinterp.training.config import TrainingConfig
from mechinterp.training.supervised import train

VALIDATION_ITEMS = 4_000


def train_at_best_rate(
    task: Task,
    config: TrainingConfig,
    out: Path,
    *,
    objective: Objective,
    factors: Sequence[float] = (1.0,),
    **options: Any,
) -> Trajectory:
    """`train` at each of `factors` times the learning rate; the best ends as `out/trajectory`.

    Best is the least mean loss by `objective` on validation items after the last step. The other
    runs stay beside it, as `out/rate-<factor>`. `options` are those of `train`.
    """
    chosen = out / "trajectory"
    if len(factors) == 1:
        config = replace(config, learning_rate=config.learning_rate * factors[0])
        return train(task, config=config, out=chosen, objective=objective, **options)
    losses = {}
    for factor in factors if not chosen.exists() else ():
        at_rate = replace(config, learning_rate=config.learning_rate * factor)
        run = out / f"rate-{factor:.3g}"
        trajectory = train(task, config=at_rate, out=run, objective=objective, **options)
        losses[run] = validation_loss(trajectory[-1].load_model(), task, objective)
    if losses:
        min(losses, key=lambda run: losses[run]).rename(chosen)
    return Trajectory.open(chosen)


@torch.no_grad()
def validation_loss(model: Any, task: Task, objective: Objective) -> float:
    """The mean of `objective` on items that training has not seen."""
    items = task.sample(VALIDATION_ITEMS, split="validation")
    logits = model(input_ids=items.tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
    return float(objective(logits[:, list(task.actions)], items.labels).mean())
