"""Sampling from a raw Hugging Face model, with a KV cache and nothing cut off the distribution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from mechinterp.contexts import padding_arguments
from mechinterp.errors import ModelError

Mask = Bool[Tensor, "batch pos"] | Int[Tensor, "batch pos"]


def generate(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    temperature: float,
    generator: torch.Generator | None,
    attention_mask: Int[Tensor, "batch pos"] | None,
    eos_token_id: int | None,
) -> Int[Tensor, "batch new_pos"]:
    """Prompt and continuation; see `HookedModel.generate`.

    Raises:
        ModelError: negative temperature, or prompts padded on the right.
    """
    if temperature < 0:
        raise ModelError(f"temperature: expected 0 (greedy) or more, got {temperature}")

    def choose(logits: Float[Tensor, "batch vocab"]) -> Int[Tensor, " batch"]:
        if temperature == 0:
            return logits.argmax(-1)
        return draw((logits.float() / temperature).softmax(-1), generator)

    new = decode(
        model,
        tokens,
        attention_mask,
        choose,
        max_new_tokens=max_new_tokens,
        end_token=eos_token_id,
    )
    return torch.cat([tokens, new], dim=1)


@torch.no_grad()
def decode(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    mask: Mask | None,
    choose: Callable[[Float[Tensor, "rows vocab"]], Int[Tensor, " rows"]],
    *,
    n_samples: int = 1,
    max_new_tokens: int,
    end_token: int | None,
) -> Int[Tensor, "rows new"]:
    """What `choose` picks, token by token, from the logits of `n_samples` rows of every prompt.

    A prompt is run once, and its keys and values are repeated for its rows. Ends when all rows
    have ended; a row that has is filled up with `end_token`. Raises ModelError for prompts padded
    on the right.
    """
    prompts = Prompts(model, tokens, mask, n_samples=n_samples)
    prompts.make_room(max_new_tokens)
    logits = prompts.logits
    ended = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    chosen: list[Int[Tensor, " rows"]] = []
    for n_chosen in range(1, max_new_tokens + 1):
        picked = choose(logits)
        if end_token is not None:
            picked = picked.masked_fill(ended, end_token)
            ended |= picked == end_token
        chosen.append(picked)
        if n_chosen == max_new_tokens or ended.all():
            break
        logits = prompts.go_on(picked[:, None])[:, -1]
    return torch.stack(chosen, dim=1)


class Prompts:
    """Prompts that were run once, to be continued by `n_samples` rows each.

    `logits` [rows vocab] are those of the first new token; rows of one prompt stand together. With
    gradients enabled they flow through the keys and values into the prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokens: Int[Tensor, "batch pos"],
        mask: Mask | None,
        *,
        n_samples: int = 1,
    ) -> None:
        if mask is not None and not mask[:, -1].all():
            raise ModelError("attention_mask: prompts to be continued must be padded on the left")
        if mask is not None and mask.all():
            mask = None  # Hugging Face does less without one
        self._model = model
        self._cache = DynamicCache(config=model.config)
        arguments = padding_arguments(None if mask is None else mask.long())
        logits = self._run(tokens, arguments, logits_to_keep=1)
        if n_samples > 1:
            self._cache.batch_repeat_interleave(n_samples)
        self.logits = _for_rows(logits[:, -1], n_samples)
        self._mask = None if mask is None else _for_rows(mask.long(), n_samples)

    def make_room(self, n_tokens: int) -> None:
        """For keys and values of `n_tokens` more, to be written in place: no gradients from here.

        Hugging Face's cache is copied whole for every token, a quarter of the time of sampling from
        a small network.
        """
        for i, layer in enumerate(self._cache.layers):
            if type(layer) is DynamicLayer:  # those with a window keep what is in it alone
                self._cache.layers[i] = _LayerWithRoom(layer, n_tokens)

    def go_on(self, new: Int[Tensor, "rows new"]) -> Float[Tensor, "rows new vocab"]:
        """Logits after each of `new`, which follow what the rows have so far."""
        if self._mask is None:
            return self._run(new, {})
        self._mask = torch.cat([self._mask, torch.ones_like(new)], dim=1)
        arguments = padding_arguments(self._mask)
        arguments["position_ids"] = arguments["position_ids"][:, -new.shape[1] :]
        return self._run(new, arguments)

    def _run(
        self, tokens: Int[Tensor, "rows new"], arguments: dict[str, Tensor], **options: int
    ) -> Float[Tensor, "rows kept vocab"]:
        output = self._model(
            input_ids=tokens, **arguments, **options, past_key_values=self._cache, use_cache=True
        )
        return output.logits


class _LayerWithRoom(DynamicLayer):
    """One layer's keys and values [rows heads positions d_head], appended to without a copy."""

    def __init__(self, layer: DynamicLayer, n_tokens: int) -> None:
        super().__init__()
        self.is_initialized, self.dtype, self.device = True, layer.dtype, layer.device
        states = (layer.keys, layer.values)
        self._room = [_with_room(x, n_tokens) for x in states if x is not None]
        self._show(layer.get_seq_length())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> Any:
        first = self.get_seq_length()
        last = first + key_states.shape[2]
        for room, new in zip(self._room, (key_states, value_states), strict=True):
            room[:, :, first:last] = new
        self._show(last)
        return self.keys, self.values

    def _show(self, n: int) -> None:
        self.keys, self.values = (room[:, :, :n] for room in self._room)


def _with_room(states: Tensor, n_tokens: int) -> Tensor:
    rows, heads, n, d_head = states.shape
    room = states.new_empty(rows, heads, n + n_tokens, d_head)
    room[:, :, :n] = states
    return room


def draw(
    probabilities: Float[Tensor, "batch vocab"], generator: torch.Generator | None
) -> Int[Tensor, " batch"]:
    """One token of each row, on the row's device whatever the generator's."""
    device = probabilities.device
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(device)


def _for_rows(values: Tensor, n_samples: int) -> Tensor:
    return repeat(values, "batch ... -> (batch samples) ...", samples=n_samples)
