"""Images as prompts: pooled, quantised, read row by row as tokens; and images much like others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from einops import reduce
from jaxtyping import Bool, Float, Int
from torch import Tensor

START, DECIDE = 0, 1
FIRST_LEVEL = 4  # after START, DECIDE and the two actions


def quantise(
    pixels: Float[np.ndarray, "images rows cols"], *, pool: int, n_levels: int, white: float
) -> Int[Tensor, "images cells"]:
    """Grey levels 0 .. n_levels - 1 of the means of `pool` x `pool` pixels in 0 .. `white`."""
    pooled = reduce(pixels, "i (r p) (c q) -> i (r c)", "mean", p=pool, q=pool)
    levels = np.floor(pooled / white * n_levels).astype(int)
    return torch.from_numpy(levels.clip(0, n_levels - 1))


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


def middle_cells(tokens: Int[Tensor, "items positions"], side: int) -> Int[Tensor, " items"]:
    """Two cells in the middle of the image as one number: what a control task's types are."""
    middle = 1 + (side // 2) * side + side // 2
    return tokens[:, middle - 1] * (int(tokens.max()) + 1) + tokens[:, middle]


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
