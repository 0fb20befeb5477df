"""Checkpoints opened for comparison on one task, and what the analyses of a pair share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from analyses.streams import DecisionStreams, check_fits, read_streams, task_costs
from mechinterp import decisions
from mechinterp.errors import AnalysisError, SpecError
from mechinterp.hooked import HookedModel
from mechinterp.spec import AnalysisSpec, TaskSpec
from mechinterp.tasks.base import Items, Task

if TYPE_CHECKING:
    from mechinterp.checkpoints import Checkpoint

Tables = dict[str, pd.DataFrame]


@dataclass(frozen=True)
class Pair:
    """`models` by arm: "before", and as far as given "after" and "control"."""

    models: Mapping[str, HookedModel]
    task: Task
    spec: AnalysisSpec
    costs: Mapping[str, decisions.Utility]
    _streams: dict[str, DecisionStreams] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        before: str | Path,
        after: str | Path | None = None,
        *,
        control: str | Path | None = None,
        task: TaskSpec,
        **load_options: Any,
    ) -> Pair:
        """Open and check the checkpoints; raises CheckpointError where they do not go together."""
        from mechinterp.checkpoints import CheckpointPair, open_checkpoint

        paths = {"before": before, "after": after, "control": control}
        checkpoints = {
            arm: open_checkpoint(path) for arm, path in paths.items() if path is not None
        }
        for arm, checkpoint in checkpoints.items():
            if arm != "before":
                CheckpointPair(checkpoints["before"], checkpoint)
            _check_task(checkpoint, task)
        made = task.make_for(checkpoints["before"])
        models = {
            arm: HookedModel.from_checkpoint(checkpoint, **load_options)
            for arm, checkpoint in checkpoints.items()
        }
        for model in models.values():
            check_fits(model, made)
        return cls(models, made, task.analysis, task_costs(made, task.costs))

    @cached_property
    def items(self) -> Items:
        return self.task.sample(self.spec.ladder_items, seed=self.spec.seed, split="test")

    def streams(self, arm: str) -> DecisionStreams:
        """The arm's activations on all items; read once."""
        if arm not in self._streams:
            self._streams[arm] = self.read(self.models[arm], self.items)
        return self._streams[arm]

    @cached_property
    def probe_items(self) -> Items:
        """What probes are fitted on: the first items of a study's trajectories, so that a
        comparison repeats the study's numbers."""
        spec = self.spec
        items = self.task.sample(spec.trajectory_items, seed=spec.seed, split="test")
        return items.select(slice(0, spec.probe_items))

    def probe_streams(self, arm: str) -> DecisionStreams:
        """The arm's activations on `probe_items`; those at hand where they are the same items."""
        n = len(self.probe_items)
        if torch.equal(self.items.tokens[:n], self.probe_items.tokens):
            return self.streams(arm).select(slice(0, n))
        return self.read(self.models[arm], self.probe_items)

    def read(self, model: HookedModel, items: Items) -> DecisionStreams:
        """A network's activations on `items`, as the spec asks for them."""
        return read_streams(
            model,
            items,
            self.task,
            batch_size=self.spec.batch_size,
            max_layers=self.spec.max_layers,
        )

    def require(self, arm: str) -> HookedModel:
        """The arm's network; raises AnalysisError where it was not given."""
        if arm not in self.models:
            raise AnalysisError(f"this analysis needs two checkpoints: give {arm.upper()} too")
        return self.models[arm]

    def labels(self, arm: str) -> dict[str, Any]:
        """The key columns of a table's rows."""
        checkpoint = self.models[arm].checkpoint
        provenance = checkpoint.provenance if checkpoint else None
        step = provenance.step if provenance else 0
        return {"task": self.task.name, "regime": "pair", "arm": arm, "seed": 0, "step": step}

    def join(self, parts: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
        """Tables by arm as one, with the key columns in front."""
        labelled = [
            table.assign(**self.labels(arm))[[*self.labels(arm), *table.columns]]
            for arm, table in parts.items()
        ]
        return pd.concat(labelled, ignore_index=True)


def _check_task(checkpoint: Checkpoint, task: TaskSpec) -> None:
    """Raise SpecError where a network that was trained on one of our tasks is given another."""
    trained = checkpoint.provenance.task if checkpoint.provenance else None
    if trained and trained.get("name", task.task) != task.task:
        raise SpecError(
            f"{checkpoint.path}: was trained on task {trained['name']!r}, --task is {task.task!r}; "
            "give the task file that the study left in tasks/"
        )


def run_script(analyse: Callable[[Pair], Tables], *, figure: str, description: str) -> None:
    """The command line of an analysis: BEFORE [AFTER] --task T --out DIR, tables and its figure."""
    parser = argparse.ArgumentParser(description=description.partition("\n")[0])
    parser.add_argument("before", help="checkpoint directory")
    parser.add_argument("after", nargs="?", help="checkpoint directory to compare with")
    parser.add_argument("--control", help="checkpoint directory of the control arm")
    parser.add_argument("--task", required=True, help="task name or task file (.yaml)")
    parser.add_argument("--out", required=True, type=Path, help="where tables/ and figures/ go")
    arguments = parser.parse_args()

    from mechinterp.cli_errors import one_line_errors
    from mechinterp.threads import limit_threads

    with one_line_errors():
        limit_threads()
        write_analysis(
            analyse,
            figure=figure,
            out=arguments.out,
            before=arguments.before,
            after=arguments.after,
            control=arguments.control,
            task=arguments.task,
        )


def write_analysis(
    analyse: Callable[[Pair], Tables],
    *,
    figure: str,
    out: Path,
    before: str | Path,
    after: str | Path | None,
    control: str | Path | None,
    task: str | Path,
    changes: Mapping[str, Any] | None = None,
) -> None:
    """Run one analysis on checkpoints; leave its tables and its figure under `out`.

    `changes` are laid over the task file's `analysis`.
    """
    from figures import draw_all
    from mechinterp.files import write_table
    from mechinterp.spec import load_task

    spec = load_task(task, changes=changes)
    pair = Pair.open(before, after, control=control, task=spec)
    for name, table in analyse(pair).items():
        write_table(out / "tables" / f"{name}.parquet", table)
        print(out / "tables" / f"{name}.parquet")
    for paths in draw_all(out / "tables", out / "figures", [figure]).written.values():
        print(*paths, sep="\n")
