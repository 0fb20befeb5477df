"""Pass rates against enumeration, and against a network whose every pass rate is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import beta
from tiny_models import tiny_model
from written_tasks import END, FIRST, Copying

from mechinterp import pass_rates
from mechinterp.errors import AnalysisError
from mechinterp.pass_rates import difficulty, measure_pass_rates, pass_at_k
from mechinterp.randomness import derive_generator
from mechinterp.rollouts import sample_answers
from mechinterp.tasks.written import unsolvable

TASK = Copying(n_letters=4)


@given(st.integers(1, 9), st.data())
def test_pass_at_k_is_the_share_of_subsets_with_a_success(n, data):
    c, k = data.draw(st.integers(0, n)), data.draw(st.integers(1, n))
    results = [True] * c + [False] * (n - c)
    subsets = list(itertools.combinations(results, k))
    assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_is_unbiased():
    p, n, k = 0.13, 12, 5
    chance = [math.comb(n, c) * p**c * (1 - p) ** (n - c) for c in range(n + 1)]
    assert pass_at_k(n, range(n + 1), k) @ chance == pytest.approx(1 - (1 - p) ** k)


def test_pass_at_k_of_many_at_once():
    found = pass_at_k([[512, 512], [64, 8]], [[0, 3], [64, 1]], 8)
    rare = 1 - math.comb(509, 8) / math.comb(512, 8)
    np.testing.assert_allclose(found, [[0, rare], [1, 1]])
    for k in (0, 9):
        with pytest.raises(AnalysisError, match="number of samples, 8"):
            pass_at_k([8, 64], [1, 1], k)


def test_difficulty_by_limits():
    limits = {"impossible": 0, "near-impossible": 0.02, "hard": 0.3, "easy": 1}
    rates = [0, 1 / 512, 0.02, 0.021, 0.3, 0.31, 1]
    expected = ["impossible", *["near-impossible"] * 2, *["hard"] * 2, *["easy"] * 2]
    assert difficulty(rates, limits).tolist() == expected
    for bad in ({}, {"hard": 0.3}, {"easy": 1, "hard": 0.3}):
        with pytest.raises(AnalysisError, match="limits must increase"):
            difficulty(rates, bad)


def letters_by_chance():
    """Whatever came before, the next token is END with 0.4, or the i-th letter with its chance."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.lm_head.bias = torch.nn.Parameter(torch.full((64,), -1e4))
    chances = {END: 0.4, FIRST: 0.3, FIRST + 1: 0.2, FIRST + 2: 0.08, FIRST + 3: 0.02}
    for token, chance in chances.items():
        model.lm_head.bias.data[token] = math.log(chance)
    return model, chances


def test_prompts_of_one_length_are_sampled_together_without_padding(monkeypatch):
    parts = []

    def spy(model, task, part, **options):
        parts.append(part)
        return sample_answers(model, task, part, **options)

    monkeypatch.setattr(pass_rates, "sample_answers", spy)
    problems = TASK.problems(40, seed=2)
    model, _ = letters_by_chance()
    measure_pass_rates(model, TASK, problems, n_samples=2, generator=derive_generator(0, "rates"))
    assert not problems.mask.all()
    assert all(part.mask.all() for part in parts)
    assert sum(len(part) for part in parts) == 40


def test_rates_are_those_of_the_network():
    model, chances = letters_by_chance()
    problems = TASK.problems(40, seed=2)
    table = measure_pass_rates(
        model, TASK, problems, n_samples=400, ks=(1, 8), generator=derive_generator(0, "rates")
    )
    truth = np.array([math.prod(chances[t] for t in entry) * 0.4 for entry in problems.entries])
    assert table["problem"].tolist() == list(range(40))
    assert table["level"].tolist() == [len(entry) for entry in problems.entries]
    error = (table["pass_rate"] - truth) / np.sqrt(truth * (1 - truth) / 400)
    assert error.abs().max() < 4
    assert error.std() > 0.5
    covered = (table["low"] <= truth) & (truth <= table["high"])
    assert covered.mean() >= 0.9
    row = table.iloc[int(table["n_correct"].argmax())]
    c = row["n_correct"]
    assert row["low"] == pytest.approx(beta.ppf(0.025, c, 401 - c))
    assert row["high"] == pytest.approx(beta.ppf(0.975, c + 1, 400 - c))
    assert table["pass_at_1"].tolist() == pytest.approx(table["pass_rate"].tolist())
    assert table["pass_at_8"].tolist() == pytest.approx(pass_at_k(400, table["n_correct"], 8))


def test_screening_samples_the_rare_again():
    model, chances = letters_by_chance()
    problems = TASK.problems(60, seed=2)
    common = {"n_samples": 200, "generator": derive_generator(0, "rates")}
    table = measure_pass_rates(model, TASK, problems, n_screening=20, rare=0.05, **common)
    assert set(table["n_samples"]) == {20, 200}
    often = table[table["n_samples"] == 20]
    assert (often["pass_rate"] > 0.05).all()
    truth = np.array([math.prod(chances[t] for t in entry) * 0.4 for entry in problems.entries])
    rare = table["n_samples"] == 200
    error = (table["pass_rate"] - truth)[rare] / np.sqrt(truth * (1 - truth) / 200)[rare]
    # Chosen for being rare in the screening, and yet not too low on the average.
    assert abs(error.mean()) < 3 / math.sqrt(rare.sum())


def test_more_samples_than_fit_at_once(monkeypatch):
    from mechinterp import pass_rates

    monkeypatch.setattr(pass_rates, "COMPLETIONS_AT_ONCE", 30)
    model, chances = letters_by_chance()
    problems = TASK.problems(40, seed=2, levels=(1,))
    generator = derive_generator(0, "rates")
    table = measure_pass_rates(model, TASK, problems, n_samples=70, generator=generator)
    assert table["n_samples"].tolist() == [70] * 40
    truth = np.array([chances[entry[0]] * 0.4 for entry in problems.entries])
    error = (table["n_correct"] - 70 * truth) / np.sqrt(70 * truth * (1 - truth))
    assert abs(error.mean()) < 4 / math.sqrt(40)
    assert 0.5 < error.std() < 2


def test_unsolvable_problems_are_never_solved():
    model, _ = letters_by_chance()
    problems = unsolvable(TASK.problems(5, levels=(1,)))
    generator = derive_generator(0, "rates")
    table = measure_pass_rates(model, TASK, problems, n_samples=50, generator=generator)
    assert table["n_correct"].tolist() == [0] * 5
    assert table["low"].tolist() == [0] * 5
    assert table["high"].to_numpy() == pytest.approx(1 - 0.025 ** (1 / 50))
