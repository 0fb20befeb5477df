"""How cheaply is what AFTER lost regained? Adapters by place, rank and steps; reverse fine-tuning;
refits.

A network is repaired by the symmetric loss on few items, in several draws of them: low-rank
adapters in early or late layers, in attention or MLP; all weights; the last layer alone, refitted
without a step. What is regained counts as a share of what was lost. Beside it, all weights trained
on fresh items, from AFTER and from a fresh initialisation (Jain et al. 2023, arXiv:2311.12786):
damage that leaves what was learnt in place takes fewer steps than learning it takes.

The loss that repairs is symmetric, and so are the costs at which it is valued. The readout "raw" is
the decision as it is, "bias" the same after the best bias, to which a threshold is no loss.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import pandas as pd
import torch

from analyses.crossing import find_verdict_cut
from analyses.ladder import CURRENCIES
from analyses.pair import Pair, run_script
from analyses.refits import FITTED_ON, LastLayer
from analyses.repair_subject import (
    READOUTS,
    UNKNOWN,
    RepairSubject,
    Values,
    share_regained,
    stack_draws,
    symmetric_utility,
    values_of,
)
from analyses.streams import action_shift, read_streams
from mechinterp.adapters import Adapters, Part
from mechinterp.arms import Refit
from mechinterp.hooked import HookedModel
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator, derive_seed
from mechinterp.repair import FEW_STEPS, Repair, few_batches, fresh_network
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task
from mechinterp.training.batches import Batches
from mechinterp.training.config import TrainingConfig

RECOVERED = 0.9  # of a value, that counts as having it back
STARTS = ("after", "scratch")
# Refits that change the readout there is: what the provenance adds to its logits stays.
KEEPING_THE_SHIFT: tuple[Refit, ...] = ("lws", "tau_norm")


@dataclass(frozen=True)
class Repairs:
    """`repair`: one row per way of repair, steps, currency and readout. `kind` is "adapters" (with
    layers "early", "late" or "all", part, rank), "weights" (all of them) or "refit" (`part` is its
    name); trained on `n_items`, fewer than asked for where a split holds too few for all draws.
    `value` is the mean over draws, `lost` what AFTER lost against the reference (nats or utility)
    with its 95% interval over groups of items, `share` what was regained of it, with a 95% interval
    over draws and items; NaN where `lost_low` is not above 2% of (reference - best constant), or
    the reference is no better than the best constant.

    `reverse`: all weights on fresh items, by `start` and steps; `level` is the value above the best
    constant report's, as a share of the reference's, with its interval as above; NaN where that has
    none.

    `reverse_steps`: steps until a value above 90% "of the value" of the reference, and above 90%
    "of the loss" regained: the median of the draws, the fewest, the most (infinite: not within
    `n_steps`), and how many got there. They are found on the grid of steps in `reverse`, linearly
    between its points; there are none where the reference is no better than the best constant.
    """

    repair: pd.DataFrame
    reverse: pd.DataFrame
    reverse_steps: pd.DataFrame


def measure_repair(
    reference: HookedModel,
    after: HookedModel,
    task: Task,
    *,
    spec: AnalysisSpec,
    boundary: int | None = None,
) -> Repairs:
    """Repair `after`, which lost something against `reference`, on all places and ranks of `spec`.

    Early layers are those below `boundary`, late ones the others; by default it is the verdict's
    cut of the crossing (`analyses.crossing.find_verdict_cut`), kept within the network; one layer
    is early.
    """
    boundary = boundary or choose_boundary(reference, task, spec=spec)
    subject = RepairSubject.read(reference, after, task, spec)
    n_runs = 1 + len(_places(subject, boundary))
    n_updates = spec.repair_draws * (n_runs * spec.repair_steps + 2 * spec.reverse_steps)
    with progress_bar("repair", n_updates, unit="step") as advance:
        rows = [*_adapted(subject, boundary, advance), *_refitted(subject)]
        reverse, steps = _reversed(subject, advance) if spec.reverse_steps else ([], [])
    repair = pd.DataFrame(rows)
    repair.insert(0, "boundary", boundary)
    return Repairs(repair, pd.DataFrame(reverse), pd.DataFrame(steps))


def choose_boundary(reference: HookedModel, task: Task, *, spec: AnalysisSpec) -> int:
    """The first late layer: `spec.repair_boundary`, or the verdict's cut with layers on each
    side, if there are two."""
    n_layers = reference.n_layers
    found = spec.repair_boundary or find_verdict_cut(reference, task, spec=spec) or n_layers // 2
    return max(1, min(found, n_layers - 1))


def _places(subject: RepairSubject, boundary: int) -> list[tuple[str, Adapters]]:
    """Adapters of every rank and part, early, late and everywhere, as far as there are layers."""
    every = tuple(range(subject.after.n_layers))
    layers = {"early": every[:boundary], "late": every[boundary:], "all": every}
    places = itertools.product(layers, get_args(Part), subject.spec.repair_ranks)
    return [
        (name, Adapters(layers[name], part, rank)) for name, part, rank in places if layers[name]
    ]


def _adapted(subject: RepairSubject, boundary: int, advance: Any) -> Iterator[dict[str, Any]]:
    """Adapters of every place and rank, then all weights."""
    spec = subject.spec
    adapters = replace(FEW_STEPS, learning_rate=spec.repair_learning_rate)
    weights = replace(FEW_STEPS, learning_rate=spec.reverse_learning_rate)
    for name, placed in (*_places(subject, boundary), ("all", None)):
        runs = [
            _few_steps(subject, placed, adapters if placed else weights, draw, advance)
            for draw in range(spec.repair_draws)
        ]
        shared = {
            "kind": "adapters" if placed else "weights",
            "layers": name,
            "part": placed.part if placed else "all",
            "rank": float(placed.rank) if placed else float("nan"),
            "n_parameters": runs[0][0],
            "n_items": len(subject.few(0)),
        }
        for steps in runs[0][1]:
            found = stack_draws([values[steps] for _, values in runs])
            yield from ({**shared, "steps": steps, **row} for row in subject.rows(found))


def _few_steps(
    subject: RepairSubject,
    adapters: Adapters | None,
    config: TrainingConfig,
    draw: int,
    advance: Any,
) -> tuple[int, dict[int, Values]]:
    """How many numbers one repair trains, and the values along it by number of steps."""
    spec, items = subject.spec, subject.few(draw)
    run = Repair(
        subject.after.model,
        subject.task.actions,
        adapters=adapters,
        config=config,
        shift=action_shift(subject.after, len(subject.task.actions)),
        generator=derive_generator(spec.seed, "adapters", draw),
    )
    batches = few_batches(
        items.tokens,
        items.labels,
        batch_size=config.batch_size,
        generator=derive_generator(spec.seed, "few items", draw),
    )
    return run.n_trained, _along(subject, run, batches, _steps(spec.repair_steps), advance)


def _along(
    subject: RepairSubject, run: Repair, batches: Iterator[Any], steps: Sequence[int], advance: Any
) -> dict[int, Values]:
    values = {}
    for n in steps:
        for batch in itertools.islice(batches, n - run.n_steps):
            run.update(*batch)
            advance(1)
        values[n] = subject.values(run)
    return values


def _steps(n: int) -> list[int]:
    """0 and, in ratios of 4 up to `n`, steps such as 2, 8, 32."""
    return sorted({0, *(n // 4**k for k in range(n.bit_length()))})


def _refitted(subject: RepairSubject) -> Iterator[dict[str, Any]]:
    """Every refit on as few items as adapters have, and on `refit_items`, once where the split has
    no more. LWS and tau-norm keep a recorded shift of the decision, cRT and DFR replace it."""
    spec, task = subject.spec, subject.task
    tested = read_streams(
        subject.after, subject.items, task, batch_size=spec.batch_size, max_layers=1
    )
    normed = tested.normed[subject.after.n_layers]
    shift = action_shift(subject.after, len(task.actions))
    few, done = len(subject.few(0)), set()
    for asked in dict.fromkeys((spec.repair_items, spec.refit_items)):
        most = few if asked == spec.repair_items else asked
        given = [
            {
                split: subject.drawn(draw, asked, split=split).select(slice(0, most))
                for split in FITTED_ON.values()
            }
            for draw in range(spec.repair_draws)
        ]
        layers = [
            LastLayer(
                subject.after,
                task,
                spec.model_copy(update={"seed": derive_seed(spec.seed, "repair", draw)}),
                items,
            )
            for draw, items in enumerate(given)
        ]
        for name in get_args(Refit):
            n_items = len(given[0][FITTED_ON[name]]) if name in FITTED_ON else most
            if (name, n_items) in done:
                continue
            done.add((name, n_items))
            readouts = [layer.refit(name, symmetric_utility(task)) for layer in layers]
            kept = shift if name in KEEPING_THE_SHIFT else torch.zeros_like(shift)
            found = stack_draws(
                [values_of(r(normed).double() + kept, subject.items, task) for r in readouts]
            )
            shared = {
                "kind": "refit",
                "layers": "unembedding",
                "part": name,
                "rank": float("nan"),
                "n_parameters": readouts[0].weight.numel() + readouts[0].bias.numel(),
                "n_items": n_items,
                "steps": 0,
            }
            yield from ({**shared, **row} for row in subject.rows(found))


def _reversed(
    subject: RepairSubject, advance: Any
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of `reverse` and of `reverse_steps`."""
    spec, model = subject.spec, subject.after.model
    config = replace(FEW_STEPS, learning_rate=spec.reverse_learning_rate, batch_size=64)
    n = spec.reverse_steps
    half_octaves = (round(2 ** (k / 2)) for k in range(2 * n.bit_length()))
    steps = sorted({0, n, *(step for step in half_octaves if step < n)})
    curves, counts = [], []
    for start in STARTS:
        along = []
        for draw in range(spec.repair_draws):
            generator = derive_generator(spec.seed, "scratch", draw)
            shift = action_shift(subject.after, len(subject.task.actions))
            run = Repair(
                model if start == "after" else fresh_network(model, generator=generator),
                subject.task.actions,
                config=config,
                shift=shift if start == "after" else None,
                generator=generator,
            )
            fresh = Batches(
                subject.task,
                batch_size=config.batch_size,
                seed=spec.seed,
                stream="reverse fine-tuning",
                data_order=draw,
            )
            batches = (fresh(step) for step in itertools.count())
            along.append(_along(subject, run, batches, steps, advance))
        for n in steps:
            for key, values in stack_draws([run[n] for run in along]).items():
                level = UNKNOWN
                if subject.unit(*key) > 0:
                    level = share_regained(
                        values, subject.constant[key], subject.goal[key], subject.items.groups
                    )
                curves.append(
                    {
                        "start": start,
                        "steps": n,
                        **dict(zip(("currency", "readout"), key, strict=True)),
                        "value": float(values.mean()),
                        **dict(zip(("level", "low", "high"), level, strict=True)),
                        "n_draws": len(values),
                    }
                )
        counts += _counted(subject, start, along)
    return curves, counts


