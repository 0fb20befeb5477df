"""Recovery maps: where does restoring one activation restore the decision?

Counterfactual pairs differ in one latent. The metric is the log-odds of the right action; recovery
is the share of the gap between the two prompts that a patch closes (denoising), averaged over pairs
by what stands at the position. The maps of two checkpoints are compared cell by cell.
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from analyses.pair import Pair, run_script
from analyses.streams import check_fits
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.result import PatchingResult, by_role
from mechinterp.patching.sweeps import sweep_many
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import CounterfactualPairs, Task

COLUMNS = ["grain", "layer", "unit", "latent", "recovery", "stderr", "n_items", "method"]


def measure_recovery(
    model: HookedModel, task: Task, *, spec: AnalysisSpec, pairs: CounterfactualPairs | None = None
) -> pd.DataFrame:
    """Recovery by grain, layer and unit (a role such as "changed value", or a head).

    `recovery` is the ratio of mean effect to mean gap, `stderr` its delta-method error over pairs;
    `latent` is "all" or the one in which the pairs of that row differ.
    """
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
    tables = []
    for result in results.values():
        for latent in ("all", *np.unique(pairs.latent)):
            rows = np.flatnonzero((pairs.latent == latent) | (latent == "all"))
            table = _summarise(result.select(rows), pairs.roles[rows])
            tables.append(table.assign(latent=latent, method=result.method))
    return pd.concat(tables, ignore_index=True).loc[:, COLUMNS]


def _summarise(result: PatchingResult, roles: np.ndarray) -> pd.DataFrame:
    """`unit` is a role of a position, or a name such as "head 3"."""
    kind = result.axes[-1]
    if kind == "position":
        table = by_role(result, roles).rename(columns={"role": "unit"})
    else:
        table = result.to_table()
        table["unit"] = f"{kind} ".replace("_", " ") + table[kind].astype(str)
    return table.drop(columns=["recovery", "stderr"]).rename(
        columns={"pooled_recovery": "recovery", "pooled_stderr": "stderr"}
    )


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `patching`: the maps of "before" and of each other arm, beside each other."""
    maps = {
        arm: measure_recovery(pair.models[arm], pair.task, spec=pair.spec) for arm in pair.models
    }
    if set(maps) == {"before"}:
        return {"patching": pair.join({"before": maps["before"].assign(checkpoint="after")})}
    parts = []
    for arm in maps:
        if arm != "before":
            both = {"before": maps["before"], "after": maps[arm]}
            joined = pd.concat([table.assign(checkpoint=name) for name, table in both.items()])
            parts.append(pair.join({arm: joined}))
    return {"patching": pd.concat(parts, ignore_index=True)}


if __name__ == "__main__":
    run_script(pair_tables, figure="recovery", description=__doc__ or "")
