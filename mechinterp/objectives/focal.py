"""The focal loss: items that the network already gets right count less.

Lin et al. 2017 (arXiv:1708.02002), equations 4 and 5.
"""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SpecError


def focal(
    action_logits: Float[Tensor, "batch actions"],
    labels: Int[Tensor, " batch"],
    *,
    gamma: float = 2.0,
    alpha: Sequence[float] | None = None,
) -> Float[Tensor, " batch"]:
    """-alpha_y (1 - p_y)^gamma log p_y per item, in nats. `alpha` are class weights, 1 by default.

    Not a proper loss: its optimum is less confident than the posterior (for gamma > 0), and the
    order of the classes is kept.
    """
    if gamma < 0 or (alpha is not None and len(alpha) != action_logits.shape[1]):
        raise SpecError(
            f"focal: gamma must not be negative, and alpha needs {action_logits.shape[1]} weights; "
            f"got gamma {gamma} and alpha {alpha}"
        )
    log_p = action_logits.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)
    # 1 - exp(log_p) loses all digits where p is near 1.
    loss = -((-log_p.expm1()) ** gamma) * log_p
    if alpha is None:
        return loss
    return action_logits.new_tensor(alpha)[labels] * loss
