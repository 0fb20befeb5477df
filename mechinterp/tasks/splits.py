"""Which split a group of items belongs to: by what the group is, the same everywhere."""

from __future__ import annotations

from typing import NoReturn

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import TaskError

# Of ten groups, to which split each goes where they are dealt out.
HAND = "train test train validation train test train test train validation".split()
SPLITS = {split: HAND.count(split) / len(HAND) for split in ("train", "validation", "test")}


def in_split(groups: Int[Tensor, "..."], split: str) -> Bool[Tensor, "..."]:
    """Whether each group, a number that is not negative, is of `split`; raises TaskError for an
    unknown one."""
    if split not in SPLITS:
        refuse_split(split)
    edges = np.cumsum([0.0, *SPLITS.values()])
    part = list(SPLITS).index(split)
    share = _hash(groups.numpy().astype(np.uint64)) / 2.0**64
    return torch.from_numpy((share >= edges[part]) & (share < edges[part + 1]))


def deal(groups: Int[Tensor, " groups"], *keys: Tensor) -> dict[str, Int[Tensor, " of_split"]]:
    """The groups of each split, when all are ordered by `keys`, the first first and ties by hash,
    and every ten in a row are shared out: each split has its part of every stretch. For groups so
    few, or so unequal, that a hash alone leaves the splits unlike."""
    ties = _hash(groups.numpy().astype(np.uint64))
    order = np.lexsort([ties, *(key.numpy() for key in reversed(keys))])
    given = np.resize(HAND, len(groups))
    return {split: groups[order[given == split]] for split in SPLITS}


def refuse_split(split: str) -> NoReturn:
    raise TaskError(f"no split {split!r}; the splits are {', '.join(SPLITS)}")


def _hash(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele et al. 2014), one to one on 64 bits."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
