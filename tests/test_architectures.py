"""Every family's blocks, run by us with the model's own masks, compute what the model computes."""

import copy

import pytest
import torch
from tiny_models import FAMILIES, N_LAYERS, SEQUENTIAL, random_tokens, shared_model, tiny_model
from transformers import AutoModelForCausalLM, BloomConfig, GraniteConfig, SmolLM3Config

from mechinterp import architectures
from mechinterp.architectures import Layout
from mechinterp.contexts import KeyValues, padding_arguments
from mechinterp.errors import ModelError
from mechinterp.hooked import HookedModel

LENGTH = 9  # more than twice the sliding window of the families that have one
PADDING = {
    "none": None,
    "left": torch.tensor([[1] * 9, [0] * 2 + [1] * 7, [0] * 5 + [1] * 4]),
    "right": torch.tensor([[1] * 9, [1] * 7 + [0] * 2, [1] * 4 + [0] * 5]),
}
# Hugging Face refuses SDPA for Gemma 2, whose attention logits have a soft cap.
IMPLEMENTATIONS = [
    (family, implementation)
    for family in FAMILIES
    for implementation in ("eager", "sdpa")
    if (family, implementation) != ("gemma2", "sdpa")
]


@pytest.fixture(autouse=True)
def _no_grad():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", PADDING)
def test_blocks_one_by_one_are_the_model(family, implementation, padding):
    hooked = shared_model(family, implementation)
    model, architecture = hooked.model, hooked.architecture
    tokens, mask = random_tokens(3, LENGTH), PADDING[padding]
    expected = model(tokens, **padding_arguments(mask), output_hidden_states=True)
    x, context = architecture.embed(tokens, mask)
    for block, hidden in zip(architecture.blocks, expected.hidden_states, strict=False):
        real = slice(None) if mask is None else mask.bool()
        torch.testing.assert_close(x[real], hidden[real], atol=1e-5, rtol=1e-5)
        x = block.run(x, context.arguments[block.layer])
    logits = architecture.unembed(architecture.final_norm(x))
    torch.testing.assert_close(logits[real], expected.logits[real], atol=1e-5, rtol=1e-5)
    again = architecture.context(torch.randn_like(x), mask)
    for ours, theirs in zip(again.arguments, context.arguments, strict=True):
        torch.testing.assert_close(ours, theirs, atol=0, rtol=0)


