"""The utility-weighted loss: what an error costs depends on the action and the label."""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.decisions import Utility, log_score


def utility_weighted(
    action_logits: Float[Tensor, "batch actions"],
    labels: Int[Tensor, " batch"],
    *,
    utility: Utility,
) -> Float[Tensor, " batch"]:
    """-sum_a v(a, y) log p_a per item, v(a, y) = u(a, y) - min_a u(a, y).

    For a diagonal u this is the cross-entropy with class weights w_y, e.g. (0.2, 1.8). The weights
    are taken as they are. A scale common to all of them scales the gradient, which Adam undoes but
    gradient clipping does not: give weights whose mean over the labels is 1.
    """
    return -log_score(action_logits, labels, utility)
