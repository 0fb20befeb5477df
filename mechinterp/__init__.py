"""Did a training run damage what a network represents, or what it does with it?

`mechinterp.load(path)` opens a checkpoint as a `HookedModel`; `mechinterp.tasks.get(name,
**settings)` makes a task. Heavy libraries load when first used, so that `import mechinterp` is
quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mechinterp import tasks
    from mechinterp.checkpoints import CheckpointPair, open_checkpoint
    from mechinterp.hooked import HookedModel, load

__version__ = "0.1.0"
__all__ = ["CheckpointPair", "HookedModel", "load", "open_checkpoint", "tasks"]

_HOME = {
    "load": "mechinterp.hooked",
    "HookedModel": "mechinterp.hooked",
    "open_checkpoint": "mechinterp.checkpoints",
    "CheckpointPair": "mechinterp.checkpoints",
}


def __getattr__(name: str) -> Any:
    if name == "tasks":
        return import_module("mechinterp.tasks")
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'mechinterp' has no attribute {name!r}")
