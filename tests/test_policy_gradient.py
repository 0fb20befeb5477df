"""Advantages and losses against loops written out, closed forms and exact means over all groups."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from mechinterp.advantages import (
    centred,
    degenerate,
    leave_one_out,
    reinforce,
    routed,
    standardised,
)
from mechinterp.errors import SpecError, TrainingError
from mechinterp.policy_gradient import (
    aggregate,
    kl,
    penalised_rewards,
    policy_loss,
    sample_log_probs,
    surrogate,
)
from mechinterp.rewards import brier

GROUP_RELATIVE = [centred, leave_one_out, standardised]
SETTINGS = [
    {},
    {"by": "token"},
    {"by": "constant", "length": 7.0},
    {"clip": (0.2, 0.3)},
    {"clip": (0.1, 0.1), "kl_weight": 0.1, "by": "token"},
    {"kl_weight": 0.1, "by": "constant", "reweigh_kl": False},
]

# Rewards on a grid, so that sums are exact and equal means equal.
groups = arrays(
    "float64",
    array_shapes(min_dims=2, max_dims=2, min_side=2, max_side=6),
    elements=st.integers(-64, 64).map(lambda n: n / 16),
).map(torch.as_tensor)
few = settings(max_examples=40, deadline=None)


# Advantages.


@pytest.mark.parametrize("n_samples", [2, 8, 32])
def test_a_lone_success(n_samples):
    rewards = torch.zeros(1, n_samples, dtype=torch.float64)
    rewards[0, 1] = 1.0
    root = math.sqrt(n_samples - 1)
    expected = torch.full_like(rewards, -1 / root)
    expected[0, 1] = root
    torch.testing.assert_close(standardised(rewards), expected)
    sample = expected * math.sqrt((n_samples - 1) / n_samples)  # 2.47 at 8, 5.48 at 32
    torch.testing.assert_close(standardised(rewards, correction=1), sample)
    assert float(centred(rewards)[0, 1]) == pytest.approx((n_samples - 1) / n_samples)
    assert float(leave_one_out(rewards)[0, 1]) == pytest.approx(1.0)


def all_groups(p, n_samples):
    """Every pattern of right and wrong, and its probability."""
    outcomes = torch.tensor(list(itertools.product([0.0, 1.0], repeat=n_samples))).double()
    return outcomes, (p**outcomes * (1 - p) ** (1 - outcomes)).prod(1)


@pytest.mark.parametrize(("p", "amplified"), [(0.01, 2.98), (0.1, None), (0.5, 2.12)])
def test_share_of_groups_that_teach(p, amplified):
    n_samples = 8
    outcomes, chance = all_groups(p, n_samples)
    share = chance @ (~degenerate(outcomes)).double()
    assert float(share) == pytest.approx(1 - p**n_samples - (1 - p) ** n_samples)
    if amplified is not None:  # what the division by the standard deviation adds, at 8 samples
        size = [chance @ f(outcomes).abs().mean(1) for f in (standardised, centred)]
        assert float(size[0] / size[1]) == pytest.approx(amplified, abs=0.005)


@pytest.mark.parametrize("advantages", GROUP_RELATIVE)
@few
@given(rewards=groups)
def test_advantages_sum_to_zero_in_a_group(advantages, rewards):
    total = advantages(rewards).sum(1)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)


@pytest.mark.parametrize("advantages", GROUP_RELATIVE)
@few
@given(rewards=groups, data=st.data())
def test_a_constant_added_to_a_group_changes_nothing(advantages, rewards, data):
    shifts = data.draw(arrays("float64", (len(rewards), 1), elements=st.integers(-9, 9)))
    torch.testing.assert_close(advantages(rewards + torch.as_tensor(shifts)), advantages(rewards))


@few
@given(rewards=groups, data=st.data())
def test_scale_is_irrelevant_after_the_division(rewards, data):
    scale = torch.as_tensor(
        data.draw(arrays("float64", (len(rewards), 1), elements=st.floats(0.01, 100)))
    )
    torch.testing.assert_close(standardised(rewards * scale), standardised(rewards))
    torch.testing.assert_close(centred(rewards * scale), centred(rewards) * scale)


@pytest.mark.parametrize("advantages", [*GROUP_RELATIVE, reinforce])
@few
@given(rewards=groups, data=st.data())
def test_order_does_not_matter(advantages, rewards, data):
    order = data.draw(st.permutations(range(rewards.shape[1])))
    torch.testing.assert_close(advantages(rewards[:, order]), advantages(rewards)[:, order])
    prompts = data.draw(st.permutations(range(rewards.shape[0])))
    torch.testing.assert_close(advantages(rewards[prompts]), advantages(rewards)[prompts])


@few
@given(rewards=groups)
def test_advantages_by_hand(rewards):
    for i, group in enumerate(rewards.tolist()):
        n = len(group)
        mean = sum(group) / n
        std = math.sqrt(sum((r - mean) ** 2 for r in group) / n)
        for j, reward in enumerate(group):
            others = (sum(group) - reward) / (n - 1)
            assert float(centred(rewards)[i, j]) == pytest.approx(reward - mean)
            assert float(leave_one_out(rewards)[i, j]) == pytest.approx(reward - others)
            assert float(standardised(rewards)[i, j]) == pytest.approx(
                (reward - mean) / std if std else 0.0
            )
            assert float(reinforce(rewards, baseline=0.25)[i, j]) == reward - 0.25


@few
@given(value=st.floats(-1, 1, width=32), n_samples=st.integers(2, 40))
def test_a_degenerate_group_teaches_exactly_nothing(value, n_samples):
    """The mean of equal numbers may be rounded, and a difference of 1e-8 is divided by 1e-8."""
    rewards = torch.full((1, n_samples), value)
    assert degenerate(rewards).all()
    for advantages in GROUP_RELATIVE:
        assert not advantages(rewards).any()
        log_probs = torch.full((1, n_samples, 3), -1.0, requires_grad=True)
        loss = policy_loss(
            log_probs, advantages(rewards), torch.ones_like(log_probs, dtype=torch.bool)
        )
        loss.backward()
        assert not log_probs.grad.any()


@pytest.mark.parametrize("said", [0.6, 0.8, 0.9])
def test_rewards_that_rounding_alone_tells_apart_teach_nothing(said):
    """As much for a right answer with one confidence as for a wrong one with its complement."""
    right = torch.tensor([[1.0, 1.0, 0.0, 0.0]])
    scores = brier(right, torch.tensor([[said, said, 1 - said, 1 - said]]))
    for rewards in (scores, 1000 * scores):
        assert degenerate(rewards).all()
        for advantages in GROUP_RELATIVE:
            assert not advantages(rewards).any()
    assert not degenerate(scores + torch.tensor([[0.0, 1e-5, 0.0, 0.0]])).any()


def test_routed_advantages_go_where_the_mask_says():
    answer, confidence = torch.tensor([[1.0, -1.0]]), torch.tensor([[0.5, 0.25]])
    tokens = torch.tensor([[[False, False, True], [False, True, True]]])
    expected = torch.tensor([[[1.0, 1.0, 0.5], [-1.0, 0.25, 0.25]]])
    assert torch.equal(routed(answer, confidence, tokens), expected)
    with pytest.raises(TrainingError, match="must be of the same samples"):
        routed(answer, confidence[:, :1], tokens)


# Gradients: exact means over all groups that a small policy can sample.


@pytest.mark.parametrize(
    ("advantages", "factor"), [(reinforce, 1.0), (leave_one_out, 1.0), (centred, 2 / 3)]
)
def test_the_expected_gradient_is_that_of_the_expected_reward(advantages, factor):
    """Dr. GRPO's is (G - 1) / G of it, with G = 3 here."""
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    worth = torch.tensor([1.0, 0.2, -0.4], dtype=torch.float64)
    actions = torch.tensor(list(itertools.product(range(3), repeat=3)))
    log_probs = logits.log_softmax(0)[actions]
    chance = log_probs.detach().sum(1).exp()
    mask = torch.ones(1, 3, 1, dtype=torch.bool)
    loss = sum(
        chance[i]
        * policy_loss(log_probs[i, None, :, None], advantages(worth[actions[i]][None]), mask)
        for i in range(len(actions))
    )
    (gradient,) = torch.autograd.grad(loss, logits)
    (of_reward,) = torch.autograd.grad((logits.softmax(0) * worth).sum(), logits)
    torch.testing.assert_close(gradient, -factor * of_reward)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_values_and_gradients_of_the_kl_estimators(estimator):
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    p = log_p.exp().detach()
    mean = (p * kl(log_p, reference, estimator=estimator)).sum()
    to_reference = (log_p.exp() * (log_p - reference)).sum()
    from_reference = (reference.exp() * (reference - log_p)).sum()
    if estimator != "k2":
        torch.testing.assert_close(mean, to_reference)
    assert estimator == "k1" or (kl(log_p, reference, estimator=estimator) >= 0).all()
    pulls = {"k1": 0 * to_reference, "k2": to_reference, "k3": from_reference}
    (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (expected,) = torch.autograd.grad(pulls[estimator], logits, retain_graph=True)
    torch.testing.assert_close(gradient, expected)


def test_a_reweighed_kl_pulls_towards_the_reference():
    logits = torch.tensor([0.3, -0.5, 1.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.2, 0.4, 0.1], dtype=torch.float64).log_softmax(0)
    log_p = logits.log_softmax(0)
    mask = torch.ones(1, 1, 1, dtype=torch.bool)
    losses = [
        policy_loss(
            log_p[a, None, None, None],
            torch.zeros(1, 1),
            mask,
            reference_log_probs=reference[a, None, None, None],
            kl_weight=2.0,
        )
        for a in range(3)
    ]
    mean = (log_p.exp().detach() * torch.stack(losses)).sum()
    (gradient,) = torch.autograd.grad(mean, logits, retain_graph=True)
    (of_kl,) = torch.autograd.grad((log_p.exp() * (log_p - reference)).sum(), logits)
    torch.testing.assert_close(gradient, 2 * of_kl)


# Losses.


def batch(seed=0, n_prompts=3, n_samples=4, n_tokens=5, dtype=torch.float64):
    """Random log-probabilities under three policies, advantages, and padding on the right."""
    generator = torch.Generator().manual_seed(seed)
    shape = n_prompts, n_samples, n_tokens
    start = -torch.rand(shape, generator=generator, dtype=dtype) * 3
    old, new = (
        start + 0.3 * torch.randn(shape, generator=generator, dtype=dtype) for _ in range(2)
    )
    rewards = torch.randn(shape[:2], generator=generator, dtype=dtype)
    lengths = torch.randint(1, n_tokens + 1, shape[:2], generator=generator)
    mask = torch.arange(n_tokens) < lengths[..., None]
    return new.requires_grad_(), standardised(rewards), mask, old, start


def written_out(
    new,
    advantages,
    mask,
    old,
    start,
    *,
    clip=None,
    kl_weight=0.0,
    reweigh_kl=True,
    by="sample",
    length=1,
):
    """The loss as loops over prompts, samples and tokens."""
    samples, every = [], []
    for i, j in itertools.product(range(new.shape[0]), range(new.shape[1])):
        terms = []
        for t in range(int(mask[i, j].sum())):
            ratio = math.exp(new[i, j, t] - old[i, j, t])
            advantage = float(advantages[i, j])
            value = ratio * advantage
            if clip is not None:
                value = min(value, min(max(ratio, 1 - clip[0]), 1 + clip[1]) * advantage)
            away = float(start[i, j, t] - new[i, j, t])
            k3 = (math.exp(away) - away - 1) * (ratio if reweigh_kl else 1)
            terms.append(-value + kl_weight * k3)
        every += terms
        samples.append(sum(terms) / (len(terms) if by == "sample" else length))
    return sum(every) / len(every) if by == "token" else sum(samples) / len(samples)


@pytest.mark.parametrize("options", SETTINGS)
def test_losses_are_the_sums_written_out(options):
    new, advantages, mask, old, start = batch()
    loss = policy_loss(
        new, advantages, mask, old_log_probs=old, reference_log_probs=start, **options
    )
    assert float(loss.detach()) == pytest.approx(
        written_out(new.detach(), advantages, mask, old, start, **options)
    )


@pytest.mark.parametrize("options", SETTINGS)
def test_gradients_are_those_of_finite_differences(options):
    new, advantages, mask, old, start = batch(n_prompts=2, n_samples=2, n_tokens=3)
    assert torch.autograd.gradcheck(
        lambda x: policy_loss(
            x, advantages, mask, old_log_probs=old, reference_log_probs=start, **options
        ),
        new,
    )


def test_fresh_samples_give_the_gradient_of_reinforce():
    new, advantages, mask, *_ = batch()
    loss = policy_loss(new, advantages, mask, clip=(0.2, 0.2), by="constant")
    plain = -(sample_log_probs(new, mask) * advantages).mean()
    for ours, theirs in zip(*(torch.autograd.grad(f, new) for f in (loss, plain)), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_clipped_tokens_have_no_gradient():
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 1.1], dtype=torch.float64)
    log_probs = ratio.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0])
    losses = surrogate(log_probs, advantages, old_log_probs=torch.zeros(5), clip=(0.2, 0.2))
    (gradient,) = torch.autograd.grad(losses.sum(), log_probs)
    torch.testing.assert_close(gradient, torch.tensor([0, 1.5, -0.5, 0, -1.1]).double())


