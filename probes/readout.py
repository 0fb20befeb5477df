"""Readouts of the decision, nested: each starts from the one below plus a shrunk correction.

    raw      the network's own action logits
    bias     raw + one constant per action
    head     bias + an affine map of the final residual
    depth    head + an affine map of one block's output
    latents  a mixture of depth with the best report given what probes believe about the latents

Every rung is cross-fitted: an item is scored by readouts that never saw it. Strength, layer and
mixture are chosen on inner folds of the other items, and "no change" is always among the
candidates, so that a rung falls below the one before it only by the noise of that choice. What is
maximised is the log score sum_a v(a, y) log p_a of `mechinterp.decisions`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.logistic import fit_softmax

RUNGS = ("raw", "bias", "head", "depth", "latents")

# (held-out folds, outer fold) -> the best report's logits [items actions] given the latents'
# probes.
BeliefLogits = Callable[[frozenset[int], int], Tensor]


@dataclass(frozen=True)
class ReadoutConfig:
    """`strengths` are ridge penalties per unit of item weight, on standardised activations."""

    strengths: tuple[float, ...] = (1e-1, 1e-2, 1e-3)
    mixtures: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
    tolerance: float = 1e-5


@dataclass(frozen=True)
class Readouts:
    """Out-of-fold action logits of each rung, and what the inner folds chose for each outer one."""

    logits: Mapping[str, Float[Tensor, "items actions"]]
    chosen: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Constant:
    """Add one constant per action."""

    def __str__(self) -> str:
        return "constant"


@dataclass(frozen=True)
class Affine:
    """Add an affine map of the stream at `layer`."""

    layer: int
    strength: float

    def __str__(self) -> str:
        return f"layer {self.layer}, ridge {self.strength:g}"


@dataclass(frozen=True)
class Mixture:
    """Move the log report by `share` towards that of the beliefs about the latents."""

    share: float
    outer: int

    def __str__(self) -> str:
        return f"latents {self.share:g}"


Correction = Constant | Affine | Mixture | None  # None: no change


@dataclass
class _CrossFit:
    """Corrections fitted on row sets, each once: outer and inner folds ask for the same ones."""

    raw: Float[Tensor, "items actions"]
    streams: Mapping[int, Float[Tensor, "items d_model"]]
    weights: Float[Tensor, "items actions"]
    folds: Int[Tensor, " items"]
    beliefs: BeliefLogits | None
    config: ReadoutConfig
    known: dict[tuple[frozenset[int], tuple[Correction, ...]], Tensor] = field(default_factory=dict)

    def logits(
        self, held_out: frozenset[int], chain: tuple[Correction, ...]
    ) -> Float[Tensor, "items actions"]:
        """Logits of all items after the corrections in `chain`, fitted without `held_out`."""
        if not chain:
            return self.raw
        below, last = chain[:-1], chain[-1]
        if last is None:
            return self.logits(held_out, below)
        if isinstance(last, Mixture):
            assert self.beliefs is not None
            log_p = self.logits(held_out, below).log_softmax(1)
            return (1 - last.share) * log_p + last.share * self.beliefs(held_out, last.outer)
        if (held_out, chain) not in self.known:
            self._fit(held_out, below, last)
        return self.known[held_out, chain]

    def _fit(
        self, held_out: frozenset[int], below: tuple[Correction, ...], wanted: Constant | Affine
    ) -> None:
        """Fit a correction; all strengths of one stream are fitted together."""
        train = ~torch.isin(self.folds, torch.tensor(sorted(held_out)))
        offset = self.logits(held_out, below)
        corrections: Sequence[Correction]
        if isinstance(wanted, Constant):
            corrections, strengths = [wanted], (1.0,)
            x = torch.zeros(len(offset), 1, dtype=torch.float64)
        else:
            strengths = self.config.strengths
            corrections = [Affine(wanted.layer, strength) for strength in strengths]
            # The report so far is a feature too, so that a better stream can also turn it down: by
            # a coefficient of -1, whatever its size, which a penalty on standardised log odds
            # forbids where they are large.
            stream, log_odds = self.streams[wanted.layer].double(), offset[:, 1:] - offset[:, :1]
            x = torch.cat([stream, log_odds], dim=1)
            spread = x[train].std(0).clamp_min(1e-8)
            spread[stream.shape[1] :].clamp_max_(1.0)
            x = (x - x[train].mean(0)) / spread
        n_strengths = len(strengths)
        weights = self.weights[train]
        fit = fit_softmax(
            x[train],
            weights[:, None].expand(-1, n_strengths, -1),
            l2=torch.tensor(strengths, dtype=torch.float64) * float(weights.sum()),
            offset=offset[train, None].expand(-1, n_strengths, -1),
            tol=self.config.tolerance,
        )
        fitted = fit.logits(x, offset[:, None])
        for index, correction in enumerate(corrections):
            self.known[held_out, (*below, correction)] = fitted[:, index]

    def score(self, held_out: frozenset[int], chain: tuple[Correction, ...], fold: int) -> float:
        """Summed log score on the items of `fold`."""
        rows = self.folds == fold
        log_p = self.logits(held_out, chain)[rows].log_softmax(1)
        weights = self.weights[rows]
        return float(torch.where(weights > 0, weights * log_p, 0.0).sum())

    def choose(
        self, chain: tuple[Correction, ...], options: Sequence[Correction], outer: int
    ) -> Correction:
        """The option with the best score summed over the inner folds; the first of equals."""
        inner_folds = sorted(set(self.folds.tolist()) - {outer})
        scores = [
            sum(
                self.score(frozenset({outer, inner}), (*chain, option), inner)
                for inner in inner_folds
            )
            for option in options
        ]
        return options[int(np.argmax(scores))]


def fit_readouts(
    raw: Float[Tensor, "items actions"],
    streams: Mapping[int, Float[Tensor, "items d_model"]],
    weights: Float[Tensor, "items actions"],
    folds: Int[Tensor, " items"],
    *,
    beliefs: BeliefLogits | None = None,
    config: ReadoutConfig | None = None,
) -> Readouts:
    """Cross-fitted logits of every rung.

    `streams` maps a layer to its final-norm'ed residual at the decision position. The largest layer
    is the final residual, which `head` reads; the others are for `depth`, which is the head where
    there are none. `latents` is left out without `beliefs`. `weights` are v(a, y), the worth of
    action a given the item's label; `folds` number at least three.

    Raises AnalysisError for fewer than three folds, ConvergenceError from the solver.
    """
    fold_ids = sorted(set(folds.tolist()))
    if len(fold_ids) < 3:
        raise AnalysisError(
            f"readouts: need at least 3 folds to choose inside, got {len(fold_ids)}"
        )
    config = config or ReadoutConfig()
    fits = _CrossFit(raw.double(), streams, weights.double(), folds, beliefs, config)
    *earlier, final = sorted(streams)
    rungs = ["bias", "head", "depth", *(["latents"] if beliefs else [])]
    logits = {rung: fits.raw.clone() for rung in ("raw", *rungs)}
    chosen: dict[str, list[str]] = {rung: [] for rung in rungs}
    for outer in fold_ids:
        options: dict[str, list[Correction]] = {
            "bias": [None, Constant()],
            "head": [None, *(Affine(final, s) for s in config.strengths)],
            "depth": [None, *(Affine(layer, s) for layer in earlier for s in config.strengths)],
            "latents": [None, *(Mixture(share, outer) for share in config.mixtures)],
        }
        chain: tuple[Correction, ...] = ()
        test = folds == outer
        for rung in rungs:
            best = fits.choose(chain, options[rung], outer)
            chain = (*chain, best)
            chosen[rung].append("no change" if best is None else str(best))
            logits[rung][test] = fits.logits(frozenset({outer}), chain)[test]
    return Readouts(logits, {rung: tuple(names) for rung, names in chosen.items()})
