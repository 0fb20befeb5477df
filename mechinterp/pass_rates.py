"""How hard problems are for a network: the share of its samples that are right, by problem."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Int
from numpy.typing import ArrayLike
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.progress import progress_bar
from mechinterp.rollouts import sample_answers
from mechinterp.statistics import proportion_interval
from mechinterp.tasks.written import Problems, WrittenTask

if TYPE_CHECKING:
    from transformers import PreTrainedModel

COMPLETIONS_AT_ONCE = 1024


def measure_pass_rates(
    model: PreTrainedModel,
    task: WrittenTask,
    problems: Problems,
    *,
    n_samples: int = 512,
    n_screening: int | None = None,
    rare: float = 0.1,
    ks: Sequence[int] = (),
    temperature: float = 1.0,
    max_new_tokens: int | None = None,
    generator: torch.Generator,
) -> pd.DataFrame:
    """A row per problem, in order: its pass rate from `n_samples` samples.

    With `n_screening` all problems are sampled so often first, and only those with a screened rate
    up to `rare` go on to `n_samples` new samples, which then count alone: had the screening
    counted too, having been chosen by it would bias the rate.

    Columns: problem, level, planted, n_samples, n_correct, pass_rate (pass@1), low and high
    (Clopper-Pearson, 95%), and pass_at_<k> for each of `ks`, see `pass_at_k`.
    """
    counts: dict[str, Any] = {"temperature": temperature, "generator": generator}
    counts |= {"max_new_tokens": max_new_tokens}
    n = np.full(len(problems), n_screening or n_samples)
    correct = _count_correct(model, task, problems, int(n[0]) if len(n) else 1, **counts)
    if n_screening is not None:
        again = np.flatnonzero(correct / n <= rare)
        n[again] = n_samples
        chosen = problems.select(again.tolist())
        correct[again] = _count_correct(model, task, chosen, n_samples, **counts)
    interval = cache(proportion_interval)
    bounds = [interval(int(c), int(of)) for c, of in zip(correct, n, strict=True)]
    table = {
        "problem": np.arange(len(problems)),
        "level": problems.level.numpy(),
        "planted": problems.planted.numpy(),
        "n_samples": n,
        "n_correct": correct,
        "pass_rate": correct / n,
        "low": [low for low, _ in bounds],
        "high": [high for _, high in bounds],
    }
    return pd.DataFrame(table | {f"pass_at_{k}": pass_at_k(n, correct, k) for k in ks})


def pass_at_k(n_samples: ArrayLike, n_correct: ArrayLike, k: int) -> np.ndarray:
    """Unbiased estimate of P(at least one of k samples is right): 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021 (arXiv:2107.03374), equation 1; 1 - (1 - c / n)^k is too low. Raises
    AnalysisError for k larger than the number of samples, or below 1.
    """
    n, c = np.broadcast_arrays(np.asarray(n_samples), np.asarray(n_correct))
    if k < 1 or (n < k).any():
        raise AnalysisError(f"pass@{k}: needs k from 1 to the number of samples, {n.min()}")
    return np.array([_pass_at_k(*pair, k) for pair in zip(n.flat, c.flat, strict=True)]).reshape(
        n.shape
    )


@cache
def _pass_at_k(n: int, c: int, k: int) -> float:
    if n - c < k:
        return 1.0
    return float(1 - np.prod(1 - k / np.arange(n - c + 1, n + 1)))


def difficulty(pass_rates: ArrayLike, limits: Mapping[str, float]) -> np.ndarray:
    """The class of each rate: the first whose limit is not below it; limits must increase.

        difficulty(rates, {"impossible": 0, "near-impossible": 0.02, "hard": 0.3, "easy": 1})

    Raises AnalysisError for limits that do not increase up to 1.
    """
    names, uppers = list(limits), np.array(list(limits.values()), dtype=float)
    if not names or (np.diff(uppers) <= 0).any() or uppers[-1] < 1:
        raise AnalysisError(f"difficulty: limits must increase, the last to 1; got {dict(limits)}")
    return np.array(names)[np.searchsorted(uppers, np.asarray(pass_rates), side="left")]


def _count_correct(
    model: PreTrainedModel,
    task: WrittenTask,
    problems: Problems,
    n_samples: int,
    *,
    max_new_tokens: int | None,
    temperature: float,
    generator: torch.Generator,
) -> np.ndarray:
    """Right samples of each problem. Prompts of one length stand together, without padding."""
    counts = np.zeros(len(problems), dtype=int)
    at_once = min(n_samples, COMPLETIONS_AT_ONCE)
    n_prompts = COMPLETIONS_AT_ONCE // at_once
    with progress_bar("pass rates", len(problems) * n_samples, unit="samples") as advance:
        for index in _alike(problems, n_prompts):
            part = problems.select(index)
            length = int(part.mask.sum(1).max())
            part = replace(part, tokens=part.tokens[:, -length:], mask=part.mask[:, -length:])
            for first in range(0, n_samples, at_once):
                n = min(at_once, n_samples - first)
                rollouts = sample_answers(
                    model,
                    task,
                    part,
                    n_samples=n,
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    generator=generator,
                )
                marks = task.mark(part, rollouts.completions, rollouts.mask)
                counts[index.numpy()] += marks.correct.sum(1).numpy()
                advance(n * len(part))
    return counts


def _alike(problems: Problems, size: int) -> list[Int[Tensor, " part"]]:
    """Indices of up to `size` problems each, whose prompts are equally long."""
    lengths: Int[Tensor, " problems"] = problems.mask.sum(1)
    parts: list[Int[Tensor, " part"]] = []
    for length in lengths.unique():
        parts += (lengths == length).nonzero()[:, 0].split(size)
    return parts
