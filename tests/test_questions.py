"""Questions: the posterior by enumeration, frequencies, what is written and marked, shifts."""

from __future__ import annotations

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from mechinterp import tasks
from mechinterp.errors import TaskError
from mechinterp.rollouts import Rollouts
from mechinterp.tasks.questions import ASK, END, FIRST_ANSWER, PAD, SILENT, START
from mechinterp.tasks.splits import SPLITS, deal
from mechinterp.training.rewarded_config import Reward, RewardedConfig
from mechinterp.training.rewarded_signal import make_signal

SHIFTS = ("none", "fewer", "unreliable")
FIRST_KIND = FIRST_ANSWER + 4

question_settings = st.builds(
    dict,
    reliabilities=st.lists(st.floats(0.05, 0.95), min_size=3, max_size=5),
    n_witnesses=st.integers(2, 4),
    shift=st.sampled_from(SHIFTS),
)


def witnesses(task, row: torch.Tensor) -> list[tuple[int, int]]:
    """(kind, answer) of the witnesses that speak, read off the tokens."""
    start, _, *pairs, ask = row.tolist()
    assert (start, ask) == (START, ASK)
    both = zip(pairs[::2], pairs[1::2], strict=True)
    return [(kind - FIRST_KIND, said - FIRST_ANSWER) for kind, said in both if kind != SILENT]


def bayes(task, row: torch.Tensor) -> np.ndarray:
    """P(answer) by the definition, answer by answer."""
    joint = []
    for answer in range(4):
        chance = 0.25
        for kind, said in witnesses(task, row):
            reliable = task.reliabilities[kind]
            chance *= reliable if said == answer else (1 - reliable) / 3
        joint.append(chance)
    return np.array(joint) / sum(joint)


@settings(max_examples=30, deadline=None)
@given(question_settings)
@example({"reliabilities": [0.5, 0.05000000000000001, 0.05], "n_witnesses": 2})
def test_posterior_is_bayes_rule(options):
    task = tasks.get("questions", **options)
    items = task.sample(20, seed=1)
    assert items.tokens.shape == (20, task.n_positions)
    assert int(items.tokens.max()) < task.vocab_size
    for row in range(20):
        expected = bayes(task, items.tokens[row])
        np.testing.assert_allclose(items.posterior[row].numpy(), expected, atol=1e-12)
        favourite = items.latents["favourite"][row]
        assert expected[favourite] == pytest.approx(expected.max())
        edges = [0.4, 0.55, 0.7, 0.85]
        assert items.latents["sure"][row] == sum(expected.max() > edge - 1e-10 for edge in edges)
        speaking = witnesses(task, items.tokens[row])
        if speaking:
            best = max(task.reliabilities[kind] for kind, _ in speaking)
            first = next(said for kind, said in speaking if task.reliabilities[kind] == best)
            assert items.latents["strongest"][row] == first


@pytest.mark.parametrize("shift", SHIFTS)
def test_labels_are_as_frequent_as_the_posterior_says(shift):
    task = tasks.get("questions", shift=shift)
    items = task.sample(40_000, seed=2)
    stated = items.posterior.flatten().numpy()
    came = torch.nn.functional.one_hot(items.labels, 4).flatten().numpy()
    for value in np.unique(stated.round(6)):
        chosen = np.isclose(stated, value, atol=1e-6)
        if (n := chosen.sum()) >= 200:
            assert abs(came[chosen].mean() - value) < 4.5 * math.sqrt(value * (1 - value) / n)


def test_problems_have_the_level_and_labels_stay_calibrated():
    task = tasks.get("questions")
    problems = task.problems(10_000, seed=3, levels=range(1, 6))
    assert set(Counter(problems.level.tolist()).values()) == {2000}
    right = task.right_confidence(problems)
    sure = right.amax(1)
    for level in range(1, 6):
        own = sure[problems.level == level]
        assert (own <= 0.25 + 0.15 * (6 - level) + 1e-9).all()
        assert (own >= 0.25 + 0.15 * (5 - level) - 1e-9).all()
    hit = right.argmax(1) == torch.tensor(problems.entries)
    for level in range(1, 6):
        chosen = problems.level == level
        gap = float(hit[chosen].double().mean() - sure[chosen].mean())
        assert abs(gap) < 4.5 * math.sqrt(0.25 / 2000)
    for row in range(20):
        np.testing.assert_allclose(right[row], bayes(task, problems.tokens[row]), atol=1e-12)


