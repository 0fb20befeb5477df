"""How an arm looks and what it is called, the same in every figure."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures.tables import strength
from mechinterp.arm_names import kind_and_advantage, kind_and_weights

if TYPE_CHECKING:
    from collections.abc import Sequence


class ArmStyle(NamedTuple):
    color: str
    marker: Any
    linestyle: Any
    label: str


# Okabe & Ito's palette; arms of one kind share a hue, so the weights read as a dose. The kinds of a
# family (`figures.tables.FAMILIES`), which stand side by side, are told apart by all three; those
# trained by reward by colour and marker, since their line tells how rewards become advantages.
_ARMS = {
    "before": ("#000000", "o", "-", "before"),
    "symmetric": ("#000000", "o", "-", "symmetric"),
    "symmetric_reordered": ("#8C8C8C", "X", ":", "symmetric, second data order"),
    "control": ("#009E73", "P", "--", "control"),
    "ex_post_1.8": ("#56B4E9", "s", "--", ""),
    "ex_post_1.98": ("#0072B2", "D", "--", ""),
    "weighted_1.8": ("#E69F00", "^", "-", ""),
    "weighted_1.98": ("#D55E00", "v", "-", ""),
    "after": ("#CC79A7", ">", "-", "after"),
}
_KINDS = {
    "ex_post": ("#0072B2", "D", "--", "ex post"),
    "weighted": ("#D55E00", "v", "-", "weighted"),
    "weighted_tuned": ("#CC79A7", "P", (0, (5, 1)), "weighted, tuned rate"),
    "resampled": ("#117733", "s", "-.", "resampled"),
    "subsampled": ("#999933", "*", ":", "subsampled"),
    "logit_adjusted": ("#882255", "<", (0, (4, 1, 1, 1)), "logit adjusted"),
    "smoothed_regret": ("#44AA99", "8", (0, (2, 1)), "smoothed regret"),
    "focal": ("#AA4499", "p", "-", "focal"),
    "hard_batch": ("#A65628", "h", "-.", "hard batch"),
    "hard_data": ("#B8A000", "^", (0, (5, 1)), "hard data"),
    "crt": ("#CC6677", "s", "-", "cRT"),
    "lws": ("#4B8B3B", "^", "-.", "LWS"),
    "tau_norm": ("#B07D00", "p", "--", "τ-norm"),
    "dfr": ("#6A3D9A", "<", ":", "DFR"),
    "easy": ("#56B4E9", "^", "-", "easy"),
    "medium": ("#332288", "s", "-", "medium"),
    "hard": ("#E69F00", "P", "-", "hard"),
    "near_impossible": ("#D55E00", "<", "-", "near-impossible"),
    "near_impossible_shortcut": ("#882255", "*", "-", "near-impossible with shortcuts"),
    "impossible": ("#999933", "p", "-", "impossible"),
    "mixed": ("#117733", "d", "-", "mixed"),
    "binary": ("#D55E00", "v", "-", "binary"),
    "brier": ("#117733", "s", "-", "Brier"),
    "brier_routed": ("#56B4E9", "P", "-", "Brier, routed"),
    "log_score": ("#882255", "<", "-", "log score"),
    "sft": ("#999933", "h", "-", "supervised"),
}
_ADVANTAGE_LINES = {
    "standardised": "-",
    "centred": (0, (3, 1)),
    "leave_one_out": "-.",
    "reinforce": ":",
}
# Of arms whose rewards are not divided by their spread.
_TURNED = {
    **{"^": "v", "v": "^", "<": ">", "s": "D", "d": "8", "h": "H"},
    **{"P": (4, 1, 45), "*": (5, 1, 180), "p": (5, 0, 180)},
}
FULL_DOSE = 1.98  # the weight at which a kind has its full colour
_OTHER_ARMS = (
    ("#CC79A7", "h", "-."),
    ("#009E73", "p", "-."),
    ("#882255", "<", "-."),
    ("#999933", "*", "-."),
    ("#44AA99", "8", "-."),
)


def arm_styles(arms: Sequence[str]) -> dict[str, ArmStyle]:
    """The look and the label of each arm: fixed for known arms and kinds, in turn for others."""
    others = sorted(arm for arm in arms if _look_of(arm) is None)
    styles = {}
    for arm in arms:
        if known := _look_of(arm):
            color, marker, linestyle = known
        else:
            color, marker, linestyle = _OTHER_ARMS[others.index(arm) % len(_OTHER_ARMS)]
        styles[arm] = ArmStyle(color, marker, linestyle, arm_label(arm))
    return styles


def _look_of(arm: str) -> tuple[str, Any, Any] | None:
    """Colour, marker and line of a known arm, or of its kind: paler at weights below 1.98."""
    if arm in _ARMS:
        return _ARMS[arm][:3]
    kind, advantage = kind_and_advantage(arm)
    if advantage and kind in _KINDS:
        color, marker = _KINDS[kind][:2]
        turned = marker if advantage == "standardised" else _TURNED.get(marker, marker)
        return color, turned, _ADVANTAGE_LINES[advantage]
    kind, weights = kind_and_weights(arm)
    dose = float(weights or FULL_DOSE)
    if kind not in _KINDS or dose >= 2:  # weights by other names
        return None
    from matplotlib.colors import to_hex, to_rgb

    color, marker, linestyle, _ = _KINDS[kind]
    white = np.clip(2 * (FULL_DOSE - dose), 0, 0.6)
    return to_hex((1 - white) * np.array(to_rgb(color)) + white).upper(), marker, linestyle


def arm_label(arm: str) -> str:
    """ "weighted 1.8" for "weighted_1.8", "hard, centred" for "hard_centred"."""
    if arm in _ARMS and _ARMS[arm][3]:
        return _ARMS[arm][3]
    kind, advantage = kind_and_advantage(arm)
    if advantage:
        return f"{arm_label(kind)}, {advantage.replace('_', ' ')}"
    kind, weights = kind_and_weights(arm)
    name = _KINDS[kind][3] if kind in _KINDS else kind.replace("_", " ")
    return f"{name} {weights}" if weights else name


def costs_label(costs: str) -> str:
    if strength(costs):
        return f"weights {costs.removeprefix('w')}"
    return {"task": "the task's costs", "symmetric": "symmetric costs"}.get(costs, costs)
