"""The slow way: plain forward hooks, one full forward pass of the whole model per patched cell.

It assumes nothing about the network but where its attention and MLP modules are. It is what the
fast sweep is tested against, and what networks get whose structure the fast sweep cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp.contexts import padding_arguments
from mechinterp.errors import ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import Metric
from mechinterp.patching.plan import Plan, make_plan
from mechinterp.patching.result import PatchingResult, make_result
from mechinterp.progress import progress_bar

Edit = Callable[[Tensor], Tensor]


@torch.no_grad()
def capture_by_hooks(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    grain: str,
    *,
    attention_mask: Int[Tensor, "items positions"] | None = None,
) -> list[Float[Tensor, "items positions *site"]]:
    """The activations of one grain, one tensor per layer (grain "head": [.., heads, d_head])."""
    seen: dict[int, Tensor] = {}

    def see(layer: int, site: Tensor) -> None:
        seen[layer] = site.clone()

    with _hooks(model, grain, range(model.n_layers), see):
        _forward(model, tokens, attention_mask)
    return [seen[layer] for layer in range(model.n_layers)]


@torch.no_grad()
def patch_by_loop(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
) -> tuple[Float[Tensor, "metrics layers units items"], Float[Tensor, "metrics items"]]:
    """The metrics with `new[layer]` written at one cell at a time, and without any patch.

    Raises:
        ModelError: a patch was not applied exactly once in its forward pass.
    """
    base = metrics_of_run(model, tokens, plan)
    written = plan.grain
    if plan.grain == "pattern":  # a pattern acts through the outputs that it gives its head
        new, written = _outputs_of_patterns(model, tokens, new, plan), "head"

    def patched(layer: int, unit: int) -> Float[Tensor, "metrics items"]:
        fired = []

        def write(_: int, site: Tensor) -> Tensor:
            fired.append(layer)
            return _write_unit(site.clone(), new[layer], unit, plan)

        with _hooks(model, written, [layer], write):
            value = metrics_of_run(model, tokens, plan)
        if len(fired) != 1:
            raise ModelError(f"the patch at {written}.{layer} fired {len(fired)} times, not once")
        return value

    values = base.new_empty(len(base), model.n_layers, plan.n_units, len(tokens))
    n_cells = model.n_layers * plan.n_units
    with progress_bar(f"patching {plan.grain}", n_cells, unit="cells") as advance:
        for layer in range(model.n_layers):
            for unit in range(plan.n_units):
                values[:, layer, unit] = patched(layer, unit)
                advance(1)
    return values, base


def _write_unit(
    site: Float[Tensor, "items positions *site"],
    new: Float[Tensor, "items positions *site"],
    unit: int,
    plan: Plan,
) -> Float[Tensor, "items positions *site"]:
    """`site` with one unit written over, item by item."""
    kind, column = divmod(unit, plan.n_columns)
    for item in range(len(site)):
        every = slice(None) if plan.positions is None else int(plan.positions[item, column])
        if plan.directions is not None:
            along = plan.directions[kind]
            moved = (new[item, every] - site[item, every]) @ along
            site[item, every] = site[item, every] + moved * along
        elif plan.grain == "neuron":
            assert plan.neurons is not None
            neuron = int(plan.neurons[kind])
            site[item, every, neuron] = new[item, every, neuron]
        elif plan.kind_axis is not None:
            site[item, every, kind] = new[item, every, kind]
        else:
            site[item, every] = new[item, every]
    return site


def _outputs_of_patterns(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    patterns: Sequence[Float[Tensor, "items heads query key"]],
    plan: Plan,
) -> list[Float[Tensor, "items positions heads d_head"]]:
    values = capture_by_hooks(model, tokens, "v", attention_mask=plan.attention_mask)
    group = model.n_heads // model.n_kv_heads
    return [
        torch.einsum("ihqk,ikhd->iqhd", pattern, value.repeat_interleave(group, dim=2))
        for pattern, value in zip(patterns, values, strict=True)
    ]


def naive_sweep(
    model: HookedModel,
    *,
    corrupt: Int[Tensor, "items positions"],
    clean: Int[Tensor, "items positions"],
    grain: str,
    metric: Metric,
    direction: str = "denoising",
    source: HookedModel | None = None,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    **options: Any,
) -> PatchingResult:
    """What `mechinterp.patching.sweeps.sweep` computes, the slow way throughout."""
    giver = model if source is None else source
    base, given = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    plan = make_plan(
        model,
        base,
        grain=grain,
        metric=metric,
        attention_mask=attention_mask,
        **options,
    )
    new = capture_by_hooks(giver, given, grain, attention_mask=attention_mask)
    values, base_metric = patch_by_loop(model, base, new, plan)
    given_metric = metrics_of_run(giver, given, plan)
    return make_result(
        plan, values[0], base_metric[0], given_metric[0], direction=direction, method="loop"
    )


@torch.no_grad()
def metrics_of_run(
    model: HookedModel, tokens: Int[Tensor, "items positions"], plan: Plan
) -> Float[Tensor, "metrics items"]:
    """The metrics of one full forward pass, from all of its logits."""
    rows = torch.arange(len(tokens), device=model.device)
    logits = _forward(model, tokens, plan.attention_mask)[rows, plan.decision]
    return torch.stack(
        [
            metric(logits if metric.token_ids is None else logits[:, metric.token_ids], plan.items)
            for metric in plan.metrics.values()
        ]
    )


def _forward(
    model: HookedModel, tokens: Tensor, attention_mask: Tensor | None
) -> Float[Tensor, "items positions vocab"]:
    return model.model(
        input_ids=tokens, **padding_arguments(attention_mask), use_cache=False
    ).logits


@contextmanager
def _hooks(
    model: HookedModel,
    grain: str,
    layers: Sequence[int],
    visit: Callable[[int, Tensor], Tensor | None],
) -> Iterator[None]:
    """Call `visit(layer, site)` when a site is computed; what it returns (not None) replaces it."""
    handles = []
    try:
        for layer in layers:
            handles += _hook(model, grain, layer, visit)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(
    model: HookedModel, grain: str, layer: int, visit: Callable[[int, Tensor], Tensor | None]
) -> list:
    block = model.architecture.blocks[layer]
    attention: nn.Module = block.attention_post_norm or block.attention
    mlp: nn.Module = block.mlp_post_norm or block.mlp

    def on_input(module: nn.Module, args: tuple) -> tuple | None:
        site = args[0]
        if grain == "head":
            site = site.unflatten(-1, (model.n_heads, -1))
        new = visit(layer, site)
        return None if new is None else (new.reshape(args[0].shape), *args[1:])

    def on_output(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        first = output[0] if isinstance(output, tuple) else output
        new = visit(layer, first)
        if new is None or not isinstance(output, tuple):
            return new
        return (new, *output[1:])

    if grain == "resid_pre":
        return [block.module.register_forward_pre_hook(on_input)]
    if grain == "resid_post":
        return [block.module.register_forward_hook(on_output)]
    if grain == "attn_out":
        return [attention.register_forward_hook(on_output)]
    if grain == "mlp_out":
        return [mlp.register_forward_hook(on_output)]
    if grain == "head":
        return [block.output_projection.register_forward_pre_hook(on_input)]
    if grain == "neuron":
        return [block.mlp_projection.register_forward_pre_hook(on_input)]
    if grain in ("q", "k", "v"):
        return _hook_projection(model, grain, layer, visit)
    if grain == "pattern":

        def on_weights(module: nn.Module, args: tuple, output: tuple) -> None:
            visit(layer, output[1])

        return [block.attention.register_forward_hook(on_weights)]
    assert grain == "resid_mid", grain
    # resid_mid = resid_pre + attn_out, so it is set through attn_out: both its readers, the MLP and
    # the skip connection, then get the new value.
    entering: list[Tensor] = []

    def on_sum(module: nn.Module, args: tuple, output: Tensor | tuple) -> Tensor | tuple | None:
        added = output[0] if isinstance(output, tuple) else output
        new = visit(layer, entering[-1] + added)
        if new is None:
            return None
        new = new - entering[-1]
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return [
        block.module.register_forward_pre_hook(lambda _, args: entering.append(args[0])),
        attention.register_forward_hook(on_sum),
    ]


def _hook_projection(
    model: HookedModel, grain: str, layer: int, visit: Callable[[int, Tensor], Tensor | None]
) -> list:
    """Queries, keys or values [items positions heads d_head], also out of a fused projection."""
    block = model.architecture.blocks[layer]
    part, sizes = "qkv".index(grain), [model.n_heads, model.n_kv_heads, model.n_kv_heads]
    fused = len(block.qkv) == 1
    module = block.qkv[0] if fused else block.qkv[part]

    def on_output(_: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        if not fused:
            new = visit(layer, output.unflatten(-1, (sizes[part], model.d_head)))
            return None if new is None else new.flatten(-2)
        if block.qkv_by_head:
            by_head = output.unflatten(-1, (model.n_heads, 3, model.d_head))
            new = visit(layer, by_head[..., part, :])
            if new is None:
                return None
            parts = [new if i == part else by_head[..., i, :] for i in range(3)]
            return torch.stack(parts, dim=-2).flatten(-3)
        widths = [n * model.d_head for n in sizes]
        pieces = list(output.split(widths, dim=-1))
        new = visit(layer, pieces[part].unflatten(-1, (sizes[part], model.d_head)))
        if new is None:
            return None
        pieces[part] = new.flatten(-2)
        return torch.cat(pieces, dim=-1)

    return [module.register_forward_hook(on_output)]
