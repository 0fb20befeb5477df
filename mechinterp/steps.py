"""The steps of a study. Each is a function of plain values that leaves one directory, whole or
absent.

A step's directory bears the hash of all that determines its content: what is done is not done
again, and a study that was killed goes on where it stopped.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.files import (
    atomic_directory,
    file_hash,
    read_json,
    value_hash,
    write_json,
    write_table,
)
from mechinterp.training.pool import Job, run_jobs

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.spec import AnalysisSpec
    from mechinterp.tasks.base import Task

# Raise a number when the step's results change for the same inputs.
VERSIONS = {
    "train": 1,
    "warm_up": 1,
    "pass_rates": 2,
    "reward": 1,
    "writing": 1,
    "confidence": 2,
    "texts": 1,
    "checkpoint": 6,
    "gradients": 1,
    "recovery": 3,
    "pair": 4,
    "competence": 2,
    "reference": 2,
    "lesion": 2,
    "compare": 8,
}


REWARD_KINDS = ("warm_up", "pass_rates", "reward", "writing", "confidence", "texts")


@dataclass(frozen=True)
class Step:
    """`inputs` determine the result; `labels` say which cell of the study it fills; `after` are the
    steps whose results it reads."""

    kind: str
    inputs: Mapping[str, Any]
    labels: Mapping[str, Any]
    after: tuple[Step, ...] = ()

    @property
    def key(self) -> str:
        address = {
            "kind": self.kind,
            "version": VERSIONS[self.kind],
            "inputs": self.inputs,
            "after": [step.key for step in self.after],
        }
        return value_hash(address)[:20]

    def directory(self, out: Path) -> Path:
        return out / "steps" / self.kind / self.key

    def is_done(self, out: Path) -> bool:
        return (self.directory(out) / "step.json").is_file()

    def record(self, out: Path) -> dict[str, Any]:
        """What `step.json` says: inputs and seconds."""
        return read_json(self.directory(out) / "step.json")

    def tables(self, out: Path) -> dict[str, pd.DataFrame]:
        """The step's tables, with the study's labels as columns."""
        from mechinterp.files import read_table

        return {
            path.stem: read_table(path).assign(**self.labels)
            for path in sorted(self.directory(out).glob("*.parquet"))
        }

    def job(self, out: Path) -> Job:
        return Job(
            key=self.key,
            function=f"{_module(self.kind)}.run_{self.kind}",
            kwargs={
                "directory": str(self.directory(out)),
                "after": [str(step.directory(out)) for step in self.after],
                "inputs": self.inputs,
            },
            after=tuple(step.key for step in self.after if not step.is_done(out)),
        )


def _module(kind: str) -> str:
    return "mechinterp.reward_steps" if kind in REWARD_KINDS else "mechinterp.steps"


def task_inputs(task: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A task as inputs of a step; a data file that its settings name counts by its content."""
    from mechinterp import tasks

    inputs: dict[str, Any] = {"task": task, "settings": dict(settings)}
    if (version := tasks.task_class(task).version) > 1:
        inputs["version"] = version
    if (path := settings.get("path")) and Path(path).is_file():
        inputs["file"] = file_hash(path)
    return inputs


def checkpoint_path(train: str | Path, step: int) -> Path:
    """Where a training step keeps the checkpoint of one optimiser step."""
    return Path(train) / "trajectory" / f"step-{step:06d}"


