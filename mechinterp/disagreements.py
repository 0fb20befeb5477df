"""Where evidence beside the ladder excludes what the ladder says. The ladder decides all the same.

Fixed rules, each of which speaks only where an interval of the evidence itself excludes agreement:

    utility    a side is damaged in log score and, in utility, intact or improved; or the reverse
    probes     learning is damaged, by the ladder's account because latents that the decision needs
               are encoded less well, yet no such latent lost information beyond its margin
    latents    learning is intact or improved, yet what probes read of the needed latents is worth
               less by more than the margin
    crossing   nothing is damaged, yet the layers before the cut, or those behind it, cost more than
               the margin and the others make up for it
    circuit    nothing is damaged, yet the recovery maps overlap less with those of before than the
               control's maps do

Silence is not agreement: evidence may be absent, or too imprecise to exclude anything. Shares of
the crossing locate a change and never classify it (a pure threshold shift may live in early
layers), so they cannot contradict the kind of damage; and they compare with before, so they are not
asked about a verdict against a control. Without a control there is no yardstick for a change of
circuit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mechinterp.verdict import INFORMATION_MARGIN, MARGIN, SIDES, Change, Components, Side, Word

if TYPE_CHECKING:
    import pandas as pd

UNHURT = {"intact", "improved"}


def disagreements(
    verdict: Word,
    sides: Mapping[str, Side],
    components: Components,
    *,
    in_utility: Mapping[str, Side],
    needed_information: Mapping[str, Side],
    recovery_overlap: pd.DataFrame | None = None,
    reference: str = "before",
    margin: float = MARGIN,
) -> tuple[str, ...]:
    """Plain sentences, none where nothing disagrees.

    `sides` are learning and choosing in log score and `in_utility` the same in utility;
    `needed_information` has the bits lost per needed latent; `recovery_overlap` is the table of
    `analyses.patching`.
    """
    found = [
        *_utility(sides, in_utility),
        *_latents(sides["learning"], components.losses.get("not_encoded"), needed_information),
    ]
    if verdict == "none":
        if reference == "before":
            found += _crossing(components, margin)
        if recovery_overlap is not None:
            found += _circuit(recovery_overlap)
    return tuple(found)


def _utility(sides: Mapping[str, Side], in_utility: Mapping[str, Side]) -> Iterator[str]:
    for name in SIDES:
        if name not in in_utility:  # no decision is worth more than the best constant
            continue
        score, utility = sides[name], in_utility[name]
        states = {score.state, utility.state}
        if "damaged" in states and states & UNHURT:
            yield (
                f"{name.capitalize()} is {score.state} in log score, on which the verdict rests, "
                f"and {utility.state} in utility ({_points(utility)} points)."
            )


def _latents(
    learning: Side, not_encoded: Side | None, information: Mapping[str, Side]
) -> Iterator[str]:
    if not_encoded is None or not_encoded.state != "damaged":
        return
    kept = all(side.state in UNHURT for side in information.values())
    if learning.state == "damaged" and information and kept:
        yield (
            "Learning is damaged because needed latents are encoded less well "
            f"({_points(not_encoded)} points), yet no probe of such a latent lost more than "
            f"{INFORMATION_MARGIN:g} bits of information."
        )
    if learning.state in UNHURT:
        yield (
            f"Learning is {learning.state}, yet what probes read of the needed latents is worth "
            f"less ({_points(not_encoded)} points): the decision can be read out better than they "
            "account for."
        )


def _crossing(components: Components, margin: float) -> Iterator[str]:
    raw = components.crossing.get("raw")
    if raw is None or raw.phi_front is None or raw.phi_back is None:
        return
    places = {"before": raw.phi_front, "behind": raw.phi_back}
    for place, share in places.items():
        if share.ci[1] < -margin:
            yield (
                f"Nothing is damaged, yet by the crossing the layers {place} layer {raw.cut} cost "
                f"value ({_points(share)} points), for which the others make up."
            )


def _circuit(overlap: pd.DataFrame) -> Iterator[str]:
    rows = overlap[overlap["measure"] == "beyond_control"]
    if not rows.empty and rows["low"].iloc[0] > 0:
        value, low, high = (rows[name].iloc[0] for name in ("value", "low", "high"))
        yield (
            "Nothing is damaged, yet the circuit changed more than the control's: recovery maps "
            f"overlap less with those of before, by {value:.2f} ({low:.2f} to {high:.2f})."
        )


def _points(change: Side | Change) -> str:
    low, high = (100 * bound for bound in change.ci)
    return f"{100 * change.delta:+.1f}, 95% interval {low:+.1f} to {high:+.1f}"
