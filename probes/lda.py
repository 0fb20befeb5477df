"""Linear discriminant analysis: all shrinkages and exact leave-one-out from one decomposition.

The model is scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr", shrinkage=g)`: classes of one
covariance (1 - g) S + g tr(S) / d, where S is the maximum-likelihood covariance within classes,
and priors as frequent as the classes. S is the total covariance less that of the class means, of
rank classes - 1, so one decomposition of X serves every labelling of its items, every shrinkage
(which only moves eigenvalues) and every item left out (one rank more), by Woodbury's formula.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from probes.classifier import LogitClassifier, check_labels
from probes.decomposition import Decomposition, decompose

_SINGULAR = 1e-9  # what rounding leaves of a capacitance that is singular in exact arithmetic


@dataclass(frozen=True)
class LDAFits:
    """k discriminants over a classes at s shrinkages.

    `held_out` are log probabilities for each item by the fit without it, `losses` their weighted
    mean log-loss in nats, and `best` indexes the shrinkage with the least, at which `coef` and
    `intercept` are given. Classes that a labelling does not have get log probability -inf.
    """

    shrinkages: Float[Tensor, " s"]
    held_out: Float[Tensor, "s n k a"]
    losses: Float[Tensor, "s k"]
    coefs: Float[Tensor, "s k a d"]
    intercepts: Float[Tensor, "s k a"]

    @property
    def best(self) -> Int[Tensor, " k"]:
        return self.losses.argmin(0)

    @property
    def shrinkage(self) -> Float[Tensor, " k"]:
        return self.shrinkages[self.best]

    @property
    def coef(self) -> Float[Tensor, "k a d"]:
        return self.coefs[self.best, torch.arange(self.coefs.shape[1])]

    @property
    def intercept(self) -> Float[Tensor, "k a"]:
        return self.intercepts[self.best, torch.arange(self.coefs.shape[1])]


def fit_lda_many(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    shrinkages: Float[Tensor, " s"] | tuple[float, ...],
    *,
    weights: Float[Tensor, " n"] | None = None,
) -> LDAFits:
    """Fit k labellings (classes 0, 1, ...) at s shrinkages in [0, 1], in float64 on X's device.

    Without the only item of a class that class has log probability -inf for it.

    Raises AnalysisError for input that is not finite, for a labelling of one class, for a class of
    one item where shrinkages are to be compared, and where shrinkage 0 meets a covariance without
    an inverse.
    """
    decomposition = decompose(X, weights)
    grid = torch.as_tensor(shrinkages, dtype=torch.float64, device=X.device)
    if grid.ndim != 1 or not len(grid) or not ((grid >= 0) & (grid <= 1)).all():
        raise AnalysisError(f"shrinkages: must lie between 0 and 1, got {shrinkages}")
    least = 2 if len(grid) > 1 else 1
    labels = check_labels(labels, len(X), decomposition.weights, least=least)
    one_hot = torch.nn.functional.one_hot(labels).to(decomposition.scores)
    fits = [_Discriminant(decomposition, one_hot[:, j], j) for j in range(labels.shape[1])]
    held_out = torch.stack([torch.stack([fit.leave_one_out(g) for fit in fits], 1) for g in grid])
    coefs, intercepts = zip(*[fit.coef(g) for g in grid for fit in fits], strict=True)
    share = decomposition.weights / decomposition.weights.sum()
    chosen = held_out.gather(3, labels.expand(len(grid), -1, -1)[..., None])[..., 0]
    shape = {"s": len(grid), "k": len(fits)}
    return LDAFits(
        grid,
        held_out,
        -torch.einsum("n,snk->sk", share, chosen),
        rearrange(torch.stack(coefs), "(s k) a d -> s k a d", **shape),
        rearrange(torch.stack(intercepts), "(s k) a -> s k a", **shape),
    )


class _Discriminant:
    """One labelling, in the coordinates of the decomposition. `means` are those of the classes."""

    def __init__(self, data: Decomposition, one_hot: Float[Tensor, "n a"], column: int) -> None:
        self.data, self.one_hot, self.column = data, one_hot, column
        self.n_features = len(data.mean)
        self.class_weight = data.weights @ one_hot
        moments = (one_hot * data.weights[:, None]).T @ data.scores
        self.means = moments / torch.where(self.class_weight > 0, self.class_weight, 1)[:, None]
        between = self.class_weight @ self.means.square()
        self.trace = (data.scatter - between).sum()  # of the scatter within classes
        if self.trace <= _SINGULAR * data.scatter.sum():
            raise AnalysisError(
                f"X: does not vary within the classes of column {column}; use another site or "
                "fewer classes"
            )

    def coef(self, shrinkage: Tensor) -> tuple[Float[Tensor, "a d"], Float[Tensor, " a"]]:
        """Of the logits of each class."""
        data = self.data
        diagonal = (1 - shrinkage) * data.scatter + shrinkage * self.trace / self.n_features
        update = ((1 - shrinkage) * self.class_weight).sqrt()[:, None] * self.means
        solved = self.means / diagonal  # then Woodbury: the inverse of diag - update^T update
        cross = solved @ update.T
        capacitance = torch.eye(len(cross)).to(cross) - (update / diagonal) @ update.T
        self._refuse_singular(torch.linalg.eigvalsh(capacitance).amin())
        solved = solved + torch.linalg.solve(capacitance, cross.T).T @ (update / diagonal)
        solved = solved * data.weights.sum()
        coef = solved @ data.axes.T
        prior = (self.class_weight / data.weights.sum()).log()
        intercept = prior - 0.5 * (self.means * solved).sum(1) - coef @ data.mean
        return coef, intercept

    def leave_one_out(self, shrinkage: Tensor) -> Float[Tensor, "n a"]:
        """Log probabilities of each item by the fit without it.

        Without an item of class c, at u = score - mean_c and of weight w, mean_c moves by
        -w / (W_c - w) u and the scatter within classes loses rate u u^T, rate = w W_c / (W_c - w).
        All that is needed are the inner products of the item and the class means in the metric
        `inverse`, which differs between items by the trace alone.
        """
        data, Z, means = self.data, self.data.scores, self.means
        own_weight = self.one_hot @ self.class_weight
        alone = own_weight - data.weights <= _SINGULAR * own_weight
        moved = torch.where(alone, 0.0, data.weights / (own_weight - data.weights))
        u = Z - self.one_hot @ means
        rate = moved * own_weight
        trace = self.trace - rate * u.square().sum(1)
        floor = shrinkage * trace / self.n_features
        inverse = 1 / ((1 - shrinkage) * data.scatter + floor[:, None])

        # gram[n]: inner products of the item (index 0) and the class means (1 ...)
        n, a = self.one_hot.shape
        gram = Z.new_empty(n, a + 1, a + 1)
        scaled = inverse * Z
        gram[:, 0, 0] = (scaled * Z).sum(1)
        gram[:, 0, 1:] = gram[:, 1:, 0] = scaled @ means.T
        for b in range(a):
            gram[:, 1:, b + 1] = inverse @ (means * means[b]).T

        # Rows of `update` and of `distance` are combinations of the item and the class means.
        own = self.one_hot * rate.sqrt()[:, None]
        update = torch.cat([rate.sqrt()[:, None, None], -own[:, None]], 2)
        removed = torch.nn.functional.pad(torch.diag(self.class_weight.sqrt()), (1, 0))
        update = torch.cat([removed.expand(n, -1, -1), update], 1) * (1 - shrinkage).sqrt()
        distance = torch.cat([Z.new_ones(n, a, 1), -torch.eye(a).to(Z).expand(n, -1, -1)], 2)
        stretch = (1 + self.one_hot * moved[:, None])[..., None]
        distance = distance * stretch
        capacitance = torch.eye(a + 1).to(Z) - update @ gram @ update.mT
        self._refuse_singular(torch.linalg.eigvalsh(capacitance).amin())
        cross = update @ gram @ distance.mT
        quadratic = torch.einsum("nai,nij,naj->na", distance, gram, distance)
        quadratic = quadratic + (cross * torch.linalg.solve(capacitance, cross)).sum(1)
        prior = self.class_weight - self.one_hot * data.weights[:, None]
        prior = torch.where(alone[:, None] & (self.one_hot > 0), 0.0, prior).log()
        total = data.weights.sum() - data.weights
        return (prior - 0.5 * total[:, None] * quadratic).log_softmax(1)

    def _refuse_singular(self, smallest: Tensor) -> None:
        if not smallest > _SINGULAR:
            raise AnalysisError(
                f"shrinkage: the covariance within the classes of column {self.column} has no "
                "inverse; use a (larger) shrinkage > 0 or more items"
            )


class LDAProbe(LogitClassifier):
    """Linear discriminant analysis at the best of `shrinkages` by the log-loss of leave-one-out.

    At one shrinkage it equals scikit-learn's `LinearDiscriminantAnalysis(solver="lsqr")`. After
    `fit`: `classes_`, `coef_` [1 or classes, features], `intercept_`, `shrinkage_` and `held_out_`
    [n, classes], the leave-one-out log probabilities of the items with weight.
    """

    def __init__(self, shrinkages=(0.01, 0.1, 0.5), *, class_weight=None, device: str = "cpu"):
        self.shrinkages = shrinkages
        self.class_weight = class_weight
        self.device = device

    def fit(self, X, y, sample_weight=None) -> LDAProbe:
        data = self._encode(X, y, sample_weight)
        fits = fit_lda_many(data.X, data.labels[:, None], self.shrinkages, weights=data.weights)
        self._set_logits(fits.coef[0], fits.intercept[0])
        self.shrinkage_ = float(fits.shrinkage)
        self.held_out_ = fits.held_out[fits.best[0], :, 0].cpu().numpy()
        return self
