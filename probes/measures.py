"""How good predicted probabilities are: accuracy, balanced accuracy, AUROC and log-loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MEASURES = ("auroc", "accuracy", "balanced_accuracy", "log_loss")


def auroc(
    scores: Float[Tensor, "*batch n"], positive: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """Area under the ROC curve on the last axis; ties count half, NaN where a class is absent."""
    scores, positive = torch.broadcast_tensors(scores.double(), positive)
    scores, ordered = scores.contiguous(), scores.sort(-1).values
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    mean_rank = (below + up_to + 1) / 2
    n_positive, n = positive.sum(-1), scores.shape[-1]
    wins = (mean_rank * positive).sum(-1) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * (n - n_positive))


def score(
    log_probabilities: Float[Tensor, "items values"],
    labels: Int[Tensor, " items"],
    folds: Int[Tensor, " items"],
) -> dict[str, float]:
    """The MEASURES of out-of-fold predictions; `labels` index the values, log-loss is in nats.

    AUROC compares scores of one model only: it is the mean over folds, and over values (one against
    the rest) where there are more than two.
    """
    n_values = log_probabilities.shape[1]
    right = log_probabilities.argmax(1) == labels
    is_value = labels == torch.arange(n_values, device=labels.device)[:, None]
    recall = (right * is_value).sum(1) / is_value.sum(1)
    # Log-odds, for probabilities near 1 round to ties.
    others = log_probabilities[:, None, :].masked_fill(
        torch.eye(n_values, dtype=torch.bool, device=labels.device), -torch.inf
    )
    log_odds = (log_probabilities - others.logsumexp(2)).T
    areas = [auroc(log_odds[:, folds == f], is_value[:, folds == f]) for f in folds.unique()]
    return {
        "auroc": float(torch.stack(areas).mean()),
        "accuracy": float(right.double().mean()),
        "balanced_accuracy": float(recall.double().mean()),
        "log_loss": float(-log_probabilities.gather(1, labels[:, None]).mean()),
    }
