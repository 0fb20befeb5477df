"""A study: spec -> plan -> run -> resume. Trains pairs, measures them, writes what was found."""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mechinterp import files
from mechinterp.checkpoints.provenance import library_versions
from mechinterp.decisions import diagonal_utility, ex_post_shift
from mechinterp.spec import StudySpec, StudyTask, load_study
from mechinterp.steps import Step, checkpoint_path, remove_remains
from mechinterp.training.pool import Job, run_jobs

CONTROL = "symmetric"
REORDERED = "symmetric_reordered"  # the control with another order of the data: the null


@dataclass(frozen=True)
class Plan:
    """Every step of a study. `runs` maps (task, regime, arm, seed) to its training step."""

    spec: StudySpec
    runs: dict[tuple[str, str, str, int], Step]
    measures: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps once each: cells of a study may share one."""
        return tuple({step.key: step for step in (*self.runs.values(), *self.measures)}.values())


def make_plan(spec: StudySpec) -> Plan:
    """What a spec asks for; runs nothing."""
    runs: dict[tuple[str, str, str, int], Step] = {}
    measures: list[Step] = []
    for name in spec.tasks:
        for seed in range(spec.seeds):
            # The branched regime starts from the symmetric network that the other trains from init.
            for regime in ("from_init", "branched"):
                if regime == "branched" and regime not in spec.regimes:
                    continue
                for arm, objective in _trained_arms(spec, regime).items():
                    if regime not in spec.regimes and arm != CONTROL:
                        continue
                    start = runs[name, "from_init", CONTROL, seed] if regime == "branched" else None
                    runs[name, regime, arm, seed] = _train(
                        spec, name, regime, arm, seed, objective, start
                    )
            measures += _measures_of_seed(spec, name, seed, runs)
    return Plan(spec, runs, tuple(measures))


def _trained_arms(spec: StudySpec, regime: str) -> dict[str, dict[str, Any]]:
    arms: dict[str, dict[str, Any]] = {CONTROL: {"name": "cross_entropy"}}
    for name, weights in spec.weights.items():
        utility = [list(row) for row in diagonal_utility(weights)]
        arms[f"weighted_{name}"] = {"name": "utility_weighted", "utility": utility}
    if regime == "branched":
        arms[REORDERED] = {"name": "cross_entropy"}
    return arms


def _task_inputs(task: StudyTask) -> dict[str, Any]:
    return {"task": task.task, "settings": task.settings}


def _train(
    spec: StudySpec,
    name: str,
    regime: str,
    arm: str,
    seed: int,
    objective: dict[str, Any],
    start: Step | None,
) -> Step:
    task = spec.tasks[name]
    training = asdict(task.training_of(regime))
    training = {**training, "betas": list(training["betas"])}
    training["checkpoint_steps"] = list(training["checkpoint_steps"])
    # A branch sees other data than the run it starts from; REORDERED other data again.
    data_order = (regime == "branched") + (arm == REORDERED)
    inputs = {
        **_task_inputs(task),
        "training": training,
        "objective": objective,
        "seed": seed,
        "data_order": data_order,
        "model": asdict(task.model) if start is None else None,
        "start_step": task.init_steps if start else None,
    }
    labels = {"task": name, "regime": regime, "arm": arm, "seed": seed}
    return Step("train", inputs, labels, (start,) if start else ())


def _measures_of_seed(
    spec: StudySpec, name: str, seed: int, runs: dict[tuple[str, str, str, int], Step]
) -> Iterator[Step]:
    task = spec.tasks[name]
    common = {**_task_inputs(task), "analysis": task.analysis.model_dump(mode="json")}
    init_run = runs[name, "from_init", CONTROL, seed]
    final = {"from_init": task.init_steps, "branched": task.branch_steps}

    def labels(regime: str, arm: str, step: int) -> dict[str, Any]:
        return {"task": name, "regime": regime, "arm": arm, "seed": seed, "step": step}

    yield Step(
        "competence",
        {**common, "step": task.init_steps, "threshold": spec.competence},
        {"task": name, "regime": "from_init", "seed": seed},
        (init_run,),
    )
    for regime in spec.regimes:
        arms = list(_trained_arms(spec, regime))
        before = (init_run, 0 if regime == "from_init" else task.init_steps)
        for arm in arms:
            run = runs[name, regime, arm, seed]
            steps = task.training_of(regime).checkpoint_steps
            for step in (s for s in steps or () if s > 0):
                if arm == REORDERED and step < final[regime]:
                    continue
                at = labels(regime, arm, step)
                is_final = step == final[regime]
                yield from _checkpoint_steps(spec, common, arm, run, step, at, is_final=is_final)
        # Step 0 is one network for all arms of a regime.
        at = labels(regime, "before", 0)
        yield from _checkpoint_steps(spec, common, "before", *before, at, is_final=True)
        for arm in ["before", *arms]:
            run, step = (
                before if arm == "before" else (runs[name, regime, arm, seed], final[regime])
            )
            if regime == "branched" or arm != "before":
                at = labels(regime, arm, 0 if arm == "before" else step)
                yield Step("recovery", {**common, "step": step}, at, (run,))
        if regime == "branched":
            yield from _pair_steps(spec, common, name, seed, before, runs, labels, final[regime])


def _checkpoint_steps(
    spec: StudySpec,
    common: dict[str, Any],
    arm: str,
    run: Step,
    step: int,
    labels: dict[str, Any],
    *,
    is_final: bool,
) -> Iterator[Step]:
    """The measurements of one checkpoint: along the trajectory, and in full where an arm ends.

    A weighted arm is valued at its own costs, the others at all. The control is read once more per
    weighting with the ex-post shift: an arm without training.
    """
    all_costs = {name: list(weights) for name, weights in spec.costs.items()}
    own = f"w{arm.removeprefix('weighted_')}"
    costs = {own: all_costs[own]} if own in all_costs else all_costs
    readings: dict[str, Any] = {arm: {"costs": costs, "shift": None}}
    if arm == CONTROL:
        for name, weights in spec.weights.items():
            shift = ex_post_shift(diagonal_utility(weights)).tolist()
            cost = {f"w{name}": list(weights)}
            readings[f"ex_post_{name}"] = {"costs": cost, "shift": shift}
    analysis = common["analysis"]
    sizes = {analysis["trajectory_items"]: False}
    if is_final:
        sizes[analysis["ladder_items"]] = True
    for n_items, full in sizes.items():
        inputs = {
            **common,
            "step": step,
            "readings": readings,
            "n_items": n_items,
            "with_latents": is_final,
            "with_probes": n_items == analysis["trajectory_items"],
        }
        # The readings name the arms, so the label must not.
        at = {key: value for key, value in labels.items() if key != "arm"}
        yield Step("checkpoint", inputs, {**at, "in_full": full}, (run,))


def _pair_steps(
    spec: StudySpec,
    common: dict[str, Any],
    name: str,
    seed: int,
    before: tuple[Step, int],
    runs: dict[tuple[str, str, str, int], Step],
    labels: Any,
    final: int,
) -> Iterator[Step]:
    """Crossings and cross-checkpoint patches: before with each arm, and the controls' null."""
    costs = {cost: list(weights) for cost, weights in spec.costs.items()}
    for arm in _trained_arms(spec, "branched"):
        run = runs[name, "branched", arm, seed]
        null = arm == REORDERED
        first, at = (runs[name, "branched", CONTROL, seed], final) if null else before
        own = f"w{arm.removeprefix('weighted_')}"
        inputs = {
            **common,
            "steps": [at, final],
            "costs": {own: costs[own]} if own in costs else costs,
            "with_patches": not null,
            "margin": spec.margin,
        }
        yield Step("pair", inputs, {**labels("branched", arm, final), "null": null}, (first, run))


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
    spec = load_study(path, preset=preset)
    out = Path(out)
    plan = make_plan(spec)
    missing = [step for step in plan.steps if not step.is_done(out)]
    seconds = _run(missing, plan, out, n_workers)
    digest = files.value_hash([step.key for step in plan.steps])
    if missing or not _is_assembled(out, digest):
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


