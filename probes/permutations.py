"""Shuffled labels for the ridge classifier: thousands of permutations from one decomposition.

Out-of-fold scores of ridge regression are linear in the labels, so those of all permutations are a
few matrix products, exactly what refitting for each would give. The null is that of this
classifier (least squares on one-hot labels at one strength): it tests whether activations and
labels depend on each other, and says nothing of the accuracy another probe reaches by chance.

Labels move within folds only, so that every permutation is stratified as the labels are; a null of
freely moved labels is lower than that of stratified ones. Where every group of items has one label,
whole groups trade labels; where labels vary within groups, they move within their group only.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng
from probes.classifier import check_labels
from probes.decomposition import check_strengths, decompose
from probes.measures import auroc

_MAX_VALUES = 1 << 23  # targets handled at once: 64 MB for each array of their size


@dataclass(frozen=True)
class RidgePermutations:
    """Out-of-fold measures of k labellings, as observed and for m permutations of their labels.

    AUROC is the mean over folds (scores of one model only are compared) and, for more than two
    classes, over classes against the rest; ties count half.
    """

    strength: float
    accuracy: Float[Tensor, " k"]
    auroc: Float[Tensor, " k"]
    null_accuracy: Float[Tensor, "m k"]
    null_auroc: Float[Tensor, "m k"]

    @property
    def p_accuracy(self) -> Float[Tensor, " k"]:
        """(b + 1) / (m + 1), b permutations being as accurate (Phipson and Smyth 2010)."""
        return _p_value(self.accuracy, self.null_accuracy)

    @property
    def p_auroc(self) -> Float[Tensor, " k"]:
        return _p_value(self.auroc, self.null_auroc)


def ridge_permutation_test(
    X: Float[Tensor, "n d"],
    labels: Int[Tensor, "n k"],
    folds: Int[Tensor, " n"],
    *,
    n_permutations: int = 1000,
    strength: float | None = None,
    groups: Int[Tensor, " n"] | None = None,
    seed: int = 0,
) -> RidgePermutations:
    """Is each labelling (classes 0, 1, ...) readable from `X`, out of fold, by ridge classifiers?

    `strength` is scikit-learn's alpha for `RidgeClassifier`; by default the mean squared singular
    value over the features. Choose it without looking at the labels, or the test is not valid. All
    labellings share permutations.

    Raises AnalysisError for input that is not finite, for a labelling of one class, for groups that
    folds divide, and where no permutation changes the labels.
    """
    decomposition = decompose(X)
    labels = check_labels(labels, len(X), decomposition.weights, least=1)
    if len(folds) != len(X) or len(folds.unique()) < 2:
        raise AnalysisError(f"folds: expected {len(X)} items in 2 folds or more")
    if n_permutations < 1:
        raise AnalysisError(f"n_permutations: must be at least 1, got {n_permutations}")
    if strength is None:
        strength = float(decomposition.scatter.sum() / X.shape[1])
    check_strengths("strength", (strength,), X.device)
    folds = folds.to(X.device)
    groups = torch.arange(len(X)).to(folds) if groups is None else groups.to(X.device)
    shuffles = _shuffles(labels, folds, groups.unique(return_inverse=True)[1], seed)
    predict = decomposition.leave_fold_out(strength, folds)

    results, n_classes = [], int(labels.amax()) + 1
    at_once = max(1, _MAX_VALUES // (labels.numel() * n_classes))
    for start in range(-1, n_permutations, at_once):  # -1: the labels as they are
        m = min(at_once, n_permutations - start)
        shuffled = torch.stack([shuffle(m) for shuffle in shuffles], 2)
        if start < 0:
            shuffled[0] = labels
        results.append(_measures(predict, shuffled, folds, n_classes))
    accuracy, area = (torch.cat(parts) for parts in zip(*results, strict=True))
    return RidgePermutations(strength, accuracy[0], area[0], accuracy[1:], area[1:])


def _shuffles(
    labels: Int[Tensor, "n k"], folds: Int[Tensor, " n"], group: Int[Tensor, " n"], seed: int
) -> list[Callable[[int], Int[Tensor, "m n"]]]:
    """For each labelling a source of permutations of it, all drawing the same random numbers."""
    n_groups = int(group.amax()) + 1
    first = torch.full((n_groups,), len(group), device=group.device)
    first = first.scatter_reduce(0, group, torch.arange(len(group)).to(group), "amin")
    if (folds != folds[first][group]).any():
        raise AnalysisError("groups: folds divide a group; make folds with grouped_folds")

    def source(column: Int[Tensor, " n"], j: int) -> Callable[[int], Int[Tensor, "m n"]]:
        whole = bool((column == column[first][group]).all())
        blocks, units = (folds[first], column[first]) if whole else (group, column)
        sizes = torch.nn.functional.one_hot(units)
        counts = torch.zeros(int(blocks.amax()) + 1, sizes.shape[1]).to(sizes)
        counts.index_add_(0, blocks, sizes)
        if ((counts > 0).sum(1) < 2).all():
            raise AnalysisError(
                f"labels: column {j} is constant wherever its labels could move (folds, groups); "
                "use fewer groups or other folds"
            )
        members = [(blocks == block).nonzero()[:, 0] for block in blocks.unique()]
        rng = derive_rng(seed, "permutations", "groups" if whole else "items")

        def draw(m: int) -> Int[Tensor, "m n"]:
            moved = torch.empty(m, len(units), dtype=torch.int64, device=units.device)
            for rows in members:
                order = rng.permuted(np.tile(np.arange(len(rows)), (m, 1)), axis=1)
                moved[:, rows] = units[rows][torch.from_numpy(order).to(rows)]
            return moved[:, group] if whole else moved

        return draw

    return [source(labels[:, j], j) for j in range(labels.shape[1])]


def _measures(
    predict: Callable[[Tensor], Tensor],
    labels: Int[Tensor, "m n k"],
    folds: Int[Tensor, " n"],
    n_classes: int,
) -> tuple[Float[Tensor, "m k"], Float[Tensor, "m k"]]:
    """Accuracy and AUROC of out-of-fold scores for each labelling, fitted to itself."""
    m, _, k = labels.shape
    classes = torch.arange(1 if n_classes == 2 else 0, n_classes, device=labels.device)
    positive = rearrange(labels, "m n k -> m k 1 n") == classes[:, None]
    scores = predict(rearrange(positive, "m k a n -> n (m k a)").double())
    scores = rearrange(scores, "n (m k a) -> m k a n", m=m, k=k)
    predicted = scores[:, :, 0] > 0.5 if n_classes == 2 else scores.argmax(2)
    accuracy = (predicted == rearrange(labels, "m n k -> m k n")).double().mean(2)
    areas = [_area(scores[..., folds == f], positive[..., folds == f]) for f in folds.unique()]
    area = torch.stack(areas).nanmean(0)  # a fold without a class has no AUROC for it
    return accuracy, area.nanmean(2)


def _area(
    scores: Float[Tensor, "*batch n"], positive: Bool[Tensor, "*batch n"]
) -> Float[Tensor, "*batch"]:
    """AUROC; without ties, which are rare here, one sort does it."""
    ordered, order = scores.sort(-1)
    if (ordered[..., 1:] == ordered[..., :-1]).any():
        return auroc(scores, positive)
    n, n_positive = scores.shape[-1], positive.sum(-1).double()
    rank = torch.arange(1, n + 1, device=scores.device)
    wins = (positive.gather(-1, order) * rank).sum(-1) - n_positive * (n_positive + 1) / 2
    return wins / (n_positive * (n - n_positive))


def _p_value(observed: Float[Tensor, " k"], null: Float[Tensor, "m k"]) -> Float[Tensor, " k"]:
    # Sums in another order differ in the last bits: such a tie is a tie.
    return ((null >= observed - 1e-12).double().sum(0) + 1) / (len(null) + 1)
