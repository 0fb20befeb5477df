"""Changes of the weights that leave the function as it is, or nearly: never damage."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from einops import repeat
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp.folding import untied_copy


def rotate_residual_basis(
    model: PreTrainedModel, *, generator: torch.Generator
) -> LlamaForCausalLM:
    """The same function with the residual stream in a random orthonormal basis.

    Norm gains are first folded into the matrices that read behind them: without gains, RMSNorm
    commutes with any rotation.
    """
    rotated = untied_copy(model)
    d_model = rotated.config.hidden_size
    gaussian = torch.randn(d_model, d_model, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(gaussian).Q
    with torch.no_grad():
        for layer in rotated.model.layers:
            attention, mlp = layer.self_attn, layer.mlp
            readers = {
                layer.input_layernorm: (attention.q_proj, attention.k_proj, attention.v_proj),
                layer.post_attention_layernorm: (mlp.gate_proj, mlp.up_proj),
            }
            for norm, matrices in readers.items():
                _rotate_readers(norm, matrices, rotation)
            for writer in (attention.o_proj, mlp.down_proj):
                writer.weight.copy_((rotation.T @ writer.weight.double()).to(writer.weight))
        _rotate_readers(rotated.model.norm, (rotated.lm_head,), rotation)
        embedding = rotated.model.embed_tokens.weight
        embedding.copy_((embedding.double() @ rotation).to(embedding))
    return rotated


def _rotate_readers(norm: Any, matrices: Sequence[nn.Linear], rotation: Tensor) -> None:
    gain = norm.weight.double()
    for matrix in matrices:
        matrix.weight.copy_(((matrix.weight.double() * gain) @ rotation).to(matrix.weight))
    norm.weight.fill_(1.0)


def permute_neurons(model: PreTrainedModel, *, generator: torch.Generator) -> LlamaForCausalLM:
    """The same function with every MLP's neurons in another order."""
    permuted = untied_copy(model)
    with torch.no_grad():
        for layer in permuted.model.layers:
            mlp = layer.mlp
            order = torch.randperm(mlp.gate_proj.out_features, generator=generator)
            for reader in (mlp.gate_proj, mlp.up_proj):
                reader.weight.copy_(reader.weight[order])
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    return permuted


def rescale_parts(model: PreTrainedModel, *, generator: torch.Generator) -> LlamaForCausalLM:
    """The same function with factors moved between matrices that only ever act together.

    Per neuron between up and down, per key-value head between values and output, each a factor
    between 1/4 and 4.
    """
    rescaled = untied_copy(model)
    n_heads = rescaled.config.num_attention_heads
    n_shared = n_heads // rescaled.config.num_key_value_heads

    def factors(n: int) -> Tensor:
        return 4.0 ** (2 * torch.rand(n, generator=generator) - 1)

    with torch.no_grad():
        for layer in rescaled.model.layers:
            mlp, attention = layer.mlp, layer.self_attn
            scale = factors(mlp.up_proj.out_features)
            mlp.up_proj.weight *= scale[:, None]
            mlp.down_proj.weight /= scale
            scale = factors(n_heads // n_shared)
            d_head = attention.v_proj.out_features // len(scale)
            attention.v_proj.weight *= repeat(scale, "kv -> (kv d) 1", d=d_head)
            attention.o_proj.weight /= repeat(scale, "kv -> (kv g d)", g=n_shared, d=d_head)
    return rescaled


def round_to_half(model: PreTrainedModel) -> LlamaForCausalLM:
    """Every weight to float16 and back: the last bits are lost."""
    rounded = untied_copy(model)
    with torch.no_grad():
        for weight in rounded.parameters():
            weight.copy_(weight.half().to(weight))
    return rounded


def append_block(model: PreTrainedModel) -> LlamaForCausalLM:
    """The same function with one more block at the end, which adds nothing."""
    longer = untied_copy(model)
    block = copy.deepcopy(longer.model.layers[-1])
    block.self_attn.layer_idx = len(longer.model.layers)
    with torch.no_grad():
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.zero_()
    longer.model.layers.append(block)
    longer.config.num_hidden_layers += 1
    if getattr(longer.config, "layer_types", None):
        longer.config.layer_types = [*longer.config.layer_types, longer.config.layer_types[-1]]
    return longer
