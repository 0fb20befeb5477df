"""Errors as a user of a command sees them: one line and a non-zero exit status."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from mechinterp.errors import MechinterpError


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Exit with status 2 and one line for a user's error, with 130 for Ctrl-C.

    Anything else is a defect of ours and keeps its traceback.
    """
    try:
        yield
    except MechinterpError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped; what is done is kept, the same command goes on from here", file=sys.stderr)
        sys.exit(130)
