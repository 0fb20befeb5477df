"""The pool: which job starts next."""

from __future__ import annotations

import time

from mechinterp.training.pool import Job, run_jobs


def wait_a_moment() -> float:
    time.sleep(0.05)
    return time.time()


def test_what_waited_goes_before_what_comes_later_in_the_list():
    """With one worker: a, then b, which waited for a, before c and d that were free all along."""
    jobs = [
        Job("a", wait_a_moment),
        Job("b", wait_a_moment, after=("a",)),
        Job("c", wait_a_moment),
        Job("d", wait_a_moment),
    ]
    ends = {result.key: result.value for result in run_jobs(jobs, n_workers=1, label="test")}
    assert sorted(ends, key=lambda key: ends[key]) == ["a", "b", "c", "d"]
