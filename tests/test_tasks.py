"""Tasks: what they promise about items, posteriors, splits and counterfactual pairs."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp import tasks
from mechinterp.errors import TaskError
from mechinterp.tasks.triage import ABSENT, FIRST_MARKER, Triage

triage_settings = st.builds(
    dict,
    linear=st.lists(st.floats(-3, 3), min_size=1, max_size=3).map(tuple),
    xor=st.lists(st.floats(-3, 3), max_size=2).map(tuple),
    n_unneeded=st.integers(0, 2),
    base_log_odds=st.floats(-2, 2),
    label_noise=st.floats(0, 0.4),
    n_fillers=st.integers(0, 3),
    n_decoys=st.integers(0, 2),
)


def read_record(task: Triage, tokens: list[int]) -> dict[str, int]:
    """What a person reads off a record: the value behind each latent's marker."""
    values = {}
    for token, following in itertools.pairwise(tokens):
        if FIRST_MARKER <= token < FIRST_MARKER + task.n_latents:
            values[task.latents[token - FIRST_MARKER].name] = following - ABSENT
    return values


@settings(max_examples=25, deadline=None)
@given(triage_settings)
def test_triage_tokens_say_what_the_latents_say(options):
    task = tasks.get("triage", **options)
    items = task.sample(20, seed=3)
    assert items.tokens.shape == (20, task.n_positions)
    assert int(items.tokens.max()) < task.vocab_size
    for row in range(20):
        read = read_record(task, items.tokens[row].tolist())
        assert read == {name: int(values[row]) for name, values in items.latents.items()}
        for position, role in enumerate(items.roles[row]):
            if role.startswith("value "):
                assert items.tokens[row, position] - ABSENT == items.latents[role[-1]][row]


def test_triage_posterior_is_the_formula_and_the_label_frequency():
    task = tasks.get("triage", linear=(1.0, -0.5), xor=(2.0,), label_noise=0.1, base_log_odds=0.3)
    items = task.sample(40_000, seed=1)
    a, b, c, d = (2.0 * items.latents[name].numpy() - 1 for name in "abcd")
    log_odds = 0.3 + 1.0 * a - 0.5 * b + 2.0 * c * d
    expected = 0.1 + 0.8 / (1 + np.exp(-log_odds))
    np.testing.assert_allclose(items.posterior[:, 1].numpy(), expected, atol=1e-12)
    for value in np.unique(expected.round(9)):
        chosen = np.isclose(expected, value)
        error = abs(items.labels.numpy()[chosen].mean() - value)
        assert error < 4.5 * np.sqrt(value * (1 - value) / chosen.sum())


def test_posterior_from_certain_latents_is_the_posterior():
    for name in ("triage", "digits"):
        task = tasks.get(name)
        items = task.sample(200, seed=5)
        certain = {
            latent.name: torch.nn.functional.one_hot(items.latents[latent.name], latent.n_values)
            for latent in task.latents
        }
        posterior = task.posterior_from_latents({k: v.double() for k, v in certain.items()})
        if items.posterior is not None:
            torch.testing.assert_close(posterior, items.posterior)
        else:
            assert (posterior.argmax(1) == items.labels).all()


def test_posterior_from_ignorance_is_the_base_rate():
    task = tasks.get("triage", linear=(1.0,), xor=(2.0,), base_log_odds=0.0)
    ignorant = {latent.name: torch.full((3, 2), 0.5) for latent in task.latents}
    torch.testing.assert_close(
        task.posterior_from_latents(ignorant), torch.full((3, 2), 0.5, dtype=torch.float64)
    )


def test_triage_pairs_differ_in_one_latent_at_its_value_and_in_the_decision():
    task = tasks.get("triage", n_decoys=1)
    pairs = task.counterfactual_pairs(60, seed=2)
    assert len(pairs) == 60
    assert sorted(set(pairs.latent)) == list("abcde")  # never the unneeded f
    differs = pairs.clean.tokens != pairs.corrupt.tokens
    assert (differs.sum(1) == 1).all()
    for row, position in zip(*np.nonzero(differs.numpy()), strict=True):
        assert pairs.clean.roles[row, position] == f"value {pairs.latent[row]}"
        assert pairs.roles[row, position] == "changed value"
    assert (pairs.roles == "changed value").sum() == len(pairs)
    assert (pairs.clean.posterior.argmax(1) != pairs.corrupt.posterior.argmax(1)).all()


@pytest.mark.parametrize("kind", ["nearest", "region"])
def test_digit_pairs_cross_the_subset(kind):
    task = tasks.get("digits", counterfactual=kind)
    pairs = task.counterfactual_pairs(40)
    assert (pairs.clean.labels != pairs.corrupt.labels).all()
    assert (pairs.clean.tokens != pairs.corrupt.tokens).any(1).all()
    assert "x as far" in pairs.quality
    if kind == "region":
        half = 1 + task.side**2 // 2
        assert (pairs.clean.tokens[:, :half] == pairs.corrupt.tokens[:, :half]).all()


def test_digit_splits_share_no_image_and_cover_all():
    task = tasks.get("digits")
    groups = {s: set(task.sample(10_000, split=s).groups.tolist()) for s in ("validation", "test")}
    groups["train"] = set(task._images_of("train").tolist())
    assert sum(map(len, groups.values())) == len(set.union(*groups.values())) == 1797
    assert set(task.sample(300, split="train").groups.tolist()) <= groups["train"]


@pytest.mark.parametrize("name", ["triage", "digits"])
def test_items_depend_on_seed_and_split_only(name):
    first, again = (tasks.get(name).sample(30, seed=1) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, tasks.get(name).sample(30, seed=2).tokens)
    assert not torch.equal(first.tokens, tasks.get(name).sample(30, seed=1, split="train").tokens)


def test_settings_make_the_task_again():
    task = tasks.get("triage", linear=[1, 2], utility=[[0.2, 0], [0, 1.8]])
    assert tasks.get("triage", **task.settings()) == task


def test_select_keeps_fields_aligned():
    items = tasks.get("triage").sample(10)
    some = items.select(torch.tensor([7, 2]))
    assert len(some) == 2
    assert torch.equal(some.tokens[0], items.tokens[7])
    assert some.latents["a"][1] == items.latents["a"][2]
    assert (some.roles[0] == items.roles[7]).all()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tirage", {}, "choose one of: triage"),
        ("triage", {"nose": 1}, "no setting 'nose'"),
        ("triage", {"label_noise": 0.7}, "label_noise must be in"),
        ("triage", {"n_fillers": -1}, "n_fillers"),
        ("triage", {"utility": [[1, 0]]}, "2 x 2"),
        ("triage", {"utility": [[0, 1], [1, 0]]}, "best action"),
        ("triage", {"linear": "much"}, "triage"),
        ("digits", {"subset": []}, "subset must hold"),
        ("digits", {"pool": 3}, "pool must be"),
        ("digits", {"counterfactual": "magic"}, "counterfactual must be"),
    ],
)
def test_bad_settings_give_one_line(name, options, message):
    with pytest.raises(TaskError, match=message) as caught:
        tasks.get(name, **options)
    assert "\n" not in str(caught.value)


def test_pairs_that_cannot_be_made_are_refused():
    with pytest.raises(TaskError, match="hardly any single latent"):
        tasks.get("triage", linear=(0.1,), xor=(), base_log_odds=3.0).counterfactual_pairs(8)
