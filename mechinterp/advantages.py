"""From the rewards of a group of samples of one prompt to the advantage of each sample.

    method     advantage A_i                        sum of the losses of its tokens, divided by
    REINFORCE  R_i - b                              1
    GRPO       (R_i - mean R) / std R               the sample's length
    Dr. GRPO   R_i - mean R                         a constant
    RLOO       R_i - mean of the other samples' R   1

The division is `mechinterp.policy_gradient.aggregate`. In a *degenerate* group, where all rewards
are equal but for rounding, every advantage but that of REINFORCE is exactly 0: the prompt teaches
nothing. Samples that are right independently with probability p leave a share 1 - p^G - (1 - p)^G
of groups of G that teach. A lone success among G samples has A = sqrt(G - 1) in GRPO, its G - 1
failures -1 / sqrt(G - 1) each; centred only it has (G - 1) / G.
"""

from __future__ import annotations

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import SpecError, TrainingError

Rewards = Float[Tensor, "prompts samples"]
Advantages = Float[Tensor, "prompts samples"]
ROUNDING = 1e-6  # rewards no further apart, as a share of the largest or of 1, are equal


def reinforce(rewards: Rewards, *, baseline: float = 0.0) -> Advantages:
    """A_i = R_i - b, b a number that does not depend on the samples (Williams 1992)."""
    return rewards - baseline


def centred(rewards: Rewards) -> Advantages:
    """A_i = R_i - mean_j R_j: Dr. GRPO (Liu et al. 2025, arXiv:2503.20783).

    GRPO without the division by the standard deviation. The expected gradient is (G - 1) / G times
    that of the expected reward, as each sample is part of its own baseline.
    """
    return torch.where(_spread(rewards) > 0, rewards - _mean(rewards), 0.0)


def leave_one_out(rewards: Rewards) -> Advantages:
    """A_i = R_i - 1 / (G - 1) sum_{j != i} R_j: RLOO (Ahmadian et al. 2024, arXiv:2402.14740).

    That is G / (G - 1) times the centred advantage, and the gradient is unbiased.
    Raises SpecError for groups of one.
    """
    n_samples = rewards.shape[1]
    if n_samples < 2:
        raise SpecError("leave_one_out: a group needs at least 2 samples, got 1")
    return centred(rewards) * (n_samples / (n_samples - 1))


def standardised(rewards: Rewards, *, correction: int = 0, epsilon: float = 0.0) -> Advantages:
    """A_i = (R_i - mean_j R_j) / (std_j R_j + epsilon): GRPO (Shao et al. 2024, arXiv:2402.03300).

    `correction` 0 is the population's standard deviation, 1 the sample's. The paper does not say
    which and has no epsilon; TRL has 1 and 1e-4. Rewards that differ in their last digits alone are
    taken as equal (`ROUNDING`): divided by their spread they would be of the order of 1.
    """
    if epsilon < 0 or correction not in (0, 1):
        raise SpecError(
            "standardised: epsilon must not be negative, correction must be 0 or 1; "
            f"got {epsilon} and {correction}"
        )
    if rewards.shape[1] <= correction:
        raise SpecError("standardised: a group needs at least 2 samples, got 1")
    scale = rewards.std(1, correction=correction, keepdim=True) + epsilon
    return torch.where(_spread(rewards) > 0, centred(rewards) / scale, 0.0)


def degenerate(rewards: Rewards) -> Bool[Tensor, " prompts"]:
    """Groups without a signal: all rewards equal."""
    return rearrange(_spread(rewards) == 0, "prompts 1 -> prompts")


def routed(
    answer: Advantages,
    confidence: Advantages,
    confidence_tokens: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples tokens"]:
    """The advantage of each token: `confidence` where the mask says so, `answer` elsewhere.

    DCPO's routing (Ma et al. 2026, arXiv:2603.09117): the tokens that state a confidence learn from
    the calibration reward, all others from correctness, each standardised or centred on its own
    (which of the two DCPO does was not checked). No reward for a confidence can then change the
    answer, and none for an answer the confidence, but through shared parameters.
    """
    if confidence_tokens.shape[:2] != answer.shape or answer.shape != confidence.shape:
        raise TrainingError(
            "routed: advantages and mask must be of the same samples; got shapes "
            f"{tuple(answer.shape)}, {tuple(confidence.shape)} and "
            f"{tuple(confidence_tokens.shape)}"
        )
    answer, confidence = (
        rearrange(advantage, "prompts samples -> prompts samples 1")
        for advantage in (answer, confidence)
    )
    return torch.where(confidence_tokens, confidence, answer)


def _mean(rewards: Rewards) -> Float[Tensor, "prompts 1"]:
    return reduce(rewards, "prompts samples -> prompts 1", "mean")


def _spread(rewards: Rewards) -> Float[Tensor, "prompts 1"]:
    """Largest minus smallest reward: exactly 0 for equal rewards, whose mean may be rounded, and
    for rewards that were rounded themselves, such as (1 - .8)^2 and .2^2."""
    largest, smallest = (reduce(rewards, "prompts samples -> prompts 1", f) for f in ("max", "min"))
    spread = largest - smallest
    size = torch.maximum(largest.abs(), smallest.abs()).clamp(min=1.0)
    return spread.where(spread > ROUNDING * size, 0.0)
