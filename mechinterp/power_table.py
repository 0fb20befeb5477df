"""What a study's seeds could see, from the spread of a pilot's measures: `mechinterp power`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mechinterp.arm_names import CONTROL
from mechinterp.claims import changes_by_seed, read_saved
from mechinterp.errors import AnalysisError
from mechinterp.power import plan_power
from mechinterp.seed_measures import COLUMNS as MEASURE_COLUMNS
from mechinterp.statistics import VarianceComponents

if TYPE_CHECKING:
    import pandas as pd

ALPHA = 0.05
COLUMNS = {  # of the table -> as printed
    "task": "task",
    "regime": "regime",
    "arm": "arm",
    "costs": "costs",
    "measure": "measure",
    "n_pilot": "pilot",
    "mean": "mean",
    "sd": "sd",
    "sd_low": "sd from",
    "sd_high": "to",
    "n_seeds": "seeds",
    "detectable": "detectable",
    "seeds_damaged": "for effect",
    "seeds_intact": "for intact",
}


def plan_from_saved(
    tables: str | Path, *, measures: Sequence[str], **options: object
) -> pd.DataFrame:
    """`plan_from_measures` of the table `measures` in a study's OUT/tables."""
    table = read_saved(Path(tables), "measures")
    missing = [name for name in MEASURE_COLUMNS if name not in table]
    if missing:
        raise AnalysisError(f"{tables}/measures.parquet: has no column {', '.join(missing)}")
    return plan_from_measures(table, measures=measures, **options)  # type: ignore[arg-type]


def plan_from_measures(
    table: pd.DataFrame,
    *,
    measures: Sequence[str],
    against: str = CONTROL,
    n_seeds: int | None = None,
    margin: float = 0.05,
    effect: float | None = None,
    power: float = 0.8,
    cells: int = 1,
) -> pd.DataFrame:
    """A row per measure and arm: what differences arm - `against` of `n_seeds` seeds would show.

    `table` as `mechinterp.seed_measures` makes it; `n_seeds` defaults to each arm's own. The
    pilot's `sd` is that of differences by seed, `sd_low` to `sd_high` its 95% interval (chi
    square): from few seeds the plan is as vague as that. Of `cells` that are judged together each
    is tested at 5% / `cells` (Bonferroni, than which Holm is never stricter). For the rest see
    `mechinterp.power`.

    Raises:
        AnalysisError: a measure is not in the table, or no arm shares two seeds with `against`.
    """
    import pandas as pd

    known = list(dict.fromkeys(table["measure"]))
    for name in measures:
        if name not in known:
            raise AnalysisError(f"measure: {name!r} is not in the table; it has {', '.join(known)}")
    rows = []
    chosen = table[table["measure"].isin(list(measures))]
    for (task, regime, name), here in chosen.groupby(["task", "regime", "measure"], sort=False):  # type: ignore[misc]
        for arm, costs in here[["arm", "costs"]].drop_duplicates().itertuples(index=False):
            changes = changes_by_seed(here, arm, against, costs)
            if arm in (against, "before") or len(changes) < 2:
                continue
            n_pilot = len(changes)
            plan = plan_power(
                VarianceComponents(between=float(changes.var(ddof=1))),
                n_seeds=n_seeds or n_pilot,
                margin=margin,
                effect=effect,
                power=power,
                alpha=ALPHA / cells,
            )
            rows.append(
                {
                    "task": task,
                    "regime": regime,
                    "arm": arm,
                    "costs": costs,
                    "measure": name,
                    "n_pilot": n_pilot,
                    "mean": changes.mean(),
                    "sd": plan.sd,
                    **dict(zip(("sd_low", "sd_high"), _sd_interval(plan.sd, n_pilot), strict=True)),
                    "n_seeds": plan.n_seeds,
                    "detectable": plan.detectable,
                    "seeds_damaged": plan.seeds_damaged,
                    "seeds_intact": plan.seeds_intact,
                }
            )
    if not rows:
        raise AnalysisError(f"power: no arm has {', '.join(measures)} in two seeds of {against!r}")
    whole = {"seeds_damaged": "Int64", "seeds_intact": "Int64"}
    return pd.DataFrame(rows, columns=list(COLUMNS)).astype(whole)


def in_words(
    planned: pd.DataFrame,
    *,
    against: str,
    margin: float,
    effect: float,
    power: float,
    cells: int = 1,
) -> str:
    """The table as text, under a line that says what its columns are."""
    texts = planned.astype({"seeds_damaged": "object", "seeds_intact": "object"}).fillna("-")
    shown = texts.rename(columns=COLUMNS).to_string(index=False, float_format="{:.3f}".format)
    judged = "for one cell, unadjusted" if cells == 1 else f"for one of {cells} cells"
    return (
        f"Differences from {against}; margin {margin:g}, chance {power:g}, {judged}.\n"
        "sd: of the pilot's differences by seed, with its 95% interval. detectable: the least\n"
        "true change that so many seeds would show to lie beyond the margin. for effect:\n"
        f"seeds that a change of {effect:g} takes to be shown so; for intact: that no change\n"
        f"takes to be shown to lie within the margin; -: more than 10,000.\n\n{shown}"
    )


def _sd_interval(sd: float, n: int, level: float = 0.95) -> np.ndarray:
    """Of the standard deviation of normal numbers, from that of n."""
    from scipy.stats import chi2

    return sd * np.sqrt((n - 1) / chi2.ppf([0.5 + level / 2, 0.5 - level / 2], n - 1))
