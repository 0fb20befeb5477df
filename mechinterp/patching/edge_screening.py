"""Screening of edges: attribution of all, exact patches of the top ones and of a sample beside."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.edges import edge_effects
from mechinterp.patching.edge_attribution import EdgeAttribution, attribute_edges
from mechinterp.patching.gradients import budget_mb
from mechinterp.patching.metrics import Metric
from mechinterp.patching.screening import Trust, measure_trust
from mechinterp.randomness import derive_generator

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class EdgeScreening:
    """Scores of all edges, of which the top ones and a sample of the others were patched exactly.

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

    @property
    def trust(self) -> Trust:
        assert self.attribution.trust is not None
        return self.attribution.trust

    def to_table(self) -> pd.DataFrame:
        """One row per exact edge: writer, reader, selected, score (estimated), effect and stderr
        (exact, over items), n_items."""
        import pandas as pd

        graph, n = self.attribution.graph, len(self.effect)
        exact = self.effect.double().cpu()
        spread = exact.std(0) if n > 1 else exact[0] * torch.nan
        return pd.DataFrame(
            {
                "writer": [str(graph.writers[w]) for w in self.edges[:, 0].tolist()],
                "reader": [str(graph.readers[r]) for r in self.edges[:, 1].tolist()],
                "selected": self.selected.cpu().numpy(),
                "score": self.attribution.scores[tuple(self.edges.T)].cpu().numpy(),
                "effect": exact.mean(0).numpy(),
                "stderr": (spread / n**0.5).numpy(),
                "n_items": n,
            }
        )


def screen_edges(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    method: str = "EAP-IG-inputs",
    n_steps: int | None = None,
    top_k: int = 20,
    n_sampled: int = 40,
    direction: str = "denoising",
    per_item: bool = False,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    level: float = 0.95,
    seed: int = 0,
) -> EdgeScreening:
    """Scores of every edge, then exact patches of the `top_k` edges and of `n_sampled` others.

    Edges whose score is exactly 0 (their writer is the same in both runs) are neither selected nor
    sampled. Arguments as of `mechinterp.patching.edge_attribution.attribute_edges`; `seed` draws
    the sample, `level` is that of the interval of the miss rate.

    Raises:
        AnalysisError: the arguments do not fit together.
    """
    if top_k < 1 or n_sampled < 0:
        raise AnalysisError(f"screen: top_k {top_k} and n_sampled {n_sampled} must be 1, 0 or more")
    found = attribute_edges(
        model,
        clean=clean,
        corrupt=corrupt,
        metric=metric,
        method=method,
        n_steps=n_steps,
        direction=direction,
        per_item=per_item,
        attention_mask=attention_mask,
        decision=decision,
        memory_mb=memory_mb,
    )
    size = found.scores.abs().nan_to_num(0.0).cpu()
    ranked = size.flatten().argsort(descending=True, stable=True)[: int((size > 0).sum())]
    others = ranked[top_k:]
    generator = derive_generator(seed, "screening", "edges")
    drawn = others[torch.randperm(len(others), generator=generator)[:n_sampled]]
    chosen = torch.cat([ranked[:top_k], drawn])
    edges = torch.stack(torch.unravel_index(chosen, size.shape), dim=1)
    graph = found.graph
    effects = edge_effects(
        model,
        clean,
        corrupt,
        metric,
        direction=direction,
        edges=[(graph.writers[w], graph.readers[r]) for w, r in edges.tolist()],
        keep_items=True,
        attention_mask=attention_mask,
        decision=decision,
        memory_mb=max(1, int(budget_mb(model, memory_mb))),
    )
    effect = effects[(slice(None), *edges.unbind(1))]
    selected = torch.arange(len(edges)) < top_k
    trust = measure_trust(
        found.scores[tuple(edges.T)], effect.mean(0), selected, n_cells=len(ranked), level=level
    )
    return EdgeScreening(replace(found, trust=trust), edges, selected, effect)
