"""Arguments and options that several commands share."""

from __future__ import annotations

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
Threads = Annotated[int, typer.Option(help="Threads for tensor arithmetic.", min=1)]
