"""What a study found, in plain words made from its tables."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp.spec import StudySpec

REGIMES = {
    "branched": "branched from a trained network",
    "from_init": "trained from initialisation",
}


def summarise_study(
    spec: StudySpec, tables: dict[str, pd.DataFrame]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Paragraphs ({"heading", "text"}) for the report, and what the study is not powered for."""
    competence = _records(tables["competence"])
    paragraphs = [_competence(competence), *_claims(spec, tables)]
    void = {row["task"] for row in competence if not row["competent"]}
    not_powered = []
    contrasts = _records(tables["contrasts"])
    states = _states_at_the_end(tables["verdicts"])
    cells = itertools.product(spec.tasks, spec.weights, spec.regimes)
    for task, name, regime in cells:
        cell = {
            "task": task,
            "regime": regime,
            "arm": f"weighted_{name}",
            "costs": f"w{name}",
            "currency": "log_score",
        }
        rows = {
            (row["loss"], row["reference"]): row
            for row in contrasts
            if all(row[key] == value for key, value in cell.items())
        }
        if not rows:  # a task may leave weights and arms out
            continue
        text = _weighted(rows, states.get((task, regime, cell["arm"], cell["costs"]), {}))
        if task in void:
            text = f"Void: not every symmetric network knows the task. {text}"
        paragraphs.append({"heading": f"Weights {name} on {task}, {REGIMES[regime]}", "text": text})
        not_powered.append(f"{task}, {REGIMES[regime]}, weights {name}")
    if spec.seeds >= spec.seeds_for_claims:
        return paragraphs, []
    few = f"{spec.seeds} seeds; a claim about the objective takes {spec.seeds_for_claims}"
    return paragraphs, [f"{cell}: {few}" for cell in not_powered or [f"All of {spec.name}"]]


def _competence(rows: list[dict[str, Any]]) -> dict[str, Any]:
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        networks = [row for row in rows if row["task"] == task]
        good = sum(row["competent"] for row in networks)
        if networks[0]["reference"] == "oracle":
            share = networks[0]["threshold"]
            meaning = f"at least {share:.0%} of (oracle - best constant action)"
        else:
            meaning = "a better log score than logistic regression on the raw input"
        line = f"{task}: {good} of {len(networks)} symmetric networks reach {meaning}."
        lines.append(line if good == len(networks) else f"{line} The study is void for this task.")
    return {"heading": "Do the symmetric networks know the task?", "text": " ".join(lines)}


def _claims(spec: StudySpec, tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """One paragraph, a sentence per claim; none where the study has no claims."""
    if not spec.claims:
        return []
    sentences = []
    for name, claim in spec.claims.items():
        outcomes = tables["claims"].loc[tables["claims"]["claim"] == name, "outcome"]
        counts = ", ".join(f"{word} {n}" for word, n in outcomes.value_counts().items())
        sentences.append(f"{claim.question} {counts or 'no cells'}.")
    return [{"heading": "The study's claims, in cells by outcome", "text": " ".join(sentences)}]


def _states_at_the_end(verdicts: pd.DataFrame) -> dict[tuple[str, ...], dict[str, str]]:
    """{(task, regime, arm, costs): {side: state}} against the control adjusted ex post."""
    states: dict[tuple[str, ...], dict[str, str]] = {}
    for row in _records(verdicts[verdicts["reference"] == "ex_post"].sort_values("step")):
        cell = (row["task"], row["regime"], row["arm"], row["costs"])
        states.setdefault(cell, {})[row["side"]] = row["state"]
    return states


def _weighted(rows: dict[tuple[str, str], dict[str, Any]], states: dict[str, str]) -> str:
    """Weighted training against symmetric training that is adjusted to the same costs ex post."""
    sentences = [
        f"{name}: {_amount(row)}{', ' + states[loss] if loss in states else ''}."
        for name, loss in (
            ("Learning loss", "learning"),
            ("Choosing loss", "choosing"),
            ("In total", "total"),
        )
        if (row := rows.get((loss, "ex_post")))
    ]
    unit = (
        "Weighted training against symmetric training with the ex-post shift to the same costs, in "
        "expected log score at these costs, in % of (oracle - best constant), with 95% t intervals "
        "over seeds. States are those of the verdicts, adjusted for all of the study's arms."
    )
    return " ".join([*sentences, unit])


def _amount(row: dict[str, Any]) -> str:
    mean, low, high = (100 * row[key] for key in ("mean", "low", "high"))
    more = "more" if mean > 0 else "less"
    return f"{abs(mean):.1f} points {more} ({low:+.1f} to {high:+.1f}, {row['n_seeds']} seeds)"


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(key): value for key, value in row.items()} for row in table.to_dict("records")]
