"""What a base model hands its blocks besides the residual: masks, rotary embeddings, position ids.

None of it is re-invented: the base model's own `forward` runs with a recorder in place of its
blocks, and what it hands to each block is what we hand to that block.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn


def padding_arguments(attention_mask: Tensor | None) -> dict[str, Tensor]:
    """The mask and the position ids that go with it: each row counts from its first real token."""
    if attention_mask is None:
        return {}
    position_ids = (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": attention_mask, "position_ids": position_ids}


class KeyValues:
    """One block's keys and values: stands in for a Hugging Face cache in a single block call.

    Earlier positions' keys and values, if given, come before the block's own; afterwards `keys` and
    `values` [rows kv_heads positions d_head] hold what the attention used (after rotary embedding).
    """

    def __init__(self, keys: Tensor | None = None, values: Tensor | None = None) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        if self.keys is not None and self.values is not None:
            keys = torch.cat([self.keys, keys], dim=2)
            values = torch.cat([self.values, values], dim=2)
        self.keys, self.values = keys, values
        return keys, values

    def get_seq_length(self, *_: Any) -> int:
        return 0 if self.keys is None else self.keys.shape[2]


@dataclass(frozen=True)
class Context:
    """What the base model hands each of its blocks besides the residual, for one batch.

    `arguments[l]` are block l's keyword arguments. Without padding their batch size is 1 and they
    serve any number of rows; with padding they belong to the batch's rows one to one.
    """

    arguments: tuple[dict[str, Any], ...]

    def suffix(self, start: int) -> Context:
        """For queries at positions `start` onwards, whose keys still include all positions."""
        if start == 0:
            return self

        def cut(name: str, tensor: Tensor) -> Tensor:
            return tensor[:, :, start:] if name == "attention_mask" else tensor[:, start:]

        shortened = self.map(cut)
        return Context(tuple(_with_causal_mask(a, start) for a in shortened.arguments))

    def rows(self, items: Int[Tensor, " rows"]) -> Context:
        """For a batch whose row r continues item `items[r]` of this one."""

        def pick(_: str, tensor: Tensor) -> Tensor:
            return tensor if tensor.shape[0] == 1 else tensor.index_select(0, items)

        return self.map(pick)

    def map(self, change: Callable[[str, Tensor], Tensor]) -> Context:
        """Every tensor changed by `change(name, tensor)`: once, however many blocks share it."""
        done: dict[int, Tensor] = {}

        def once(name: str, tensor: Tensor) -> Tensor:
            if id(tensor) not in done:
                done[id(tensor)] = change(name, tensor)
            return done[id(tensor)]

        def changed(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                return once(name, value)
            if isinstance(value, tuple):
                return tuple(once(name, item) for item in value)
            return value

        return Context(
            tuple(
                {name: changed(name, value) for name, value in arguments.items()}
                for arguments in self.arguments
            )
        )


def _with_causal_mask(arguments: dict[str, Any], start: int) -> dict[str, Any]:
    """SDPA gets no mask where the causal one is implied; a suffix of the queries needs it said."""
    if "attention_mask" in arguments:
        return arguments
    positions = arguments["position_ids"]
    n = positions.shape[1]
    mask = torch.ones(n, start + n, dtype=torch.bool, device=positions.device).tril(start)
    return {**arguments, "attention_mask": mask[None, None]}


class _Recorder(nn.Module):
    """Takes every block's place in a base model, and writes down what each block is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.calls.append((args, kwargs))
        return args[0]


def record_context(
    base: nn.Module, blocks: str, attention_mask: Int[Tensor, "batch pos"] | None, **inputs: Tensor
) -> tuple[Float[Tensor, "batch pos d_model"], Context]:
    """What enters block 0 and the context of all blocks (`base.<blocks>`) for these inputs."""
    modules: Any = getattr(base, blocks)
    recorder = _Recorder()
    # A shallow copy shares every module but the blocks; the model itself is not touched.
    frame = copy.copy(base)
    frame._modules = {**base._modules, blocks: nn.ModuleList([recorder] * len(modules))}
    frame(**inputs, **padding_arguments(attention_mask), use_cache=False)
    context = Context(
        tuple(_by_name(m, *call) for m, call in zip(modules, recorder.calls, strict=True))
    )
    if attention_mask is None:
        context = context.map(lambda _, tensor: tensor[:1])
    return recorder.calls[0][0][0], context


def _by_name(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A block call's arguments by name, without the residual, which always comes first."""
    bound = inspect.signature(block.forward).bind(*args, **kwargs).arguments
    extra = bound.pop("kwargs", {})
    named = dict(list(bound.items())[1:]) | extra
    return {name: value for name, value in named.items() if value is not None}
