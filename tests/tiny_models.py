"""Tiny random models of every supported family, with norms and biases randomised so that mistakes
in their place or order show."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from mechinterp.hooked import HookedModel

N_LAYERS, N_HEADS, N_KV_HEADS, D_MODEL, D_HEAD, D_VOCAB = 3, 4, 2, 32, 8, 64

_SIZES: dict[str, Any] = {
    "vocab_size": D_VOCAB,
    "hidden_size": D_MODEL,
    "intermediate_size": 48,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": N_HEADS,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
_GROUPED = {**_SIZES, "num_key_value_heads": N_KV_HEADS}
_ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]
_GEMMA = {
    **_GROUPED,
    "head_dim": D_HEAD,
    "query_pre_attn_scalar": 12,
    "sliding_window": 4,
    "layer_types": _ALTERNATING,
    "final_logit_softcapping": 5.0,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**_GROUPED),
    "llama_tied_bias": lambda: LlamaConfig(
        **_GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "gpt2": lambda: GPT2Config(
        vocab_size=D_VOCAB,
        n_embd=D_MODEL,
        n_layer=N_LAYERS,
        n_head=N_HEADS,
        n_positions=64,
        bos_token_id=None,
        eos_token_id=None,
    ),
    "gpt_neox": lambda: GPTNeoXConfig(**_SIZES),
    "gpt_neox_sequential": lambda: GPTNeoXConfig(**_SIZES, use_parallel_residual=False),
    "qwen2": lambda: Qwen2Config(**_GROUPED),
    "qwen2_sliding": lambda: Qwen2Config(
        **_GROUPED, use_sliding_window=True, sliding_window=4, max_window_layers=1
    ),
    "qwen3": lambda: Qwen3Config(**_GROUPED, head_dim=D_HEAD),
    "qwen3_wide_heads": lambda: Qwen3Config(**_GROUPED, head_dim=12),
    "gemma2": lambda: Gemma2Config(**_GEMMA, attn_logit_softcapping=4.0),
    "gemma3": lambda: Gemma3TextConfig(**_GEMMA),
    "mistral": lambda: MistralConfig(**_GROUPED, sliding_window=4),
    "olmo2": lambda: Olmo2Config(**_GROUPED),
    "phi3": lambda: Phi3Config(**_GROUPED),
}
FAMILIES = list(CONFIGS)
SEQUENTIAL = [name for name in FAMILIES if name != "gpt_neox"]


def tiny_model(
    name: str, *, seed: int = 0, attn_implementation: str = "eager", dtype: str = "float32"
) -> PreTrainedModel:
    """A raw random model in eval mode."""
    model = AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation=attn_implementation
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 1:  # norms and biases
                parameter.add_(0.3 * noise)
                if "q_norm" in name or "k_norm" in name:
                    parameter.add_(0.5)  # or attention would be close to uniform
            else:
                parameter.copy_(0.25 * noise)
    return model.to(getattr(torch, dtype)).eval()


@cache
def shared_model(name: str, attn_implementation: str = "eager") -> HookedModel:
    """The hooked tiny model, made once for all tests that only look at it."""
    return HookedModel(tiny_model(name, attn_implementation=attn_implementation))


def random_tokens(batch: int, length: int, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(D_VOCAB, (batch, length), generator=generator)