def _counted(
    subject: RepairSubject, start: str, along: list[dict[int, Values]]
) -> Iterator[dict[str, Any]]:
    """Rows of `reverse_steps` of one start."""
    for key in itertools.product(CURRENCIES, READOUTS):
        if not subject.unit(*key) > 0:
            continue
        goal = float(subject.goal[key].mean())
        for target, origin in (("of the value", subject.constant), ("of the loss", subject.start)):
            wanted = goal - (1 - RECOVERED) * (goal - float(origin[key].mean()))
            counts = pd.Series(
                [
                    steps_to_reach(
                        list(run), [float(values[key].mean()) for values in run.values()], wanted
                    )
                    for run in along
                ]
            )
            yield {
                "start": start,
                **dict(zip(("currency", "readout"), key, strict=True)),
                "target": target,
                "wanted": wanted,
                "steps": float(counts.median()),
                "fewest": counts.min(),
                "most": counts.max(),
                "n_reached": int((counts < float("inf")).sum()),
                "n_draws": len(counts),
                "n_steps": subject.spec.reverse_steps,
            }


def steps_to_reach(steps: Sequence[int], values: Sequence[float], wanted: float) -> float:
    """Steps until `values` first reach `wanted`, linear between the `steps`; infinite if never."""
    if values[0] >= wanted:
        return float(steps[0])
    for (n, value), (n_next, value_next) in itertools.pairwise(zip(steps, values, strict=True)):
        if value_next >= wanted:
            return n + (n_next - n) * (wanted - value) / (value_next - value)
    return float("inf")


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Tables `repair`, `reverse` and `reverse_steps` of AFTER, which lost what it lost against the
    control where one is given, else against BEFORE."""
    after = pair.require("after")
    reference = pair.models.get("control", pair.models["before"])
    found = measure_repair(reference, after, pair.task, spec=pair.spec)
    if found.repair["share"].isna().all():
        print("repair: AFTER lost nothing that could be regained", file=sys.stderr)
    tables = {
        "repair": found.repair,
        "reverse": found.reverse,
        "reverse_steps": found.reverse_steps,
    }
    return {name: pair.join({"after": table}) for name, table in tables.items() if len(table)}


if __name__ == "__main__":
    run_script(pair_tables, figure="repair", description=__doc__ or "")
