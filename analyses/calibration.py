"""Calibration: do the reported probabilities come true, at each of several costs?

A network that serves costs u should report p_u,a = sum_y q_y v(a, y) / W(q). The report is compared
with the frequency of that among the labels, weighted by their worth, in bins of the report; only
the log loss takes the posterior q itself where it is known.
"""

from __future__ import annotations

from collections.abc import Mapping

import pandas as pd

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp import decisions
from mechinterp.tasks.base import Items
from probes.calibration import equal_width_bins, reliability


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
    is biased upwards by chance alone; `ece_floor` is what a perfectly calibrated report would score
    on average, and `ece_debiased` what is left without it (see `probes.calibration`).
    """
    target = items.target
    predicted = streams.action_logits.softmax(1)[:, -1]
    bins = equal_width_bins(predicted, n_bins)
    diagrams, summary = [], []
    for name, utility in costs.items():
        weights = decisions.action_weights(items.labels, utility)
        worth = weights.sum(1)
        observed = weights[:, -1] / worth
        found = reliability(predicted, observed, bins, weights=worth, groups=items.groups)
        diagram = pd.DataFrame(found.diagram)
        diagrams.append(diagram.assign(costs=name)[["costs", *diagram.columns]])
        log_scores = decisions.log_score(streams.action_logits, target, utility)
        summary.append(
            {
                "costs": name,
                "ece": found.error,
                "ece_floor": found.error_by_chance,
                "ece_debiased": found.debiased_error,
                "brier": float((worth * (predicted - observed) ** 2).sum() / worth.sum()),
                "log_loss": -float(log_scores.mean()),
                "n_items": len(items),
            }
        )
    return {
        "calibration": pd.concat(diagrams, ignore_index=True),
        "calibration_summary": pd.DataFrame(summary),
    }


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
