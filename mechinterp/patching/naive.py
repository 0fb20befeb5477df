"""The slow way: plain forward hooks, one full forward pass of the whole model per patched cell.

It assumes nothing about the network but where its attention and MLP modules are. It is what the
fast sweep is tested against, and what networks get whose structure the fast sweep cannot use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp.contexts import padding_arguments
from mechinterp.errors import ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import Metric
from mechinterp.patching.plan import Plan, Positions, make_plan
from mechinterp.patching.result import PatchingResult
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
    with _hooks(model, grain, range(model.n_layers), seen.__setitem__):
        _forward(model, tokens, attention_mask)
    return [seen[layer] for layer in range(model.n_layers)]


@torch.no_grad()
def patch_by_loop(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    new: Sequence[Float[Tensor, "items positions *site"]],
    plan: Plan,
) -> tuple[Float[Tensor, "layers units items"], Float[Tensor, " items"]]:
    """The metric with `new[layer]` written at one cell at a time, and without any patch.

    Raises:
        ModelError: a patch was not applied exactly once in its forward pass.
    """
    grain, positions = plan.grain, plan.positions
    rows = torch.arange(len(tokens), device=model.device)

    def patched(layer: int, unit: int) -> Float[Tensor, " items"]:
        fired = []

        def write(_: int, site: Tensor) -> Tensor:
            fired.append(layer)
            site = site.clone()
            if positions is None:
                site[:, :, unit] = new[layer][:, :, unit]
            else:
                site[rows, positions[:, unit]] = new[layer][rows, positions[:, unit]]
            return site

        with _hooks(model, grain, [layer], write):
            value = metric_of_run(model, tokens, plan)
        if len(fired) != 1:
            raise ModelError(f"the patch at {grain}.{layer} fired {len(fired)} times, not once")
        return value

    n_units = model.n_heads if positions is None else positions.shape[1]
    base = metric_of_run(model, tokens, plan)
    values = base.new_empty(model.n_layers, n_units, len(tokens))
    with progress_bar(f"patching {grain}", model.n_layers * n_units, unit="cells") as advance:
        for layer in range(model.n_layers):
            for unit in range(n_units):
                values[layer, unit] = patched(layer, unit)
                advance(1)
    return values, base


def naive_sweep(
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
) -> PatchingResult:
    """What `mechinterp.patching.sweep.sweep` computes, the slow way throughout."""
    giver = model if source is None else source
    base, given = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    plan = make_plan(
        model,
        base,
        grain=grain,
        metric=metric,
        positions=positions,
        decision=decision,
        attention_mask=attention_mask,
    )
    new = capture_by_hooks(giver, given, grain, attention_mask=attention_mask)
    values, base_metric = patch_by_loop(model, base, new, plan)
    given_metric = metric_of_run(giver, given, plan)
    metrics = (base_metric, given_metric)
    corrupt_metric, clean_metric = metrics if direction == "denoising" else metrics[::-1]
    return PatchingResult(
        grain, direction, "loop", values, corrupt_metric, clean_metric, plan.positions
    )


@torch.no_grad()
def metric_of_run(
    model: HookedModel, tokens: Int[Tensor, "items positions"], plan: Plan
) -> Float[Tensor, " items"]:
    """The metric of one full forward pass, from all of its logits."""
    rows = torch.arange(len(tokens), device=model.device)
    logits = _forward(model, tokens, plan.attention_mask)[rows, plan.decision]
    token_ids = plan.metric.token_ids
    return plan.metric(logits if token_ids is None else logits[:, token_ids], plan.items)


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
