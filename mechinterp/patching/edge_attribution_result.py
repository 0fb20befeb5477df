"""What edge attribution leaves: the score of every edge, and how far the scores can be trusted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.trust import Trust, rank_cells, say_trust, trust_columns

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class EdgeAttribution:
    """Estimated effects of exchanging single edges.

    Attributes:
        method: EAP, EAP-IG-inputs or EAP-IG-activations.
        n_steps: points of the integral (EAP: 1).
        direction: "denoising" (edges of the clean run into the corrupt one) or "noising".
        scores: mean over items, in units of the metric; NaN where there is no edge.
        item_scores: the same per item, if asked for.
        position_scores: what each position contributes to `scores`, if asked for.
        corrupt_metric, clean_metric: of the unpatched runs.
        trust: how far exact patches of some edges bear the scores out; None if none were asked for.
    """

    graph: Graph
    method: str
    n_steps: int
    direction: str
    scores: Float[Tensor, "writers readers"]
    item_scores: Float[Tensor, "items writers readers"] | None
    position_scores: Float[Tensor, "writers readers positions"] | None
    corrupt_metric: Float[Tensor, " items"]
    clean_metric: Float[Tensor, " items"]
    trust: Trust | None = None

    def __repr__(self) -> str:
        title = f"{self.method}, {self.direction}: {say_trust(self.trust)}"
        return f"EdgeAttribution({title}; {self.graph.n_edges} edges)"

    @property
    def writer_scores(self) -> Float[Tensor, " writers"]:
        """Each writer's edges together: to first order the effect of exchanging all it writes."""
        return self.scores.nansum(1)

    def top_edges(self, k: int) -> list[tuple[Node, Node, float]]:
        """The edges of the largest magnitude, largest first."""
        order = rank_cells(self.scores.abs())[:k]
        return [
            (self.graph.writers[w], self.graph.readers[r], float(self.scores[w, r]))
            for w, r in order.tolist()
        ]

    def to_table(self) -> pd.DataFrame:
        """One row per edge: writer, reader (as strings), score, stderr over items (NaN without
        item_scores), and of all edges together, as of `Trust`: pearson, spearman, miss_rate,
        n_exact."""
        import pandas as pd

        mask = self.graph.mask.to(self.scores.device)
        errors = torch.full_like(self.scores, torch.nan)
        if self.item_scores is not None and len(self.item_scores) > 1:
            errors = self.item_scores.std(0) / len(self.item_scores) ** 0.5
        edges = self.graph.edges()
        return pd.DataFrame(
            {
                "writer": [str(writer) for writer, _ in edges],
                "reader": [str(reader) for _, reader in edges],
                "score": self.scores[mask].cpu().numpy(),
                "stderr": errors[mask].cpu().numpy(),
                **trust_columns(self.trust),
            }
        )
