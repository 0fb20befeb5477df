"""Steering: the same as hooks do in full runs, slopes as differences, directions as peers'."""

from __future__ import annotations

import pytest
import torch
from sklearn.linear_model import LogisticRegression
from tiny_models import D_MODEL, N_LAYERS, random_tokens, tiny_model

from mechinterp.errors import AnalysisError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.patching.metrics import action_log_odds
from mechinterp.randomness import derive_generator
from mechinterp.sites import Site
from mechinterp.steering import metric_gradients, steer
from probes.crossfit import ProbeConfig
from probes.jackknife import blocks_of_groups
from probes.steering import fit_steering_directions, one_deviation, random_directions

N_ITEMS = 7
WHERE = {"decision": -1, "all": None}
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2"]
EXACT = ("gpt2",)  # the others' norms or attention are in float32 whatever the weights are


def generator(*labels):
    return derive_generator(0, *labels)


@pytest.fixture(scope="module", params=FAMILIES)
def bench(request):
    model = HookedModel(tiny_model(request.param, dtype="float64"))
    labels = torch.arange(N_ITEMS) % 3
    model.family = request.param
    return model, random_tokens(N_ITEMS, 6), action_log_odds([3, 9, 20], labels), labels


def plainly(model, tokens, layer, vector, positions, labels):
    """A hook that adds, in a full run; log-odds written out."""
    site = Site("resid_post", layer - 1) if layer else Site("resid_pre", 0)
    edit = Intervention(site, lambda x: x + vector, positions=WHERE[positions])
    logits = model.run_with_interventions(tokens, [edit], positions=-1)[:, [3, 9, 20]]
    odds = []
    for row, label in zip(logits, labels, strict=True):
        p = row.softmax(0)[label]
        odds.append((p / (1 - p)).log())
    return torch.stack(odds)


