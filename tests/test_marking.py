"""Marking functions that raise, hang, swallow what interrupts them, or return no number."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
import time

import pytest

from mechinterp.errors import TaskError
from mechinterp.tasks.marking import guarded


def forever() -> float:
    while True:
        pass


def stubborn() -> float:
    """Catches whatever interrupts it, as careless scorers do."""
    end = time.monotonic() + 2
    while time.monotonic() < end:
        try:
            forever()
        except BaseException:
            continue
    return 1.0


def call(function, *arguments, seconds=0.2):
    return guarded(function, *arguments, item="problem 3", seconds=seconds)


def test_a_good_function_gives_its_value():
    assert call(max, 2, 5) == 5.0
    assert call(lambda: True) == 1.0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (forever, r"problem 3: forever took longer than 0\.2 s"),
        (stubborn, r"problem 3: stubborn took longer than 0\.2 s"),
        (lambda: 1 / 0, "problem 3: .* raised ZeroDivisionError: division by zero"),
        (lambda: math.nan, "problem 3: .* returned nan"),
        (lambda: math.inf, "problem 3: .* returned inf"),
        (lambda: None, "problem 3: .* raised TypeError"),
    ],
)
def test_what_goes_wrong_is_named(function, message):
    with pytest.raises(TaskError, match=message):
        call(function)


def test_the_alarm_is_left_as_it_was():
    handler = signal.getsignal(signal.SIGALRM)
    for function in (forever, lambda: 1.0):
        with contextlib.suppress(TaskError):
            call(function)
        assert signal.getsignal(signal.SIGALRM) is handler
        assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_in_another_thread_there_is_no_limit():
    found = []
    thread = threading.Thread(target=lambda: found.append(call(lambda: 2.0)))
    thread.start()
    thread.join()
    assert found == [2.0]
