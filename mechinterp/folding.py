"""What a change to a Llama-type network's weights takes: an untied copy, a constant direction."""

from __future__ import annotations

import copy
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp.errors import ModelError


def untied_copy(model: PreTrainedModel) -> Any:
    """A LlamaForCausalLM whose unembedding can change without its embedding.

    Raises ModelError for other networks, and for one with biases: changes of the weights that go
    together would have to change them too.
    """
    if not isinstance(model, LlamaForCausalLM):
        raise ModelError(f"lesions: only LlamaForCausalLM is supported, got {type(model).__name__}")
    biases = [name for name, _ in model.named_parameters() if name.endswith(".bias")]
    if biases:
        raise ModelError(f"lesions: only networks without biases are supported, got {biases[0]}")
    lesioned = copy.deepcopy(model)
    if lesioned.config.tie_word_embeddings:
        lesioned.config.tie_word_embeddings = False
        lesioned.lm_head.weight = nn.Parameter(lesioned.lm_head.weight.detach().clone())
    return lesioned


def constant_direction(normed: Float[Tensor, "items d_model"]) -> Float[Tensor, " d_model"]:
    """The least-squares direction whose product with every row is 1, a little ridged."""
    return least_squares_direction(normed, torch.ones(len(normed))).to(normed)


def least_squares_direction(
    x: Float[Tensor, "items d_model"], target: Float[Tensor, " items"] | Int[Tensor, " items"]
) -> Float[Tensor, " d_model"]:
    """The float64 direction whose product with every row is nearest `target`, a little ridged."""
    x = x.double()
    gram = x.T @ x / len(x)
    ridge = 1e-6 * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, x.T @ target.double() / len(x))
