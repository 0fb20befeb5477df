"""The bridge as an oracle, and a guard for each thing that TransformerLens 4.3 gets wrong."""

import copy
import os

import pytest
import torch
from tiny_models import FAMILIES, SEQUENTIAL, random_tokens, shared_model, tiny_model
from transformers import AutoModelForCausalLM, Gemma3TextConfig

from mechinterp.bridge import sharing_twin
from mechinterp.errors import ModelError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.sites import GRAINS, Site
from mechinterp.threads import limit_threads

TOKENS = random_tokens(2, 9)


# ---- the oracle ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_every_site_equal_the_bridge_s(family):
    hooked = shared_model(family)
    with torch.no_grad():
        logits, cache = hooked.bridge().run_with_cache(TOKENS)
    torch.testing.assert_close(hooked.forward(TOKENS), logits, atol=1e-5, rtol=1e-5)
    grains = set(GRAINS) - ({"resid_mid"} if hooked.architecture.parallel else set())
    captured = hooked.capture(TOKENS, [site for grain in grains for site in hooked.sites(grain)])
    for site, ours in captured.items():
        theirs = cache[site.transformer_lens_name]
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5, msg=f"{site}: {{}}".format)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("grain", ["resid_pre", "q", "k", "v", "head", "attn_out", "mlp_out"])
def test_interventions_equal_the_bridge_s(family, grain):
    hooked = shared_model(family)
    site = Site(grain, 1)
    value = torch.randn_like(hooked.capture(TOKENS, site)[site])
    with torch.no_grad():
        theirs = hooked.bridge().run_with_hooks(
            TOKENS, fwd_hooks=[(site.transformer_lens_name, lambda t, hook: value)]
        )
    ours = hooked.run_with_interventions(TOKENS, [Intervention(site, value)])
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


# ---- wrapping leaves the raw model alone ---------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "llama_tied_bias", "gpt2", "gpt_neox", "gemma2"])
def test_the_raw_model_stays_as_it_was_and_saves(family, tmp_path):
    implementation = "eager" if family == "gemma2" else "sdpa"
    model = tiny_model(family, attn_implementation=implementation)
    modules = {name: type(module) for name, module in model.named_modules()}
    config = copy.deepcopy(model.config.to_dict())
    logits = model(TOKENS).logits
    bridge = HookedModel(model).bridge()
    bridge(TOKENS).sum().backward()
    assert {name: type(module) for name, module in model.named_modules()} == modules
    assert model.config.to_dict() == config
    assert model.config._attn_implementation == implementation
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(model(TOKENS).logits, logits)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    torch.testing.assert_close(again(TOKENS).logits, logits)


@pytest.mark.parametrize("family", ["llama_tied_bias", "gpt2"])
def test_a_twin_shares_weights_and_ties_but_not_gradients(family):
    model = tiny_model(family)
    twin = sharing_twin(model)
    theirs = dict(model.named_parameters())
    for name, parameter in twin.named_parameters():
        assert parameter is not theirs[name]
        assert parameter.data_ptr() == theirs[name].data_ptr()
    assert len(list(twin.parameters())) == len(theirs)  # tied weights stay tied


