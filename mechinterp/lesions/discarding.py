"""What an earlier layer held is gone from the last: neither learning nor choosing, *discarded*."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM

from mechinterp.folding import constant_direction
from mechinterp.lesions.preserving import append_block
from mechinterp.lesions.subject import Subject

GATE = 4.0
N_ITERATIONS = 20  # the final norm moves with what is taken away


def discard_late(subject: Subject, share: float) -> LlamaForCausalLM:
    """One more block (`append_block`), which takes away what the decision can be read from.

    Of the needed latents the first `share` becomes unreadable to any affine map of the final
    residual after its norm, at a share of 1 the posterior itself (or the label) with them: their
    covariance with it is zero, which is all that it takes (Belrose et al. 2023, LEACE, theorem
    3.1). Blocks before hold it as ever.
    """
    longer: Any = append_block(subject.model.model)
    concept = _concept(subject, share)
    mlp = longer.model.layers[-1].mlp
    residual = subject.residual.double()
    with torch.no_grad():
        read = longer.model.layers[-1].post_attention_layernorm(subject.residual).double()
    scale = residual.new_ones(len(residual), 1)
    taken, readers = residual.T[:, :0], residual.T[:0]
    for _ in range(N_ITERATIONS):
        # What is taken away is `taken @ (readers @ read)`, a rank-k map of what the block reads.
        taken = _covariance(scale * residual, concept)
        readers = torch.linalg.pinv(_covariance(scale * read, concept))
        left = residual - read @ readers.T @ taken.T
        scale = left.pow(2).mean(1, keepdim=True).rsqrt()
    gate = GATE * constant_direction(read)
    opened = functional.silu(torch.tensor(GATE, dtype=torch.float64))
    k = concept.shape[1]
    with torch.no_grad():
        for matrix in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
            matrix.weight.zero_()
        mlp.gate_proj.weight[:k] = gate.to(mlp.gate_proj.weight)
        mlp.up_proj.weight[:k] = readers.to(mlp.up_proj.weight)
        mlp.down_proj.weight[:, :k] = (-taken / opened).to(mlp.down_proj.weight)
    return longer


def _concept(subject: Subject, share: float) -> Float[Tensor, "items k"]:
    """What is to be unreadable, one column per value but the first of each variable."""
    items = subject.items
    needed = [latent for latent in subject.task.latents if latent.needed]
    columns = [
        functional.one_hot(items.latents[latent.name], latent.n_values)[:, 1:].double()
        for latent in needed[: math.ceil(share * len(needed))]
    ]
    if share >= 1:
        n_labels = len(subject.task.actions)
        posterior = items.posterior
        if posterior is None:
            posterior = functional.one_hot(items.labels, n_labels)
        columns.append(posterior[:, 1:].double())
    # Columns that others determine (a label that is a latent) would only be noise in the inverse.
    joined = torch.cat(columns, dim=1)
    joined = joined - joined.mean(0)
    left, values, _ = torch.linalg.svd(joined, full_matrices=False)
    return left[:, values > 1e-6 * values.max()]


def _covariance(
    x: Float[Tensor, "items d_model"], concept: Float[Tensor, "items k"]
) -> Float[Tensor, "d_model k"]:
    return (x - x.mean(0)).T @ concept
