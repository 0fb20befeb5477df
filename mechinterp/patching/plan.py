"""What a sweep patches and how it is scored, checked once and cut into batches of items."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import Metric
from mechinterp.patching.pairs import check_attention_mask, decision_positions
from mechinterp.sites import Site

RESIDUAL_GRAINS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
HEAD_GRAINS = ("head", "q", "k", "v", "pattern")
GRAINS = (*RESIDUAL_GRAINS, *HEAD_GRAINS, "neuron")
Positions = Sequence[int] | Int[Tensor, "items columns"] | None


@dataclass(frozen=True)
class Plan:
    """The cells of a sweep and where its metrics are read, for some rows of tokens.

    A cell is a layer with a unit, and a unit is one of `n_kinds` (heads, neurons, directions) at
    one of the columns of `positions`; where that is None, at all positions together. The number
    of a unit is kind * columns + column.
    """

    grain: str
    metrics: Mapping[str, Metric]
    items: Int[Tensor, " items"]  # the numbers that the metrics know the rows by
    positions: Int[Tensor, "items columns"] | None
    kind_axis: str | None  # "head", "kv_head", "neuron" or "direction"; None: one kind
    n_kinds: int
    neurons: Int[Tensor, " neurons"] | None
    directions: Float[Tensor, "directions d_model"] | None
    decision: Int[Tensor, " items"]  # the position whose logits the metrics read
    attention_mask: Int[Tensor, "items positions"] | None

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of a result."""
        kinds = () if self.kind_axis is None else (self.kind_axis,)
        return ("item", "layer", *kinds, *(() if self.positions is None else ("position",)))

    @property
    def unit_shape(self) -> tuple[int, ...]:
        """Sizes of the axes after item and layer."""
        kinds = () if self.kind_axis is None else (self.n_kinds,)
        return (*kinds, *(() if self.positions is None else (self.n_columns,)))

    @property
    def n_columns(self) -> int:
        return 1 if self.positions is None else self.positions.shape[1]

    @property
    def n_units(self) -> int:
        return self.n_kinds * self.n_columns

    def batches(self, size: int) -> Iterator[tuple[slice, Plan]]:
        """Consecutive rows, at most `size` at a time, each with its plan."""
        for start in range(0, len(self.items), size):
            rows = slice(start, start + size)
            yield rows, self.select(rows)

    def select(self, rows: slice) -> Plan:
        """The plan of some rows."""
        cut = {
            name: None if value is None else value[rows]
            for name, value in vars(self).items()
            if name in ("items", "positions", "decision", "attention_mask")
        }
        return replace(self, **cut)

    def score(
        self,
        model: HookedModel,
        final: Float[Tensor, "rows d_model"],
        rows: Int[Tensor, " rows"],
    ) -> Float[Tensor, "metrics rows"]:
        """The metrics of residuals that enter the final norm; `final[r]` is of item `rows[r]`."""
        normed, items = model.final_norm(final), self.items[rows]
        scores = [m(model.unembed(normed, m.token_ids), items) for m in self.metrics.values()]
        return torch.stack(scores)

    def capture(
        self, model: HookedModel, tokens: Int[Tensor, "items positions"]
    ) -> tuple[list[Float[Tensor, "items positions *site"]], Float[Tensor, "metrics items"]]:
        """The activations to patch with, one tensor per layer, and the metrics of their own run."""
        last = Site("resid_post", model.n_layers - 1)
        sites = model.sites(self.grain)
        captured = model.capture(tokens, [*sites, last], attention_mask=self.attention_mask)
        rows = torch.arange(len(tokens), device=model.device)
        score = self.score(model, captured[last][rows, self.decision], rows)
        return [captured[site] for site in sites], score


