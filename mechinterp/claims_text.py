"""Claims in words: as Markdown tables, and into the places of a page that are marked for them
(`mechinterp.page_places`).

"claims: all" in place of a claim's name stands for one line per claim.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from mechinterp import files
from mechinterp.page_places import fill_places

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.spec import Claim, StudySpec

OUTCOMES = ("replicated", "reversed", "null", "inconclusive", "void", "not powered")
DIGITS = 3


def fill_page(path: str | Path, spec: StudySpec, claims: pd.DataFrame) -> None:
    """Rewrite every marked place of the page from the table of claims.

    Raises SpecError where a place names a claim that the spec does not have.
    """
    texts = {name: claim_text(name, spec, claims) for name in spec.claims}
    page = fill_places(path, "claim", {"all": overview(spec, claims), **texts})
    files.write_text(path, page)


def overview(spec: StudySpec, claims: pd.DataFrame) -> str:
    """A line per claim: its question and in how many cells it came out which way."""
    lines = [f"| claim | question | cells | {' | '.join(OUTCOMES)} |"]
    lines.append("|---" * (3 + len(OUTCOMES)) + "|")
    for name, claim in spec.claims.items():
        outcomes = claims.loc[claims["claim"] == name, "outcome"]
        counts = [int((outcomes == outcome).sum()) for outcome in OUTCOMES]
        cells = " | ".join(str(count) if count else "" for count in counts)
        lines.append(f"| `{name}` | {claim.question} | {len(outcomes)} | {cells} |")
    return "\n".join(lines)


def claim_text(name: str, spec: StudySpec, claims: pd.DataFrame) -> str:
    """A claim's question, how it is measured, and a row per cell."""
    claim = spec.claims[name]
    rows = claims[claims["claim"] == name]
    margin = claim.margin or spec.margin
    lines = [
        f"*{claim.question}* {_measured(claim)}, margin {margin:g}.",
        "",
        "| task | regime | arm | mean | 95% interval | seeds | p (Holm) | outcome |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for _, row in rows.iterrows():
        interval = f"{_number(row['low'])} to {_number(row['high'])}"
        cells = [
            str(row["task"]),
            str(row["regime"]).replace("_", " "),
            str(row["arm"]),
            _number(row["mean"]),
            interval,
            str(row["n_seeds"]),
            f"{row['p_holm']:.2g}",
            f"**{row['outcome']}**" if row["outcome"] in OUTCOMES[:2] else str(row["outcome"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _measured(claim: Claim) -> str:
    costs = "at its own costs" if claim.costs == "own" else "at symmetric costs"
    against = f" against `{claim.against}`" if claim.against else ""
    return f"`{claim.measure}`{against}, {costs}; claimed: {claim.expected}"


def _number(value: float) -> str:
    return f"{value:+.{DIGITS}f}"
