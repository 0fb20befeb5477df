"""Linear probes: solver, cross-validation, control tasks, transfer between checkpoints, erasure."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from probes.estimator import LogisticProbe as LogisticProbe
    from probes.many import ManyFits as ManyFits
    from probes.many import fit_many as fit_many

_HOMES = {
    "LogisticProbe": "probes.estimator",
    "ManyFits": "probes.many",
    "fit_many": "probes.many",
}


def __getattr__(name: str) -> object:
    """Import a public name, and the heavy libraries behind it, where it is first used."""
    if name not in _HOMES:
        raise AttributeError(f"module 'probes' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