@few
@given(
    seed=st.integers(0, 1000),
    n_more=st.integers(0, 4),
    rubbish=st.sampled_from([0.0, 100.0, -math.inf, math.inf, math.nan]),
    options=st.sampled_from(SETTINGS),
)
def test_padding_changes_nothing(seed, n_more, rubbish, options):
    new, advantages, mask, old, start = batch(seed)
    pad = lambda x, value: torch.nn.functional.pad(x, (0, n_more), value=value)  # noqa: E731
    wider = pad(mask, False)
    results = []
    for m, tensors in ((mask, (new, old, start)), (wider, [pad(x, 0) for x in (new, old, start)])):
        spoilt = [x.detach().masked_fill(~m, rubbish) for x in tensors]
        x, old_x, start_x = spoilt if m is wider else tensors
        x = x.detach().requires_grad_()
        loss = policy_loss(
            x, advantages, m, old_log_probs=old_x, reference_log_probs=start_x, **options
        )
        (gradient,) = torch.autograd.grad(loss, x)
        results.append((loss.detach(), gradient))
    (loss, gradient), (padded_loss, padded_gradient) = results
    torch.testing.assert_close(padded_loss, loss)
    torch.testing.assert_close(padded_gradient, pad(gradient, 0))
    assert not padded_gradient[~wider].any()


