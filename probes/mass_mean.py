"""Mass-mean probing (Marks and Tegmark 2023, arXiv:2310.06824, section 5): nothing is optimised.

The direction between two classes is the difference of their means, or that difference through the
inverse covariance within classes. For more classes each has its mean as direction. A threshold lies
midway between means, whatever the frequencies of the classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from probes.classifier import LogitClassifier, check_labels
from probes.decomposition import check_items

_CONSTANT = 1e-10  # of the largest variance within classes: below, a direction counts as constant


@dataclass(frozen=True)
class MassMeanFits:
    """k mass-mean probes over a classes: logits X coef^T + intercept.

    `held_out` are logits of each item by the means without it; -inf for classes that a labelling
    does not have, or has in that item alone.
    """

    coef: Float[Tensor, "k a d"]
    intercept: Float[Tensor, "k a"]
    held_out: Float[Tensor, "n k a"]


def fit_mass_mean_many(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    *,
    weights: Float[Tensor, " n"] | None = None,
) -> MassMeanFits:
    """Plain mass-mean probes of k labellings (classes 0, 1, ...), in float64 on X's device.

    Leave-one-out is exact: without an item of weight w the mean of its class, of weight W, is
    W / (W - w) times as far from it. (With the covariance, that is `fit_lda_many`.)

    Raises AnalysisError for input that is not finite and for a labelling of one class.
    """
    X, weights = check_items(X, weights)
    labels = check_labels(labels, len(X), weights, least=1)
    one_hot = torch.nn.functional.one_hot(labels).double()
    class_weight = torch.einsum("n,nka->ka", weights, one_hot)
    centre = weights @ X / weights.sum()
    centred = X - centre
    moments = rearrange(one_hot * weights[:, None, None], "n k a -> (k a) n") @ centred
    means = moments.view(*class_weight.shape, -1) / class_weight[..., None].clamp_min(1e-300)
    bias = torch.where(class_weight > 0, -0.5 * means.square().sum(-1), -torch.inf)
    logits = torch.einsum("nd,kad->nka", centred, means) + bias

    half_norm = 0.5 * centred.square().sum(1)[:, None]
    own_weight = torch.einsum("nka,ka->nk", one_hot, class_weight)
    left = own_weight - weights[:, None]
    stretch = torch.where(left > 1e-12 * own_weight, own_weight / left, torch.inf)
    own = half_norm - (half_norm - (logits.nan_to_num() * one_hot).sum(2)) * stretch.square()
    own = torch.where(stretch.isinf(), -torch.inf, own)
    held_out = torch.where(one_hot > 0, own[..., None], logits)
    return MassMeanFits(means, bias - means @ centre, held_out)


class MassMeanProbe(LogitClassifier):
    """Difference of class means; with `covariance`, through the (pseudo-)inverse covariance.

    `predict_proba` is the paper's sigmoid(direction . x + intercept). It is calibrated for Gaussian
    classes of one covariance where that is the identity or `covariance` is True; elsewhere only
    its order means something. Weights of classes would change nothing: a mean has one class. After
    `fit`: `classes_`, `coef_` [1 or classes, features], `intercept_`.
    """

    def __init__(self, *, covariance: bool = False, device: str = "cpu"):
        self.covariance = covariance
        self.device = device

    def fit(self, X, y, sample_weight=None) -> MassMeanProbe:
        data = self._encode(X, y, sample_weight)
        fits = fit_mass_mean_many(data.X, data.labels[:, None], weights=data.weights)
        centre = data.weights @ data.X / data.weights.sum()
        means, coef = fits.coef[0], fits.coef[0]
        if self.covariance:
            within = data.X - centre - means[data.labels]
            covariance = (within * data.weights[:, None]).T @ within / data.weights.sum()
            coef = means @ torch.linalg.pinv(covariance, hermitian=True, rtol=_CONSTANT)
        bias = -0.5 * (means * coef).sum(1)
        self._set_logits(coef, bias - coef @ centre)
        return self
