"""Cross-checkpoint patches: one network's activations in the other, same prompts, both ways.

Where does the after network's activation make the before network decide like the after network, and
the reverse, beyond what a random step of equal length does?
"""

from __future__ import annotations

import pandas as pd

from analyses.pair import Pair, run_script
from analyses.streams import action_shift
from mechinterp.hooked import HookedModel
from mechinterp.patching.cross_checkpoint import patch_both_ways
from mechinterp.patching.metrics import Shifted, action_log_odds
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task

GRAINS = ("resid_pre", "attn_out", "mlp_out")


def measure_cross_checkpoint(
    before: HookedModel, after: HookedModel, task: Task, *, spec: AnalysisSpec
) -> pd.DataFrame:
    """Effects as a share of the gap between the checkpoints, by grain, layer and position role.

    Columns as in `mechinterp.patching.cross_checkpoint`; `control` marks random directions. The
    metric is the log-odds of the last action, whatever the item's label: a shift of the decision is
    a gap too. One that the provenance records is in no activation, so that no patch accounts for
    it.
    """
    items = task.sample(spec.patch_pairs, seed=spec.seed, split="test")
    last_action = items.labels.new_full((len(items),), len(task.actions) - 1)
    plain = action_log_odds(task.actions, last_action)
    shifts = (action_shift(model, len(task.actions)) for model in (before, after))
    metric, after_metric = (Shifted(plain, shift) if shift.any() else plain for shift in shifts)
    tables = [
        patch_both_ways(
            before,
            after,
            items.tokens,
            grain=grain,
            metric=metric,
            after_metric=after_metric,
            roles=items.roles,
            seed=spec.seed,
        )
        for grain in GRAINS
    ]
    return pd.concat(tables, ignore_index=True)


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `cross_checkpoint` of before and after."""
    table = measure_cross_checkpoint(
        pair.models["before"], pair.require("after"), pair.task, spec=pair.spec
    )
    return {"cross_checkpoint": pair.join({"after": table})}


if __name__ == "__main__":
    run_script(pair_tables, figure="cross_checkpoint", description=__doc__ or "")
