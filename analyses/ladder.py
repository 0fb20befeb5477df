"""The value ladder: what a network's decision is worth, and what each better readout would add.

    threshold = bias - raw     readout = head - bias     discarded = depth - head
    learning  = oracle - depth = not encoded (oracle - latents) + not combined (latents - depth)

in two currencies (utility and log score) at each of several costs, on the final-norm'ed stream at
the decision, cross-fitted (design: the value ladder; readouts in `probes.readout`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp import decisions
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes import readout
from probes.beliefs import LatentBeliefs
from probes.folds import grouped_folds
from probes.readout import BeliefLogits, ReadoutConfig, fit_readouts

CURRENCIES = ("utility", "log_score")
RUNGS = ("constant", *readout.RUNGS, "oracle")
# loss -> (rung above, rung below): what moving up would add.
LOSSES = {
    "threshold": ("bias", "raw"),
    "readout": ("head", "bias"),
    "choosing": ("head", "raw"),
    "discarded": ("depth", "head"),
    "learning": ("oracle", "depth"),
    "total": ("oracle", "raw"),
    "not_encoded": ("oracle", "latents"),
    "not_combined": ("latents", "depth"),
}
NOTHING = 1e-9  # a smaller scale is rounding


@dataclass(frozen=True)
class Ladder:
    """Per-item values of every rung at one set of costs.

    `values[currency][rung]` is [items]. `scale` per currency is (oracle - best constant), the unit
    in which losses are stated. Where no posterior is known the oracle is a bound (always right,
    with certainty), so that only differences of `learning` and `not_encoded` between checkpoints
    mean anything.
    """

    costs: str
    values: Mapping[str, Mapping[str, Float[Tensor, " items"]]]
    scale: Mapping[str, float]
    oracle_known: bool
    chosen: Mapping[str, tuple[str, ...]]

    @property
    def n_items(self) -> int:
        return len(self.values["utility"]["raw"])

    def loss(self, currency: str, loss: str) -> Float[Tensor, " items"] | None:
        """Per-item loss as a fraction of the scale; None where a rung was not measured, or where
        there is nothing to lose: at these costs no decision is worth more than the best constant.
        """
        above, below = (self.values[currency].get(rung) for rung in LOSSES[loss])
        if above is None or below is None or self.scale[currency] < NOTHING:
            return None
        return (above - below) / self.scale[currency]


def latent_beliefs(
    streams: DecisionStreams, items: Items, task: Task, *, spec: AnalysisSpec
) -> LatentBeliefs | None:
    """What probes of these streams believe about the latents; None where they give no posterior."""
    if not task.posterior_latents:
        return None
    values = {x: items.latents[x.name] for x in task.latents if x.name in task.posterior_latents}
    return LatentBeliefs(readable_streams(streams), values, ladder_folds(items, spec))


def readable_streams(streams: DecisionStreams) -> dict[int, Tensor]:
    """Final-norm'ed streams but for layer 0, the embedding of the last token, which is the same in
    every item: nothing to read."""
    return {layer: x for layer, x in streams.normed.items() if layer > 0}


def ladder_folds(items: Items, spec: AnalysisSpec) -> Int[Tensor, " items"]:
    return grouped_folds(items.groups, items.labels, n_folds=spec.ladder_folds, seed=spec.seed)


def measure_ladder(
    streams: DecisionStreams,
    items: Items,
    task: Task,
    *,
    costs: Mapping[str, decisions.Utility],
    spec: AnalysisSpec,
    beliefs: LatentBeliefs | None = None,
) -> dict[str, Ladder]:
    """The ladder at each of `costs`. `beliefs` (see `latent_beliefs`) split learning in two."""
    folds = ladder_folds(items, spec)
    readable = readable_streams(streams)
    target = items.target
    ladders = {}
    for name, utility in costs.items():
        readouts = fit_readouts(
            streams.action_logits,
            readable,
            decisions.action_weights(items.labels, utility),
            folds,
            beliefs=_report_of(beliefs, task, utility) if beliefs else None,
            config=ReadoutConfig(),
        )
        ladders[name] = _value(name, readouts.logits, readouts.chosen, target, utility)
    return ladders


def _report_of(beliefs: LatentBeliefs, task: Task, utility: decisions.Utility) -> BeliefLogits:
    """The best report given the probed latents."""

    def logits(held_out: frozenset[int], outer: int) -> Tensor:
        posterior = task.posterior_from_latents(beliefs.probabilities(held_out, outer=outer))
        # A probe may be certain and wrong: keep the log score finite.
        return decisions.bayes_logits(posterior.clamp(1e-6, 1.0), utility)

    return logits


def _value(
    costs: str,
    logits: Mapping[str, Float[Tensor, "items actions"]],
    chosen: Mapping[str, tuple[str, ...]],
    target: decisions.Target,
    utility: decisions.Utility,
) -> Ladder:
    values: dict[str, dict[str, Tensor]] = {currency: {} for currency in CURRENCIES}
    constant = decisions.best_constant(target, utility).report.log().expand(len(target), -1)
    oracle_known = target.is_floating_point()
    reports = {"constant": constant, **logits}
    if oracle_known:
        reports["oracle"] = decisions.bayes_logits(target, utility)
    for rung, report in reports.items():
        values["utility"][rung] = decisions.expected_utility(report, target, utility)
        values["log_score"][rung] = decisions.log_score(report, target, utility)
    if not oracle_known:
        bound = decisions.bayes_logits(
            torch.nn.functional.one_hot(target, len(utility)).double(), utility
        )
        values["utility"]["oracle"] = decisions.expected_utility(bound, target, utility)
        values["log_score"]["oracle"] = decisions.log_score(bound, target, utility)
    scale = {c: float((values[c]["oracle"] - values[c]["constant"]).mean()) for c in CURRENCIES}
    return Ladder(costs, values, scale, oracle_known, chosen)


def ladder_table(ladders: Mapping[str, Ladder]) -> pd.DataFrame:
    """costs, currency, rung, value, stderr (over items), scale, oracle_known, n_items."""
    rows = []
    for ladder in ladders.values():
        for currency in CURRENCIES:
            for rung, value in ladder.values[currency].items():
                rows.append(
                    {
                        "costs": ladder.costs,
                        "currency": currency,
                        "rung": rung,
                        "value": float(value.mean()),
                        "stderr": float(value.std() / len(value) ** 0.5),
                        "scale": ladder.scale[currency],
                        "oracle_known": ladder.oracle_known,
                        "n_items": ladder.n_items,
                        "chosen": "; ".join(ladder.chosen.get(rung, ())),
                    }
                )
    return pd.DataFrame(rows)


def losses_table(ladders: Mapping[str, Ladder]) -> pd.DataFrame:
    """costs, currency, loss, value (fraction of the scale), stderr (over items), oracle_known."""
    rows = []
    for ladder in ladders.values():
        for currency in CURRENCIES:
            for loss in LOSSES:
                value = ladder.loss(currency, loss)
                if value is not None:
                    rows.append(
                        {
                            "costs": ladder.costs,
                            "currency": currency,
                            "loss": loss,
                            "value": float(value.mean()),
                            "stderr": float(value.std() / len(value) ** 0.5),
                            "oracle_known": ladder.oracle_known,
                            "n_items": ladder.n_items,
                        }
                    )
    return pd.DataFrame(rows)


def items_table(ladders: Mapping[str, Ladder], groups: Int[Tensor, " items"]) -> pd.DataFrame:
    """costs, currency, item, group, oracle_known and every rung's value: what verdicts rest on."""
    rows = [
        pd.DataFrame(
            {
                "costs": ladder.costs,
                "currency": currency,
                "item": range(ladder.n_items),
                "group": groups.numpy(),
                "oracle_known": ladder.oracle_known,
                **{rung: value.numpy() for rung, value in ladder.values[currency].items()},
            }
        )
        for ladder in ladders.values()
        for currency in CURRENCIES
    ]
    return pd.concat(rows, ignore_index=True)


