"""Exact activation patching at every layer and position, or every layer and head.

A patch at one site is, for all that comes later, a residual stream that enters the next block with
another value. So every grain becomes: rows enter block l at position p with a changed residual, and
go on to the end. For one p all rows share their suffix of positions, and one batch that grows from
layer to layer takes them all through: no block before the patch is run, no position before it, no
cell whose activation is the same bit for bit in both runs, and only the tokens that the metric
reads are unembedded. `naive` does the same one full forward pass at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.cells import Cells, HeadPatches, PositionPatches
from mechinterp.patching.metrics import Metric
from mechinterp.patching.naive import patch_by_loop
from mechinterp.patching.plan import Plan, Positions, make_plan
from mechinterp.patching.result import PatchingResult
from mechinterp.patching.suffix import Suffix, record, resumable
from mechinterp.progress import progress_bar


@torch.no_grad()
def sweep(
    model: HookedModel,
    *,
    corrupt: Int[Tensor, "items positions"],
    clean: Int[Tensor, "items positions"],
    grain: str,
    metric: Metric,
    direction: str = "denoising",
    positions: Positions = None,
    source: HookedModel | None = None,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int = 128,
) -> PatchingResult:
    """Patch one run's activations into another's, one site at a time, and keep every item's metric.

    Args:
        corrupt, clean: token ids; row i of each is one counterfactual pair.
        grain: resid_pre, resid_mid, resid_post, attn_out, mlp_out (layer x position) or head
            (layer x head, all positions together).
        direction: "denoising" patches clean activations into the corrupt run, "noising" the
            reverse.
        positions: for all items (a sequence) or per item ([items, units]); None is every position.
        source: the network whose activations are patched in; None is `model` itself.
        attention_mask: 1 for real tokens; the same for both runs. Cells at padding have no effect.
        decision: the position whose logits the metric reads, for all items or per item.
        memory_mb: bound on the memory of one batch of rows, approximately.

    Raises:
        AnalysisError: the arguments do not fit together.
        SiteError: the network has no such site (resid_mid of parallel blocks).
    """
    if direction not in ("denoising", "noising"):
        raise AnalysisError(f"direction: expected 'denoising' or 'noising', got {direction!r}")
    if corrupt.shape != clean.shape or corrupt.ndim != 2 or not corrupt.numel():
        raise AnalysisError(
            f"corrupt and clean: expected two [items, positions] of equal shape, "
            f"got {tuple(corrupt.shape)} and {tuple(clean.shape)}"
        )
    giver = model if source is None else check_source(source, model)
    base, given = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    base, given = base.to(model.device), given.to(giver.device)
    plan = make_plan(
        model,
        base,
        grain=grain,
        metric=metric,
        positions=positions,
        decision=decision,
        attention_mask=attention_mask,
    )
    method = "suffix" if resumable(model, base) else "loop"
    values, base_metric, given_metric = [], [], []
    for rows, part in plan.batches(items_per_batch(model, base, memory_mb)):
        new, score = part.capture(giver, given[rows])
        given_metric.append(score)
        patched, unpatched = patch_sites(
            model, base[rows], new, part, method=method, memory_mb=memory_mb
        )
        values.append(patched)
        base_metric.append(unpatched)
    metrics = torch.cat(base_metric), torch.cat(given_metric)
    corrupt_metric, clean_metric = metrics if direction == "denoising" else metrics[::-1]
    return PatchingResult(
        grain=grain,
        direction=direction,
        method=method,
        values=torch.cat(values, dim=-1),
        corrupt_metric=corrupt_metric,
        clean_metric=clean_metric.to(corrupt_metric.device),
        positions=plan.positions,
    )


def patch_sites(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
    *,
    method: str = "suffix",
    memory_mb: int = 128,
) -> tuple[Float[Tensor, "layers units items"], Float[Tensor, " items"]]:
    """The metric with `new[layer]` written at one cell at a time, and without any patch.

    `new` holds any activations of the plan's grain, one tensor per layer.
    """
    new = [values.to(model.device, model.dtype) for values in new]
    if method == "loop":
        return patch_by_loop(model, tokens, new, plan)
    return patch_by_suffix(model, tokens, new, plan, memory_mb=memory_mb)


@torch.no_grad()
def patch_by_suffix(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
    *,
    memory_mb: int = 128,
    skip_equal: bool = True,
) -> tuple[Float[Tensor, "layers units items"], Float[Tensor, " items"]]:
    """As `patch_sites`, by the algorithm of this module.

    `skip_equal=False` also runs the cells whose patch changes nothing, for timing and tests.
    """
    grains = {plan.grain, "attn_out"} if plan.grain == "mlp_out" else {plan.grain}
    sites = [site for grain in grains for site in model.sites(grain)]
    run = record(model, tokens, attention_mask=plan.attention_mask, sites=sites)
    every = torch.arange(len(tokens), device=model.device)
    base = plan.score(model, run.resid[-1][every, plan.decision], every)
    patches = (HeadPatches if plan.positions is None else PositionPatches)(run, new, plan)
    cells, starts = patches.cells(skip_equal=skip_equal)
    values = base.expand(model.n_layers, patches.n_units, -1).clone()
    with progress_bar(f"patching {plan.grain}", len(cells), unit="cells") as advance:
        for start in starts.unique().tolist():
            suffix = run.suffix(start)
            size = _rows_per_batch(model, tokens.shape[1], start, memory_mb)
            for batch in cells[starts == start].split(size):
                layers, units, items = batch.unbind(dim=1)
                final = _grow(suffix, patches, batch, plan.decision[items])
                values[layers, units, items] = plan.score(model, final, items)
                advance(len(batch))
    return values, base


def _grow(
    suffix: Suffix,
    patches: PositionPatches | HeadPatches,
    cells: Cells,
    decision: Int[Tensor, " cells"],
) -> Float[Tensor, "cells d_model"]:
    """Take one row per cell to the end of the network; each joins at the block it enters.

    Returns what enters the final norm at each row's decision position.
    """
    n_layers = suffix.run.model.n_layers
    layers, units, items = cells.unbind(dim=1)
    joining = torch.bincount(layers + patches.delay, minlength=n_layers + 1).tolist()
    x, n = None, 0
    for layer in range(n_layers + 1):
        if joining[layer]:
            rows = slice(n, n + joining[layer])
            new = patches.residuals(layer - patches.delay, units[rows], items[rows], suffix.start)
            if layer == n_layers:
                new = _at(new, decision[rows] - suffix.start)
            x = new if x is None else torch.cat([x, new])
            n = rows.stop
        if x is not None and layer < n_layers - 1:
            x = suffix.block(layer, x, items[:n])
        elif x is not None and layer == n_layers - 1:
            first = int(decision[:n].min())
            x = _at(suffix.last_block(x, items[:n], first), decision[:n] - first)
    assert x is not None
    return x


def _at(
    x: Float[Tensor, "rows positions d_model"], positions: Int[Tensor, " rows"]
) -> Float[Tensor, "rows d_model"]:
    return x[torch.arange(len(x), device=x.device), positions]


def check_source(source: HookedModel, model: HookedModel) -> HookedModel:
    """The source itself, if its activations fit the model's sites.

    Raises:
        AnalysisError: they do not.
    """
    shapes = [(m.n_layers, m.d_model, m.n_heads, m.d_head) for m in (source, model)]
    if shapes[0] != shapes[1]:
        raise AnalysisError(
            "source: expected a network of the same (n_layers, d_model, n_heads, d_head), "
            f"got {shapes[0]} for {shapes[1]}"
        )
    return source


def items_per_batch(
    model: HookedModel, tokens: Int[Tensor, "items positions"], memory_mb: int
) -> int:
    """How many items' recorded runs fit the memory."""
    width = 5 * max(model.d_model, model.n_heads * model.d_head)  # stream, patched, old, new
    width += 2 * model.n_kv_heads * model.d_head
    per_item = tokens.shape[1] * model.n_layers * width * model.dtype.itemsize
    return max(1, memory_mb * 2**20 // per_item)


def _rows_per_batch(model: HookedModel, n_positions: int, start: int, memory_mb: int) -> int:
    """How many rows can go through one block at a time: stream, MLP, scores, keys and values."""
    d_mlp = max(max(p.shape) for p in model.architecture.blocks[0].mlp_projection.parameters())
    per_token = 6 * model.d_model + 3 * d_mlp + 3 * model.n_heads * n_positions
    keys_and_values = 4 * n_positions * model.n_kv_heads * model.d_head
    per_row = ((n_positions - start) * per_token + keys_and_values) * model.dtype.itemsize
    return max(1, memory_mb * 2**20 // per_row)
