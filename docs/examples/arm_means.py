"""What every arm of a study has of a measure where it ends: the numbers that a page's prose takes
from the tables beside the claims.

    T=docs/findings/hard_samples/tables
    python docs/examples/arm_means.py $T choosing --against symmetric
    python docs/examples/arm_means.py $T accuracy --table text_sources
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from figures.tables import final_steps
from mechinterp.files import read_table
from mechinterp.statistics import t_interval

NOT_KEYS = ("measure", "seed")  # every other column of words tells cells apart


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tables", type=Path, help="OUT/tables of a study, or what is kept of them")
    parser.add_argument("measure", help="a name in the table's column measure")
    parser.add_argument("--table", default="measures", help="default: %(default)s")
    parser.add_argument("--against", help="an arm that the others are compared with, seed by seed")
    options = parser.parse_args()
    table = read_table(options.tables / f"{options.table}.parquet")
    rows = table[table["measure"] == options.measure]
    if rows.empty:
        parser.error(f"no {options.measure!r}; there are {', '.join(table['measure'].unique())}")
    if "step" in rows:
        rows = final_steps(rows)
    print(means(rows, options.against).to_string(float_format="{:+.3f}".format, sparsify=False))


def means(rows: pd.DataFrame, against: str | None) -> pd.DataFrame:
    """Mean, 95% t interval over seeds, smallest and largest seed of every cell."""
    words = [name for name in rows if not pd.api.types.is_numeric_dtype(rows[name])]
    keys = [name for name in words if name not in NOT_KEYS]
    if against is not None:
        shared = [*(key for key in keys if key != "arm"), "seed"]
        reference = rows.loc[rows["arm"] == against, [*shared, "value"]]
        rows = rows.loc[rows["arm"] != against, ["arm", *shared, "value"]]
        rows = rows.merge(reference, on=shared, suffixes=("", "_of_reference"))
        rows["value"] -= rows["value_of_reference"]
    return rows.groupby(keys, sort=False)["value"].apply(_over_seeds).unstack()


def _over_seeds(values: pd.Series) -> pd.Series:
    interval = t_interval(values.to_numpy(float))
    return pd.Series(
        {
            **{"mean": interval.mean, "low": interval.low, "high": interval.high},
            **{"smallest": values.min(), "largest": values.max(), "seeds": float(len(values))},
        }
    )


if __name__ == "__main__":
    main()
