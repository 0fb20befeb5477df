"""How far an estimated map can be trusted: which cells are patched exactly, and how they agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.statistics import proportion_interval

if TYPE_CHECKING:
    from mechinterp.patching.attribution_result import Attribution
    from mechinterp.patching.edge_attribution_result import EdgeAttribution

N_EXACT = 32  # cells patched exactly beside every estimate: a correlation of .7 is known to +- .2


@dataclass(frozen=True)
class Trust:
    """How far an attribution map can be trusted, measured on exactly patched cells.

    Attributes:
        spearman, kendall, pearson: agreement of estimated and exact mean effects (magnitudes, where
            the estimate has no sign) over the selected cells and the sample; NaN below 3 cells or
            where all are equal.
        sample_pearson: the same on the sample alone, which the estimate did not choose.
        n_cells: how many cells there are whose activations differ between the runs.
        n_selected, n_sampled: how many of them were patched exactly: the top, and others at random.
        n_missed: sampled cells whose exact effect is larger in magnitude than the smallest exact
            effect of a selected one.
        miss_rate, miss_low, miss_high: n_missed / n_sampled with its Clopper-Pearson interval; NaN
            where none were selected.
    """

    spearman: float
    kendall: float
    pearson: float
    sample_pearson: float
    n_cells: int
    n_selected: int
    n_sampled: int
    n_missed: int
    miss_rate: float
    miss_low: float
    miss_high: float
    level: float = 0.95

    @property
    def n_exact(self) -> int:
        """How many cells it rests on."""
        return self.n_selected + self.n_sampled

    @property
    def summary(self) -> str:
        """The agreement in a few words."""
        return (
            f"Pearson {self.pearson:.2f}, Spearman {self.spearman:.2f} with exact patches of "
            f"{self.n_exact} of {self.n_cells} cells"
        )

    def __str__(self) -> str:
        if not self.n_selected:
            return self.summary
        return (
            f"{self.summary}; missed {self.n_missed} of {self.n_sampled} sampled "
            f"({self.miss_rate:.0%}, {self.level:.0%} interval {self.miss_low:.0%} to "
            f"{self.miss_high:.0%})"
        )


def say_trust(trust: Trust | None) -> str:
    """What a map is headed with."""
    return "not compared with exact patches" if trust is None else trust.summary


def trust_columns(trust: Trust | None) -> dict[str, float | int]:
    """What every row of a map's table says of the map; NaN where nothing was patched exactly."""
    if trust is None:
        return {"pearson": np.nan, "spearman": np.nan, "miss_rate": np.nan, "n_exact": 0}
    names = ("pearson", "spearman", "miss_rate", "n_exact")
    return {name: getattr(trust, name) for name in names}


class Screened:
    """What screenings of cells and of edges have in common; a dataclass derived from it has the
    fields declared here."""

    attribution: Attribution | EdgeAttribution
    selected: Bool[Tensor, " cells"]
    effect: Float[Tensor, "items cells"]

    @property
    def trust(self) -> Trust:
        """How far the exact patches bear the attribution out."""
        assert self.attribution.trust is not None
        return self.attribution.trust

    def _columns(
        self, name: str, estimated: Float[Tensor, " cells"]
    ) -> dict[str, np.ndarray | int]:
        """The columns that tables of cells and of edges share, the estimate under its name."""
        n = len(self.effect)
        exact = self.effect.double().cpu()
        spread = exact.std(0) if n > 1 else exact[0] * torch.nan
        return {
            "selected": self.selected.cpu().numpy(),
            name: estimated.cpu().numpy(),
            "effect": exact.mean(0).numpy(),
            "stderr": (spread / n**0.5).numpy(),
            "n_items": n,
        }


def check_count(name: str, value: int, *, least: int = 0) -> None:
    """Raise AnalysisError where too few cells are asked for."""
    if value < least:
        raise AnalysisError(f"{name}: expected at least {least}, got {value}")


def rank_cells(size: Float[Tensor, " *axes"]) -> Int[Tensor, "cells axes"]:
    """The cells of a map, largest first, without those whose size is NaN."""
    order = size.nan_to_num(-1.0).flatten().argsort(descending=True, stable=True)
    order = order[: int((~size.isnan()).sum())]
    return torch.stack(torch.unravel_index(order, size.shape), dim=1)


def choose_cells(
    size: Float[Tensor, " *axes"], *, top_k: int, n_sampled: int, generator: torch.Generator
) -> tuple[Int[Tensor, "cells axes"], Bool[Tensor, " cells"], int]:
    """The `top_k` largest cells of a map, then `n_sampled` of the others at random.

    Returns the cells, which of them are the largest, and how many there are in all: not those whose
    size is NaN.
    """
    ranked = rank_cells(size)
    top, others = ranked[:top_k], ranked[top_k:]
    drawn = torch.randperm(len(others), generator=generator)[:n_sampled].to(others.device)
    cells = torch.cat([top, others[drawn]])
    return cells, torch.arange(len(cells), device=cells.device) < len(top), len(ranked)


def measure_trust(
    estimated: Float[Tensor, " cells"],
    exact: Float[Tensor, " cells"],
    selected: Bool[Tensor, " cells"],
    *,
    n_cells: int,
    signed: bool = True,
    level: float = 0.95,
) -> Trust:
    """`Trust` from the mean effects of exactly patched cells; `n_cells` there are in all."""
    from scipy import stats

    x, y = (values.double().cpu().numpy() for values in (estimated, exact))
    chosen = selected.cpu().numpy()
    sampled = np.abs(y[~chosen])
    n_missed = int((sampled > np.abs(y[chosen]).min()).sum()) if chosen.any() else 0
    interval = (np.nan, np.nan)
    if len(sampled) and chosen.any():
        interval = proportion_interval(n_missed, len(sampled), level=level)
    if not signed:
        x, y = np.abs(x), np.abs(y)

    def agreement(measure, x: np.ndarray, y: np.ndarray) -> float:
        if len(x) < 3 or not np.ptp(x) or not np.ptp(y):
            return float("nan")
        return float(measure(x, y).statistic)

    return Trust(
        spearman=agreement(stats.spearmanr, x, y),
        kendall=agreement(stats.kendalltau, x, y),
        pearson=agreement(stats.pearsonr, x, y),
        sample_pearson=agreement(stats.pearsonr, x[~chosen], y[~chosen]),
        n_cells=n_cells,
        n_selected=int(chosen.sum()),
        n_sampled=len(sampled),
        n_missed=n_missed,
        miss_rate=n_missed / len(sampled) if len(sampled) and chosen.any() else np.nan,
        miss_low=interval[0],
        miss_high=interval[1],
        level=level,
    )
