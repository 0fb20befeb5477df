"""What is patched in, against plain hooks and loops over single prompts."""

from __future__ import annotations

import itertools
import os

import numpy as np
import pytest
import torch
from checkpoint_factory import tiny_checkpoint
from safetensors.torch import load_file
from tiny_models import D_VOCAB, N_LAYERS, random_tokens, shared_model, tiny_model

from mechinterp.errors import AnalysisError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.naive import capture_by_hooks
from mechinterp.patching.plan import make_plan
from mechinterp.patching.reference import (
    ReferenceMean,
    capture_grain,
    derangement,
    mean_activations,
    resampled_activations,
    site_shape,
    zero_activations,
)
from mechinterp.patching.stored import StoredActivations, store_activations
from mechinterp.patching.sweeps import patch_sites
from mechinterp.sites import GRAINS, Site

GRAINS_BY_HOOKS = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "head")
TOKENS = random_tokens(7, 5)
ROLES = np.array([["a", "b", "a", "b", "end"], ["b", "a", "a", "b", "end"]] * 3 + [["a"] * 5])
LENGTHS = torch.tensor([5, 3, 4, 5, 2, 5, 3])
METRIC = action_log_odds((3, 11), torch.tensor([0, 1, 1, 0, 1, 0, 0]))


def alone(grain: str, item: int) -> list[torch.Tensor]:
    """Activations of one unpadded prompt, by plain hooks."""
    tokens = TOKENS[item : item + 1, : LENGTHS[item]]
    return [x[0] for x in capture_by_hooks(shared_model("llama"), tokens, grain)]


