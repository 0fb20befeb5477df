"""The crossing against hybrids put together from the two networks' own modules."""

from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import N_LAYERS, random_tokens, tiny_model
from torch import nn

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.crossing import cross, fit_stitch, fit_stitches, shapley_shares

ACTIONS = (3, 11, 7)
CUTS = range(N_LAYERS + 1)


@cache
def model(family: str = "llama", seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model(family, seed=seed))


def hybrid(family: str, front: HookedModel, back: HookedModel, cut: int) -> nn.Module:
    """The back's Hugging Face model with the front's modules below the cut."""
    mixed = copy.deepcopy(back.model)
    donor = copy.deepcopy(front.model)
    base, names = {
        "llama": ("model", ("embed_tokens",)),
        "gemma2": ("model", ("embed_tokens",)),
        "gpt2": ("transformer", ("wte", "wpe")),
        "gpt_neox": ("gpt_neox", ("embed_in",)),
    }[family]
    for name in names:
        setattr(getattr(mixed, base), name, getattr(getattr(donor, base), name))
    blocks = "h" if family == "gpt2" else "layers"
    for layer in range(cut):
        getattr(getattr(mixed, base), blocks)[layer] = getattr(getattr(donor, base), blocks)[layer]
    return mixed


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_crossing_equals_a_network_put_together_from_both(family):
    front, back = model(family, 0), model(family, 1)
    tokens = random_tokens(5, 6)
    crossed = cross(front, back, tokens, None, ACTIONS, batch_size=2)
    assert crossed.cuts == tuple(CUTS)
    for cut, logits in zip(crossed.cuts, crossed.action_logits, strict=True):
        with torch.no_grad():
            expected = hybrid(family, front, back, cut)(tokens).logits[:, -1, list(ACTIONS)]
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)
    last = front.capture(tokens, f"resid_post.{N_LAYERS - 1}", positions=-1)
    normed = back.final_norm(last[f"resid_post.{N_LAYERS - 1}"])
    torch.testing.assert_close(crossed.final[-1], normed, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "gpt_neox"])
def test_a_network_crossed_with_itself_is_itself(family):
    tokens = random_tokens(4, 6)
    crossed = cross(model(family), model(family), tokens, None, ACTIONS)
    expected = model(family).forward(tokens, positions=-1)[:, list(ACTIONS)]
    for logits in crossed.action_logits:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_cut_0_takes_the_embedding_alone_from_the_front():
    front = copy.deepcopy(model("llama", 1).model)
    front.model.embed_tokens.weight.data.copy_(model("llama", 0).model.model.embed_tokens.weight)
    tokens = random_tokens(4, 6)
    back = model("llama", 0)
    crossed = cross(HookedModel(front), back, tokens, 0, ACTIONS)
    expected = back.forward(tokens, positions=-1)[:, list(ACTIONS)]
    torch.testing.assert_close(crossed.action_logits[0], expected, rtol=0, atol=1e-5)


def test_padding_and_decisions_per_item():
    tokens = random_tokens(3, 6)
    lengths = torch.tensor([6, 4, 5])
    mask = (torch.arange(6) < lengths[:, None]).long()
    options = {"attention_mask": mask, "decision": lengths - 1, "batch_size": 2}
    crossed = cross(model(), model("llama", 1), tokens, [1, 3], ACTIONS, **options)
    for item, length in enumerate(lengths.tolist()):
        alone = cross(model(), model("llama", 1), tokens[item : item + 1, :length], [1, 3], ACTIONS)
        torch.testing.assert_close(
            crossed.action_logits[:, item], alone.action_logits[:, 0], rtol=0, atol=1e-5
        )


def test_refused_cuts_and_shapes():
    tokens = random_tokens(2, 4)
    with pytest.raises(AnalysisError, match="cuts"):
        cross(model(), model(), tokens, 4, ACTIONS)
    with pytest.raises(AnalysisError, match="cuts"):
        cross(model(), model(), tokens, [], ACTIONS)
    smaller = copy.deepcopy(model().model)
    smaller.model.layers = smaller.model.layers[:2]
    with pytest.raises(AnalysisError, match="n_layers"):
        cross(model(), HookedModel(smaller, self_test=False), tokens, 1, ACTIONS)


# ---- stitches ------------------------------------------------------------------------------------


def rotated(hooked: HookedModel) -> HookedModel:
    """The same function in another basis of the residual stream, for norms without weights."""
    raw = copy.deepcopy(hooked.model)
    d = hooked.d_model
    q, _ = torch.linalg.qr(torch.randn(d, d, generator=torch.Generator().manual_seed(0)))
    with torch.no_grad():
        raw.model.embed_tokens.weight.copy_(raw.model.embed_tokens.weight @ q)
        raw.lm_head.weight.copy_(raw.lm_head.weight @ q)
        for block in raw.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                projection = getattr(block.self_attn, name)
                projection.weight.copy_(projection.weight @ q)
            for name in ("gate_proj", "up_proj"):
                getattr(block.mlp, name).weight.copy_(getattr(block.mlp, name).weight @ q)
            for projection in (block.self_attn.o_proj, block.mlp.down_proj):
                projection.weight.copy_(q.T @ projection.weight)
    return HookedModel(raw)


