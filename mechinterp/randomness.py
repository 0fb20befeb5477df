"""Random streams named by (seed, labels), so that order and worker count change nothing."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch


def derive_seed(seed: int, *labels: object) -> int:
    """A 63-bit seed for the stream `labels` of `seed`; the same in every process and on every
    machine.
    """
    key = ":".join([str(int(seed)), *(str(label) for label in labels)]).encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8], "little") & 0x7FFF_FFFF_FFFF_FFFF


def derive_generator(seed: int, *labels: object) -> torch.Generator:
    """A CPU `torch.Generator` for the stream `labels` of `seed`."""
    import torch

    return torch.Generator(device="cpu").manual_seed(derive_seed(seed, *labels))


def derive_rng(seed: int, *labels: object) -> np.random.Generator:
    """A `numpy.random.Generator` for the stream `labels` of `seed`."""
    import numpy as np

    return np.random.default_rng(derive_seed(seed, *labels))