def test_padding_before_and_between_tokens_is_as_good_as_after_them():
    new, advantages, mask, old, start = batch()
    order = torch.tensor([3, 0, 4, 2, 1])
    losses = [
        policy_loss(
            n, advantages, m, old_log_probs=o, reference_log_probs=s, kl_weight=0.1, clip=(0.2, 0.2)
        )
        for n, m, o, s in (
            (new, mask, old, start),
            tuple(x[..., order] for x in (new, mask, old, start)),
        )
    ]
    torch.testing.assert_close(*losses)


def test_samples_without_tokens_count_as_nothing():
    new, advantages, mask, *_ = batch()
    mask[0, 1] = False
    for by in ("sample", "constant"):
        per_sample = [
            policy_loss(new[:1, [j]], advantages[:1, [j]], mask[:1, [j]], by=by) for j in (0, 2, 3)
        ]
        loss = policy_loss(new[:1], advantages[:1], mask[:1], by=by)
        torch.testing.assert_close(loss, sum(per_sample) / 4)
    assert float(aggregate(new.detach(), torch.zeros_like(mask), by="token")) == 0.0


def test_a_batch_in_parts_is_the_weighted_mean_of_its_parts():
    new, advantages, mask, *_ = batch()
    for by in ("sample", "token", "constant"):
        losses, weights = [], []
        for part in ([0], [1, 2]):
            losses.append(policy_loss(new[part], advantages[part], mask[part], by=by))
            weights.append(mask[part].sum() if by == "token" else torch.tensor(4 * len(part)))
        together = sum(w * x for w, x in zip(weights, losses, strict=True)) / sum(weights)
        torch.testing.assert_close(policy_loss(new, advantages, mask, by=by), together)


