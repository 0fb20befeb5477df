"""Coverage and size at 8 seeds of 200 skewed items; benchmarks/coverage.py has the other sizes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

# By its path: on sys.path, benchmarks/ would hide the package `probes` behind its probes.py.
PATH = Path(__file__).parent.parent / "benchmarks" / "coverage.py"
SPEC = importlib.util.spec_from_file_location("coverage_benchmark", PATH)
assert SPEC is not None
coverage = sys.modules["coverage_benchmark"] = importlib.util.module_from_spec(SPEC)
assert SPEC.loader is not None
SPEC.loader.exec_module(coverage)

INTERVALS = ["t_interval", "hierarchical_bootstrap_interval", "bootstrap_t_interval"]


@pytest.fixture(scope="module")
def rates():
    table = coverage.simulate("normal", 8, 200, n_trials=800, n_resamples=400)
    return table.set_index("procedure")


@pytest.mark.parametrize("interval", [*INTERVALS, "bootstrap_t_interval, items of one run"])
def test_intervals_cover_in_93_to_97_percent(rates, interval):
    """As far as 800 trials can tell: one that covers in 90 percent would be found out."""
    found = rates.loc[f"covers: {interval}"]
    assert found["high"] >= 0.93
    assert found["low"] <= 0.97


def test_no_test_is_wrong_more_often_than_it_says(rates):
    tests = rates[rates.index.str.startswith("wrong")]
    assert len(tests) == 8
    assert (tests["low"] <= tests["nominal"]).all(), tests


def test_error_rates_that_are_reached_and_that_are_not(rates):
    """At the margin of one side alone the intersection-union test is as wrong as it may be; with
    nothing on either side it all but never is."""
    one, none = (
        rates.loc[f"wrong: double_dissociation, {of}"] for of in ("one of two", "none of two")
    )
    assert one["high"] > 0.05 > 0.02 > none["rate"]


def test_the_simulation_would_find_an_interval_that_is_too_narrow(monkeypatch):
    """Items pooled as if they were of one run: the seeds are forgotten."""

    def pooled(trial) -> bool:
        interval = coverage.statistics.t_interval(trial.effects[0].ravel())
        return interval.low <= 0 <= interval.high

    monkeypatch.setitem(coverage.PROCEDURES, "pooled", (0.95, pooled))
    table = coverage.simulate("normal", 8, 2_000, n_trials=100, procedures=["pooled"])
    assert table["high"].item() < 0.8
