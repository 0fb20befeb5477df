"""Logit adjustment: costs and base rates as an offset that training sees and the decision does not.

Menon et al. 2021 (arXiv:2007.07314), equation 10.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SpecError


def logit_adjusted(
    action_logits: Float[Tensor, "batch actions"],
    labels: Int[Tensor, " batch"],
    *,
    priors: Sequence[float],
    tau: float = 1.0,
) -> Float[Tensor, " batch"]:
    """-log softmax_y(f + tau log priors) per item, in nats; `priors` need not sum to 1.

    The optimum is f = log q - tau log priors up to a constant. With priors 1 / w_y that is the
    log posterior and the ex-post shift log w_y: a decision that serves the class weights w, learnt
    from a loss that treats all items alike.
    """
    if len(priors) != action_logits.shape[1] or min(priors) <= 0:
        raise SpecError(
            f"logit_adjusted: priors needs {action_logits.shape[1]} positive numbers, got {priors}"
        )
    adjustment = tau * action_logits.new_tensor(priors).log()
    return F.cross_entropy(action_logits + adjustment, labels, reduction="none")
