"""Linear probes fitted so that no item is scored by a probe that has seen it or its group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.grid import fit_grid


@dataclass(frozen=True)
class ProbeConfig:
    """How to cross-validate.

    `strengths` are L2 penalties per item on standardised activations (scikit-learn's 1 / (C n)). Of
    the `n_folds`, `n_inner_folds` (an even number) choose the strength for each other one. `tol`
    bounds the gradient per item of each fit.
    """

    n_folds: int = 5
    n_inner_folds: int = 2
    strengths: tuple[float, ...] = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
    tol: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if self.n_inner_folds % 2 or not 2 <= self.n_inner_folds < self.n_folds:
            raise AnalysisError(
                f"n_inner_folds: must be even, at least 2 and less than n_folds = {self.n_folds}, "
                f"got {self.n_inner_folds}"
            )
        if not self.strengths or min(self.strengths) <= 0:
            raise AnalysisError(f"strengths: must be positive numbers, got {self.strengths}")


@dataclass(frozen=True)
class LinearProbes:
    """Probes over a values each: log p(value | x) = log softmax(coef x + intercept)."""

    coef: Float[Tensor, "*k a d"]
    intercept: Float[Tensor, "*k a"]

    def __getitem__(self, index: int) -> LinearProbes:
        return LinearProbes(self.coef[index], self.intercept[index])

    def log_probabilities(self, X: Float[Tensor, "n d"]) -> Float[Tensor, "n *k a"]:
        logits = torch.einsum("nd,...d->n...", X.to(self.coef), self.coef) + self.intercept
        return logits.log_softmax(-1)


@dataclass(frozen=True)
class CrossFit:
    """Probes fitted without each fold, their strengths, and what they say about that fold."""

    log_probabilities: Float[Tensor, "n k a"]
    strengths: Float[Tensor, "folds k"]
    probes: LinearProbes


def fit_probes(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    *,
    train: Bool[Tensor, "sets n"],
    strengths: Float[Tensor, "sets m k"],
    tol: float,
) -> LinearProbes:
    """Probes [sets m k] of `labels` (0..n_values-1), on activations standardised per training set.

    More than two values are fitted jointly, by softmax: the probabilities of a latent then minimise
    one log-loss and add up, which those of separate one-against-the-rest fits do not.
    """
    sizes = train.sum(1).to(strengths)
    fit = fit_grid(
        X,
        labels,
        n_values,
        weights=repeat(train.to(strengths), "s n -> s n k", k=labels.shape[1]),
        l2=strengths * sizes[:, None, None],
        standardise=True,
        tol=tol,
    )
    return LinearProbes(fit.coef, fit.intercept)


def cross_fit(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    folds: Int[Tensor, " n"],
    config: ProbeConfig,
) -> CrossFit:
    """Nested cross-validation: fold f is scored by probes fitted on the other folds, at the
    strength that has the least log-loss on f's inner folds, each held out in turn as well.

    The inner folds of f are its neighbours on the ring of folds. A fit without f and g serves both:
    g is an inner fold of f, and f one of g. Deviations, strengths and weights never see the fold
    that they are scored on.
    """
    X, n_folds, k = X.double(), config.n_folds, labels.shape[1]
    grid = X.new_tensor(config.strengths)
    in_fold = folds == torch.arange(n_folds, device=folds.device)[:, None]
    reach = range(1, config.n_inner_folds // 2 + 1)
    pairs = [(f, (f + step) % n_folds) for step in reach for f in range(n_folds)]
    train = torch.stack([~(in_fold[f] | in_fold[g]) for f, g in pairs])
    strengths = repeat(grid, "m -> s m k", s=len(pairs), k=k)
    probes = fit_probes(X, labels, n_values, train=train, strengths=strengths, tol=config.tol)
    losses = X.new_zeros(n_folds, len(grid), k)
    for index, pair in enumerate(pairs):
        for outer, inner in (pair, pair[::-1]):
            rows = in_fold[inner]
            log_p = probes[index].log_probabilities(X[rows])
            truth = repeat(labels[rows], "n k -> n m k 1", m=len(grid))
            losses[outer] -= log_p.gather(-1, truth).sum((0, 3))

    chosen = grid[losses.argmin(1)]
    probes = fit_probes(
        X, labels, n_values, train=~in_fold, strengths=chosen[:, None], tol=config.tol
    )
    probes = LinearProbes(probes.coef[:, 0], probes.intercept[:, 0])
    return CrossFit(out_of_fold(probes, X, folds), chosen, probes)


def out_of_fold(
    probes: LinearProbes, X: Float[Tensor, "n d"], folds: Int[Tensor, " n"]
) -> Float[Tensor, "n k a"]:
    """Log probabilities of each item from the probes [folds k] fitted without its fold."""
    log_probabilities = probes.coef.new_empty(len(X), *probes.intercept.shape[1:])
    for fold in range(len(probes.coef)):
        rows = folds == fold
        log_probabilities[rows] = probes[fold].log_probabilities(X[rows])
    return log_probabilities
