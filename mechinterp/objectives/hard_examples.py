"""Hard-example training: only the items with the largest losses count.

Online hard example mining of Shrivastava et al. 2016 (arXiv:1604.03540), by share of the batch.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SpecError


def hard_examples(
    action_logits: Float[Tensor, "batch actions"],
    labels: Int[Tensor, " batch"],
    *,
    share: float = 0.25,
) -> Float[Tensor, " batch"]:
    """The cross-entropy of the `share` of the batch where it is largest, 0 for the others.

    Scaled so that the mean over the batch is the mean over the items that count. Of equal losses
    the first count.
    """
    if not 0 < share <= 1:
        raise SpecError(f"hard_examples: share must be in (0, 1], got {share}")
    loss = F.cross_entropy(action_logits, labels, reduction="none")
    n_kept = math.ceil(share * len(loss))
    kept = loss.detach().argsort(descending=True, stable=True)[:n_kept]
    weight = torch.zeros_like(loss)
    weight[kept] = len(loss) / n_kept
    return weight * loss
