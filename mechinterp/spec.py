"""What the user writes: task files and study specs, checked before anything runs.

Unknown keys, wrong types and missing tasks are refused with one line that names file and field.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
)

from mechinterp import tasks
from mechinterp.arm_names import CONTROL, REORDERED, WEIGHTS, kind_and_weights
from mechinterp.arms import ArmKind, Refit
from mechinterp.errors import SpecError, TaskError, TrainingError
from mechinterp.seed_measures import MEASURES
from mechinterp.tasks.base import Task
from mechinterp.training.config import ModelConfig, TrainingConfig, log_spaced_steps

if TYPE_CHECKING:
    from mechinterp.checkpoints import Checkpoint

Weights = tuple[float, ...]
Regime = Literal["branched", "from_init"]
PatchGrain = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "head",
    "q",
    "k",
    "v",
    "pattern",
    "neuron",
]
SpecType = TypeVar("SpecType", bound="StrictModel")
PresetsType = TypeVar("PresetsType", bound="SpecWithPresets")


class StrictModel(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpecWithPresets(StrictModel):
    """A whole file, and by name what is laid over it: other sizes of the same study."""

    presets: dict[str, dict[str, Any]] = {}


def known_keys(dataclass: type) -> BeforeValidator:
    """Pydantic would silently drop what a plain dataclass does not know."""
    known = sorted(field.name for field in fields(dataclass))

    def refuse_others(value: Any) -> Any:
        if isinstance(value, dict) and (unknown := sorted(set(value) - set(known))):
            raise ValueError(f"unknown key {unknown[0]!r}; known here: {', '.join(known)}")
        return value

    return BeforeValidator(refuse_others)


class AnalysisSpec(StrictModel):
    """Sizes of the measurements. The same spec and checkpoints give the same numbers everywhere.

    The ladder is cross-fitted on `ladder_items`, and along trajectories on `trajectory_items`.
    Networks deeper than `max_layers` are probed, read out and cut at as many evenly spaced layers.
    Without `description_length` probes leave it out, which takes as long as all else about them.
    The crossing is also stitched, on `stitch_items` others; with 0 it is not. Gradients of
    objectives are taken on at most `gradient_items` of the training split; with 0 they are not.
    Heads and neurons are pruned by `pruning_shares` of all, beside `pruning_draws` random choices.
    Repairs train adapters and refits on `repair_items`, in `repair_draws` draws of them, and are
    valued on `repair_test_items`; `reverse_steps` of 0 leave out reverse fine-tuning.
    In a study `crossing_items` of 0 leave out all that compares an arm's network with the one that
    it branched from, and `pair_circuits` adds their circuits to it.
    """

    ladder_items: int = Field(15_000, ge=60)
    trajectory_items: int = Field(7_500, ge=60)
    ladder_folds: int = Field(3, ge=3)
    probe_items: int = Field(3_000, ge=60)
    probe_folds: int = Field(5, ge=3)
    description_length: bool = True
    erasure_items: int = Field(1_000, ge=60)
    patch_pairs: int = Field(128, ge=2)
    patch_grains: tuple[PatchGrain, ...] = ("resid_pre", "attn_out", "mlp_out", "head")
    circuit_steps: int = Field(5, ge=1)
    refit_items: int = Field(6_000, ge=60)
    repair_items: int = Field(256, ge=8)
    repair_draws: int = Field(4, ge=1)
    repair_steps: int = Field(32, ge=1)
    repair_ranks: tuple[int, ...] = (1, 4, 16)
    repair_boundary: int | None = Field(None, ge=1)
    repair_learning_rate: float = Field(3e-3, gt=0)
    repair_test_items: int = Field(1_000, ge=60)
    reverse_steps: int = Field(400, ge=0)
    reverse_learning_rate: float = Field(3e-3, gt=0)
    crossing_items: int = Field(6_000, ge=0)
    pair_circuits: bool = False
    stitch_items: int = Field(1_000, ge=0)
    graft_items: int = Field(1_000, ge=2)
    graft_parts: Literal["component", "sublayer", "block"] = "component"
    pruning_items: int = Field(1_000, ge=60)
    pruning_shares: tuple[Annotated[float, Field(gt=0, le=1)], ...] = (
        *(0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
    )
    pruning_draws: int = Field(8, ge=2)
    gradient_items: int = Field(2_048, ge=0)
    calibration_bins: int = Field(10, ge=2)
    max_layers: int = Field(12, ge=2)
    batch_size: int = Field(512, ge=1)
    seed: int = 0

    @field_validator("pruning_shares")
    @classmethod
    def _rising(cls, shares: tuple[float, ...]) -> tuple[float, ...]:
        if len(shares) < 2 or sorted(set(shares)) != list(shares):
            raise ValueError("expected at least two shares in rising order")
        return shares


class TaskSpec(StrictModel):
    """A task file: which task, its settings, and the costs at which decisions are valued.

    `costs` maps a name to the worth of being right about each label, or to a utility matrix
    u[action][label]. "symmetric" is always measured.
    """

    task: str
    settings: dict[str, Any] = {}
    costs: dict[str, Weights | tuple[Weights, ...]] = {}
    analysis: AnalysisSpec = AnalysisSpec()  # type: ignore[call-arg]

    @field_validator("task")
    @classmethod
    def _known(cls, name: str) -> str:
        tasks.task_class(name)
        return name

    def make(self, **settings: Any) -> Task:
        """The task; raises TaskError for one that has no decision."""
        if not issubclass(tasks.task_class(self.task), Task):
            raise TaskError(
                f"task {self.task!r} is answered in writing alone: it has no decision to analyse"
            )
        return tasks.get(self.task, **self.settings, **settings)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """`mechinterp.steps.task_inputs`; a data file is read once for all of a study's steps."""
        from mechinterp.steps import task_inputs

        return task_inputs(self.task, self.settings)

    def make_for(self, checkpoint: Checkpoint) -> Task:
        """The task, with the checkpoint's tokenizer where the task writes text and names none."""
        setting = {f.name: f for f in fields(tasks.task_class(self.task))}.get("tokenizer")
        if setting is None or "tokenizer" in self.settings:
            return self.make()
        if setting.default is not MISSING and not checkpoint.has_tokenizer:
            return self.make()
        return self.make(tokenizer=str(checkpoint.path))


