"""Arguments and options that several commands share."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Optional

import typer

Task = Annotated[
    str, typer.Option("--task", help="A task's name, or a task file (.yaml); see `tasks`.")
]
Out = Annotated[Path, typer.Option("--out", help="Directory for tables, figures and report.")]
Control = Annotated[
    Optional[Path],  # noqa: UP045 - typer reads annotations at run time
    typer.Option(help="Checkpoint of the control arm, which AFTER is then compared with."),
]
Checkpoint = Annotated[Path, typer.Argument(help="Checkpoint directory.")]
After = Annotated[Optional[Path], typer.Argument(help="A second checkpoint, to compare.")]  # noqa: UP045
Preset = Annotated[Optional[str], typer.Option(help="One of the spec's presets.")]  # noqa: UP045
Workers = Annotated[
    Optional[int],  # noqa: UP045
    typer.Option(help="Processes, one thread each. Default: the processors.", min=1),
]
Threads = Annotated[int, typer.Option(help="Threads for tensor arithmetic.", min=1)]


def command_line() -> str:
    """The command as it was typed, for manifests."""
    return " ".join(["mechinterp", *sys.argv[1:]])