@pytest.mark.parametrize(("family", "implementation"), IMPLEMENTATIONS)
@pytest.mark.parametrize("padding", ["none", "left"])
def test_a_suffix_after_recorded_keys_and_values_is_the_whole_run(family, implementation, padding):
    hooked = shared_model(family, implementation)
    tokens, mask = random_tokens(3, LENGTH), PADDING[padding]
    run = hooked.capture(
        tokens, ["resid_pre.0", "resid_post.2"], attention_mask=mask, key_values=True
    )
    context = hooked.embed(tokens, attention_mask=mask)[1]
    items = torch.tensor([2, 0, 0, 1])
    for start in (0, 1, 5, LENGTH - 1):
        suffix = context.suffix(start).rows(items)
        x = run["resid_pre.0"][items, start:]
        for layer, cache in enumerate(run.key_values):
            assert cache.keys is not None
            assert cache.values is not None
            prefix = KeyValues(cache.keys[items, :, :start], cache.values[items, :, :start])
            x = hooked.block(layer, x, suffix, cache=prefix)
            assert prefix.get_seq_length() == LENGTH
        expected = run["resid_post.2"][items, start:]
        real = slice(None) if mask is None else mask.bool()[items, start:]
        torch.testing.assert_close(x[real], expected[real], atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_without_padding_a_context_serves_any_number_of_rows(implementation):
    hooked = shared_model("gemma3", implementation)
    tokens = random_tokens(3, LENGTH)
    resid, context = hooked.embed(tokens)
    more = resid[[0, 1, 2, 1, 0]]
    for layer in range(N_LAYERS):
        resid = hooked.block(layer, resid, context)
        more = hooked.block(layer, more, context)
    torch.testing.assert_close(more, resid[[0, 1, 2, 1, 0]], atol=1e-5, rtol=1e-5)


def test_masks_and_rotary_embeddings_differ_by_layer_where_the_family_says_so():
    tokens = random_tokens(1, LENGTH)
    for family in ("gemma2", "gemma3", "qwen2_sliding"):
        arguments = shared_model(family).architecture.embed(tokens)[1].arguments
        kinds = {int((a["attention_mask"] == 0).sum()) for a in arguments}
        assert len(kinds) == 2, family  # full and sliding
    arguments = shared_model("gemma3").architecture.embed(tokens)[1].arguments
    assert not torch.equal(
        arguments[0]["position_embeddings"][0], arguments[1]["position_embeddings"][0]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_add_up_from_the_pieces(family):
    hooked = shared_model(family)
    tokens = random_tokens(2, LENGTH)
    a = hooked.capture(
        tokens,
        [
            s
            for g in ("resid_pre", "head", "attn_out", "mlp_out", "resid_post")
            for s in hooked.sites(g)
        ],
    )
    for block in hooked.architecture.blocks:
        layer = block.layer
        attn_out = block.attn_out(a[f"head.{layer}"])
        before_mlp = a[f"resid_pre.{layer}"] + (0 if block.parallel else attn_out)
        total = a[f"resid_pre.{layer}"] + attn_out + block.mlp_out(before_mlp)
        torch.testing.assert_close(total, a[f"resid_post.{layer}"], atol=1e-5, rtol=1e-5)


def test_unembedding_some_tokens_is_a_part_of_unembedding_all():
    for family in ("llama_tied_bias", "gemma2"):
        architecture = shared_model(family).architecture
        x = torch.randn(2, 3, 32)
        some = torch.tensor([5, 0, 63])
        torch.testing.assert_close(
            architecture.unembed(x, some), architecture.unembed(x)[..., some]
        )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
def test_running_blocks_leaves_the_model_as_it_was(family):
    model = tiny_model(family)
    before = {name: id(module) for name, module in model.named_modules()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    weights = copy.deepcopy(model.state_dict())
    HookedModel(model).run(random_tokens(2, 5), sites=["head.1", "resid_post.2"])
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert {name: set(vars(module)) for name, module in model.named_modules()} == attributes
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_trained_weights_show_at_once():
    model = tiny_model("llama")
    hooked = HookedModel(model)
    tokens = random_tokens(2, 5)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    logits, _ = hooked.run(tokens)
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_an_unlisted_family_laid_out_like_llama_is_accepted():
    config = SmolLM3Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    tokens = random_tokens(2, 6)
    logits, _ = HookedModel(model).run(tokens)
    torch.testing.assert_close(logits, model(tokens).logits, atol=1e-5, rtol=1e-5)


def test_a_family_that_only_looks_like_llama_fails_the_self_test():
    config = GraniteConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, residual_multiplier=0.5, pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with pytest.raises(ModelError, match="GraniteForCausalLM, block 0"):
        HookedModel(model)


def test_an_unknown_layout_is_refused_by_name():
    model = AutoModelForCausalLM.from_config(
        BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=4)
    )
    with pytest.raises(ModelError, match=r"BloomForCausalLM.*supported: llama"):
        HookedModel(model.eval())


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("gemma2", {"mlp_norm": "post_attention_layernorm"}),
        ("gemma3", {"attention_post_norm": None}),
        ("olmo2", {"mlp_post_norm": None}),
        ("gpt2", {"mlp_norm": "ln_1"}),
        ("gpt_neox", {"parallel_flag": None}),
    ],
)
def test_the_self_test_finds_a_wrong_layout(monkeypatch, family, wrong):
    model = tiny_model(family)
    key = model.config.model_type
    layout = Layout(**{**vars(architectures.LAYOUTS[key]), **wrong})
    monkeypatch.setitem(architectures.LAYOUTS, key, layout)
    with pytest.raises(ModelError):
        HookedModel(model)
    HookedModel(model, self_test=False)


def test_every_family_says_whether_its_blocks_are_parallel():
    for family in FAMILIES:
        architecture = shared_model(family).architecture
        assert architecture.parallel == (family not in SEQUENTIAL)
        assert len(architecture.blocks) == N_LAYERS
