"""Tasks by name. `get("triage", n_decoys=4)` makes one; `names()` lists them with a line each."""

from __future__ import annotations

import dataclasses
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mechinterp.errors import TaskError

if TYPE_CHECKING:
    from mechinterp.tasks.base import Task

# name -> (module, class, one line)
_TASKS = {
    "triage": (
        "triage",
        "Triage",
        "synthetic findings in a record: known latents, known posterior",
    ),
    "digits": ("digits", "Digits", "8x8 images as tokens: is the digit in a subset of the ten?"),
    "pneumonia": (
        "pneumonia",
        "Pneumonia",
        "chest X-rays as tokens (PneumoniaMNIST, from a path): pneumonia or not?",
    ),
    "arithmetic": (
        "arithmetic",
        "Arithmetic",
        "add one-digit numbers, written step by step: for training by reward",
    ),
    "questions": (
        "questions",
        "Questions",
        "unreliable witnesses: what is the answer, and how sure is it? Known posterior",
    ),
    "reasoning_gym": (
        "reasoning",
        "Reasoning",
        "a generator of reasoning-gym, to be answered in writing: for training by reward only",
    ),
    "sentiment": ("sentiment", "Sentiment", "is a one-line review positive? for language models"),
}


def names() -> dict[str, str]:
    """Every task with a line about it."""
    return {name: line for name, (_, _, line) in _TASKS.items()}


def task_class(name: str) -> Any:
    """The class of task `name`; raises TaskError for an unknown one."""
    if name not in _TASKS:
        raise TaskError(f"task {name!r} does not exist; choose one of: {', '.join(_TASKS)}")
    module, cls, _ = _TASKS[name]
    return getattr(import_module(f"mechinterp.tasks.{module}"), cls)


def get(name: str, **settings: Any) -> Task:
    """Make task `name` with `settings`; raises TaskError for an unknown task or setting."""
    cls = task_class(name)
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    for key in settings:
        if key not in known:
            raise TaskError(
                f"task {name!r} has no setting {key!r}; it has: {', '.join(sorted(known))}"
            )
    try:
        return cls(**settings)
    except (TypeError, ValueError) as error:
        raise TaskError(f"task {name!r}: {error}") from error


def default_settings(name: str) -> dict[str, Any]:
    """The settings of task `name` with their defaults; None for those that have none."""
    from mechinterp.tasks.base import plain

    return {
        field.name: None if field.default is dataclasses.MISSING else plain(field.default)
        for field in dataclasses.fields(task_class(name))
    }
