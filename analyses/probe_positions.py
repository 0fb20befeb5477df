"""Where along the prompt is each latent readable? Linear probes at every layer and position.

A latent is read trivially where its token stands; what tokens do not explain is the point. So every
position has beside it what the tokens say up to there: the token itself, their counts, and each in
its place, in which a linear reader finds whatever needs no computing.
"""

from __future__ import annotations

import operator
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import check_fits, decision_sites
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.store import capture
from mechinterp.tasks.base import Items, Task
from probes.crossfit import LinearProbes, fit_probes, out_of_fold
from probes.folds import grouped_folds
from probes.measures import Estimate, estimate
from probes.permutations import ridge_permutation_test
from probes.probe import SURFACE_LAYER, check_activations, control_labels, encode
from probes.surface import surface_features

# Chosen without looking at labels, the middle of the strengths that `ProbeConfig` chooses from:
# choosing in every cell of a map takes ten times as long.
STRENGTH = 1e-2
TOLERANCE = 1e-5
N_PERMUTATIONS = 500
MEASURES = ("auroc", "accuracy", "information", "selectivity")
COLUMNS = (
    *("layer", "unit", "position", "latent", "kind", "measure"),
    *("value", "low", "high", "p_map"),
)

Cell = tuple[int, str, str]  # layer, unit, latent
_Labels = dict[tuple[str, str], Int[Tensor, " items"]]  # latent, kind -> index into its values


@dataclass(frozen=True)
class Unit:
    """A place of the prompt that every item has: the k-th position of one role.

    `index` is its position in each item, `position` the same where all items have it there, else
    NaN.
    """

    name: str
    index: Int[Tensor, " items"]

    @property
    def position(self) -> float:
        return float(self.index[0]) if (self.index == self.index[0]).all() else float("nan")

    def prefix(self, tokens: Int[Tensor, "items positions"]) -> Int[Tensor, "items positions"]:
        """The tokens up to here, in the last columns, with -1 before them."""
        n = tokens.shape[1]
        column = torch.arange(n) - (n - 1 - rearrange(self.index, "items -> items 1"))
        return tokens.gather(1, column.clamp_min(0)).masked_fill(column < 0, -1)


def prompt_units(items: Items) -> tuple[Unit, ...]:
    """A unit for each position, or, where roles stand at other positions in other items, for each
    role; a number follows a name that an item has more than once. Roles that some item lacks are
    left out.
    """
    names = []
    for roles in items.roles.tolist():
        seen: dict[str, int] = {}
        for role in roles:
            seen[role] = seen.get(role, 0) + 1
        counts, numbered = dict.fromkeys(seen, 0), []
        for role in roles:
            counts[role] += 1
            numbered.append(f"{role} {counts[role]}" if seen[role] > 1 else role)
        names.append(numbered)
    found = np.array(names)
    units = []
    for name in dict.fromkeys(found[0].tolist()):
        here = found == name
        if here.any(1).all():
            units.append(Unit(name, torch.from_numpy(here.argmax(1))))
    return tuple(units)


@dataclass(frozen=True)
class PositionMap:
    """Out-of-fold measures of every cell, with their influences, so that two maps of the same items
    subtract. `null` are AUROCs of ridge classifiers, less their mean under permuted labels: the
    observed one first, then each permutation's.
    """

    units: tuple[Unit, ...]
    groups: Int[Tensor, " items"]
    estimates: Mapping[tuple[Cell, str, str], Estimate]  # cell, kind, measure
    null: Mapping[Cell, Float[Tensor, " permutations"]]

    @cached_property
    def _positions(self) -> dict[str, float]:
        return {unit.name: unit.position for unit in self.units}

    def to_table(self) -> pd.DataFrame:
        """Columns layer, unit, position, latent, kind, measure, value, low, high, p_map.

        Kinds are "latent", "control", and at layer -1 "surface_token", "surface_bag" and
        "surface_ordered"; low and high are 95% intervals over groups. `p_map`, in a latent's
        rows of AUROC, tests with a ridge classifier whether activations and labels depend on each
        other, corrected for all cells of the map: the share of permutations whose largest excess
        over the map is as large (Westfall and Young 1993).
        """
        largest: dict[str, Tensor] = {}
        for (_, _, latent), excess in self.null.items():
            largest[latent] = torch.maximum(largest.get(latent, excess[1:]), excess[1:])
        p = {cell: _p(largest[cell[2]], excess[0]) for cell, excess in self.null.items()}
        return self._tabulate(
            (
                cell,
                kind,
                measure,
                found,
                p[cell] if (kind, measure) == ("latent", "auroc") else None,
            )
            for (cell, kind, measure), found in self.estimates.items()
        )

    def change_to(self, after: PositionMap, *, seed: int = 0) -> pd.DataFrame:
        """Each latent's measures in `after`, a map of the same items, less those in this one.

        `to_table`'s columns; kind is "change". Intervals are paired. `p_map` is of no change at
        all, corrected for the map: groups' influences get random signs (the wild bootstrap), the
        same in every cell, and the largest |t| over the map is compared.

        Raises AnalysisError where the maps are of other items.
        """
        if not torch.equal(self.groups, after.groups):
            raise AnalysisError("after: is a map of other items; give both networks the same")
        _, group = self.groups.unique(return_inverse=True)
        n_groups = int(group.max()) + 1
        generator = derive_generator(seed, "change of a map")
        signs = (
            torch.randint(0, 2, (N_PERMUTATIONS, n_groups), generator=generator).double() * 2 - 1
        )
        changes = {
            (cell, measure): after.estimates[cell, kind, measure] - before
            for (cell, kind, measure), before in self.estimates.items()
            if kind == "latent" and (cell, kind, measure) in after.estimates
        }
        t, largest = {}, {}
        for (cell, measure), change in changes.items():
            sums = torch.zeros(n_groups).double().index_add(0, group, change.influence)
            # Where nothing changes, t is 0 and so are its flips.
            spread = sums.norm().clamp_min(torch.finfo(torch.float64).tiny)
            t[cell, measure], flips = abs(change.value) / spread, (signs @ sums).abs() / spread
            key = cell[2], measure
            largest[key] = torch.maximum(largest.get(key, flips), flips)
        return self._tabulate(
            (cell, "change", measure, change, _p(largest[cell[2], measure], t[cell, measure]))
            for (cell, measure), change in changes.items()
        )

    def _tabulate(
        self, rows: Iterable[tuple[Cell, str, str, Estimate, float | None]]
    ) -> pd.DataFrame:
        records = []
        for (layer, unit, latent), kind, measure, found, p in rows:
            key = layer, unit, self._positions[unit], latent, kind, measure
            records.append((*key, found.value, *found.interval(self.groups), p))
        return pd.DataFrame(records, columns=list(COLUMNS)).astype({"p_map": float})


