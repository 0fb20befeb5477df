"""How good out-of-fold probabilities are, each measure with its interval over groups of items."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from probes.calibration import equal_mass_bins, reliability
from probes.information import pointwise_information

MEASURES = (
    *("auroc", "accuracy", "balanced_accuracy", "log_loss", "brier", "calibration_error"),
    "information",
)
CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Estimate:
    """A measure with the first-order influence of each item on it (Hampel 1974); they sum to 0.

    Influences of two measures on the same items subtract, which pairs them.
    """

    value: float
    influence: Float[Tensor, " items"]

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.influence - other.influence)

    def standard_error(self, groups: Int[Tensor, " items"] | None = None) -> float:
        """Over groups of items, which are independent of each other; each item is one if None.

        It is that of scoring the given predictions: fitting the probes again is not in it.
        """
        sums = self.influence
        if groups is not None:
            group, n_groups = _index(groups)
            sums = sums.new_zeros(n_groups).index_add(0, group.to(sums.device), sums)
        n = len(sums)
        return float(sums.square().sum().mul(n / (n - 1)).sqrt()) if n > 1 else float("nan")

    def interval(
        self, groups: Int[Tensor, " items"] | None = None, *, level: float = 0.95
    ) -> tuple[float, float]:
        """Student's interval over groups."""
        from scipy.special import stdtrit

        n = len(self.influence) if groups is None else _index(groups)[1]
        half = float(stdtrit(n - 1, 0.5 + level / 2)) * self.standard_error(groups)
        return self.value - half, self.value + half


def mean_estimate(values: Float[Tensor, " items"]) -> Estimate:
    """The mean over items."""
    mean = values.double().mean()
    return Estimate(float(mean), (values.double() - mean) / len(values))


def auroc(
    scores: Float[Tensor, "*batch n"], positive: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """Area under the ROC curve on the last axis; ties count half, NaN where a class is absent."""
    scores, positive = torch.broadcast_tensors(scores.double(), positive)
    n_positive, n = positive.sum(-1).double(), scores.shape[-1]
    wins = (_middle_ranks(scores) * positive).sum(-1) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * (n - n_positive))


