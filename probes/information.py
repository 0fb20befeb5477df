"""V-information: the bits about a label that a family of probes can use.

I_V(x -> y) = H_V(y) - H_V(y | x) (Xu et al. 2020, arXiv:2002.10689), the mean over held-out items
of the pointwise log2 p(y | x) - log2 p(y) (Ethayarajh et al. 2022, arXiv:2110.08420), where p(y) is
the best probe that sees no x: the share of each value among the items fitted on.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor


def null_log_probabilities(
    labels: Int[Tensor, " items"], folds: Int[Tensor, " items"], n_values: int
) -> Float[Tensor, "items values"]:
    """Out-of-fold log probabilities (nats) of the probe that sees nothing.

    -inf where a value occurs in one fold alone, as `grouped_folds` does not allow.
    """
    in_fold = torch.nn.functional.one_hot(folds).double()
    counts = in_fold.T @ torch.nn.functional.one_hot(labels, n_values).double()
    others = counts.sum(0) - counts
    return (others / others.sum(1, keepdim=True)).log()[folds]


def pointwise_information(
    log_probabilities: Float[Tensor, "items values"],
    labels: Int[Tensor, " items"],
    folds: Int[Tensor, " items"],
) -> Float[Tensor, " items"]:
    """Bits per item from out-of-fold log probabilities (nats); negative where the probe misleads.

    Probe and null model are fitted on the same folds. The mean is the V-information.
    """
    null = null_log_probabilities(labels, folds, log_probabilities.shape[1])
    gain = log_probabilities.double() - null.to(log_probabilities.device)
    return gain.gather(1, labels[:, None])[:, 0] / math.log(2)