def read_ladders(table: pd.DataFrame) -> dict[str, dict[str, Ladder]]:
    """arm -> costs -> ladder, from the rows of `items_table` with a column `arm`."""
    ladders: dict[str, dict[str, Ladder]] = {}
    for (arm, costs), rows in table.groupby(["arm", "costs"], sort=False):
        values, scale = {}, {}
        for currency, some in rows.groupby("currency", sort=False):
            rungs = {
                rung: torch.from_numpy(some[rung].to_numpy(copy=True))
                for rung in RUNGS
                if rung in some and some[rung].notna().all()
            }
            values[currency] = rungs
            scale[currency] = float((rungs["oracle"] - rungs["constant"]).mean())
        oracle_known = bool(rows["oracle_known"].all())
        ladder = Ladder(str(costs), values, scale, oracle_known, {})
        ladders.setdefault(str(arm), {})[str(costs)] = ladder
    return ladders


def pair_ladders(pair: Pair) -> dict[str, dict[str, Ladder]]:
    """Each arm's ladder at each of the pair's costs, on all items."""
    return {
        arm: measure_ladder(
            pair.streams(arm),
            pair.items,
            pair.task,
            costs=pair.costs,
            spec=pair.spec,
            beliefs=latent_beliefs(pair.streams(arm), pair.items, pair.task, spec=pair.spec),
        )
        for arm in pair.models
    }


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Tables `ladder`, `losses`, `ladder_items` (see `items_table`), and `ladder_half`: the rungs
    on half the items, which beside the whole show what estimation costs.
    """
    ladders = pair_ladders(pair)
    half = slice(0, len(pair.items) // 2)
    halves = {
        arm: measure_ladder(
            pair.streams(arm).select(half),
            pair.items.select(half),
            pair.task,
            costs=pair.costs,
            spec=pair.spec,
        )
        for arm in pair.models
    }
    losses = pair.join({arm: losses_table(ladder) for arm, ladder in ladders.items()})
    losses["low"] = losses["value"] - 1.96 * losses["stderr"]
    losses["high"] = losses["value"] + 1.96 * losses["stderr"]
    return {
        "ladder": pair.join({arm: ladder_table(ladder) for arm, ladder in ladders.items()}),
        "ladder_items": pair.join(
            {arm: items_table(ladder, pair.items.groups) for arm, ladder in ladders.items()}
        ),
        "ladder_half": pair.join({arm: ladder_table(ladder) for arm, ladder in halves.items()}),
        "losses": losses,
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="ladder", description=__doc__ or "")
