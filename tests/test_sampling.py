"""Which items training sees: chances against counts, effective sizes against weighted variances."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechinterp import tasks
from mechinterp.errors import SpecError, TrainingError
from mechinterp.training import sampling
from mechinterp.training.batches import STEPS_PER_DRAW, Batches
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.organism import initial_model
from mechinterp.training.supervised import train

TASK = tasks.get("triage", linear=(1.5,), xor=(), n_unneeded=0, n_fillers=1, base_log_odds=-1.0)
TINY = ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2)


def draw(n: int):
    return TASK.sample(n, seed=5, split="train")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def test_by_weight_draws_labels_in_proportion():
    n, w = 20_000, (0.2, 1.8)
    items = sampling.get("by_weight", weights=w)(draw, n, generator=generator())
    rate = draw(2 * n).labels.double().mean()
    expected = w[1] * rate / (w[1] * rate + w[0] * (1 - rate))
    assert len(items) == n
    assert abs(items.labels.double().mean() - expected) < 4.5 * np.sqrt(0.25 / n)


def test_random_share_is_smaller_batches():
    half = sampling.get("random_share", share=0.51)
    options = {"batch_size": 64, "seed": 0, "stream": "a", "data_order": 0}
    tokens, labels = Batches(TASK, sampling=half, **options)(STEPS_PER_DRAW + 3)
    assert len(tokens) == len(labels) == 32


def test_hardest_share_keeps_the_largest_losses():
    model = initial_model(
        ModelConfig(d_model=16, n_layers=1, n_heads=2, n_kv_heads=2), TASK, seed=1
    )
    losses = sampling.symmetric_losses(model, TASK.actions, batch_size=37)
    hardest = sampling.get("hardest_share", share=0.25)
    kept = hardest(draw, 50, generator=generator(), losses=losses)
    candidates = draw(200)
    logits = model(input_ids=candidates.tokens).logits[:, -1, list(TASK.actions)]
    plain = -logits.log_softmax(-1)[torch.arange(200), candidates.labels]
    torch.testing.assert_close(losses(kept), plain.detach().sort(descending=True).values[:50])


def test_batches_of_a_draw_are_alike_and_reproducible():
    """The hardest come sorted; if they stayed so, the first batch would be the hardest."""

    def losses(items):
        return items.labels.double() + torch.arange(len(items)) / len(items)

    options = {
        "batch_size": 16,
        "seed": 0,
        "stream": "a",
        "data_order": 0,
        "sampling": sampling.get("hardest_share", share=0.5),
        "losses": losses,
    }
    first, again = Batches(TASK, **options), Batches(TASK, **options)
    again(40)
    for step in (0, 31, 40):
        assert torch.equal(first(step)[0], again(step)[0])
    rates = [float(first(step)[1].double().mean()) for step in range(STEPS_PER_DRAW)]
    assert abs(np.mean(rates[:16]) - np.mean(rates[16:])) < 0.2 < np.mean(rates)


def test_effective_share_is_what_the_variance_of_a_weighted_mean_says():
    w, rates = torch.tensor([0.02, 1.98]), torch.tensor([0.5, 0.5])
    assert sampling.effective_share(w.tolist(), rates) == pytest.approx(1 / 1.9604)
    labels = torch.multinomial(rates, 200_000, replacement=True, generator=generator())
    noise = torch.randn(2_000, 100, generator=generator())
    weights = w[labels].view(2_000, 100)
    weighted = (weights * noise).sum(1) / weights.sum(1)
    kept = sampling.effective_share(w.tolist(), rates)
    assert weighted.var() == pytest.approx(1 / (100 * kept), rel=0.12)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("by_chance", {}, "does not exist; choose one of: by_weight"),
        ("by_weight", {}, r"takes the settings \['weights'\], got \[\]"),
        ("hardest_share", {"share": 0.0}, r"share must be in \(0, 1\]"),
        ("by_weight", {"weights": [-1.0, 1.0]}, "must not be negative"),
    ],
)
def test_bad_settings(name, settings, message):
    with pytest.raises(SpecError, match=message):
        sampling.get(name, **settings)


def test_training_says_how_it_sampled_and_needs_a_start_for_the_hardest(tmp_path):
    config = TrainingConfig(n_steps=2, batch_size=8)
    hardest = sampling.get("hardest_share", share=0.5)
    with pytest.raises(TrainingError, match="needs a start checkpoint"):
        train(TASK, config=config, out=tmp_path / "a", sampling=hardest, model=TINY)
    start = train(TASK, config=config, out=tmp_path / "b", model=TINY)[-1]
    branch = train(TASK, config=config, out=tmp_path / "c", sampling=hardest, start=start)[-1]
    provenance = branch.provenance
    assert provenance is not None
    assert provenance.extra["sampling"] == {"name": "hardest_share", "share": 0.5}
