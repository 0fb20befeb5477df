"""Supervised training of the decision, leaving a trajectory of checkpoints; resumes exactly."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mechinterp import files
from mechinterp.checkpoints import (
    Checkpoint,
    Provenance,
    Trajectory,
    open_checkpoint,
    save_checkpoint,
    step_directory,
)
from mechinterp.errors import TrainingError
from mechinterp.objectives import Objective
from mechinterp.progress import progress_bar
from mechinterp.tasks.base import Task
from mechinterp.training import state
from mechinterp.training.batches import Batches
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.organism import initial_model
from mechinterp.training.sampling import Sampling, symmetric_losses

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SYMMETRIC = Objective("cross_entropy")
LOG_COLUMNS = ["step", "loss", "learning_rate", "gradient_norm", "seconds"]
Row = dict[Any, Any]  # of the log, by column


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
    if model is not None and start is not None:
        raise TrainingError("training: give a model to initialise or a start checkpoint, not both")
    if start is not None:
        _check_start(start, task)
    if sampling is not None and sampling.needs_losses and start is None:
        raise TrainingError(
            f"sampling {sampling.name!r}: needs a start checkpoint, whose losses say what is hard"
        )
    run = _Run(
        task,
        config,
        Path(out),
        objective,
        sampling,
        seed,
        data_order,
        model or ModelConfig(),
        start,
    )
    run.claim_directory()
    with _threads(config.n_threads):
        run.finish()
    return Trajectory.open(out)


@dataclass(frozen=True)
class _Run:
    """One training run and its directory."""

    task: Task
    config: TrainingConfig
    out: Path
    objective: Objective
    sampling: Sampling | None
    seed: int
    data_order: int
    model: ModelConfig
    start: Checkpoint | None

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that determines the weights, as it stands in `run.json`."""
        origin = (
            {"model": asdict(self.model)}
            if self.start is None
            else {"start": self.start.content_hash}
        )
        description = {
            "task": {"name": self.task.name, "settings": self.task.settings()},
            "objective": self.objective.describe(),
            "seed": self.seed,
            "data_order": self.data_order,
            "training": asdict(self.config),
            **({} if self.sampling is None else {"sampling": self.sampling.describe()}),
            **origin,
        }
        return json.loads(json.dumps(description))

    def claim_directory(self) -> None:
        """Write `run.json`, or check that the one there describes this very run."""
        path = self.out / "run.json"
        if path.exists():
            theirs, ours = _flat(files.read_json(path)), _flat(self.description)
            for key in sorted(theirs.keys() | ours.keys()):
                if theirs.get(key) != ours.get(key):
                    raise TrainingError(
                        f"{path}: belongs to another run ({key} is {theirs.get(key)} there and "
                        f"{ours.get(key)} here); choose another directory or delete this one"
                    )
        elif any(self.out.glob("step-*")):
            raise TrainingError(
                f"{self.out}: holds checkpoints but no run.json; choose another directory"
            )
        else:
            files.write_json(path, self.description)
        for leftover in self.out.glob(".*.tmp-*"):  # of a process that was killed while writing
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()

    def finish(self) -> None:
        """Take the steps that are not yet taken."""
        resumable = [step for step in self.saved_steps if state.has_state(self.path(step))]
        first = max(resumable, default=0)
        self.drop_states_before(first)
        if first == self.config.n_steps:
            return
        model = self.load_model(first if resumable else None)
        optimizer = torch.optim.AdamW(
            model.parameters(),
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        log: list[Row] = []
        if resumable:
            state.restore_optimizer(model, optimizer, self.path(first))
            table = files.read_table(self.log_path)
            log.extend(table.query("step < @first").to_dict(orient="records"))
        else:
            self.save(model, optimizer, 0, log)
        batches = self.batches()
        n_left = self.config.n_steps - first
        with progress_bar(f"training {self.out.name}", n_left, unit="step") as advance:
            for step in range(first, self.config.n_steps):
                log.append(self.update(model, optimizer, *batches(step), step))
                if not math.isfinite(log[-1]["loss"] + log[-1]["gradient_norm"]):
                    self.write_log(log)
                    raise TrainingError(
                        f"{self.out}: loss {log[-1]['loss']} with gradient norm "
                        f"{log[-1]['gradient_norm']} at step {step}; the checkpoints up to there "
                        "are good; lower the learning rate"
                    )
                if step + 1 in self.saved_steps:
                    self.save(model, optimizer, step + 1, log)
                advance(1)

    def batches(self) -> Batches:
        losses = None
        if self.start is not None and self.sampling is not None and self.sampling.needs_losses:
            losses = symmetric_losses(self.start.load_model(), self.task.actions)
        return Batches(
            self.task,
            batch_size=self.config.batch_size,
            seed=self.seed,
            stream="initialisation" if self.start is None else self.start.content_hash,
            data_order=self.data_order,
            sampling=self.sampling,
            losses=losses,
        )

    def update(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        tokens: torch.Tensor,
        labels: torch.Tensor,
        step: int,
    ) -> Row:
        """Make the weights of `step` + 1 out of those of `step`; returns a row of the log."""
        began = time.perf_counter()
        learning_rate = self.config.learning_rate_at(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        logits = model(input_ids=tokens, use_cache=False, logits_to_keep=1).logits[:, -1]
        loss = self.objective(logits[:, list(self.task.actions)], labels).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), self.config.gradient_clip)
        optimizer.step()
        seconds = time.perf_counter() - began
        row = (step, loss.item(), learning_rate, norm.item(), seconds)
        return dict(zip(LOG_COLUMNS, row, strict=True))

    def save(
        self,
        model: PreTrainedModel,
        optimizer: torch.optim.Optimizer,
        step: int,
        log: list[Row],
    ) -> None:
        """Write the log, then checkpoint and optimiser state together, then drop older states.

        A kill in between leaves the older checkpoint in force and a log with all steps before it,
        or two states, of which the newer counts.
        """
        self.write_log(log)
        provenance = Provenance(
            objective=self.objective.describe(),
            step=step,
            seed=self.seed,
            parent_hash=self.parent_hash(step),
            task=self.description["task"],
            extra={
                key: self.description[key]
                for key in ("data_order", "training", "sampling")
                if key in self.description
            },
        )
        save_checkpoint(
            model,
            self.path(step),
            provenance=provenance,
            tokenizer=self.start if self.start is not None and self.start.has_tokenizer else None,
            extra_files=state.state_files(model, optimizer, step),
        )
        self.drop_states_before(step)

    def drop_states_before(self, step: int) -> None:
        for older in self.saved_steps:
            if older < step:
                state.drop_state(self.path(older))

    def load_model(self, step: int | None) -> PreTrainedModel:
        """The weights of a saved step, or those that the run begins with."""
        if step is not None:
            return open_checkpoint(self.path(step)).load_model()
        if self.start is not None:
            return self.start.load_model()
        return initial_model(self.model, self.task, seed=self.seed)

    def parent_hash(self, step: int) -> str | None:
        """Content hash of the weights that the run began with; None for those, if random."""
        if self.start is not None:
            return self.start.content_hash
        return None if step == 0 else open_checkpoint(self.path(0)).content_hash

    def write_log(self, log: list[Row]) -> None:
        files.write_table(self.log_path, pd.DataFrame(log, columns=LOG_COLUMNS))

    @property
    def saved_steps(self) -> tuple[int, ...]:
        return self.config.steps

    @property
    def log_path(self) -> Path:
        return self.out / "training.parquet"

    def path(self, step: int) -> Path:
        return step_directory(self.out, step)


def _check_start(start: Checkpoint, task: Task) -> None:
    if start.vocab_size < task.vocab_size:
        raise TrainingError(
            f"{start.path}: knows {start.vocab_size} tokens, but task {task.name!r} uses "
            f"{task.vocab_size}; start from a checkpoint that was trained on this task"
        )
    if start.provenance is not None and start.provenance.action_shift is not None:
        raise TrainingError(
            f"{start.path}: has an ex-post shift of its action logits, which training would not "
            "see; start from the checkpoint without it"
        )


@contextlib.contextmanager
def _threads(n: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} as {"a.b": 1}, to name what differs."""
    if not isinstance(value, dict):
        return {prefix: value}
    parts = (_flat(v, f"{prefix}.{k}" if prefix else k) for k, v in value.items())
    return {key: leaf for part in parts for key, leaf in part.items()}
