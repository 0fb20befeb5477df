"""Exact activation patching: one site at a time, at every layer and position, head or neuron.

A patch at one site is, for all that comes later, a residual stream that enters the next block with
another value. So every grain becomes: rows enter block l at position p with a changed residual, and
go on to the end. For one p all rows share their suffix of positions, and one batch that grows from
layer to layer takes them all through: no block before the patch is run, no position before it, no
cell whose activation is the same bit for bit in both runs, and only the tokens that the metric
reads are unembedded. `naive` does the same one full forward pass at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.cells import Cells, Patches, sites_needed
from mechinterp.patching.memory import in_batches, items_per_batch, memory_budget, rows_per_batch
from mechinterp.patching.metrics import Metric
from mechinterp.patching.naive import patch_by_loop
from mechinterp.patching.pairs import base_and_source, check_pairs
from mechinterp.patching.plan import Plan, Positions, make_plan
from mechinterp.patching.result import PatchingResult, make_result
from mechinterp.patching.stored import StoredActivations
from mechinterp.patching.suffix import RecordedRun, Suffix, find_obstacle, record
from mechinterp.progress import progress_bar

Giver = HookedModel | Sequence[Float[Tensor, "items positions *site"]]


class SweepOptions(TypedDict, total=False):
    """Keyword options of `sweep` and `sweep_many`.

    direction: "denoising" (default) patches clean activations into the corrupt run, "noising" the
        reverse.
    positions: for all items (a sequence) or per item ([items, columns]); None is every one.
    by_position: for heads and neurons: patch one position at a time (of a pattern, one query)
        rather than all together. The default is whether `positions` were given.
    neurons: for grain neuron, which of each layer's; None is all.
    directions: for the residual grains, vectors such as an SAE's decoder rows: only the component
        along one of them is exchanged, one at a time.
    source: what is patched in, if not the model's own activations of the other prompt: another
        network, whose activations of that prompt are; or the activations themselves, one tensor per
        layer, such as means, zeros, resampled items or `StoredActivations` (one grain at a time;
        of the two prompts only the one that is patched is then run, and without the metric of the
        source nothing is normalized).
    attention_mask: 1 for real tokens; the same for both runs. Cells at padding have no effect.
    decision: the position whose logits the metric reads, for all items or per item (the last).
    memory_mb: bound on the memory of one batch of rows, approximately; None takes a share of what
        is free. A batch that does not fit after all is halved.
    """

    direction: str
    positions: Positions
    by_position: bool | None
    neurons: Sequence[int] | Int[Tensor, " neurons"] | None
    directions: Float[Tensor, "directions d_model"] | None
    source: HookedModel | Sequence[Float[Tensor, "items positions *site"]] | None
    attention_mask: Int[Tensor, "items positions"] | None
    decision: int | Int[Tensor, " items"]
    memory_mb: int | None


def sweep(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    grain: str,
    metric: Metric,
    **options: Unpack[SweepOptions],
) -> PatchingResult:
    """Patch one run's activations into another's, one site at a time, and keep every item's metric.

    Args:
        clean, corrupt: token ids; row i of each is one counterfactual pair.
        grain: resid_pre, resid_mid, resid_post, attn_out or mlp_out (layer x position); head, q, k,
            v or pattern (layer x head; k and v at their own heads); neuron (layer x neuron).
        metric: see `mechinterp.patching.metrics`.

    Options and errors as of `SweepOptions` and `sweep_many`.
    """
    many = sweep_many(
        model, clean=clean, corrupt=corrupt, grains=[grain], metrics={"": metric}, **options
    )
    return many[grain, ""]


@torch.no_grad()
def sweep_many(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    grains: Sequence[str],
    metrics: Mapping[str, Metric],
    **options: Unpack[SweepOptions],
) -> dict[tuple[str, str], PatchingResult]:
    """Sweeps of several grains under several metrics, by (grain, metric); what they share is
    computed once.

    Raises:
        AnalysisError: the arguments do not fit together.
        SiteError: the network has no such site (resid_mid of parallel blocks).
    """
    direction, source = options.get("direction", "denoising"), options.get("source")
    memory_mb = options.get("memory_mb")
    check_pairs(clean, corrupt)
    base, given = base_and_source(clean, corrupt, direction)
    grains = tuple(dict.fromkeys(grains))
    giver: Giver = model if source is None else source
    if isinstance(giver, HookedModel):
        check_source(giver, model)
    elif len(grains) != 1 or len(giver) != model.n_layers:
        raise AnalysisError(
            f"source: activations go with one grain and need one tensor for each of "
            f"{model.n_layers} layers, got {len(giver)} for {', '.join(grains)}"
        )
    base = base.to(model.device)
    neurons = options.get("neurons")
    plans = {
        name: make_plan(
            model,
            base,
            grain=name,
            metric=metrics,
            positions=options.get("positions"),
            by_position=options.get("by_position"),
            neurons=neurons if name == "neuron" or "neuron" not in grains else None,
            directions=options.get("directions"),
            decision=options.get("decision", -1),
            attention_mask=options.get("attention_mask"),
        )
        for name in grains
    }
    obstacle = find_obstacle(model, base)
    budget = memory_budget(model.device, memory_mb)
    size = items_per_batch(model, base, len(grains), budget)
    runs = []
    for start in range(0, len(base), size):
        rows = slice(start, start + size)
        parts = {name: plan.select(rows) for name, plan in plans.items()}
        runs.append(
            _sweep_items(model, giver, base, given, rows, parts, obstacle=obstacle, budget=budget)
        )
    results = {}
    for name, plan in plans.items():
        values = torch.cat([run[name][0] for run in runs], dim=-1)
        base_score, given_score = (torch.cat([run[name][i] for run in runs], -1) for i in (1, 2))
        for index, metric_name in enumerate(metrics):
            results[name, metric_name] = make_result(
                plan,
                values[index],
                base_score[index],
                given_score[index].to(base_score.device),
                direction=direction,
                method="suffix" if obstacle is None else f"loop: {obstacle}",
            )
    return results


def _sweep_items(
    model: HookedModel,
    giver: Giver,
    base: Int[Tensor, "items positions"],
    given: Int[Tensor, "items positions"],
    rows: slice,
    plans: Mapping[str, Plan],
    *,
    obstacle: str | None,
    budget: int,
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Per grain: values [metrics layers units items], and the metrics of base and giver."""
    run = record_for(model, base[rows], plans.values()) if obstacle is None else None
    found: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, plan in sorted(plans.items(), key=lambda item: item[0] != "resid_pre"):
        same = _same_cells(name, found, plan, giver is model)
        if same is not None:
            found[name] = same
            continue
        if isinstance(giver, HookedModel):
            new, score = plan.capture(giver, given[rows].to(giver.device))
        else:
            new, score = [layer[rows] for layer in giver], _metrics_of(giver, plan, rows)
        values, unpatched = patch_sites(
            model, base[rows], new, plan, obstacle=obstacle, run=run, budget=budget
        )
        found[name] = (values, unpatched, score)
    return found


