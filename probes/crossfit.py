"""Linear probes fitted so that no item is scored by a probe that has seen it or its group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.logistic import fit_softmax

_MAX_LOGITS = 1 << 22  # logits fitted at once: 32 MB for each array of their size


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
    tol: float = 1e-4
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
    n_sets, m, k = strengths.shape
    at_once = max(1, _MAX_LOGITS // (len(X) * m * k * n_values))
    if n_sets > at_once:
        parts = [
            fit_probes(X, labels, n_values, train=some, strengths=theirs, tol=tol)
            for some, theirs in zip(train.split(at_once), strengths.split(at_once), strict=True)
        ]
        coefs, intercepts = zip(*[(part.coef, part.intercept) for part in parts], strict=True)
        return LinearProbes(torch.cat(coefs), torch.cat(intercepts))

    # Scaling a feature by its deviation over the training set is scaling its penalty by the
    # variance, so all sets share one design. Items outside a set have no weight in it.
    centre, scale = X.mean(0), X.std(0)
    design = (X - centre) / torch.where(scale > 1e-10 * centre.abs(), scale, torch.inf)
    share = train.double() / train.sum(1, keepdim=True)
    variance = share @ design.square() - (share @ design).square()
    variance = torch.where(variance > 1e-10, variance, 1.0)  # constant in the set: not used
    # For two values softmax halves the penalty on their difference; scikit-learn's is the full one.
    factor = train.sum(1, keepdim=True) * (2 if n_values == 2 else 1)
    l2 = torch.einsum("smk,sd->smkd", strengths, factor * variance)
    one_hot = torch.nn.functional.one_hot(labels, n_values).double()
    targets = torch.einsum("nka,sn->nska", one_hot, train.double())
    fit = fit_softmax(
        design,
        repeat(targets, "n s k a -> n (s m k) a", m=m),
        l2=rearrange(l2, "s m k d -> (s m k) d"),
        tol=tol,
    )
    coef = fit.coef / scale.clamp_min(1e-30)
    return LinearProbes(
        rearrange(coef, "(s m k) a d -> s m k a d", s=n_sets, m=m),
        rearrange(fit.intercept - coef @ centre, "(s m k) a -> s m k a", s=n_sets, m=m),
    )


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
