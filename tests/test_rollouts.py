"""Sampled groups against full forward passes without a cache, and against exact probabilities."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_models import D_VOCAB, FAMILIES, random_tokens, tiny_model

from mechinterp.errors import ModelError, SpecError
from mechinterp.randomness import derive_generator
from mechinterp.rollouts import Rollouts, completion_log_probs, sample_completions

END, PAD = 7, 0
PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]).bool()


def flattened(name: str, **options: Any) -> Any:
    """A tiny model whose distributions are broad, so that samples differ and some end early."""
    model = tiny_model(name, **options)
    with torch.no_grad():
        unembedding(model).mul_(0.3)
    return model


def unembedding(model) -> torch.Tensor:
    return model.get_output_embeddings().weight


def sample(model, tokens, mask=None, *, seed=0, **options) -> Rollouts:
    options = {"n_samples": 6, "max_new_tokens": 5, "temperature": 1.3, **options}
    generator = derive_generator(seed, "rollouts")
    ends = {"end_token": END, "pad_token": PAD}
    return sample_completions(model, tokens, mask, **ends, **options, generator=generator)


def by_full_passes(model, prompt, completion, *, temperature=1.3):
    """Log-probabilities and entropies of one completion: no cache, no padding, token by token."""
    log_probs, entropies = [], []
    for t, token in enumerate(completion.tolist()):
        text = torch.cat([prompt, completion[:t]])[None]
        scores = (model(input_ids=text, use_cache=False).logits[0, -1] / temperature).log_softmax(0)
        log_probs.append(scores[token])
        entropies.append(-(scores.exp() * scores).sum())
    return torch.stack(log_probs), torch.stack(entropies)


# The sampler


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mask", [None, PADDED])
def test_cached_is_uncached(family, mask):
    model, tokens = flattened(family), random_tokens(4, 5)
    rollouts = sample(model, tokens, mask)
    recomputed = completion_log_probs(
        model, tokens, mask, rollouts.completions, temperature=1.3
    ).detach()
    assert rollouts.mask.sum() > 0
    for p, s in ((0, 0), (1, 3), (2, 5), (3, 1)):
        prompt = tokens[p] if mask is None else tokens[p][mask[p]]
        kept = rollouts.mask[p, s]
        with torch.no_grad():
            expected = by_full_passes(model, prompt, rollouts.completions[p, s][kept])
        torch.testing.assert_close(rollouts.log_probs[p, s][kept], expected[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(rollouts.entropy[p, s][kept], expected[1], atol=1e-4, rtol=0)
        torch.testing.assert_close(recomputed[p, s][kept], expected[0], atol=1e-5, rtol=0)


@settings(max_examples=25, deadline=None)
@given(
    n_samples=st.integers(1, 4),
    max_new_tokens=st.integers(1, 6),
    n_padding=st.lists(st.integers(0, 3), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_trainer_and_sampler_agree(n_samples, max_new_tokens, n_padding, seed):
    model, tokens = flattened("llama"), random_tokens(len(n_padding), 4, seed=seed)
    mask = torch.arange(4) >= torch.tensor(n_padding)[:, None]
    shape = {"n_samples": n_samples, "max_new_tokens": max_new_tokens}
    rollouts = sample(model, tokens, mask, seed=seed, **shape)
    recomputed = completion_log_probs(model, tokens, mask, rollouts.completions, temperature=1.3)
    difference = (recomputed.detach() - rollouts.log_probs)[rollouts.mask]
    assert difference.abs().max() < 1e-4


def test_masks_end_with_the_end_token():
    rollouts = sample(flattened("llama"), random_tokens(30, 3), n_samples=8, max_new_tokens=9)
    lengths = set()
    for completion, kept, log_probs in zip(
        rollouts.completions.flatten(0, 1),
        rollouts.mask.flatten(0, 1),
        rollouts.log_probs.flatten(0, 1),
        strict=True,
    ):
        n = int(kept.sum())
        lengths.add(n)
        assert kept.tolist() == [True] * n + [False] * (len(kept) - n)
        assert END not in completion[: n - 1]
        assert completion[n - 1] == END or n == 9
        assert (completion[n:] == PAD).all()
        assert (log_probs[n:] == 0).all()
        assert (log_probs[:n] < 0).all()
    assert len(lengths) > 3
    assert rollouts.mask[..., -1].any()


def test_sampling_stops_when_all_have_ended():
    model = flattened("llama")
    with torch.no_grad():  # END is all but certain, whatever came before
        unembedding(model).zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(D_VOCAB))
    model.lm_head.bias.data[END] = 30.0
    calls = []
    model.register_forward_hook(lambda *_: calls.append(1))
    rollouts = sample(model, random_tokens(3, 4), max_new_tokens=9)
    assert rollouts.completions.shape == (3, 6, 1)
    assert len(calls) == 1


def test_a_prompt_is_run_once():
    model, shapes = flattened("llama"), []
    embedding = model.get_input_embeddings()
    embedding.register_forward_hook(lambda _, args, __: shapes.append(tuple(args[0].shape)))
    rollouts = sample(model, random_tokens(3, 4), max_new_tokens=3)
    assert shapes[:2] == [(3, 4), (18, 1)]
    shapes.clear()
    completion_log_probs(model, random_tokens(3, 4), None, rollouts.completions)
    assert shapes == [(3, 4), (18, rollouts.completions.shape[2] - 1)]


def test_the_generator_decides_and_nothing_else_does():
    model, tokens = flattened("llama"), random_tokens(3, 4)
    first = sample(model, tokens)
    state = torch.get_rng_state()
    torch.rand(3)
    again = sample(model, tokens)
    assert torch.equal(first.completions, again.completions)
    assert torch.equal(first.log_probs, again.log_probs)
    assert not torch.equal(sample(model, tokens, seed=1).completions, first.completions)
    torch.set_rng_state(state)
    sample(model, tokens)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_samples_have_the_exact_probabilities(temperature):
    """Pairs of tokens by chi-square, against all first tokens times all second ones."""
    model = flattened("gpt2")
    with torch.no_grad():  # leaves six likely tokens
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
        model.lm_head.bias = torch.nn.Parameter(torch.full((D_VOCAB,), -1e4))
        model.lm_head.bias.data[10:16] = 0.0
    prompt, n = random_tokens(1, 4), 20_000
    rollouts = sample(model, prompt, n_samples=n, max_new_tokens=2, temperature=temperature)
    with torch.no_grad():
        first = (model(prompt).logits[0, -1] / temperature).softmax(0)[10:16]
        pairs = torch.stack(
            [
                p * (model(torch.tensor([[*prompt[0], a]])).logits[0, -1] / temperature).softmax(0)
                for p, a in zip(first, range(10, 16), strict=True)
            ]
        )[:, 10:16]
    codes = (rollouts.completions[0] - 10) @ torch.tensor([6, 1])
    observed = codes.bincount(minlength=36)
    expected = pairs.flatten().double()
    assert stats.chisquare(observed, n * expected / expected.sum()).pvalue > 1e-3
    wrong = (pairs.flatten() ** 1.1).double()  # a temperature that is a tenth off shows
    assert stats.chisquare(observed, n * wrong / wrong.sum()).pvalue < 1e-6


# The trainer's log-probabilities


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3"])
def test_gradients_flow_through_the_shared_prompts(family):
    """Against one pass over prompt and completion side by side, every prompt repeated."""
    model, tokens = flattened(family), random_tokens(4, 5)
    rollouts = sample(model, tokens, PADDED)
    weight = torch.randn(rollouts.mask.shape, generator=derive_generator(0, "weights"))
    weight = weight.masked_fill(~rollouts.mask, 0.0)
    ours = (completion_log_probs(model, tokens, PADDED, rollouts.completions) * weight).sum()
    texts = torch.cat([tokens.repeat_interleave(6, 0), rollouts.completions.flatten(0, 1)], 1)
    mask = torch.cat([PADDED.repeat_interleave(6, 0), rollouts.mask.flatten(0, 1)], 1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    scores = model(texts, attention_mask=mask, position_ids=positions, use_cache=False).logits
    plain = scores[:, :-1].log_softmax(-1).gather(-1, texts[:, 1:, None])[..., 0]
    plain = plain[:, 4:].unflatten(0, (4, 6))
    theirs = (plain * weight).sum()
    parameters = list(model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    assert any(gradient.abs().max() > 1e-2 for gradient in gradients[0])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, atol=2e-4, rtol=1e-3)


# Input


def test_bad_input_is_named():
    model, tokens = flattened("llama"), random_tokens(2, 3)
    with pytest.raises(ModelError, match="padded on the left"):
        sample(model, tokens, torch.tensor([[1, 1, 0], [1, 1, 1]]).bool())
    for bad in ("temperature", "n_samples", "max_new_tokens"):
        options: dict[str, Any] = {bad: 0}
        with pytest.raises(SpecError, match="must be positive"):
            sample(model, tokens, **options)