def _run(missing: list[Step], plan: Plan, out: Path, n_workers: int) -> float:
    begun = time.monotonic()
    remove_remains(out)
    if missing:
        _link_runs(plan, out)
        done = len(plan.steps) - len(missing)
        print(
            f"{plan.spec.name}: {len(missing)} steps to do, {done} done before, "
            f"{n_workers} at a time",
            file=sys.stderr,
        )
        for _ in run_jobs([s.job(out) for s in missing], n_workers=n_workers, label="study"):
            pass
    return time.monotonic() - begun


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
    from mechinterp.report import write_report

    print(f"{plan.spec.name}: tables, figures, report", file=sys.stderr)
    (out / "manifest.json").unlink(missing_ok=True)
    tables = study_tables(plan, out)
    for name, table in tables.items():
        files.write_table(out / "tables" / f"{name}.parquet", table)
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
        "spec": plan.spec.model_dump(mode="json"),
        "training": _training_as_run(plan.spec),
        "versions": {**library_versions(), "python": platform.python_version()},
        "machine": {"platform": platform.platform(), "processor": platform.machine()},
        "seeds": list(range(plan.spec.seeds)),
        "checkpoints": _checkpoint_hashes(plan, out),
        "tables": {name: files.file_hash(out / "tables" / f"{name}.parquet") for name in tables},
        "seconds": _seconds_by_kind(plan, out),
        "seconds_of_last_run": round(seconds, 1),
        "not_powered": not_powered,
    }
    files.write_json(out / "manifest.json", manifest)
    write_report(out, title=plan.spec.question or plan.spec.name)


def _training_as_run(spec: StudySpec) -> dict[str, Any]:
    """Every task's training in each regime, with the steps that the spec's lengths give it."""
    return {
        name: {regime: asdict(task.training_of(regime)) for regime in spec.regimes}
        for name, task in spec.tasks.items()
    }


def _write_task_file(path: Path, task: StudyTask, spec: StudySpec) -> None:
    """A task file with which `mechinterp compare` repeats the study's measurements."""
    import yaml

    content = {
        "task": task.task,
        "settings": task.settings,
        "costs": {name: list(weights) for name, weights in spec.costs.items()},
        "analysis": task.analysis.model_dump(mode="json"),
    }
    files.write_text(path, yaml.safe_dump(content, sort_keys=False))


def _link_runs(plan: Plan, out: Path) -> None:
    """What a user looks for, from the start: `tasks/<task>.yaml`, and
    `checkpoints/<task>/<regime>/<arm>/seed-<n>`, which leads to the run's trajectory."""
    for name, spec in plan.spec.tasks.items():
        _write_task_file(out / "tasks" / f"{name}.yaml", spec, plan.spec)
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
        for name, weights in plan.spec.weights.items():
            shifted = checkpoint_path_of(out, task, regime, f"ex_post_{name}", seed, n_steps)
            if not shifted.exists():
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