def _p(null: Float[Tensor, " m"], observed: Tensor) -> float:
    # Sums in another order differ in the last bits: such a tie is a tie.
    return (int((null >= observed - 1e-9).sum()) + 1) / (len(null) + 1)


def map_positions(
    residuals: Iterable[tuple[int, Float[Tensor, "items positions d_model"]]],
    items: Items,
    *,
    control_types: Int[Tensor, " items"] | Mapping[str, Int[Tensor, " items"]],
    n_folds: int = 5,
    n_permutations: int = N_PERMUTATIONS,
    seed: int = 0,
) -> PositionMap:
    """Probe every latent of `items` at every layer, one in memory at a time, and every unit.

    Logistic probes at one strength on standardised activations, scored out of folds over
    `items.groups` that all cells share. The positions of `residuals` are those of `items.tokens`;
    `control_types` are as in `probes.probe`. Cells in which all items are the same are left out:
    before the first token that differs, nothing can be read.

    Raises AnalysisError where a latent is constant, where a fold lacks one of its values, where no
    permutation changes one, and where lengths differ.
    """
    labels: _Labels = {}
    for name, latent in items.latents.items():
        codes = encode(name, latent, len(items))[1]
        types = control_types[name] if isinstance(control_types, Mapping) else control_types
        generator = derive_generator(seed, "control task", name)
        labels[name, "latent"] = codes
        labels[name, "control"] = control_labels(types, codes, generator)
    own = {key: codes for key, codes in labels.items() if key[1] == "latent"}
    folds = grouped_folds(
        items.groups,
        torch.stack(list(labels.values()), 1),
        n_folds,
        seed,
        names=[f"{name} ({kind})" for name, kind in labels],
    )
    estimates: dict[tuple[Cell, str, str], Estimate] = {}

    def probe(x: Float[Tensor, "items d"], labels: _Labels, layer: int, unit: Unit) -> None:
        found = _measure(x, labels, folds, items.groups)
        for (name, kind), measures in found.items():
            if (name, "control") in found and kind == "latent":
                control = found[name, "control"]["accuracy"]
                measures["selectivity"] = measures["accuracy"] - control
            for measure in MEASURES:
                if measure in measures:
                    estimates[(layer, unit.name, name), kind, measure] = measures[measure]

    units = []
    for unit in prompt_units(items):
        prefix = unit.prefix(items.tokens)
        if (prefix != prefix[0]).any():
            units.append(unit)
            for design, x in _surface(prefix, items.groups).items():
                named = {(name, f"surface_{design}"): codes for (name, _), codes in own.items()}
                probe(x, named, SURFACE_LAYER, unit)
    null = {}
    n_layers = operator.length_hint(residuals, 1)
    with progress_bar("probes by position", n_layers * len(units), unit="cell") as advance:
        for layer, residual in residuals:
            for unit in units:
                x = residual[torch.arange(len(residual)), unit.index].double()
                check_activations(f"layer {layer}, {unit.name}", x, len(items))
                if (x != x[0]).any():
                    probe(x, labels, layer, unit)
                    found = _null(x, own, folds, items.groups, n_permutations, seed)
                    null |= {(layer, unit.name, name): each for name, each in found.items()}
                advance(1)
    return PositionMap(tuple(units), items.groups, estimates, null)


