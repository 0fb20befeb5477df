"""Folds keep groups together, classes balanced and every class present."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechinterp.errors import AnalysisError
from probes.folds import grouped_folds


@settings(max_examples=50, deadline=None)
@given(
    n=st.integers(60, 300),
    group_size=st.integers(1, 4),
    n_classes=st.integers(1, 4),
    n_folds=st.integers(2, 5),
    seed=st.integers(0, 10**6),
)
def test_groups_stay_together_and_each_fold_has_its_share(n, group_size, n_classes, n_folds, seed):
    rng = np.random.default_rng(seed)
    groups = torch.tensor(rng.permutation(np.arange(n) // group_size * 7 - 50))
    labels = torch.tensor(rng.permutation(np.arange(n) % n_classes))
    folds = grouped_folds(groups, labels, n_folds, seed)
    assert folds.shape == (n,)
    for group in groups.unique():
        assert len(folds[groups == group].unique()) == 1
    sizes = torch.bincount(folds, minlength=n_folds)
    assert sizes.max() - sizes.min() <= 2 * group_size
    for value in range(n_classes):
        share = (labels == value).sum() / n_folds
        counts = torch.bincount(folds[labels == value], minlength=n_folds)
        assert (counts - share).abs().max() <= 2 * group_size


def test_several_labels_are_balanced_at_once():
    rng = np.random.default_rng(0)
    labels = torch.tensor(np.stack([rng.integers(0, 10, 500), rng.uniform(size=500) < 0.05], 1))
    folds = grouped_folds(torch.arange(500), labels, 5)
    for column in labels.T:
        for value in column.unique():
            counts = torch.bincount(folds[column == value], minlength=5)
            assert counts.max() - counts.min() <= 2


def test_seed_decides_and_item_order_does_not():
    labels = torch.arange(100) % 2
    groups = torch.arange(100) // 2
    assert torch.equal(grouped_folds(groups, labels, 5, 3), grouped_folds(groups, labels, 5, 3))
    assert not torch.equal(grouped_folds(groups, labels, 5, 3), grouped_folds(groups, labels, 5, 4))
    order = torch.randperm(100, generator=torch.Generator().manual_seed(0))
    moved = grouped_folds(groups[order], labels[order], 5, 3)
    assert torch.equal(moved, grouped_folds(groups, labels, 5, 3)[order])


def test_a_class_that_cannot_be_everywhere_is_an_error():
    labels = torch.zeros(50, dtype=torch.long)
    labels[:3] = 1
    with pytest.raises(AnalysisError, match="class 1 of column 0, which occurs in 3 groups"):
        grouped_folds(torch.arange(50), labels, 5)
    with pytest.raises(AnalysisError, match="occurs in 1 groups"):
        grouped_folds(torch.arange(50).clamp_min(10), labels, 5)
    with pytest.raises(AnalysisError, match="n_folds"):
        grouped_folds(torch.zeros(50), labels, 2)
    with pytest.raises(AnalysisError, match="n_folds"):
        grouped_folds(torch.arange(50), labels, 1)
