"""Advantages and losses against TRL's own trainers, on batches with padding.

The trainers are real ones on a tiny checkpoint. They sample and score a batch for the advantages;
for the losses they get random completions and random log-probabilities of the other policies.
"""

from __future__ import annotations

import importlib

import pytest
import torch
from checkpoint_factory import tiny_checkpoint, tiny_tokenizer
from einops import rearrange
from tiny_models import D_VOCAB

from mechinterp.advantages import centred, leave_one_out, standardised
from mechinterp.policy_gradient import (
    penalised_rewards,
    policy_loss,
    sample_log_probs,
    surrogate,
)

N_PROMPTS, N_SAMPLES, N_TOKENS, N_PROMPT_TOKENS = 3, 4, 6, 3
TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}
REWARDS = torch.tensor([[0.0, 0, 0, 1], [0.3, 0.3, 0.3, 0.3], [0.96, -0.36, 0.5, 0.1]])


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("trl") / "checkpoint"
    tiny_checkpoint(path)
    return path


def make_trainer(name, checkpoint, **options):
    """A trainer of TRL whose policy has moved away from its reference a little."""
    pytest.importorskip("trl", reason="TRL is not installed: nothing to compare with")
    from datasets import Dataset

    module = importlib.import_module(f"trl.trainer.{name.lower()}_trainer")
    config = importlib.import_module(f"trl.trainer.{name.lower()}_config")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token, tokenizer.eos_token = "word0", "word1"
    arguments = getattr(config, f"{name}Config")(
        output_dir=str(checkpoint.parent / name),
        per_device_train_batch_size=N_PROMPTS * N_SAMPLES,
        num_generations=N_SAMPLES,
        max_completion_length=N_TOKENS,
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        **options,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CI", "1")  # or it sends telemetry
        trainer = getattr(module, f"{name}Trainer")(
            model=str(checkpoint),
            reward_funcs=lambda prompts, **_: rearrange(REWARDS, "p s -> (p s)").tolist(),
            args=arguments,
            train_dataset=Dataset.from_list([{"prompt": f"word{2 + i} word9"} for i in range(6)]),
            processing_class=tokenizer,
        )
    trainer.current_gradient_accumulation_steps = 1
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    return trainer


@pytest.fixture(scope="module")
def grpo(checkpoint):
    return make_trainer("GRPO", checkpoint, beta=0.1)


@pytest.fixture(scope="module")
def rloo(checkpoint):
    return make_trainer("RLOO", checkpoint, beta=0.5)


def by_group(values):
    return rearrange(values, "(p s) ... -> p s ...", s=N_SAMPLES)


def sample_and_score(trainer):
    """What the trainer makes of fresh samples of its own policy, scored by REWARDS."""
    return trainer._generate_and_score_completions(next(iter(trainer.get_train_dataloader())))


def random_batch(seed):
    """Prompts padded on the left, completions on the right, and advantages."""
    generator = torch.Generator().manual_seed(seed)
    n = N_PROMPTS * N_SAMPLES
    prompt = torch.randint(2, D_VOCAB, (n, N_PROMPT_TOKENS), generator=generator)
    completion = torch.randint(2, D_VOCAB, (n, N_TOKENS), generator=generator)
    before = torch.randint(0, N_PROMPT_TOKENS, (n, 1), generator=generator)
    lengths = torch.randint(1, N_TOKENS + 1, (n, 1), generator=generator)
    rewards = torch.randn(N_PROMPTS, N_SAMPLES, generator=generator)
    return {
        "prompt_ids": prompt,
        "prompt_mask": (torch.arange(N_PROMPT_TOKENS) >= before).long(),
        "completion_ids": completion,
        "completion_mask": (torch.arange(N_TOKENS) < lengths).long(),
        "advantages": rearrange(standardised(rewards), "p s -> (p s)"),
        "num_items_in_batch": lengths.sum(),
    }


def token_log_probs(trainer, batch, model=None):
    """Of the completion under the policy or `model`, by a full forward pass of our own."""
    tokens = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1)
    logits = (model or trainer.model)(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    chosen = logits.log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    return chosen[:, -batch["completion_ids"].shape[1] :]


def nearby(log_probs, seed):
    generator = torch.Generator().manual_seed(seed)
    return log_probs.detach() + 0.3 * torch.randn(log_probs.shape, generator=generator)


def assert_same_loss(trainer, ours, theirs):
    torch.testing.assert_close(ours, theirs, **TOLERANCE)
    assert_same_gradients(trainer, ours, theirs)


def assert_same_gradients(trainer, ours, theirs):
    parameters = list(trainer.model.parameters())
    gradients = [torch.autograd.grad(loss, parameters) for loss in (ours, theirs)]
    assert any(gradient.abs().max() > 1e-3 for gradient in gradients[0])
    for mine, other in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, other, **TOLERANCE)