class StudyTask(TaskSpec):
    """A task with the lengths of its two regimes in steps, and how its networks are trained."""

    init_steps: int = Field(400, ge=8)
    branch_steps: int = Field(240, ge=8)
    n_checkpoints: int = Field(6, ge=1, description="log-spaced, besides step 0")
    model: Annotated[ModelConfig, known_keys(ModelConfig)] = ModelConfig()
    training: Annotated[TrainingConfig, known_keys(TrainingConfig)] = TrainingConfig()
    arms: tuple[ArmKind, ...] = Field((), description="none: the study's")
    competence: float | None = Field(None, gt=0, le=1, description="none: the study's")
    weights: tuple[str, ...] = Field((), description="names of the study's weights; none: all")
    optional: bool = Field(False, description="left out where the file of its settings is absent")

    def training_of(self, regime: str) -> TrainingConfig:
        n_steps = self.init_steps if regime == "from_init" else self.branch_steps
        steps = log_spaced_steps(n_steps, self.n_checkpoints)
        return replace(self.training, n_steps=n_steps, checkpoint_steps=steps)


def _weighting(name: str) -> str:
    if not WEIGHTS.fullmatch(name):
        raise ValueError("name weights by a number such as '1.98': arms are named after it")
    return name


def _known_measure(name: str) -> str:
    if name not in MEASURES:
        raise ValueError(f"no measure of that name; there are: {', '.join(MEASURES)}")
    return name


