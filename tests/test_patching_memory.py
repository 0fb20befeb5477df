"""Batches that do not fit are halved until they do, and nothing is done twice or left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.patching.memory import halving, memory_budget


@given(n=st.integers(0, 40), size=st.integers(1, 50), fits=st.integers(1, 20))
def test_every_row_is_done_once_whatever_fits(n, size, fits):
    done, asked = [], []

    def work(rows):
        asked.append(len(rows))
        if len(rows) > fits:
            raise torch.OutOfMemoryError("out of memory")
        done.extend(rows.tolist())

    halving(work, torch.arange(n), size)
    assert done == list(range(n))
    assert max(asked, default=0) <= min(size, n)


def test_the_processors_allocator_counts_too():
    tries = []

    def work(rows):
        tries.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")

    halving(work, torch.arange(4), 4)
    assert tries == [4, 2, 2]


def test_other_errors_and_single_rows_are_raised():
    def wrong(rows):
        raise RuntimeError("shapes differ")

    def too_big(rows):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RuntimeError, match="shapes differ"):
        halving(wrong, torch.arange(4), 4)
    with pytest.raises(torch.OutOfMemoryError):
        halving(too_big, torch.arange(4), 4)


def test_the_budget_is_a_share_of_what_is_free():
    assert 2**20 < memory_budget(torch.device("cpu")) <= 2**28
