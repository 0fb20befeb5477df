"""Trajectories: the checkpoints of one training run, in step order."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

from mechinterp.checkpoints.opening import CONFIG, Checkpoint, open_checkpoint, read_config
from mechinterp.checkpoints.pairs import describe_size_difference
from mechinterp.checkpoints.pretrained import quiet_transformers, read_model_class, read_sizes
from mechinterp.checkpoints.provenance import PROVENANCE
from mechinterp.errors import CheckpointError

_STEP = re.compile(r"step-(\d+)")


def step_directory(trajectory: str | Path, step: int) -> Path:
    """Where a trajectory keeps the checkpoint of `step`: its directory "step-000400"."""
    return Path(trajectory) / f"step-{step:06d}"


@dataclass(frozen=True)
class Trajectory:
    """The checkpoints that one training run left, in step order; each is opened when first used.

    `trajectory[i]` counts places, so that `trajectory[-1]` is the last; `steps[i]` is its step.
    """

    path: Path
    steps: tuple[int, ...]
    paths: tuple[Path, ...] = field(repr=False)
    _opened: dict[int, Checkpoint] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def open(cls, path: str | Path) -> Trajectory:
        """Find a run's directories "step-000400" and check that they belong together.

        Raises `CheckpointError` for a missing, empty or other directory, for a step that is there
        twice, and for checkpoints of different architecture or size.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(f"{path}: there is no such directory; correct the path")
        found = sorted(
            (int(match[1]), entry)
            for entry in path.iterdir()
            if entry.is_dir() and (match := _STEP.fullmatch(entry.name))
        )
        if not found:
            what = "is a single checkpoint" if (path / CONFIG).is_file() else "has no checkpoints"
            raise CheckpointError(
                f"{path}: {what}, so it is no trajectory; give a directory that has step-000000, "
                "step-000400 and so on"
            )
        for (step, first), (next_step, second) in pairwise(found):
            if step == next_step:
                raise CheckpointError(
                    f"{path}: {first.name} and {second.name} are the same step; delete one"
                )
        steps, paths = zip(*found, strict=True)
        _check_one_run(paths)
        return cls(path, steps, paths)

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, index: int) -> Checkpoint:
        index = range(len(self))[index]
        if index not in self._opened:
            self._opened[index] = self._open(index)
        return self._opened[index]

    def __iter__(self) -> Iterator[Checkpoint]:
        return (self[index] for index in range(len(self)))

    def _open(self, index: int) -> Checkpoint:
        checkpoint = open_checkpoint(self.paths[index])
        provenance = checkpoint.provenance
        if provenance is not None and provenance.step != self.steps[index]:
            raise CheckpointError(
                f"{checkpoint.path / PROVENANCE}: says step {provenance.step}, its directory says "
                f"step {self.steps[index]}; rename the directory"
            )
        return checkpoint


def _check_one_run(paths: tuple[Path, ...]) -> None:
    """Compare the configs alone: opening every checkpoint would read all their weights."""
    architectures, sizes = [], []
    for path in paths:
        with quiet_transformers():
            model_class, config = read_model_class(path / CONFIG, read_config(path))
        architectures.append(model_class.__name__)
        sizes.append(read_sizes(config))
        if difference := describe_size_difference(
            (architectures[0], architectures[-1]), (sizes[0], sizes[-1])
        ):
            raise CheckpointError(
                f"{path}: does not belong with {paths[0].name}: {difference}; keep one run in a "
                "trajectory"
            )
