"""Groups of sampled completions, and their log-probabilities as a trainer recomputes them.

Every prompt is run once and its keys and values repeated for its samples: without gradients when
sampling, with them when training. There is no top-k and no top-p, so the log-probabilities are
those of the distribution that was sampled from.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mechinterp.errors import SpecError
from mechinterp.generation import Prompts, decode, draw
from mechinterp.tasks.written import Problems, WrittenTask

Tokens = Int[Tensor, "prompts samples tokens"]
OfTokens = Float[Tensor, "prompts samples tokens"]


@dataclass(frozen=True)
class Rollouts:
    """Completions padded on the right; the longest has no padding.

    `mask` is true up to and with the end token. `log_probs` of the sampled tokens, and `entropy` of
    the distributions that they were drawn from, are in nats at the sampling's temperature, and 0 on
    padding.
    """

    completions: Tokens
    mask: Bool[Tensor, "prompts samples tokens"]
    log_probs: OfTokens
    entropy: OfTokens


def sample_completions(
    model: PreTrainedModel,
    tokens: Int[Tensor, "prompts positions"],
    mask: Bool[Tensor, "prompts positions"] | None = None,
    *,
    n_samples: int,
    max_new_tokens: int,
    end_token: int,
    pad_token: int,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> Rollouts:
    """`n_samples` completions of every prompt, each up to `end_token` or `max_new_tokens` tokens.

    `mask` is false on the padding of prompts, which stands on their left. A function of the
    generator's state alone, whatever is sampled elsewhere.

    Raises:
        SpecError: a temperature, or a number of samples or tokens, that is not positive.
        ModelError: prompts padded on the right.
    """
    if not (temperature > 0 and n_samples >= 1 and max_new_tokens >= 1):
        raise SpecError(
            "sample_completions: temperature, n_samples and max_new_tokens must be positive; got "
            f"{temperature}, {n_samples} and {max_new_tokens}"
        )
    log_probs: list[Float[Tensor, " rows"]] = []
    entropy: list[Float[Tensor, " rows"]] = []

    def choose(logits: Float[Tensor, "rows vocab"]) -> Int[Tensor, " rows"]:
        all_log_probs = (logits.float() / temperature).log_softmax(-1)
        probabilities = all_log_probs.exp()
        picked = draw(probabilities, generator)
        log_probs.append(all_log_probs.gather(1, picked[:, None])[:, 0])
        entropy.append(torch.special.entr(probabilities).sum(1))
        return picked

    new = decode(
        model,
        tokens,
        mask,
        choose,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens,
        end_token=end_token,
    )
    is_end = (new == end_token).long()
    mask = _grouped((is_end.cumsum(1) - is_end) == 0, n_samples)  # no end token before
    return Rollouts(
        completions=_grouped(new, n_samples).masked_fill(~mask, pad_token),
        mask=mask,
        log_probs=_grouped(torch.stack(log_probs, 1), n_samples).masked_fill(~mask, 0.0),
        entropy=_grouped(torch.stack(entropy, 1), n_samples).masked_fill(~mask, 0.0),
    )


def sample_answers(
    model: PreTrainedModel,
    task: WrittenTask,
    problems: Problems,
    *,
    n_samples: int = 1,
    max_new_tokens: int | None = None,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> Rollouts:
    """Completions of the problems' prompts, with the task's own end and padding, no longer than
    `max_new_tokens` or, without it, than its longest right completion. See `sample_completions`."""
    return sample_completions(
        model,
        problems.tokens,
        problems.mask,
        n_samples=n_samples,
        max_new_tokens=max_new_tokens or task.max_new_tokens,
        end_token=task.end_token,
        pad_token=task.pad_token,
        temperature=temperature,
        generator=generator,
    )


def completion_log_probs(
    model: PreTrainedModel,
    tokens: Int[Tensor, "prompts positions"],
    mask: Bool[Tensor, "prompts positions"] | None,
    completions: Tokens,
    *,
    temperature: float = 1.0,
) -> OfTokens:
    """Log-probability, in nats, of each token of given completions, with gradients where enabled.

    One pass over the prompts and one over all completions' tokens but the last; the prompts are not
    unembedded. On padding the numbers mean nothing.
    """
    n_samples = completions.shape[1]
    prompts = Prompts(model, tokens, mask, n_samples=n_samples)
    new = rearrange(completions, "prompts samples tokens -> (prompts samples) tokens")
    parts = [prompts.logits[:, None]]
    if new.shape[1] > 1:
        parts.append(prompts.go_on(new[:, :-1]))
    logits = torch.cat(parts, dim=1).float() / temperature
    # A log-softmax would be one more tensor of this size to keep for the gradient.
    log_probs = logits.gather(-1, new[..., None])[..., 0] - logits.logsumexp(-1)
    return _grouped(log_probs, n_samples)


def _grouped(rows: Tensor, n_samples: int) -> Tensor:
    return rearrange(rows, "(prompts samples) tokens -> prompts samples tokens", samples=n_samples)
