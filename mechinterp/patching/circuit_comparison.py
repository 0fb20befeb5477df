"""Circuits of two checkpoints: do they overlap, does each explain the other, which nodes moved."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.faithfulness import FaithfulnessCurve, faithfulness_curve
from mechinterp.patching.graph import Graph
from mechinterp.patching.metrics import Metric
from mechinterp.randomness import derive_rng

TOP_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1)
N_SPLITS = 20  # random halves, averaged over
ROLES = ("writer", "reader")
ItemScores = Float[Tensor, "*items writers readers"]
Edges = Float[np.ndarray, " edges"]
ModelOrLoader = HookedModel | Callable[[], HookedModel]


def overlap(
    graph: Graph,
    before: ItemScores,
    after: ItemScores,
    *,
    top_shares: Sequence[float] = TOP_SHARES,
    level: float = 0.95,
    n_resamples: int = 200,
    seed: int = 0,
) -> pd.DataFrame:
    """How much two checkpoints' edge scores agree.

    One row per measure, all of |mean score over items|:
        jaccard_top_S    shared edges / all edges among the top share S of either
        spearman         rank correlation over all edges
        weighted_jaccard sum of the smaller / sum of the larger of the two, edge by edge
        weighted_jaccard_normalized  the same after dividing each checkpoint's scores by their sum,
                         blind to an overall change of scale
    Columns: measure, value, low, high (percentile bootstrap over items, the same draw for both
    checkpoints where they have as many), chance (of random sets of that size; else NaN), within
    (overlap of one checkpoint with itself, between random halves of its items, mean of the two),
    across (of the one's half with the other's other half). Sampling noise lowers every overlap, in
    the resamples once more; so read a change from `across` below `within`, not from value below 1.

    Args:
        before, after: [items writers readers]; without items there are neither intervals nor
            halves. NaN: no edge.

    Raises:
        AnalysisError: the scores do not fit the graph.
    """
    pair = [_edges_by_item(graph, scores) for scores in (before, after)]
    rng = derive_rng(seed, "circuit overlap")
    n_edges = graph.n_edges
    measures = _measures(top_shares, n_edges)
    value = [measure(*(x.mean(0) for x in pair)) for measure in measures.values()]
    nothing = np.full((1, len(measures)), np.nan)
    drawn = within = across = nothing
    if min(map(len, pair)) > 1:
        drawn = np.array(
            [[m(*means) for m in measures.values()] for means in _resampled(pair, n_resamples, rng)]
        )
        splits = [_halves(pair, rng) for _ in range(N_SPLITS)]
        within = np.array(
            [[np.mean([m(*own) for own in split]) for m in measures.values()] for split in splits]
        )
        across = np.array(
            [
                [np.mean([m(b[0], a[1]), m(b[1], a[0])]) for m in measures.values()]
                for b, a in splits
            ]
        )
    tail = 0.5 - level / 2
    sizes = [max(1, round(share * n_edges)) for share in top_shares]
    chance = [k / n_edges * k / (2 * k - k * k / n_edges) for k in sizes]
    return pd.DataFrame(
        {
            "measure": list(measures),
            "value": value,
            "low": np.quantile(drawn, tail, axis=0),
            "high": np.quantile(drawn, 1 - tail, axis=0),
            "chance": chance + [np.nan] * (len(measures) - len(chance)),
            "within": within.mean(0),
            "across": across.mean(0),
            "n_items": min(map(len, pair)),
        }
    )


def node_changes(
    graph: Graph,
    before: ItemScores,
    after: ItemScores,
    *,
    role: str = "writer",
    level: float = 0.95,
    n_resamples: int = 1_000,
    seed: int = 0,
) -> pd.DataFrame:
    """Which nodes moved: each node's share of all |mean edge scores|, before and after.

    A writer's strength is the sum over the edges out of it, a reader's over those into it; divided
    by the sum over all edges, so that a change of scale is no change.

    Columns: node, kind, layer, head, before, after, change, low, high (of the change: percentile
    bootstrap over items), rank_before, rank_after (1 is the strongest). Largest |change| first.

    Raises:
        AnalysisError: the scores do not fit the graph, or the role is unknown.
    """
    if role not in ROLES:
        raise AnalysisError(f"role: expected 'writer' or 'reader', got {role!r}")
    nodes = graph.writers if role == "writer" else graph.readers
    index = graph.mask.nonzero()[:, ROLES.index(role)].numpy()
    pair = [_edges_by_item(graph, scores) for scores in (before, after)]

    def strengths(mean: Edges) -> np.ndarray:
        total = np.bincount(index, np.abs(mean), minlength=len(nodes))
        return total / max(total.sum(), np.finfo(float).tiny)

    first, second = (strengths(x.mean(0)) for x in pair)
    low = high = np.full(len(nodes), np.nan)
    if min(map(len, pair)) > 1:
        rng = derive_rng(seed, "node changes")
        drawn = [strengths(a) - strengths(b) for b, a in _resampled(pair, n_resamples, rng)]
        low, high = np.quantile(drawn, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    table = pd.DataFrame(
        {
            "node": [str(node) for node in nodes],
            "kind": [node.kind for node in nodes],
            "layer": pd.array([node.layer for node in nodes], dtype="Int64"),
            "head": pd.array([node.head for node in nodes], dtype="Int64"),
            "before": first,
            "after": second,
            "change": second - first,
            "low": low,
            "high": high,
            "rank_before": _ranks(first),
            "rank_after": _ranks(second),
        }
    )
    order = np.argsort(-np.abs(second - first), kind="stable")
    return table.iloc[order].reset_index(drop=True)


@dataclass(frozen=True, eq=False)
class CrosswiseFaithfulness:
    """Faithfulness curves of both checkpoints' circuits in both checkpoints.

    `curves[circuit, model]` with "before" and "after" in both places. The random circuits of a
    model are the same under both circuits.
    """

    curves: Mapping[tuple[str, str], FaithfulnessCurve]

    def to_table(self, **options: Any) -> pd.DataFrame:
        """The curves' tables (see `FaithfulnessCurve.to_table`) with columns circuit and model."""
        return self._joined(lambda curve: curve.to_table(**options))

    def summary(self, **options: Any) -> pd.DataFrame:
        """CPR and CMD of each (see `FaithfulnessCurve.summary`): the before circuit explains the
        after model as far as its CMD there is that of the after circuit."""
        return self._joined(lambda curve: curve.summary(**options))

    def _joined(self, table: Callable[[FaithfulnessCurve], pd.DataFrame]) -> pd.DataFrame:
        parts = []
        for (circuit, model), curve in self.curves.items():
            part = table(curve)
            part.insert(0, "circuit", circuit)
            part.insert(1, "model", model)
            parts.append(part)
        return pd.concat(parts, ignore_index=True)


