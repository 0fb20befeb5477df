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


def _rewarded(training: pd.DataFrame) -> pd.DataFrame:
    """The log of training by reward as far as it is drawn; none of supervised training."""
    keys = ["task", "regime", "arm", "seed", "step"]
    if "reward" not in training:
        return training.head(0)
    logged = [column for column in LOGGED if column in training]
    return training.loc[training["reward"].notna(), keys + logged]


def _ends(table: pd.DataFrame) -> pd.DataFrame:
    last = table.groupby(["task", "regime", "arm"])["step"].transform("max")
    return table[table["step"] == last]


def _everything(table: pd.DataFrame) -> pd.DataFrame:
    return table


LOGGED = (  # drawn by `figures.rollouts`
    *("reward", "correct", "solved", "degenerate", "lone", "repetition"),
    *("steps_missing", "steps_wrong", "length", "entropy", "kl", "gradient_norm"),
)
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
    "writing": _everything,
    "training": _rewarded,
    "text_sources": _everything,
    "stated_confidence": _ends,
    "stated_reliability": _ends,
}


def keep_tables(tables: str | Path, destination: str | Path) -> None:
    """Copy `KEPT` as far as `tables` has rows of them, their numbers in single precision."""
    for name, choose in KEPT.items():
        path = Path(tables) / f"{name}.parquet"
        if path.is_file():
            table = choose(files.read_table(path))
            if table.empty:
                continue
            numbers = table.select_dtypes("float64").columns
            files.write_table(
                Path(destination) / path.name, table.astype(dict.fromkeys(numbers, "float32"))
            )
