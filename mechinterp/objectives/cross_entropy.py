"""The symmetric loss: every error costs the same."""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def cross_entropy(
    action_logits: Float[Tensor, "batch actions"], labels: Int[Tensor, " batch"]
) -> Float[Tensor, " batch"]:
    """-log p_y per item, p the softmax over the actions, in nats."""
    return F.cross_entropy(action_logits, labels, reduction="none")
