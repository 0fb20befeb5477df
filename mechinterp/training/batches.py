"""The batch of each step, a function of (seed, stream, data order, step) alone."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.randomness import derive_generator, derive_seed
from mechinterp.tasks.base import Items, Task
from mechinterp.training.sampling import Losses, Sampling

# Tasks cost mostly per call, so items for this many steps are drawn at once.
STEPS_PER_DRAW = 32


class Batches:
    """`batches(step)` gives fresh (tokens, labels), wherever an interrupted run was taken up again.

    `stream` names the run's origin, so that a branch does not see its parent's batches again.
    `sampling` chooses which items they are, by the `losses` of the run's start where it needs them.
    """

    def __init__(
        self,
        task: Task,
        *,
        batch_size: int,
        seed: int,
        stream: str,
        data_order: int,
        sampling: Sampling | None = None,
        losses: Losses | None = None,
    ) -> None:
        self.task = task
        self.batch_size = batch_size
        self.seed = seed
        self.labels = ("batches", stream, data_order)
        self.sampling = sampling
        self.losses = losses
        self._latest: tuple[int, Items] | None = None

    def __call__(self, step: int) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]:
        draw, within = divmod(step, STEPS_PER_DRAW)
        if self._latest is None or self._latest[0] != draw:
            self._latest = draw, self._draw(draw)
        items = self._latest[1]
        size = max(1, len(items) // STEPS_PER_DRAW)  # a sampling may leave fewer than batch_size
        batch = slice(within * size, (within + 1) * size)
        return items.tokens[batch], items.labels[batch]

    def _draw(self, draw: int) -> Items:
        n_items = self.batch_size * STEPS_PER_DRAW
        draw_seed = derive_seed(self.seed, *self.labels, draw)

        def fresh(n: int) -> Items:
            return self.task.sample(n, seed=draw_seed, split="train")

        if self.sampling is None:
            return fresh(n_items)
        generator = derive_generator(self.seed, *self.labels, draw, "sampling")
        chosen = self.sampling(fresh, n_items, generator=generator, losses=self.losses)
        # The hardest come sorted: every batch of the draw is to be alike.
        return chosen.select(torch.randperm(len(chosen), generator=generator))
