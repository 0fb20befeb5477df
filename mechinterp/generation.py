"""Sampling from a raw Hugging Face model, with a KV cache and nothing cut off the distribution."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from mechinterp.contexts import padding_arguments
from mechinterp.errors import ModelError


@torch.no_grad()
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
    if attention_mask is not None and not attention_mask[:, -1].all():
        raise ModelError("attention_mask: prompts to be continued must be padded on the left")
    cache = DynamicCache(config=model.config)
    ended = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    new = tokens
    for _ in range(max_new_tokens):
        arguments = padding_arguments(attention_mask)
        if arguments:
            arguments["position_ids"] = arguments["position_ids"][:, -new.shape[1] :]
        output = model(
            input_ids=new, **arguments, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        sampled = _sample(output.logits[:, -1], temperature, generator)
        if eos_token_id is not None:
            sampled = sampled.masked_fill(ended, eos_token_id)
            ended |= sampled == eos_token_id
        new = sampled[:, None]
        tokens = torch.cat([tokens, new], dim=1)
        if attention_mask is not None:
            attention_mask = torch.cat([attention_mask, torch.ones_like(new)], dim=1)
        if ended.all():
            break
    return tokens


def _sample(
    logits: Float[Tensor, "batch vocab"], temperature: float, generator: torch.Generator | None
) -> Int[Tensor, " batch"]:
    if temperature == 0:
        return logits.argmax(-1)
    probabilities = (logits.float() / temperature).softmax(-1)
    if generator is not None:
        probabilities = probabilities.to(generator.device)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0].to(logits.device)