@pytest.mark.parametrize("positions", WHERE)
def test_equals_an_intervention_in_a_full_run(bench, positions):
    model, tokens, metric, labels = bench
    added = {
        layer: torch.randn(3, D_MODEL, generator=generator(layer), dtype=torch.float64)
        for layer in range(N_LAYERS + 1)
    }
    found = steer(model, tokens, added, metric, positions=positions, batch_size=8)
    for layer, vectors in added.items():
        for vector, values in zip(vectors, found[layer], strict=True):
            expected = plainly(model, tokens, layer, vector, positions, labels)
            torch.testing.assert_close(values, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("positions", WHERE)
def test_gradient_is_the_slope_of_the_response(bench, positions):
    model, tokens, metric, labels = bench
    gradients = metric_gradients(
        model, tokens, range(N_LAYERS + 1), metric, positions=positions, batch_size=4
    )
    vector = torch.randn(D_MODEL, generator=generator("direction"), dtype=torch.float64)
    step, rtol = (1e-6, 1e-5) if model.family in EXACT else (1e-4, 3e-2)
    for layer, gradient in gradients.items():
        up, down = (
            plainly(model, tokens, layer, sign * step * vector, positions, labels)
            for sign in (1, -1)
        )
        expected = (up - down) / (2 * step)
        torch.testing.assert_close(gradient @ vector, expected, atol=rtol, rtol=rtol)
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_dose_zero_is_the_unpatched_run_to_the_last_bit():
    model = HookedModel(tiny_model("llama"))
    tokens, labels = random_tokens(N_ITEMS, 6), torch.zeros(N_ITEMS, dtype=torch.long)
    metric = action_log_odds([3, 9], labels)
    vectors = torch.stack([torch.zeros(D_MODEL), torch.ones(D_MODEL)])
    found = steer(model, tokens, {1: vectors, 3: vectors[:1]}, metric)
    final = model.capture(tokens, "resid_post.2", positions=-1)["resid_post.2"]
    logits = model.unembed(model.final_norm(final), torch.tensor([3, 9])).double()
    for layer in (1, 3):
        assert torch.equal(found[layer][0], logits[:, 0] - logits[:, 1])
    assert not torch.equal(found[1][1], found[1][0])


def test_layers_and_positions_that_are_not_there_are_named():
    model = HookedModel(tiny_model("llama"))
    metric = action_log_odds([3, 9], torch.zeros(2, dtype=torch.long))
    with pytest.raises(SiteError, match="layer 4: this network has layers 0 to 3"):
        steer(model, random_tokens(2, 4), {4: torch.ones(1, D_MODEL)}, metric)
    with pytest.raises(SiteError, match="positions: expected decision or all, got 'first'"):
        metric_gradients(model, random_tokens(2, 4), [1], metric, positions="first")  # type: ignore[arg-type]


def items_and_latents(n=400, d=6):
    draw = generator("items")
    X = torch.randn(n, d, generator=draw, dtype=torch.float64) * torch.arange(1, d + 1)
    binary = torch.randint(0, 2, (n,), generator=draw) + 5
    bands = torch.randint(0, 3, (n,), generator=draw)
    X[:, 0] += 2.0 * binary
    X[:, 1] += 3.0 * (bands == 2)
    return X, {"binary": binary, "bands": bands}


def test_directions_are_scikit_learns_and_differences_of_means():
    X, latents = items_and_latents()
    config = ProbeConfig(n_folds=5, strengths=(1e-2,))
    found = fit_steering_directions(X, latents, groups=torch.arange(len(X)), config=config)
    keys = [(x.latent, x.value, x.kind) for x in found]
    kinds = ("logistic", "mean_difference")
    assert set(keys) == {("binary", 6, k) for k in kinds} | {
        ("bands", v, k) for v in (0, 1, 2) for k in kinds
    }
    scale = X.std(0)
    blocks = blocks_of_groups(torch.arange(len(X)), n_blocks=10)
    for direction in found:
        z = latents[direction.latent]
        has = z == direction.value
        expected = X[has].mean(0) - X[~has].mean(0)
        if direction.kind == "logistic":
            peer = LogisticRegression(C=1 / (1e-2 * len(X)), tol=1e-10, max_iter=10_000)
            peer.fit((X / X.std(0, correction=0)).numpy(), z.numpy())
            rows = torch.from_numpy(peer.coef_)
            row = rows[0] if len(rows) == 1 else rows[direction.value] - rows.mean(0)
            expected = row / scale
        cosine = torch.nn.functional.cosine_similarity(direction.step, expected, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-6)
        along = X @ direction.step / direction.step.norm()
        assert float(along.std()) == pytest.approx(float(direction.step.norm()))
        if direction.kind == "mean_difference":
            for block, left_out in enumerate(direction.left_out):
                kept, own = X[blocks != block], has[blocks != block]
                expected = kept[own].mean(0) - kept[~own].mean(0)
                unit = expected / expected.norm()
                torch.testing.assert_close(left_out, unit * (X @ unit).std())


def test_random_directions_have_the_covariance_of_the_items():
    X, _ = items_and_latents()
    drawn = random_directions(X, 20_000, generator=generator("random"))
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(20_000, dtype=torch.float64))
    # A vector's share along an axis, drawn plainly.
    covariance = torch.distributions.MultivariateNormal(torch.zeros(6).double(), X.T.cov())
    torch.manual_seed(0)
    plain = torch.nn.functional.normalize(covariance.sample((20_000,)), dim=1)
    torch.testing.assert_close(drawn.square().mean(0), plain.square().mean(0), atol=0.01, rtol=0.05)


def test_items_that_do_not_differ_along_a_direction_are_an_error():
    X = torch.ones(60, 4).double()
    X[:, 1] = torch.randn(60, generator=generator("x"), dtype=torch.float64)
    with pytest.raises(AnalysisError, match="do not differ along its direction"):
        one_deviation(torch.eye(4)[:1], X, name="latent 'a'")
    constant = torch.ones(60, 4)
    with pytest.raises(AnalysisError, match=r"latent 'a'.*do not differ"):
        fit_steering_directions(
            constant,
            {"a": torch.arange(60) % 2},
            groups=torch.arange(60),
            config=ProbeConfig(n_folds=3),
        )