def crosswise_faithfulness(
    before: ModelOrLoader,
    after: ModelOrLoader,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    metric: Metric,
    before_scores: Float[Tensor, " writers *readers"],
    after_scores: Float[Tensor, " writers *readers"],
    *,
    own: Mapping[str, FaithfulnessCurve] | None = None,
    **options: Any,
) -> CrosswiseFaithfulness:
    """Does the before circuit explain the after model, and the reverse?

    Args:
        before, after: networks of one shape, or functions that load them: then one is in memory at
            a time.
        own: curves measured already, with the same options: of the before circuit in the before
            model ("before"), of the after circuit in the after model ("after").

    Options as of `faithfulness_curve`.

    Raises:
        AnalysisError: the networks' graphs differ, or the scores do not fit them.
    """
    circuits = {"before": before_scores, "after": after_scores}
    curves: dict[tuple[str, str], FaithfulnessCurve] = {}
    graph = None
    for name, source in (("before", before), ("after", after)):
        model = source if isinstance(source, HookedModel) else source()
        if graph is not None and Graph.of(model) != graph:
            raise AnalysisError("before and after: the networks' layers, heads or norms differ")
        graph = Graph.of(model)
        (other,) = circuits.keys() - {name}
        run = partial(faithfulness_curve, model, clean, corrupt, metric)
        curve = own[name] if own and name in own else run(circuits[name], **options)
        crossed = run(circuits[other], **{**options, "n_random": 0})  # those of `curve` serve both
        curves[name, name] = curve
        curves[other, name] = replace(crossed, random_values=curve.random_values)
        del model
    order = [(circuit, model) for circuit in circuits for model in circuits]
    return CrosswiseFaithfulness({key: curves[key] for key in order})


