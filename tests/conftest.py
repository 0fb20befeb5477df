"""What all tests share."""

from __future__ import annotations

import signal

import pandas as pd
import pytest
from figure_checks import FEW_STEPS
from table_factory import pair_tables, study_tables

# A background job of a shell ignores Ctrl-C, and so would every process that tests start from it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def study() -> dict[str, pd.DataFrame]:
    return study_tables(regimes=("branched",), seeds=3, steps=FEW_STEPS)


@pytest.fixture(scope="session")
def from_init() -> dict[str, pd.DataFrame]:
    return study_tables(tasks=("digits",), regimes=("from_init",), seeds=3, steps=FEW_STEPS)


@pytest.fixture(scope="session")
def pair() -> dict[str, pd.DataFrame]:
    return pair_tables()
