"""What a study of training by reward asks for: one start per seed, arms, and what is measured.

`mechinterp study SPEC` reads such a file by its line `kind: reward`. `mechinterp.reward_plan` makes
steps of it, whose measurements are those of any study and those of writing.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, field_validator

from mechinterp import tasks
from mechinterp.arm_names import CONTROL, REORDERED, kind_and_advantage
from mechinterp.errors import CheckpointError, SpecError, TaskError, TrainingError
from mechinterp.spec import (
    Claim,
    SpecWithPresets,
    StrictModel,
    TaskSpec,
    chosen,
    known_keys,
    load_with_preset,
    overlay,
)
from mechinterp.tasks.written import WrittenTask
from mechinterp.training.config import ModelConfig, TrainingConfig, log_spaced_steps
from mechinterp.training.rewarded_config import Reward, RewardedConfig

Made = TypeVar("Made")
MIN_STEPS = 8
RESERVED = (CONTROL, REORDERED, "before")
OF_STUDY = {
    "advantage": "arms are trained with each of the study's advantages; name it there",
    "optimizer.checkpoint_steps": "follow from n_checkpoints and n_measured; set these",
}
OF_ALL_ARMS = {"optimizer.n_steps": "arms are compared at equal steps; set the study's training"}
Share = Annotated[float, Field(ge=0, le=1)]


class Pool(StrictModel):
    """Which of the candidate problems an arm is trained on: those whose measured pass rate under
    the start lies in (above, to], of which `size` are drawn; a share `planted` has the shortcut.

    A pool that is not `solvable` marks everything wrong: no reward, and so no gradient.
    """

    above: float = Field(-1.0, description="-1: with those that were never solved")
    to: Share = 1.0
    size: int = Field(256, ge=1)
    planted: Share = 0.0
    solvable: bool = True


class Candidates(StrictModel):
    """Problems whose pass rate is measured, from `samples` samples each, to make pools of.

    All are sampled `screening` times; those with a screened rate up to `rare`, from which rare
    successes are told from none, `samples` times."""

    n: int = Field(2_000, ge=8)
    planted: Share = 0.5
    screening: int = Field(64, ge=1)
    samples: int = Field(512, ge=1)
    rare: Share = 0.1


class WarmUp(StrictModel):
    """Supervised training on right texts of `levels` (none: all), which makes the start."""

    levels: tuple[int, ...] = ()
    settings: dict[str, Any] = Field(default_factory=dict, description="laid over the study's")
    training: Annotated[TrainingConfig, known_keys(TrainingConfig)] = TrainingConfig()


class LowRank(StrictModel):
    """Adapters of every matrix in every layer, which are trained in the place of the weights."""

    rank: int = Field(8, ge=1)


class RewardArm(StrictModel):
    """What an arm differs in: its pool by name, and fields of the study's `training`; or it is
    `supervised`, by right texts of the study's own settings."""

    pool: str | None = Field(None, description="none: fresh problems of all levels")
    training: dict[str, Any] = Field(default_factory=dict)
    supervised: bool = False


class Ability(StrictModel):
    """Fresh problems on which writing is measured: their levels, and the share with a shortcut."""

    levels: tuple[int, ...] = ()
    planted: Share = 0.0
    settings: dict[str, Any] = Field(default_factory=dict, description="laid over the study's")


