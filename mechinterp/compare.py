"""Two checkpoints in, a verdict out: every analysis of a pair, tables, figures and report."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from mechinterp import files
from mechinterp.checkpoints.provenance import versions_and_machine
from mechinterp.disagreements import disagreements
from mechinterp.errors import AnalysisError, SpecError
from mechinterp.spec import TaskSpec
from mechinterp.steps import Step, remove_remains, write_step
from mechinterp.verdict import (
    INFORMATION_MARGIN,
    MARGIN,
    SIDES,
    Components,
    Verdict,
    minimum_detectable,
    word,
)
from mechinterp.verdict_parts import crossing_shares, information_lost, loss_change, rung_changes
from mechinterp.verdict_words import paragraphs

if TYPE_CHECKING:
    from analyses.ladder import Ladder
    from analyses.pair import Pair

ANALYSES = (
    *("ladder", "calibration", "probes", "representation"),
    *("patching", "cross_checkpoint", "crossing", "grafts"),
)
COMPONENTS = ("threshold", "readout", "not_encoded", "not_combined", "total")
EVIDENCE = {
    "ladder": "tables/ladder_items.parquet, tables/losses.parquet, figures/ladder",
    "forgetting": "tables/information_items.parquet, figures/probes",
    "location": "tables/crossing_items.parquet, tables/crossing.parquet, figures/crossing",
    "representation": "tables/probes.parquet, tables/representation.parquet, figures/probes, "
    "figures/representation",
    "circuit": "tables/patching.parquet, tables/recovery_overlap.parquet, figures/recovery",
    "exchange": "tables/cross_checkpoint.parquet, figures/cross_checkpoint",
    "calibration": "tables/calibration_summary.parquet, figures/calibration",
}


def compare(
    before: str | Path,
    after: str | Path,
    *,
    task: TaskSpec,
    out: str | Path,
    control: str | Path | None = None,
    costs: str | None = None,
    margin: float = MARGIN,
    command: str = "",
    **load_options: Any,
) -> Verdict:
    """Compare two checkpoints on `task`; leaves tables, figures, verdict.json and report.html in
    `out`.

    With `control`, the verdict is on after against control, not on after against before. `costs`
    names the costs that it is stated at; the tables have all. An analysis that an interrupted run
    has finished is not repeated. Raises SpecError where the task has no such costs.
    """
    from analyses.crossing import valid_at
    from analyses.ladder import read_ladders
    from analyses.pair import Pair
    from figures import draw_all
    from mechinterp.report import write_report, write_tables

    out = Path(out)
    pair = Pair.open(before, after, control=control, task=task, **load_options)
    if costs is not None and costs not in pair.costs:
        known = ", ".join(pair.costs)
        raise SpecError(f"--costs {costs}: the task has no such costs; it has: {known}")
    remove_remains(out)
    tables: dict[str, pd.DataFrame] = {}
    seconds: dict[str, float] = {}
    for name in ANALYSES:
        step = _analyse(name, pair, task, load_options, out)
        tables |= step.tables(out)
        seconds[name] = step.record(out)["seconds"]
    tables["crossing"] = valid_at(tables["crossing"], margin)
    ladders = read_ladders(tables["ladder_items"])
    verdict = judge(pair, ladders, tables=tables, costs=costs, margin=margin)
    tables["contrasts"] = _contrasts(pair, ladders, margin)
    write_tables(out, tables)
    _say("figures, report")
    draw_all(out / "tables", out / "figures")
    files.write_json(out / "verdict.json", verdict.to_json())
    files.write_json(out / "summary.json", paragraphs(verdict))
    manifest = {
        "command": command,
        "task": task.model_dump(mode="json"),
        "checkpoints": {
            arm: model.checkpoint.content_hash
            for arm, model in pair.models.items()
            if model.checkpoint
        },
        **versions_and_machine(),
        "seconds": seconds,
        "not_powered": [
            "One pair: the intervals are over items and speak of these two networks. A claim about "
            "the objective that made them takes seeds."
        ],
    }
    files.write_json(out / "manifest.json", manifest)
    write_report(out, title=f"{pair.task.name}: what did training change?")
    return verdict


def _analyse(
    name: str, pair: Pair, task: TaskSpec, load_options: Mapping[str, Any], out: Path
) -> Step:
    """Have `analyses.<name>` done for the pair."""
    inputs = {
        "analysis": name,
        "task": {**task.inputs, **task.model_dump(mode="json")},
        "checkpoints": {
            arm: [model.checkpoint and model.checkpoint.behaviour_hash, pair.labels(arm)]
            for arm, model in pair.models.items()
        },
        "load_options": dict(load_options),
    }
    step = Step("compare", inputs, {})
    if not step.is_done(out):
        _say(name.replace("_", "-"))
        begun = time.monotonic()
        tables = import_module(f"analyses.{name}").pair_tables(pair)
        write_step(step.directory(out), tables, inputs, begun)
    return step


def judge(
    pair: Pair,
    ladders: Mapping[str, Mapping[str, Ladder]],
    *,
    tables: Mapping[str, pd.DataFrame] | None = None,
    costs: str | None = None,
    margin: float = MARGIN,
) -> Verdict:
    """The verdict of `mechinterp.verdict` on a pair's ladders, in log score at `costs`.

    They default to the task's own utility where it has one, else to symmetric costs. What stands
    beside the ladder (forgetting, the crossing's shares, disagreements) is taken from `tables` as
    far as they are there: `information_items`, `crossing_items`, `recovery_overlap`.
    """
    tables = tables or {}
    costs = costs or ("task" if "task" in pair.costs else "symmetric")
    reference = "control" if "control" in ladders else "before"
    own, other = ladders["after"][costs], ladders[reference][costs]
    groups = pair.items.groups
    sides, in_utility = (
        {
            loss: side
            for loss in losses
            if (side := loss_change(own, other, loss, groups, margin=margin, currency=currency))
        }
        for currency, losses in (
            ("log_score", (*SIDES, "discarded", *COMPONENTS)),
            ("utility", SIDES),
        )
    )
    if lacking := [loss for loss in (*SIDES, "discarded") if loss not in sides]:
        raise AnalysisError(
            f"costs {costs!r}: no {lacking[0]} loss, since nothing that could be known is worth "
            "more than the best constant action there; judge at others (--costs)"
        )
    information = {
        needed: information_lost(tables["information_items"], reference=reference, needed=needed)
        if "information_items" in tables
        else {}
        for needed in (True, False)
    }
    components = Components(
        rungs=rung_changes(own, other, groups),
        losses={loss: sides[loss] for loss in COMPONENTS if loss in sides},
        crossing=crossing_shares(tables["crossing_items"], costs=costs, margin=margin)
        if "crossing_items" in tables
        else {},
    )
    found = word(sides["learning"], sides["choosing"])
    return Verdict(
        verdict=found,
        learning=sides["learning"],
        choosing=sides["choosing"],
        discarded=sides["discarded"],
        forgetting=information[False],
        components=components,
        minimum_detectable={loss: minimum_detectable(sides[loss], margin) for loss in SIDES},
        evidence=EVIDENCE,
        disagreements=disagreements(
            found,
            sides,
            components,
            in_utility=in_utility,
            needed_information=information[True],
            recovery_overlap=tables.get("recovery_overlap"),
            reference=reference,
            margin=margin,
        ),
        reference=reference,
        costs=costs,
        currency="log_score",
        margin=margin,
        information_margin=INFORMATION_MARGIN,
        n_items=len(pair.items),
    )


def _contrasts(
    pair: Pair, ladders: Mapping[str, Mapping[str, Ladder]], margin: float
) -> pd.DataFrame:
    from analyses.ladder import CURRENCIES, LOSSES

    rows = []
    for arm in ladders:
        references = {"after": ("before", "control"), "control": ("before",)}.get(arm, ())
        for reference in references:
            if reference not in ladders:
                continue
            for costs in pair.costs:
                for currency in CURRENCIES:
                    for loss in LOSSES:
                        side = loss_change(
                            ladders[arm][costs],
                            ladders[reference][costs],
                            loss,
                            pair.items.groups,
                            margin=margin,
                            currency=currency,
                        )
                        if side is None:
                            continue
                        labels = {k: v for k, v in pair.labels(arm).items() if k != "seed"}
                        rows.append(
                            {
                                **labels,
                                "costs": costs,
                                "currency": currency,
                                "loss": loss,
                                "reference": reference,
                                "mean": side.delta,
                                "low": side.ci[0],
                                "high": side.ci[1],
                                "n_seeds": 1,
                                "p": side.p,
                            }
                        )
    return pd.DataFrame(rows)


def _say(stage: str) -> None:
    if sys.stderr.isatty():
        print(f"compare: {stage}", file=sys.stderr)
