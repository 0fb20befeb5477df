"""The command `mechinterp capture`: a checkpoint and a task in, a store out."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mechinterp.checkpoints import open_checkpoint
from mechinterp.errors import StoreError
from mechinterp.hooked import HookedModel
from mechinterp.spec import load_task
from mechinterp.store.reading import ActivationStore
from mechinterp.store.writing import capture


def capture_task(
    checkpoint: str | Path,
    *,
    task: str,
    out: str | Path,
    sites: Iterable[str],
    layers: str | None = None,
    positions: str = "decision",
    n_items: int,
    split: str = "test",
    seed: int = 0,
    attn_implementation: str = "eager",
    **options: Any,
) -> ActivationStore:
    """`capture` on a task's items, with `layers` and `positions` as they are written in a command.

    Raises:
        MechinterpError: the checkpoint, the task, or an option is not what it should be.
    """
    opened = open_checkpoint(checkpoint)
    items = load_task(task).make_for(opened).sample(n_items, seed=seed, split=split)
    return capture(
        HookedModel.from_checkpoint(opened, attn_implementation=attn_implementation),
        items,
        out=out,
        sites=[site.strip() for part in sites for site in part.split(",")],
        layers=None if layers is None else parse_layers(layers),
        positions=parse_positions(positions),
        **options,
    )


def parse_layers(text: str) -> list[int]:
    """`0-5,11` as a list; raises StoreError."""
    layers: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None:
            raise StoreError(f"--layers {text}: expected numbers and ranges such as 0-5,11")
        layers.extend(range(int(match[1]), int(match[2] or match[1]) + 1))
    return layers


def parse_positions(text: str) -> str | list[int]:
    """`0,-1` as a list of indexes; a name as it is, for `capture` to judge."""
    if re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+)*\s*", text):
        return [int(part) for part in text.split(",")]
    return text