def padded(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.zeros_like(TOKENS)
    mask = torch.zeros_like(TOKENS)
    for row, length in enumerate(LENGTHS.tolist()):
        where = slice(0, length) if side == "right" else slice(5 - length, 5)
        tokens[row, where], mask[row, where] = TOKENS[row, :length], 1
    return tokens, mask


def mean_patterns(model: HookedModel) -> list[torch.Tensor]:
    return mean_activations(model, TOKENS, "pattern", batch_size=3).activations((4, 5))


# ---- means ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", GRAINS_BY_HOOKS)
@pytest.mark.parametrize("batch_size", [2, 100])
def test_means_are_those_of_plain_hooks(grain, batch_size):
    model = shared_model("llama")
    captured = capture_by_hooks(model, TOKENS, grain)
    found = mean_activations(model, TOKENS, grain, batch_size=batch_size)
    for new, x in zip(found.activations((3, 5)), captured, strict=True):
        expected = x.double().mean(0).float().expand(3, *x.shape[1:])
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    found = mean_activations(model, TOKENS, grain, over="all", batch_size=batch_size)
    for new, x in zip(found.activations((3, 9)), captured, strict=True):
        expected = x.double().mean((0, 1)).float().expand(3, 9, *x.shape[2:])
        torch.testing.assert_close(new, expected, rtol=0, atol=1e-6)
    found = mean_activations(model, TOKENS, grain, over="role", roles=ROLES, batch_size=batch_size)
    wanted = np.array([["end", "a"], ["b", "b"]])
    for new, x in zip(found.activations((2, 2), roles=wanted), captured, strict=True):
        assert new.shape[:2] == (2, 2)
        for place in itertools.product(range(2), range(2)):
            expected = x[torch.from_numpy(wanted[place] == ROLES)].double().mean(0).float()
            torch.testing.assert_close(new[place], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("over", ["position", "all"])
def test_padding_does_not_count(side, over):
    tokens, mask = padded(side)
    found = mean_activations(
        shared_model("llama"), tokens, "mlp_out", over=over, attention_mask=mask, batch_size=3
    )
    prompts = [alone("mlp_out", item) for item in range(7)]
    new = found.activations((7, 5), attention_mask=mask)
    for layer in range(N_LAYERS):
        tokens_there = [x[layer] for x in prompts]
        for item, length in enumerate(LENGTHS.tolist()):
            real = new[layer][item][mask[item].bool()]
            for position in range(length):
                if over == "all":
                    expected = torch.cat(tokens_there).mean(0)
                else:
                    expected = torch.stack([x[position] for x in tokens_there if len(x) > position])
                    expected = expected.mean(0)
                torch.testing.assert_close(real[position], expected, rtol=0, atol=1e-5)
        assert not new[layer][mask == 0].any()


def test_means_grow_with_the_reference():
    """Prompts of other lengths, roles not seen before, float64 sums of single-precision models."""
    model = shared_model("llama")
    mean = ReferenceMean(model, "resid_post").update(TOKENS[:, :3]).update(TOKENS)
    assert mean.counts.tolist() == [14, 14, 14, 7, 7]
    assert mean.means is not None
    assert mean.means[0].dtype == torch.float64
    by_role = ReferenceMean(model, "resid_post", over="role")
    by_role.update(TOKENS[:1], roles=[["x"] * 5]).update(TOKENS[:1], roles=[["y", *"xxxx"]])
    assert by_role.counts.tolist() == [9, 1]
    first = alone("resid_post", 0)[0][0]
    new = by_role.activations((1, 1), roles=[["y"]])[0][0, 0]
    torch.testing.assert_close(new, first, rtol=0, atol=1e-6)
    patterns = ReferenceMean(model, "pattern").update(TOKENS)
    with pytest.raises(AnalysisError, match="longest prompt has 5"):
        mean.activations((1, 6))
    with pytest.raises(AnalysisError, match="no 'z', only x, y"):
        by_role.activations((1, 1), roles=[["z"]])
    for bad, match in (
        (lambda: ReferenceMean(model, "head").activations((1, 2)), "no batch"),
        (lambda: ReferenceMean(model, "head", over="roles"), "over"),
        (lambda: ReferenceMean(model, "pattern", over="all"), "pattern"),
        (lambda: patterns.update(TOKENS[:, :3]), "one length"),
        (lambda: patterns.activations((2, 3)), "one length"),
        (lambda: patterns.update(TOKENS, attention_mask=padded("left")[1]), "without padding"),
        (lambda: mean.update(TOKENS, roles=ROLES), "only then"),
        (lambda: by_role.update(TOKENS), "roles"),
        (lambda: by_role.update(TOKENS, roles=ROLES[:2]), "one per token"),
        (lambda: mean.activations((1, 2), attention_mask=torch.ones(1, 3)), "attention_mask"),
    ):
        with pytest.raises(AnalysisError, match=match):
            bad()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox_sequential", "phi3", "gemma2"])
def test_shapes_are_those_captured(family):
    model = shared_model(family)
    for grain in GRAINS:
        expected = [x.shape for x in capture_grain(model, TOKENS, grain)]
        assert [x.shape for x in zero_activations(model, (7, 5), grain)] == expected
        assert not any(x.any() for x in zero_activations(model, (7, 5), grain))
        mean = mean_activations(model, TOKENS, grain).activations((7, 5))
        assert [x.shape for x in mean] == expected
        if grain != "pattern":
            assert site_shape(model, grain, 5) == expected[0][2:]
    for new, x in zip(mean_patterns(model), capture_grain(model, TOKENS, "pattern"), strict=True):
        torch.testing.assert_close(new[3], x.double().mean(0).float(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("what", ["mean", "zero", "resampled"])
@pytest.mark.parametrize("grain", ["resid_mid", "mlp_out", "head", "q", "k", "v", "pattern"])
def test_they_can_be_patched_in(what, grain):
    """The sweep with each of them, against one full forward pass with plain hooks per cell."""
    model = shared_model("llama")
    new = {
        "mean": lambda: mean_activations(model, TOKENS, grain).activations((7, 5)),
        "zero": lambda: zero_activations(model, (7, 5), grain),
        "resampled": lambda: resampled_activations(model, TOKENS, grain)[0],
    }[what]()
    plan = make_plan(
        model,
        TOKENS,
        grain=grain,
        metric=METRIC,
        positions=None,
        decision=-1,
        attention_mask=None,
    )
    found = patch_sites(model, TOKENS, new, plan)
    expected = patch_sites(model, TOKENS, new, plan, obstacle="the test asks for the loop")
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


# ---- resampled items -----------------------------------------------------------------------------


def test_derangements_leave_nothing_in_place_and_are_uniform():
    drawn = [tuple(derangement(4, draw=draw).tolist()) for draw in range(1_800)]
    possible = {
        order
        for order in itertools.permutations(range(4))
        if all(a != b for a, b in enumerate(order))
    }
    counts = [drawn.count(order) for order in possible]
    assert set(drawn) == possible
    assert len(possible) == 9
    assert sum((c - 200) ** 2 / 200 for c in counts) < 26  # chi-squared, 8 degrees, p = .001
    assert torch.equal(derangement(50, seed=3), derangement(50, seed=3))
    assert not torch.equal(derangement(50, seed=3), derangement(50, seed=4))


def test_derangements_stay_within_strata():
    strata = torch.tensor([0, 1, 0, 2, 1, 2, 2, 0])
    for draw in range(20):
        order = derangement(8, strata=strata, draw=draw)
        assert sorted(order.tolist()) == list(range(8))
        assert torch.equal(strata[order], strata)
        assert not (order == torch.arange(8)).any()
    with pytest.raises(AnalysisError, match=r"stratum 3 has 1 item"):
        derangement(3, strata=[1, 1, 3])
    with pytest.raises(AnalysisError, match="strata"):
        derangement(3, strata=[1, 1])


def test_resampled_activations_are_another_items():
    model = shared_model("llama")
    new, order = resampled_activations(model, TOKENS, "head", seed=1, batch_size=3)
    for x, own in zip(new, capture_by_hooks(model, TOKENS, "head"), strict=True):
        for item, other in enumerate(order.tolist()):
            torch.testing.assert_close(x[item], own[other], rtol=0, atol=1e-6)
    tokens, mask = padded("right")
    with pytest.raises(AnalysisError, match="another length"):
        resampled_activations(model, tokens, "head", attention_mask=mask)
    kept = torch.isin(LENGTHS, torch.tensor([5, 3]))
    new, order = resampled_activations(
        model, tokens[kept], "mlp_out", attention_mask=mask[kept], strata=LENGTHS[kept]
    )
    assert torch.equal(LENGTHS[kept][order], LENGTHS[kept])


# ---- another checkpoint, from a file -------------------------------------------------------------


@pytest.mark.parametrize("grain", [*GRAINS_BY_HOOKS, "k", "pattern"])
def test_stored_activations_are_the_other_models(grain, tmp_path):
    model = shared_model("llama")
    stored = store_activations(model, TOKENS, grain, tmp_path / "a.safetensors", batch_size=3)
    expected = capture_grain(model, TOKENS, grain, batch_size=3)
    assert len(stored) == N_LAYERS
    for x, y, z in zip(stored, expected, stored[:], strict=True):
        assert torch.equal(x, y)
        assert torch.equal(x, z)
    assert torch.equal(stored.select(slice(2, 4))[-1], expected[-1][2:4])
    assert torch.equal(stored.tokens, TOKENS)
    # The library's own reader takes the file too.
    whole = load_file(tmp_path / "a.safetensors")
    assert set(whole) == {"tokens", *(str(Site(grain, layer)) for layer in range(N_LAYERS))}
    assert StoredActivations.open(stored.path, model, TOKENS) == stored
    with pytest.raises(AnalysisError, match="without a metric"):
        stored.metric  # noqa: B018


def test_stored_activations_patch_like_those_in_memory(tmp_path):
    """From a checkpoint's directory, in whose place a second model is patched afterwards."""
    checkpoint = tiny_checkpoint(tmp_path / "before")
    stored = store_activations(
        checkpoint.path, TOKENS, "resid_post", tmp_path / "a", metric=METRIC, batch_size=2
    )
    source = HookedModel.from_checkpoint(checkpoint)
    target = HookedModel(tiny_model("llama", seed=1))
    plan = make_plan(
        target,
        TOKENS,
        grain="resid_post",
        metric=METRIC,
        positions=None,
        decision=-1,
        attention_mask=None,
    )
    given, score = plan.capture(source, TOKENS)
    torch.testing.assert_close(stored.metric, score[0], rtol=0, atol=1e-5)
    found, _ = patch_sites(target, TOKENS, StoredActivations.open(stored.path, target), plan)
    expected, _ = patch_sites(target, TOKENS, given, plan)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    # Patched everywhere, the decision is the source's residual read by the target's head.
    last = target.unembed(target.final_norm(given[-1][:, -1]), METRIC.token_ids)
    torch.testing.assert_close(found[0, -1, -1], METRIC(last, torch.arange(7)), rtol=0, atol=1e-5)


def test_means_of_half_precision_are_summed_in_double():
    model = HookedModel(tiny_model("llama", dtype="bfloat16"))
    found = mean_activations(model, TOKENS, "resid_post", over="all", batch_size=7)
    expected = capture_grain(model, TOKENS, "resid_post")
    assert found.means is not None
    for mean, x in zip(found.means, expected, strict=True):
        torch.testing.assert_close(mean[0], x.double().mean((0, 1)), rtol=0, atol=1e-12)


def test_half_precision_and_the_lifetime_of_the_file(tmp_path, monkeypatch):
    model = HookedModel(tiny_model("llama", dtype="bfloat16"))
    path = tmp_path / "a"
    stored = store_activations(model, TOKENS, "v", path, batch_size=4)
    expected = capture_grain(model, TOKENS, "v", batch_size=4)
    assert all(torch.equal(x, y) for x, y in zip(stored, expected, strict=True))
    before = path.read_bytes()

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(HookedModel, "capture", fail)
    with pytest.raises(KeyboardInterrupt):
        store_activations(model, TOKENS, "k", path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a"]


def test_files_that_do_not_fit_are_refused(tmp_path):
    stored = store_activations(shared_model("llama"), TOKENS, "q", tmp_path / "a")
    other = shared_model("qwen3_wide_heads")
    with pytest.raises(AnalysisError, match="expected q of a network"):
        StoredActivations.open(stored.path, other)
    with pytest.raises(AnalysisError, match="other prompts"):
        StoredActivations.open(stored.path, tokens=(TOKENS + 1) % D_VOCAB)
    (tmp_path / "b").write_bytes(b"no such file")
    for name in ("b", "missing"):
        with pytest.raises(AnalysisError, match="no file of stored activations"):
            StoredActivations.open(tmp_path / name)
    with pytest.raises(IndexError):
        stored[N_LAYERS]
    with pytest.raises(SiteError):
        store_activations(shared_model("gpt_neox"), TOKENS, "resid_mid", tmp_path / "c")