def _measure(
    x: Float[Tensor, "items d"],
    labels: _Labels,
    folds: Int[Tensor, " items"],
    groups: Int[Tensor, " items"],
) -> dict[tuple[str, str], dict[str, Estimate]]:
    """Measures of the out-of-fold predictions of each labelling."""
    train = folds != torch.arange(int(folds.max()) + 1)[:, None]
    found = {}
    for n_values, keys in _by_number_of_values(labels).items():
        y = torch.stack([labels[key] for key in keys], 1)
        strengths = torch.full((len(train), 1, len(keys)), STRENGTH, dtype=torch.float64)
        fits = fit_probes(x, y, n_values, train=train, strengths=strengths, tol=TOLERANCE)
        probes = LinearProbes(fits.coef[:, 0], fits.intercept[:, 0])
        log_p = out_of_fold(probes, x, folds)
        for column, key in enumerate(keys):
            found[key] = estimate(log_p[:, column], y[:, column], folds, groups=groups)
    return {key: found[key] for key in labels}


def _null(
    x: Float[Tensor, "items d"],
    labels: _Labels,
    folds: Int[Tensor, " items"],
    groups: Int[Tensor, " items"],
    n_permutations: int,
    seed: int,
) -> dict[str, Float[Tensor, " 1+permutations"]]:
    """AUROC of each latent, then under permuted labels, less the mean of all.

    Permutations are the same in every cell, so their maxima over cells can be taken. The mean is
    not 1/2 where labels vary within groups, since they are permuted there only.
    """
    spread = x.std(0)
    x = (x - x.mean(0)) / torch.where(spread > 0, spread, 1)
    found = {}
    for keys in _by_number_of_values(labels).values():
        y = torch.stack([labels[key] for key in keys], 1)
        # As strong as the probes' penalty: the curvature of the logistic loss is at most 1/4.
        test = ridge_permutation_test(
            x,
            y,
            folds,
            n_permutations=n_permutations,
            strength=4 * STRENGTH * len(x),
            groups=groups,
            seed=seed,
        )
        areas = torch.cat([test.auroc[None], test.null_auroc])
        excess = areas - areas.mean(0)
        found |= {name: excess[:, column] for column, (name, _) in enumerate(keys)}
    return found


def _by_number_of_values(labels: _Labels) -> dict[int, list[tuple[str, str]]]:
    """Labellings with equally many values are fitted together."""
    batches: dict[int, list[tuple[str, str]]] = {}
    for key, codes in labels.items():
        batches.setdefault(int(codes.max()) + 1, []).append(key)
    return batches


def _surface(
    prefix: Int[Tensor, "items positions"], groups: Int[Tensor, " items"]
) -> dict[str, Float[Tensor, "items features"]]:
    """The designs of `probes.surface`, and "ordered": every token so far in its place."""
    varying = [column[:, None] for column in prefix.T if (column != column[0]).any()]
    places = [surface_features(column, groups=groups)["token"] for column in varying]
    return {**surface_features(prefix, groups=groups), "ordered": torch.cat(places, 1)}


def read_positions(
    model: HookedModel, items: Items, task: Task, *, spec: AnalysisSpec
) -> Iterator[tuple[int, Float[Tensor, "items positions d_model"]]]:
    """Layer and residual stream at all positions, through a store on disk: one layer in memory.

    Raises TaskError if the task's tokens do not fit the model.
    """
    check_fits(model, task)
    sites = decision_sites(model, max_layers=spec.max_layers)
    with tempfile.TemporaryDirectory() as out:
        store = capture(
            model,
            items,
            out=out,
            sites=sites.values(),
            positions="all",
            batch_size=spec.batch_size,
            covariance_width=0,
        )
        for layer, site in sites.items():
            yield layer, store[site]


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `probe_positions` of every arm; those after the first also have kind "change", what
    changed from "before"."""
    items, spec = pair.probe_items, pair.spec
    maps = {
        arm: map_positions(
            read_positions(model, items, pair.task, spec=spec),
            items,
            control_types=pair.task.control_types(items),
            n_folds=spec.probe_folds,
            seed=spec.seed,
        )
        for arm, model in pair.models.items()
    }
    tables = {arm: found.to_table() for arm, found in maps.items()}
    for arm in tables:
        if arm != "before":
            change = maps["before"].change_to(maps[arm], seed=spec.seed)
            tables[arm] = pd.concat([tables[arm], change], ignore_index=True)
    needed = {latent.name: latent.needed for latent in pair.task.latents}
    table = pair.join(tables)
    return {"probe_positions": table.assign(needed=table["latent"].map(needed))}


if __name__ == "__main__":
    run_script(pair_tables, figure="probe_positions", description=__doc__ or "")
