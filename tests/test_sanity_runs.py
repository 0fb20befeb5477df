"""The numpy models of docs/findings/sanity_runs.py against torch, scikit-learn and differences."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.optimize import approx_fprime
from scipy.special import logit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

DIRECTORY = Path(__file__).parent.parent / "docs" / "findings"
sys.path.insert(0, str(DIRECTORY))

import sanity_report  # noqa: E402
import sanity_runs  # noqa: E402

WEIGHTS = (0.2, 1.8)


def network(seed: int = 0) -> sanity_runs.Parameters:
    rng = np.random.default_rng(seed)
    parameters = sanity_runs.initial_parameters(rng)
    return [array + 0.1 * rng.standard_normal(array.shape) for array in parameters]


def torch_loss(parameters: list[torch.Tensor], x: np.ndarray, labels: np.ndarray) -> torch.Tensor:
    w1, b1, w2, b2, w3, b3 = parameters
    z = ((torch.as_tensor(x) @ w1 + b1).relu() @ w2 + b2).relu() @ w3 + b3
    y = torch.as_tensor(labels)
    each = torch.nn.functional.binary_cross_entropy_with_logits(z[:, 0], y, reduction="none")
    return (torch.tensor(WEIGHTS, dtype=y.dtype)[y.long()] * each).mean()


@pytest.mark.parametrize(("weights", "offset"), [(WEIGHTS, 0.0), ((1, 1), -2.0)])
def test_gradient_is_that_of_finite_differences(weights, offset):
    items = sanity_runs.sample("interaction", 1.0, 40, 0, "train")
    parameters = network()
    by = sanity_runs.gradient(parameters, items.x, items.labels, weights, offset)
    for index, array in enumerate(parameters):

        def loss(flat, index=index, shape=array.shape):
            changed = [*parameters]
            changed[index] = flat.reshape(shape)
            z = sanity_runs.forward(changed, items.x)[2] + offset
            return sanity_runs.weighted_loss(z, items.labels, weights).mean()

        slow = approx_fprime(array.ravel(), loss, 1e-7)
        np.testing.assert_allclose(by[index].ravel(), slow, atol=1e-6)


def test_training_is_that_of_torch():
    items = sanity_runs.sample("interaction", 3.0, 60, 0, "train")
    parameters = network()
    theirs = [torch.tensor(array, requires_grad=True) for array in parameters]
    adam = sanity_runs.Adam(parameters, 1e-2)
    optimizer = torch.optim.Adam(theirs, lr=1e-2)
    for _ in range(20):
        adam.step(sanity_runs.gradient(parameters, items.x, items.labels, WEIGHTS))
        optimizer.zero_grad()
        torch_loss(theirs, items.x, items.labels).backward()
        optimizer.step()
    for ours, reference in zip(parameters, theirs, strict=True):
        np.testing.assert_allclose(ours, reference.detach().numpy(), atol=1e-9)


def test_an_epoch_shows_every_item_at_most_once():
    x, labels = np.zeros((4_000, 12)), np.zeros(4_000)
    seen = []

    def note(parameters, batch, *_, **__):
        seen.extend(batch[:, 0])
        return [np.zeros_like(array) for array in parameters]

    x[:, 0] = np.arange(4_000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sanity_runs, "gradient", note)
        epochs = [epoch for epoch, _ in sanity_runs.train(x, labels, 0, 1e-3, 2)]
    assert epochs == [1, 2]
    assert len(seen) == 2 * 62 * 64
    assert len(set(seen[: 62 * 64])) == len(set(seen[62 * 64 :])) == 62 * 64


def test_logistic_regression_is_that_of_scikit_learn():
    items = sanity_runs.sample("interaction", 3.0, 300, 0, "train")
    weights = np.where(items.labels > 0, WEIGHTS[1], WEIGHTS[0])
    theirs = LogisticRegression(C=np.inf, tol=1e-10, max_iter=10_000)
    theirs.fit(items.x, items.labels, sample_weight=weights)
    ours = sanity_runs.fit_logistic(sanity_runs.with_ones(items.x), items.labels, WEIGHTS)
    np.testing.assert_allclose(ours, [*theirs.coef_[0], *theirs.intercept_], atol=1e-4)


@pytest.mark.parametrize("name", sanity_runs.WEIGHTS)
def test_on_the_posterior_itself_weighting_is_the_ex_post_shift(name):
    """The algebra: the weighted optimum is the posterior shifted by log(w1 / w0)."""
    weights = sanity_runs.WEIGHTS[name]
    items = sanity_runs.sample("linear", 3.0, 500, 0, "train")
    x = sanity_runs.with_ones(items.x)
    truth = np.array([1.5] * 4 + [0.0] * 8)
    shift = sanity_runs.ex_post_shift(weights)
    np.testing.assert_allclose(sanity_runs.fit_logistic(x, items.posterior), [*truth, 0], atol=1e-5)
    np.testing.assert_allclose(
        sanity_runs.fit_logistic(x, items.posterior, weights), [*truth, shift], atol=1e-4
    )


def test_separable_labels_are_refused():
    x = np.linspace(-1, 1, 20)[:, None]
    with pytest.raises(RuntimeError, match="separated"):
        sanity_runs.fit_logistic(x, (x[:, 0] > 0).astype(float))


def test_auroc_is_that_of_all_items_with_both_labels():
    rng = np.random.default_rng(0)
    z, q = rng.standard_normal(200), rng.random(200)
    labels = np.repeat([1, 0], 200)
    expected = roc_auc_score(labels, np.tile(z, 2), sample_weight=np.append(q, 1 - q))
    assert sanity_runs.auroc(z, q) == pytest.approx(expected)


def test_the_posterior_has_no_loss_and_the_best_constant_has_all():
    data = sanity_runs.draw_data("interaction", 1.0, 0)
    shift = sanity_runs.ex_post_shift(WEIGHTS)
    q, held_out = data.test.posterior, data.held_out.posterior
    best = sanity_runs.measures(logit(q) + shift, logit(held_out) + shift, data, WEIGHTS)
    assert sanity_runs.as_share(best["weighted_loss"], q, WEIGHTS) == pytest.approx(0)
    assert best["after_bias_refit"] == pytest.approx(best["weighted_loss"], rel=1e-3)
    off = sanity_runs.measures(logit(q), logit(held_out), data, WEIGHTS)
    assert off["after_bias_refit"] == pytest.approx(best["after_bias_refit"])
    assert off["weighted_loss"] > 1.1 * best["weighted_loss"]
    assert off["utility"] < best["utility"]
    constant = np.full_like(q, logit(q.mean()) + shift)
    loss = sanity_runs.weighted_loss(constant, q, WEIGHTS).mean()
    assert sanity_runs.as_share(loss, q, WEIGHTS) == pytest.approx(1)


def test_subsample_has_the_effective_size():
    labels = np.repeat([0.0, 1.0], 2_000)
    part = sanity_runs.effective_part(labels, (0.02, 1.98), 0)
    assert len(part) == len(set(part)) == round(4_000 / 1.9604)
    assert 0.4 < labels[part].mean() < 0.6


def test_contrasts_pair_the_seeds():
    runs = pd.DataFrame(
        {"signal": 1.0, "arm": arm, "seed": seed, "loss": loss}
        for arm, losses in {"ex_post": [1.0, 2.0, 4.0], "weighted": [1.5, 2.5, 4.5]}.items()
        for seed, loss in enumerate(losses)
    )
    table = sanity_runs.summarise(runs).set_index("arm")
    difference = table.loc["weighted - ex_post"]
    assert difference["mean"] == difference["low"] == difference["high"] == 0.5
    assert table.loc["ex_post", "mean"] == pytest.approx(7 / 3)
    assert table.loc["ex_post", "n_seeds"] == 3


def test_direction_needs_an_interval_without_zero():
    rows = [(0.1, 0.2, "higher"), (-0.2, -0.1, "lower"), (-0.1, 0.1, "undecided")]
    for low, high, expected in rows:
        assert sanity_report.direction({"low": low, "high": high}) == expected


def test_the_page_has_the_tables_of_the_committed_runs():
    table = pd.read_csv(DIRECTORY / "utility_weighted" / "sanity_runs.csv")
    page = (DIRECTORY / "utility_weighted" / "sanity_runs.md").read_text(encoding="utf-8")
    assert sanity_report.report(table) in page
