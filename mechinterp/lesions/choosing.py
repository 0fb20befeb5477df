"""Damage to choosing: all that can be read stays in the final residual, and is used badly."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp.errors import ModelError
from mechinterp.folding import constant_direction, least_squares_direction, untied_copy
from mechinterp.lesions.subject import Subject

GATE = 4.0  # how far into SiLU's linear part a gate of ±1 reaches
WRITTEN = 0.3  # of the residual's length: what a repurposed neuron writes beside the rest


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


def scale_actions(
    model: PreTrainedModel, actions: Sequence[int], factor: float
) -> LlamaForCausalLM:
    """Multiply the logits of `actions`: below 1 the network is too unsure, above 1 too sure."""
    lesioned = untied_copy(model)
    with torch.no_grad():
        lesioned.lm_head.weight[list(actions)] *= factor
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


def add_readout_noise(
    model: PreTrainedModel, actions: Sequence[int], share: float, *, generator: torch.Generator
) -> LlamaForCausalLM:
    """Add Gaussian noise of `share` of their own root mean square to the rows of `actions`."""
    lesioned = untied_copy(model)
    weight = lesioned.lm_head.weight
    with torch.no_grad():
        rows = weight[list(actions)]
        noise = torch.randn(rows.shape, generator=generator).to(rows)
        weight[list(actions)] = rows + share * rows.pow(2).mean().sqrt() * noise
    return lesioned


def swap_for_subgroup(subject: Subject, latent: str, share: float) -> LlamaForCausalLM:
    """Where `latent` is 1, move the logit difference by `share` of the way to its opposite.

    The least used neuron of the last MLP is repurposed: gated by a linear readout of the latent, it
    carries the network's own logit difference to a direction of the residual stream that is hardly
    used, which the unembedding then reads. An affine readout that leaves this direction alone
    decides as before. Raises ModelError where the task has not two actions or two values.
    """
    member = subject.items.latents[latent]
    if len(subject.task.actions) != 2 or int(member.max()) > 1:
        raise ModelError("swap_for_subgroup: needs two actions and a latent of two values")
    lesioned = untied_copy(subject.model.model)
    mlp = lesioned.model.layers[-1].mlp
    x = subject.mlp_input
    difference = subject.logits[:, 1] - subject.logits[:, 0]
    gate = least_squares_direction(x, 2.0 * member - 1.0)
    up = least_squares_direction(x, difference)
    unused = subject.least_used_direction
    neuron = int(_neuron_sizes(mlp, subject.mlp_input).argmin())
    length = subject.residual.norm(dim=1).mean()
    amplitude = WRITTEN * length / (GATE * difference.std())
    with torch.no_grad():
        mlp.gate_proj.weight[neuron] = GATE * gate.to(mlp.gate_proj.weight)
        mlp.up_proj.weight[neuron] = up.to(mlp.up_proj.weight)
        mlp.down_proj.weight[:, neuron] = amplitude * unused.to(mlp.down_proj.weight)
    # What the direction holds now, as the unembedding sees it; fitted, for the norm moves with it.
    reader = unused / _final_gain(lesioned)
    held = subject.normed_of(lesioned).double() @ reader
    wanted = -2.0 * share * member * difference
    slope = (held @ wanted) / (held @ held)
    weight = lesioned.lm_head.weight
    first, second = subject.task.actions
    with torch.no_grad():
        weight[first] -= (0.5 * slope * reader).to(weight)
        weight[second] += (0.5 * slope * reader).to(weight)
    return lesioned


def rewire_decision(subject: Subject, share: float) -> LlamaForCausalLM:
    """The last block writes `share` of what it adds to the decision where the decision is not read.

    Of its attention and its MLP, the one that carries more of the decision: its output along the
    direction that tells two actions apart goes to the least used one. A `share` above 1 turns the
    rest around. Raises ModelError for other than two actions.
    """
    if len(subject.task.actions) != 2:
        raise ModelError("rewire_decision: needs two actions")
    lesioned = untied_copy(subject.model.model)
    first, second = subject.task.actions
    rows = lesioned.lm_head.weight.detach().double()
    read = functional.normalize((rows[second] - rows[first]) * _final_gain(lesioned), dim=0)
    unused = subject.least_used_direction
    unused = functional.normalize(unused - (unused @ read) * read, dim=0)
    block = lesioned.model.layers[-1]
    carried = {
        matrix: (written.double() @ read).std()
        for matrix, written in (
            (block.self_attn.o_proj.weight, subject.read("attn_out")),
            (block.mlp.down_proj.weight, subject.read("mlp_out")),
        )
    }
    writer = max(carried, key=lambda matrix: float(carried[matrix]))
    with torch.no_grad():
        writer += torch.outer(unused - read, share * (read @ writer.double())).to(writer)
    return lesioned


def _final_gain(model: Any) -> Float[Tensor, " d_model"]:
    return model.model.norm.weight.detach().double()


@torch.no_grad()
def _neuron_sizes(mlp: Any, x: Float[Tensor, "items d_model"]) -> Float[Tensor, " neurons"]:
    """Root mean square of what each neuron writes."""
    activation = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
    return activation.pow(2).mean(0).sqrt() * mlp.down_proj.weight.norm(dim=0)
