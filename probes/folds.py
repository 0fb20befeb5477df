"""Folds for cross-validation: grouped, stratified by several labels at once, reproducible."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng


def grouped_folds(
    groups: Int[Tensor, " items"],
    labels: Int[Tensor, "items ..."],
    n_folds: int = 5,
    seed: int = 0,
    *,
    names: Sequence[str] | None = None,
) -> Int[Tensor, " items"]:
    """The fold 0..n_folds-1 of each item; items of one group share a fold.

    Every column of `labels` is stratified: groups, the largest first and otherwise in an order
    drawn from `seed`, go where they leave the squared relative deviations of all class counts and
    of the fold sizes smallest.

    Raises AnalysisError where a fold lacks a class of some column; `names` are for its message.
    """
    columns = (labels[:, None] if labels.ndim == 1 else labels).cpu().numpy()
    _, group = np.unique(groups.cpu().numpy(), return_inverse=True)
    n_groups = group.max(initial=-1) + 1
    if len(columns) != len(group) or n_folds < 2 or n_groups < n_folds:
        raise AnalysisError(
            f"n_folds: cannot make {n_folds} folds of {len(columns)} items in {n_groups} groups; "
            "use 2 or more folds and at least as many groups"
        )
    classes = [
        (column, value)
        for column in range(columns.shape[1])
        for value in np.unique(columns[:, column])
    ]
    members = np.stack([columns[:, column] == value for column, value in classes], 1)
    counted = np.concatenate([members, np.ones((len(group), 1))], 1)
    counts = np.zeros((n_groups, counted.shape[1]))
    np.add.at(counts, group, counted)

    shuffled = derive_rng(seed, "folds", n_folds).permutation(n_groups)
    order = shuffled[np.argsort(-counts[shuffled, -1], kind="stable")]
    share = counts.sum(0) / n_folds
    surplus = np.tile(-share, (n_folds, 1))
    fold_of_group = np.empty(n_groups, dtype=np.int64)
    for g in order:
        # Adding c changes sum (surplus / share)^2 by (2 surplus . c + c . c) / share^2.
        fold = int(np.argmin(surplus @ (counts[g] / share**2)))
        fold_of_group[g] = fold
        surplus[fold] += counts[g]

    missing = np.argwhere(surplus + share < 0.5)
    if len(missing):
        column, value = classes[missing[0, 1]]
        name = names[column] if names else f"column {column}"
        n_having = int((counts[:, missing[0, 1]] > 0).sum())
        raise AnalysisError(
            f"labels: {n_folds} folds cannot all have class {value} of {name}, which "
            f"occurs in {n_having} groups; use fewer folds, more items, or merge classes"
        )
    return torch.from_numpy(fold_of_group[group])
