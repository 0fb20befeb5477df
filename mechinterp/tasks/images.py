"""Images as prompts: pooled, quantised, read row by row as tokens; and images much like others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.tasks.base import Items, Task

START, DECIDE = 0, 1
FIRST_LEVEL = 4  # after START, DECIDE and the two actions


class ImageTask(Task):
    """A task on square images: `pool` x `pool` pixels make a position of `n_levels` grey levels."""

    pool: int
    n_levels: int
    pixels: int  # per side of an image
    white: float  # the largest value of a pixel

    @property
    def side(self) -> int:
        """Positions per image row."""
        return self.pixels // self.pool

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return FIRST_LEVEL + self.n_levels

    @property
    def n_positions(self) -> int:  # type: ignore[override]
        return self.side**2 + 2

    def quantise(
        self, images: Float[np.ndarray, "images rows cols"]
    ) -> Int[Tensor, "images cells"]:
        """Grey levels 0 .. n_levels - 1 of the means of `pool` x `pool` pixels."""
        pooled = reduce(images, "i (r p) (c q) -> i (r c)", "mean", p=self.pool, q=self.pool)
        levels = np.floor(pooled / self.white * self.n_levels).astype(int)
        return torch.from_numpy(levels.clip(0, self.n_levels - 1))

    def control_types(self, items: Items) -> Int[Tensor, " items"]:
        """Two cells in the middle of the image; those at its border are nearly always dark."""
        middle = 1 + (self.side // 2) * self.side + self.side // 2
        first, second = items.tokens[:, middle - 1], items.tokens[:, middle]
        return first * self.vocab_size + second

    def baseline_features(self, items: Items) -> Float[Tensor, "items features"]:
        """Grey levels in 0..1: the image as a linear model would take it."""
        return (items.tokens[:, 1:-1] - FIRST_LEVEL).float() / (self.n_levels - 1)


def prompts(levels: Int[Tensor, "images cells"]) -> Int[Tensor, "images positions"]:
    """START, the grey levels as tokens, DECIDE."""
    tokens = torch.full((len(levels), levels.shape[1] + 2), START)
    tokens[:, 1:-1] = FIRST_LEVEL + levels
    tokens[:, -1] = DECIDE
    return tokens


def cell_roles(side: int) -> np.ndarray:
    """What stands at each position of the prompt of a square image."""
    cells = [f"row {r} col {c}" for r in range(side) for c in range(side)]
    return np.array(["start", *cells, "decision"])


@dataclass(frozen=True)
class Neighbours:
    """Images, each beside the most similar one of the other class.

    `ratio` is the median of how much farther that is than the most similar one of its own class.
    """

    clean: Int[np.ndarray, " pairs"]
    corrupt: Int[np.ndarray, " pairs"]
    ratio: float


def nearest_of_other_class(
    levels: Int[Tensor, "images cells"],
    positive: Bool[np.ndarray, " images"],
    images: Int[np.ndarray, " candidates"],
    n: int,
    *,
    rng: np.random.Generator,
) -> Neighbours:
    """`n` pairs among `images`, positive and negative clean ones in turn."""
    clean = rng.permutation(images)
    clean = np.concatenate(
        [np.resize(clean[positive[clean] == side], -(-n // 2)) for side in (True, False)]
    )
    clean = clean.reshape(2, -1).T.flatten()[:n]
    distance = torch.cdist(levels[clean].double(), levels[images].double()).numpy()
    same_class = positive[clean][:, None] == positive[images][None]
    to_other = np.where(same_class, np.inf, distance)
    to_own = np.where(same_class & (clean[:, None] != images[None]), distance, np.inf)
    with np.errstate(divide="ignore"):  # two images with the same levels are at distance 0
        ratio = float(np.median(to_other.min(1) / to_own.min(1)))
    return Neighbours(clean, images[to_other.argmin(1)], ratio)
