"""Circuits: which edges carry the decision, do they explain it, and are they the same after?

Edges are scored by EAP-IG on counterfactual pairs, clean into corrupt. The circuit is the smallest
of the faithfulness curve that keeps `ENOUGH` of the decision; random circuits of equal size stand
beside it, and across checkpoints each one's circuit is run in the other. Scores, choice and
faithfulness are of the same pairs: in-sample, and on other pairs a circuit may keep less.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import check_fits
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuit_comparison import crosswise_faithfulness, node_changes, overlap
from mechinterp.patching.circuits import (
    FaithfulnessCurve,
    Graph,
    circuits_of_size,
    faithfulness_curve,
)
from mechinterp.patching.edge_attribution import attribute_edges
from mechinterp.patching.edge_attribution_result import EdgeAttribution
from mechinterp.patching.metrics import action_log_odds
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task

ENOUGH = 0.8  # of the metric's difference between the plain run and the corrupt one
N_RANDOM = 3


def score_edges(model: HookedModel, task: Task, *, spec: AnalysisSpec) -> EdgeAttribution:
    """Every edge's estimated effect, per item, on the task's counterfactual pairs, and how far the
    estimates agree with exact patches of a few edges."""
    check_fits(model, task)
    prompts = _prompts(task, spec)
    return attribute_edges(
        model,
        **prompts,
        method="EAP-IG-inputs",
        n_steps=spec.circuit_steps,
        per_item=True,
        generator=derive_generator(spec.seed, "trust in edges"),
    )


def measure_circuit(
    model: HookedModel, task: Task, *, spec: AnalysisSpec
) -> tuple[EdgeAttribution, FaithfulnessCurve, dict[str, pd.DataFrame]]:
    """The edges' scores, the faithfulness curve, and the tables `circuit_edges`, `faithfulness` and
    `faithfulness_summary`."""
    edges = score_edges(model, task, spec=spec)
    curve = faithfulness_curve(
        model, **_prompts(task, spec), scores=edges.scores, n_random=N_RANDOM, seed=spec.seed
    )
    table = edges.to_table()
    table["rank"] = table["score"].abs().rank(ascending=False, method="first").astype(int)
    kept = circuit_of_curve(edges.graph, edges.scores, curve)
    table["in_circuit"] = kept[edges.graph.mask].numpy()
    tables = {
        "circuit_edges": table,
        "faithfulness": curve.to_table(seed=spec.seed),
        "faithfulness_summary": curve.summary(seed=spec.seed),
    }
    return edges, curve, tables


def circuit_of_curve(
    graph: Graph, scores: Float[Tensor, "writers readers"], curve: FaithfulnessCurve
) -> Bool[Tensor, "writers readers"]:
    """The smallest circuit of a curve that keeps `ENOUGH`; the whole network if none does."""
    enough = np.flatnonzero(curve.faithfulness.cpu().numpy() >= ENOUGH)
    share = curve.shares[enough[0]] if len(enough) else curve.shares[-1]
    return circuits_of_size(graph, scores, [share])[0]


def compare_circuits(
    before: HookedModel, after: HookedModel, task: Task, *, spec: AnalysisSpec
) -> dict[str, pd.DataFrame]:
    """Two checkpoints' circuits: tables `circuit_overlap`, `circuit_nodes`, and
    `crosswise_faithfulness`, each one's circuit run in the other."""
    found = [measure_circuit(model, task, spec=spec)[:2] for model in (before, after)]
    return _compare((before, after), found, task, spec)


def _compare(
    models: tuple[HookedModel, HookedModel],
    found: Sequence[tuple[EdgeAttribution, FaithfulnessCurve]],
    task: Task,
    spec: AnalysisSpec,
) -> dict[str, pd.DataFrame]:
    (first, first_curve), (second, second_curve) = found
    assert first.item_scores is not None
    assert second.item_scores is not None
    pair = (first.graph, first.item_scores, second.item_scores)
    crosswise = crosswise_faithfulness(
        *models,
        before_scores=first.scores,
        after_scores=second.scores,
        own={"before": first_curve, "after": second_curve},
        seed=spec.seed,
        **_prompts(task, spec),
    )
    return {
        "circuit_overlap": overlap(*pair, seed=spec.seed),
        "circuit_nodes": node_changes(*pair, seed=spec.seed),
        "crosswise_faithfulness": crosswise.summary(seed=spec.seed),
    }


def _prompts(task: Task, spec: AnalysisSpec) -> dict[str, Any]:
    pairs = task.counterfactual_pairs(spec.patch_pairs, seed=spec.seed)
    metric = action_log_odds(task.actions, pairs.clean.likeliest_label)
    return {"clean": pairs.clean.tokens, "corrupt": pairs.corrupt.tokens, "metric": metric}


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Tables `circuit_edges`, `faithfulness`, `faithfulness_summary` of every arm; and of each
    against "before" `circuit_overlap`, `circuit_nodes` and `crosswise_faithfulness`."""
    found: dict[str, tuple[EdgeAttribution, FaithfulnessCurve]] = {}
    parts: dict[str, dict[str, pd.DataFrame]] = {}
    for arm, model in pair.models.items():
        edges, curve, tables = measure_circuit(model, pair.task, spec=pair.spec)
        found[arm] = edges, curve
        for name, table in tables.items():
            parts.setdefault(name, {})[arm] = table
    for arm in pair.models:
        if arm == "before":
            continue
        models = pair.models["before"], pair.models[arm]
        tables = _compare(models, (found["before"], found[arm]), pair.task, pair.spec)
        for name, table in tables.items():
            parts.setdefault(name, {})[arm] = table
    return {name: pair.join(tables) for name, tables in parts.items()}


if __name__ == "__main__":
    run_script(pair_tables, figure="circuits", description=__doc__ or "")
