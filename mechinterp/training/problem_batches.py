"""The problems of each step, a function of (seed, stream, data order, step) alone."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from mechinterp.errors import TrainingError
from mechinterp.randomness import derive_generator, derive_seed
from mechinterp.tasks.written import Problems, WrittenTask
from mechinterp.training.batches import STEPS_PER_DRAW
from mechinterp.training.run import Run

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class ProblemSource:
    """Fresh problems of `levels`, a share `planted` with a shortcut; or a fixed `pool` of them."""

    pool: Problems | None = None
    levels: Sequence[int] | None = None
    planted: float = 0.0

    def __post_init__(self) -> None:
        if self.pool is not None and (self.levels is not None or self.planted):
            raise TrainingError(
                "problems: a pool has its own levels and shortcuts; give no levels, no planted"
            )
        if self.pool is not None and len(self.pool) == 0:
            raise TrainingError("problems: the pool is empty; nothing can be learned from it")

    def describe(self) -> dict[str, Any]:
        """As plain values; a pool is named by what is in it."""
        if self.pool is not None:
            return {"n_pool": len(self.pool), "pool_hash": self._pool_hash}
        return {
            "levels": None if self.levels is None else list(self.levels),
            "planted": self.planted,
        }

    @cached_property
    def _pool_hash(self) -> str:
        assert self.pool is not None
        pool, sha = self.pool, hashlib.sha256()
        # Not the padding, whose width depends on what else was drawn.
        for tokens, mask in ((pool.tokens, pool.mask), (pool.solutions, pool.solution_mask)):
            for row, kept in zip(tokens, mask, strict=True):
                sha.update(repr(row[kept].tolist()).encode())
        sha.update(repr([pool.planted.tolist(), pool.solvable.tolist()]).encode())
        return sha.hexdigest()


class ProblemBatches:
    """`batches(step)` gives problems: fresh ones, or those of a pool, each as often as any other.

    A pool is gone through in a random order, then in another.
    """

    def __init__(
        self,
        task: WrittenTask,
        source: ProblemSource,
        *,
        batch_size: int,
        seed: int,
        stream: str,
        data_order: int,
    ) -> None:
        self.task = task
        self.source = source
        self.batch_size = batch_size
        self.seed = seed
        self.labels = ("problems", stream, data_order)
        self._latest: tuple[int, Problems] | None = None

    def __call__(self, step: int) -> Problems:
        pool = self.source.pool
        if pool is not None:
            places = range(step * self.batch_size, (step + 1) * self.batch_size)
            epochs = sorted({place // len(pool) for place in places})
            order = torch.cat([self._epoch(epoch, len(pool)) for epoch in epochs])
            return pool.select(order[[place - epochs[0] * len(pool) for place in places]])
        draw, within = divmod(step, STEPS_PER_DRAW)
        if self._latest is None or self._latest[0] != draw:
            problems = self.task.problems(
                self.batch_size * STEPS_PER_DRAW,
                seed=derive_seed(self.seed, *self.labels, draw),
                split="train",
                levels=self.source.levels,
                planted=self.source.planted,
            )
            self._latest = draw, problems
        first = within * self.batch_size
        return self._latest[1].select(range(first, first + self.batch_size))

    def _epoch(self, epoch: int, n: int) -> torch.Tensor:
        generator = derive_generator(self.seed, *self.labels, "epoch", epoch)
        return torch.randperm(n, generator=generator)


@dataclass(frozen=True, kw_only=True)
class ProblemRun(Run):
    """A training run on the problems of `source`."""

    task: WrittenTask
    source: ProblemSource

    def settings(self) -> dict[str, Any]:
        return {"problems": self.source.describe()}

    @cached_property
    def batches(self) -> ProblemBatches:
        return ProblemBatches(
            self.task,
            self.source,
            batch_size=self.config.batch_size,
            seed=self.seed,
            stream=self.stream,
            data_order=self.data_order,
        )


def check_length(model: PreTrainedModel, problems: Problems, n_new: int) -> None:
    """Raise TrainingError where prompts and `n_new` tokens are more than the network has
    positions for."""
    longest = problems.tokens.shape[1] + n_new
    n_positions = model.config.get_text_config().max_position_embeddings
    if longest > n_positions:
        raise TrainingError(
            f"problems: prompts and completions have up to {longest} tokens, but the network has "
            f"{n_positions} positions; raise n_positions, or lower the levels or max_new_tokens"
        )
