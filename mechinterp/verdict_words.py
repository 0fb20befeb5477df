"""A verdict in plain words, for the report and the terminal."""

from __future__ import annotations

from collections.abc import Mapping

from mechinterp.verdict import SIDES, Side, Verdict

WORDS = {
    "none": "Neither learning nor choosing was damaged.",
    "learning": "Learning was damaged: what the network makes readable for the decision.",
    "choosing": "Choosing was damaged: what the network does with what it makes readable.",
    "both": "Both learning and choosing were damaged.",
    "inconclusive": "The run cannot tell.",
}
DISCARDED = {
    "damaged": "More is discarded, readable in earlier layers and gone in the last",
    "improved": "Less is discarded on the way to the last layer",
    "intact": "No more is discarded on the way to the last layer",
    "inconclusive": "Whether more is discarded on the way to the last layer, the run cannot tell",
}


def in_words(verdict: Verdict) -> str:
    """The verdict as a paragraph, and what disagrees with it."""
    return " ".join(paragraph["text"] for paragraph in paragraphs(verdict))


def paragraphs(verdict: Verdict) -> list[dict[str, str]]:
    """{"heading", "text"} of the verdict and, where there is any, of evidence that disagrees."""
    told = [{"heading": "Verdict", "text": _stated(verdict)}]
    if verdict.disagreements:
        text = " ".join(verdict.disagreements)
        told.append({"heading": "Evidence that disagrees", "text": text})
    return told


def _stated(verdict: Verdict) -> str:
    sides = [
        f"The {name} loss changed by {_points(side)}: {side.state}."
        for name, side in zip(SIDES, (verdict.learning, verdict.choosing), strict=True)
    ]
    losses = verdict.components.losses
    parts = [f"{name.replace('_', ' ')} {100 * side.delta:+.1f}" for name, side in losses.items()]
    sentences = [
        WORDS[verdict.verdict],
        *sides,
        f"By parts: {', '.join(parts)}.",
        f"{DISCARDED[verdict.discarded.state]}: {_points(verdict.discarded)}.",
        *_forgetting(verdict.forgetting),
        "Points are hundredths of (oracle - best constant), in log score at "
        f"{verdict.costs} costs, against the {verdict.reference} network as it is, not adjusted to "
        "these costs; more is worse, and a rise of up to "
        f"{100 * verdict.margin:.0f} is no damage.",
    ]
    return " ".join(sentences)


def _forgetting(forgetting: Mapping[str, Side]) -> list[str]:
    """What became of the latents that the decision does not need."""
    if not forgetting:
        return []
    lost = [name for name, side in forgetting.items() if side.state == "damaged"]
    unknown = [name for name, side in forgetting.items() if side.state == "inconclusive"]
    sentences = []
    if lost:
        told = [
            f"{name} ({forgetting[name].delta:.2f} bits, {forgetting[name].ci[0]:.2f} to "
            f"{forgetting[name].ci[1]:.2f})"
            for name in lost
        ]
        sentences.append(
            f"Forgotten, which is no damage, since the decision does not need it: "
            f"{', '.join(told)}."
        )
    if unknown:
        sentences.append(
            f"Whether it forgot {', '.join(unknown)}, which the decision does not need, the run "
            "cannot tell."
        )
    if not sentences:
        sentences.append("No latent that the decision does not need was forgotten.")
    return sentences


def _points(side: Side) -> str:
    low, high = (100 * bound for bound in side.ci)
    return f"{100 * side.delta:+.1f} points (95% interval {low:+.1f} to {high:+.1f})"
