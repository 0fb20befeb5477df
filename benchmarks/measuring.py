"""What the benchmarks of patching share: the clock, the peak of memory, and SmolLM2."""

from __future__ import annotations

import argparse
import os
import resource
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from mechinterp.errors import CheckpointError
from mechinterp.hooked import HookedModel


def seconds(device: torch.device) -> float:
    """A clock: CPU seconds of this process; on a GPU wall seconds, when all work on it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def peak_memory(device: torch.device) -> float:
    """Megabytes held at most so far: of the GPU by tensors, else of the machine by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--smollm2-dir", help="where SmolLM2 is kept (default: a temporary place)")
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")


@contextmanager
def smollm2(directory: str | None, device: str) -> Iterator[HookedModel]:
    """SmolLM2 from `directory`, put there if it is not; or from a temporary place."""
    from mechinterp.smollm2 import fetch_smollm2

    with tempfile.TemporaryDirectory() as temporary:
        directory = directory or temporary
        if not os.path.exists(os.path.join(directory, "config.json")):
            directory = os.path.join(directory, "smollm2")
            try:
                fetch_smollm2(directory)
            except CheckpointError as error:
                raise SystemExit(f"SmolLM2: {error}") from None
        yield HookedModel.from_checkpoint(directory, device=device)
