"""How much is there to gain from knowing a case better, at given costs, and how well is it known?

With class weights w, W(q) = w_1 q + w_0 (1 - q) and p_u = w_1 q / W(q), the learning part of the
weighted loss is G(q) = W(q) H(p_u(q)) (see `mechinterp.decisions`). Knowing a case better spreads
its posterior, which is worth the curvature of -G. In a = w_1 q, b = w_0 (1 - q), a + b = W it is

    -G'' = w_1^2 / a + w_0^2 / b - (w_1 - w_0)^2 / W = w_1 w_0 / [q (1 - q) W(q)],

that is w_1 w_0 / W(q) times what it is at symmetric costs. The same factor multiplies the gradient
of an item's loss in the log-odds at the optimum, for either label: w_1 (1 - p_u) = (1 - q) w_1 w_0
/ W(q) and w_0 p_u = q w_1 w_0 / W(q). A scale common to all weights is taken off by E[W].
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp import decisions
from mechinterp.arms import CONTROL
from mechinterp.tasks.base import Items
from probes.logistic import fit_softmax

COLUMNS = {
    "costs": str,
    "log_odds": int,
    "posterior": float,
    "n_items": int,
    "predicted": float,
    "divergence": float,
    "stderr": float,
}
SYMMETRIC = decisions.diagonal_utility([1.0, 1.0])
CERTAIN = 10  # log-odds beyond which all posteriors are one bin


def measure_incentives(
    streams: DecisionStreams, items: Items, *, costs: Mapping[str, decisions.Utility]
) -> pd.DataFrame:
    """Incentive and knowledge by posterior: one row per costs and bin of the log-odds.

    `posterior` is the mean posterior q of the last label in the bin, `predicted` the mean relative
    incentive (1 at symmetric costs), `divergence` the mean KL(q || q_hat) in nats with its standard
    error over items, which is the same at all costs: q_hat is the network's report after
    `refit_bias`. Costs that are not class weights are left out. The table is empty where the task's
    posterior is not known or there are not two actions.
    """
    weighting = {
        name: weights
        for name, utility in costs.items()
        if (weights := class_weights(utility)) is not None
    }
    if items.posterior is None or streams.action_logits.shape[1] != 2 or not weighting:
        return pd.DataFrame(columns=list(COLUMNS)).astype(COLUMNS)
    posterior = items.posterior.double()
    report = refit_bias(streams.action_logits, posterior)
    divergence = decisions.log_score(
        decisions.bayes_logits(posterior, SYMMETRIC), posterior, SYMMETRIC
    ) - decisions.log_score(report, posterior, SYMMETRIC)
    known = pd.DataFrame(
        {
            "log_odds": log_odds_bins(posterior),
            "posterior": posterior[:, 1],
            "divergence": divergence,
        }
    )
    tables = []
    for name, weights in weighting.items():
        binned = (
            known.assign(predicted=relative_incentive(posterior, weights).numpy())
            .groupby("log_odds", as_index=False)
            .agg(
                posterior=("posterior", "mean"),
                n_items=("posterior", "size"),
                predicted=("predicted", "mean"),
                divergence=("divergence", "mean"),
                stderr=("divergence", "sem"),
            )
        )
        tables.append(binned.assign(costs=name)[list(COLUMNS)])
    return pd.concat(tables, ignore_index=True)


def refit_bias(
    action_logits: Float[Tensor, "items actions"], posterior: Float[Tensor, "items labels"]
) -> Float[Tensor, "items actions"]:
    """The logits plus the constants with the least KL(q || q_hat) on these items.

    A network that is optimal for class weights reports logit q + log(w_1 / w_0), so this turns its
    report back into what it knows of q. There is no cross-fitting: the constants are fitted to the
    posterior itself, so that there is no label noise to fit, and one free number on n items lowers
    the mean divergence by about 1 / n of it.
    """
    nothing = torch.zeros(len(action_logits), 1, dtype=torch.float64)
    logits = action_logits.double()
    return fit_softmax(nothing, posterior, l2=1.0, offset=logits).logits(nothing, logits)


def relative_incentive(
    posterior: Float[Tensor, "items labels"], weights: Float[Tensor, " labels"]
) -> Float[Tensor, " items"]:
    """w_1 w_0 / (W(q) E[W]), with two labels: incentive to learn relative to symmetric costs."""
    worth = posterior @ weights
    return weights.prod() / (worth * worth.mean())


def class_weights(utility: decisions.Utility) -> Float[Tensor, " labels"] | None:
    """The worth of being right about each label; None for costs that are not of that form."""
    v = decisions.relative_utility(utility)
    is_diagonal = v.shape[0] == v.shape[1] and bool((v == v.diag().diag()).all())
    return v.diag() if is_diagonal and bool((v.diag() > 0).all()) else None


def log_odds_bins(posterior: Float[Tensor, "items labels"]) -> Int[Tensor, " items"]:
    """The nearest integer to the posterior log-odds, the larger of two that are equally near."""
    log_odds = posterior[:, 1].logit().clamp(-CERTAIN, CERTAIN)
    # Tasks put many items on halves: rounding errors of the posterior must not divide them.
    return (log_odds + 0.5).round(decimals=6).floor().long()


def incentive_slope(table: pd.DataFrame) -> pd.DataFrame:
    """Does knowledge suffer most where the incentive falls most? One row per weighted arm.

    Over the bins of one network, `slope` is the least-squares slope, bins counting with their
    items, of its divergence in excess of the control's at the same step on log(predicted), in nats
    per log unit of incentive, and `correlation` Spearman's between the two. Both are negative where
    the answer is yes, and missing where either is constant. `table` holds `measure_incentives` with
    the columns task, regime, arm, seed and step, the control being the arm "symmetric".
    """
    bins = ["task", "regime", "seed", "step", "log_odds"]
    control = table[table["arm"] == CONTROL].drop_duplicates(bins)[[*bins, "divergence"]]
    weighted = table[table["arm"].str.startswith("weighted") & (table["costs"] != "symmetric")]
    both = weighted.merge(control, on=bins, suffixes=("", "_control"))
    both["excess"] = both["divergence"] - both["divergence_control"]
    keys = ["task", "regime", "arm", "costs", "seed", "step"]
    rows = [
        {**dict(zip(keys, key, strict=True)), **_trend(network)}
        for key, network in both.groupby(keys, sort=False)
    ]
    return pd.DataFrame(rows, columns=[*keys, "slope", "correlation"])


def _trend(bins: pd.DataFrame) -> dict[str, float]:
    x = np.log(bins["predicted"])
    centred = x - np.average(x, weights=bins["n_items"])
    spread = float((bins["n_items"] * centred**2).sum())
    covariance = float((bins["n_items"] * centred * bins["excess"]).sum())
    return {
        "slope": covariance / spread if spread > 0 else np.nan,
        "correlation": bins["excess"].rank().corr(bins["predicted"].rank()),
    }


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `incentives` of every arm of a pair, with 95% intervals over items."""
    by_arm = {
        arm: measure_incentives(pair.streams(arm), pair.items, costs=pair.costs)
        for arm in pair.models
    }
    table = pair.join(by_arm)
    table["low"] = table["divergence"] - 1.96 * table["stderr"]
    table["high"] = table["divergence"] + 1.96 * table["stderr"]
    return {"incentives": table}


if __name__ == "__main__":
    run_script(pair_tables, figure="incentives", description=__doc__ or "")
