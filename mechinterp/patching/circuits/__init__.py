"""Circuits: run a network with edges ablated, and ask of a circuit how well it explains it.

scores = edge_effects(model, clean, corrupt, metric)          # or by attribution
curve = faithfulness_curve(model, clean, corrupt, metric, scores)
circuit = select_edges(Graph.of(model), scores, 50)
run_circuits(model, clean, corrupt, [circuit], metric)        # [circuits items]
patch_path(model, clean, corrupt, ["head.4.1"], ["q.6.0"], metric)
minimality(...), completeness(...)
"""

from __future__ import annotations

from mechinterp.patching.circuits.checks import (
    Completeness,
    Minimality,
    completeness,
    minimality,
)
from mechinterp.patching.circuits.edges import edge_effects
from mechinterp.patching.circuits.faithfulness import (
    SHARES,
    FaithfulnessCurve,
    circuits_of_size,
    faithfulness_curve,
)
from mechinterp.patching.circuits.paths import patch_path
from mechinterp.patching.circuits.reference import ABLATIONS, Ablation
from mechinterp.patching.circuits.runs import Circuit, run_circuits
from mechinterp.patching.circuits.selection import (
    Scores,
    edges_of_nodes,
    nodes_of_edges,
    prune_edges,
    random_scores,
    select_edges,
)
from mechinterp.patching.graph import Graph, Node

__all__ = [
    "ABLATIONS",
    "SHARES",
    "Ablation",
    "Circuit",
    "Completeness",
    "FaithfulnessCurve",
    "Graph",
    "Minimality",
    "Node",
    "Scores",
    "circuits_of_size",
    "completeness",
    "edge_effects",
    "edges_of_nodes",
    "faithfulness_curve",
    "minimality",
    "nodes_of_edges",
    "patch_path",
    "prune_edges",
    "random_scores",
    "run_circuits",
    "select_edges",
]
