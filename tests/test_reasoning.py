"""Generators of reasoning-gym as problems, against their own answers and scorers."""

from __future__ import annotations

import contextlib
import math
import re
import threading
import time

import pytest
import torch
from text_checkpoint import text_checkpoint

from mechinterp import tasks
from mechinterp.errors import SpecError, TaskError
from mechinterp.randomness import derive_seed
from mechinterp.spec import TaskSpec
from mechinterp.tasks.base import Task
from mechinterp.tasks.marking import guarded, time_limit
from mechinterp.tasks.splits import in_split
from mechinterp.tasks.text import stack_left, stack_right

CHAIN = {"max_terms": 4, "max_digits": 1}


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return str(text_checkpoint(tmp_path_factory.mktemp("text") / "checkpoint").path)


@pytest.fixture(scope="module")
def make(path):
    pytest.importorskip("reasoning_gym", reason="pip install 'mechinterp[reasoning]'")

    def make(dataset="chain_sum", config=CHAIN, **options):
        options = {"tokenizer": path, "max_new_tokens": 16, **options}
        return tasks.get("reasoning_gym", dataset=dataset, config=config, **options)

    return make


def mark_texts(task, problems, texts):
    """Marks of one text per problem, each with its end."""
    rows = [[*task._text.ids(text), task.end_token] for text in texts]
    completions, mask = stack_right(rows, task.pad_token)
    return task.mark(problems, completions[:, None], mask[:, None])


def test_examples_are_of_the_training_split(make):
    task = make(style="few_shot", config={"max_terms": 2, "max_digits": 1})
    prompt = task._text._tokenizer.decode(task.problems(1).tokens[0])
    *examples, _ = (line for line in prompt.split("\n") if not line.startswith("Answer:"))
    assert len(examples) == 3
    for question in examples:
        assert in_split(torch.tensor([derive_seed(0, question)]), "train")


@pytest.mark.parametrize("style", ["zero_shot", "few_shot", "chat"])
def test_solutions_are_the_generators_answers_and_right(make, style):
    task = make(style=style, level="num_terms")
    problems = task.problems(12, seed=1, levels=[2, 4])
    assert problems.level.tolist() == [2, 4] * 6
    decode = task._text._tokenizer.decode
    for i, entry in enumerate(problems.entries):
        prompt = decode(problems.tokens[i][problems.mask[i]])
        assert prompt.count(entry["question"]) == 1
        assert prompt.count("Answer:") == {"zero_shot": 1, "few_shot": 4, "chat": 0}[style]
        written = problems.solutions[i][problems.solution_mask[i]]
        assert written[-1] == task.end_token
        assert decode(written[:-1]).strip() == entry["answer"]
        expression = re.search("problem: (.*) =", entry["question"])[1]
        assert eval(expression) == int(entry["answer"])
        assert len(re.findall(r"\d+", expression)) == problems.level[i]
    solved = task.mark(problems, problems.solutions[:, None], problems.solution_mask[:, None])
    assert solved.correct.all()
    assert (solved.score == 1).all()
    assert solved.confidence.isnan().all()
    assert not task.mark(
        problems,
        problems.solutions[:, None],
        (problems.solution_mask & (problems.solutions != task.end_token))[:, None],
    ).correct.any()


def test_other_answers_score_what_the_scorer_says(make):
    task = make()
    problems = task.problems(6, seed=2)
    answers = [int(entry["answer"]) for entry in problems.entries]
    wrong = mark_texts(task, problems, [str(x + 1) for x in answers])
    assert not wrong.correct.any()
    partly = mark_texts(task, problems, [f" it is {x}" for x in answers])
    assert not partly.correct.any()
    for i, entry in enumerate(problems.entries):
        expected = task._scorer.score_answer(f"it is {answers[i]}", entry)
        assert 0 < partly.score[i, 0] < 1
        assert partly.score[i, 0].item() == pytest.approx(expected)
    assert (mark_texts(task, problems, [""] * 6).answer == -1).all()
    same = mark_texts(task, problems, ["7"] * 6).answer
    assert len(same.unique()) == 1
    assert same[0, 0] != mark_texts(task, problems, ["8"] * 6).answer[0, 0]


def test_splits_share_no_question(make):
    task = make(config={"max_terms": 2, "max_digits": 1})
    asked = {
        split: {entry["question"] for entry in task.problems(60, split=split, seed=3).entries}
        for split in ("train", "validation", "test")
    }
    assert all(len(questions) > 1 for questions in asked.values())
    assert len(set.union(*asked.values())) == sum(map(len, asked.values()))


def test_problems_depend_on_seed_alone_and_settings_make_the_task_again(make):
    task = make(level="num_terms")
    again = tasks.get("reasoning_gym", **task.settings())
    assert again == task
    assert torch.equal(task.problems(5, seed=1).tokens, again.problems(5, seed=1).tokens)
    entries = [task.problems(5, seed=seed).entries for seed in (1, 2)]
    assert entries[0] != entries[1]


