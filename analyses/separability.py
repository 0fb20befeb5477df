"""Pruning: are learning and choosing separable? Prune what carries the decision, and read the
latents; prune what carries the latents, and value the decision.

Attention heads and MLP neurons are ranked by attribution: by what exchanging their activations for
another prompt's does to the decision (the log-odds of the likeliest label's action), and to each
needed latent (the log-odds of its value by a cross-fitted probe of its best layer at the decision).
Of each kind the first share is pruned, by mean and by resample ablation, and what is left is read
at the decision with fresh readouts and probes, so that a shifted mean does not pass for lost
information. Random components, equally many of each kind, are the control. The areas between the
curves, and their index, are those of `mechinterp.separability`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import pandas as pd
from jaxtyping import Float

from analyses.component_ranking import rank_targets
from analyses.pair import Pair, run_script
from analyses.pruned_readings import Left, Reading
from analyses.streams import check_fits, layers_to_read
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.pruning import (
    ABLATIONS,
    KINDS,
    Effects,
    Ranks,
    first_share,
    pruned_streams,
    random_ranks,
    rank_components,
)
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from mechinterp.separability import (
    DECISION,
    INDICES,
    LATENTS,
    MIN_BASE,
    Areas,
    PruningValues,
    changes,
    measure_areas,
    summarise,
)
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.measures import Estimate

RANDOM = "random"
NOTHING = {"auroc": 0.5}  # what each measure is when nothing is left; else 0

Runs = Mapping[tuple[str, int], Ranks]  # (target, draw)


@dataclass(frozen=True)
class Separability:
    """`curves`: ablation, target, draw, share, n_head, n_neuron, outcome, needed, measure, value,
    base, lost, low, high. `components`: target, kind, layer, unit, effect, rank. `areas` by
    ablation.

    Targets are "decision", "latents" (all needed ones together), each of these as "latent z", and
    "random" with its draws. Measures of the outcome "decision" are utility and log_score at the
    task's utility, from the network's own logits and ("refit") from an affine readout fitted again,
    as shares of (oracle - best constant); of each latent, and of "latents", the mean over needed
    ones, auroc and information (bits). `lost` is the share of `base`, the unpruned network's, that
    is gone, counted from chance, with its 95% interval over groups.
    """

    curves: pd.DataFrame
    components: pd.DataFrame
    areas: Mapping[str, Areas]


def measure_separability(model: HookedModel, task: Task, *, spec: AnalysisSpec) -> Separability:
    """Curves, ranked components and areas of one network, on `pruning_items` of the test split, or
    all that it holds.

    Components are ranked, and their means and resampled values taken, on as many of the training
    split.

    Raises:
        AnalysisError: the decision needs no latent, the items are too few for the folds, or the
            training split holds fewer than the test split.
    """
    check_fits(model, task)
    if not any(latent.needed for latent in task.latents):
        raise AnalysisError(
            f"task {task.name!r} has no latent that the decision needs, so nothing is to be learnt "
            "apart from choosing; give its latents needed=True"
        )
    reading = Reading.of(model, task, spec)
    reference = _reference(task, len(reading.items), spec)
    effects = rank_targets(model, reference, task, spec=spec)
    ranks = {
        target: rank_components(effect, derive_generator(spec.seed, "ties", target))
        for target, effect in effects.items()
    }
    runs = {(target, 0): rank for target, rank in ranks.items()}
    for draw in range(spec.pruning_draws):
        generator = derive_generator(spec.seed, "random components", draw)
        runs[RANDOM, draw] = random_ranks(model, generator)
    base = reading(reading.intact)
    curves, areas = [], {}
    for ablation in ABLATIONS:
        left = _prune(model, runs, ablation, reference, reading, spec)
        curves += _rows(runs, ablation, left, base, reading, spec)
        values = _pruning_values(runs, left, base, reading, spec)
        areas[ablation] = measure_areas(values, reading.items.groups.numpy(), seed=spec.seed)
    return Separability(pd.DataFrame(curves), _components(effects, ranks), areas)


def _reference(task: Task, n_items: int, spec: AnalysisSpec) -> Items:
    """As many training items as test items: each of these is resampled from one of those."""
    found = task.sample(spec.pruning_items, seed=spec.seed, split="train")
    if len(found) < n_items:
        raise AnalysisError(
            f"task {task.name!r}: {len(found)} training items for {n_items} test items, and each "
            f"is resampled from its own; give at most {len(found)} pruning_items"
        )
    return found.select(slice(0, n_items))


def _prune(
    model: HookedModel,
    runs: Runs,
    ablation: str,
    reference: Items,
    reading: Reading,
    spec: AnalysisSpec,
) -> list[Left]:
    """What is left, of every run at every share; the same components (all of them) once."""
    chosen = [first_share(ranks, share) for ranks in runs.values() for share in spec.pruning_shares]
    keys = [tuple(mask.numpy().tobytes() for mask in pruned.values()) for pruned in chosen]
    distinct = dict(zip(keys, chosen, strict=True))
    streams = pruned_streams(
        model,
        reading.items.tokens,
        list(distinct.values()),
        layers=layers_to_read(model.n_layers, spec.max_layers)[1:],
        ablation=ablation,
        reference=reference.tokens,
        batch_size=spec.batch_size,
    )
    left = {}
    with progress_bar(f"{ablation} ablation", len(distinct), unit="network") as advance:
        for key, stream in zip(distinct, streams, strict=True):
            left[key] = reading(stream)
            advance(1)
    return [left[key] for key in keys]


def _rows(
    runs: Runs,
    ablation: str,
    left: list[Left],
    base: Left,
    reading: Reading,
    spec: AnalysisSpec,
) -> list[dict]:
    needed = {f"latent {latent.name}": latent.needed for latent in reading.task.latents}
    groups, rows = reading.items.groups, []
    cells = [(key, ranks, share) for key, ranks in runs.items() for share in spec.pruning_shares]
    for ((target, draw), ranks, share), found in zip(cells, left, strict=True):
        sizes = {kind: round(share * ranks[kind].numel()) for kind in KINDS}
        for (outcome, measure), value in found.items():
            start = base[outcome, measure]
            lost = _lost(value, start, NOTHING.get(measure, 0.0))
            low, high = lost.interval(groups)
            rows.append(
                {
                    "ablation": ablation,
                    "target": target,
                    "draw": draw,
                    "share": share,
                    **{f"n_{kind}": n for kind, n in sizes.items()},
                    "outcome": outcome,
                    "needed": needed.get(outcome, True),
                    "measure": measure,
                    "value": value.value,
                    "base": start.value,
                    "lost": lost.value,
                    "low": low,
                    "high": high,
                }
            )
    return rows


def _lost(value: Estimate, base: Estimate, nothing: float) -> Estimate:
    """The share of `base` that is gone, counted from `nothing`; by the delta method. NaN of next to
    nothing, as of a decision that serves other costs before its readout is fitted again."""
    above = base.value - nothing
    above = above if above >= MIN_BASE else float("nan")
    left = (value.value - nothing) / above
    return Estimate(1 - left, (left * base.influence - value.influence) / above)


def _pruning_values(
    runs: Runs, left: list[Left], base: Left, reading: Reading, spec: AnalysisSpec
) -> PruningValues:
    """Per item the log score of the decision, fitted again, and the bits of the latents."""
    names = [f"latent {name}" for name in reading.needed]
    measures = {DECISION: "log_score_refit", **dict.fromkeys([LATENTS, *names], "information")}

    def outcomes(of: Left) -> Float[np.ndarray, "outcomes items"]:
        means = [of[key] for key in measures.items()]
        return np.stack([(m.value + len(m.influence) * m.influence).numpy() for m in means])

    shape = (len(runs), len(spec.pruning_shares))
    stacked = np.stack([outcomes(one) for one in left])
    stacked = stacked.reshape(*shape, *stacked.shape[1:])
    is_random = np.array([target == RANDOM for target, _ in runs])
    return PruningValues(
        targets=tuple(target for target, _ in runs if target != RANDOM),
        outcomes=tuple(measures),
        shares=spec.pruning_shares,
        base=outcomes(base),
        targeted=stacked[~is_random],
        random=stacked[is_random],
    )


def _components(effects: Mapping[str, Effects], ranks: Mapping[str, Ranks]) -> pd.DataFrame:
    parts = []
    for target, kinds in effects.items():
        for kind, effect in kinds.items():
            layer, unit = np.indices(effect.shape).reshape(2, -1)
            columns = {"target": target, "kind": kind, "layer": layer, "unit": unit}
            columns["effect"] = effect.flatten().cpu().numpy()
            columns["rank"] = 1 + ranks[target][kind].flatten().numpy()
            parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def areas_table(found: Separability) -> pd.DataFrame:
    """ablation, target, outcome; area, random_area and excess, each with its 95% interval."""
    rows = []
    for ablation, areas in found.areas.items():
        random = summarise(areas.random)
        area, excess = summarise(areas.targeted), summarise(areas.excess)
        for t, target in enumerate(areas.targets):
            for o, outcome in enumerate(areas.outcomes):
                row: dict[str, str | float] = {"ablation": ablation}
                row |= {"target": target, "outcome": outcome}
                for name, triple, at in (
                    ("area", area, (t, o)),
                    ("random_area", random, o),
                    ("excess", excess, (t, o)),
                ):
                    for ending, values in zip(("", "_low", "_high"), triple, strict=True):
                        row[name + ending] = float(values[at])
                rows.append(row)
    return pd.DataFrame(rows)


def index_table(found: Separability, before: Separability | None = None) -> pd.DataFrame:
    """ablation, index ("both", or the target that is pruned), value, low, high; and against
    another network the paired change, change_low, change_high."""
    columns = ("ablation", "index", "value", "low", "high", "change", "change_low", "change_high")
    rows = []
    for ablation, areas in found.areas.items():
        index = areas.index()
        moved = changes(before.areas[ablation].index(), index) if before else {}
        for name in INDICES:
            change = summarise(moved[name]) if before else (np.nan,) * 3
            numbers = map(float, (*summarise(index[name]), *change))
            rows.append((ablation, name, *numbers))
    return pd.DataFrame(rows, columns=list(columns))


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Tables `separability` (the curves), `separability_areas`, `separability_index` (with its
    change from "before") and `separability_components` of every arm."""
    found = {
        arm: measure_separability(model, pair.task, spec=pair.spec)
        for arm, model in pair.models.items()
    }
    before = found["before"]
    return {
        "separability": pair.join({arm: own.curves for arm, own in found.items()}),
        "separability_areas": pair.join({arm: areas_table(own) for arm, own in found.items()}),
        "separability_index": pair.join(
            {
                arm: index_table(own, None if arm == "before" else before)
                for arm, own in found.items()
            }
        ),
        "separability_components": pair.join({arm: own.components for arm, own in found.items()}),
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="separability", description=__doc__ or "")
