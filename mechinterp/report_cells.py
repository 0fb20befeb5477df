"""Cells of the report's tables: numbers as a reader wants them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LOSSES = (
    *("learning", "not_encoded", "not_combined", "discarded"),
    *("choosing", "threshold", "readout", "total"),
)
REFERENCES = {
    "control": "the control",
    "ex_post": "the control, adjusted ex post to the same costs",
    "before": "the checkpoint before",
}


@dataclass(frozen=True)
class ReportTable:
    """Formatted cells; the first `n_labels` columns are words, the others numbers."""

    title: str
    note: str
    columns: list[str]
    rows: list[list[str]]
    n_labels: int


def title(name: str) -> str:
    return name.replace("_", " ").capitalize()


def points(row: Mapping[Any, Any] | None, *, signed: bool = False) -> str:
    """Mean and interval in hundredths: "+12.3 [+10.1, +14.5]"."""
    if not row or math.isnan(row["mean"]):
        return "–"
    form = "{:+z.1f}" if signed else "{:z.1f}"
    return with_interval(*(form.format(100 * row[key]) for key in ("mean", "low", "high")))


def plain(row: Mapping[Any, Any] | None, *, signed: bool = False) -> str:
    """Mean and interval to three decimals."""
    if not row or math.isnan(row["mean"]):
        return "–"
    form = "{:+z.3f}" if signed else "{:.3f}"
    return with_interval(*(form.format(row[key]) for key in ("mean", "low", "high")))


def with_interval(mean: str, low: str, high: str) -> str:
    # The no-break space keeps the interval on one line where the cell is narrow.
    text = mean if "nan" in low + high else f"{mean} [{low},\u00a0{high}]"
    return text.replace("-", "−")


def p_value(p: Any) -> str:
    if p is None or math.isnan(p):
        return "–"
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def number(value: float) -> str:
    return f"{value:.3f}".replace("-", "−")
