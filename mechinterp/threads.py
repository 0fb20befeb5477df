"""One guard against a trap: two OpenMP threads on a busy core are several times slower than one."""

from __future__ import annotations

import os
import sys


def limit_threads(n: int = 1) -> None:
    """Use `n` threads for tensor arithmetic, in this process and in those that it starts.

    Idle threads sleep rather than spin (`OMP_WAIT_POLICY=PASSIVE`, unless the user has set it); in
    this process that holds only if torch is not imported yet. A program calls this before its work;
    nothing in the library calls it for itself.
    """
    os.environ["OMP_NUM_THREADS"] = str(n)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(n)
