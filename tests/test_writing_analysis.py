"""Measures of what is written and of stated confidences, on answers that were made up to have known
ones."""

from __future__ import annotations

import pytest
import torch
from written_tasks import END, FIRST, PAD, Copying

from analyses import stated_confidence, text_sources, writing
from analyses.stated_confidence import Answers, _judge, _Readers
from mechinterp import tasks
from mechinterp.hooked import HookedModel
from mechinterp.rollouts import Rollouts
from mechinterp.seed_measures import CONFIDENCE, WRITTEN
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

N = 8_000


def rollouts_of(completions: torch.Tensor) -> Rollouts:
    is_end = (completions == END).long()
    mask = ((is_end.cumsum(-1) - is_end) == 0) & (completions != PAD)
    nothing = torch.zeros(completions.shape)
    return Rollouts(completions, mask, nothing, nothing + 0.5 * mask)


@pytest.fixture
def measured(monkeypatch):
    """The measures of completions that are given for four problems of two equal letters each."""
    problems = Copying().problems(4, levels=[2], planted=1.0, seed=1)

    def measure(completions: torch.Tensor, n_samples: int):
        monkeypatch.setattr(writing, "sample_answers", lambda *_, **__: rollouts_of(completions))
        table = writing.measure_writing(
            None, Copying(), problems, n_samples=n_samples, generator=torch.Generator()
        )
        return table.set_index("measure")["value"]

    return problems, measure


def test_what_is_right_and_how_long(measured):
    problems, measure = measured
    right = problems.solutions[:, None]
    wrong = right.clone()
    wrong[:3, 0, 0] = FIRST + (wrong[:3, 0, 0] - FIRST + 1) % 4  # three of four problems
    wrong[0, 0] = FIRST  # and the first has no end
    found = measure(torch.cat([right, wrong], 1), n_samples=2)
    assert found["pass_1"] == pytest.approx(5 / 8)
    assert found["pass_k"] == 1
    assert found["response_length"] == pytest.approx((7 * 3 + 4) / 8)
    assert found["unended"] == pytest.approx(1 / 8)
    assert found["entropy"] == pytest.approx(0.5)
    assert torch.tensor(found["steps_missing"]).isnan()
    assert set(found.index) | {"kl"} == set(WRITTEN)


def test_repetition_is_what_right_answers_would_not_have(measured):
    problems, measure = measured
    right = problems.solutions[:, None]
    assert measure(right, n_samples=1)["repetition"] == pytest.approx(0)
    favourite = right[..., 0].mode(0).values
    share = float((right[..., 0] == favourite).double().mean())
    same = right.clone()
    same[..., 0] = favourite
    assert measure(same, n_samples=1)["repetition"] == pytest.approx(1 - share)


def answers(said: torch.Tensor, right: torch.Tensor, seed: int = 0) -> Answers:
    """Two possible answers, of which the first was given; the stream holds how likely it is."""
    generator = torch.Generator().manual_seed(seed)
    correct = torch.rand(len(right), generator=generator) < right
    log_odds = torch.logit(right)
    noise = torch.randn(len(right), 3, generator=generator)
    return Answers(
        accuracy=float(correct.double().mean()),
        correct=correct,
        said=said,
        right=right.double(),
        logits=torch.stack([2 * log_odds, torch.zeros_like(log_odds)], 1).double(),
        answer=torch.zeros(len(right), dtype=torch.long),
        streams={0: noise, 1: torch.cat([noise, log_odds[:, None]], 1)},
    )


@pytest.fixture(scope="module")
def right() -> torch.Tensor:
    return 0.3 + 0.65 * torch.rand(N, generator=torch.Generator().manual_seed(7))


def test_the_right_confidence_is_calibrated_and_resolves(right):
    found, diagram = _judge(right.double(), answers(right, right))
    assert set(found) == set(CONFIDENCE)
    assert abs(found["ece_debiased"]) < 0.01
    assert found["truth_gap"] == 0
    assert found["reliability"] < 0.001
    assert found["resolution"] == pytest.approx(float(right.var()), abs=0.005)
    assert diagram["n_items"].sum() == N
    variance = found["accuracy"] * (1 - found["accuracy"])
    parts = found["reliability"] - found["resolution"] + variance
    assert found["brier"] == pytest.approx(parts, abs=0.002)


def test_the_base_rate_is_calibrated_and_tells_nothing_apart(right):
    said = torch.full((N,), float(right.mean())).double()
    found, _ = _judge(said, answers(said, right))
    assert found["ece"] < 0.01
    assert found["auroc"] == 0.5
    assert found["resolution"] < 1e-6
    assert found["saturated"] == 0


def test_certainty_is_saturated_and_as_wrong_as_the_answers_are(right):
    found, _ = _judge(torch.ones(N).double(), answers(torch.ones(N), right))
    assert found["saturated"] == 1
    assert found["ece"] == pytest.approx(1 - found["accuracy"])


def test_what_is_not_said_can_still_be_read(right):
    noise = torch.rand(N, generator=torch.Generator().manual_seed(3)).double()
    readers = _Readers(answers(noise, right))
    fresh = answers(noise, right, seed=1)
    read = {name: _judge(value, fresh)[0] for name, value in readers.read(fresh).items()}
    assert read["said"]["auroc"] == pytest.approx(0.5, abs=0.02)
    best = _judge(right.double(), fresh)[0]["auroc"]
    for reading in ("probe", "answer", "answer_temperature"):
        assert read[reading]["auroc"] == pytest.approx(best, abs=0.01)
    # The logits are twice what they should be: a temperature of two mends that.
    assert read["answer"]["ece_debiased"] > 0.05
    assert abs(read["answer_temperature"]["ece_debiased"]) < 0.02
    assert read["probe"]["truth_gap"] < 0.03
    assert abs(read["said_recalibrated"]["ece_debiased"]) < 0.02


def test_a_confidence_that_is_not_stated_is_no_number(right):
    nothing = torch.full((N,), torch.nan).double()
    readers = _Readers(answers(nothing, right))
    read = readers.read(answers(nothing, right, seed=1))
    for reading in ("said", "said_recalibrated"):
        found, diagram = _judge(read[reading], answers(nothing, right))
        assert torch.tensor(found["ece"]).isnan()
        assert found["accuracy"] > 0.5
        assert diagram.empty
    assert stated_confidence.N_BINS == 10  # as in the papers


@pytest.mark.parametrize("collapsed", [False, True])
def test_a_network_that_writes_no_whole_text_is_no_source(monkeypatch, collapsed):
    task = tasks.get("arithmetic", max_terms=3, n_terms=3, decision="step")
    model = initial_model(ModelConfig(n_layers=1, d_model=16, n_positions=32), task, seed=0)
    network = HookedModel.from_model(model)

    def write(_, task, problems, **__):
        whole, mask = problems.solutions[:, None], problems.solution_mask[:, None]
        if collapsed:  # right away the answer, as it stands at the end of a solution
            whole, mask = whole[..., -4:], mask[..., -4:]
        return Rollouts(whole, mask, torch.zeros(whole.shape), torch.zeros(whole.shape))

    monkeypatch.setattr(text_sources, "sample_answers", write)
    table = text_sources.measure_text_sources(
        {"arm": network}, task, n_texts=40, generator=torch.Generator()
    )
    own = set() if collapsed else {"arm"}
    assert set(table["source"]) == {"right", "contradicting"} | own