def _metrics_of(giver: Sequence[Tensor], plan: Plan, rows: slice) -> Float[Tensor, "metrics items"]:
    """The metric that stored activations bring from their own run; else not a number."""
    if isinstance(giver, StoredActivations) and giver.has_metric and len(plan.metrics) == 1:
        return giver.metric[rows][None]
    return torch.full((len(plan.metrics), len(plan.items)), torch.nan)


def _same_cells(
    grain: str, found: Mapping[str, tuple[Tensor, Tensor, Tensor]], plan: Plan, same_model: bool
) -> tuple[Tensor, Tensor, Tensor] | None:
    """A grain whose cells another's already hold: in one network, whatever follows the attention
    goes position by position, so that resid_mid(l) and resid_post(l) are resid_pre(l + 1)."""
    if plan.directions is not None or not same_model:
        return None
    twin = {"resid_mid": "resid_post", "resid_post": "resid_mid"}.get(grain)
    if twin is None:
        return None
    if twin in found:
        return found[twin]
    if "resid_pre" not in found:
        return None
    values, base, given = found["resid_pre"]
    assert plan.positions is not None
    # After the last block only the decision position is read, and there it is the giver's own.
    at_decision = (plan.positions == plan.decision[:, None]).T
    last = torch.where(at_decision, given[:, None].to(base.device), base[:, None])
    return torch.cat([values[:, 1:], last[:, None]], dim=1), base, given


def record_for(
    model: HookedModel, tokens: Int[Tensor, "items positions"], plans: Any
) -> RecordedRun:
    """A run of `tokens` that keeps what patches of these plans need."""
    plans = list(plans)
    grains = set().union(*(sites_needed(plan) for plan in plans))
    sites = [site for grain in sorted(grains) for site in model.sites(grain)]
    return record(model, tokens, attention_mask=plans[0].attention_mask, sites=sites)


def patch_sites(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
    *,
    obstacle: str | None = None,
    run: RecordedRun | None = None,
    budget: int | None = None,
) -> tuple[Float[Tensor, "metrics layers units items"], Float[Tensor, "metrics items"]]:
    """The metrics with `new[layer]` written at one cell at a time, and without any patch.

    `new` holds any activations of the plan's grain, one tensor per layer. With an `obstacle` (see
    `find_obstacle`) one full forward pass per cell; else in suffixes of `run`, if it is at hand.
    """
    new = [values.to(model.device, model.dtype) for values in new]
    if obstacle is not None:
        return patch_by_loop(model, tokens, new, plan)
    run = run or record_for(model, tokens, [plan])
    budget = memory_budget(model.device) if budget is None else budget
    return patch_by_suffix(run, new, plan, budget=budget)


@torch.no_grad()
def patch_by_suffix(
    run: RecordedRun,
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
    *,
    budget: int,
    skip_equal: bool = True,
) -> tuple[Float[Tensor, "metrics layers units items"], Float[Tensor, "metrics items"]]:
    """As `patch_sites`, by the algorithm of this module; `budget` in bytes.

    `skip_equal=False` also runs the cells whose patch changes nothing, for timing and tests.
    """
    model, (n_items, n_positions) = run.model, run.resid[0].shape[:2]
    every = torch.arange(n_items, device=model.device)
    base = plan.score(model, run.resid[-1][every, plan.decision], every)
    patches = Patches.of(run, new, plan)
    cells, starts = patches.cells(skip_equal=skip_equal)
    values = base[:, None, None].repeat(1, model.n_layers, plan.n_units, 1)

    def patch(rows: slice, _: int) -> None:
        batch = together[rows]
        layers, units, items = batch.unbind(dim=1)
        final = _grow(suffix, patches, batch, plan.decision[items])
        values[:, layers, units, items] = plan.score(model, final, items)
        advance(len(batch))

    with progress_bar(f"patching {plan.grain}", len(cells), unit="cells") as advance:
        for start in starts.unique().tolist():
            suffix = run.suffix(start)
            size = rows_per_batch(model, n_positions, start, budget)
            together = cells[starts == start]
            in_batches(patch, len(together), min(size, len(together)))
    return values, base


def _grow(
    suffix: Suffix, patches: Patches, cells: Cells, decision: Int[Tensor, " cells"]
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
            new = patches.residuals(suffix, layer - patches.delay, units[rows], items[rows])
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
