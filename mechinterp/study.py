"""A study: spec -> plan -> run -> resume. Trains pairs, measures them, writes what was found."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from mechinterp import files
from mechinterp.arms import CONTROL
from mechinterp.checkpoints.provenance import versions_and_machine
from mechinterp.decisions import diagonal_utility, ex_post_shift
from mechinterp.plans import load_plan
from mechinterp.spec import StudyTask, Weights
from mechinterp.steps import checkpoint_path, run_missing
from mechinterp.study_plan import Plan
from mechinterp.training.pool import Job, run_jobs


def run_study(
    path: str | Path,
    *,
    out: str | Path,
    preset: str | None = None,
    n_workers: int = 2,
    command: str = "",
) -> Path:
    """Do what is not yet done of the study at `path`; returns the report's path.

    Whatever was finished before, by a run that was killed or by another preset, is kept and used.
    """
    plan = load_plan(path, preset=preset)
    out = Path(out)
    begun = time.monotonic()
    if not all(step.is_done(out) for step in plan.steps):
        _link_runs(plan, out)
    n_run = run_missing(plan.steps, out, n_workers=n_workers, name=plan.spec.name)
    seconds = time.monotonic() - begun
    digest = files.value_hash([plan.described, [[s.key, s.labels] for s in plan.steps]])
    if n_run or not _is_assembled(out, digest):
        _assemble(
            plan,
            out,
            digest=digest,
            preset=preset,
            n_workers=n_workers,
            command=command,
            seconds=seconds,
        )
    return out / "report.html"


def _is_assembled(out: Path, digest: str) -> bool:
    manifest = out / "manifest.json"
    if not (manifest.is_file() and (out / "report.html").is_file()):
        return False
    return files.read_json(manifest).get("plan") == digest


def _assemble(
    plan: Plan,
    out: Path,
    *,
    digest: str,
    preset: str | None,
    n_workers: int,
    command: str,
    seconds: float,
) -> None:
    """Tables, figures, manifest and report from the steps' results.

    The manifest is written after tables and figures: its presence says that they are whole.
    """
    from figures import NAMES
    from mechinterp.assemble import study_tables
    from mechinterp.findings import summarise_study
    from mechinterp.report import write_report, write_tables

    print(f"{plan.spec.name}: tables, figures, report", file=sys.stderr)
    (out / "manifest.json").unlink(missing_ok=True)
    tables = study_tables(plan, out)
    write_tables(out, tables)
    _write_ex_post_arms(plan, out)
    folders = {"tables_dir": str(out / "tables"), "out_dir": str(out / "figures")}
    jobs = [Job(name, "figures.draw_all", {**folders, "names": [name]}) for name in NAMES]
    for _ in run_jobs(jobs, n_workers=n_workers, label="figures"):
        pass
    summary, not_powered = summarise_study(plan.spec, tables)
    files.write_json(out / "summary.json", summary)
    manifest = {
        "study": plan.spec.name,
        "plan": digest,
        "preset": preset,
        "command": command,
        "spec": plan.described,
        "training": plan.training,
        **versions_and_machine(),
        "seeds": list(range(plan.spec.seeds)),
        "checkpoints": _checkpoint_hashes(plan, out),
        "tables": {name: files.file_hash(out / "tables" / f"{name}.parquet") for name in tables},
        "seconds": _seconds_by_kind(plan, out),
        "seconds_of_last_run": round(seconds, 1),
        "not_powered": not_powered,
    }
    files.write_json(out / "manifest.json", manifest)
    write_report(out, title=plan.spec.question or plan.spec.name)


def _write_task_file(path: Path, task: StudyTask, weights: dict[str, Weights]) -> None:
    """A task file with which `mechinterp compare` repeats the study's measurements."""
    import yaml

    content = {
        "task": task.task,
        "settings": task.settings,
        "costs": {f"w{name}": list(values) for name, values in weights.items()},
        "analysis": task.analysis.model_dump(mode="json"),
    }
    files.write_text(path, yaml.safe_dump(content, sort_keys=False))


def _link_runs(plan: Plan, out: Path) -> None:
    """What a user looks for, from the start: `tasks/<task>.yaml`, and
    `checkpoints/<task>/<regime>/<arm>/seed-<n>`, which leads to the run's trajectory."""
    for name, spec in plan.spec.tasks.items():
        costs = plan.spec.weights_of(name)
        _write_task_file(out / "tasks" / f"{name}.yaml", spec, costs)
    for (task, regime, arm, seed), step in plan.runs.items():
        link = out / "checkpoints" / task / regime / arm / f"seed-{seed}"
        target = Path("../../../..") / step.directory(out).relative_to(out) / "trajectory"
        link.parent.mkdir(parents=True, exist_ok=True)
        if link.is_symlink() or link.exists():
            link.unlink()
        link.symlink_to(target)


def _write_ex_post_arms(plan: Plan, out: Path) -> None:
    """Ex-post arms, the control with a shift in its provenance, at their last step."""
    from mechinterp.checkpoints import open_checkpoint, with_action_shift

    for (task, regime, arm, seed), step in plan.runs.items():
        if arm != CONTROL or regime not in plan.spec.regimes:
            continue
        n_steps = plan.spec.tasks[task].training_of(regime).n_steps
        for name, weights in plan.spec.weights_of(task).items():
            shifted = checkpoint_path_of(out, task, regime, f"ex_post_{name}", seed, n_steps)
            control = open_checkpoint(checkpoint_path(step.directory(out), n_steps))
            shift = ex_post_shift(diagonal_utility(weights)).tolist()
            with_action_shift(control, shifted, shift)


def checkpoint_path_of(out: Path, task: str, regime: str, arm: str, seed: int, step: int) -> Path:
    """Where a user finds a checkpoint of the study."""
    return out / "checkpoints" / task / regime / arm / f"seed-{seed}" / f"step-{step:06d}"


def _checkpoint_hashes(plan: Plan, out: Path) -> dict[str, str]:
    from mechinterp.checkpoints import open_checkpoint

    hashes = {}
    for (task, regime, arm, seed), run in plan.runs.items():
        n_steps = plan.spec.tasks[task].training_of(regime).n_steps
        path = checkpoint_path_of(out, task, regime, arm, seed, n_steps)
        checkpoint = open_checkpoint(checkpoint_path(run.directory(out), n_steps))
        hashes[str(path.relative_to(out))] = checkpoint.content_hash
    return hashes


def _seconds_by_kind(plan: Plan, out: Path) -> dict[str, float]:
    """Worker seconds spent on each kind of step and task."""
    total: dict[str, float] = {}
    for step in plan.steps:
        name = f"{step.kind}, {step.labels['task']}"
        total[name] = total.get(name, 0.0) + step.record(out)["seconds"]
    return {name: round(seconds, 1) for name, seconds in sorted(total.items())}
