"""Probes of many labels on many training sets at many strengths, on one matrix of activations."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from probes.logistic import fit_logistic, fit_softmax

_MAX_LOGITS = 1 << 20  # logits fitted at once: 8 MB for each array of their size


@dataclass(frozen=True)
class GridFit:
    """Softmax probes over a values; of two values the rows of `coef` are -v / 2 and v / 2.

    `gradient_norm` is the certificate: the largest entry of the objective's gradient per unit of
    weight.
    """

    coef: Float[Tensor, "sets m k a d"]
    intercept: Float[Tensor, "sets m k a"]
    gradient_norm: Float[Tensor, "sets m k"]


def fit_grid(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    *,
    weights: Float[Tensor, "sets n k"],
    l2: Float[Tensor, "sets m k"],
    standardise: bool,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-6,
    max_iter: int = 1000,
    name: Callable[[int, int, int], str] = "set {}, strength {}, column {}".format,
) -> GridFit:
    """Fit `labels` (0..n_values-1) on every training set, whose other items have weight 0.

    `l2` is scikit-learn's 1 / C. All fits are on one design, so that a step of all is one matrix
    product; those that differ in the training set alone share a preconditioner. With `standardise`
    the penalty is on coefficients of features of deviation 1 in the training set.

    Raises AnalysisError for invalid input and ConvergenceError as `fit_logistic`; `name` is what
    they call the fit of (set, strength, column).
    """
    options = {"dtype": dtype, "tol": tol, "max_iter": max_iter}
    if not standardise:
        return _fit_parts(X, labels, n_values, weights, l2, None, name, options)

    # Scaling a feature by its deviation over the training set is scaling its penalty by the
    # variance, so all sets share one design.
    X = X.to(dtype)
    centre, scale = X.mean(0), X.std(0)
    scale = torch.where(scale > 1e-10 * centre.abs(), scale, torch.inf)
    design = (X - centre) / scale
    share = (weights > 0).to(dtype)
    share = rearrange(share / share.sum(1, keepdim=True), "s n k -> s k n")
    variance = share @ design.square() - (share @ design).square()
    variance = torch.where(variance > 1e-10, variance, 1.0)  # constant in the set: not used
    fit = _fit_parts(design, labels, n_values, weights, l2, variance, name, options)
    coef = fit.coef / scale
    return GridFit(coef, fit.intercept - coef @ centre, fit.gradient_norm)


def _fit_parts(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    n_values: int,
    weights: Float[Tensor, "sets n k"],
    l2: Float[Tensor, "sets m k"],
    variance: Float[Tensor, "sets k d"] | None,
    name: Callable[[int, int, int], str],
    options: dict,
) -> GridFit:
    """As many (strength, column) at once as caches hold, each on all training sets."""
    n_sets, m, k = l2.shape
    rows = len(X) * n_sets * (n_values if n_values > 2 else 1)
    fits = []
    for part in torch.arange(m * k, device=l2.device).split(max(1, _MAX_LOGITS // rows)):
        strength, column = part // k, part % k

        def part_name(index: int, part: Int[Tensor, " p"] = part) -> str:
            return name(index // len(part), *divmod(int(part[index % len(part)]), k))

        fit = _fit_part(
            X,
            labels[:, column],
            n_values,
            weights[..., column],
            l2[:, strength, column],
            None if variance is None else variance[:, column],
            name=part_name,
            **options,
        )
        fits.append(fit)
    joined = (torch.cat(values, 1) for values in zip(*fits, strict=True))
    return GridFit(*(value.unflatten(1, (m, k)) for value in joined))


def _fit_part(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n p"],
    n_values: int,
    weights: Float[Tensor, "sets n p"],
    l2: Float[Tensor, "sets p"],
    variance: Float[Tensor, "sets p d"] | None,
    **options,
) -> tuple[Float[Tensor, "sets p a d"], Float[Tensor, "sets p a"], Float[Tensor, "sets p"]]:
    n_sets, p = l2.shape
    # The solver works on rows: columns that are transposed rows cost no copy.
    rows = rearrange(weights, "s n p -> (s p) n")
    pair = torch.arange(p, device=l2.device).repeat(n_sets)
    families = torch.stack([l2.flatten(), pair.to(l2)]).unique(dim=1, return_inverse=True)[1]
    l2 = l2.flatten()
    if variance is not None:
        l2 = l2[:, None] * variance.flatten(0, 1)
    if n_values == 2:
        targets = labels.T.to(weights).repeat(n_sets, 1)
        fit = fit_logistic(X, targets.T, l2=l2, weights=rows.T, families=families, **options)
        half = 0.5 * torch.tensor([-1.0, 1.0], dtype=fit.coef.dtype, device=fit.coef.device)
        coef = torch.einsum("a,kd->kad", half, fit.coef)
        intercept = torch.einsum("a,k->ka", half, fit.intercept)
    else:
        one_hot = torch.nn.functional.one_hot(labels.T, n_values).to(weights)
        targets = one_hot.repeat(n_sets, 1, 1) * rows[..., None]
        targets = rearrange(targets, "k n a -> n k a")
        fit = fit_softmax(X, targets, l2=l2, families=families, **options)
        coef, intercept = fit.coef, fit.intercept
    shape = (n_sets, p)
    norm = fit.gradient_norm.unflatten(0, shape)
    return coef.unflatten(0, shape), intercept.unflatten(0, shape), norm
