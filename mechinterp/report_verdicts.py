"""What the report shows of verdicts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mechinterp.report_cells import LOSSES, ReportTable, p_value, points, title, with_interval

FORGETTING = {
    "damaged": "forgotten",
    "improved": "more is known",
    "intact": "kept",
    "inconclusive": "inconclusive",
}


def verdict_view(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The word, tables of the sides, rungs and shares, and what else the verdict states."""
    facts = {
        key.replace("_", " "): value
        for key, value in verdict.items()
        if isinstance(value, str | int | float) and key != "verdict"
    }
    tables = [_sides_table(verdict), _rungs_table(verdict), _forgetting_table(verdict)]
    tables.append(_shares_table(verdict))
    return {
        "word": verdict["verdict"],
        "facts": facts,
        "tables": [table for table in tables if table.rows],
    }


def _sides_table(verdict: Mapping[str, Any]) -> ReportTable:
    stated = {**verdict, **verdict["components"]["losses"]}
    least = verdict["minimum_detectable"]
    return ReportTable(
        title="The sides and parts of the verdict",
        note="Increase of the loss in hundredths of (oracle − best constant action) with 95% "
        "intervals over items; positive is worse; p is of no change. Least detectable: the "
        "smallest increase that would have been called damage.",
        columns=["Loss", "State", "Increase", "p", "Least detectable"],
        rows=[
            [
                *(title(name), stated[name]["state"], _change(stated[name])),
                *(
                    p_value(stated[name]["p"]),
                    f"{100 * least[name]:.1f}" if name in least else "–",
                ),
            ]
            for name in LOSSES
            if name in stated
        ],
        n_labels=2,
    )


def _rungs_table(verdict: Mapping[str, Any]) -> ReportTable:
    rungs = verdict["components"]["rungs"]
    return ReportTable(
        title="The rungs of the ladder",
        note="Change of what each rung is worth, in hundredths of (oracle − best constant action); "
        "positive is better. Losses are differences of neighbouring rungs.",
        columns=["Rung", "Change", "p"],
        rows=[[title(name), _change(rung), p_value(rung["p"])] for name, rung in rungs.items()],
        n_labels=1,
    )


def _forgetting_table(verdict: Mapping[str, Any]) -> ReportTable:
    return ReportTable(
        title="Latents that the decision does not need",
        note="Bits of information lost at the best layer; positive is forgetting, which is no "
        f"damage. The margin is {verdict['information_margin']:g} bits.",
        columns=["Latent", "State", "Bits lost", "p"],
        rows=[
            [
                *(name, FORGETTING[side["state"]]),
                with_interval(*(f"{x:+.3f}" for x in (side["delta"], *side["ci"]))),
                p_value(side["p"]),
            ]
            for name, side in verdict["forgetting"].items()
        ],
        n_labels=2,
    )


def _shares_table(verdict: Mapping[str, Any]) -> ReportTable:
    return ReportTable(
        title="Where the change sits",
        note="The crossing: change of value from before to after, in hundredths of (oracle − best "
        "constant action), divided between the layers before the cut (front) and behind it (back). "
        "No shares where the interaction leaves them without meaning. They locate a change and "
        "never classify it.",
        columns=["Readout", "Cut", "Change", "Front", "Back", "Interaction"],
        rows=[
            [
                *(title(name), str(shares["cut"])),
                *(
                    _change(shares[part])
                    for part in ("change", "phi_front", "phi_back", "interaction")
                ),
            ]
            for name, shares in verdict["components"]["crossing"].items()
        ],
        n_labels=2,
    )


def _change(change: Mapping[str, Any] | None) -> str:
    """In points, with its interval."""
    if change is None:
        return "–"
    low, high = change["ci"]
    return points({"mean": change["delta"], "low": low, "high": high}, signed=True)
