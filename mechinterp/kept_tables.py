"""What of a study's tables is kept in the repository: enough for its claims and their figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from figures.tables import final_steps
from mechinterp import files
from mechinterp.arm_verdicts import adjust_verdicts
from mechinterp.assemble import in_order
from mechinterp.errors import AnalysisError

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


def _as_they_are(crossing: pd.DataFrame) -> pd.DataFrame:
    """Hybrids without a stitch, by the currency that is judged."""
    return crossing[(crossing["stitch"] == "identity") & (crossing["currency"] == "log_score")]


def _residual_stream(cross_checkpoint: pd.DataFrame) -> pd.DataFrame:
    rows = cross_checkpoint[cross_checkpoint["grain"] == "resid_pre"]
    return rows.drop(columns=[name for name in NOT_DRAWN if name in rows])


def _everything(table: pd.DataFrame) -> pd.DataFrame:
    return table


NOT_DRAWN = ("stderr", "low", "high", "raw_effect", "n_items")  # of patches across checkpoints
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
    "crossing": _as_they_are,
    "cross_checkpoint": _residual_stream,
    "gradients": _whole_network,
    "gradients_latents": _needed,
    "gradients_posterior": _everything,
    "writing": _everything,
    "training": _rewarded,
    "text_sources": _everything,
    "stated_confidence": final_steps,
    "stated_reliability": final_steps,
}


def keep_tables(sources: Sequence[str | Path], destination: str | Path) -> None:
    """Write `KEPT`, as far as the sources have rows of them, numbers in single precision.

    Sources are tables of parts of one study. What several have of a task is taken from the last of
    them; verdicts are adjusted anew, since cells of all parts are judged together. A source may be
    the destination. Raises AnalysisError where a source is no folder of tables.
    """
    import pandas as pd

    parts = [_read_kept(Path(source)) for source in sources]
    last_with = {
        task: number
        for number, part in enumerate(parts)
        for table in part.values()
        for task in table["task"].unique()
    }
    for name in KEPT:
        tables = [
            part[name][part[name]["task"].map(last_with) == number]
            for number, part in enumerate(parts)
            if name in part
        ]
        if not tables:
            continue
        table = pd.concat(tables, ignore_index=True)
        if name == "verdicts" and len(parts) > 1:
            table = adjust_verdicts(table)
        numbers = dict.fromkeys(table.select_dtypes("float64").columns, "float32")
        files.write_table(Path(destination) / f"{name}.parquet", in_order(table).astype(numbers))


def _read_kept(source: Path) -> dict[str, pd.DataFrame]:
    paths = {name: source / f"{name}.parquet" for name in KEPT}
    found = {name: path for name, path in paths.items() if path.is_file()}
    if not found:
        raise AnalysisError(f"{source}: no tables of a study; give its OUT/tables")
    chosen = {name: KEPT[name](files.read_table(path)) for name, path in found.items()}
    return {name: table for name, table in chosen.items() if not table.empty}
