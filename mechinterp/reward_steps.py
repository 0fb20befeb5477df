"""The steps of a study of training by reward, beside those of any study (`mechinterp.steps`)."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.steps import checkpoint_path, finish_step, write_step

if TYPE_CHECKING:
    from mechinterp.adapters import Adapters
    from mechinterp.checkpoints import Checkpoint
    from mechinterp.tasks.written import Problems, WrittenTask


def run_warm_up(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Supervised training on right texts; `after` is empty or holds the run to go on from."""
    from mechinterp.training.config import ModelConfig, TrainingConfig
    from mechinterp.training.warm_up import warm_up

    begun = time.monotonic()
    start = _checkpoint(after[0], inputs["start_step"]) if after else _beginning(inputs)
    warm_up(
        _task(inputs),
        config=TrainingConfig(**inputs["training"]),
        out=Path(directory) / "trajectory",
        levels=inputs["levels"] or None,
        seed=inputs["seed"],
        data_order=inputs["data_order"],
        model=None if start else ModelConfig(**inputs["model"]),
        start=start,
        adapters=_adapters(inputs, start),
    )
    finish_step(Path(directory), inputs, begun)


def run_pass_rates(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """How often the start solves each candidate; the rarely solved are sampled more often."""
    from mechinterp.pass_rates import measure_pass_rates
    from mechinterp.pools import candidate_problems
    from mechinterp.randomness import derive_generator

    begun = time.monotonic()
    task, candidates = _task(inputs), inputs["candidates"]
    problems = candidate_problems(
        task, candidates["n"], planted=candidates["planted"], seed=inputs["seed"]
    )
    rates = measure_pass_rates(
        _checkpoint(after[0], inputs["step"]).load_model(),
        task,
        problems,
        n_screening=candidates["screening"],
        n_samples=candidates["samples"],
        rare=candidates["rare"],
        temperature=inputs["temperature"],
        max_new_tokens=inputs["max_new_tokens"],
        generator=derive_generator(inputs["seed"], "pass rates"),
    )
    write_step(directory, {"pass_rates": rates}, inputs, begun)


def run_reward(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """Training by reward, on fresh problems or on a pool of the measured candidates."""
    from mechinterp.training.rewarded import train_by_reward
    from mechinterp.training.rewarded_config import RewardedConfig

    begun = time.monotonic()
    task, start = _task(inputs), _checkpoint(after[0], inputs["start_step"])
    train_by_reward(
        task,
        config=RewardedConfig.from_inputs(inputs["training"]),
        out=Path(directory) / "trajectory",
        problems=None if inputs["pool"] is None else _pool(task, after[1], inputs),
        seed=inputs["seed"],
        start=start,
        adapters=_adapters(inputs, start),
    )
    finish_step(Path(directory), inputs, begun)


def run_writing(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """What a checkpoint writes on fresh problems, and how far that is from the start."""
    import pandas as pd

    from analyses.writing import measure_writing
    from mechinterp.randomness import derive_generator

    begun = time.monotonic()
    model = _checkpoint(after[0], inputs["step"]).load_model()
    start = _checkpoint(after[1], inputs["start_step"]).load_model()
    tables = []
    for name, wanted in inputs["sets"].items():
        task = _task(wanted)
        problems = task.problems(
            inputs["problems"],
            split="test",
            levels=wanted["levels"] or None,
            planted=wanted["planted"],
        )
        table = measure_writing(
            model,
            task,
            problems,
            start=start,
            n_samples=inputs["samples"],
            temperature=inputs["temperature"],
            max_new_tokens=inputs["max_new_tokens"],
            generator=derive_generator(0, "writing", name),
        )
        tables.append(table.assign(problems=name))
    write_step(directory, {"writing": pd.concat(tables, ignore_index=True)}, inputs, begun)


def run_confidence(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """What a checkpoint says of its own answers, and what could be read instead."""
    from analyses.stated_confidence import measure_stated_confidence
    from mechinterp.hooked import load
    from mechinterp.randomness import derive_generator

    begun = time.monotonic()
    tables = measure_stated_confidence(
        load(checkpoint_path(after[0], inputs["step"])),
        {name: _task(questions) for name, questions in inputs["questions"].items()},  # type: ignore[misc]
        n_questions=inputs["n_questions"],
        temperature=inputs["temperature"],
        seed=inputs["seed"],
        generator=derive_generator(inputs["seed"], "confidence"),
    )
    write_step(directory, tables, inputs, begun)


def run_texts(directory: str, after: list[str], inputs: dict[str, Any]) -> None:
    """The start and an arm on identical texts of three sources, and on contradicting ones."""
    from analyses.text_sources import measure_text_sources
    from mechinterp.hooked import load
    from mechinterp.randomness import derive_generator

    begun = time.monotonic()
    steps = (inputs["start_step"], inputs["step"])
    before, trained = (
        load(checkpoint_path(run, step)) for run, step in zip(after, steps, strict=True)
    )
    table = measure_text_sources(
        {"before": before, "after": trained},
        _task(inputs),  # type: ignore[arg-type]
        temperature=inputs["temperature"],
        generator=derive_generator(0, "texts"),
    )
    write_step(directory, {"text_sources": table}, inputs, begun)


def _task(inputs: dict[str, Any]) -> WrittenTask:
    from mechinterp import tasks

    return tasks.get(inputs["task"], **inputs["settings"])  # type: ignore[return-value]


def _checkpoint(run: str, step: int) -> Checkpoint:
    from mechinterp.checkpoints import open_checkpoint

    return open_checkpoint(checkpoint_path(run, step))


def _beginning(inputs: dict[str, Any]) -> Checkpoint | None:
    """The checkpoint that the study names as its start, if it does."""
    from mechinterp.checkpoints import open_checkpoint
    from mechinterp.errors import CheckpointError

    if "start" not in inputs:
        return None
    checkpoint = open_checkpoint(inputs["start"]["path"])
    if checkpoint.content_hash != inputs["start"]["content_hash"]:
        raise CheckpointError(f"{checkpoint.path}: changed while the study ran; run it again")
    return checkpoint


def _adapters(inputs: dict[str, Any], start: Checkpoint | None) -> Adapters | None:
    """In every layer of the start, if the study has them."""
    from mechinterp.adapters import Adapters

    if start is None or "adapters" not in inputs:
        return None
    layers = tuple(range(start.sizes["num_hidden_layers"]))
    return Adapters(layers=layers, **inputs["adapters"])


def _pool(task: WrittenTask, rates: str, inputs: dict[str, Any]) -> Problems:
    from mechinterp.files import read_json, read_table
    from mechinterp.pools import candidate_problems, choose_pool
    from mechinterp.randomness import derive_rng
    from mechinterp.reward_spec import Pool

    measured = read_json(Path(rates) / "step.json")["inputs"]
    candidates = candidate_problems(
        task,
        measured["candidates"]["n"],
        planted=measured["candidates"]["planted"],
        seed=measured["seed"],
    )
    table = read_table(Path(rates) / "pass_rates.parquet")
    rng = derive_rng(inputs["seed"], "pool")
    return choose_pool(candidates, table, Pool(**inputs["pool"]), rng=rng)