def placements(
    scores: Float[Tensor, "*batch n"], positive: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch n"]:
    """The share of the other class that each item stands on the right side of; ties count half.

    Their mean over either class is the AUROC, and their spread its variance (DeLong et al. 1988).
    """
    scores, positive = torch.broadcast_tensors(scores.double(), positive)
    n_positive = positive.sum(-1, keepdim=True).double()
    # Beyond all others, the other class does not count in the ranks within one's own.
    within_positive = _middle_ranks(scores.masked_fill(~positive, torch.inf))
    within_negative = _middle_ranks(scores.masked_fill(positive, torch.inf))
    rank = _middle_ranks(scores)
    above = (rank - within_positive) / (scores.shape[-1] - n_positive)
    below = 1 - (rank - within_negative) / n_positive
    return torch.where(positive, above, below)


def estimate(
    log_probabilities: Float[Tensor, "items values"],
    labels: Int[Tensor, " items"],
    folds: Int[Tensor, " items"],
    *,
    groups: Int[Tensor, " items"] | None = None,
) -> dict[str, Estimate]:
    """The MEASURES of out-of-fold predictions; `labels` index the values.

    AUROC compares scores of one model only: it is the mean over folds. Where there are more than
    two values, AUROC and calibration error are means over values, one against the rest. Log-loss is
    in nats, information (see `probes.information`) in bits. The Brier score is (p - y)^2 for two
    values, its sum over values for more, as scikit-learn's. Calibration error is absolute, in bins
    of equal mass, debiased (see `probes.calibration`): about 0, at times below, when calibrated.
    """
    log_probabilities = log_probabilities.double()
    n_values = log_probabilities.shape[1]
    right = (log_probabilities.argmax(1) == labels).double()
    one_hot = torch.nn.functional.one_hot(labels, n_values)
    counts = one_hot.sum(0)
    recall = (right @ one_hot.double()) / counts
    probabilities = log_probabilities.exp()
    brier = (probabilities - one_hot).square().sum(1) / (2 if n_values == 2 else 1)
    return {
        "auroc": _mean_auroc(log_probabilities, one_hot.bool(), folds),
        "accuracy": mean_estimate(right),
        "balanced_accuracy": Estimate(
            float(recall.mean()), (right - recall[labels]) / (counts[labels] * n_values)
        ),
        "log_loss": mean_estimate(-log_probabilities.gather(1, labels[:, None])[:, 0]),
        "brier": mean_estimate(brier),
        "calibration_error": _mean_calibration_error(probabilities, one_hot, groups),
        "information": mean_estimate(pointwise_information(log_probabilities, labels, folds)),
    }


def score(
    log_probabilities: Float[Tensor, "items values"],
    labels: Int[Tensor, " items"],
    folds: Int[Tensor, " items"],
    *,
    groups: Int[Tensor, " items"] | None = None,
) -> dict[str, float]:
    """The values of `estimate` alone."""
    found = estimate(log_probabilities, labels, folds, groups=groups)
    return {name: measure.value for name, measure in found.items()}


def _mean_auroc(
    log_probabilities: Float[Tensor, "items values"],
    is_value: Bool[Tensor, "items values"],
    folds: Int[Tensor, " items"],
) -> Estimate:
    # Two values mirror each other. Log-odds, for probabilities near 1 round to ties.
    n_values = log_probabilities.shape[1]
    others = log_probabilities[:, None, :].masked_fill(
        torch.eye(n_values, dtype=torch.bool, device=folds.device), -torch.inf
    )
    log_odds, positive = (log_probabilities - others.logsumexp(2)).T, is_value.T
    if n_values == 2:
        log_odds, positive = log_odds[1:], positive[1:]
    areas, influence = [], log_odds.new_zeros(log_odds.shape[1])
    found = folds.unique()
    for fold in found:
        here = folds == fold
        placed, of_value = placements(log_odds[:, here], positive[:, here]), positive[:, here]
        n_positive = of_value.sum(1, keepdim=True)
        area = (placed * of_value).sum(1, keepdim=True) / n_positive
        n_own = torch.where(of_value, n_positive, of_value.shape[1] - n_positive)
        influence[here] = ((placed - area) / n_own).mean(0) / len(found)
        areas.append(area.mean())
    return Estimate(float(torch.stack(areas).mean()), influence)


def _mean_calibration_error(
    probabilities: Float[Tensor, "items values"],
    one_hot: Int[Tensor, "items values"],
    groups: Int[Tensor, " items"] | None,
) -> Estimate:
    columns = range(1, 2) if probabilities.shape[1] == 2 else range(probabilities.shape[1])
    group = None if groups is None else _index(groups)[0].to(probabilities.device)
    diagrams = []
    for value in columns:
        predicted = probabilities[:, value]
        bins = equal_mass_bins(predicted, CALIBRATION_BINS)
        diagrams.append(reliability(predicted, one_hot[:, value], bins, groups=group))
    errors = torch.tensor([diagram.debiased_error for diagram in diagrams])
    influence = torch.stack([diagram.influence for diagram in diagrams])
    return Estimate(float(errors.mean()), influence.mean(0))


def _middle_ranks(scores: Float[Tensor, "*batch n"]) -> Float[Tensor, "*batch n"]:
    """1-based ranks on the last axis, ties at the middle of theirs."""
    scores = scores.contiguous()
    ordered = scores.sort(-1).values
    below = torch.searchsorted(ordered, scores)
    up_to = torch.searchsorted(ordered, scores, right=True)
    return (below + up_to + 1).double() / 2


def _index(groups: Int[Tensor, " items"]) -> tuple[Int[Tensor, " items"], int]:
    found, index = groups.unique(return_inverse=True)
    return index, len(found)
