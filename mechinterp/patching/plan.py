"""What a sweep patches and how it is scored, checked once and cut into batches of items."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import Metric
from mechinterp.sites import Site

GRAINS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")
Positions = Sequence[int] | Int[Tensor, "items units"] | None


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep and where its metric is read, for some rows of tokens.

    A cell is a layer with a unit: a column of `positions`, or a head at all positions.
    """

    grain: str
    metric: Metric
    items: Int[Tensor, " items"]  # the numbers that the metric knows the rows by
    positions: Int[Tensor, "items units"] | None  # None for grain "head"
    decision: Int[Tensor, " items"]  # the position whose logits the metric reads
    attention_mask: Int[Tensor, "items positions"] | None

    def batches(self, size: int) -> Iterator[tuple[slice, Plan]]:
        """Consecutive rows, at most `size` at a time, each with its plan."""
        for start in range(0, len(self.items), size):
            rows = slice(start, start + size)
            yield (
                rows,
                Plan(
                    self.grain,
                    self.metric,
                    self.items[rows],
                    None if self.positions is None else self.positions[rows],
                    self.decision[rows],
                    None if self.attention_mask is None else self.attention_mask[rows],
                ),
            )

    def score(
        self,
        model: HookedModel,
        final: Float[Tensor, "rows d_model"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, " rows"]:
        """The metric of residuals that enter the final norm; `final[r]` is of item `rows[r]`."""
        logits = model.unembed(model.final_norm(final), self.metric.token_ids)
        return self.metric(logits, self.items[rows])

    def capture(
        self, model: HookedModel, tokens: Int[Tensor, "items positions"]
    ) -> tuple[list[Float[Tensor, "items positions *site"]], Float[Tensor, " items"]]:
        """The activations to patch with, one tensor per layer, and the metric of their own run."""
        sites = [Site(self.grain, layer) for layer in range(model.n_layers)]
        last = Site("resid_post", model.n_layers - 1)
        captured = model.capture(tokens, [*sites, last], attention_mask=self.attention_mask)
        rows = torch.arange(len(tokens), device=model.device)
        score = self.score(model, captured[last][rows, self.decision], rows)
        return [captured[site] for site in sites], score


def make_plan(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    *,
    grain: str,
    metric: Metric,
    positions: Positions,
    decision: int | Int[Tensor, " items"],
    attention_mask: Int[Tensor, "items positions"] | None,
) -> Plan:
    """Check what a sweep was asked for and bring it to one form, on the model's device.

    Raises:
        AnalysisError: unknown grain; positions or decision outside the prompts or of a wrong shape.
        SiteError: the network has no such site (resid_mid of parallel blocks).
    """
    n_items, n_positions = tokens.shape
    if grain not in GRAINS:
        raise AnalysisError(f"grain: expected one of {', '.join(GRAINS)}, got {grain!r}")
    model.architecture.blocks[0].location(Site(grain, 0))
    if grain == "head" and positions is not None:
        raise AnalysisError("positions: grain 'head' patches all positions together; leave it out")
    if isinstance(decision, int):
        decision = torch.full((n_items,), decision)
    decision = torch.where(decision < 0, decision + n_positions, decision)
    if decision.shape != (n_items,) or not _within(decision, n_positions):
        raise AnalysisError(
            f"decision: expected one position of 0 .. {n_positions - 1} per item, "
            f"got shape {tuple(decision.shape)}"
        )
    if attention_mask is not None and attention_mask.shape != tokens.shape:
        raise AnalysisError(
            f"attention_mask: expected shape {tuple(tokens.shape)}, "
            f"got {tuple(attention_mask.shape)}"
        )
    return Plan(
        grain=grain,
        metric=metric,
        items=torch.arange(n_items, device=model.device),
        positions=None if grain == "head" else _columns(positions, tokens).to(model.device),
        decision=decision.to(model.device),
        attention_mask=None if attention_mask is None else attention_mask.to(model.device),
    )


def _columns(
    positions: Positions, tokens: Int[Tensor, "items positions"]
) -> Int[Tensor, "items units"]:
    n_items, n_positions = tokens.shape
    columns = torch.as_tensor(range(n_positions) if positions is None else positions)
    if columns.ndim == 1:
        columns = columns.expand(n_items, -1)
    columns = torch.where(columns < 0, columns + n_positions, columns)
    if columns.ndim != 2 or len(columns) != n_items or not _within(columns, n_positions):
        raise AnalysisError(
            f"positions: expected positions of 0 .. {n_positions - 1}, for all items or as "
            f"[items, units] with {n_items} items, got shape {tuple(columns.shape)}"
        )
    return columns.contiguous()


def _within(index: Int[Tensor, "*shape"], n: int) -> bool:
    return index.numel() > 0 and bool(((index >= 0) & (index < n)).all())
