"""Digits: is the handwritten digit in a chosen subset of the ten?

scikit-learn ships 1,797 images of 8x8 pixels with values 0..16 (UCI Optical Recognition of
Handwritten Digits, test part). Each is pooled, quantised and read row by row as tokens. The digit
is the latent behind the decision; which digit *within* the subset is one that the decision can
forget.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_rng
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, check_utility
from mechinterp.tasks.images import (
    ImageTask,
    cell_roles,
    nearest_of_other_class,
    prompts,
)

OUTSIDE, INSIDE = 2, 3
SPLIT_SHARES = {"train": 0.5, "validation": 0.1, "test": 0.4}
# The images are split once and for all: a split that moved with the seed would leak test images.
SPLIT_SEED = 0


@dataclass(frozen=True)
class Digits(ImageTask):
    """`pool` x `pool` pixels are averaged into one position with `n_levels` grey levels.

    Training images are drawn with replacement and get fresh Gaussian noise of `train_noise` pixel
    units (of 16) before pooling; without it 900 images are learnt by heart. Other splits stay as
    is.

    `counterfactual` is "nearest" (the closest image of the other class stands in for the corrupt
    prompt) or "region" (the clean image with one half replaced by that of its nearest neighbour).
    """

    subset: tuple[int, ...] = (0, 1, 2, 3, 4)
    pool: int = 2
    n_levels: int = 8
    train_noise: float = 1.0
    counterfactual: str = "nearest"
    utility: Any = ((1.0, 0.0), (0.0, 1.0))

    name = "digits"
    pixels = 8
    white = 16.0
    actions = (OUTSIDE, INSIDE)
    action_names = ("outside", "inside")
    # `digit` is what decides; within the subset and outside it the exact digit is not needed.
    latents = (
        Latent("inside", 2, needed=True),
        Latent("digit", 10, needed=False),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "subset", tuple(sorted({int(v) for v in self.subset})))
        object.__setattr__(self, "utility", check_utility(self.utility, n=2))
        if not 0 < len(self.subset) < 10 or not set(self.subset) <= set(range(10)):
            raise TaskError(
                f"digits: subset must hold 1 to 9 of the digits 0..9, got {self.subset}"
            )
        if self.pool not in (1, 2, 4):
            raise TaskError(f"digits: pool must be 1, 2 or 4 (the images are 8x8), got {self.pool}")
        if not 2 <= self.n_levels <= 17:
            raise TaskError(f"digits: n_levels must be 2 to 17, got {self.n_levels}")
        if not self.train_noise >= 0:
            raise TaskError(f"digits: train_noise must be >= 0 pixel units, got {self.train_noise}")
        if self.counterfactual not in ("nearest", "region"):
            raise TaskError(
                f"digits: counterfactual must be 'nearest' or 'region', got {self.counterfactual!r}"
            )

    @cached_property
    def _images(self) -> tuple[np.ndarray, np.ndarray]:
        """Pixels [1797, 8, 8] in 0..16 and digits [1797]."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        return rearrange(np.asarray(pixels), "i (r c) -> i r c", r=8), np.asarray(digits)

    @cached_property
    def _split(self) -> np.ndarray:
        """Per image 0 (train), 1 (validation) or 2 (test), stratified by digit."""
        _, digits = self._images
        split = np.empty(len(digits), dtype=int)
        rng = derive_rng(SPLIT_SEED, "digits", "split")
        edges = np.cumsum(list(SPLIT_SHARES.values()))[:-1]
        for digit in range(10):
            members = rng.permutation(np.flatnonzero(digits == digit))
            cuts = np.round(edges * len(members)).astype(int)
            for part, index in enumerate(np.split(members, cuts)):
                split[index] = part
        return split

    @cached_property
    def _levels(self) -> Int[Tensor, "images cells"]:
        return self.quantise(self._images[0])

    def _items(
        self, levels: Int[Tensor, "items cells"], digits: np.ndarray, groups: np.ndarray
    ) -> Items:
        tokens = prompts(levels)
        inside = torch.from_numpy(np.isin(digits, self.subset).astype(int))
        return Items(
            tokens=tokens,
            labels=inside,
            latents={"inside": inside, "digit": torch.from_numpy(digits.astype(int))},
            groups=torch.from_numpy(groups),
            roles=np.broadcast_to(cell_roles(self.side), tokens.shape),
        )

    def _images_of(self, split: str) -> np.ndarray:
        if split not in SPLIT_SHARES:
            raise TaskError(f"digits: no split {split!r}; the splits are {', '.join(SPLIT_SHARES)}")
        return np.flatnonzero(self._split == list(SPLIT_SHARES).index(split))

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        """Distinct images in random order, all of the split if it holds fewer than `n`; from the
        training split `n` noisy draws with replacement."""
        rng = derive_rng(seed, "digits", split)
        if split == "train":
            index = rng.choice(self._images_of(split), n)
            noise = rng.normal(0.0, self.train_noise, (n, 8, 8))
            return self._items(
                self.quantise(self._images[0][index] + noise), self._images[1][index], index
            )
        index = rng.permutation(self._images_of(split))[:n]
        return self._items(self._levels[index], self._images[1][index], index)

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """Each clean image beside its nearest neighbour of the other class, or half of it."""
        images = self._images_of(split)
        digits = self._images[1]
        inside = np.isin(digits, self.subset)
        rng = derive_rng(seed, "digits", split, "pairs")
        neighbours = nearest_of_other_class(self._levels, inside, images, n, rng=rng)
        clean, nearest = neighbours.clean, neighbours.corrupt
        corrupt_levels = self._levels[nearest].clone()
        if self.counterfactual == "region":
            top = torch.arange(self.side**2) < self.side**2 // 2
            corrupt_levels[:, top] = self._levels[clean][:, top]
        differing = (corrupt_levels != self._levels[clean]).double().mean()
        quality = (
            f"approximate ({self.counterfactual}): {differing:.0%} of the positions differ; the "
            f"nearest image of the other class is {neighbours.ratio:.2f}x as far as that of its "
            "own (median)"
        )
        if self.counterfactual == "region":
            quality += "; the half-swapped image has the label of the neighbour by assumption only"
        return CounterfactualPairs(
            clean=self._items(self._levels[clean], digits[clean], clean),
            corrupt=self._items(corrupt_levels, digits[nearest], nearest),
            latent=np.full(len(clean), "inside"),
            roles=np.broadcast_to(cell_roles(self.side), (len(clean), self.n_positions)),
            quality=quality,
        )

    @property
    def posterior_latents(self) -> tuple[str, ...]:
        return ("digit",)

    def posterior_from_latents(
        self, probabilities: Mapping[str, Float[Tensor, "items values"]]
    ) -> Float[Tensor, "items labels"]:
        """The label is a function of the digit: sum the digit's probabilities over the subset."""
        inside = probabilities["digit"].double()[:, list(self.subset)].sum(1)
        return torch.stack([1 - inside, inside], dim=1)
