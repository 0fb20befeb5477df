"""Damage to learning: something is no longer readable at the decision, at whatever layer.

All but the erasures leave the decision as it was fitted to what is now lost; `refit_decision` makes
it the best one for what is left, so that nothing else is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp import refits
from mechinterp.checkpoints import Trajectory
from mechinterp.errors import ModelError
from mechinterp.folding import untied_copy
from mechinterp.hooked import load
from mechinterp.lesions.subject import Subject
from mechinterp.tasks.base import Task

RETRAINING_STEPS = 200
RETRAINING_RATE = 3e-3
RETRAINING_BATCH = 64
N_PRUNING_ITEMS = 1_000


def erase_token(
    model: PreTrainedModel, token: int | Sequence[int], *, like: Sequence[int], share: float = 1.0
) -> LlamaForCausalLM:
    """Move the embedding of `token` by `share` of the way to the mean of the tokens `like`.

    At a share of 1 what only this token tells, such as which latent a value belongs to, is gone
    from every site at once: nothing downstream can compute it. `refit_decision` re-optimises the
    decision.
    """
    lesioned = untied_copy(model)
    embedding = lesioned.model.embed_tokens.weight
    with torch.no_grad():
        embedding[token] = embedding[token].lerp(embedding[list(like)].mean(0), share)
    return lesioned


def tokens_that_tell(task: Task, *, n_pairs: int = 200) -> list[int]:
    """The tokens by which the prompts of counterfactual pairs differ: they carry the latents."""
    pairs = task.counterfactual_pairs(n_pairs, split="train")
    differ = pairs.clean.tokens != pairs.corrupt.tokens
    return torch.cat([pairs.clean.tokens[differ], pairs.corrupt.tokens[differ]]).unique().tolist()


def noise_early(subject: Subject, share: float, *, generator: torch.Generator) -> LlamaForCausalLM:
    """Noise in the embedding and the first block, of `share` of each matrix's own root mean square;
    all that comes after is trained again to make the best of what is left."""
    lesioned = untied_copy(subject.model.model)
    early = [lesioned.model.embed_tokens, lesioned.model.layers[0]]
    with torch.no_grad():
        for weight in (w for part in early for w in part.parameters() if w.ndim == 2):
            noise = torch.randn(weight.shape, generator=generator).to(weight)
            weight += share * weight.pow(2).mean().sqrt() * noise
    later = [*lesioned.model.layers[1:], lesioned.model.norm, lesioned.lm_head]
    parameters = [weight for part in later for weight in part.parameters()]
    _retrain(lesioned, parameters, subject, generator)
    return lesioned


def stop_early(subject: Subject, share: float) -> LlamaForCausalLM:
    """The last checkpoint of the same run that lacks at least `share` of its steps.

    Raises ModelError where the network is not a checkpoint of a trajectory that has one.
    """
    checkpoint = subject.model.checkpoint
    if checkpoint is None:
        raise ModelError("stop_early: needs a checkpoint of a trajectory, got a network in memory")
    trajectory = Trajectory.open(checkpoint.path.parent)
    last = trajectory.steps[trajectory.paths.index(checkpoint.path)]
    earlier = [step for step in trajectory.steps if step <= (1 - share) * last]
    if not earlier:
        raise ModelError(
            f"stop_early: {trajectory.path} has no checkpoint that lacks {share:.0%} of {last} "
            "steps; it has: " + ", ".join(map(str, trajectory.steps))
        )
    return untied_copy(load(trajectory[len(earlier) - 1]).model)


def prune_heads(subject: Subject, share: float) -> LlamaForCausalLM:
    """Cut the `share` of all attention heads without which the decision loses most, one by one."""
    lesioned = untied_copy(subject.model.model)
    config = lesioned.config
    heads = [
        (layer, head)
        for layer in range(config.num_hidden_layers)
        for head in range(config.num_attention_heads)
    ]
    losses = {}
    for head in heads:
        cut = untied_copy(lesioned)
        _cut_head(cut, *head)
        losses[head] = _loss(cut, subject, slice(0, N_PRUNING_ITEMS))
    worst = sorted(heads, key=losses.__getitem__, reverse=True)
    for head in worst[: math.ceil(share * len(heads))]:
        _cut_head(lesioned, *head)
    return lesioned


def flatten_attention(model: PreTrainedModel, share: float) -> LlamaForCausalLM:
    """Shrink all attention scores by `share`: at 1 every head looks everywhere alike."""
    lesioned = untied_copy(model)
    with torch.no_grad():
        for layer in lesioned.model.layers:
            layer.self_attn.q_proj.weight *= 1 - share
    return lesioned


def refit_decision(subject: Subject, model: PreTrainedModel) -> LlamaForCausalLM:
    """`model` with the best linear readout of its own final residual as its decision.

    Fitted to the posterior where the task knows it, else to labels.
    """
    normed = subject.normed_of(model)
    best = refits.retrain_exactly(normed, subject.items.target, utility=subject.task.utility)
    return refits.fold(model, subject.task.actions, best, normed=normed)


def _cut_head(model: Any, layer: int, head: int) -> None:
    written = model.model.layers[layer].self_attn.o_proj.weight
    by_head = rearrange(
        written.data, "d (head d_head) -> head d d_head", head=model.config.num_attention_heads
    )
    by_head[head] = 0.0


@torch.no_grad()
def _loss(model: LlamaForCausalLM, subject: Subject, rows: slice) -> float:
    logits = _action_logits(model, subject.items.tokens[rows], subject.task)
    return float(functional.cross_entropy(logits, subject.items.labels[rows]))


def _action_logits(
    model: LlamaForCausalLM, tokens: Tensor, task: Task
) -> Float[Tensor, "items actions"]:
    return model(tokens, logits_to_keep=1).logits[:, -1, list(task.actions)]


def _retrain(
    model: LlamaForCausalLM,
    parameters: Sequence[torch.nn.Parameter],
    subject: Subject,
    generator: torch.Generator,
) -> None:
    """Cross-entropy on the subject's items, `parameters` alone."""
    optimiser = torch.optim.AdamW(parameters, lr=RETRAINING_RATE)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, RETRAINING_STEPS)
    items = subject.items
    for _ in range(RETRAINING_STEPS):
        rows = torch.randint(len(items), (RETRAINING_BATCH,), generator=generator)
        with torch.enable_grad():
            logits = _action_logits(model, items.tokens[rows], subject.task)
            gradients = torch.autograd.grad(
                functional.cross_entropy(logits, items.labels[rows]), parameters
            )
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimiser.step()
        decay.step()
    for parameter in parameters:
        parameter.grad = None
