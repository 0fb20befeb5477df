"""Many independent jobs at once: worker processes with one thread each, kept warm between jobs.

Two OpenMP threads on a busy core are several times slower than one, so work is spread over
processes and never over threads. Workers are spawned: a script that calls `run_jobs` needs the
usual `if __name__ == "__main__":`.
"""

from __future__ import annotations

import heapq
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from graphlib import TopologicalSorter
from importlib import import_module
from multiprocessing import get_context, parent_process
from typing import Any

from mechinterp.errors import MechinterpError
from mechinterp.progress import progress_bar


@dataclass(frozen=True)
class Job:
    """A call of `function` (importable, or its dotted path "package.module.name") with `kwargs`.

    It starts when the jobs whose keys are in `after` have ended, which hand on results by files.
    """

    key: str
    function: Callable[..., Any] | str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class JobResult:
    """What a job returned, and the wall seconds that it took in its worker."""

    key: str
    value: Any
    seconds: float


def run_jobs(jobs: Sequence[Job], *, n_workers: int, label: str) -> Iterator[JobResult]:
    """Run `jobs` in `n_workers` processes and yield each result as it comes.

    Of the jobs that `after` allows, the first in the given order starts next. The first error ends
    the others' work and is raised, a MechinterpError with the job's key before its message. Ctrl-C,
    closing the iterator and the death of this process end the workers too.
    """
    by_key = {job.key: job for job in jobs}
    if len(by_key) < len(jobs):
        raise ValueError("two jobs have the same key")
    for job in jobs:
        if not set(job.after) <= by_key.keys():
            raise ValueError(f"job {job.key!r} comes after jobs that do not exist: {job.after}")
    order = TopologicalSorter({job.key: job.after for job in jobs})
    order.prepare()
    executor = ProcessPoolExecutor(
        n_workers, mp_context=get_context("spawn"), initializer=_start_worker
    )
    running: dict[Future[tuple[Any, float]], str] = {}
    place = {job.key: index for index, job in enumerate(jobs)}
    ready: list[tuple[int, str]] = []
    try:
        with progress_bar(label, len(jobs), unit="steps") as advance:
            while order.is_active():
                for key in order.get_ready():
                    heapq.heappush(ready, (place[key], key))
                while ready and len(running) < n_workers:
                    job = by_key[heapq.heappop(ready)[1]]
                    running[executor.submit(_call, job.function, dict(job.kwargs))] = job.key
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    key = running.pop(future)
                    value, seconds = _outcome(future, key)
                    order.done(key)
                    advance(1)
                    yield JobResult(key, value, seconds)
        executor.shutdown()
    finally:
        _end(executor)


def _outcome(future: Future[tuple[Any, float]], key: str) -> tuple[Any, float]:
    try:
        return future.result()
    except BrokenProcessPool:
        raise MechinterpError(
            f"job {key!r} or one beside it: a worker process died (out of memory?); what is done "
            "is kept, run again with fewer workers to go on"
        ) from None
    except MechinterpError as error:
        raise type(error)(f"job {key!r}: {error}") from error


def _end(executor: ProcessPoolExecutor) -> None:
    """Stop the workers now, whatever they are doing; nothing happens where they have ended."""
    # Public only from Python 3.14 on, as executor.terminate_workers().
    workers = list((executor._processes or {}).values())
    executor.shutdown(wait=False, cancel_futures=True)
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join()


def _start_worker() -> None:
    """Make this process a worker: one thread, quiet, and gone when its parent is."""
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[variable] = "1"
    # Ctrl-C reaches the whole process group; the parent alone decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    # Bars of several workers would overwrite each other; the parent shows one for all.
    sys.stderr.isatty = lambda: False
    # The variables came too late if the main module imports torch.
    import torch

    torch.set_num_threads(1)


def _die_with_parent() -> None:
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _call(function: Callable[..., Any] | str, kwargs: dict[str, Any]) -> tuple[Any, float]:
    began = time.perf_counter()
    value = _resolve(function)(**kwargs)
    return value, time.perf_counter() - began


def _resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    if not isinstance(function, str):
        return function
    module, _, name = function.rpartition(".")
    return getattr(import_module(module), name)