@settings(max_examples=25, deadline=None)
@given(question_settings, st.sampled_from(["right", "random", "none"]), st.integers(2, 21))
def test_solutions_are_right_and_say_what_they_should(options, confidence, n_confidences):
    task = tasks.get("questions", **options, confidence=confidence, n_confidences=n_confidences)
    problems = task.problems(30, seed=4)
    marks = task.mark(problems, problems.solutions[:, None], problems.solution_mask[:, None])
    assert marks.correct.all()
    assert marks.answer[:, 0].tolist() == list(problems.entries)
    if confidence == "none":
        assert marks.confidence.isnan().all()
        assert not marks.confidence_tokens.any()
        return
    assert (marks.confidence_tokens[:, 0] == torch.tensor([False, True, False])).all()
    assert ((marks.confidence >= 0) & (marks.confidence <= 1)).all()
    if confidence == "right":
        labels = torch.tensor(problems.entries)[:, None]
        right = task.right_confidence(problems).gather(1, labels)
        assert ((marks.confidence - right).abs() <= 0.5 / (n_confidences - 1) + 1e-6).all()


def test_random_confidence_says_nothing():
    task = tasks.get("questions", confidence="random")
    problems = task.problems(5000, seed=1)
    marks = task.mark(problems, problems.solutions[:, None], problems.solution_mask[:, None])
    said = marks.confidence[:, 0].double()
    right = task.right_confidence(problems).gather(1, torch.tensor(problems.entries)[:, None])
    assert abs(np.corrcoef(said, right[:, 0])[0, 1]) < 4.5 / math.sqrt(5000)
    counts = Counter(said.tolist())
    assert len(counts) == 11
    assert max(counts.values()) < 1.3 * min(counts.values())


def test_marks_of_texts_that_are_not_as_they_should_be():
    task = tasks.get("questions")
    problems = task.problems(4, seed=0)
    label, other = problems.entries[0], (problems.entries[0] + 1) % 4
    answer, wrong = FIRST_ANSWER + label, FIRST_ANSWER + other
    sure, half = task.vocab_size - 1, task.vocab_size - 6
    nan = math.nan
    for row, right, number, confidence, where in [
        ([answer, sure, END], True, label, 1.0, 1),
        ([answer, half, END], True, label, 0.5, 1),
        ([wrong, half, END], False, other, 0.5, 1),
        ([answer, END], True, label, nan, 1),
        ([answer, sure, sure], False, label, 1.0, 1),
        ([answer, answer, END], False, label, nan, 1),
        ([sure, answer, END], False, -1, nan, None),
        ([sure, sure, END], False, -1, nan, None),
        ([END], False, -1, nan, None),
    ]:
        tokens = torch.tensor(row + [PAD] * (3 - len(row)))[None, None]
        mask = torch.arange(3)[None, None] < len(row)
        marks = task.mark(problems.select([0]), tokens, mask)
        assert marks.correct.item() is right
        assert marks.answer.item() == number
        assert marks.confidence.item() == pytest.approx(confidence, nan_ok=True)
        assert marks.confidence_tokens[0, 0].nonzero().flatten().tolist() == (
            [] if where is None else [where]
        )


def test_a_confidence_that_is_left_out_is_punished_where_it_should_stand():
    task = tasks.get("questions")
    problems = task.problems(1)
    answer, sure = FIRST_ANSWER + problems.entries[0], task.vocab_size - 1
    completions = torch.tensor([[[answer, sure, END], [answer, END, PAD]]])
    rollouts = Rollouts(completions, completions != PAD, *torch.zeros(2, 1, 2, 3))
    marks = task.mark(problems, rollouts.completions, rollouts.mask)
    config = RewardedConfig(advantage="centred", reward=Reward("brier", routed=True))
    by_token = make_signal(config, rollouts, marks).advantages[0].tolist()
    assert by_token == [[0, 0.5, 0], [0, -0.5, 0]]  # scores 0 and -1


def test_shifts_do_what_they_say():
    for shift in SHIFTS:
        items = tasks.get("questions", shift=shift).sample(500)
        kinds = (items.tokens[:, 2:-1:2] - FIRST_KIND).tolist()
        silent = [sum(kind == SILENT - FIRST_KIND for kind in row) for row in kinds]
        assert set(silent) == ({1} if shift == "fewer" else {0})
        weak = all(kind >= 2 for row in kinds for kind in row)
        assert weak == (shift == "unreliable")


def test_splits_share_no_witnesses_in_any_order():
    task = tasks.get("questions", n_witnesses=2)
    groups = {}
    for split in SPLITS:
        items = task.sample(4000, split=split)
        rows = [items, task.counterfactual_pairs(40, split=split).corrupt]
        groups[split] = {
            tuple(sorted(witnesses(task, row))) for some in rows for row in some.tokens
        }
        problems = task.problems(200, split=split)
        assert {tuple(sorted(witnesses(task, row))) for row in problems.tokens} <= groups[split]
        assert len(items.groups.unique()) == len(groups[split])
    every = set(itertools.combinations_with_replacement(itertools.product(range(4), range(4)), 2))
    assert set.union(*groups.values()) == every
    assert sum(map(len, groups.values())) == len(every)


