"""What a study asks for, as steps: which networks are trained, and what is measured on each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mechinterp.arms import CONTROL, REORDERED, Arm, trained_arms
from mechinterp.decisions import diagonal_utility, ex_post_shift
from mechinterp.spec import AnalysisSpec, StudySpec
from mechinterp.steps import Step


@dataclass(frozen=True)
class Plan:
    """Every step of a study. `runs` maps (task, regime, arm, seed) to its training step.

    `described` is the file that asked for it, and `training` the settings of its training, as a
    manifest has them; both are those of `spec` unless it is part of a larger study.
    """

    spec: StudySpec
    runs: dict[tuple[str, str, str, int], Step]
    measures: tuple[Step, ...]
    described: dict[str, Any]
    training: dict[str, Any]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps once each, for cells of a study may share one; task by task, so that a study
        which was stopped has whole tasks."""
        places = {name: place for place, name in enumerate(self.spec.tasks)}
        steps: dict[str, Step] = {}
        for step in (*self.runs.values(), *self.measures):
            steps.setdefault(step.key, step)
        return tuple(sorted(steps.values(), key=lambda s: places.get(s.labels["task"], -1)))


def make_plan(spec: StudySpec) -> Plan:
    """What a spec asks for; runs nothing."""
    runs: dict[tuple[str, str, str, int], Step] = {}
    measures: list[Step] = []
    for name in spec.tasks:
        arms = {regime: arms_of(spec, name, regime) for regime in ("from_init", "branched")}
        for seed in range(spec.seeds):
            # The branched regime starts from the symmetric network that the other trains from init.
            for regime in ("from_init", "branched"):
                if regime == "branched" and regime not in spec.regimes:
                    continue
                for arm, how in arms[regime].items():
                    if regime not in spec.regimes and arm != CONTROL:
                        continue
                    start = runs[name, "from_init", CONTROL, seed] if regime == "branched" else None
                    runs[name, regime, arm, seed] = _train(
                        spec, name, regime, arm, seed, how, start
                    )
            measures += measures_of_seed(spec, name, seed, runs, arms)
    training = {
        name: {regime: task.training_of(regime).as_inputs() for regime in spec.regimes}
        for name, task in spec.tasks.items()
    }
    return Plan(spec, runs, tuple(measures), spec.model_dump(mode="json"), training)


def arms_of(spec: StudySpec, name: str, regime: str) -> dict[str, Arm]:
    """The trained arms of a task in a regime, the control first."""
    task = spec.tasks[name]
    return trained_arms(
        task.arms or spec.arms, spec.weights_of(name), regime=regime, task=task.make()
    )


def _train(
    spec: StudySpec,
    name: str,
    regime: str,
    arm: str,
    seed: int,
    how: Arm,
    start: Step | None,
) -> Step:
    task = spec.tasks[name]
    # A branch sees other data than the run it starts from; REORDERED other data again.
    data_order = (regime == "branched") + (arm == REORDERED)
    inputs = {
        **task.inputs,
        "training": task.training_of(regime).as_inputs(),
        "objective": how.objective,
        "seed": seed,
        "data_order": data_order,
        "model": asdict(task.model) if start is None else None,
        "start_step": task.init_steps if start else None,
    }
    if how.sampling is not None:
        inputs["sampling"] = how.sampling
    if how.learning_rates:
        inputs["learning_rates"] = list(how.learning_rates)
    labels = {"task": name, "regime": regime, "arm": arm, "seed": seed}
    return Step("train", inputs, labels, (start,) if start else ())


def measures_of_seed(
    spec: StudySpec,
    name: str,
    seed: int,
    runs: dict[tuple[str, str, str, int], Step],
    arms_by_regime: dict[str, dict[str, Arm]],
) -> Iterator[Step]:
    task = spec.tasks[name]
    # Without defaults: what is done stays done when an analysis learns a new option.
    analysis = task.analysis.model_dump(mode="json", exclude_defaults=True)
    common = {**task.inputs, "analysis": analysis}
    init_run = runs[name, "from_init", CONTROL, seed]
    final = {"from_init": task.init_steps, "branched": task.branch_steps}
    shifts = _shifts_of(spec, name)

    def labels(regime: str, arm: str, step: int) -> dict[str, Any]:
        return {"task": name, "regime": regime, "arm": arm, "seed": seed, "step": step}

    yield Step(
        "competence",
        {**common, "step": task.init_steps, "threshold": task.competence or spec.competence},
        {"task": name, "regime": "from_init", "seed": seed},
        (init_run,),
    )
    for regime in spec.regimes:
        arms = arms_by_regime[regime]
        before = (init_run, 0 if regime == "from_init" else task.init_steps)
        for arm, how in arms.items():
            run = runs[name, regime, arm, seed]
            for step in (s for s in task.training_of(regime).steps if s > 0):
                if arm == REORDERED and step < final[regime]:
                    continue
                at = labels(regime, arm, step)
                is_final = step == final[regime]
                readings = _readings(spec, name, arm, how, is_final=is_final)
                yield from _checkpoint_steps(
                    common, task.analysis, readings, run, step, at, is_final=is_final
                )
                if task.analysis.gradient_items:
                    yield from _gradient_steps(common, shifts, arms, arm, run, step, at)
        # Step 0 is one network for all arms of a regime.
        at = labels(regime, "before", 0)
        readings = _readings(spec, name, "before", None, is_final=True)
        yield from _checkpoint_steps(common, task.analysis, readings, *before, at, is_final=True)
        if task.analysis.gradient_items:
            at = labels(regime, CONTROL, 0)
            yield from _gradient_steps(common, shifts, arms, CONTROL, *before, at)
        for arm in ["before", *arms]:
            run, step = (
                before if arm == "before" else (runs[name, regime, arm, seed], final[regime])
            )
            if regime == "branched" or arm != "before":
                at = labels(regime, arm, 0 if arm == "before" else step)
                yield Step("recovery", {**common, "step": step}, at, (run,))
        if regime == "branched" and task.analysis.crossing_items:
            for arm, how in arms.items():
                reference = (
                    (runs[name, regime, CONTROL, seed], final[regime])
                    if arm == REORDERED
                    else before
                )
                run = runs[name, regime, arm, seed]
                at = labels(regime, arm, final[regime])
                yield _pair_step(spec, common, name, arm, how, reference, (run, final[regime]), at)


