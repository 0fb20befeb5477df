"""Supervised training of the decision, leaving a trajectory of checkpoints; resumes exactly."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechinterp.checkpoints import Checkpoint, Trajectory
from mechinterp.errors import TrainingError
from mechinterp.objectives import Objective
from mechinterp.tasks.base import Task
from mechinterp.training.batches import Batches
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.run import Row, Run
from mechinterp.training.sampling import Sampling, symmetric_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SYMMETRIC = Objective("cross_entropy")


def train(
    task: Task,
    *,
    config: TrainingConfig,
    out: str | Path,
    objective: Objective = SYMMETRIC,
    sampling: Sampling | None = None,
    seed: int = 0,
    data_order: int = 0,
    model: ModelConfig | None = None,
    start: Checkpoint | None = None,
) -> Trajectory:
    """Train on the task's decision; leave checkpoints `out/step-000000` ... `out/step-<n_steps>`.

    The loss is the mean over the batch of `objective` on the logits of the task's actions at the
    last position; `sampling` chooses the items of a batch. Training begins at a random `model`, a
    function of `seed` alone, or branches from `start` with a fresh optimiser. Dropout is off: no
    random state is hidden anywhere.

    Called again with the same arguments, a run that was interrupted at any moment goes on from its
    newest checkpoint and ends with the same weights bit for bit; a finished one returns at once.
    `out` also holds `run.json` (all that determines the run) and `training.parquet` (per step: loss
    of the weights before the update, learning rate, gradient norm before clipping, wall seconds).

    Raises TrainingError when a loss or gradient is not finite, naming the step, and when `out`
    belongs to another run.
    """
    if sampling is not None and sampling.needs_losses and start is None:
        raise TrainingError(
            f"sampling {sampling.name!r}: needs a start checkpoint, whose losses say what is hard"
        )
    run = _SupervisedRun(
        task=task,
        config=config,
        out=Path(out),
        seed=seed,
        data_order=data_order,
        model=ModelConfig() if model is None and start is None else model,
        start=start,
        loss=objective,
        sampling=sampling,
    )
    return run.finish()


@dataclass(frozen=True, kw_only=True)
class _SupervisedRun(Run):
    task: Task
    loss: Objective
    sampling: Sampling | None

    def objective(self) -> dict[str, Any]:
        return self.loss.describe()

    def settings(self) -> dict[str, Any]:
        return {} if self.sampling is None else {"sampling": self.sampling.describe()}

    @cached_property
    def batches(self) -> Batches:
        losses = None
        if self.start is not None and self.sampling is not None and self.sampling.needs_losses:
            losses = symmetric_losses(self.start.load_model(), self.task.actions)
        return Batches(
            self.task,
            batch_size=self.config.batch_size,
            seed=self.seed,
            stream=self.stream,
            data_order=self.data_order,
            sampling=self.sampling,
            losses=losses,
        )

    def update(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> Row:
        began = time.perf_counter()
        tokens, labels = self.batches(step)
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = self.loss(logits[:, list(self.task.actions)], labels).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = self.descend(optimizer, step)
        return self.row(step, loss=loss.item(), norm=norm, began=began)
