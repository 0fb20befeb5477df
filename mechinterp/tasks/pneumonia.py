"""Pneumonia: does a chest X-ray of a child show pneumonia?

PneumoniaMNIST of MedMNIST v2 (Yang et al. 2023, Scientific Data 10:41; CC BY 4.0), 28x28 pixels in
0..255, from a file that the user gives. Each image is pooled, quantised and read row by row as
tokens. Its own training, validation and test parts are kept; validation images that also stand in
the training part are left out.
"""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_rng
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, check_utility
from mechinterp.tasks.images import (
    ImageTask,
    cell_roles,
    nearest_of_other_class,
    prompts,
)

NORMAL, PNEUMONIA = 2, 3
PARTS = {"train": "train", "validation": "val", "test": "test"}  # split -> MedMNIST's name
SOURCE = "download pneumoniamnist.npz (28 x 28) from https://medmnist.com and give its path"
N_BANDS = 3
# An image's number counts from 0 in every split, its group does not.
_FIRST_GROUP = {split: 1_000_000 * k for k, split in enumerate(PARTS)}
# Which images stay when classes are matched is fixed once and for all.
MATCHING_SEED = 0


@dataclass(frozen=True)
class Pneumonia(ImageTask):
    """`pool` x `pool` pixels are averaged into one position with `n_levels` grey levels.

    Pneumonia is the majority (about 3 in 4): `prevalence` "natural" keeps the file's, "matched"
    leaves out images of the larger class until both are equal. Training images are drawn with
    replacement and get fresh Gaussian noise of `train_noise` pixel units (of 255) before pooling.

    What the decision can do without: `exposure`, the band (darkest third, middle, brightest) of the
    image's mean grey level among the training images.
    """

    path: str
    prevalence: str = "natural"
    pool: int = 4
    n_levels: int = 8
    train_noise: float = 16.0
    utility: Any = ((1.0, 0.0), (0.0, 1.0))

    name = "pneumonia"
    pixels = 28
    white = 255.0
    actions = (NORMAL, PNEUMONIA)
    action_names = ("normal", "pneumonia")
    latents = (
        Latent("pneumonia", 2, needed=True),
        Latent("exposure", N_BANDS, needed=False),
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", str(self.path))
        object.__setattr__(self, "utility", check_utility(self.utility, n=2))
        if self.prevalence not in ("natural", "matched"):
            raise TaskError(
                f"pneumonia: prevalence must be 'natural' or 'matched', got {self.prevalence!r}"
            )
        if self.pool not in (2, 4, 7):
            raise TaskError(f"pneumonia: pool must be 2, 4 or 7, got {self.pool}")
        if not 2 <= self.n_levels <= 256:
            raise TaskError(f"pneumonia: n_levels must be 2 to 256, got {self.n_levels}")
        if not self.train_noise >= 0:
            raise TaskError(f"pneumonia: train_noise must be >= 0, got {self.train_noise}")

    @cached_property
    def _parts(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """split -> pixels [images, 28, 28] in 0..255 and labels [images]."""
        parts = _read(Path(self.path))
        seen = {image.tobytes() for image in parts["train"][0]}
        images, labels = parts["validation"]
        new = np.array([image.tobytes() not in seen for image in images])
        parts["validation"] = images[new], labels[new]
        if self.prevalence == "matched":
            return {split: _matched(split, *part) for split, part in parts.items()}
        return parts

    @cached_property
    def _edges(self) -> np.ndarray:
        """Mean grey levels that part the training images into bands of equal size."""
        means = self._parts["train"][0].mean((1, 2))
        return np.quantile(means, np.arange(1, N_BANDS) / N_BANDS)

    def _part(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        if split not in PARTS:
            raise TaskError(f"pneumonia: no split {split!r}; the splits are {', '.join(PARTS)}")
        return self._parts[split]

    def _items(self, split: str, index: np.ndarray, noise: np.ndarray | float = 0.0) -> Items:
        images, labels = self._part(split)
        bands = np.digitize(images[index].mean((1, 2)), self._edges)
        label = torch.from_numpy(labels[index].astype(int))
        tokens = prompts(self.quantise(images[index] + noise))
        return Items(
            tokens=tokens,
            labels=label,
            latents={"pneumonia": label, "exposure": torch.from_numpy(bands)},
            groups=torch.from_numpy(index + _FIRST_GROUP[split]),
            roles=np.broadcast_to(cell_roles(self.side), tokens.shape),
        )

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        """Distinct images in random order, all of the split if it holds fewer than `n`; from the
        training split `n` noisy draws with replacement."""
        images, _ = self._part(split)
        rng = derive_rng(seed, "pneumonia", split)
        if split == "train":
            index = rng.choice(len(images), n)
            return self._items(split, index, rng.normal(0.0, self.train_noise, (n, 28, 28)))
        return self._items(split, rng.permutation(len(images))[:n])

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """Each clean image beside the most similar one of the other class."""
        images, labels = self._part(split)
        levels = self.quantise(images.astype(float))
        neighbours = nearest_of_other_class(
            levels,
            labels == 1,
            np.arange(len(images)),
            n,
            rng=derive_rng(seed, "pneumonia", split, "pairs"),
        )
        clean, corrupt = (self._items(split, i) for i in (neighbours.clean, neighbours.corrupt))
        differing = (clean.tokens != corrupt.tokens)[:, 1:-1].double().mean()
        return CounterfactualPairs(
            clean=clean,
            corrupt=corrupt,
            latent=np.full(len(clean), "pneumonia"),
            roles=clean.roles,
            quality=(
                f"approximate: {differing:.0%} of the positions differ; the nearest image of the "
                f"other class is {neighbours.ratio:.2f}x as far as that of its own (median)"
            ),
        )


def _read(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Images and labels of every split; raises TaskError naming the file and what it lacks."""
    if not path.is_file():
        raise TaskError(f"pneumonia: path: no file {path}; {SOURCE}")
    parts = {}
    try:
        with np.load(path, allow_pickle=False) as arrays:
            for split, part in PARTS.items():
                images, labels = arrays[f"{part}_images"], arrays[f"{part}_labels"].squeeze()
                if images.shape != (len(labels), 28, 28) or not np.isin(labels, (0, 1)).all():
                    raise TaskError(
                        f"{path}: {part}_images: expected [images, 28, 28] and labels 0 or 1, got "
                        f"{list(images.shape)}; {SOURCE}"
                    )
                parts[split] = images, labels
    except KeyError as error:
        raise TaskError(f"{path}: has no array {error.args[0]}; {SOURCE}") from error
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise TaskError(f"{path}: not an .npz file of arrays ({error}); {SOURCE}") from error
    return parts


def _matched(split: str, images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many images of one class as of the other, in the order of the file."""
    rng = derive_rng(MATCHING_SEED, "pneumonia", "matched", split)
    n = np.bincount(labels, minlength=2).min()
    kept = [rng.permutation(np.flatnonzero(labels == label))[:n] for label in (0, 1)]
    index = np.sort(np.concatenate(kept))
    return images[index], labels[index]
