"""Calibration: do the reported probabilities come true, at each of several costs?

A network that serves costs u should report p_u,a = sum_y q_y v(a, y) / W(q). The report is compared
with that share where the posterior q is known, else with its weighted frequency in bins of the
report.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd
import torch

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp import decisions
from mechinterp.tasks.base import Items


def measure_calibration(
    streams: DecisionStreams,
    items: Items,
    *,
    costs: Mapping[str, decisions.Utility],
    n_bins: int = 10,
) -> dict[str, pd.DataFrame]:
    """Tables `calibration` (equal-width bins of the report for the last action) and its summary.

    Items count with their worth W = sum_a v(a, y), so that at symmetric costs this is the usual
    reliability diagram. `ece` is the weighted mean of |observed - predicted| over the bins, which
    is biased upwards by chance alone; `ece_floor` is what a perfectly calibrated report of the same
    probabilities would score on average.
    """
    target = items.labels if items.posterior is None else items.posterior
    predicted = streams.action_logits.softmax(1)[:, -1]
    bins = (predicted * n_bins).long().clamp(max=n_bins - 1)
    rows, summary = [], []
    for name, utility in costs.items():
        weights = decisions.action_weights(items.labels, utility)
        worth = weights.sum(1)
        observed = weights[:, -1] / worth
        error = floor = 0.0
        for b in range(n_bins):
            here = bins == b
            if not here.any():
                continue
            share = worth[here] / worth[here].sum()
            p, o = float(share @ predicted[here]), float(share @ observed[here])
            mass = float(worth[here].sum() / worth.sum())
            error += mass * abs(o - p)
            spread = float((share**2 * predicted[here] * (1 - predicted[here])).sum()) ** 0.5
            floor += mass * spread * (2 / torch.pi) ** 0.5
            rows.append(
                {"costs": name, "bin": b, "predicted": p, "observed": o, "n_items": int(here.sum())}
            )
        brier = float((worth * (predicted - observed) ** 2).sum() / worth.sum())
        summary.append(
            {
                "costs": name,
                "ece": error,
                "ece_floor": floor,
                "brier": brier,
                "log_loss": -float(
                    decisions.log_score(streams.action_logits, target, utility).mean()
                ),
                "n_items": len(items),
            }
        )
    return {"calibration": pd.DataFrame(rows), "calibration_summary": pd.DataFrame(summary)}


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Both tables for every arm of a pair."""
    by_arm = {
        arm: measure_calibration(
            pair.streams(arm), pair.items, costs=pair.costs, n_bins=pair.spec.calibration_bins
        )
        for arm in pair.models
    }
    return {
        name: pair.join({arm: tables[name] for arm, tables in by_arm.items()})
        for name in ("calibration", "calibration_summary")
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="calibration", description=__doc__ or "")
