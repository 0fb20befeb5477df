"""What a network writes: how often it is right, how it fails, how far it has moved.

Measured on fresh problems by sampling, so that one table speaks of right answers (pass@1, pass@k),
of what overly hard training is said to do (answer repetition, skipped steps) and of the distance to
the start. Every measure is a mean over problems with the interval over them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.policy_gradient import kl
from mechinterp.rollouts import Rollouts, completion_log_probs, sample_answers
from mechinterp.tasks.written import Marks, Problems, WrittenTask
from probes.measures import mean_estimate

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ROWS_AT_ONCE = 512  # completions


@torch.no_grad()
def measure_writing(
    model: PreTrainedModel,
    task: WrittenTask,
    problems: Problems,
    *,
    start: PreTrainedModel | None = None,
    n_samples: int = 8,
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    generator: torch.Generator,
) -> pd.DataFrame:
    """One row per measure: value, low, high (95% over problems), n_problems, n_samples.

    pass_1, pass_k       share of right samples; of problems with one among `n_samples`
    repetition           share of samples that give the answer which is given most often, to
                         whatever problem, less the share that it would have were all answers right
    steps_missing        share of the intermediate results that are not written, and of those
    steps_wrong          written and wrong
    response_length      tokens, the end token included
    entropy              nats per token, of the distributions that were sampled from
    unended              share of samples without an end
    kl                   nats per completion away from `start`: KL(model || start), by samples
    """
    rows = []
    for index in torch.arange(len(problems)).split(max(1, ROWS_AT_ONCE // n_samples)):
        part = problems.select(index)
        rollouts = sample_answers(
            model,
            task,
            part,
            n_samples=n_samples,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
        )
        marks = task.mark(part, rollouts.completions, rollouts.mask)
        rows.append(_by_problem(task, part, rollouts, marks))
        if start is not None:
            theirs = completion_log_probs(
                start, part.tokens, part.mask, rollouts.completions, temperature=temperature
            )
            away = kl(rollouts.log_probs, theirs).masked_fill(~rollouts.mask, 0.0)
            rows[-1]["kl"] = reduce(away, "problems samples tokens -> problems samples", "sum")
    values = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    answers, right = values.pop("answer"), values.pop("right_answer")
    correct = values["pass_1"]
    values["pass_k"] = correct.amax(1, keepdim=True)
    values["repetition"] = _repetition(answers, right)
    return pd.DataFrame(
        [
            _row(name, value.double(), n_problems=len(problems), n_samples=n_samples)
            for name, value in values.items()
        ]
    )


def _by_problem(
    task: WrittenTask, problems: Problems, rollouts: Rollouts, marks: Marks
) -> dict[str, Tensor]:
    """Every measure by problem and sample."""
    n_tokens = reduce(rollouts.mask.double(), "p s t -> p s", "sum")
    entropy = reduce(rollouts.entropy.double(), "p s t -> p s", "sum")
    ended = ((rollouts.completions == task.end_token) & rollouts.mask).any(-1)
    right = task.mark(problems, problems.solutions[:, None], problems.solution_mask[:, None]).answer
    return {
        "pass_1": marks.correct.double(),
        "answer": marks.answer,
        "right_answer": right,
        "steps_missing": marks.steps_missing,
        "steps_wrong": marks.steps_wrong,
        "response_length": n_tokens,
        "entropy": entropy / n_tokens,
        "unended": (~ended).double(),
    }


def _repetition(
    answers: Int[Tensor, "problems samples"], right: Int[Tensor, "problems 1"]
) -> Float[Tensor, "problems samples"]:
    given = answers[answers >= 0]
    if len(given) == 0:
        return torch.full(answers.shape, float("nan"), dtype=torch.float64)
    favourite = given.mode().values
    return (answers == favourite).double() - (right == favourite).double().mean()


def _row(name: str, values: Float[Tensor, "problems samples"], **sizes: int) -> dict[str, object]:
    by_problem = values.nanmean(1)
    known: Bool[Tensor, " problems"] = ~by_problem.isnan()
    if not known.any():
        return {"measure": name, "value": float("nan"), "low": float("nan"), "high": float("nan")}
    found = mean_estimate(by_problem[known])
    low, high = found.interval()
    return {"measure": name, "value": found.value, "low": low, "high": high, **sizes}
