"""The validation study: networks damaged in known ways, and the verdicts that come out.

A *pair* is a sound network and the same one with a dose of a lesion, or with a change that is no
damage. Every pair is one row of the table `pairs`; `mechinterp.validity` turns it into rates.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from mechinterp import files, tasks
from mechinterp.checkpoints.provenance import versions_and_machine
from mechinterp.errors import ModelError, SpecError, TaskError
from mechinterp.lesions import LESIONS, parse_doses, side_of
from mechinterp.spec import (
    SpecWithPresets,
    StrictModel,
    chosen,
    known_keys,
    load_with_preset,
)
from mechinterp.steps import Step, run_missing, task_inputs
from mechinterp.training.config import ModelConfig, TrainingConfig

if TYPE_CHECKING:
    import pandas as pd

HALVES = ("development", "held_out")
# Pairs that take training: two networks that differ by chance, or by more of the same.
CONTROLS = ("reseed", "reorder", "continue")
APPENDED = "append_block"  # what a network with a discarding block is compared with


class Network(StrictModel):
    """A kind of network to be damaged: a task, a shape, and how it is trained."""

    task: str
    settings: dict[str, Any] = Field(default_factory=dict)
    n_steps: int = Field(ge=8)
    model: Annotated[ModelConfig, known_keys(ModelConfig)] = ModelConfig()
    training: Annotated[TrainingConfig, known_keys(TrainingConfig)] = TrainingConfig()


class ValidationSpec(SpecWithPresets):
    """Networks x seeds x doses. `development` and `held_out` map a kind of damage to its doses,
    each "KIND=DOSE" or several joined by "+", or one of reseed, reorder and continue.

    `cost` is the utility lost, as a share of (oracle - best constant), from which on a verdict must
    be right; `competence` is what a network must reach to be damaged at all (the gate of studies,
    `analyses.competence`).
    """

    name: str
    seeds: int = Field(ge=1)
    items: int = Field(12_000, ge=60)
    margin: float = Field(0.05, gt=0)
    cost: float = Field(0.1, gt=0)
    competence: float = Field(0.9, gt=0, le=1)
    further_steps: int = Field(60, ge=8)
    networks: dict[str, Network]
    only: tuple[str, ...] = Field((), description="names of the networks to run; none: all")
    development: dict[str, tuple[str, ...]]
    held_out: dict[str, tuple[str, ...]]

    def kinds(self) -> Iterator[tuple[str, str, str]]:
        """(half, kind, dose) of every pair."""
        for half in HALVES:
            for kind, doses in getattr(self, half).items():
                for dose in doses:
                    yield half, kind, dose


@dataclass(frozen=True)
class ValidationPlan:
    """`references` measure the networks before, `pairs` those after; `runs` train them, and `gates`
    ask whether they know their task."""

    spec: ValidationSpec
    runs: tuple[Step, ...]
    gates: tuple[Step, ...]
    references: tuple[Step, ...]
    pairs: tuple[Step, ...]

    @property
    def steps(self) -> tuple[Step, ...]:
        """All steps once each, a network's together."""
        steps: dict[str, Step] = {}
        for step in (*self.runs, *self.gates, *self.references, *self.pairs):
            steps.setdefault(step.key, step)
        names = list(self.spec.networks)
        return tuple(
            sorted(
                steps.values(), key=lambda s: (s.labels["seed"], names.index(s.labels["network"]))
            )
        )


def load_validation(path: str | Path, *, preset: str | None = None) -> ValidationSpec:
    """A validation spec with one of its presets laid over it; raises SpecError."""
    spec = load_with_preset(ValidationSpec, path, preset)
    for half, kind, dose in spec.kinds():
        try:
            if dose not in CONTROLS:
                parse_doses(dose)
        except ModelError as error:
            raise SpecError(f"{path}: {half}.{kind}: {error}") from error
    for name, network in spec.networks.items():
        try:
            tasks.get(network.task, **network.settings)
        except TaskError as error:
            raise SpecError(f"{path}: networks.{name}: {error}") from error
    kept = {name: spec.networks[name] for name in chosen(spec.only, spec.networks, source=path)}
    return spec.model_copy(update={"networks": kept})


def make_validation_plan(spec: ValidationSpec) -> ValidationPlan:
    """What the spec asks for; runs nothing."""
    runs: list[Step] = []
    gates: list[Step] = []
    references: dict[str, Step] = {}
    pairs: list[Step] = []
    for name, network in spec.networks.items():
        trained = [_train(network, name, seed) for seed in range(spec.seeds + 1)]
        for seed in range(spec.seeds):
            base = trained[seed]
            gates.append(_gate(spec, network, base))
            branches = [_branch(spec, network, name, base, order) for order in (1, 2)]
            controls = {
                "reseed": (base, trained[seed + 1]),
                "reorder": (branches[0], branches[1]),
                "continue": (base, branches[0]),
            }
            for half, kind, dose in spec.kinds():
                before, after = controls.get(dose, (base, base))
                reference = _reference(spec, network, before, [APPENDED] if _appends(dose) else [])
                references[reference.key] = reference
                pair = _pair(spec, network, after, reference, dose, half, kind)
                runs += [before, after]
                pairs.append(pair)
    return ValidationPlan(spec, tuple(runs), tuple(gates), tuple(references.values()), tuple(pairs))