def test_a_scorer_that_fails_or_hangs_names_the_question(make, monkeypatch):
    task = make(seconds=0.2)
    problems = task.problems(2, seed=1)
    question = problems.entries[0]["question"]

    def hang(answer, entry):
        with contextlib.suppress(BaseException):  # as some of theirs do
            time.sleep(20)
        while True:
            time.sleep(0.01)

    for score, message in [
        (lambda answer, entry: 1 / 0, "raised ZeroDivisionError: division by zero"),
        (lambda answer, entry: math.nan, "returned nan"),
        (lambda answer, entry: None, "raised TypeError"),
        (hang, "took longer than 0.2 s"),
    ]:
        monkeypatch.setattr(task._scorer, "score_answer", score)
        with pytest.raises(TaskError, match=re.escape(message)) as caught:
            mark_texts(task, problems, ["1", "2"])
        assert question[:40] in str(caught.value)
        assert "\n" not in str(caught.value)


def test_what_is_not_a_scorer_or_generator_gives_one_line(make, path):
    for options, message in [
        ({"dataset": "chain_sums"}, "chain_sums"),
        ({"config": {"colour": 3}}, "colour"),
        ({"config": {"min_terms": -1}}, "chain_sum"),
        ({"config": [1]}, "config must be a mapping"),
        ({"style": "loud"}, "style: must be one of"),
        ({"max_new_tokens": 1}, "max_new_tokens must be"),
    ]:
        with pytest.raises(TaskError, match=message) as caught:
            make(**options)
        assert "\n" not in str(caught.value)
    for options, request, message in [
        ({}, {"planted": 0.5}, "no shortcuts to plant"),
        ({"level": "colour"}, {}, "no whole number 'colour' .* it has: .*num_terms"),
        ({"level": "num_terms"}, {"levels": [9]}, "gave 0 of 4 problems of level 9"),
        ({}, {"split": "dev"}, "no split 'dev'"),
        ({"dataset": "propositional_logic", "config": None}, {}, "no right answers to learn"),
        ({"dataset": "spell_backward", "config": None, "max_new_tokens": 2}, {}, "raise max_new"),
    ]:
        with pytest.raises(TaskError, match=message):
            make(**options).problems(4, **request)


def test_without_the_package_there_is_one_line(monkeypatch, path):
    import sys

    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(TaskError, match=r"pip install 'mechinterp\[reasoning\]'"):
        tasks.get("reasoning_gym", dataset="chain_sum", tokenizer=path)


def test_it_is_refused_where_a_decision_is_analysed():
    assert not issubclass(tasks.task_class("reasoning_gym"), Task)
    spec = TaskSpec(task="reasoning_gym", settings={"dataset": "chain_sum"})
    with pytest.raises((TaskError, SpecError), match="has no decision to analyse"):
        spec.make()


def test_tokenizer_of_the_checkpoint_is_used_where_it_has_one(path, tmp_path):
    from mechinterp.checkpoints import open_checkpoint

    words, text = TaskSpec(task="questions"), TaskSpec(task="arithmetic")
    checkpoint = open_checkpoint(path)
    assert text.make_for(checkpoint).tokenizer == path
    assert words.make_for(checkpoint) == tasks.get("questions")


def test_time_limit_interrupts_and_is_gone_afterwards():
    began = time.perf_counter()
    with pytest.raises(TaskError, match="took longer than"):
        guarded(time.sleep, 20, item="item 3", seconds=0.1)
    assert time.perf_counter() - began < 5
    with time_limit(0.05):
        pass
    time.sleep(0.1)  # no alarm is left
    assert guarded(float, "0.5", item="", seconds=1) == 0.5


def test_what_swallows_the_interruption_and_returns_is_still_too_late():
    def swallow():
        with contextlib.suppress(BaseException):
            time.sleep(20)
        return 1.0

    with pytest.raises(TaskError, match="took longer than"):
        guarded(swallow, item="item 3", seconds=0.1)


def test_in_another_thread_functions_run_without_a_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(guarded(float, 1, item="", seconds=1)))
    thread.start()
    thread.join()
    assert found == [1.0]


def test_rows_are_padded_on_their_side():
    tokens, mask = stack_left([[1, 2, 3], [4]], 0)
    assert tokens.tolist() == [[1, 2, 3], [0, 0, 4]]
    assert mask.tolist() == [[True] * 3, [False, False, True]]
    tokens, mask = stack_right([[1], [4, 5]], 9)
    assert tokens.tolist() == [[1, 9], [4, 5]]
    assert mask.tolist() == [[True, False], [True, True]]