class RewardStudySpec(SpecWithPresets):
    """Seeds x arms of training by reward, from one start per seed or for all.

    Every arm is trained once for each of `advantages`. The control goes on with the warm-up's own
    problems and loss for as many steps. `tasks` are the decisions on which representation and use
    are measured, `abilities` the problems on which writing is, `problems` of each with `samples`.
    """

    kind: Literal["reward"]
    name: str
    question: str = ""
    seeds: int = Field(8, ge=1)
    task: str
    settings: dict[str, Any] = Field(default_factory=dict)
    model: Annotated[ModelConfig, known_keys(ModelConfig)] = ModelConfig()
    start: str | None = Field(
        None, description="a checkpoint's directory: the warm-up begins there, not at `model`"
    )
    adapters: LowRank | None = Field(None, description="none: all weights are trained")
    shared_start: bool = Field(False, description="one warm-up for all seeds, not one for each")
    warm_up: WarmUp = WarmUp()
    candidates: Candidates | None = None
    pools: dict[str, Pool] = Field(default_factory=dict)
    arms: dict[str, RewardArm]
    advantages: tuple[str, ...] = ("standardised",)
    training: dict[str, Any] = Field(
        default_factory=dict, description="see `mechinterp.training.rewarded_config`"
    )
    n_checkpoints: int = Field(4, ge=1, description="log-spaced, at which writing is measured")
    n_measured: int = Field(1, ge=1, description="the same, at which decisions are")
    abilities: dict[str, Ability] = Field(default_factory=dict)
    problems: int = Field(256, ge=2)
    samples: int = Field(8, ge=1)
    tasks: dict[str, TaskSpec] = Field(default_factory=dict)
    texts: tuple[str, ...] = Field((), description="names of tasks, see `analyses.text_sources`")
    questions: dict[str, dict[str, Any]] = Field(
        default_factory=dict, description="by name, settings laid over the study's: shifts"
    )
    n_questions: int = Field(4_000, ge=60)
    only: tuple[str, ...] = Field((), description="names of the arms to train; none: all")
    margin: float = Field(0.05, gt=0)
    competence: float = Field(0.9, gt=0, le=1)
    seeds_for_claims: int = Field(8, ge=2)
    claims: dict[str, Claim] = Field(default_factory=dict)

    @field_validator("task")
    @classmethod
    def _written(cls, name: str) -> str:
        if not issubclass(tasks.task_class(name), WrittenTask):
            raise ValueError(f"task {name!r} has no written answers to reward")
        return name

    def make(self, **settings: Any) -> WrittenTask:
        return tasks.get(self.task, **{**self.settings, **settings})  # type: ignore[return-value]

    def config_of(self, arm: RewardArm, advantage: str) -> RewardedConfig:
        """An arm's training; raises TrainingError where a setting is wrong."""
        values = overlay(overlay({"advantage": advantage}, self.training), arm.training)
        optimizer = overlay(asdict(RewardedConfig().optimizer), values.get("optimizer", {}))
        optimizer["checkpoint_steps"] = sorted(
            {
                step
                for n in (self.n_checkpoints, self.n_measured)
                for step in log_spaced_steps(optimizer["n_steps"], n)
            }
        )
        values["optimizer"] = _make(TrainingConfig, optimizer, where="optimizer")
        values["reward"] = _make(Reward, values.get("reward", {}), where="reward")
        return _make(RewardedConfig, values, where="training")

    @property
    def common(self) -> RewardedConfig:
        """What arms have unless they say otherwise; the control takes its steps."""
        return self.config_of(RewardArm(pool=None), self.advantages[0])


def _make(kind: type[Made], values: dict[str, Any], *, where: str) -> Made:
    """A dataclass of these fields; raises TrainingError naming one that it lacks."""
    known = sorted(field.name for field in fields(kind))  # type: ignore[arg-type]
    if unknown := sorted(set(values) - set(known)):
        raise TrainingError(f"{where}: unknown key {unknown[0]!r}; known: {', '.join(known)}")
    try:
        return kind(**values)
    except TypeError as error:
        raise TrainingError(f"{where}: {error}") from error


