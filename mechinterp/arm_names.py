"""What the name of an arm says. Light, so that figures and tables can ask without loading torch."""

from __future__ import annotations

import re

CONTROL = "symmetric"
REORDERED = "symmetric_reordered"  # the control with another order of the data: the null
ADVANTAGES = ("standardised", "centred", "leave_one_out", "reinforce")  # of training by reward
WEIGHTS = re.compile(r"\d[\d.]*")  # the name of a weighting
SERVING = re.compile(rf"(?P<kind>.+?)_(?P<weights>{WEIGHTS.pattern})$")


def kind_and_weights(arm: str) -> tuple[str, str | None]:
    """("weighted", "1.98") of "weighted_1.98"; ("focal", None) of "focal"."""
    serving = SERVING.fullmatch(arm)
    return (serving["kind"], serving["weights"]) if serving else (arm, None)


def kind_and_advantage(arm: str) -> tuple[str, str | None]:
    """("hard", "centred") of "hard_centred"; ("hard", None) of "hard"."""
    for advantage in ADVANTAGES:
        if arm.endswith(f"_{advantage}"):
            return arm.removesuffix(f"_{advantage}"), advantage
    return arm, None
