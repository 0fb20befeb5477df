"""Recovery maps: where does restoring one activation restore the decision?

Counterfactual pairs differ in one latent. The metric is the log-odds of the right action; recovery
is the share of the gap between the two prompts that a patch closes (denoising), averaged over pairs
by what stands at the position. The maps of two checkpoints are compared cell by cell, on the same
pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import check_fits
from mechinterp.hooked import HookedModel
from mechinterp.patching.inference import infer_map
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.result import (
    PatchingResult,
    average_by_role,
    mean_and_stderr,
    recovery_contributions,
)
from mechinterp.patching.sweeps import sweep_many
from mechinterp.randomness import derive_rng
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import CounterfactualPairs, Task

# Fewer than the defaults: a study has many maps, each with one for every latent.
RESAMPLING: dict[str, Any] = {"n_flips": 10_000, "n_resamples": 2_000}


@dataclass(frozen=True)
class RecoveryMap:
    """One grain's map for the pairs that differ in `latent`, or for "all".

    `contributions` average to the recovery; NaN where a pair has no such unit.
    """

    grain: str
    latent: str
    method: str
    layers: np.ndarray
    units: np.ndarray  # of str: a role such as "changed value", or a head
    groups: Tensor
    contributions: Float[Tensor, "pairs layers units"]

    def change_to(self, after: RecoveryMap) -> RecoveryMap:
        """Recovery in `after`, a map of the same pairs, less that in this one."""
        change = after.contributions - self.contributions
        return RecoveryMap(**{**vars(self), "contributions": change})

    def to_table(self) -> pd.DataFrame:
        """One row per cell: see `measure_recovery`."""
        found = infer_map(self.contributions, groups=self.groups, **RESAMPLING)
        mean, stderr, n_items = mean_and_stderr(self.contributions)
        layer, unit = np.meshgrid(self.layers, self.units, indexing="ij")
        cells = {
            "recovery": mean,
            "stderr": stderr,
            "n_items": n_items,
            **{name: getattr(found, name) for name in ("low", "high", "p", "q")},
        }
        return pd.DataFrame(
            {
                "grain": self.grain,
                "layer": layer.ravel(),
                "unit": unit.ravel(),
                "latent": self.latent,
                **{name: values.flatten().numpy() for name, values in cells.items()},
                "method": self.method,
            }
        )


def measure_recovery(
    model: HookedModel, task: Task, *, spec: AnalysisSpec, pairs: CounterfactualPairs | None = None
) -> pd.DataFrame:
    """Recovery by grain, latent, layer and unit (a role such as "changed value", or a head).

    `recovery` is the ratio of mean effect to mean gap, `stderr` its delta-method error over pairs,
    `low` and `high` its 95% bootstrap-t interval over groups of pairs; `p` is of no recovery (sign
    flips) and `q` the same with false discoveries controlled over the cells of one grain's map;
    `latent` is "all" or the one in which the pairs of that row differ.
    """
    return _tabulate(recovery_maps(model, task, spec=spec, pairs=pairs))


def recovery_maps(
    model: HookedModel, task: Task, *, spec: AnalysisSpec, pairs: CounterfactualPairs | None = None
) -> dict[tuple[str, str], RecoveryMap]:
    """By grain and latent; `pairs` default to the task's."""
    check_fits(model, task)
    if pairs is None:
        pairs = task.counterfactual_pairs(spec.patch_pairs, seed=spec.seed)
    metric = action_log_odds(task.actions, pairs.clean.likeliest_label)
    results = sweep_many(
        model,
        corrupt=pairs.corrupt.tokens,
        clean=pairs.clean.tokens,
        grains=spec.patch_grains,
        metrics={"": metric},
    )
    maps = {}
    for result in results.values():
        for latent in ("all", *np.unique(pairs.latent)):
            rows = np.flatnonzero((pairs.latent == latent) | (latent == "all"))
            part = result.select(rows)
            units, effect = _by_unit(part, pairs.roles[rows])
            maps[result.grain, str(latent)] = RecoveryMap(
                grain=result.grain,
                latent=str(latent),
                method=result.method,
                layers=result.labels("layer"),
                units=units,
                groups=pairs.clean.groups[torch.as_tensor(rows)],
                contributions=recovery_contributions(effect.double(), part.gap.double().cpu()),
            )
    return maps


