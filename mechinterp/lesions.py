"""Damage of known kind, put in on purpose to test the instrument. Each returns a new network.

    shift_actions          choosing (threshold): the action logits move by a constant
    rotate_readout         choosing (readout): the decision reads a partly wrong direction
    erase_token            learning: what a token means never enters the network
    rotate_residual_basis  none: the same function in another basis

All are folded into the weights of a Llama-type network (RMSNorm, no biases), so that the result is
a valid checkpoint.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp.errors import ModelError


def shift_actions(
    model: PreTrainedModel,
    actions: Sequence[int],
    shift: Sequence[float],
    *,
    normed: Float[Tensor, "items d_model"],
) -> LlamaForCausalLM:
    """Add `shift` to the logits of `actions`.

    The unembedding has no bias: a readout direction that is 1 on all of `normed` (final-norm'ed
    residuals at decisions, as many as possible) stands in for it, found by least squares.
    """
    lesioned = untied_copy(model)
    one = constant_direction(normed)
    weight = lesioned.lm_head.weight
    with torch.no_grad():
        for action, amount in zip(actions, shift, strict=True):
            weight[action] += amount * one.to(weight)
    return lesioned


def rotate_readout(
    model: PreTrainedModel,
    actions: Sequence[int],
    degrees: float,
    *,
    normed: Float[Tensor, "items d_model"],
    generator: torch.Generator,
) -> LlamaForCausalLM:
    """Turn the direction that tells two actions apart by `degrees`, in the metric of the data.

    Whitened by the covariance of `normed`, so that the logit difference keeps its variance and only
    cos(degrees) of its correlation with what it was.
    """
    if len(actions) != 2:
        raise ModelError(f"rotate_readout: needs two actions, got {len(actions)}")
    lesioned = untied_copy(model)
    weight = lesioned.lm_head.weight
    x = normed.double()
    values, vectors = torch.linalg.eigh(torch.cov(x.T))
    kept = values > values.max() * 1e-6  # the rest holds no data
    to_white = vectors[:, kept] * values[kept].sqrt()
    difference = (weight[actions[1]] - weight[actions[0]]).detach().double()
    white = to_white.T @ difference
    other = torch.randn(len(white), generator=generator, dtype=torch.float64)
    other -= (other @ white) / (white @ white) * white
    other *= white.norm() / other.norm()
    angle = torch.deg2rad(torch.tensor(degrees, dtype=torch.float64))
    turned_white = angle.cos() * white + angle.sin() * other
    turned = torch.linalg.pinv(to_white.T) @ turned_white
    # Mean logit difference as before: a rotation, not a shift.
    change = turned - difference
    change -= (x.mean(0) @ change) * constant_direction(normed).double()
    with torch.no_grad():
        weight[actions[0]] -= 0.5 * change.to(weight)
        weight[actions[1]] += 0.5 * change.to(weight)
    return lesioned


def erase_token(model: PreTrainedModel, token: int, *, like: Sequence[int]) -> LlamaForCausalLM:
    """Give `token` the mean embedding of the tokens `like`, which mean nothing.

    What only this token tells, such as which latent a value belongs to, is then gone from every
    site at once: nothing downstream can compute it. `mechinterp.refits` re-optimises the decision.
    """
    lesioned = untied_copy(model)
    embedding = lesioned.model.embed_tokens.weight
    with torch.no_grad():
        embedding[token] = embedding[list(like)].mean(0)
    return lesioned


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
                _check_plain(writer)
                writer.weight.copy_((rotation.T @ writer.weight.double()).to(writer.weight))
        _rotate_readers(rotated.model.norm, (rotated.lm_head,), rotation)
        embedding = rotated.model.embed_tokens.weight
        embedding.copy_((embedding.double() @ rotation).to(embedding))
    return rotated


def constant_direction(normed: Float[Tensor, "items d_model"]) -> Float[Tensor, " d_model"]:
    """The least-squares direction whose product with every row is 1, a little ridged."""
    x = normed.double()
    gram = x.T @ x / len(x)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, x.mean(0)).to(normed)


def _rotate_readers(norm: Any, matrices: Sequence[nn.Linear], rotation: Tensor) -> None:
    gain = norm.weight.double()
    for matrix in matrices:
        _check_plain(matrix)
        matrix.weight.copy_(((matrix.weight.double() * gain) @ rotation).to(matrix.weight))
    norm.weight.fill_(1.0)


def _check_plain(matrix: nn.Linear) -> None:
    if matrix.bias is not None:
        raise ModelError("lesions: only networks without biases, such as Llama, are supported")


def untied_copy(model: PreTrainedModel) -> Any:
    """A LlamaForCausalLM whose unembedding can change without its embedding."""
    if not isinstance(model, LlamaForCausalLM):
        raise ModelError(f"lesions: only LlamaForCausalLM is supported, got {type(model).__name__}")
    lesioned = copy.deepcopy(model)
    if lesioned.config.tie_word_embeddings:
        lesioned.config.tie_word_embeddings = False
        lesioned.lm_head.weight = nn.Parameter(lesioned.lm_head.weight.detach().clone())
    return lesioned
