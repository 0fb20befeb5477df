"""What of a study's tables is kept in the repository: enough for its claims and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp import files

if TYPE_CHECKING:
    import pandas as pd


def _log_score(losses: pd.DataFrame) -> pd.DataFrame:
    drawn = losses["loss"].isin(["learning", "choosing", "discarded", "total"])
    return losses[(losses["currency"] == "log_score") & drawn]


def _whole_network(gradients: pd.DataFrame) -> pd.DataFrame:
    return gradients[gradients["part"] == "all"]


def _needed(gradients: pd.DataFrame) -> pd.DataFrame:
    return gradients[gradients["latent"] == "all needed"]


def _everything(table: pd.DataFrame) -> pd.DataFrame:
    return table


KEPT: Mapping[str, Callable[[pd.DataFrame], pd.DataFrame]] = {
    "measures": _everything,
    "competence": _everything,
    "verdicts": _everything,
    "losses": _log_score,
    "losses_in_full": _log_score,
    "incentives": _everything,
    "gradients": _whole_network,
    "gradients_latents": _needed,
    "gradients_posterior": _everything,
}


def keep_tables(tables: str | Path, destination: str | Path) -> None:
    """Copy `KEPT` as far as `tables` has them, their numbers in single precision."""
    for name, choose in KEPT.items():
        path = Path(tables) / f"{name}.parquet"
        if path.is_file():
            table = choose(files.read_table(path))
            numbers = table.select_dtypes("float64").columns
            files.write_table(
                Path(destination) / path.name, table.astype(dict.fromkeys(numbers, "float32"))
            )
