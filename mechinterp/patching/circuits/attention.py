"""One block's attention, when every head's queries, keys and values have inputs of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

from einops import einsum
from jaxtyping import Float
from torch import Tensor, nn

from mechinterp.architectures import Block
from mechinterp.contexts import KeyValues
from mechinterp.errors import ModelError
from mechinterp.sites import Site


def attend(
    block: Block,
    inputs: Float[Tensor, "rows readers pos d_model"],
    arguments: dict[str, Any],
    cache: KeyValues | None = None,
) -> Float[Tensor, "rows pos heads d_head"]:
    """The heads' z when each query head and each key-value head reads an input of its own.

    Args:
        inputs: after the norm; query heads, then keys of the key-value heads, then values.
        arguments: the block's, from a `Context`.
        cache: keys and values of the positions before, if these are not the first.

    Raises:
        ModelError: the block does not use its projections exactly once.
    """
    counts = (block.n_heads, block.n_kv_heads, block.n_kv_heads)
    outputs: dict[nn.Module, Tensor] = {}
    for part, x in zip("qkv", inputs.split(counts, dim=1), strict=True):
        weight, bias = block.qkv_weight(part)
        value = einsum(x, weight, "n h p d, d h e -> n p h e")
        location = block.location(Site(part, block.layer))
        if location.module not in outputs:
            width = sum(counts) if len(block.qkv) == 1 else counts["qkv".index(part)]
            shape = (value.shape[0], value.shape[1], width * block.d_head)
            outputs[location.module] = value.new_empty(shape)
        location.view(outputs[location.module])[:] = value if bias is None else value + bias
    seen: list[Tensor] = []

    def collect(z: Tensor) -> None:
        seen.append(z)
        raise _Collected

    stream = inputs.new_zeros(1).expand(inputs.shape[0], *inputs.shape[2:])
    handle = block.location(Site("head", block.layer)).on_read(collect)
    try:
        with _answering(outputs), contextlib.suppress(_Collected):
            block.run(stream, arguments, cache)
    finally:
        handle.remove()
    if len(seen) != 1:
        raise ModelError(f"block {block.layer}: its heads' outputs were not computed")
    return seen[0]


class _Collected(Exception):
    """The heads' outputs are there, and nothing more is wanted of the block."""


@contextlib.contextmanager
def _answering(outputs: Mapping[nn.Module, Tensor]) -> Iterator[None]:
    """Within, each of these modules returns its tensor, once, and computes nothing."""
    calls = dict.fromkeys(outputs, 0)
    replaced = {module: module.__dict__.get("forward") for module in outputs}

    def answer(module: nn.Module) -> Any:
        def forward(*_: Any, **__: Any) -> Tensor:
            calls[module] += 1
            return outputs[module]

        return forward

    try:
        for module in outputs:
            module.forward = answer(module)
        yield
    finally:
        for module, forward in replaced.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward
    if any(n != 1 for n in calls.values()):
        raise ModelError(
            f"projections of queries, keys and values ran {sorted(calls.values())} times instead "
            "of once; this network's attention is not laid out as its family's is"
        )