def test_a_stitch_undoes_another_basis():
    plain = copy.deepcopy(model().model)
    for name, parameter in plain.named_parameters():
        if "norm" in name:
            parameter.data.fill_(1.0)
    front = HookedModel(plain)
    back = rotated(front)
    tokens, others = random_tokens(6, 6), random_tokens(100, 6, seed=1)
    expected = front.forward(tokens, positions=-1)[:, list(ACTIONS)]
    same = back.forward(tokens, positions=-1)[:, list(ACTIONS)]
    torch.testing.assert_close(same, expected, rtol=0, atol=1e-4)
    for cut in CUTS:
        stitch = fit_stitch(front, back, others, cut, ridge=1e-8, batch_size=64)
        bare = cross(front, back, tokens, cut, ACTIONS).action_logits[0]
        stitched = cross(front, back, tokens, cut, ACTIONS, stitches={cut: stitch})
        stitched = stitched.action_logits[0]
        assert float((bare - expected).abs().max()) > 0.3
        torch.testing.assert_close(stitched, expected, rtol=0, atol=1e-2)


def test_a_stitch_is_the_ridge_regression_it_says():
    front, back = model("llama", 0), model("llama", 1)
    tokens = random_tokens(30, 6)
    mask = torch.ones_like(tokens)
    mask[:10, 4:] = 0
    stitch = fit_stitch(front, back, tokens, 1, ridge=0.1, attention_mask=mask, batch_size=7)
    x, y = (
        m.capture(tokens, "resid_pre.1", attention_mask=mask)["resid_pre.1"][mask.bool()].double()
        for m in (front, back)
    )
    x_centred, y_centred = x - x.mean(0), (y - x) - (y - x).mean(0)
    # The penalty as rows of data: d more observations with target 0.
    strength = 0.1 * x_centred.square().mean(0).mean() * len(x)
    rows = torch.cat([x_centred, strength.sqrt() * torch.eye(x.shape[1], dtype=torch.float64)])
    targets = torch.cat([y_centred, torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64)])
    weight = torch.linalg.lstsq(rows, targets).solution
    torch.testing.assert_close(stitch.weight.double(), weight, rtol=0, atol=1e-5)
    mapped = stitch(x.float()).double().mean(0)
    torch.testing.assert_close(mapped, y.mean(0), rtol=0, atol=1e-5)
    none = fit_stitch(front, back, tokens, 1, ridge=1e9)
    assert float(none.weight.abs().max()) < 1e-6


def test_the_strength_of_a_stitch_is_the_one_with_the_least_error_on_held_out_items():
    front, back = model("llama", 0), model("llama", 1)
    tokens = random_tokens(40, 6)
    held_out = torch.arange(40) % 4 == 3
    ridges = (1e-6, 1e-2, 1.0, 30.0)
    fit = fit_stitches(front, back, tokens, [1], held_out=held_out, ridges=ridges, batch_size=7)[1]
    x, y = (
        m.capture(tokens[held_out], "resid_pre.1")["resid_pre.1"].double() for m in (front, back)
    )
    errors = {}
    for ridge in ridges:
        alone = fit_stitch(front, back, tokens[~held_out], 1, ridge=ridge)
        errors[ridge] = float((alone(x.float()).double() - y).square().sum())
    assert fit.ridge == min(errors, key=lambda ridge: errors[ridge])
    assert fit.ridge not in (ridges[0], ridges[-1])  # else the test says little
    unexplained = errors[fit.ridge] / float((x - y).square().sum())
    assert fit.unexplained == pytest.approx(unexplained, rel=1e-3)
    on_all = fit_stitch(front, back, tokens, 1, ridge=fit.ridge)
    torch.testing.assert_close(fit.stitch.weight, on_all.weight, rtol=0, atol=1e-5)
    with pytest.raises(AnalysisError, match="held_out"):
        fit_stitches(front, back, tokens, [1], held_out=torch.zeros(40, dtype=torch.bool))


# ---- shares --------------------------------------------------------------------------------------

utility = st.floats(-10, 10)


@given(utility, utility, utility, utility)
def test_shares_add_up_and_mirror(aa, ab, ba, bb):
    shares = shapley_shares(aa, ab, ba, bb, scale=1.0)
    assert shares.phi_front + shares.phi_back == pytest.approx(bb - aa, abs=1e-9)
    back = shapley_shares(bb, ba, ab, aa, scale=1.0)
    assert back.phi_front == pytest.approx(-shares.phi_front, abs=1e-9)
    assert back.interaction == pytest.approx(shares.interaction, abs=1e-9)


@given(utility, utility, utility)
def test_additive_changes_are_shared_without_interaction(aa, front, back):
    shares = shapley_shares(aa, aa + back, aa + front, aa + front + back, scale=1.0)
    assert shares.phi_front == pytest.approx(front, abs=1e-9)
    assert shares.phi_back == pytest.approx(back, abs=1e-9)
    assert shares.interaction == pytest.approx(0, abs=1e-9)


def test_shares_by_hand():
    shares = shapley_shares(1.0, 0.9, 0.5, 0.42, scale=1.0)
    assert shares.phi_front == pytest.approx(0.5 * (-0.5 - 0.48))
    assert shares.phi_back == pytest.approx(0.5 * (-0.1 - 0.08))
    assert shares.interaction == pytest.approx(0.02)
    assert shares.valid
    # Above the margin of the scale, though far below half of the change.
    assert not shapley_shares(1.0, 0.9, 0.5, 0.42, scale=0.3).valid
    # Above half of the change, though below the margin.
    assert not shapley_shares(1.0, 0.99, 0.99, 0.99, scale=1.0).valid
    # No change, no interaction: nothing to share, and nothing wrong with it.
    assert shapley_shares(1.0, 1.0, 1.0, 1.0, scale=1.0).valid
