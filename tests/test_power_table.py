"""`mechinterp power`: plans from a pilot's table, against the planner called by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mechinterp import files
from mechinterp.cli import main
from mechinterp.errors import AnalysisError
from mechinterp.power import plan_power
from mechinterp.power_table import plan_from_measures
from mechinterp.seed_measures import COLUMNS
from mechinterp.statistics import VarianceComponents


def pilot(measure: str = "learning", **losses: list[float]) -> pd.DataFrame:
    rows = [
        ("triage", "branched", arm, seed, "w1.8", measure, value)
        for arm, values in losses.items()
        for seed, value in enumerate(values)
    ]
    columns = ["task", "regime", "arm", "seed", "costs", "measure", "value"]
    return pd.DataFrame(rows, columns=columns)[COLUMNS]


WEIGHTED = [0.31, 0.42, 0.28, 0.40, 0.35]
SYMMETRIC = [0.10, 0.12, 0.09, 0.14]  # one seed fewer


def test_a_row_plans_from_the_differences_of_shared_seeds():
    table = pilot(before=[1.0] * 5, symmetric=SYMMETRIC, weighted=WEIGHTED)
    (row,) = plan_from_measures(table, measures=["learning"], n_seeds=8).to_dict("records")
    changes = np.array(WEIGHTED[:4]) - SYMMETRIC
    plan = plan_power(VarianceComponents(changes.var(ddof=1)), n_seeds=8)
    assert (row["arm"], row["costs"], row["n_pilot"], row["n_seeds"]) == ("weighted", "w1.8", 4, 8)
    assert row["mean"] == pytest.approx(changes.mean())
    assert row["detectable"] == pytest.approx(plan.detectable)
    assert (row["seeds_damaged"], row["seeds_intact"]) == (plan.seeds_damaged, plan.seeds_intact)
    # a standard deviation at either end of the interval would be seen above or below this one in
    # 2.5% of pilots
    for bound, tail in (("sd_low", stats.chi2.sf), ("sd_high", stats.chi2.cdf)):
        assert tail(3 * (row["sd"] / row[bound]) ** 2, 3) == pytest.approx(0.025)


def test_what_a_table_cannot_answer_is_refused():
    table = pilot(symmetric=SYMMETRIC, weighted=WEIGHTED)
    with pytest.raises(AnalysisError, match="'regret' is not in the table; it has learning"):
        plan_from_measures(table, measures=["regret"])
    with pytest.raises(AnalysisError, match="in two seeds of 'focal'"):
        plan_from_measures(table, measures=["learning"], against="focal")


def test_the_command(tmp_path, capsys):
    noisy = [0.0, 90.0, -90.0, 10.0]
    files.write_table(
        tmp_path / "measures.parquet",
        pd.concat(
            [pilot(symmetric=SYMMETRIC, weighted=WEIGHTED, noisy=noisy), pilot("choosing", a=[0.0])]
        ),
    )
    with pytest.raises(SystemExit) as stop:
        main(["power", str(tmp_path), "--seeds", "8", "--effect", "0.3"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "seeds that a change of 0.3 takes" in printed
    weighted, hopeless = (
        next(line.split() for line in printed.splitlines() if f" {arm} " in line)
        for arm in ("weighted", "noisy")
    )
    plan = plan_power(
        VarianceComponents(float(np.var(np.array(WEIGHTED[:4]) - SYMMETRIC, ddof=1))),
        n_seeds=8,
        effect=0.3,
    )
    assert weighted[-3:] == [
        f"{plan.detectable:.3f}",
        str(plan.seeds_damaged),
        str(plan.seeds_intact),
    ]
    assert hopeless[-2:] == ["-", "-"]


def test_the_command_refuses_in_one_line(tmp_path, capsys):
    files.write_table(tmp_path / "measures.parquet", pd.DataFrame({"task": ["triage"]}))
    with pytest.raises(SystemExit) as stop:
        main(["power", str(tmp_path)])
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "measures.parquet: has no column regime, arm" in error
    assert error.count("\n") == 1