class Claim(StrictModel):
    """What a finding says happens, so that its runs can tell: see `mechinterp.claims`.

    `arms` are kinds such as "weighted", which stands for one arm per weighting; `against` is the
    kind they are compared with, at the same weighting where it serves one, or nothing: zero.
    `costs` are those at which both are valued, each arm's "own" or "symmetric" ones.
    """

    question: str
    measure: Annotated[str, AfterValidator(_known_measure)]
    arms: tuple[str, ...]
    against: str | None = None
    expected: Literal["more", "less"]
    margin: float | None = Field(None, gt=0, description="none: the study's")
    costs: Literal["own", "symmetric"] = "own"
    tasks: tuple[str, ...] = Field((), description="none: all")
    regimes: tuple[Regime, ...] = Field((), description="none: all")


class StudySpec(SpecWithPresets):
    """One finding: tasks x regimes x arms x seeds, and what is measured on each checkpoint.

    `weights` maps a name such as "1.8" to the worth of each label; it makes the arms ex_post_1.8
    and weighted_1.8 and the costs w1.8. `arms` are the kinds of training beside the control
    (`mechinterp.arms`), `refits` the arms that refit the control's last layer
    (`mechinterp.refits`). `margin` is the share of the scale below which a change is no damage,
    `competence` what the symmetric arm must reach, `seeds_for_claims` how many seeds a claim about
    an objective takes, and `claims` what the study is to decide.
    """

    name: str
    question: str = ""
    seeds: int = Field(4, ge=1)
    regimes: tuple[Regime, ...] = ("branched", "from_init")
    weights: dict[Annotated[str, AfterValidator(_weighting)], Weights]
    arms: tuple[ArmKind, ...] = ("weighted",)
    refits: tuple[Refit, ...] = ()
    tasks: dict[str, StudyTask]
    only: tuple[str, ...] = Field((), description="names of the tasks to run; none: all")
    margin: float = Field(0.05, gt=0)
    competence: float = Field(0.9, gt=0, le=1)
    seeds_for_claims: int = Field(8, ge=2)
    claims: dict[str, Claim] = {}

    def weights_of(self, task: str) -> dict[str, Weights]:
        """The weightings that a task is trained for."""
        chosen = self.tasks[task].weights
        return {name: self.weights[name] for name in chosen or self.weights}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A mapping from a YAML file; raises SpecError."""
    path = Path(path)
    if not path.is_file():
        raise SpecError(f"{path}: no such file")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SpecError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(value, dict):
        raise SpecError(f"{path}: expected keys and values, found {type(value).__name__}")
    return value


def check(model: type[SpecType], value: dict[str, Any], *, source: str | Path) -> SpecType:
    """`value` as a `model`; raises SpecError naming `source` and the first bad field."""
    try:
        return model.model_validate(value)
    except (TaskError, TrainingError) as error:
        raise SpecError(f"{source}: {error}") from error
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            known = ", ".join(_known_fields(model, first["loc"]))
            raise SpecError(f"{source}: {field}: unknown key; known here: {known}") from error
        if first["type"] == "missing":
            raise SpecError(f"{source}: {field}: missing; add it") from error
        got = repr(first["input"])
        raise SpecError(f"{source}: {field}: {first['msg']}, got {got:.60}") from error


def _known_fields(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Field names at the level where `loc` went wrong."""
    for part in loc[:-1]:
        field = model.model_fields.get(str(part))
        if field is None:  # a key of a dict[str, Model]: the model stays
            continue
        arguments = [field.annotation, *getattr(field.annotation, "__args__", ())]
        nested = [a for a in arguments if isinstance(a, type) and issubclass(a, BaseModel)]
        if nested:
            model = nested[0]
    return sorted(model.model_fields)


