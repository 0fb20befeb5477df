"""A finding's claims, judged from one number per run: replicated, reversed, null, or who knows?

A cell of a claim is a task, a regime and an arm. With the differences arm - reference of its seeds,
the margin m and the claimed direction:

    replicated    the 95% t interval lies beyond m in the claimed direction
    reversed      beyond m in the other
    null          the 90% interval lies within (-m, +m): two one-sided tests at 5%
    inconclusive  anything else; `p` and the interval say how far it leans

`p` is that of the t test of no difference, `p_holm` adjusted for all cells of the claim (Holm
1979): what is replicated or reversed must also have p_holm < 0.05. A cell is `void` where a
symmetric network of the task is not competent, and `not powered` with too few seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mechinterp import files
from mechinterp.arm_names import kind_and_advantage, kind_and_weights
from mechinterp.errors import AnalysisError
from mechinterp.statistics import equivalence_test, holm, t_interval, t_test
from mechinterp.verdict import state_of

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.spec import Claim, StudySpec

LEVEL = 0.05
COLUMNS = [
    "claim",
    "task",
    "regime",
    "arm",
    "against",
    "costs",
    "measure",
    "expected",
    "mean",
    "low",
    "high",
    "n_seeds",
    "p",
    "p_holm",
    "margin",
    "outcome",
    "question",
]


def judge_saved(spec: str | Path, tables: str | Path) -> tuple[StudySpec, pd.DataFrame]:
    """The claims of the spec from saved tables `measures` and `competence`.

    Writes `claims.parquet` beside them, for figures, and `claims.csv`, for people. Raises
    AnalysisError where a table is absent.
    """
    from mechinterp.plans import load_plan

    loaded = load_plan(spec).spec
    measures, competence = (read_saved(Path(tables), name) for name in ("measures", "competence"))
    judged = judge_claims(loaded, measures, competence)
    files.write_table(Path(tables) / "claims.parquet", judged)
    with files.atomic_file(Path(tables) / "claims.csv") as temporary:
        judged.to_csv(temporary, index=False, float_format="%.6g")
    return loaded, judged


def read_saved(tables: Path, name: str) -> pd.DataFrame:
    path = tables / f"{name}.parquet"
    if not path.is_file():
        raise AnalysisError(f"{path}: no such table; give OUT/tables of a study")
    return files.read_table(path)


def judge_claims(spec: StudySpec, measures: pd.DataFrame, competence: pd.DataFrame) -> pd.DataFrame:
    """One row per cell of each of the spec's claims, in their order; see the columns.

    `measures` as `mechinterp.seed_measures` makes them; cells without any are left out.
    """
    import pandas as pd

    incompetent = set(competence.loc[~competence["competent"].astype(bool), "task"])
    rows: list[dict[str, Any]] = []
    for name, claim in spec.claims.items():
        cells = list(_cells(name, claim, measures, margin=claim.margin or spec.margin))
        p_values = [row["p"] for row in cells if np.isfinite(row["p"])]
        adjusted = iter(holm(p_values) if p_values else [])
        for row in cells:
            row["p_holm"] = next(adjusted) if np.isfinite(row["p"]) else float("nan")
            changes = row.pop("changes")
            if row["task"] in incompetent:
                row["outcome"] = "void"
            elif row["n_seeds"] < spec.seeds_for_claims:
                row["outcome"] = "not powered"
            else:
                row["outcome"] = _outcome(changes, row)
        rows += cells
    return pd.DataFrame(rows, columns=COLUMNS)


def _cells(
    name: str, claim: Claim, measures: pd.DataFrame, *, margin: float
) -> Iterator[dict[str, Any]]:
    values = measures[measures["measure"] == claim.measure]
    for task, regime in values[["task", "regime"]].drop_duplicates().itertuples(index=False):
        if (claim.tasks and task not in claim.tasks) or (
            claim.regimes and regime not in claim.regimes
        ):
            continue
        here = values[(values["task"] == task) & (values["regime"] == regime)]
        for arm in dict.fromkeys(here["arm"]):
            kind, weights = kind_and_weights(arm)
            kind, advantage = kind_and_advantage(kind)
            if kind not in claim.arms and arm not in claim.arms:
                continue
            against = _reference(claim, weights or advantage, set(here["arm"]))
            for costs in _costs_of(claim, here[here["arm"] == arm], weights):
                changes = changes_by_seed(here, arm, against, costs)
                if not len(changes):
                    continue
                interval = t_interval(changes)
                yield {
                    "claim": name,
                    "task": task,
                    "regime": regime,
                    "arm": arm,
                    "against": against or "",
                    "costs": costs,
                    "measure": claim.measure,
                    "expected": claim.expected,
                    "mean": interval.mean,
                    "low": interval.low,
                    "high": interval.high,
                    "n_seeds": len(changes),
                    "p": t_test(changes),
                    "margin": margin,
                    "question": claim.question,
                    "changes": changes,
                }


def _reference(claim: Claim, variant: str | None, arms: set[str]) -> str | None:
    """The arm of kind `against` of the same weights or advantage, else the one that has none."""
    if claim.against is None or variant is None:
        return claim.against
    alike = f"{claim.against}_{variant}"
    return alike if alike in arms else claim.against


def _costs_of(claim: Claim, own: pd.DataFrame, weights: str | None) -> list[str]:
    """At which costs a claim values an arm: a single name, or "" for measures without costs."""
    present = set(own["costs"])
    if present == {""}:
        return [""]
    wanted = f"w{weights}" if claim.costs == "own" and weights else "symmetric"
    return [wanted] if wanted in present else []


def changes_by_seed(here: pd.DataFrame, arm: str, against: str | None, costs: str) -> np.ndarray:
    """Per seed, how much more the arm has than its reference; of seeds that have both."""
    by_seed = here[here["costs"] == costs].pivot_table(
        index="seed", columns="arm", values="value", aggfunc="first"
    )
    if arm not in by_seed or (against is not None and against not in by_seed):
        return np.array([])
    change = by_seed[arm] - (0.0 if against is None else by_seed[against])
    return change.dropna().to_numpy()


def _outcome(changes: np.ndarray, row: dict[str, Any]) -> str:
    narrow = equivalence_test(changes, margin=row["margin"]).interval
    state = state_of((row["low"], row["high"]), (narrow.low, narrow.high), row["margin"])
    if state == "intact":
        return "null"
    if state == "inconclusive" or not row["p_holm"] < LEVEL:
        return "inconclusive"
    return "replicated" if (state == "damaged") == (row["expected"] == "more") else "reversed"
