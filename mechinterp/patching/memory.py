"""How much a sweep may hold at once: a budget from what is free, and halving when it was wrong."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.hooked import HookedModel

Result = TypeVar("Result")

# Larger batches are no faster on a processor, whose caches they leave.
MOST_ON_CPU = 256 * 2**20


def memory_budget(device: torch.device, memory_mb: float | None = None) -> int:
    """Bytes for one batch: `memory_mb` if given; else two fifths of a GPU's free memory, or a
    quarter of a machine's up to a cap.

    The rest is for what an estimate by shapes does not see.
    """
    if memory_mb is not None:
        return int(memory_mb * 2**20)
    if device.type == "cuda":
        return int(0.4 * torch.cuda.mem_get_info(device)[0])
    try:
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not known on this system
        free = 4 * MOST_ON_CPU
    return min(MOST_ON_CPU, free // 4)


def items_per_batch(
    model: HookedModel, tokens: Int[Tensor, "items positions"], n_grains: int, budget: int
) -> int:
    """How many items' recorded runs fit the budget."""
    width = (3 + 2 * n_grains) * max(model.d_model, model.n_heads * model.d_head)
    width += 2 * model.n_kv_heads * model.d_head
    per_item = tokens.shape[1] * model.n_layers * width * model.dtype.itemsize
    return max(1, budget // per_item)


def rows_per_batch(model: HookedModel, n_positions: int, start: int, budget: int) -> int:
    """How many rows can go through one block at a time: stream, MLP, scores, keys and values."""
    per_token = 6 * model.d_model + 3 * model.d_mlp + 3 * model.n_heads * n_positions
    keys_and_values = 4 * n_positions * model.n_kv_heads * model.d_head
    per_row = ((n_positions - start) * per_token + keys_and_values) * model.dtype.itemsize
    return max(1, budget // per_row)


def in_batches(work: Callable[[slice, int], Result], n_rows: int, size: int) -> list[Result]:
    """What `work(rows, size)` returns for consecutive slices of at most `size` rows; where memory
    runs out, `size` is halved and the slice is done again. `work` may also use `size` to decide
    how much it does at once with its rows.

    The work must leave nothing behind when it fails. Raises the error where one row is too much.
    """
    results, done = [], 0
    while done < n_rows:
        rows = slice(done, min(done + size, n_rows))
        try:
            results.append(work(rows, size))
        except (MemoryError, RuntimeError) as error:  # torch.OutOfMemoryError is a RuntimeError
            if size == 1 or not _is_out_of_memory(error):
                raise
            size //= 2
        else:
            done = rows.stop
            continue
        if torch.cuda.is_available():  # outside the handler, which keeps the failed work alive
            torch.cuda.empty_cache()
    return results


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    words = ("can't allocate memory", "not enough memory", "out of memory", "DefaultCPUAllocator")
    return any(word in str(error) for word in words)
