"""Problems to train on, chosen by how often the start of the training solves them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from mechinterp.errors import TrainingError
from mechinterp.tasks.written import Problems, WrittenTask, unsolvable

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.reward_spec import Pool


MOST_DRAWN = 64  # times as many as are wanted


def candidate_problems(task: WrittenTask, n: int, *, planted: float, seed: int) -> Problems:
    """The problems that pass rates are measured of; the same for the same arguments.

    No prompt is there twice: short ones are few, and a pool of repeats would be a pool of those
    whose measured rate came out as wanted by chance. Ever more are drawn until `n` are distinct, a
    share `planted` of them with the shortcut, or until no more are found.
    """
    n_planted = round(n * planted)
    chosen, size = [], n
    while True:
        drawn = task.problems(size, seed=seed, split="train", planted=planted)
        before, chosen = len(chosen), _distinct(drawn, {True: n_planted, False: n - n_planted})
        if len(chosen) in (n, before) or size >= MOST_DRAWN * n:
            return drawn.select(chosen)
        size *= 2


def _distinct(drawn: Problems, wanted: dict[bool, int]) -> list[int]:
    """Places of the first distinct prompts, as many as wanted with and without the shortcut."""
    left, seen, chosen = dict(wanted), set(), []
    for i, is_planted in enumerate(drawn.planted.tolist()):
        prompt = tuple(drawn.tokens[i][drawn.mask[i]].tolist())
        if left[is_planted] and prompt not in seen:
            left[is_planted] -= 1
            seen.add(prompt)
            chosen.append(i)
    return chosen


def choose_pool(
    candidates: Problems, rates: pd.DataFrame, pool: Pool, *, rng: np.random.Generator
) -> Problems:
    """`pool.size` of the candidates, or as many as there are, their share of shortcuts as asked.

    `rates` has a row per candidate, in order, with its `pass_rate` under the start.
    Raises TrainingError where none is left, or where shortcuts are wanted and there are none.
    """
    rate = rates["pass_rate"].to_numpy()
    fits = (rate > pool.above) & (rate <= pool.to)
    planted = candidates.planted.numpy()
    wanted = {True: round(pool.size * pool.planted)}  # by whether it has the shortcut
    wanted[False] = pool.size - wanted[True]
    found = {}
    for is_planted, n in wanted.items():
        found[is_planted] = rng.permutation(np.flatnonzero(fits & (planted == is_planted)))
        if n and not len(found[is_planted]):
            what = "with a shortcut" if is_planted else "without a shortcut"
            raise TrainingError(
                f"pool: no candidate {what} has a pass rate in ({pool.above}, {pool.to}]; "
                "raise candidates.n, or change the pool's limits or the warm-up"
            )
    # Where one kind is scarce there are fewer of both, so that their shares stay.
    share = min(1.0, *(len(found[kind]) / n for kind, n in wanted.items() if n))
    kept = [found[kind][: max(1, round(share * n))] for kind, n in wanted.items() if n]
    problems = candidates.select(np.concatenate(kept).tolist())
    return problems if pool.solvable else unsolvable(problems)
