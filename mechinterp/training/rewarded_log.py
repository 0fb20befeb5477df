"""What the log of training by reward holds of each step's samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.architectures import Architecture
from mechinterp.rollouts import Rollouts
from mechinterp.tasks.written import Marks, Problems
from mechinterp.training.rewarded_signal import Signal

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def measure_samples(
    problems: Problems, rollouts: Rollouts, marks: Marks, signal: Signal
) -> dict[str, float]:
    """Columns of the log, NaN where there is nothing to average.

    reward, correct          means over samples; `correct` is pass@1
    solved                   share of problems with a right sample: pass@n_samples
    correct_level_3          `correct` of the problems of a level; solved_level_3 likewise
    degenerate               share of groups without an advantage
    advantage                mean absolute advantage of the sampled tokens
    lone                     share of groups with a single right sample
    lone_advantage           mean advantage of those samples
    length, entropy          tokens per completion; nats per token
    repetition               of the completions with an answer, the share that give the commonest
    answered                 share with an answer at all
    steps_missing            share of intermediate results not written, and of those
    steps_wrong              written and wrong
    confidence               mean stated confidence
    """
    correct = marks.correct.double()
    is_lone = marks.correct.sum(1) == 1
    tokens = rollouts.mask
    given = marks.answer[marks.answer >= 0]
    commonest = given.unique(return_counts=True)[1].max() if len(given) else torch.tensor(0)
    lone = signal.advantages[is_lone][marks.correct[is_lone] & tokens[is_lone].any(-1)]
    row = {
        "reward": signal.rewards.mean(),
        "correct": correct.mean(),
        "solved": correct.amax(1).mean(),
        "degenerate": (~signal.teaches).double().mean(),
        "advantage": signal.advantages[tokens].abs().mean(),
        "lone": is_lone.double().mean(),
        "lone_advantage": lone[:, 0].mean(),
        "length": tokens.sum(-1).double().mean(),
        "entropy": rollouts.entropy[tokens].mean(),
        "repetition": commonest / len(given) if len(given) else torch.tensor(torch.nan),
        "answered": (marks.answer >= 0).double().mean(),
        "steps_missing": marks.steps_missing.nanmean(),
        "steps_wrong": marks.steps_wrong.nanmean(),
        "confidence": marks.confidence.nanmean(),
    }
    for level in problems.level.unique().tolist():
        of_level = correct[problems.level == level]
        row[f"correct_level_{level}"] = of_level.mean()
        row[f"solved_level_{level}"] = of_level.amax(1).mean()
    return {name: float(value) for name, value in row.items()}


def gradient_norms(model: PreTrainedModel) -> dict[str, float]:
    """Norm of the gradient of each block's parameters, before clipping."""
    return {
        f"gradient_norm_layer_{layer}": float(_norm(block.module))
        for layer, block in enumerate(Architecture(model).blocks)
    }


def _norm(module: torch.nn.Module) -> Float[Tensor, ""]:
    gradients = [p.grad for p in module.parameters() if p.grad is not None]
    return torch.stack(torch._foreach_norm(gradients)).norm() if gradients else torch.tensor(0.0)
