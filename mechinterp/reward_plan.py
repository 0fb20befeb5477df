"""A study of training by reward as steps: starts, pools, arms, and what is measured on each.

Its decisions are measured as those of any study are (`mechinterp.study_plan`): the start is
"before", the control, which goes on with the warm-up, is `symmetric`, and an arm bears the name of
its advantage, such as `hard_standardised`, where the study has more than one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from mechinterp.arms import CONTROL, REORDERED, SYMMETRIC, Arm
from mechinterp.checkpoints import open_checkpoint
from mechinterp.reward_spec import RewardArm, RewardStudySpec
from mechinterp.spec import AnalysisSpec, StudySpec, StudyTask, TaskSpec
from mechinterp.steps import Step, task_inputs
from mechinterp.study_plan import Plan, measures_of_seed

BRANCHED, FROM_INIT = "branched", "from_init"


def make_reward_plan(spec: RewardStudySpec) -> Plan:
    """What the spec asks for; runs nothing."""
    study = _decisions(spec)
    arms = _arms(spec)
    known = {BRANCHED: {arm: Arm(SYMMETRIC) for arm in arms}, FROM_INIT: {CONTROL: Arm(SYMMETRIC)}}
    runs: dict[tuple[str, str, str, int], Step] = {}
    measures: list[Step] = []
    beginning = _beginning(spec)
    for seed in range(spec.seeds):
        start_seed = 0 if spec.shared_start else seed
        start = _warm_up(spec, start_seed, beginning)
        rates = _pass_rates(spec, start_seed, start) if spec.candidates else None
        if rates is not None and seed == start_seed:
            measures.append(rates)
        trained = {
            name: _train(spec, seed, name, arm, advantage, start, rates)
            for name, (arm, advantage) in arms.items()
        }
        for name in study.tasks:
            runs[name, FROM_INIT, CONTROL, seed] = start
            runs |= {(name, BRANCHED, arm, seed): step for arm, step in trained.items()}
            measures += measures_of_seed(study, name, seed, runs, known)
        measures += _writing(spec, seed, start, trained)
    training = {
        "warm_up": spec.warm_up.training.as_inputs(),
        **{arm: runs[next(iter(study.tasks)), BRANCHED, arm, 0].inputs["training"] for arm in arms},
    }
    return Plan(study, runs, tuple(measures), spec.model_dump(mode="json"), training)


def _decisions(spec: RewardStudySpec) -> StudySpec:
    """The part of the study that measures decisions, as a study of its own."""
    last = spec.common.optimizer.n_steps
    tasks = {
        name: StudyTask(
            **{**task.model_dump(exclude_unset=True), "analysis": _without_objectives(task)},
            init_steps=spec.warm_up.training.n_steps,
            branch_steps=last,
            n_checkpoints=spec.n_measured,
        )
        for name, task in spec.tasks.items()
    }
    shared = ("name", "question", "seeds", "margin", "competence", "seeds_for_claims", "claims")
    return StudySpec(
        **{field: getattr(spec, field) for field in shared},
        regimes=(BRANCHED,),
        weights={},
        arms=(),
        tasks=tasks,
    )


def _without_objectives(task: TaskSpec) -> AnalysisSpec:
    """Gradients are those of losses on decisions, which no arm here is trained on."""
    return task.analysis.model_copy(update={"gradient_items": 0})


def _arms(spec: RewardStudySpec) -> dict[str, tuple[RewardArm, str]]:
    """Every trained arm by name, the control first, with its advantage."""
    first = spec.advantages[0]
    arms = {name: (RewardArm(pool=None, supervised=True), first) for name in (CONTROL, REORDERED)}
    for name, arm in spec.arms.items():
        if arm.supervised or len(spec.advantages) == 1:
            arms[name] = (arm, first)
        else:
            arms |= {f"{name}_{advantage}": (arm, advantage) for advantage in spec.advantages}
    return arms


def _labels(spec: RewardStudySpec, seed: int, arm: str, **more: Any) -> dict[str, Any]:
    return {"task": spec.task, "regime": BRANCHED, "arm": arm, "seed": seed, **more}


def _task_inputs(spec: RewardStudySpec, settings: dict[str, Any] | None = None) -> dict[str, Any]:
    return task_inputs(spec.task, {**spec.settings, **(settings or {})})


def _adapters(spec: RewardStudySpec) -> dict[str, Any]:
    return {"adapters": spec.adapters.model_dump(mode="json")} if spec.adapters else {}


def _warm_up(spec: RewardStudySpec, seed: int, beginning: dict[str, Any]) -> Step:
    inputs = {
        **_task_inputs(spec, spec.warm_up.settings),
        **_adapters(spec),
        "levels": list(spec.warm_up.levels),
        "training": spec.warm_up.training.as_inputs(),
        **beginning,
        "seed": seed,
        "data_order": 0,
        "start_step": None,
    }
    labels = {"task": spec.task, "regime": FROM_INIT, "arm": CONTROL, "seed": seed}
    return Step("warm_up", inputs, labels)


def _beginning(spec: RewardStudySpec) -> dict[str, Any]:
    """What the warm-up begins at: a random network, or the weights of a checkpoint."""
    if spec.start is None:
        return {"model": asdict(spec.model)}
    content = open_checkpoint(spec.start).content_hash
    return {"model": None, "start": {"path": spec.start, "content_hash": content}}


def _pass_rates(spec: RewardStudySpec, seed: int, start: Step) -> Step:
    assert spec.candidates is not None
    inputs = {
        **_task_inputs(spec),
        "candidates": spec.candidates.model_dump(mode="json"),
        "temperature": spec.common.temperature,
        "max_new_tokens": spec.common.max_new_tokens,
        "step": spec.warm_up.training.n_steps,
        "seed": seed,
    }
    return Step("pass_rates", inputs, _labels(spec, seed, "before", step=0), (start,))


def _train(
    spec: RewardStudySpec,
    seed: int,
    name: str,
    arm: RewardArm,
    advantage: str,
    start: Step,
    rates: Step | None,
) -> Step:
    common = {"seed": seed, "start_step": spec.warm_up.training.n_steps, **_adapters(spec)}
    labels = _labels(spec, seed, name)
    if arm.supervised:
        # The control sees the start's own problems, an arm of its own the study's.
        own = name not in (CONTROL, REORDERED)
        inputs = {
            **_task_inputs(spec, None if own else spec.warm_up.settings),
            "levels": [] if own else list(spec.warm_up.levels),
            "training": spec.common.optimizer.as_inputs(),
            "model": None,
            "data_order": 2 if name == REORDERED else 1,
            **common,
        }
        return Step("warm_up", inputs, labels, (start,))
    pool = spec.pools[arm.pool] if arm.pool else None
    inputs = {
        **_task_inputs(spec),
        "training": spec.config_of(arm, advantage).as_inputs(),
        "pool": None if pool is None else pool.model_dump(mode="json"),
        **common,
    }
    after = (start,) if pool is None or rates is None else (start, rates)
    return Step("reward", inputs, labels, after)


def _writing(
    spec: RewardStudySpec, seed: int, start: Step, trained: dict[str, Step]
) -> Iterator[Step]:
    """What checkpoints write: along the trajectory, and the start's once."""
    sampling = {
        "temperature": spec.common.temperature,
        "max_new_tokens": spec.common.max_new_tokens,
        "start_step": spec.warm_up.training.n_steps,
    }
    last = spec.common.optimizer.n_steps
    measured = [("before", start, spec.warm_up.training.n_steps, 0)]
    for arm, run in trained.items():
        steps = [last] if arm == REORDERED else spec.common.optimizer.steps
        measured += [(arm, run, step, step) for step in steps if step > 0]
    for arm, run, own_step, step in measured:
        labels = _labels(spec, seed, arm, step=step)
        inputs = {**sampling, "step": own_step}
        if spec.abilities:
            sizes = {"problems": spec.problems, "samples": spec.samples}
            sets = {
                name: {**ability.model_dump(mode="json"), **_task_inputs(spec, ability.settings)}
                for name, ability in spec.abilities.items()
            }
            yield Step("writing", {**inputs, **sizes, "sets": sets}, labels, (run, start))
        if spec.questions:
            asked = {
                name: _task_inputs(spec, settings) for name, settings in spec.questions.items()
            }
            more = {"questions": asked, "n_questions": spec.n_questions, "seed": seed}
            yield Step("confidence", {**inputs, **more}, labels, (run,))
        for name in spec.texts if step == last else ():
            task = spec.tasks[name]
            yield Step("texts", {**inputs, **task.inputs}, {**labels, "task": name}, (start, run))