def _by_unit(
    result: PatchingResult, roles: np.ndarray
) -> tuple[np.ndarray, Float[Tensor, "pairs layers units"]]:
    """What is patched, a role of a position or a name such as "head 3", and the effects."""
    kind = result.axes[-1]
    if kind == "position":
        return average_by_role(result, roles, result.effect)
    names = [f"{kind} {label}".replace("_", " ") for label in result.labels(kind)]
    return np.array(names), result.effect.cpu()


def _tabulate(maps: Mapping[tuple[str, str], RecoveryMap]) -> pd.DataFrame:
    return pd.concat([each.to_table() for each in maps.values()], ignore_index=True)


def overlap_table(maps: Mapping[str, Mapping[tuple[str, str], RecoveryMap]]) -> pd.DataFrame:
    """How alike each arm's maps are to those of "before": arm, measure, value, low, high.

    `overlap` is the weighted Jaccard index of recoveries' sizes over the cells of all grains:
    1 where the maps are equal. `beyond_control`, of "after" where there is a control, is how much
    less it overlaps than the control does. Percentile intervals (95%) over groups of pairs, drawn
    together for all arms.
    """
    one = next(iter(maps["before"].values()))
    _, group = one.groups.unique(return_inverse=True)
    n_groups = int(group.max()) + 1
    rng = derive_rng(0, "overlap of maps")
    drawn = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), RESAMPLING["n_resamples"])
    counts = torch.from_numpy(np.concatenate([np.ones((1, n_groups)), drawn])).double()
    sizes = {arm: _sizes(of_arm, counts[:, group]) for arm, of_arm in maps.items()}
    before = sizes.pop("before")
    overlaps = {
        arm: torch.minimum(before, size).sum(1) / torch.maximum(before, size).sum(1)
        for arm, size in sizes.items()
    }
    found = {(arm, "overlap"): overlap for arm, overlap in overlaps.items()}
    if {"after", "control"} <= overlaps.keys():
        found["after", "beyond_control"] = overlaps["control"] - overlaps["after"]
    ends = counts.new_tensor([0.025, 0.975])
    rows = [(*key, float(x[0]), *x[1:].quantile(ends).tolist()) for key, x in found.items()]
    return pd.DataFrame(rows, columns=["arm", "measure", "value", "low", "high"])


def _sizes(
    maps: Mapping[tuple[str, str], RecoveryMap], weights: Float[Tensor, "resamples pairs"]
) -> Float[Tensor, "resamples cells"]:
    """|recovery| of every cell of every grain, with the pairs so weighted; 0 where none is."""
    sizes = []
    for (_, latent), one in maps.items():
        if latent == "all":
            cells = rearrange(one.contributions, "pairs layers units -> pairs (layers units)")
            there = (~cells.isnan()).double()
            total = weights @ cells.nan_to_num().double()
            sizes.append((total / (weights @ there).clamp_min(1e-9)).abs())
    return torch.cat(sizes, 1)


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `patching`: the maps of "before" and of each other arm beside each other, and the
    "change" between them, pair by pair; of two checkpoints or more also `recovery_overlap`."""
    maps = {
        arm: recovery_maps(model, pair.task, spec=pair.spec) for arm, model in pair.models.items()
    }
    if len(maps) == 1:
        own = _tabulate(maps["before"]).assign(checkpoint="after")
        return {"patching": pair.join({"before": own})}
    overlaps = {arm: rows.drop(columns="arm") for arm, rows in overlap_table(maps).groupby("arm")}
    before = maps.pop("before")
    parts = []
    for arm, after in maps.items():
        change = {key: before[key].change_to(after[key]) for key in before}
        each = {"before": before, "after": after, "change": change}
        joined = pd.concat([_tabulate(m).assign(checkpoint=name) for name, m in each.items()])
        parts.append(pair.join({arm: joined}))
    return {
        "patching": pd.concat(parts, ignore_index=True),
        "recovery_overlap": pair.join(overlaps),
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="recovery", description=__doc__ or "")