def load_reward_study(path: str | Path, *, preset: str | None = None) -> RewardStudySpec:
    """A reward study's spec with one of its presets laid over it; raises SpecError."""
    spec = load_with_preset(RewardStudySpec, path, preset)
    arms = {name: spec.arms[name] for name in chosen(spec.only, spec.arms, source=path)}
    _refuse(f"{path}: training", spec.training, OF_STUDY)
    for name, arm in arms.items():
        _check_arm(f"{path}: arms.{name}", name, arm)
        if arm.pool is not None and arm.pool not in spec.pools:
            raise SpecError(
                f"{path}: arms.{name}.pool: no pool {arm.pool!r}; the study has: "
                f"{', '.join(spec.pools) or 'none'}"
            )
        try:
            for advantage in spec.advantages:
                spec.config_of(arm, advantage)
        except TrainingError as error:
            raise SpecError(f"{path}: arms.{name}: {error}") from error
    lengths = {
        "warm_up.training.n_steps": spec.warm_up.training.n_steps,
        "training.optimizer.n_steps": spec.common.optimizer.n_steps,
    }
    for field, n_steps in lengths.items():
        if n_steps < MIN_STEPS:
            raise SpecError(f"{path}: {field}: must be at least {MIN_STEPS}, got {n_steps}")
    if spec.start is not None:
        _check_start(f"{path}: start", spec.start)
    elif spec.adapters is not None:
        raise SpecError(
            f"{path}: adapters: need a start to adapt; a random network is trained as a whole"
        )
    if spec.pools and spec.candidates is None:
        raise SpecError(f"{path}: candidates: missing; pools are made of them")
    for where, settings in (
        ("settings", {}),
        ("warm_up.settings", spec.warm_up.settings),
        *((f"abilities.{name}.settings", a.settings) for name, a in spec.abilities.items()),
        *((f"questions.{name}", settings) for name, settings in spec.questions.items()),
    ):
        try:
            spec.make(**settings)
        except TaskError as error:
            raise SpecError(f"{path}: {where}: {error}") from error
    if unknown := [name for name in spec.texts if name not in spec.tasks]:
        raise SpecError(
            f"{path}: texts: no task {unknown[0]!r}; the study has: {', '.join(spec.tasks)}"
        )
    for name, task in spec.tasks.items():
        try:
            task.make()
        except TaskError as error:
            raise SpecError(f"{path}: tasks.{name}.settings: {error}") from error
    for name in spec.texts:
        _check_texts(f"{path}: tasks.{name}", spec.tasks[name].make())
    return spec.model_copy(update={"arms": arms})


def _check_arm(where: str, name: str, arm: RewardArm) -> None:
    if name in RESERVED or kind_and_advantage(name)[1] is not None:
        raise SpecError(
            f"{where}: the study itself gives such names ({', '.join(RESERVED)}, and all that end "
            "with an advantage); rename the arm"
        )
    if arm.supervised and (arm.pool is not None or arm.training):
        field = "pool" if arm.pool is not None else "training"
        raise SpecError(
            f"{where}.{field}: a supervised arm learns from fresh texts as the study's "
            "training.optimizer says; take it out"
        )
    _refuse(f"{where}.training", arm.training, OF_STUDY | OF_ALL_ARMS)


def _refuse(where: str, training: dict[str, Any], fields_to_refuse: dict[str, str]) -> None:
    """Refuse what the plan sets itself, which would be lost or make checkpoints miss."""
    given = {*training, *(f"optimizer.{key}" for key in training.get("optimizer") or {})}
    for field, remedy in fields_to_refuse.items():
        if field in given:
            raise SpecError(f"{where}.{field}: {remedy}")


def _check_start(where: str, directory: str) -> None:
    from mechinterp.checkpoints import open_checkpoint

    try:
        open_checkpoint(directory)
    except CheckpointError as error:
        raise SpecError(
            f"{where}: {error}; SmolLM2 is made by: mechinterp fetch-smollm2 {directory}"
        ) from error


def _check_texts(where: str, task: Any) -> None:
    from mechinterp.tasks.arithmetic import Arithmetic

    if not isinstance(task, Arithmetic):
        raise SpecError(f"{where}: has no texts to measure on; take it out of texts")
    if task.n_terms > task.max_terms:
        raise SpecError(
            f"{where}.settings: its texts have n_terms = {task.n_terms} numbers, more than "
            f"problems may have; set max_terms to at least {task.n_terms}"
        )
