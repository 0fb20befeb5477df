"""Grafts: what is the decision worth when one part's weights come from the other checkpoint?

The exact version of the crossing, part by part: put a part of "after" into "before" and see how
much of the change it brings; put that of "before" into "after" and see how much it takes away. Like
the crossing's shares, grafts locate a change and never classify it, and they need not add up.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analyses.crossing import value_scale
from analyses.pair import Pair, run_script
from analyses.streams import action_shift, check_fits
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.patching.graft import graft_components
from mechinterp.patching.inference import infer_map
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task

# Fewer than the defaults: there is a map for every direction, costs and currency.
RESAMPLING = {"n_flips": 10_000, "n_resamples": 2_000}
NAMES = ("low", "high", "p", "q")
KEYS = ["direction", "costs", "currency"]
COLUMNS = [
    *("component", "kind", "layer", "head", "direction", "costs", "currency"),
    *("n_weights", "differs", "u_target", "u_donor", "u_graft"),
    *("change", "stderr", "low", "high", "p", "q", "total", "scale"),
]


def measure_grafts(
    before: HookedModel,
    after: HookedModel,
    task: Task,
    *,
    costs: Mapping[str, decisions.Utility],
    spec: AnalysisSpec,
) -> pd.DataFrame:
    """One row per component, direction, costs and currency, with the networks' own logits.

    `change` is what the graft does to the target's value, item by item: `low` and `high` its 95%
    bootstrap-t interval over groups of items, `p` of no change (sign flips), `q` the same with
    false discoveries controlled over all components. `total` is what exchanging the whole network
    does; it has rows of its own, whose component and kind are "whole". Parts that are the same in
    both networks have `differs` False and change nothing.

    Raises:
        AnalysisError: the networks differ in more than their weights.
    """
    check_fits(before, task)
    items = task.sample(spec.graft_items, seed=spec.seed, split="test")
    target = items.target
    n_actions = len(task.actions)
    grafts = graft_components(
        before,
        after,
        items.tokens,
        target,
        actions=task.actions,
        costs=costs,
        by=spec.graft_parts,
        action_shifts=(action_shift(before, n_actions), action_shift(after, n_actions)),
        per_item=True,
        batch_size=spec.batch_size,
    )
    options = {"groups": items.groups, **RESAMPLING}
    parts = []
    for key, rows in grafts.table.groupby(KEYS, sort=False):
        direction, cost, currency = (str(name) for name in key)
        found = grafts.infer(direction=direction, costs=cost, currency=currency, **options)
        rows = rows.assign(**{name: getattr(found, name).numpy() for name in NAMES})
        total = grafts.totals[direction, cost, currency, "raw"]
        whole = infer_map(total, **options)
        row = {
            **rows.iloc[0][[*KEYS, "u_target", "u_donor"]],
            "component": "whole",
            "kind": "whole",
            "n_weights": rows["n_weights"].sum(),
            "differs": rows["differs"].any(),
            "u_graft": rows["u_donor"].iloc[0],
            "change": float(total.mean()),
            "stderr": float(total.std() / len(total) ** 0.5),
            **{name: float(getattr(whole, name)) for name in NAMES},
        }
        scale = value_scale(target, costs[cost])[currency]
        rows = pd.concat([rows, pd.DataFrame([row])], ignore_index=True)
        parts.append(rows.assign(total=row["change"], scale=scale))
    table = pd.concat(parts, ignore_index=True)
    return table.astype({"layer": "Int64", "head": "Int64"}).loc[:, COLUMNS]


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `grafts` of before and after."""
    table = measure_grafts(
        pair.models["before"], pair.require("after"), pair.task, costs=pair.costs, spec=pair.spec
    )
    return {"grafts": pair.join({"after": table})}


if __name__ == "__main__":
    run_script(pair_tables, figure="grafts", description=__doc__ or "")