def test_training_the_raw_model_shows_in_a_live_bridge():
    hooked = HookedModel(tiny_model("llama"))
    bridge = hooked.bridge()
    step(hooked.model)
    assert hooked.bridge() is bridge
    torch.testing.assert_close(bridge(TOKENS), hooked.model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def step(model):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimizer.step()


def through_data(model):
    """A write that leaves no trace in torch's version counters."""
    model.gpt_neox.layers[1].attention.query_key_value.bias.data.add_(0.5)


def loading(model):
    model.load_state_dict(tiny_model("gpt_neox", seed=1).state_dict())


@pytest.mark.parametrize("change", [step, through_data, loading])
def test_a_bridge_with_stale_copies_refuses_and_is_rebuilt(change):
    hooked = HookedModel(tiny_model("gpt_neox"))
    bridge = hooked.bridge()
    assert hooked.bridge() is bridge
    change(hooked.model)
    for run in (bridge, bridge.run_with_cache):
        with pytest.raises(ModelError, match="weights changed"):
            run(TOKENS)
    rebuilt = hooked.bridge()
    assert rebuilt is not bridge
    torch.testing.assert_close(rebuilt(TOKENS), hooked.model(TOKENS).logits, atol=1e-5, rtol=1e-5)


def test_replaced_weights_are_noticed_everywhere():
    hooked = HookedModel(tiny_model("llama"))
    bridge = hooked.bridge()
    hooked.model.load_state_dict(tiny_model("llama", seed=1).state_dict(), assign=True)
    with pytest.raises(ModelError, match="weights changed"):
        bridge(TOKENS)
    torch.testing.assert_close(
        hooked.bridge()(TOKENS), hooked.model(TOKENS).logits, atol=1e-5, rtol=1e-5
    )


# ---- one guard per trap --------------------------------------------------------------------------


def do_nothing(tensor, hook):
    return None


@pytest.mark.parametrize("family", ["llama", "gpt2", "olmo2"])
def test_hooks_at_resid_mid_are_refused(family):
    bridge = shared_model(family).bridge()
    canonical = bridge.hook_dict["blocks.1.hook_resid_mid"].name
    for name in ("blocks.1.hook_resid_mid", canonical):
        for direction in ("fwd_hooks", "bwd_hooks"):
            with pytest.raises(SiteError, match=r"HookedModel\.run"):
                bridge.run_with_hooks(TOKENS, **{direction: [(name, do_nothing)]})
        with (
            pytest.raises(SiteError, match=r"HookedModel\.run"),
            bridge.hooks(fwd_hooks=[(name, do_nothing)]),
        ):
            pass
        with pytest.raises(SiteError, match=r"HookedModel\.run"):
            bridge.add_hook(name, do_nothing)
    with pytest.raises(SiteError, match=r"HookedModel\.run"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(lambda name: True, do_nothing)])
    # reading is right, and allowed
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS, names_filter="blocks.1.hook_resid_mid")
    expected = shared_model(family).capture(TOKENS, "resid_mid.1")["resid_mid.1"]
    torch.testing.assert_close(cache["blocks.1.hook_resid_mid"], expected, atol=1e-5, rtol=1e-5)


def test_backward_caches_at_resid_mid_are_refused():
    bridge = HookedModel(tiny_model("llama")).bridge()
    for names in (None, "blocks.1.hook_resid_mid", ["blocks.1.hook_resid_mid", "hook_embed"]):
        with pytest.raises(SiteError, match="incl_bwd"):
            bridge.run_with_cache(TOKENS, names_filter=names, incl_bwd=True, return_type="loss")
    _, cache = bridge.run_with_cache(
        TOKENS, names_filter="blocks.1.hook_attn_out", incl_bwd=True, return_type="loss"
    )
    assert "blocks.1.hook_attn_out_grad" in cache or "blocks.1.attn.hook_out_grad" in cache


def test_the_trap_at_resid_mid_is_still_there_upstream():
    """Without the guard a write at hook_resid_mid misses the skip connection. If this fails,
    TransformerLens was mended and the guard can go."""
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    hooked = shared_model("llama")
    twin = sharing_twin(hooked.model)
    unguarded = build_bridge_from_module(
        twin, "LlamaForCausalLM", hf_config=twin.config, tokenizer=None
    )
    new = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = unguarded.run_with_hooks(
            TOKENS, fwd_hooks=[("blocks.1.hook_resid_mid", lambda t, hook: new)]
        )
    ours = hooked.run_with_interventions(TOKENS, [Intervention("resid_mid.1", new)])
    assert (theirs - ours).abs().max() > 0.1


def test_misspelt_names_are_refused_with_the_nearest():
    bridge = shared_model("llama").bridge()
    good, bad = "blocks.1.hook_resid_post", "blocks.1.hook_resid_posst"
    for names in (bad, [bad], [good, bad], ["blocks.0.ln1.hook_in", bad]):
        with pytest.raises(SiteError, match=f"did you mean {good}"):
            bridge.run_with_cache(TOKENS, names_filter=names)
    with pytest.raises(SiteError, match=f"did you mean {good}"):
        bridge.run_with_hooks(TOKENS, fwd_hooks=[(bad, do_nothing)])
    with pytest.raises(SiteError, match=f"did you mean {good}"):
        bridge.hooks(bwd_hooks=[(bad, do_nothing)])
    with pytest.raises(SiteError, match="matches none"):
        bridge.run_with_cache(TOKENS, names_filter=lambda name: "posst" in name)
    with pytest.raises(SiteError, match="no hook"):
        bridge.run_with_cache(TOKENS, names_filter="blocks.7.hook_resid_post")
    with torch.no_grad():
        _, cache = bridge.run_with_cache(TOKENS, names_filter=[good])
        _, more = bridge.run_with_cache(TOKENS, names_filter=lambda name: name.endswith("hook_z"))
    assert good in cache
    assert len(more) == 3


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_saving_and_loading_through_a_bridge_are_refused(family, tmp_path):
    bridge = shared_model(family).bridge()
    for save in (
        lambda: bridge.state_dict(),
        lambda: bridge.load_state_dict({}),
        lambda: bridge.original_model.save_pretrained(tmp_path),
        lambda: bridge.original_model.save_pretrained(tmp_path, state_dict={}),
    ):
        with pytest.raises(ModelError, match="save_checkpoint"):
            save()
    assert not list(tmp_path.iterdir())