def _edges_by_item(graph: Graph, scores: ItemScores) -> Float[np.ndarray, "items edges"]:
    if scores.shape[-2:] != graph.mask.shape or scores.ndim not in (2, 3):
        raise AnalysisError(
            f"scores: expected [items writers readers] with {tuple(graph.mask.shape)}, got "
            f"{tuple(scores.shape)}"
        )
    edges = scores.detach().cpu().double()[..., graph.mask].nan_to_num()
    return np.atleast_2d(edges.numpy())


def _measures(
    top_shares: Sequence[float], n_edges: int
) -> dict[str, Callable[[Edges, Edges], float]]:
    from scipy.stats import rankdata

    def top(share: float) -> Callable[[Edges, Edges], float]:
        k = max(1, round(share * n_edges))

        def jaccard(a: Edges, b: Edges) -> float:
            chosen = [set(np.argsort(-np.abs(x), kind="stable")[:k].tolist()) for x in (a, b)]
            return len(chosen[0] & chosen[1]) / len(chosen[0] | chosen[1])

        return jaccard

    def spearman(a: Edges, b: Edges) -> float:
        return float(np.corrcoef(rankdata(np.abs(a)), rankdata(np.abs(b)))[0, 1])

    def weighted(a: Edges, b: Edges) -> float:
        larger = np.maximum(np.abs(a), np.abs(b)).sum()
        return float(np.minimum(np.abs(a), np.abs(b)).sum() / larger) if larger > 0 else np.nan

    def normalized(a: Edges, b: Edges) -> float:
        total_a, total_b = np.abs(a).sum(), np.abs(b).sum()
        return weighted(a / total_a, b / total_b) if total_a > 0 and total_b > 0 else np.nan

    return {
        **{f"jaccard_top_{share:g}": top(share) for share in top_shares},
        "spearman": spearman,
        "weighted_jaccard": weighted,
        "weighted_jaccard_normalized": normalized,
    }


def _resampled(
    pair: Sequence[Float[np.ndarray, "items edges"]], n: int, rng: np.random.Generator
) -> Iterator[tuple[Edges, Edges]]:
    """Both checkpoints' means over items drawn anew."""
    paired = len(pair[0]) == len(pair[1])
    for _ in range(n):
        drawn = [rng.multinomial(len(x), [1 / len(x)] * len(x)) / len(x) for x in pair]
        if paired:
            drawn[1] = drawn[0]
        first, second = (w @ x for w, x in zip(drawn, pair, strict=True))
        yield first, second


def _halves(
    pair: Sequence[Float[np.ndarray, "items edges"]], rng: np.random.Generator
) -> list[tuple[Edges, Edges]]:
    """Each checkpoint's means over two random halves, of the same items in both."""
    halves = []
    order = rng.permutation(len(pair[0]))
    for x in pair:
        order = order if len(order) == len(x) else rng.permutation(len(x))
        first, second = np.array_split(order, 2)
        halves.append((x[first].mean(0), x[second].mean(0)))
    return halves


def _ranks(strength: np.ndarray) -> np.ndarray:
    ranks = np.empty(len(strength), dtype=int)
    ranks[np.argsort(-strength, kind="stable")] = np.arange(1, len(strength) + 1)
    return ranks
