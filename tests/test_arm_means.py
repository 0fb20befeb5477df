"""The numbers of a page's prose: those of the claims, where a claim asks for the same."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[1]
TABLES = ROOT / "docs/findings/hard_samples/tables"
KEYS = ["task", "regime", "arm", "costs"]

spec = importlib.util.spec_from_file_location("arm_means", ROOT / "docs/examples/arm_means.py")
assert spec is not None
assert spec.loader is not None
arm_means = importlib.util.module_from_spec(spec)
spec.loader.exec_module(arm_means)


def rows_of(measure: str) -> pd.DataFrame:
    table = pd.read_parquet(TABLES / "measures.parquet")
    return table[table["measure"] == measure]


@pytest.mark.parametrize(
    ("claim", "measure", "against"),
    [("damages_learning", "learning", "symmetric"), ("works", "change_pass_1", None)],
)
def test_means_are_those_of_the_claims(claim, measure, against):
    claims = pd.read_csv(TABLES / "claims.csv", keep_default_na=False)
    claimed = claims[claims["claim"] == claim].set_index(KEYS)[["mean", "low", "high"]]
    assert len(claimed)
    found = arm_means.means(rows_of(measure), against).loc[claimed.index, claimed.columns]
    pd.testing.assert_frame_equal(found, claimed, rtol=1e-4)


def test_only_where_an_arm_ends():
    cell = {"task": "t", "regime": "branched", "measure": "reward"}
    table = pd.DataFrame(
        [
            {**cell, "arm": arm, "seed": seed, "step": step, "value": float(step + seed)}
            for arm, end in (("short", 10), ("long", 100))
            for seed in (0, 1)
            for step in (0, end)
        ]
    )
    found = arm_means.means(arm_means.final_steps(table), None)
    assert found["mean"].tolist() == [10.5, 100.5]
    assert found["smallest"].tolist() == [10, 100]