def run_train(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Train one arm; `after` is empty or holds the run whose last checkpoint it branches from."""
    from mechinterp import objectives
    from mechinterp.checkpoints import open_checkpoint
    from mechinterp.training import sampling as samplings
    from mechinterp.training.config import ModelConfig, TrainingConfig
    from mechinterp.training.tuning import train_at_best_rate

    begun = time.monotonic()
    task, _ = _task_and_spec(inputs)
    start = open_checkpoint(checkpoint_path(after[0], inputs["start_step"])) if after else None
    # The run directory resumes by itself, so it is not written aside and renamed: step.json, last,
    # says that it is whole.
    sampling = inputs.get("sampling")
    train_at_best_rate(
        task,
        TrainingConfig(**inputs["training"]),
        Path(directory),
        factors=inputs.get("learning_rates", [1.0]),
        objective=objectives.get(**inputs["objective"]),
        sampling=sampling and samplings.get(**sampling),
        seed=inputs["seed"],
        data_order=inputs["data_order"],
        model=None if start else ModelConfig(**inputs["model"]),
        start=start,
    )
    finish_step(Path(directory), inputs, begun)


def run_checkpoint(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Measure one checkpoint: ladder, calibration and probes, for one or more readings of it."""
    from analyses.checkpoint import Reading, measure_checkpoint
    from analyses.streams import task_costs
    from mechinterp.hooked import load

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    readings = {}
    for arm, reading in inputs["readings"].items():
        costs, refit = task_costs(task, reading["costs"]), reading.get("refit")
        if refit or reading["shift"]:  # made for its own costs, and meant for no others
            costs = {name: costs[name] for name in reading["costs"]}
        readings[arm] = Reading(costs, reading["shift"], refit)
    measures = measure_checkpoint(
        model,
        task,
        readings,
        spec=spec,
        n_items=inputs["n_items"],
        with_latents=inputs["with_latents"],
        with_probes=inputs["with_probes"],
    )
    write_step(directory, measures.tables, inputs, begun)


def run_gradients(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Gradients of several objectives at one checkpoint."""
    from analyses.gradients import measure_gradients
    from mechinterp import objectives
    from mechinterp.hooked import load

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    named = {}
    for name, how in inputs["objectives"].items():
        objective = objectives.get(**how["objective"])
        named[name] = objectives.Shifted(objective, how["shift"]) if how["shift"] else objective
    write_step(directory, measure_gradients(model, task, named, spec=spec), inputs, begun)


def run_recovery(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """The recovery maps of one checkpoint."""
    from analyses.patching import measure_recovery
    from mechinterp.hooked import load

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    write_step(directory, {"patching": measure_recovery(model, task, spec=spec)}, inputs, begun)


def run_pair(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Crossing, cross-checkpoint patches and, where asked for, circuits of two checkpoints."""
    from analyses.circuits import compare_circuits
    from analyses.cross_checkpoint import measure_cross_checkpoint
    from analyses.crossing import measure_crossing
    from analyses.streams import task_costs
    from mechinterp.hooked import load

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    before, after_model = (
        load(checkpoint_path(run, step)) for run, step in zip(after, inputs["steps"], strict=True)
    )
    costs = task_costs(task, inputs["costs"])
    crossing = measure_crossing(
        before, after_model, task, costs=costs, spec=spec, margin=inputs["margin"]
    )
    tables = {"crossing": crossing}
    if inputs["with_patches"]:
        tables["cross_checkpoint"] = measure_cross_checkpoint(before, after_model, task, spec=spec)
    if spec.pair_circuits:
        tables |= compare_circuits(before, after_model, task, spec=spec)
    write_step(directory, tables, inputs, begun)


def run_competence(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Does the symmetric network know the task? Without, nothing can be said about damage."""
    from analyses.competence import measure_competence
    from mechinterp.hooked import load

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    table = measure_competence(model, task, spec=spec, threshold=inputs["threshold"])
    write_step(directory, {"competence": table}, inputs, begun)


def run_reference(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """A sound network's ladder, item by item, which its lesions are judged against."""
    from analyses.validity import measure_reference
    from mechinterp.hooked import load
    from mechinterp.lesions import parse_doses

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    doses = [dose for text in inputs["doses"] for dose in parse_doses(text)]
    write_step(directory, measure_reference(model, task, doses, spec=spec), inputs, begun)


def run_lesion(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """A network with doses of lesions, and the verdict on it against a reference."""
    from analyses.validity import judge_lesion
    from mechinterp.files import read_table
    from mechinterp.hooked import load
    from mechinterp.lesions import parse_doses

    begun = time.monotonic()
    task, spec = _task_and_spec(inputs)
    model = load(checkpoint_path(after[0], inputs["step"]))
    tables = {
        name: read_table(Path(after[1]) / f"{name}.parquet") for name in ("ladder_items", "value")
    }
    pair = judge_lesion(
        model,
        task,
        [dose for text in inputs["doses"] for dose in parse_doses(text)],
        tables,
        spec=spec,
        margin=inputs["margin"],
        seed=inputs["seed"],
    )
    write_step(directory, {"pair": pair}, inputs, begun)


def _task_and_spec(inputs: dict[str, Any]) -> tuple[Task, AnalysisSpec]:
    from mechinterp import tasks
    from mechinterp.spec import AnalysisSpec

    task = tasks.get(inputs["task"], **inputs["settings"])
    return task, AnalysisSpec(**inputs.get("analysis", {}))


def remove_remains(out: Path) -> None:
    """What a run that was killed left half-written."""
    for remains in (out / "steps").glob("*/.*.tmp-*"):
        shutil.rmtree(remains)


def run_missing(steps: Sequence[Step], out: Path, *, n_workers: int, name: str) -> int:
    """Do the steps that are not yet done, and say how many they were."""
    missing = [step for step in steps if not step.is_done(out)]
    remove_remains(out)
    if missing:
        done = len(steps) - len(missing)
        print(
            f"{name}: {len(missing)} steps to do, {done} done before, {n_workers} at a time",
            file=sys.stderr,
        )
        for _ in run_jobs([s.job(out) for s in missing], n_workers=n_workers, label=name):
            pass
    return len(missing)


def write_step(
    directory: str | Path, tables: Mapping[str, pd.DataFrame], inputs: dict[str, Any], begun: float
) -> None:
    with atomic_directory(directory) as temporary:
        for name, table in tables.items():
            write_table(temporary / f"{name}.parquet", table)
        finish_step(temporary, inputs, begun)


def finish_step(directory: Path, inputs: dict[str, Any], begun: float) -> None:
    write_json(
        directory / "step.json", {"inputs": inputs, "seconds": round(time.monotonic() - begun, 2)}
    )
