"""Refits of the last layer against scikit-learn, closed forms and grids."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from mechinterp import folding, refits, tasks
from mechinterp.decisions import diagonal_utility, log_score
from mechinterp.errors import AnalysisError
from mechinterp.refits import ActionReadout
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

N, D = 3_000, 6
WEIGHTS = (0.2, 1.8)
UTILITY = diagonal_utility(WEIGHTS)


@pytest.fixture(scope="module")
def data():
    generator = torch.Generator().manual_seed(0)
    normed = torch.randn(N, D, generator=generator, dtype=torch.float64)
    z = normed @ torch.arange(D).double() / 3 - 0.7
    return normed, (torch.rand(N, generator=generator) < z.sigmoid()).long(), z


def score(readout, data) -> float:
    return float(log_score(readout(data[0]), data[1], UTILITY).mean())


def difference(readout) -> torch.Tensor:
    return torch.cat(
        [readout.weight[1] - readout.weight[0], (readout.bias[1] - readout.bias[0])[None]]
    )


def test_retrained_classifier_is_scikit_learns(data):
    normed, labels, _ = data
    readout = refits.retrain_classifier(normed, labels, utility=UTILITY, ridge=1e-3)
    weights = np.array(WEIGHTS)[labels]
    # Softmax over two rows penalises their difference by half.
    peer = LogisticRegression(C=2 / (1e-3 * weights.sum()), tol=1e-10, max_iter=5_000)
    peer.fit(normed, labels, sample_weight=weights)
    expected = torch.from_numpy(np.append(peer.coef_[0], peer.intercept_[0]))
    torch.testing.assert_close(difference(readout), expected, rtol=0, atol=1e-3)


def test_retraining_without_a_bias_is_scikit_learns(data):
    normed, labels, _ = data
    readout = refits.retrain_exactly(normed, labels, utility=UTILITY, ridge=1e-9)
    peer = LogisticRegression(C=1e6, tol=1e-10, max_iter=5_000, fit_intercept=False)
    peer.fit(normed, labels, sample_weight=np.array(WEIGHTS)[labels])
    expected = torch.from_numpy(np.append(peer.coef_[0], 0.0))
    torch.testing.assert_close(difference(readout), expected, rtol=0, atol=1e-3)


def test_retraining_at_a_cost_is_the_ex_post_shift_of_a_right_model(data):
    """The posterior is linear in the features: weights move the bias alone, by log(w1 / w0)."""
    normed, _, z = data
    posterior = torch.stack([1 - z.sigmoid(), z.sigmoid()], 1)
    fit = difference(refits.retrain_classifier(normed, posterior, utility=UTILITY, ridge=1e-9))
    expected = torch.arange(D + 1).double() / 3
    expected[-1] = -0.7 + np.log(WEIGHTS[1] / WEIGHTS[0])
    torch.testing.assert_close(fit, expected, rtol=0, atol=1e-3)


def test_scales_are_the_best_on_a_grid(data):
    own = ActionReadout(
        torch.stack([-torch.ones(D), torch.arange(D) / 2]).double(), torch.zeros(2).double()
    )
    scaled = refits.scale_classes(own, data[0], data[1], utility=UTILITY)
    grid = [
        score(ActionReadout(torch.tensor(s).double()[:, None] * own.weight, own.bias), data)
        for s in np.stack(np.meshgrid(*[np.linspace(-1, 3, 41)] * 2), -1).reshape(-1, 2)
    ]
    assert score(scaled, data) >= max(grid)
    ratio = scaled.weight / own.weight.where(own.weight != 0, torch.nan)
    assert float((ratio.nanmean(1, keepdim=True) - ratio).nan_to_num().abs().max()) < 1e-12


@pytest.mark.parametrize("tau", [0.0, 0.5, 1.0])
def test_normalised_rows(tau):
    own = ActionReadout(torch.tensor([[3.0, 4.0], [0.0, 2.0]]), torch.zeros(2))
    norms = refits.normalise_rows(own, tau=tau).weight.norm(dim=1)
    torch.testing.assert_close(norms, torch.tensor([5.0 ** (1 - tau), 2.0 ** (1 - tau)]))


def test_held_out_refit_of_balanced_labels_is_one_fit(data):
    normed, labels, _ = data
    n = int(torch.bincount(labels).min())
    balanced = torch.cat([(labels == y).nonzero()[:n, 0] for y in (0, 1)])
    options = {"utility": UTILITY, "ridge": 1e-3}
    generator = torch.Generator().manual_seed(1)
    many = refits.refit_held_out(
        normed[balanced], labels[balanced], generator=generator, n_fits=3, **options
    )
    one = refits.retrain_classifier(normed[balanced], labels[balanced], **options)
    torch.testing.assert_close(many.weight, one.weight, rtol=0, atol=1e-3)


def test_held_out_refit_needs_every_label(data):
    with pytest.raises(AnalysisError, match="label 1 has no items"):
        refits.refit_held_out(
            data[0], torch.zeros(N).long(), utility=UTILITY, generator=torch.Generator()
        )


def test_folded_readout_is_what_the_checkpoint_says():
    task = tasks.get("triage", n_fillers=0)
    model = initial_model(ModelConfig(), task, seed=0)
    items = task.sample(400)
    with torch.no_grad():
        normed = model.model(input_ids=items.tokens).last_hidden_state[:, -1]
        readout = refits.retrain_classifier(normed, items.labels, utility=UTILITY)
        folded = refits.fold(model, task.actions, readout, normed=normed)
        logits = folded(input_ids=items.tokens).logits[:, -1, list(task.actions)]
    # The bias goes in as the direction that is nearest to 1 on all items, and no nearer than that.
    residual = (
        normed @ folding.constant_direction(normed) - 1
    ).abs().max() * readout.bias.abs().max()
    gap = (logits - readout(normed).float()).abs().max()
    assert gap < 1.01 * float(residual) + 1e-4 < 0.1
    own = refits.own_readout(folded, task.actions)
    torch.testing.assert_close(own(normed).float(), logits, rtol=0, atol=1e-4)