@pytest.mark.parametrize(
    ("scale_rewards", "advantages"),
    [("group", lambda r: standardised(r, correction=1, epsilon=1e-4)), ("none", centred)],
)
def test_advantages_are_those_of_grpo(grpo, scale_rewards, advantages):
    grpo.scale_rewards = scale_rewards
    theirs = by_group(sample_and_score(grpo)["advantages"])
    torch.testing.assert_close(advantages(REWARDS), theirs, **TOLERANCE)


@pytest.mark.parametrize(
    ("loss_type", "aggregation"),
    [
        ("grpo", {"by": "sample"}),
        ("bnpo", {"by": "token"}),
        ("dapo", {"by": "token"}),
        ("dr_grpo", {"by": "constant", "length": N_TOKENS}),
    ],
)
@pytest.mark.parametrize(("beta", "reweigh_kl"), [(0.0, True), (0.1, True), (0.1, False)])
@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize("seed", [0, 1])
def test_losses_are_those_of_grpo(grpo, loss_type, aggregation, beta, reweigh_kl, fresh, seed):
    grpo.loss_type, grpo.beta, grpo.epsilon_low, grpo.epsilon_high = loss_type, beta, 0.2, 0.28
    grpo.args.use_bias_correction_kl = reweigh_kl
    batch = random_batch(seed)
    log_probs = token_log_probs(grpo, batch)
    old, reference = nearby(log_probs, seed + 10), nearby(log_probs, seed + 20)
    batch["ref_per_token_logps"] = reference
    if not fresh:
        batch["old_per_token_logps"] = old
    ours = policy_loss(
        by_group(log_probs),
        by_group(batch["advantages"]),
        by_group(batch["completion_mask"]).bool(),
        old_log_probs=None if fresh else by_group(old),
        clip=(0.2, 0.28),
        reference_log_probs=by_group(reference),
        kl_weight=beta,
        reweigh_kl=reweigh_kl,
        **aggregation,
    )
    assert_same_loss(grpo, ours, grpo.compute_loss(grpo.model, batch))


def test_advantages_are_those_of_rloo_with_its_kl_in_the_reward(rloo):
    scored = sample_and_score(rloo)
    mask = by_group(scored["completion_mask"]).bool()
    new, start = (token_log_probs(rloo, scored, model) for model in (rloo.model, rloo.ref_model))
    rewards = penalised_rewards(REWARDS, by_group(new), by_group(start), mask, weight=0.5)
    assert (rewards - REWARDS).abs().max() > 0.01
    theirs = by_group(scored["advantages"])
    torch.testing.assert_close(leave_one_out(rewards), theirs, **TOLERANCE)


@pytest.mark.parametrize("fresh", [True, False])
def test_losses_are_those_of_rloo(rloo, fresh):
    batch = random_batch(3)
    log_probs = token_log_probs(rloo, batch)
    mask = by_group(batch["completion_mask"]).bool()
    old = by_group(log_probs.detach() if fresh else nearby(log_probs, 4))
    batch["old_logps"] = rearrange(sample_log_probs(old, mask), "p s -> (p s)")
    ours = surrogate(
        sample_log_probs(by_group(log_probs), mask),
        by_group(batch["advantages"]),
        old_log_probs=sample_log_probs(old, mask),
        clip=(0.2, 0.2),
    ).mean()
    theirs = rloo.compute_loss(rloo.model, batch)
    assert_same_loss(rloo, ours, theirs)


def test_tokens_give_the_gradient_of_rloo_on_fresh_samples(rloo):
    batch = random_batch(5)
    log_probs = token_log_probs(rloo, batch)
    mask, grouped = by_group(batch["completion_mask"]).bool(), by_group(log_probs)
    batch["old_logps"] = rearrange(sample_log_probs(grouped.detach(), mask), "p s -> (p s)")
    ours = policy_loss(grouped, by_group(batch["advantages"]), mask, by="constant")
    assert_same_gradients(rloo, ours, rloo.compute_loss(rloo.model, batch))
