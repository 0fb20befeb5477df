"""Losses of sampled tokens: from log-probabilities and advantages to one number to descend.

Three policies see the same tokens: the one that learns (`log_probs`, with gradients), the one that
sampled (`old_log_probs`; left out where the two are the same) and the one to stay close to
(`reference_log_probs`, the start). All are in nats at the temperature of the sampling, for
completion tokens alone, padded to [prompts samples tokens]; `mask` is true on what was sampled, the
end token included. What stands elsewhere, NaN and -inf included, changes neither loss nor gradient.

    advantages = standardised(rewards)                            # mechinterp.advantages
    loss = policy_loss(log_probs, advantages, mask,
                       old_log_probs=old, clip=(0.2, 0.2),
                       reference_log_probs=start, kl_weight=0.04)  # GRPO
    loss = policy_loss(log_probs, centred(rewards), mask, by="constant", length=64)  # Dr. GRPO
    loss = policy_loss(log_probs, leave_one_out(rewards), mask, by="constant")       # RLOO

A batch may be split by prompts: the loss is the mean of its parts' losses, weighted by their
samples or, for by="token", by their tokens.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import SpecError, TrainingError

Tokens = Float[Tensor, "prompts samples tokens"]
Mask = Bool[Tensor, "prompts samples tokens"]
Aggregation = Literal["sample", "token", "constant"]
Estimator = Literal["k1", "k2", "k3"]


def policy_loss(
    log_probs: Tokens,
    advantages: Float[Tensor, "prompts samples"] | Tokens,
    mask: Mask,
    *,
    old_log_probs: Tokens | None = None,
    clip: tuple[float, float] | None = None,
    reference_log_probs: Tokens | None = None,
    kl_weight: float = 0.0,
    reweigh_kl: bool = True,
    by: Aggregation = "sample",
    length: float = 1.0,
) -> Float[Tensor, ""]:
    """The surrogate of every token plus kl_weight times its `kl`, aggregated.

    GRPO (Shao et al. 2024, arXiv:2402.03300), r_it the ratio of new to old probability:

        -1/G sum_i 1/|o_i| sum_t [min(r_it A_it, clip(r_it, 1 - low, 1 + high) A_it) - beta k3_it]

    averaged over prompts, is by="sample" and reweigh_kl=False. With `reweigh_kl` the KL of a token
    is r_it k3_it, whose gradient is that of KL(policy || reference), which the GRPO paper's is not
    (see `kl`; DeepSeek-V3.2, arXiv:2512.02556, and TRL do the same). `by` and `length` are those
    of `aggregate`. Where old_log_probs is left out the value has no meaning, and the gradient is
    that of REINFORCE, -A_it grad log p_it.

    Raises:
        SpecError: settings out of range, or a KL weight without reference log-probabilities.
        TrainingError: tensors of different shapes, or a number that is not finite on a sampled
            token.
    """
    if kl_weight < 0 or (kl_weight > 0 and reference_log_probs is None):
        raise SpecError(
            "policy_loss: kl_weight must not be negative, and needs reference_log_probs; "
            f"got {kl_weight}"
        )
    if advantages.ndim == log_probs.ndim - 1:
        advantages = rearrange(advantages, "prompts samples -> prompts samples 1")
    log_probs = _sampled(log_probs, mask, "log_probs")
    if old_log_probs is not None:
        old_log_probs = _sampled(old_log_probs, mask, "old_log_probs")
    losses = surrogate(log_probs, advantages, old_log_probs=old_log_probs, clip=clip)
    if reference_log_probs is not None and kl_weight > 0:
        reference_log_probs = _sampled(reference_log_probs, mask, "reference_log_probs")
        away = kl(log_probs, reference_log_probs)
        if reweigh_kl:
            away = _ratio(log_probs, old_log_probs) * away
        losses = losses + kl_weight * away
    return aggregate(losses, mask, by=by, length=length)


def surrogate(
    log_probs: Float[Tensor, "*shape"],
    advantages: Float[Tensor, "*#shape"],
    *,
    old_log_probs: Float[Tensor, "*shape"] | None = None,
    clip: tuple[float, float] | None = None,
) -> Float[Tensor, "*shape"]:
    """-min(r A, clip(r, 1 - low, 1 + high) A) with r = exp(log p - log p_old), clip = (low, high).

    PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347); without `clip` it is -r A.
    Of tokens, or of whole samples given their `sample_log_probs`, as RLOO has it. Without
    `old_log_probs` r is 1 and its gradient that of log p: one step on fresh samples.
    """
    if clip is not None and not (0 <= clip[0] <= 1 and clip[1] >= 0):
        raise SpecError(f"clip: expected (low in [0, 1], high not negative), got {clip}")
    ratio = _ratio(log_probs, old_log_probs)
    if clip is None:
        return -ratio * advantages
    clipped = ratio.clamp(1 - clip[0], 1 + clip[1])
    return -torch.minimum(ratio * advantages, clipped * advantages)


def kl(
    log_probs: Float[Tensor, "*shape"],
    reference_log_probs: Float[Tensor, "*shape"],
    *,
    estimator: Estimator = "k3",
) -> Float[Tensor, "*shape"]:
    """One-sample estimates of KL(policy || reference), of tokens drawn from the policy, in nats.

        k1 = log p - log p_ref    k2 = (log p - log p_ref)^2 / 2    k3 = p_ref / p - 1 + k1

    (Schulman 2020, "Approximating KL divergence"; GRPO has k3.) As values k1 and k3 are unbiased,
    and k3 is never negative. As *losses* they pull elsewhere: over samples of the policy the
    gradient of k3 is that of KL(reference || policy), the gradient of k2 that of
    KL(policy || reference), and the gradient of k1 is 0: it belongs in the reward
    (`penalised_rewards`). Times the ratio of `surrogate`, k1 and k3 have the gradient of
    KL(policy || reference).
    """
    if estimator not in get_args(Estimator):
        raise SpecError(f"kl: estimator must be one of k1, k2, k3; got {estimator!r}")
    log_ratio = log_probs - reference_log_probs
    if estimator == "k1":
        return log_ratio
    if estimator == "k2":
        return log_ratio**2 / 2
    # expm1 keeps the digits that cancel where the two policies are still alike.
    return torch.expm1(-log_ratio) + log_ratio


def penalised_rewards(
    rewards: Float[Tensor, "prompts samples"],
    log_probs: Tokens,
    reference_log_probs: Tokens,
    mask: Mask,
    *,
    weight: float,
) -> Float[Tensor, "prompts samples"]:
    """R_i - weight * sum_t (log p_it - log p_ref,it): the KL to the start as part of the reward.

    RLOO's way (Ahmadian et al. 2024, arXiv:2402.14740), `log_probs` of the policy that sampled.
    """
    log_probs = _sampled(log_probs, mask, "log_probs").detach()
    reference_log_probs = _sampled(reference_log_probs, mask, "reference_log_probs")
    log_ratio = kl(log_probs, reference_log_probs, estimator="k1")
    return rewards - weight * reduce(log_ratio, "prompts samples tokens -> prompts samples", "sum")


def sample_log_probs(log_probs: Tokens, mask: Mask) -> Float[Tensor, "prompts samples"]:
    """sum_t log p_it over the sampled tokens, in nats."""
    sampled = _sampled(log_probs, mask, "log_probs")
    return reduce(sampled, "prompts samples tokens -> prompts samples", "sum")


def aggregate(
    losses: Tokens, mask: Mask, *, by: Aggregation = "sample", length: float = 1.0
) -> Float[Tensor, ""]:
    """Losses of sampled tokens to one number.

    sample    mean over each sample's tokens, then over samples: GRPO. Tokens of long samples count
              less, so a long failure is punished less per token than a short one.
    token     mean over all tokens: DAPO (Yu et al. 2025, arXiv:2503.14476). Long samples count more
    constant  sum over each sample's tokens over `length`, then mean over samples: Dr. GRPO, with
              the most tokens that a sample may have; REINFORCE and RLOO with 1

    Samples without tokens count as 0 by "sample" and "constant".
    """
    if by not in get_args(Aggregation) or not length > 0:
        raise SpecError(
            f"aggregate: by must be one of {', '.join(get_args(Aggregation))} and length positive; "
            f"got {by!r} and {length}"
        )
    losses = _sampled(losses, mask, "losses")
    if by == "token":
        return losses.sum() / mask.sum().clamp(min=1)
    per_sample = reduce(losses, "prompts samples tokens -> prompts samples", "sum")
    n_tokens = reduce(mask.to(losses), "prompts samples tokens -> prompts samples", "sum")
    return (per_sample / (n_tokens.clamp(min=1) if by == "sample" else length)).mean()


def _ratio(
    log_probs: Float[Tensor, "*shape"], old_log_probs: Float[Tensor, "*shape"] | None
) -> Float[Tensor, "*shape"]:
    """New to old probability: 1 with the gradient of log p where the policies are one."""
    old = log_probs if old_log_probs is None else old_log_probs
    return (log_probs - old.detach()).exp()


def _sampled(values: Tokens, mask: Mask, name: str) -> Tokens:
    """`values` with zeros on padding, before anything is computed from them: the gradient of
    exp(-inf) would be NaN even where a mask discards it afterwards."""
    if values.shape != mask.shape or mask.dtype != torch.bool:
        raise TrainingError(
            f"{name}: expected the shape of a boolean mask {tuple(mask.shape)}, got "
            f"{tuple(values.shape)} and a mask of {mask.dtype}"
        )
    values = values.masked_fill(~mask, 0.0)
    if not values.isfinite().all():
        where = (~values.isfinite()).nonzero()[0].tolist()
        raise TrainingError(f"{name}: not finite at {where} (prompt, sample, token)")
    return values
