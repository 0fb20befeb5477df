"""The crossing: front of one checkpoint, back of the other. Where does a change of value sit?

A is before, B after; U(AB) is the value of the hybrid with A's front and B's back, for its raw,
bias-refit and head-refit readout. The shares locate a change and never classify it. Hybrids are
joined as they are ("identity") and through a ridge stitch, fitted to activations on other items, so
that a mere change of basis between the two does not count as one ("ridge").
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.ladder import CURRENCIES
from analyses.pair import Pair, run_script
from analyses.streams import action_shift, check_fits, layers_to_read, read_streams
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.patching.crossing import StitchFit, cross, fit_stitches, shapley_shares
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.folds import grouped_folds
from probes.readout import fit_readouts

READOUTS = ("raw", "bias", "head")
HYBRIDS = ("aa", "ab", "ba", "bb")
DEPTH_SHARE = (
    0.95  # of the depth rung, that a boundary's readout must reach to be the verdict's cut
)


def measure_crossing(
    before: HookedModel,
    after: HookedModel,
    task: Task,
    *,
    costs: Mapping[str, decisions.Utility],
    spec: AnalysisSpec,
    margin: float = 0.05,
) -> pd.DataFrame:
    """One row per cut, stitch, costs, currency and readout; see `mechinterp.patching.crossing`.

    `verdict_cut` marks the one boundary that counts, fixed on `before` and other items. Of a
    stitch, `unexplained_ab` and `unexplained_ba` say what it leaves of the difference between the
    networks' activations, on items that it was not fitted on; 1 is the identity.
    """
    items = crossing_sample(task, spec)
    rows = _cross_all(before, after, task, items, costs=costs, spec=spec, margin=margin)
    return pd.DataFrame([row for row, _ in rows])


def crossing_sample(task: Task, spec: AnalysisSpec) -> Items:
    return task.sample(spec.crossing_items, seed=spec.seed, split="test")


def _cross_all(
    before: HookedModel,
    after: HookedModel,
    task: Task,
    items: Items,
    *,
    costs: Mapping[str, decisions.Utility],
    spec: AnalysisSpec,
    margin: float = 0.05,
) -> Iterator[tuple[dict[str, Any], dict[str, Float[Tensor, " items"]]]]:
    """The rows of `measure_crossing`, each with the value of every item by hybrid."""
    check_fits(before, task)
    folds = grouped_folds(items.groups, items.labels, n_folds=spec.ladder_folds, seed=spec.seed)
    models = {"a": before, "b": after}
    cuts = layers_to_read(before.n_layers, spec.max_layers)
    fits = fit_both_ways(before, after, task, spec=spec) if spec.stitch_items else {}
    crossings = {}
    stitches = ("identity", "ridge") if fits else ("identity",)
    for stitch in stitches:
        for front in models:
            for back in models:
                hybrid = front + back
                if front == back and stitch != "identity":
                    continue  # a network and itself need none
                crossings[hybrid, stitch] = cross(
                    models[front],
                    models[back],
                    items.tokens,
                    0 if front == back else cuts,
                    task.actions,
                    stitches={cut: fit.stitch for cut, fit in fits[hybrid].items()}
                    if stitch == "ridge"
                    else None,
                )
    verdict_cut = find_verdict_cut(before, task, spec=spec)
    target = items.target
    shifts = {name: action_shift(model, len(task.actions)) for name, model in models.items()}
    for cost, utility in costs.items():
        scale = value_scale(target, utility)
        weights = decisions.action_weights(items.labels, utility)

        def value(
            hybrid: str,
            cut: int,
            stitch: str = "identity",
            weights: Tensor = weights,
            utility: decisions.Utility = utility,
        ) -> dict[tuple[str, str], Tensor]:
            crossing = crossings[hybrid, stitch]
            at = crossing.cuts.index(cut)
            raw = crossing.action_logits[at].double().cpu() + shifts[hybrid[1]]
            final = crossing.final[at].float().cpu()
            return _values(raw, final, weights, folds, target, utility)

        own = {"aa": value("aa", 0), "bb": value("bb", 0)}  # the same at every cut
        for cut, stitch in itertools.product(cuts, stitches):
            values = {**own, "ab": value("ab", cut, stitch), "ba": value("ba", cut, stitch)}
            for currency in CURRENCIES:
                for readout in READOUTS:
                    by_item = {f"u_{name}": values[name][currency, readout] for name in HYBRIDS}
                    u = {name: float(value.mean()) for name, value in by_item.items()}
                    shares = shapley_shares(**u, scale=scale[currency], margin=margin)
                    row = {
                        "cut": cut,
                        "stitch": stitch,
                        "costs": cost,
                        "currency": currency,
                        "readout": readout,
                        **u,
                        "phi_front": shares.phi_front,
                        "phi_back": shares.phi_back,
                        "interaction": shares.interaction,
                        "scale": scale[currency],
                        "shares_valid": shares.valid,
                        "verdict_cut": cut == verdict_cut,
                        **{
                            f"unexplained_{hybrid}": fits[hybrid][cut].unexplained
                            if stitch == "ridge"
                            else 1.0
                            for hybrid in ("ab", "ba")
                        },
                    }
                    yield row, by_item


def fit_both_ways(
    before: HookedModel, after: HookedModel, task: Task, *, spec: AnalysisSpec
) -> dict[str, dict[int, StitchFit]]:
    """By hybrid, "ab" (front before, back after) and "ba", then by cut; on the validation split.

    Every fourth group of items is held out to choose the strengths.
    """
    items = task.sample(spec.stitch_items, seed=spec.seed, split="validation")
    _, group = torch.unique(items.groups, return_inverse=True)
    cuts = layers_to_read(before.n_layers, spec.max_layers)
    return {
        hybrid: fit_stitches(front, back, items.tokens, cuts, held_out=group % 4 == 3)
        for hybrid, front, back in (("ab", before, after), ("ba", after, before))
    }


def find_verdict_cut(before: HookedModel, task: Task, *, spec: AnalysisSpec) -> int | None:
    """The first boundary at which a readout reaches 95% of what any boundary's readout reaches.

    In log score at symmetric costs above the best constant, on the validation split. None where no
    layer says anything about the label: such a network has no decision to cut in two.
    """
    items = task.sample(spec.crossing_items, seed=spec.seed, split="validation")
    streams = read_streams(
        before, items, task, batch_size=spec.batch_size, max_layers=spec.max_layers
    )
    folds = grouped_folds(items.groups, items.labels, n_folds=spec.ladder_folds, seed=spec.seed)
    symmetric = decisions.diagonal_utility([1.0] * len(task.actions))
    weights = decisions.action_weights(items.labels, symmetric)
    target = items.target
    constant = decisions.best_constant(target, symmetric).value.log_score
    nothing = torch.zeros(len(items), len(task.actions))
    gains = {}
    for layer, normed in streams.normed.items():
        if layer > 0:
            readouts = fit_readouts(nothing, {layer: normed}, weights, folds)
            score = decisions.value(readouts.logits["head"], target, symmetric).log_score
            gains[layer] = score - constant
    most = max(gains.values())
    if most <= 0:
        return None
    return next(layer for layer, gain in gains.items() if gain >= DEPTH_SHARE * most)


def _values(
    raw: Float[Tensor, "items actions"],
    final: Float[Tensor, "items d_model"],
    weights: Float[Tensor, "items actions"],
    folds: Int[Tensor, " items"],
    target: decisions.Target,
    utility: decisions.Utility,
) -> dict[tuple[str, str], Float[Tensor, " items"]]:
    """(currency, readout) -> value of one hybrid in each item."""
    logits = fit_readouts(raw, {1: final}, weights, folds).logits
    values = {}
    for name in READOUTS:
        values["utility", name] = decisions.expected_utility(logits[name], target, utility)
        values["log_score", name] = decisions.log_score(logits[name].double(), target, utility)
    return values


def value_scale(target: decisions.Target, utility: decisions.Utility) -> dict[str, float]:
    """(oracle - best constant) per currency; certainty where no posterior is known."""
    if not target.is_floating_point():
        target = torch.nn.functional.one_hot(target, len(utility)).double()
    oracle = decisions.oracle_value(target, utility)
    constant = decisions.best_constant(target, utility).value
    return {c: getattr(oracle, c) - getattr(constant, c) for c in CURRENCIES}


def valid_at(crossing: pd.DataFrame, margin: float) -> pd.DataFrame:
    """The table with its shares judged by another margin."""
    names = [f"u_{hybrid}" for hybrid in HYBRIDS]
    valid = [
        shapley_shares(**dict(zip(names, u, strict=True)), scale=scale, margin=margin).valid
        for *u, scale in crossing[[*names, "scale"]].itertuples(index=False)
    ]
    return crossing.assign(shares_valid=valid)


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `crossing` of before and after; the null would take a second control.

    Where there is a verdict's cut also `crossing_items`: costs, currency, readout, cut, scale,
    item, group and the hybrids' values there, joined as they are: what a verdict's shares rest on.
    """
    items = crossing_sample(pair.task, pair.spec)
    models = pair.models["before"], pair.require("after")
    rows, at_cut = [], []
    for row, values in _cross_all(*models, pair.task, items, costs=pair.costs, spec=pair.spec):
        rows.append({**row, "null": False})
        if row["verdict_cut"] and row["stitch"] == "identity":
            cell = {name: row[name] for name in ("costs", "currency", "readout", "cut", "scale")}
            places = {"item": range(len(items)), "group": items.groups.numpy()}
            hybrids = {name: value.numpy() for name, value in values.items()}
            at_cut.append(pd.DataFrame({**cell, **places, **hybrids}))
    tables = {"crossing": pair.join({"after": pd.DataFrame(rows)})}
    if at_cut:
        tables["crossing_items"] = pair.join({"after": pd.concat(at_cut, ignore_index=True)})
    return tables


if __name__ == "__main__":
    run_script(pair_tables, figure="crossing", description=__doc__ or "")