def load_task(source: str | Path, *, changes: Mapping[str, Any] | None = None) -> TaskSpec:
    """A task file, or the bare name of a task with its default settings.

    `changes` are laid over its `analysis`, as a command's options are.
    """
    if changes:
        spec = load_task(source).model_dump(mode="json", exclude_unset=True)
        return check(TaskSpec, overlay(spec, {"analysis": dict(changes)}), source=source)
    if str(source) in tasks.names():
        return TaskSpec(task=str(source))
    if Path(source).suffix not in (".yaml", ".yml"):
        raise SpecError(
            f"--task {source}: neither a task ({', '.join(tasks.names())}) nor a .yaml task file"
        )
    return check(TaskSpec, read_yaml(source), source=source)


def load_with_preset(model: type[PresetsType], path: str | Path, preset: str | None) -> PresetsType:
    """The file at `path` as a `model`, one of its presets laid over it; raises SpecError."""
    raw = read_yaml(path)
    spec = check(model, raw, source=path)
    if preset is None:
        return spec
    if preset not in spec.presets:
        known = ", ".join(spec.presets) or "none"
        raise SpecError(f"{path}: presets: no preset {preset!r}; it has: {known}")
    return check(model, overlay(raw, spec.presets[preset]), source=f"{path} ({preset})")


def chosen(only: Sequence[str], known: Mapping[str, Any], *, source: str | Path) -> list[str]:
    """The names of `only`, or all that are `known` where it is empty; raises SpecError."""
    if unknown := [name for name in only if name not in known]:
        raise SpecError(f"{source}: only: no {unknown[0]!r}; there are: {', '.join(known)}")
    return [name for name in known if name in (only or known)]


def load_study(path: str | Path, *, preset: str | None = None) -> StudySpec:
    """A study spec with one of its presets laid over it; raises SpecError."""
    spec = load_with_preset(StudySpec, path, preset)
    _check_claims(spec, path)
    names = chosen(spec.only, spec.tasks, source=path)
    kept = {
        name: spec.tasks[name]
        for name in names
        if not _lacks_its_file(path, name, spec.tasks[name])
    }
    spec = spec.model_copy(update={"tasks": kept})
    for name, task in spec.tasks.items():
        for label in task.weights:
            if label not in spec.weights:
                raise SpecError(
                    f"{path}: tasks.{name}.weights: no weights {label!r}; the study has: "
                    f"{', '.join(spec.weights)}"
                )
        try:
            n_actions = len(task.make().actions)
        except TaskError as error:
            raise SpecError(f"{path}: tasks.{name}.settings: {error}") from error
        for label, weights in spec.weights_of(name).items():
            if len(weights) != n_actions:
                raise SpecError(
                    f"{path}: weights.{label}: has {len(weights)} numbers, task {name!r} has "
                    f"{n_actions} labels; give one weight per label"
                )
    return spec


def _check_claims(spec: StudySpec, source: str | Path) -> None:
    """A claim about nothing would have no cells, and say so only by its absence."""
    kinds = {CONTROL, REORDERED, "ex_post", *get_args(ArmKind), *get_args(Refit)}
    for name, claim in spec.claims.items():
        named = {
            "tasks": [(task, spec.tasks) for task in claim.tasks],
            "arms": [(kind_and_weights(arm)[0], kinds) for arm in claim.arms],
            "against": [(kind_and_weights(claim.against)[0], kinds)] if claim.against else [],
        }
        for field, places in named.items():
            for value, known in places:
                if value not in known:
                    raise SpecError(
                        f"{source}: claims.{name}.{field}: no {value!r}; there are: "
                        f"{', '.join(sorted(known))}"
                    )


def _lacks_its_file(source: str | Path, name: str, task: StudyTask) -> bool:
    """Says so where an optional task's file is not there."""
    file = task.settings.get("path")
    if not task.optional or file is None or Path(file).is_file():
        return False
    print(f"{source}: tasks.{name}: left out: no file {file}", file=sys.stderr)
    return True


def overlay(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else value
    return merged
