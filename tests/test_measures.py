"""Measures of predictions against scikit-learn; their biases and intervals by resampling."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.calibration import calibration_curve
from sklearn.metrics import brier_score_loss, roc_auc_score

from probes.calibration import equal_mass_bins, equal_width_bins, reliability
from probes.measures import auroc, estimate, mean_estimate, placements


def predictions(n, n_values, *, seed, strength=1.0):
    """Log probabilities that are right on average, and labels drawn from them."""
    rng = np.random.default_rng(seed)
    log_p = torch.tensor(rng.normal(size=(n, n_values)) * strength).log_softmax(1)
    return log_p, draw(log_p.exp(), rng)


def draw(p, rng):
    return torch.tensor((p.numpy().cumsum(1) < rng.uniform(size=(len(p), 1))).sum(1))


@pytest.mark.parametrize("n_values", [2, 4])
def test_brier_equals_scikit_learn(n_values):
    log_p, labels = predictions(300, n_values, seed=0)
    p = log_p.exp().numpy()
    measured = estimate(log_p, labels, torch.arange(300) % 5)["brier"].value
    if n_values == 2:
        expected = brier_score_loss(labels.numpy(), p[:, 1])
    else:
        expected = np.mean(((p - np.eye(n_values)[labels.numpy()]) ** 2).sum(1))
    assert measured == pytest.approx(expected)


@pytest.mark.parametrize(
    ("bins", "strategy"), [(equal_width_bins, "uniform"), (equal_mass_bins, "quantile")]
)
def test_reliability_equals_scikit_learn(bins, strategy):
    log_p, labels = predictions(990, 2, seed=1)
    p = log_p.exp()[:, 1]
    diagram = reliability(p, labels, bins(p, 11))
    observed, predicted = calibration_curve(labels.numpy(), p.numpy(), n_bins=11, strategy=strategy)
    if strategy == "quantile":  # whose edges are interpolated: the middle of a bin is the same
        np.testing.assert_allclose(diagram.predicted, predicted, atol=2e-3)
    else:
        np.testing.assert_allclose(diagram.predicted, predicted)
        np.testing.assert_allclose(diagram.observed, observed)
        error = np.bincount(bins(p, 11), minlength=11) / 990 @ np.abs(observed - predicted)
        assert diagram.error == pytest.approx(error)
    assert diagram.n_items.sum() == 990


def test_an_edge_in_single_precision_belongs_to_its_bin():
    said = torch.arange(11) / 10
    assert equal_width_bins(said, 10).tolist() == [*range(10), 9]
    assert equal_width_bins(said.double(), 10).tolist() == [*range(10), 9]


def test_ties_share_a_bin_and_bins_have_equal_mass():
    p = torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    assert equal_mass_bins(p, 3).tolist() == [0, 0, 1, 1, 2, 2]
    assert len(equal_mass_bins(torch.full((50,), 0.3), 10).unique()) == 1


def test_plain_ece_by_hand():
    p = torch.tensor([0.2, 0.4, 0.6, 0.8])
    diagram = reliability(p, torch.tensor([1, 0, 1, 1]), torch.tensor([0, 0, 1, 1]))
    assert diagram.error == pytest.approx(0.5 * (0.5 - 0.3) + 0.5 * (1.0 - 0.7))
    # residuals of the first bin are 0.8 and -0.4, of the second 0.4 and 0.2
    assert diagram.noise.tolist() == pytest.approx([0.6, 0.1])


@pytest.mark.parametrize(("n", "strength"), [(300, 1.0), (2000, 3.0)])
def test_debiased_calibration_error_of_calibrated_predictions_is_zero(n, strength):
    rng = np.random.default_rng(2)
    log_p, _ = predictions(n, 2, seed=3, strength=strength)
    folds = torch.arange(n) % 5
    plugin, by_chance, debiased, squared, covered = [], [], [], [], []
    for _ in range(120):
        labels = draw(log_p.exp(), rng)
        p = log_p.exp()[:, 1]
        diagram = reliability(p, labels, equal_mass_bins(p, 15))
        plugin.append(diagram.error)
        by_chance.append(diagram.error_by_chance)
        squared.append(diagram.debiased_squared_error)
        found = estimate(log_p, labels, folds)["calibration_error"]
        debiased.append(found.value)
        low, high = found.interval()
        covered.append(low <= 0 <= high)
    assert np.mean(by_chance) == pytest.approx(np.mean(plugin), rel=0.06)
    for values in (debiased, squared):
        z = np.mean(values) / (np.std(values) / np.sqrt(len(values)))
        assert abs(z) < 3 or abs(np.mean(values)) < 0.06 * np.mean(plugin)
    assert np.mean(plugin) > 5 * abs(np.mean(debiased))
    assert np.mean(covered) >= 0.93


def test_debiased_squared_error_is_unbiased_where_predictions_are_wrong():
    """Outcomes that come true with probability p^2: the squared gap of wide bins is known."""
    rng = np.random.default_rng(4)
    p = torch.tensor(rng.uniform(size=400))
    bins = equal_width_bins(p, 8)
    gap = torch.tensor([float((p**2 - p)[bins == b].mean()) for b in range(8)])
    mass = torch.bincount(bins) / len(p)
    truth = float(mass.double() @ gap.double() ** 2)
    found = [
        reliability(p, torch.tensor(rng.uniform(size=400)) < p**2, bins).debiased_squared_error
        for _ in range(400)
    ]
    assert np.mean(found) == pytest.approx(truth, abs=3 * np.std(found) / 20)
    assert truth > 0.01


def test_weights_count_as_repeated_items_in_the_diagram():
    log_p, labels = predictions(200, 2, seed=5)
    p, repeats = log_p.exp()[:, 1], torch.arange(200) % 3 + 1
    weighted = reliability(p, labels, equal_width_bins(p, 5), weights=repeats)
    again = p.repeat_interleave(repeats)
    groups = torch.arange(200).repeat_interleave(repeats)
    repeated = reliability(
        again, labels.repeat_interleave(repeats), equal_width_bins(again, 5), groups=groups
    )
    for name in ("mass", "predicted", "observed", "noise"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 40), levels=st.integers(1, 12), seed=st.integers(0, 999))
def test_placements_are_the_share_of_pairs_won(n, levels, seed):
    rng = np.random.default_rng(seed)
    scores = torch.tensor(rng.integers(0, levels, size=n).astype(float))
    positive = torch.tensor(rng.permutation(n) < max(1, n // 3))
    found = placements(scores, positive)
    for i in range(n):
        others = scores[positive != positive[i]]
        wins = (scores[i] > others) if positive[i] else (scores[i] < others)
        expected = (wins.double() + 0.5 * (scores[i] == others)).mean()
        assert float(found[i]) == pytest.approx(float(expected))
    assert float(found[positive].mean()) == pytest.approx(float(auroc(scores, positive)))


def test_auroc_is_exact_for_many_items():
    """Ranks of many items need more digits than float32 has."""
    rng = np.random.default_rng(6)
    scores, positive = rng.normal(size=40_001), rng.uniform(size=40_001) < 0.5
    expected = roc_auc_score(positive, scores)
    found = auroc(torch.tensor(scores), torch.tensor(positive))
    assert float(found) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n_values", [2, 3])
def test_standard_errors_equal_those_of_the_bootstrap_over_groups(n_values):
    """Groups of four items with one label and nearly one prediction: items are not independent."""
    rng = np.random.default_rng(7)
    n_groups = 150
    logits = np.repeat(rng.normal(size=(n_groups, n_values)), 4, 0)
    log_p = torch.tensor(logits + 0.1 * rng.normal(size=logits.shape)).log_softmax(1)
    labels = draw(torch.tensor(logits).softmax(1)[::4], rng).repeat_interleave(4)
    groups = torch.arange(n_groups).repeat_interleave(4)
    folds = groups % 3
    found = estimate(log_p, labels, folds, groups=groups)
    resampled = {name: [] for name in found}
    by_fold = [np.flatnonzero(np.arange(n_groups) % 3 == f) for f in range(3)]
    for _ in range(200):
        drawn = np.concatenate([rng.choice(own, len(own)) for own in by_fold])
        rows = torch.tensor((drawn[:, None] * 4 + np.arange(4)).ravel())
        again = estimate(log_p[rows], labels[rows], folds[rows])
        for name, measure in again.items():
            resampled[name].append(measure.value)
    for name, measure in found.items():
        if name == "calibration_error":  # not smooth at 0: see the coverage under calibration
            continue
        expected = np.std(resampled[name])
        assert measure.standard_error(groups) == pytest.approx(expected, rel=0.2), name
        assert abs(float(measure.influence.sum())) < 1e-10, name
        assert measure.standard_error() < 0.75 * expected, name


def test_differences_are_paired():
    rng = np.random.default_rng(8)
    common = torch.tensor(rng.normal(size=500))
    one = mean_estimate(common + 0.1 * torch.tensor(rng.normal(size=500)))
    other = mean_estimate(common + 1)
    difference = one - other
    assert difference.value == pytest.approx(one.value - other.value)
    assert difference.standard_error() < 0.15 * one.standard_error()
    low, high = difference.interval()
    assert low < -1 < high
