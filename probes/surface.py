"""What the text itself gives away: features of the tokens, as a baseline that a probe must beat.

A latent that these features read was not computed by the network, it stands in the prompt.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor


def surface_features(
    tokens: Int[Tensor, "items positions"],
    *,
    groups: Int[Tensor, " items"],
    position: int = -1,
    max_features: int = 1000,
) -> dict[str, Float[Tensor, "items features"]]:
    """Designs by name: "token", one-hot of the token at the probed position; "bag", counts of the
    tokens up to there.

    A column per token that varies, of the `max_features` in most groups; those of one group alone
    say nothing about other folds and are left out. Where no token is left, one column of zeros.
    """
    seen = tokens[:, : position % tokens.shape[1] + 1]
    return {
        "token": _counts(seen[:, -1:], groups, max_features),
        "bag": _counts(seen, groups, max_features),
    }


def _counts(
    tokens: Int[Tensor, "items positions"], groups: Int[Tensor, " items"], max_features: int
) -> Float[Tensor, "items features"]:
    known, column = tokens.unique(return_inverse=True)
    counts = torch.zeros(len(tokens), len(known), dtype=torch.float64)
    counts.scatter_add_(1, column, torch.ones_like(column, dtype=torch.float64))
    _, group = groups.unique(return_inverse=True)
    in_group = torch.zeros(int(group.max()) + 1, len(known))
    n_groups = in_group.index_add(0, group, (counts > 0).float()).clamp(max=1).sum(0)
    useful = (n_groups > 1) & (counts.amin(0) < counts.amax(0))
    order = torch.where(useful, n_groups, -1).argsort(descending=True, stable=True)
    kept = order[: min(int(useful.sum()), max_features)].sort().values
    return counts[:, kept] if len(kept) else torch.zeros(len(tokens), 1, dtype=torch.float64)