def make_plan(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    *,
    grain: str,
    metric: Metric | Mapping[str, Metric],
    positions: Positions = None,
    by_position: bool | None = None,
    neurons: Sequence[int] | Int[Tensor, " neurons"] | None = None,
    directions: Float[Tensor, "directions d_model"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    attention_mask: Int[Tensor, "items positions"] | None = None,
) -> Plan:
    """Check what a sweep was asked for and bring it to one form, on the model's device.

    Raises:
        AnalysisError: unknown grain; positions, decision, neurons or directions that do not fit.
        SiteError: the network has no such site (resid_mid of parallel blocks).
    """
    if grain not in GRAINS:
        raise AnalysisError(f"grain: expected one of {', '.join(GRAINS)}, got {grain!r}")
    model.architecture.blocks[0].location(Site(grain, 0))
    if grain == "pattern" and model.model.config._attn_implementation != "eager":
        raise AnalysisError(
            "grain 'pattern': only eager attention computes patterns; load the model with "
            "attn_implementation='eager'"
        )
    if by_position is None:
        by_position = grain in RESIDUAL_GRAINS or positions is not None
    if not by_position and (grain in RESIDUAL_GRAINS or positions is not None):
        raise AnalysisError(
            "by_position: False patches all positions together: only for heads and "
            "neurons, and without `positions`"
        )
    tokens = tokens.to(model.device)
    metrics = metric if isinstance(metric, Mapping) else {"metric": metric}
    if not metrics:
        raise AnalysisError("metric: none given")
    neurons = _check_neurons(model, grain, neurons)
    directions = _check_directions(model, grain, directions)
    kind_axis, n_kinds = _kinds(model, grain, neurons, directions)
    return Plan(
        grain=grain,
        metrics=metrics,
        items=torch.arange(len(tokens), device=model.device),
        positions=_columns(positions, tokens).to(model.device) if by_position else None,
        kind_axis=kind_axis,
        n_kinds=n_kinds,
        neurons=neurons,
        directions=directions,
        decision=decision_positions(decision, tokens),
        attention_mask=check_attention_mask(attention_mask, tokens),
    )


def _kinds(
    model: HookedModel, grain: str, neurons: Tensor | None, directions: Tensor | None
) -> tuple[str | None, int]:
    if grain in ("k", "v"):
        name = "head" if model.n_kv_heads == model.n_heads else "kv_head"
        return name, model.n_kv_heads
    if grain in HEAD_GRAINS:
        return "head", model.n_heads
    if neurons is not None:
        return "neuron", len(neurons)
    if directions is not None:
        return "direction", len(directions)
    return None, 1


def _check_neurons(
    model: HookedModel, grain: str, neurons: Sequence[int] | Tensor | None
) -> Int[Tensor, " neurons"] | None:
    if grain != "neuron":
        if neurons is not None:
            raise AnalysisError(f"neurons: only for grain 'neuron', not for {grain!r}")
        return None
    chosen = torch.as_tensor(range(model.d_mlp) if neurons is None else neurons, dtype=torch.long)
    if chosen.ndim != 1 or not _within(chosen, model.d_mlp) or len(chosen.unique()) < len(chosen):
        raise AnalysisError(f"neurons: expected different neurons of 0 .. {model.d_mlp - 1}")
    return chosen.to(model.device)


def _check_directions(
    model: HookedModel, grain: str, directions: Tensor | None
) -> Float[Tensor, "directions d_model"] | None:
    """Unit vectors: the component along a direction does not depend on its length."""
    if directions is None:
        return None
    if grain not in RESIDUAL_GRAINS:
        raise AnalysisError(f"directions: only for {', '.join(RESIDUAL_GRAINS)}, not {grain!r}")
    if directions.ndim != 2 or directions.shape[1] != model.d_model or not len(directions):
        raise AnalysisError(
            f"directions: expected [directions, {model.d_model}], got {tuple(directions.shape)}"
        )
    lengths = directions.norm(dim=1, keepdim=True)
    if not bool((lengths > 0).all() & lengths.isfinite().all()):
        raise AnalysisError("directions: one has no length or is not finite")
    return (directions / lengths).to(model.device, model.dtype)


def _columns(
    positions: Positions, tokens: Int[Tensor, "items positions"]
) -> Int[Tensor, "items columns"]:
    n_items, n_positions = tokens.shape
    columns = torch.as_tensor(range(n_positions) if positions is None else positions)
    if columns.ndim == 1:
        columns = columns.expand(n_items, -1)
    columns = torch.where(columns < 0, columns + n_positions, columns)
    if columns.ndim != 2 or len(columns) != n_items or not _within(columns, n_positions):
        raise AnalysisError(
            f"positions: expected positions of 0 .. {n_positions - 1}, for all items or as "
            f"[items, columns] with {n_items} items, got shape {tuple(columns.shape)}"
        )
    return columns.contiguous()


def _within(index: Int[Tensor, "*shape"], n: int) -> bool:
    return index.numel() > 0 and bool(((index >= 0) & (index < n)).all())
