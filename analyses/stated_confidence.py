"""Is what a network says of its own answers true, and is it still represented where not said?

A network answers questions and states a confidence. Readings of the same answers:

    said               the stated confidence
    said_recalibrated  the same after ex-post scaling: sigmoid(a + b logit(said)), fitted
    answer             the probability that the network gave to its answer
    answer_temperature the same with the answer's logits divided by a fitted temperature
    probe              logistic regression of being right on the residual stream where the
                       confidence is about to be stated, at the layer that predicts best

What is fitted is fitted on other questions than it is judged on, equally hard and without shift; a
reading that is as good by probe as another network's is when said, was not lost, only no longer
said.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from analyses.streams import decision_sites
from mechinterp.hooked import HookedModel
from mechinterp.rollouts import sample_answers
from mechinterp.seed_measures import CONFIDENCE
from mechinterp.tasks.questions import Questions
from mechinterp.tasks.written import Problems
from probes.calibration import equal_width_bins, reliability
from probes.measures import auroc

N_BINS = 10
SATURATED = 0.05  # within this of 0 or 1
FLOOR = 0.01  # so that a stated certainty is finite in log-odds
TEMPERATURES = torch.logspace(-1, 1, 81)
N_FOLDS = 5


@dataclass(frozen=True)
class Answers:
    """One sampled answer to each question, of those that were answered at all.

    `said` is NaN where no confidence was stated; `right` is the probability that the answer is
    right; `logits` are those of the possible answers; `streams` the residual stream by layer at the
    answer's token, where what comes next is the confidence.
    """

    accuracy: float  # of all questions
    correct: Bool[Tensor, " questions"]
    said: Float[Tensor, " questions"]
    right: Float[Tensor, " questions"]
    logits: Float[Tensor, "questions answers"]
    answer: Int[Tensor, " questions"]
    streams: Mapping[int, Float[Tensor, "questions d_model"]]


def measure_stated_confidence(
    model: HookedModel,
    tasks: Mapping[str, Questions],
    *,
    n_questions: int = 4_000,
    temperature: float = 1.0,
    seed: int = 0,
    generator: torch.Generator,
) -> dict[str, pd.DataFrame]:
    """Tables `stated_confidence` (a row per task, reading and measure) and `stated_reliability`
    (diagrams). `tasks` are the same questions under shifts, the first without any.

    accuracy       share of right answers
    ece            expected calibration error, 10 bins of equal width; `ece_debiased` is less what
                   chance gives it
    brier          mean squared error; in the same bins it is reliability - resolution + the
                   variance of being right, up to the spread within bins
    auroc          of being right, by confidence
    saturated      share of confidences within 0.05 of 0 or 1
    mean           confidence on average
    truth_gap      mean |confidence - P(answer is right)|, which the task knows

    All but accuracy are NaN for a reading that is there for fewer than half of the answers.
    """
    first = next(iter(tasks.values()))
    train = first.problems(n_questions, seed=seed, split="train")
    readers = _Readers(_answer(model, first, train, temperature, generator))
    rows, diagrams = [], []
    for name, task in tasks.items():
        test = task.problems(n_questions, seed=seed, split="test")
        answers = _answer(model, task, test, temperature, generator)
        for reading, confidence in readers.read(answers).items():
            measures, diagram = _judge(confidence, answers)
            rows += [
                {"questions": name, "reading": reading, "measure": measure, "value": value}
                for measure, value in measures.items()
            ]
            diagrams.append(diagram.assign(questions=name, reading=reading))
    return {
        "stated_confidence": pd.DataFrame(rows).assign(n_questions=n_questions),
        "stated_reliability": pd.concat(diagrams, ignore_index=True),
    }


@torch.no_grad()
def _answer(
    model: HookedModel,
    task: Questions,
    problems: Problems,
    temperature: float,
    generator: torch.Generator,
) -> Answers:
    sites = decision_sites(model)
    parts = []
    for index in torch.arange(len(problems)).split(512):
        part = problems.select(index)
        rollouts = sample_answers(
            model.model, task, part, temperature=temperature, generator=generator
        )
        marks = task.mark(part, rollouts.completions, rollouts.mask)
        logits = model.forward(part.tokens, positions=-1)[:, list(task.actions)]
        written = torch.cat([part.tokens, rollouts.completions[:, 0, :1]], 1)
        captured = model.capture(written, list(sites.values()), positions=-1)
        answer = marks.answer[:, 0]
        right = task.right_confidence(part).gather(1, answer.clamp(min=0)[:, None])[:, 0]
        streams = [captured[site].float() for site in sites.values()]
        said = marks.confidence[:, 0].double()
        parts.append((marks.correct[:, 0], said, right, logits.double(), answer, *streams))
    correct, said, right, logits, answer, *streams = map(torch.cat, zip(*parts, strict=True))
    kept = answer >= 0
    return Answers(
        accuracy=float(correct.double().mean()),
        correct=correct[kept],
        said=said[kept],
        right=right[kept],
        logits=logits[kept],
        answer=answer[kept],
        streams={layer: x[kept] for layer, x in zip(sites, streams, strict=True)},
    )


class _Readers:
    """Ways of reading a confidence, fitted on the answers to other questions."""

    def __init__(self, answers: Answers) -> None:
        correct = answers.correct.numpy()
        stated = ~answers.said.isnan()
        self._scale = None
        if _is_varied(correct[stated.numpy()]):
            self._scale = LogisticRegression(C=1e6).fit(
                _log_odds(answers.said[stated])[:, None], correct[stated.numpy()]
            )
        losses = torch.stack([_log_loss(answers, float(t)) for t in TEMPERATURES])
        self._temperature = float(TEMPERATURES[losses.argmin()])
        self._layer, self._probe = None, None
        if _is_varied(correct):
            scores = {
                layer: cross_val_score(
                    _probe(), x.numpy(), correct, cv=N_FOLDS, scoring="neg_log_loss"
                ).mean()
                for layer, x in answers.streams.items()
            }
            self._layer = max(scores, key=lambda layer: scores[layer])
            self._probe = _probe().fit(answers.streams[self._layer].numpy(), correct)

    def read(self, answers: Answers) -> dict[str, Float[Tensor, " questions"]]:
        """By the name of the reading; NaN where it cannot be made."""
        nothing = torch.full_like(answers.right, torch.nan)
        recalibrated, probed = nothing, nothing
        stated = ~answers.said.isnan()
        if self._scale is not None and stated.any():
            x = _log_odds(answers.said[stated])[:, None]
            recalibrated = nothing.clone()
            recalibrated[stated] = torch.from_numpy(self._scale.predict_proba(x)[:, 1])
        if self._probe is not None and self._layer is not None:
            x = answers.streams[self._layer].numpy()
            probed = torch.from_numpy(self._probe.predict_proba(x)[:, 1])
        return {
            "said": answers.said,
            "said_recalibrated": recalibrated,
            "answer": _of_answer(answers, 1.0),
            "answer_temperature": _of_answer(answers, self._temperature),
            "probe": probed,
        }


def _probe():
    # At its default strength; a probe of 96 dimensions on thousands of answers hardly overfits.
    return make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))


def _is_varied(correct) -> bool:
    """Both outcomes often enough to be told apart in every fold."""
    return min(correct.sum(), (~correct).sum()) >= N_FOLDS


def _log_odds(said: Float[Tensor, " questions"]):
    return torch.logit(said.clamp(FLOOR, 1 - FLOOR)).numpy()


def _of_answer(answers: Answers, temperature: float) -> Float[Tensor, " questions"]:
    probabilities = (answers.logits / temperature).softmax(1)
    return probabilities.gather(1, answers.answer[:, None])[:, 0]


def _log_loss(answers: Answers, temperature: float) -> Float[Tensor, ""]:
    said = _of_answer(answers, temperature).clamp(1e-6, 1 - 1e-6)
    return torch.nn.functional.binary_cross_entropy(said, answers.correct.double())


def _judge(
    confidence: Float[Tensor, " questions"], answers: Answers
) -> tuple[dict[str, float], pd.DataFrame]:
    """The measures of a reading, and its diagram."""
    known = ~confidence.isnan()
    if known.sum() * 2 < len(known):
        nothing = dict.fromkeys(CONFIDENCE, float("nan"))
        return {**nothing, "accuracy": answers.accuracy}, pd.DataFrame()
    said, correct = confidence[known], answers.correct[known]
    outcome = correct.double()
    found = reliability(said, outcome, equal_width_bins(said, N_BINS))
    measures = {
        "accuracy": answers.accuracy,
        "ece": found.error,
        "ece_debiased": found.debiased_error,
        "brier": float((said - outcome).square().mean()),
        "reliability": float(found.mass @ found.gap.square()),
        "resolution": float(found.mass @ (found.observed - outcome.mean()).square()),
        "auroc": float(auroc(said, correct)),
        "saturated": float((torch.minimum(said, 1 - said) <= SATURATED).double().mean()),
        "mean": float(said.mean()),
        "truth_gap": float((said - answers.right[known]).abs().mean()),
    }
    return measures, pd.DataFrame(found.diagram)