def _shifts_of(spec: StudySpec, name: str) -> dict[str, list[float]]:
    """By weighting, what adjusts the control's logits to it."""
    return {
        label: ex_post_shift(diagonal_utility(values)).tolist()
        for label, values in spec.weights_of(name).items()
    }


def _readings(
    spec: StudySpec, name: str, arm: str, how: Arm | None, *, is_final: bool
) -> dict[str, dict[str, Any]]:
    """The ways in which a checkpoint of an arm is read, by the arm that each stands for.

    An arm that serves one weighting is valued at its costs, the others at all. The control is read
    once more per weighting with the ex-post shift, and where it ends with every refit of its last
    layer: arms without training.
    """
    weights = spec.weights_of(name)
    all_costs = {f"w{label}": list(values) for label, values in weights.items()}
    shifts = _shifts_of(spec, name)
    if how is not None and how.weights is not None:
        own = f"w{how.weights}"
        shift = shifts[how.weights] if how.adjusted else None
        return {arm: {"costs": {own: all_costs[own]}, "shift": shift}}
    readings: dict[str, dict[str, Any]] = {arm: {"costs": all_costs, "shift": None}}
    if arm != CONTROL:
        return readings
    for label in weights:
        cost = {f"w{label}": all_costs[f"w{label}"]}
        readings[f"ex_post_{label}"] = {"costs": cost, "shift": shifts[label]}
        for refit in spec.refits if is_final else ():
            readings[f"{refit}_{label}"] = {"costs": cost, "shift": None, "refit": refit}
    return readings


def _checkpoint_steps(
    common: dict[str, Any],
    analysis: AnalysisSpec,
    readings: dict[str, dict[str, Any]],
    run: Step,
    step: int,
    labels: dict[str, Any],
    *,
    is_final: bool,
) -> Iterator[Step]:
    """The measurements of one checkpoint: along the trajectory, and in full where an arm ends."""
    sizes = [(analysis.trajectory_items, False)]
    if is_final:
        sizes.append((analysis.ladder_items, True))
    for n_items, full in sizes:
        inputs = {
            **common,
            "step": step,
            "readings": readings,
            "n_items": n_items,
            "with_latents": is_final,
            "with_probes": not full,
        }
        # The readings name the arms, so the label must not.
        at = {key: value for key, value in labels.items() if key != "arm"}
        yield Step("checkpoint", inputs, {**at, "in_full": full}, (run,))


def _gradient_steps(
    common: dict[str, Any],
    shifts: dict[str, list[float]],
    arms: dict[str, Arm],
    arm: str,
    run: Step,
    step: int,
    labels: dict[str, Any],
) -> Iterator[Step]:
    """At the control's checkpoints every objective of the study, by the arm that trains on it; at
    those of weighted arms their own, beside the symmetric one.

    The control is shifted to the costs that an objective serves: else most of its gradient would
    be the threshold that the control lacks.
    """
    objectives: dict[str, Any] = {CONTROL: {"objective": arms[CONTROL].objective, "shift": None}}
    if arm == CONTROL:
        for name, how in arms.items():
            if how.has_own_objective:
                shift = shifts[how.weights] if how.weights else None
                objectives[name] = {"objective": how.objective, "shift": shift}
    elif arms[arm].has_own_objective and arms[arm].objective["name"] == "utility_weighted":
        objectives[arm] = {"objective": arms[arm].objective, "shift": None}
    else:
        return
    inputs = {**common, "step": step, "objectives": objectives}
    yield Step("gradients", inputs, labels, (run,))


def _pair_step(
    spec: StudySpec,
    common: dict[str, Any],
    name: str,
    arm: str,
    how: Arm,
    reference: tuple[Step, int],
    after: tuple[Step, int],
    labels: dict[str, Any],
) -> Step:
    """Crossing, cross-checkpoint patches, circuits: before with an arm, or the controls' null."""
    null = arm == REORDERED
    costs = {f"w{label}": list(values) for label, values in spec.weights_of(name).items()}
    inputs = {
        **common,
        "steps": [reference[1], after[1]],
        "costs": costs if how.weights is None else {f"w{how.weights}": costs[f"w{how.weights}"]},
        "with_patches": not null,
        "margin": spec.margin,
    }
    return Step("pair", inputs, {**labels, "null": null}, (reference[0], after[0]))
