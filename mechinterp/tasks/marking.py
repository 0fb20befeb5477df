"""Marking by functions that are not ours: one that raises, hangs or returns no number is named."""

from __future__ import annotations

import contextlib
import math
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from mechinterp.errors import TaskError

AGAIN_AFTER = 0.1  # seconds


def guarded(function: Callable[..., Any], *arguments: Any, item: str, seconds: float) -> float:
    """`function(*arguments)` as a float.

    Raises TaskError, with `item` in its message, if it raises, takes longer than `seconds`, or
    returns anything but a finite number.
    """
    name = getattr(function, "__qualname__", repr(function))
    try:
        with time_limit(seconds):
            value = float(function(*arguments))
    except _TimeOut:
        raise TaskError(f"{item}: {name} took longer than {seconds:g} s") from None
    except Exception as error:
        raise TaskError(f"{item}: {name} raised {type(error).__name__}: {error}") from error
    if not math.isfinite(value):
        raise TaskError(f"{item}: {name} returned {value}")
    return value


class _TimeOut(BaseException):
    """Not an Exception: what is interrupted may catch those."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Interrupt what runs within after `seconds`, by a signal.

    Only Python code in the main thread can be interrupted; in another thread there is no limit.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    expired = False

    def interrupt(*_: Any) -> None:
        nonlocal expired
        expired = True
        raise _TimeOut

    before = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: a bare "except:" may swallow the first, and what hangs go on hanging.
    signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_AFTER)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    if expired:
        raise _TimeOut
