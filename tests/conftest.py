"""What all tests share."""

from __future__ import annotations

import signal

# A background job of a shell ignores Ctrl-C, and so would every process that tests start from it.
signal.signal(signal.SIGINT, signal.default_int_handler)
