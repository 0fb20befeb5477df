"""Where a checkpoint comes from: `provenance.json`, beside the weights, outside their hash."""

from __future__ import annotations

import math
import platform
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

from mechinterp.errors import CheckpointError
from mechinterp.files import read_json, write_json

PROVENANCE = "provenance.json"
_LIBRARIES = ("mechinterp", "torch", "transformers", "safetensors", "numpy")


@dataclass(frozen=True)
class Provenance:
    """What made a checkpoint. `objective`, `versions`, `task` and `extra` must be JSON-able.

    `action_shift` is added to the logits of the task's actions, in their order, before a decision:
    an adjustment after training that leaves the weights alone. `parent_hash` is the content hash of
    the checkpoint that training, or the shift, started from.
    """

    objective: dict[str, Any] = field(default_factory=dict)
    step: int = 0
    seed: int | None = None
    versions: dict[str, str] = field(default_factory=dict)
    parent_hash: str | None = None
    action_shift: tuple[float, ...] | None = None
    task: dict[str, Any] | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    def write(self, directory: Path) -> None:
        write_json(directory / PROVENANCE, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> Provenance | None:
        """The provenance of a checkpoint, or None where there is no file."""
        path = directory / PROVENANCE
        if not path.is_file():
            return None
        try:
            values = read_json(path)
        except ValueError as error:
            raise CheckpointError(f"{path}: is not JSON; restore it or delete it") from error
        if not isinstance(values, dict):
            raise CheckpointError(f"{path}: is not a JSON object; restore it or delete it")
        known = {entry.name for entry in fields(cls)}
        if unknown := sorted(values.keys() - known):
            raise CheckpointError(
                f"{path}: unknown field {unknown[0]!r} (known: {', '.join(sorted(known))}); "
                "move it into `extra`"
            )
        for name, value in values.items():
            if not _FIELD_IS_VALID[name](value):
                raise CheckpointError(
                    f"{path}: field {name!r} cannot be {value!r:.60}; restore the file or delete it"
                )
        if values.get("action_shift") is not None:
            values["action_shift"] = tuple(float(value) for value in values["action_shift"])
        return cls(**values)


def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that make or read a checkpoint; none is imported."""
    versions = {}
    for library in _LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            continue
    return versions


def versions_and_machine() -> dict[str, dict[str, str]]:
    """What a manifest says about where its numbers were made."""
    return {
        "versions": {**library_versions(), "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
    }


def is_action_shift(value: Any) -> bool:
    """Whether `value` is a non-empty list of finite numbers, one for each action."""
    return (
        isinstance(value, (list, tuple))
        and len(value) > 0
        and all(type(item) in (int, float) and math.isfinite(item) for item in value)
    )


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


_FIELD_IS_VALID = {
    "objective": _is_object,
    "step": lambda value: type(value) is int and value >= 0,
    "seed": lambda value: value is None or type(value) is int,
    "versions": _is_object,
    "parent_hash": lambda value: value is None or isinstance(value, str),
    "action_shift": lambda value: value is None or is_action_shift(value),
    "task": lambda value: value is None or _is_object(value),
    "extra": _is_object,
}