def test_compatibility_mode_is_refused():
    bridge = shared_model("llama").bridge()
    for process in (bridge.enable_compatibility_mode, bridge.process_weights):
        with pytest.raises(ModelError, match="raw weights"):
            process()


def test_left_padding_without_a_mask_is_refused():
    model = tiny_model("llama")
    model.config.pad_token_id = 9
    hooked = HookedModel(model)
    tokens = torch.cat([torch.full((2, 3), 9), TOKENS], dim=1)
    mask = (torch.arange(12) >= 3).long().expand(2, -1)
    bridge = hooked.bridge()
    with torch.no_grad():
        for run in (bridge, bridge.run_with_cache, lambda t: bridge.run_with_hooks(t)):
            with pytest.raises(ModelError, match="padding id 9"):
                run(tokens)
        logits = bridge(tokens, attention_mask=mask)
    torch.testing.assert_close(logits[:, 3:], model(TOKENS).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
def test_there_are_no_made_up_tokenizers(family):
    bridge = shared_model(family).bridge()
    assert bridge.tokenizer is None
    for text in ("hello world", ["hello", "world"]):
        with pytest.raises(ModelError, match="no tokenizer"):
            bridge(text)
    with pytest.raises(ModelError, match="no tokenizer"):
        bridge.to_tokens("hello world")


def test_text_needs_a_decision_about_bos(tmp_path):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from mechinterp.checkpoints import save_checkpoint

    words = Tokenizer(models.WordLevel({"<s>": 0, "hello": 1, "world": 2}, unk_token="<s>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="<s>")
    save_checkpoint(tiny_model("llama"), tmp_path / "saved", tokenizer=tokenizer)
    bridge = HookedModel.from_checkpoint(tmp_path / "saved").bridge()
    with pytest.raises(ModelError, match="prepend_bos"):
        bridge.to_tokens("hello world")
    with pytest.raises(ModelError, match="prepend_bos"):
        bridge("hello world")
    assert bridge.to_tokens("hello world", prepend_bos=False).tolist() == [[1, 2]]
    assert bridge.to_tokens("hello world", prepend_bos=True).tolist() == [[0, 1, 2]]


def test_top_k_50_is_refused():
    with pytest.raises(ModelError, match=r"HookedModel\.generate"):
        shared_model("llama").bridge().hf_generate(TOKENS, do_sample=True)


def test_a_bridge_that_computes_other_logits_is_refused():
    """TransformerLens applies Gemma 2's attention soft cap to Gemma 3; Hugging Face does not."""
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, pad_token_id=None,
        attn_logit_softcapping=0.02, query_pre_attn_scalar=1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) / 4)
    with pytest.raises(ModelError, match="differ from Hugging Face's"):
        HookedModel(model).bridge()


def test_start_at_layer_is_ours_to_skip():
    """The bridge's start_at_layer is exact but runs every block; run_from_layer gives the same."""
    for family in ("llama", *SEQUENTIAL[2:3]):
        hooked = shared_model(family)
        resid = hooked.capture(TOKENS, "resid_pre.2")["resid_pre.2"]
        with torch.no_grad():
            theirs = hooked.bridge()(resid, start_at_layer=2)
        torch.testing.assert_close(hooked.run_from_layer(2, resid), theirs, atol=1e-5, rtol=1e-5)


def test_threads_are_limited_when_asked_and_idle_ones_sleep(monkeypatch):
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "unset")
        monkeypatch.delenv(name)
    before = torch.get_num_threads()
    try:
        limit_threads(3)
        assert torch.get_num_threads() == 3
        assert os.environ["OMP_NUM_THREADS"] == "3"
        assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"
        monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
        limit_threads()
        assert torch.get_num_threads() == 1
        assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"  # the user's choice stands
    finally:
        torch.set_num_threads(before)


def test_a_bridge_is_kept_until_it_is_stale():
    hooked = shared_model("gpt2")
    assert hooked.bridge() is hooked.bridge()