def test_kl_in_the_reward_is_the_log_ratio_of_the_whole_sample():
    new, advantages, mask, _, start = batch()
    rewards = penalised_rewards(advantages, new, start, mask, weight=0.5)
    assert not rewards.requires_grad
    away = (new - start).detach()
    for i, j in itertools.product(range(3), range(4)):
        log_ratio = sum(float(away[i, j, t]) for t in range(int(mask[i, j].sum())))
        assert float(rewards[i, j]) == pytest.approx(float(advantages[i, j]) - 0.5 * log_ratio)


# Input that cannot be.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kl_weight": 0.1}, "needs reference_log_probs"),
        ({"kl_weight": -0.1}, "must not be negative"),
        ({"clip": (1.5, 0.2)}, r"clip: expected \(low in \[0, 1\]"),
        ({"clip": (0.2, -0.1)}, r"clip: expected \(low in \[0, 1\]"),
        ({"by": "group"}, "one of sample, token, constant"),
        ({"by": "constant", "length": 0}, "length positive"),
    ],
)
def test_settings_out_of_range(options, message):
    new, advantages, mask, *_ = batch()
    with pytest.raises(SpecError, match=message):
        policy_loss(new, advantages, mask, **options)


def test_tensors_that_do_not_fit():
    new, advantages, mask, old, _ = batch()
    with pytest.raises(TrainingError, match="old_log_probs: expected the shape"):
        policy_loss(new, advantages, mask, old_log_probs=old[..., 1:])
    with pytest.raises(TrainingError, match="a boolean mask"):
        policy_loss(new, advantages, mask.long())
    broken = new.detach().clone()
    broken[1, 2, 0] = math.nan
    with pytest.raises(TrainingError, match=r"log_probs: not finite at \[1, 2, 0\]"):
        policy_loss(broken, advantages, mask)


def test_groups_and_estimators_that_do_not_exist():
    alone = torch.zeros(2, 1)
    for advantages in (leave_one_out, lambda r: standardised(r, correction=1)):
        with pytest.raises(SpecError, match="at least 2 samples"):
            advantages(alone)
    with pytest.raises(SpecError, match="epsilon must not be negative"):
        standardised(torch.zeros(1, 2), epsilon=-1.0)
    with pytest.raises(SpecError, match="one of k1, k2, k3"):
        kl(torch.zeros(1), torch.zeros(1), estimator="k4")
