"""Exact patches of a few edges, to measure scores by."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.edges import edge_effects
from mechinterp.patching.edge_attribution_result import EdgeAttribution
from mechinterp.patching.gradients import budget_mb
from mechinterp.patching.metrics import Metric
from mechinterp.patching.trust import Screened, choose_cells, measure_trust

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class EdgeScreening(Screened):
    """Scores of all edges, of which some were patched exactly.

    Attributes:
        attribution: the scores, with their `trust`.
        edges: (writer, reader) indices of the exact edges: the selected ones in order of their
            score, then the sample.
        selected: which of them the attribution selected.
        effect: exact change of the metric, per item.
    """

    attribution: EdgeAttribution
    edges: Int[Tensor, "edges 2"]
    selected: Bool[Tensor, " edges"]
    effect: Float[Tensor, "items edges"]

    def to_table(self) -> pd.DataFrame:
        """One row per exact edge: writer, reader, selected, score (estimated), effect and stderr
        (exact, over items), n_items."""
        import pandas as pd

        graph = self.attribution.graph
        return pd.DataFrame(
            {
                "writer": [str(graph.writers[w]) for w in self.edges[:, 0].tolist()],
                "reader": [str(graph.readers[r]) for r in self.edges[:, 1].tolist()],
                **self._columns("score", self.attribution.scores[tuple(self.edges.T)]),
            }
        )


def patch_some_edges(
    model: HookedModel,
    found: EdgeAttribution,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    top_k: int = 0,
    n_sampled: int,
    generator: torch.Generator,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    level: float = 0.95,
) -> EdgeScreening:
    """Exact patches of the `top_k` edges and of `n_sampled` others, drawn from `generator`.

    Edges whose score is exactly 0 (their writer is the same in both runs) are neither selected nor
    sampled.
    """
    size = found.scores.abs().cpu()
    size = size.masked_fill(size == 0, torch.nan)
    edges, selected, n_edges = choose_cells(
        size, top_k=top_k, n_sampled=n_sampled, generator=generator
    )
    graph = found.graph
    effects = edge_effects(
        model,
        clean,
        corrupt,
        metric,
        direction=found.direction,
        edges=[(graph.writers[w], graph.readers[r]) for w, r in edges.tolist()],
        keep_items=True,
        attention_mask=attention_mask,
        decision=decision,
        memory_mb=max(1, int(budget_mb(model, memory_mb))),
    )
    effect = effects[(slice(None), *edges.unbind(1))]
    trust = measure_trust(
        found.scores[tuple(edges.T)], effect.mean(0), selected, n_cells=n_edges, level=level
    )
    return EdgeScreening(replace(found, trust=trust), edges, selected, effect)