@pytest.mark.parametrize("shift", SHIFTS)
def test_splits_are_equally_hard(shift):
    task = tasks.get("questions", shift=shift)
    samples = {split: task.sample(20_000, seed=1, split=split) for split in ("train", "test")}
    best = {split: items.posterior.amax(1).mean() for split, items in samples.items()}
    # Weak witnesses say few things, which no split of whole groups makes quite alike.
    assert abs(best["train"] - best["test"]) < (0.02 if shift == "unreliable" else 0.01)
    right = {
        split: (items.posterior.argmax(1) == items.labels).double().mean()
        for split, items in samples.items()
    }
    assert abs(right["train"] - right["test"]) < (0.025 if shift == "unreliable" else 0.015)


def test_what_a_witness_says_is_of_one_split_under_every_shift():
    seen = {}
    for shift, split in itertools.product(SHIFTS, SPLITS):
        for group in tasks.get("questions", shift=shift).sample(2000, split=split).groups.tolist():
            assert seen.setdefault(group, split) == split
    assert set(seen.values()) == set(SPLITS)


def test_groups_are_dealt_out_in_the_splits_proportions():
    groups = torch.randperm(200, generator=torch.Generator().manual_seed(0))
    for split, own in deal(groups, groups < 100, groups).items():
        assert set(Counter((own // 10).tolist()).values()) == {round(10 * SPLITS[split])}
        assert len(own) == 200 * SPLITS[split]


@pytest.mark.parametrize("shift", SHIFTS)
def test_pairs_change_one_witness_and_the_likeliest_answer(shift):
    task = tasks.get("questions", shift=shift)
    pairs = task.counterfactual_pairs(64)
    differs = pairs.clean.tokens != pairs.corrupt.tokens
    assert (differs.sum(1) == 1).all()
    assert (pairs.roles[differs.numpy()] == "changed says").all()
    assert (pairs.clean.posterior.argmax(1) != pairs.corrupt.posterior.argmax(1)).all()
    for name in ("strongest", "favourite"):
        chosen = torch.from_numpy(pairs.latent == name)
        moved = pairs.clean.latents["strongest"] != pairs.corrupt.latents["strongest"]
        assert (moved[chosen] == (name == "strongest")).all()
    assert set(Counter(pairs.latent).values()) == {32} or shift == "fewer"
    assert (pairs.clean.latents["filler"] == pairs.corrupt.latents["filler"]).all()


def test_items_depend_on_seed_and_split_only_and_settings_make_the_task_again():
    task = tasks.get("questions", reliabilities=[0.8, 0.3])
    again = tasks.get("questions", **task.settings())
    assert again == task
    assert torch.equal(task.sample(30, seed=1).tokens, again.sample(30, seed=1).tokens)
    assert torch.equal(task.problems(9, seed=1).tokens, again.problems(9, seed=1).tokens)
    assert not torch.equal(task.sample(30, seed=1).tokens, task.sample(30, seed=2).tokens)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reliabilities": []}, "reliabilities must be in"),
        ({"reliabilities": [1.0]}, "reliabilities must be in"),
        ({"n_witnesses": 0}, "n_witnesses must be in 1 .. 8"),
        ({"n_witnesses": 8, "reliabilities": [0.5] * 6}, "use fewer of either"),
        ({"n_confidences": 1}, "n_confidences at least 2"),
        ({"confidence": "high"}, "confidence must be one of right"),
        ({"shift": "fewer", "n_witnesses": 1}, "at least 2 witnesses"),
        ({"shift": "more"}, "shift one of none"),
    ],
)
def test_bad_settings_give_one_line(options, message):
    with pytest.raises(TaskError, match=message) as caught:
        tasks.get("questions", **options)
    assert "\n" not in str(caught.value)


def test_bad_requests_give_one_line():
    task = tasks.get("questions")
    for options, message in [
        ({"levels": [6]}, "levels are 1 .. 5"),
        ({"planted": 0.1}, "no shortcuts"),
        ({"split": "dev"}, "no split 'dev'"),
    ]:
        with pytest.raises(TaskError, match=message):
            task.problems(4, **options)
    with pytest.raises(TaskError, match="hardly any question of level 1"):
        tasks.get("questions", reliabilities=[0.3]).problems(4, levels=[1])
    with pytest.raises(TaskError, match="one witness hardly ever decides"):
        tasks.get("questions", reliabilities=[0.25]).counterfactual_pairs(8)
