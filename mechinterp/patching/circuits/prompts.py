"""The prompts that circuits are run on, checked once, and how many of them fit the memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.hooked import HookedModel
from mechinterp.patching.graph import Graph
from mechinterp.patching.memory import in_batches
from mechinterp.patching.metrics import Metric
from mechinterp.patching.pairs import check_attention_mask, check_pairs, decision_positions


@dataclass(frozen=True)
class Prompts:
    """What circuits are run on: row i of `clean` and `corrupt` is one pair, read at `decision`."""

    model: HookedModel
    clean: Int[Tensor, "items pos"]
    corrupt: Int[Tensor, "items pos"]
    metric: Metric
    attention_mask: Int[Tensor, "items pos"] | None
    decision: Int[Tensor, " items"]

    @classmethod
    def of(
        cls,
        model: HookedModel,
        clean: Int[Tensor, "items pos"],
        corrupt: Int[Tensor, "items pos"],
        metric: Metric,
        *,
        attention_mask: Int[Tensor, "items pos"] | None = None,
        decision: int | Int[Tensor, " items"] = -1,
    ) -> Prompts:
        """Checked, and on the model's device.

        Raises:
            AnalysisError: the arguments do not fit together.
        """
        check_pairs(clean, corrupt)
        clean, corrupt = clean.to(model.device), corrupt.to(model.device)
        mask = check_attention_mask(attention_mask, clean)
        return cls(model, clean, corrupt, metric, mask, decision_positions(decision, clean))

    def score(
        self, final: Float[Tensor, "rows d_model"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """The metric of residuals that enter the final norm; `final[r]` is of item `items[r]`."""
        model = self.model
        logits = model.unembed(model.final_norm(final), self.metric.token_ids)
        return self.metric(logits, items)

    def mask_of(self, rows: slice) -> Int[Tensor, "rows pos"] | None:
        """The attention mask of some items."""
        return None if self.attention_mask is None else self.attention_mask[rows]

    @torch.no_grad()
    def final(self, rows: slice) -> Float[Tensor, "rows d_model"]:
        """What enters the final norm at the decision position when the plain model runs clean."""
        clean, mask = self.clean[rows], self.mask_of(rows)
        resid, context = self.model.embed(clean, attention_mask=mask)
        for layer in range(self.model.n_layers):
            resid = self.model.block(layer, resid, context)
        return resid[torch.arange(len(resid), device=resid.device), self.decision[rows]]

    @torch.no_grad()
    def plain(self, memory_mb: int) -> Float[Tensor, " items"]:
        """The metric of the plain model on the clean prompts."""
        values = torch.empty(len(self.clean), dtype=self.model.dtype, device=self.model.device)

        def run(rows: slice, _: int) -> None:
            items = torch.arange(rows.start, rows.stop, device=values.device)
            values[rows] = self.score(self.final(rows), items)

        in_batches(run, len(self.clean), rows_per_batch(self, memory_mb))
        return values


def rows_per_batch(prompts: Prompts, memory_mb: int, *, extra: int = 0, start: int = 0) -> int:
    """How many rows (circuits times items) fit the memory."""
    model = prompts.model
    graph = Graph.of(model)
    n_readers = model.n_heads + 2 * model.n_kv_heads
    n_positions = prompts.clean.shape[1]
    sources = 1.5 * (len(graph.writers) + extra)  # once, and a copy of at most half
    width = (sources + 4 * n_readers + 6 * model.n_layers) * model.d_model
    per_token = width + 3 * model.d_mlp + 3 * model.n_heads * n_positions
    per_row = (n_positions - start) * per_token * model.dtype.itemsize
    return max(1, int(memory_mb * 2**20 / per_row))
