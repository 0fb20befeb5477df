"""What every training run does: claim a directory, take the steps, leave checkpoints, resume."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mechinterp import files
from mechinterp.adapters import Adapters, add_adapters, merged
from mechinterp.checkpoints import (
    Checkpoint,
    Provenance,
    Trajectory,
    open_checkpoint,
    save_checkpoint,
    step_directory,
)
from mechinterp.errors import TrainingError
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from mechinterp.training import state
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.organism import initial_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from mechinterp.tasks.base import Task
    from mechinterp.tasks.written import WrittenTask

LOG_COLUMNS = ["step", "loss", "learning_rate", "gradient_norm", "seconds"]
Row = dict[Any, Any]  # of the log, by column: at least LOG_COLUMNS


@dataclass(frozen=True, kw_only=True)
class Run(ABC):
    """One training run and its directory; a subclass says what a step is.

    Training begins at a random `model`, a function of `seed` alone, or branches from `start` with a
    fresh optimiser, and changes all weights, or `adapters` alone. What a step draws is a function
    of the step: a run that was interrupted at any moment goes on from its newest checkpoint and
    ends with the same weights bit for bit.
    """

    task: Task | WrittenTask
    config: TrainingConfig
    out: Path
    seed: int = 0
    data_order: int = 0
    model: ModelConfig | None = None
    start: Checkpoint | None = None
    adapters: Adapters | None = None

    def __post_init__(self) -> None:
        if (self.model is None) == (self.start is None):
            raise TrainingError(
                "training: give a model to initialise or a start checkpoint, not both"
            )
        if self.start is not None:
            _check_start(self.start, self.task)

    @abstractmethod
    def objective(self) -> dict[str, Any]:
        """What is minimised, as plain values."""

    @abstractmethod
    def update(self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int) -> Row:
        """Make the weights of `step` + 1 out of those of `step`; returns a row of the log."""

    def settings(self) -> dict[str, Any]:
        """What else determines the weights, as plain values."""
        return {}

    @property
    def stream(self) -> str:
        """Names the run's origin, so that a branch does not draw what its parent drew."""
        return "initialisation" if self.start is None else self.start.content_hash

    @cached_property
    def description(self) -> dict[str, Any]:
        """All that determines the weights, as it stands in `run.json`."""
        description = {
            "task": {"name": self.task.name, "settings": self.task.settings()},
            "objective": self.objective(),
            "seed": self.seed,
            **self._details,
        }
        if self.start is None:
            description["model"] = asdict(self.model or ModelConfig())
        else:
            description["start"] = self.start.content_hash
        return json.loads(json.dumps(description))

    @property
    def _details(self) -> dict[str, Any]:
        return {
            "data_order": self.data_order,
            "training": self.config.as_inputs(),
            **({} if self.adapters is None else {"adapters": asdict(self.adapters)}),
            **self.settings(),
        }

    def finish(self) -> Trajectory:
        """Take the steps that are not yet taken."""
        self._claim_directory()
        with _threads(self.config.n_threads):
            self._take_steps()
        return Trajectory.open(self.out)

    def _claim_directory(self) -> None:
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

    def _take_steps(self) -> None:
        resumable = [step for step in self.config.steps if state.has_state(self._path(step))]
        first = max(resumable, default=0)
        self._drop_states_before(first)
        if first == self.config.n_steps:
            return
        model = self._load_model(first if resumable else None)
        optimizer = torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            betas=self.config.betas,
            weight_decay=self.config.weight_decay,
            fused=True,
        )
        log: list[Row] = []
        if resumable:
            state.restore_optimizer(model, optimizer, self._path(first))
            rows = files.read_table(self._log_path).to_dict(orient="records")
            log.extend(row for row in rows if row["step"] < first)
        else:
            self._save(model, optimizer, 0, log)
        n_left = self.config.n_steps - first
        with progress_bar(f"training {self.out.name}", n_left, unit="step") as advance:
            for step in range(first, self.config.n_steps):
                log.append(self.update(model, optimizer, step))
                if not math.isfinite(log[-1]["loss"] + log[-1]["gradient_norm"]):
                    self._write_log(log)
                    raise TrainingError(
                        f"{self.out}: loss {log[-1]['loss']} with gradient norm "
                        f"{log[-1]['gradient_norm']} at step {step}; the checkpoints up to there "
                        "are good; lower the learning rate"
                    )
                if step + 1 in self.config.steps:
                    self._save(model, optimizer, step + 1, log)
                advance(1)

    def row(self, step: int, *, loss: float, norm: float, began: float) -> Row:
        """The columns that every log has, of an update that began at `time.perf_counter` began."""
        rate, seconds = self.config.learning_rate_at(step), time.perf_counter() - began
        return dict(zip(LOG_COLUMNS, (step, loss, rate, norm, seconds), strict=True))

    def descend(self, optimizer: torch.optim.Optimizer, step: int) -> float:
        """Clip the gradients and step at the rate of `step`; returns their norm before clipping."""
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        for group in optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(step)
        norm = torch.nn.utils.clip_grad_norm_(parameters, self.config.gradient_clip)
        optimizer.step()
        return norm.item()

    def _save(
        self, model: PreTrainedModel, optimizer: torch.optim.Optimizer, step: int, log: list[Row]
    ) -> None:
        """Write the log, then checkpoint and optimiser state together, then drop older states.

        A kill in between leaves the older checkpoint in force and a log with all steps before it,
        or two states, of which the newer counts.
        """
        self._write_log(log)
        provenance = Provenance(
            objective=self.description["objective"],
            step=step,
            seed=self.seed,
            parent_hash=self._parent_hash(step),
            task=self.description["task"],
            extra={key: self.description[key] for key in self._details},
        )
        save_checkpoint(
            model if self.adapters is None else merged(model),
            self._path(step),
            provenance=provenance,
            tokenizer=self.start if self.start is not None and self.start.has_tokenizer else None,
            extra_files=state.state_files(model, optimizer, step),
        )
        self._drop_states_before(step)

    def _drop_states_before(self, step: int) -> None:
        for older in self.config.steps:
            if older < step:
                state.drop_state(self._path(older))

    def _load_model(self, step: int | None) -> PreTrainedModel:
        """The network of a saved step, or the one that the run begins with."""
        if self.adapters is None and step is not None:
            return open_checkpoint(self._path(step)).load_model()
        if self.start is None:
            model = initial_model(self.model or ModelConfig(), self.task, seed=self.seed)
        else:
            model = self.start.load_model()
        if self.adapters is not None:
            generator = derive_generator(self.seed, "adapters")
            add_adapters(model, self.adapters, generator)
            if step is not None:
                state.restore_trained(model, self._path(step))
        return model

    def _parent_hash(self, step: int) -> str | None:
        """Content hash of the weights that the run began with; None for those, if random."""
        if self.start is not None:
            return self.start.content_hash
        return None if step == 0 else open_checkpoint(self._path(0)).content_hash

    def _write_log(self, log: list[Row]) -> None:
        files.write_table(self._log_path, pd.DataFrame(log, columns=None if log else LOG_COLUMNS))

    @property
    def _log_path(self) -> Path:
        return self.out / "training.parquet"

    def _path(self, step: int) -> Path:
        return step_directory(self.out, step)


def _check_start(start: Checkpoint, task: Task | WrittenTask) -> None:
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
