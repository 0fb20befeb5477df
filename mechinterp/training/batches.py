"""The batch of each step, a function of (seed, stream, data order, step) alone."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from mechinterp.randomness import derive_seed
from mechinterp.tasks.base import Items, Task

# Tasks cost mostly per call, so items for this many steps are drawn at once.
STEPS_PER_DRAW = 32


class Batches:
    """`batches(step)` gives fresh (tokens, labels), wherever an interrupted run was taken up again.

    `stream` names the run's origin, so that a branch does not see its parent's batches again.
    """

    def __init__(
        self, task: Task, *, batch_size: int, seed: int, stream: str, data_order: int
    ) -> None:
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.labels = ("batches", stream, data_order)
        self._latest: tuple[int, Items] | None = None

    def __call__(self, step: int) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]:
        draw, within = divmod(step, STEPS_PER_DRAW)
        if self._latest is None or self._latest[0] != draw:
            draw_seed = derive_seed(self.seed, *self.labels, draw)
            n_items = self.batch_size * STEPS_PER_DRAW
            self._latest = draw, self.task.sample(n_items, seed=draw_seed, split="train")
        items = self._latest[1]
        batch = slice(within * self.batch_size, (within + 1) * self.batch_size)
        return items.tokens[batch], items.labels[batch]
