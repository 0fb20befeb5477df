"""Permutations by products against refits, and the calibration of the p-values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import kstest
from sklearn.linear_model import Ridge, RidgeClassifier
from sklearn.metrics import roc_auc_score

from mechinterp.errors import AnalysisError
from probes.folds import grouped_folds
from probes.permutations import _shuffles, ridge_permutation_test


def noise(n=60, d=8, n_classes=2, seed=0, size=1):
    """Items in groups of `size`, which share part of their activations; labels know nothing."""
    rng = np.random.default_rng(seed)
    groups = np.arange(n) // size
    X = rng.normal(size=(n, d)) + rng.normal(size=(n, d))[groups]
    labels = rng.permutation(np.arange(-(-n // size)) % n_classes)[groups]
    X, labels, groups = torch.tensor(X), torch.tensor(labels), torch.tensor(groups)
    return X, labels, groups, grouped_folds(groups, labels, 4, seed)


def refitted(X, y, folds, strength):
    """Accuracy and AUROC of scikit-learn's ridge classifiers, fold by fold."""
    X, y, folds = X.numpy(), y.numpy(), folds.numpy()
    right, areas = [], []
    for fold in np.unique(folds):
        train, test = folds != fold, folds == fold
        classifier = RidgeClassifier(strength).fit(X[train], y[train])
        right.extend(classifier.predict(X[test]) == y[test])
        for a in range(1 if y.max() == 1 else 0, y.max() + 1):
            score = Ridge(strength).fit(X[train], y[train] == a).predict(X[test])
            areas.append(roc_auc_score(y[test] == a, score))
    return np.mean(right), np.mean(areas)


@pytest.mark.parametrize("n_classes", [2, 3])
@pytest.mark.parametrize("d", [8, 90])
def test_every_permutation_equals_refitting(n_classes, d):
    X, labels, _, folds = noise(d=d, n_classes=n_classes)
    other = (X[:, 0] > 0).long()
    both = torch.stack([labels, other], 1)
    test = ridge_permutation_test(X, both, folds, n_permutations=12, strength=3.0, seed=5)
    draws = [draw(13) for draw in _shuffles(both, folds, torch.arange(60), 5)]
    for j in range(2):
        found = (test.accuracy[j], test.auroc[j])
        np.testing.assert_allclose(found, refitted(X, both[:, j], folds, 3.0), atol=1e-12)
        for i in range(12):
            found = (test.null_accuracy[i, j], test.null_auroc[i, j])
            expected = refitted(X, draws[j][i + 1], folds, 3.0)
            np.testing.assert_allclose(found, expected, atol=1e-12)


def test_p_value_counts_the_permutations_as_good():
    X, labels, _, folds = noise()
    test = ridge_permutation_test(X, labels[:, None], folds, n_permutations=99)
    as_good = (test.null_accuracy >= test.accuracy - 1e-12).sum()
    assert test.p_accuracy.item() == (as_good.item() + 1) / 100
    signal = (X @ torch.ones(8).double() > 0).long()
    test = ridge_permutation_test(X, signal[:, None], folds, n_permutations=199)
    assert test.p_accuracy.item() == test.p_auroc.item() == 1 / 200
    assert test.strength == pytest.approx(float((X - X.mean(0)).square().sum() / 8))


@pytest.mark.parametrize("size", [1, 4])
def test_p_values_are_uniform_under_noise(size):
    """With groups of like items too, which a permutation of items would call significant."""
    p, by_item = [], []
    for seed in range(150):
        X, labels, groups, folds = noise(n=80, seed=seed, size=size)
        column, options = labels[:, None], {"n_permutations": 99, "seed": seed}
        test = ridge_permutation_test(X, column, folds, groups=groups, **options)
        p.append(test.p_auroc.item())
        if size > 1:
            by_item.append(ridge_permutation_test(X, column, folds, **options).p_auroc.item())
    assert kstest(p, "uniform").pvalue > 0.01
    assert 0.01 <= np.mean(np.array(p) <= 0.05) <= 0.1
    if size > 1:
        assert kstest(by_item, "uniform").pvalue < 1e-3


def test_labels_move_within_folds_and_whole_groups_or_within_groups():
    _, labels, groups, folds = noise(n=80, size=4)
    within = torch.arange(80) % 2  # varies within groups
    both = torch.stack([labels, within], 1)
    of_groups, of_items = (draw(200) for draw in _shuffles(both, folds, groups, 0))
    for shuffled in of_groups:
        assert (shuffled == shuffled[4 * groups]).all()
        for fold in range(4):
            assert shuffled[folds == fold].sum() == labels[folds == fold].sum()
    assert 0.3 < (of_groups != labels).double().mean() < 0.7
    assert (of_items.view(200, 20, 4).sum(2) == 2).all()
    assert 0.4 < (of_items != within).double().mean() < 0.6
    again = _shuffles(both, folds, groups, 0)[0](200)
    assert (again == of_groups).all()
    assert (again != _shuffles(both, folds, groups, 1)[0](200)).any()


def test_invalid_input_is_named():
    X, labels, groups, folds = noise(size=4)
    column = labels[:, None]
    with pytest.raises(AnalysisError, match="groups: folds divide a group"):
        ridge_permutation_test(X, column, torch.arange(60) % 4, groups=groups)
    with pytest.raises(AnalysisError, match="column 0 is constant wherever"):
        ridge_permutation_test(X, (folds > 1).long()[:, None], folds)
    with pytest.raises(AnalysisError, match="60 items in 2 folds"):
        ridge_permutation_test(X, column, 0 * folds)
    with pytest.raises(AnalysisError, match="n_permutations"):
        ridge_permutation_test(X, column, folds, n_permutations=0)
    with pytest.raises(AnalysisError, match="strength"):
        ridge_permutation_test(X, column, folds, strength=-1.0)
    with pytest.raises(AnalysisError, match="column 0 needs two classes"):
        ridge_permutation_test(X, 0 * column, folds)
