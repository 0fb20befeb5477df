"""Batches that do not fit are halved until they do, and nothing is done twice or left out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechinterp.patching.memory import in_batches, memory_budget


@given(n=st.integers(0, 40), size=st.integers(1, 50), fits=st.integers(1, 20))
def test_every_row_is_done_once_whatever_fits(n, size, fits):
    done, asked = [], []

    def work(rows, _):
        asked.append(rows.stop - rows.start)
        if asked[-1] > fits:
            raise torch.OutOfMemoryError("out of memory")
        done.extend(range(rows.start, rows.stop))
        return asked[-1]

    assert sum(in_batches(work, n, size)) == n
    assert done == list(range(n))
    assert max(asked, default=0) <= min(size, n)


def test_the_processors_allocator_counts_too():
    tries = []

    def work(rows, _):
        tries.append(rows.stop - rows.start)
        if tries[-1] > 2:
            raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: ...")

    in_batches(work, 4, 4)
    assert tries == [4, 2, 2]


def test_other_errors_and_single_rows_are_raised():
    def wrong(rows, _):
        raise RuntimeError("shapes differ")

    def too_big(rows, _):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(RuntimeError, match="shapes differ"):
        in_batches(wrong, 4, 4)
    with pytest.raises(torch.OutOfMemoryError):
        in_batches(too_big, 4, 4)


def test_the_budget_is_a_share_of_what_is_free():
    assert 2**20 < memory_budget(torch.device("cpu")) <= 2**28
