"""Online description length: the bits that it takes to send labels to one who has the activations.

The prequential code of Voita and Titov (2020, arXiv:2003.12298, section 2.2): labels are sent block
by block, each with the probabilities of a probe fitted on the blocks before, so that a probe which
needs many labels pays for them. It measures effort beside accuracy. The first block, and others
before which some value has not occurred, are sent with a uniform code.

Which penalty the probes have must be sent as well. A Bayesian mixture over the strengths does that
without a look ahead: -log2 of the mean of 2^-bits, at most log2(strengths) bits above the best one.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng
from probes.crossfit import ProbeConfig, fit_probes

# Shares of the items after which a block ends: those of the paper.
BLOCK_ENDS = (0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.0625, 0.125, 0.25, 0.5, 1.0)


@dataclass(frozen=True)
class DescriptionLength:
    """`bits` per column of labels, and in the uniform code; `ends` of the blocks, in items."""

    bits: Float[Tensor, " k"]
    uniform_bits: float
    ends: tuple[int, ...]

    @property
    def compression(self) -> Float[Tensor, " k"]:
        """Uniform code over this code: 1 where activations say nothing, or a little less."""
        return self.uniform_bits / self.bits


def description_length(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    *,
    groups: Int[Tensor, " n"],
    config: ProbeConfig | None = None,
    block_ends: tuple[float, ...] = BLOCK_ENDS,
) -> DescriptionLength:
    """Send each column of `labels` (0..n_values-1) given `X`, in an order of groups drawn from the
    seed; no group is split between blocks.

    Strengths, tolerance and seed are those of `config`.

    Raises AnalysisError where `block_ends` do not rise to 1.
    """
    config = config or ProbeConfig()
    if list(block_ends) != sorted(set(block_ends)) or block_ends[-1] != 1 or block_ends[0] <= 0:
        raise AnalysisError(f"block_ends: must rise from above 0 to 1, got {block_ends}")
    order, ends = _order(groups, block_ends, config.seed)
    X, labels = X.double()[order.to(X.device)], labels[order.to(labels.device)]
    strengths = X.new_tensor(config.strengths)
    uniform = math.log2(n_values)
    bits = X.new_full((len(strengths), labels.shape[1]), ends[0] * uniform)
    for start, end in itertools.pairwise(ends):
        sent = torch.nn.functional.one_hot(labels[:start], n_values)
        known = (sent.sum(0) > 0).all(1)
        bits[:, ~known] += (end - start) * uniform
        if not known.any():
            continue
        probes = fit_probes(
            X[:start],
            labels[:start, known],
            n_values,
            train=torch.ones(1, start, dtype=torch.bool, device=X.device),
            strengths=strengths[None, :, None].expand(1, -1, int(known.sum())),
            tol=config.tol,
        )[0]
        log_p = probes.log_probabilities(X[start:end])
        truth = labels[start:end, None, known, None].expand(-1, len(strengths), -1, 1)
        bits[:, known] -= log_p.gather(-1, truth).sum((0, 3)) / math.log(2)
    mixture = math.log2(len(strengths)) - (-bits * math.log(2)).logsumexp(0) / math.log(2)
    return DescriptionLength(mixture, len(X) * uniform, ends)


def _order(
    groups: Int[Tensor, " n"], block_ends: tuple[float, ...], seed: int
) -> tuple[Int[Tensor, " n"], tuple[int, ...]]:
    """Items in the order in which they are sent, and the number sent after each block."""
    found, group, counts = groups.cpu().unique(return_inverse=True, return_counts=True)
    shuffled = torch.from_numpy(derive_rng(seed, "description length").permutation(len(found)))
    place = torch.empty_like(shuffled)
    place[shuffled] = torch.arange(len(found))
    group_ends = counts[shuffled].cumsum(0)
    wanted = torch.tensor([share * len(groups) for share in block_ends], dtype=torch.float64)
    # The first group boundary at or beyond each block's end.
    at = torch.searchsorted(group_ends.double(), wanted - 1e-9).clamp(max=len(found) - 1)
    return place[group].argsort(stable=True), tuple(group_ends[at.unique()].tolist())
