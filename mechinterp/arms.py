"""The arms of a study by name: what each is trained on, and at which costs it is valued.

Kinds that serve weights make one arm per weighting, such as `weighted_1.98`:

    weighted          the utility-weighted loss
    weighted_tuned    the same at the best of several learning rates, chosen on validation items
    logit_adjusted    weights as an offset of the logits
    resampled         the symmetric loss on items drawn in proportion to their label's weight
    subsampled        the symmetric loss on as many items as weighting leaves of the effective size
    smoothed_regret   the loss of the decision itself

The others are one arm each: `focal`, `hard_batch` (the items of a batch with the largest losses)
and `hard_data` (those with the largest losses under the network that the branch starts from).
Arms without training (`ex_post`, and those of `mechinterp.refits`) are readings of the control.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mechinterp.arm_names import CONTROL, REORDERED
from mechinterp.decisions import diagonal_utility
from mechinterp.tasks.base import Task
from mechinterp.training.sampling import effective_share

SYMMETRIC = {"name": "cross_entropy"}
TUNING_FACTORS = (1 / 3, 1.0, 3.0)
HARD_SHARE = 0.25

ArmKind = Literal[
    "weighted",
    "weighted_tuned",
    "logit_adjusted",
    "resampled",
    "subsampled",
    "smoothed_regret",
    "focal",
    "hard_batch",
    "hard_data",
]
Refit = Literal["crt", "lws", "tau_norm", "dfr"]


@dataclass(frozen=True)
class Arm:
    """How an arm is trained. `weights` is the weighting at whose costs alone it is valued.

    `adjusted` says that it does not serve those costs by itself and is shifted to them ex post.
    `learning_rates` are factors, of which the best on validation items is kept.
    """

    objective: dict[str, Any]
    sampling: dict[str, Any] | None = None
    weights: str | None = None
    adjusted: bool = False
    learning_rates: tuple[float, ...] = ()

    @property
    def has_own_objective(self) -> bool:
        """Whether it is told from the control by its loss, not by its items or learning rate."""
        return self.objective != SYMMETRIC and not self.learning_rates


def trained_arms(
    kinds: Sequence[ArmKind],
    weights: dict[str, tuple[float, ...]],
    *,
    regime: str,
    task: Task,
) -> dict[str, Arm]:
    """The control first, then `kinds` for every weighting; branched, also REORDERED."""
    arms = {CONTROL: Arm(SYMMETRIC)}
    for kind in kinds:
        if kind == "focal":
            arms[kind] = Arm({"name": "focal", "gamma": 2.0})
        elif kind == "hard_batch":
            arms[kind] = Arm({"name": "hard_examples", "share": HARD_SHARE})
        elif kind == "hard_data":
            if regime == "branched":  # from a random start no item is harder than another
                arms[kind] = Arm(SYMMETRIC, {"name": "hardest_share", "share": HARD_SHARE})
        else:
            for name, values in weights.items():
                arms[f"{kind}_{name}"] = _serving(kind, name, values, task)
    if regime == "branched":
        arms[REORDERED] = Arm(SYMMETRIC)
    return arms


def _serving(kind: ArmKind, name: str, weights: tuple[float, ...], task: Task) -> Arm:
    utility = [list(row) for row in diagonal_utility(weights)]
    weighted = {"name": "utility_weighted", "utility": utility}
    if kind == "weighted_tuned":
        return Arm(weighted, weights=name, learning_rates=TUNING_FACTORS)
    if kind == "logit_adjusted":
        priors = [1 / weight for weight in weights]
        return Arm({"name": "logit_adjusted", "priors": priors}, weights=name)
    if kind == "resampled":
        return Arm(SYMMETRIC, {"name": "by_weight", "weights": list(weights)}, weights=name)
    if kind == "subsampled":
        labels = task.sample(10_000, split="train").labels
        share = effective_share(weights, labels.bincount(minlength=len(weights)))
        sampling = {"name": "random_share", "share": round(share, 4)}
        return Arm(SYMMETRIC, sampling, weights=name, adjusted=True)
    if kind == "smoothed_regret":
        return Arm({"name": "smoothed_regret", "utility": utility}, weights=name)
    return Arm(weighted, weights=name)
