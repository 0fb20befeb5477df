"""Is a circuit minimal, and is it complete? (Wang et al. 2022, IOI, section 4)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.runs import Circuit, checked_circuits, run_circuits
from mechinterp.patching.circuits.selection import nodes_of_edges
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.metrics import Metric
from mechinterp.randomness import derive_generator
from mechinterp.statistics import t_interval

Unit = Literal["edge", "node"]


@dataclass(frozen=True, eq=False)
class Minimality:
    """The metric of a circuit without one of its parts. Made by `minimality`.

    A part whose removal changes nothing should not be in the circuit, unless another part does the
    same work.
    """

    parts: tuple[str, ...]
    values: Float[Tensor, "parts items"]
    whole: Float[Tensor, " items"]

    @property
    def effect(self) -> Float[Tensor, "parts items"]:
        """What each part's removal costs: m(C) - m(C without it)."""
        return self.whole - self.values

    def to_table(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per part, the largest effect first: part, effect (mean over items), low and high
        (Student's interval), metric (without the part), n_items."""
        return _table("part", self.parts, self.effect, level, metric=self.values)


@dataclass(frozen=True, eq=False)
class Completeness:
    """Circuit and network, both without the same nodes. Made by `completeness`.

    If the circuit holds everything that does the task, then removing part of it hurts the whole
    network as much as it hurts the circuit; a network that suffers less has a backup outside.
    """

    subsets: tuple[str, ...]
    circuit_values: Float[Tensor, "subsets items"]
    model_values: Float[Tensor, "subsets items"]

    @property
    def incompleteness(self) -> Float[Tensor, "subsets items"]:
        """m(network without K) - m(circuit without K); its absolute mean is Wang et al.'s score."""
        return self.model_values - self.circuit_values

    def to_table(self, *, level: float = 0.95) -> pd.DataFrame:
        """One row per subset, the largest |incompleteness| first: subset, incompleteness, low, high
        (Student's interval), circuit_metric, model_metric, n_items."""
        return _table(
            "subset",
            self.subsets,
            self.incompleteness,
            level,
            circuit_metric=self.circuit_values,
            model_metric=self.model_values,
        )


def minimality(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    metric: Metric,
    circuit: Circuit,
    *,
    by: Unit = "edge",
    **options: Any,
) -> Minimality:
    """Remove each edge of the circuit, or all edges out of each of its nodes, one at a time.

    Options as of `run_circuits`. One forward pass per part, batched.

    Raises:
        AnalysisError: the circuit is empty or does not fit the network.
    """
    graph = Graph.of(model)
    (circuit,) = checked_circuits(graph, [circuit & graph.mask])
    if by not in ("edge", "node"):
        raise AnalysisError(f"by: expected 'edge' or 'node', got {by!r}")
    if by == "edge":
        places = circuit.nonzero().tolist()
        parts = [f"{graph.writers[w]} -> {graph.readers[r]}" for w, r in places]
    else:
        places = nodes_of_edges(graph, circuit).nonzero().flatten().tolist()
        parts = [str(graph.writers[w]) for w in places]
    if not parts:
        raise AnalysisError("minimality: the circuit has no edges")
    smaller = []
    for place in places:
        without = circuit.clone()
        without[tuple(place) if by == "edge" else place] = False
        smaller.append(without)
    values = run_circuits(model, clean, corrupt, [circuit, *smaller], metric, **options)
    return Minimality(tuple(parts), values[1:], values[0])


def completeness(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    metric: Metric,
    circuit: Circuit,
    *,
    subsets: Mapping[str, Sequence[Node | str]] | None = None,
    n_random: int = 10,
    seed: int = 0,
    **options: Any,
) -> Completeness:
    """Ablate the same nodes K in the circuit and in the network.

    Args:
        subsets: named sets of writers; None is nothing, each node of the circuit alone, and
            `n_random` random halves of them. The embedding is left out of these: without it nothing
            is left to compare.
        seed: names the stream of the random halves.

    Options as of `run_circuits`. Two forward passes per subset, batched.

    Raises:
        AnalysisError: a subset names no writer of the network; the circuit does not fit it.
    """
    graph = Graph.of(model)
    (circuit,) = checked_circuits(graph, [circuit & graph.mask])
    if subsets is None:
        subsets = _subsets(graph, circuit, n_random, seed)
    masks = []
    for nodes in subsets.values():
        removed = torch.zeros_like(graph.mask)
        removed[[graph.writer_index(node) for node in nodes]] = True
        masks += [circuit & ~removed, graph.mask & ~removed]
    values = run_circuits(model, clean, corrupt, masks, metric, **options)
    return Completeness(tuple(subsets), values[::2], values[1::2])


def _subsets(
    graph: Graph, circuit: Circuit, n_random: int, seed: int
) -> dict[str, Sequence[Node | str]]:
    rows = nodes_of_edges(graph, circuit).nonzero().flatten().tolist()
    nodes = [graph.writers[row] for row in rows if row > 0]
    subsets: dict[str, Sequence[Node | str]] = {"nothing": []}
    subsets |= {str(node): [node] for node in nodes}
    generator = derive_generator(seed, "completeness")
    for i in range(n_random):
        chosen = torch.rand(len(nodes), generator=generator) < 0.5
        subsets[f"random {i}"] = [n for n, c in zip(nodes, chosen.tolist(), strict=True) if c]
    return subsets


def _table(
    name: str,
    labels: Sequence[str],
    effect: Float[Tensor, "rows items"],
    level: float,
    **metrics: Float[Tensor, "rows items"],
) -> pd.DataFrame:
    what = "effect" if name == "part" else "incompleteness"
    intervals = [t_interval(row, level=level) for row in effect.double().cpu().numpy()]
    table = pd.DataFrame(
        {
            name: list(labels),
            what: [i.mean for i in intervals],
            "low": [i.low for i in intervals],
            "high": [i.high for i in intervals],
            **{key: value.double().mean(-1).cpu().numpy() for key, value in metrics.items()},
            "n_items": effect.shape[1],
        }
    )
    order = np.argsort(-table[what].abs().to_numpy(), kind="stable")
    return table.iloc[order].reset_index(drop=True)
