"""The decision-focused loss: what the decision costs, smoothed so that it has a gradient."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.decisions import Utility
from mechinterp.errors import SpecError


def smoothed_regret(
    action_logits: Float[Tensor, "batch actions"],
    labels: Int[Tensor, " batch"],
    *,
    utility: Utility,
    temperature: float = 1.0,
) -> Float[Tensor, " batch"]:
    """max_b u(b, y) - sum_a p_a u(a, y) per item, p = softmax(logits / temperature).

    The expected regret of an agent that acts at random from p; regret itself, that of the argmax,
    in the limit of temperature 0. Trains the decision alone (decision-focused learning: Wilder et
    al. 2019, arXiv:1809.05504): all reports with the same decision are equally good in that limit.
    """
    if not temperature > 0:
        raise SpecError(f"smoothed_regret: temperature must be positive, got {temperature}")
    u = torch.as_tensor(utility).to(action_logits)
    chosen = (action_logits / temperature).softmax(-1)
    regret = u.amax(0, keepdim=True) - u
    return (chosen * regret.T[labels]).sum(-1)
