"""Is the verdict right about damage of known kind? One sound network, one lesion, one verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch

from analyses.ladder import Ladder, items_table, measure_ladder, read_ladders
from analyses.streams import read_streams
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.lesions import LESIONS, Dose, Subject, damage
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task
from mechinterp.verdict import judge_side, word

LOSSES = ("learning", "choosing", "threshold", "readout", "discarded")
COSTS = "task"  # of the task's own utility


def measure_reference(
    model: HookedModel, task: Task, doses: Sequence[Dose], *, spec: AnalysisSpec
) -> dict[str, pd.DataFrame]:
    """Tables `ladder_items` (see `analyses.ladder.items_table`) and `value` (see `raw_value`)."""
    model = _damaged(model, task, doses, seed=0)
    groups = task.sample(spec.ladder_items, seed=spec.seed, split="test").groups
    items = items_table({COSTS: _ladder(model, task, spec)}, groups)
    return {"ladder_items": items.assign(arm="before"), "value": raw_value(model, task, spec=spec)}


def judge_lesion(
    model: HookedModel,
    task: Task,
    doses: Sequence[Dose],
    reference: Mapping[str, pd.DataFrame],
    *,
    spec: AnalysisSpec,
    margin: float,
    seed: int,
) -> pd.DataFrame:
    """One row: what the lesion costs, and the verdict on `model` with it against `reference`.

    `cost_utility` and `cost_log_score` are what the network's own decision loses, on other items
    than the verdict's, as shares of (oracle - constant): the true size, by no probe; beside them
    the part of it that lesions of choosing add to all others. For each loss of the ladder: its
    increase, the 95% interval's bounds, p and state.
    """
    value = {"before": reference["value"]}
    of_choosing = [dose for dose in doses if LESIONS[dose.lesion].side == "choosing"]
    others = [dose for dose in doses if dose not in of_choosing]
    model = _damaged(model, task, others, seed=seed)
    is_same = bool(doses) and not others
    value["others"] = value["before"] if is_same else raw_value(model, task, spec=spec)
    model = _damaged(model, task, of_choosing, seed=seed)
    value["choosing"] = raw_value(model, task, spec=spec) if of_choosing else value["others"]
    before = read_ladders(reference["ladder_items"])["before"][COSTS]
    after = _ladder(model, task, spec)
    groups = torch.from_numpy(
        reference["ladder_items"].query("currency == 'log_score'")["group"].to_numpy(copy=True)
    )
    row: dict[str, object] = {}
    for currency, unit in before.scale.items():
        at = {stage: table[currency].to_numpy()[0] / unit for stage, table in value.items()}
        row[f"cost_{currency}"] = at["before"] - at["choosing"]
        row[f"cost_{currency}_choosing"] = at["others"] - at["choosing"]
    sides = {}
    for name in LOSSES:
        increase = after.loss("log_score", name) - before.loss("log_score", name)  # type: ignore[operator]
        side = sides[name] = judge_side(increase, groups, margin=margin)
        row |= {name: side.delta, f"{name}_low": side.ci[0], f"{name}_high": side.ci[1]}
        row |= {f"{name}_p": side.p, f"{name}_state": side.state}
    row["verdict"] = word(sides["learning"], sides["choosing"])
    row["n_items"] = after.n_items
    return pd.DataFrame([row])


def raw_value(model: HookedModel, task: Task, *, spec: AnalysisSpec) -> pd.DataFrame:
    """One row: mean utility and log score of the network's own decision on validation items."""
    items = task.sample(spec.ladder_items, seed=spec.seed, split="validation")
    streams = read_streams(model, items, task, batch_size=spec.batch_size)
    target = items.target
    value = decisions.value(streams.action_logits, target, task.utility)
    return pd.DataFrame({"utility": [value.utility], "log_score": [value.log_score]})


def _damaged(model: HookedModel, task: Task, doses: Sequence[Dose], *, seed: int) -> HookedModel:
    if not doses:
        return model
    generator = derive_generator(seed, "lesion", *(f"{name}={amount:g}" for name, amount in doses))
    return HookedModel.from_model(damage(Subject(model, task), doses, generator=generator))


def _ladder(model: HookedModel, task: Task, spec: AnalysisSpec) -> Ladder:
    """Without the latents' rung, on which no verdict rests."""
    items = task.sample(spec.ladder_items, seed=spec.seed, split="test")
    streams = read_streams(
        model, items, task, batch_size=spec.batch_size, max_layers=spec.max_layers
    )
    return measure_ladder(streams, items, task, costs={COSTS: task.utility}, spec=spec)[COSTS]