def run_validation(
    path: str | Path,
    *,
    out: str | Path,
    preset: str | None = None,
    n_workers: int = 2,
    command: str = "",
) -> dict[str, pd.DataFrame]:
    """Do what is not yet done of the spec at `path`; leaves tables, figures and a manifest in
    `out`, and returns the tables of `mechinterp.validity`."""
    from figures import draw_all
    from mechinterp.validity import validity_tables

    spec = load_validation(path, preset=preset)
    out, begun = Path(out), time.monotonic()
    plan = make_validation_plan(spec)
    run_missing(plan.steps, out, n_workers=n_workers, name=spec.name)
    tables = validity_tables(_pairs(plan, out), spec)
    for name, table in tables.items():
        files.write_table(out / "tables" / f"{name}.parquet", table)
    draw_all(out / "tables", out / "figures", ["validity"])
    manifest = {
        "study": spec.name,
        "preset": preset,
        "command": command,
        "spec": spec.model_dump(mode="json"),
        **versions_and_machine(),
        "seconds_of_last_run": round(time.monotonic() - begun, 1),
        "seconds_per_pair": round(
            sum(step.record(out)["seconds"] for step in plan.pairs) / len(plan.pairs), 2
        ),
    }
    files.write_json(out / "manifest.json", manifest)
    return tables


def _pairs(plan: ValidationPlan, out: Path) -> pd.DataFrame:
    """One row per pair, and whether the network before was competent."""
    import pandas as pd

    gates = pd.concat([gate.tables(out)["competence"] for gate in plan.gates])
    pairs = pd.concat([pair.tables(out)["pair"] for pair in plan.pairs])
    own = ["network", "seed"]
    return pairs.merge(gates[[*own, "competent"]], on=own, validate="many_to_one")


def _train(network: Network, name: str, seed: int) -> Step:
    inputs = {
        **task_inputs(network.task, network.settings),
        "training": _training(network, network.n_steps),
        "objective": {"name": "cross_entropy"},
        "seed": seed,
        "data_order": 0,
        "model": asdict(network.model),
        "start_step": None,
    }
    return Step("train", inputs, {"network": name, "seed": seed})


def _branch(
    spec: ValidationSpec, network: Network, name: str, start: Step, data_order: int
) -> Step:
    inputs = {
        **start.inputs,
        "training": _training(network, spec.further_steps),
        "data_order": data_order,
        "model": None,
        "start_step": network.n_steps,
    }
    return Step("train", inputs, start.labels, (start,))


def _training(network: Network, n_steps: int) -> dict[str, Any]:
    """Dense enough in checkpoints for early stops."""
    steps = tuple(round(n_steps * share) for share in (0.05, 0.1, 0.15, 0.25, 0.5, 1))
    return replace(network.training, n_steps=n_steps, checkpoint_steps=steps).as_inputs()


def _measured(spec: ValidationSpec, network: Network, run: Step) -> dict[str, Any]:
    return {
        **task_inputs(network.task, network.settings),
        "analysis": {"ladder_items": spec.items},
        "step": run.inputs["training"]["n_steps"],
    }


def _appends(dose: str) -> bool:
    """Whether the network after has one more block than the one before."""
    if dose in CONTROLS:
        return False
    return any(LESIONS[name].side == "discarded" for name, _ in parse_doses(dose))


def _gate(spec: ValidationSpec, network: Network, run: Step) -> Step:
    inputs = {**_measured(spec, network, run), "threshold": spec.competence}
    return Step("competence", inputs, run.labels, (run,))


def _reference(spec: ValidationSpec, network: Network, run: Step, doses: list[str]) -> Step:
    inputs = {**_measured(spec, network, run), "doses": doses}
    return Step("reference", inputs, run.labels, (run,))


def _pair(
    spec: ValidationSpec,
    network: Network,
    run: Step,
    reference: Step,
    dose: str,
    half: str,
    kind: str,
) -> Step:
    is_control = dose in CONTROLS
    inputs = {
        **_measured(spec, network, run),
        "doses": [] if is_control else dose.split("+"),
        "margin": spec.margin,
        "seed": reference.labels["seed"],
    }
    labels = {
        **reference.labels,
        "half": half,
        "kind": kind,
        "dose": dose,
        "side": "none" if is_control else side_of(parse_doses(dose)),
    }
    return Step("lesion", inputs, labels, (run, reference))
