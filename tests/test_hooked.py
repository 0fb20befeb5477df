"""HookedModel against plain torch hooks on the raw model, finite differences and Hugging Face."""

import ast
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import (
    D_HEAD,
    D_VOCAB,
    FAMILIES,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    SEQUENTIAL,
    random_tokens,
    shared_model,
    tiny_model,
)

import mechinterp
from mechinterp.errors import CheckpointError, ModelError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.randomness import derive_generator
from mechinterp.sites import GRAINS, Site

# Module paths written out by hand, as in each family's source: the oracle shares nothing with ours.
LLAMA = {
    "block": "model.layers.{}",
    "attn": "model.layers.{}.self_attn",
    "o": "model.layers.{}.self_attn.o_proj",
    "mlp": "model.layers.{}.mlp",
    "down": "model.layers.{}.mlp.down_proj",
    "ln2": "model.layers.{}.post_attention_layernorm",
    "norm": "model.norm",
}
POST_NORM = {
    **LLAMA,
    "attn": "model.layers.{}.post_attention_layernorm",
    "mlp": "model.layers.{}.post_feedforward_layernorm",
}
PATHS = {
    "gpt2": {
        "block": "transformer.h.{}",
        "attn": "transformer.h.{}.attn",
        "o": "transformer.h.{}.attn.c_proj",
        "mlp": "transformer.h.{}.mlp",
        "down": "transformer.h.{}.mlp.c_proj",
        "ln2": "transformer.h.{}.ln_2",
        "norm": "transformer.ln_f",
    },
    "gpt_neox": {
        "block": "gpt_neox.layers.{}",
        "attn": "gpt_neox.layers.{}.attention",
        "o": "gpt_neox.layers.{}.attention.dense",
        "mlp": "gpt_neox.layers.{}.mlp",
        "down": "gpt_neox.layers.{}.mlp.dense_4h_to_h",
        "ln2": "gpt_neox.layers.{}.post_attention_layernorm",
        "norm": "gpt_neox.final_layer_norm",
    },
    "gemma2": POST_NORM,
    "gemma3_text": POST_NORM,
    "olmo2": POST_NORM,
}


def module(hooked, part, layer=0):
    paths = PATHS.get(hooked.model.config.model_type, LLAMA)
    return hooked.model.get_submodule(paths[part].format(layer))


def first(output):
    return output[0] if isinstance(output, tuple) else output


@contextmanager
def output_replaced(target, change):
    """A plain forward hook: `target` returns change(its output)."""

    def hook(_, args, output):
        new = change(first(output))
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = target.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def input_replaced(target, change):
    handle = target.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def block_calls(hooked):
    calls = []
    with ExitStack() as hooks:
        for layer in range(hooked.n_layers):
            handle = module(hooked, "block", layer).register_forward_pre_hook(
                lambda *_, layer=layer: calls.append(layer)
            )
            hooks.callback(handle.remove)
        yield calls


def n_hooks(model):
    return sum(
        len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for m in model.modules()
    )


def read_by_plain_hooks(hooked, tokens):
    """Activations of the raw model's own forward, by Hugging Face's outputs and plain hooks."""
    read = {}
    with torch.no_grad(), ExitStack() as hooks:
        for layer in range(hooked.n_layers):
            for grain, part in (("attn_out", "attn"), ("mlp_out", "mlp")):
                handle = module(hooked, part, layer).register_forward_hook(
                    lambda _, a, out, key=(grain, layer): read.update({key: first(out)})
                )
                hooks.callback(handle.remove)
            for grain, part in (("head", "o"), ("neuron", "down")):
                handle = module(hooked, part, layer).register_forward_pre_hook(
                    lambda _, args, key=(grain, layer): read.update({key: args[0]})
                )
                hooks.callback(handle.remove)
            handle = module(hooked, "block", layer).register_forward_hook(
                lambda _, a, out, key=("resid_post", layer): read.update({key: first(out)})
            )
            hooks.callback(handle.remove)
        output = hooked.model(tokens, output_hidden_states=True, output_attentions=True)
    for layer in range(hooked.n_layers):
        read["resid_pre", layer] = output.hidden_states[layer]
        read["resid_mid", layer] = output.hidden_states[layer] + read["attn_out", layer]
        read["pattern", layer] = output.attentions[layer]
        read["head", layer] = read["head", layer].unflatten(-1, (hooked.n_heads, -1))
    return read, output.logits


# ---- reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_capture_is_what_plain_hooks_read(family):
    hooked, tokens = shared_model(family), random_tokens(2, 9)
    expected, logits = read_by_plain_hooks(hooked, tokens)
    sites = [Site(grain, layer) for grain, layer in expected]
    if hooked.architecture.parallel:
        sites = [site for site in sites if site.grain != "resid_mid"]
    captured = hooked.capture(tokens, sites)
    assert list(captured) == sites
    for site in sites:
        torch.testing.assert_close(
            captured[site], expected[site.grain, site.layer], atol=1e-5, rtol=1e-5
        )
    torch.testing.assert_close(hooked.forward(tokens), logits, atol=1e-5, rtol=1e-5)
    assert captured["head.1"].shape == (2, 9, N_HEADS, hooked.d_head)
    torch.testing.assert_close(
        hooked.capture(tokens, "head.1.3")["head.1.3"], captured["head.1"][:, :, 3]
    )
    torch.testing.assert_close(
        hooked.capture(tokens, "pattern.1.3")["pattern.1.3"], captured["pattern.1"][:, 3]
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "phi3", "qwen3_wide_heads"])
def test_z_is_the_pattern_times_v(family):
    hooked, tokens = shared_model(family), random_tokens(2, 5)
    a = hooked.capture(tokens, ["v.1", "head.1", "pattern.1", "q.1", "k.1"])
    groups = hooked.n_heads // hooked.n_kv_heads
    v = a["v.1"].repeat_interleave(groups, dim=2)
    z = torch.einsum("bhqk,bkhd->bqhd", a["pattern.1"], v)
    torch.testing.assert_close(a["head.1"], z, atol=1e-5, rtol=1e-5)
    assert a["q.1"].shape == (2, 5, hooked.n_heads, hooked.d_head)
    assert a["k.1"].shape == (2, 5, hooked.n_kv_heads, hooked.d_head)


@settings(max_examples=40, deadline=None)
@given(
    positions=st.none()
    | st.integers(-7, 6)
    | st.lists(st.integers(0, 6), min_size=1, unique=True)
    | st.lists(st.integers(-7, 6), min_size=3, max_size=3).map(torch.tensor),
    name=st.sampled_from(["resid_mid.1", "head.0", "head.2.1", "k.1", "pattern.0", "pattern.1.2"]),
)
def test_positions_select_from_the_whole_capture(positions, name):
    hooked, tokens = shared_model("llama"), random_tokens(3, 7)
    whole = hooked.capture(tokens, name)[name]
    axis = 2 if name == "pattern.0" else 1
    got = hooked.capture(tokens, name, positions=positions)[name]
    if positions is None:
        expected = whole
    elif isinstance(positions, int):
        expected = whole.select(axis, positions)
    elif isinstance(positions, list):
        expected = whole.index_select(axis, torch.tensor(positions))
    else:
        rows = [row.select(axis - 1, int(p)) for row, p in zip(whole, positions, strict=True)]
        expected = torch.stack(rows)
    torch.testing.assert_close(got, expected, atol=0, rtol=0)


@pytest.mark.parametrize(
    "positions", [-1, 3, [0, 2], torch.tensor([1, -1, 4])], ids=["last", "one", "some", "per item"]
)
def test_logits_at_positions(positions):
    hooked, tokens = shared_model("gemma2"), random_tokens(3, 6)
    whole = hooked.model(tokens).logits
    if isinstance(positions, torch.Tensor):
        expected = whole[torch.arange(3), positions]
    else:
        expected = whole[:, positions]
    resid = hooked.capture(tokens, "resid_pre.1")["resid_pre.1"]
    for logits in (
        hooked.forward(tokens, positions=positions),
        hooked.run(tokens, positions=positions)[0],
        hooked.run_from_layer(1, resid, positions=positions),
        hooked.run_with_interventions(tokens, [], positions=positions),
    ):
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "positions", [7, -8, [0, 7], [1, 1], [1, -6], torch.tensor([0, 1]), torch.tensor([0, 1, 9])]
)
def test_positions_that_do_not_exist_are_refused(positions):
    with pytest.raises(SiteError, match="position"):
        shared_model("llama").capture(random_tokens(3, 7), "resid_pre.0", positions=positions)


@pytest.mark.parametrize(
    ("family", "site"),
    [
        ("llama", "resid_pre.3"),
        ("llama", "head.0.4"),
        ("llama", "k.0.2"),
        ("gpt_neox", "resid_mid.0"),
        ("llama", "blocks.0.hook_resid_prre"),
    ],
)
def test_sites_that_this_network_does_not_have_are_refused(family, site):
    with pytest.raises(SiteError):
        shared_model(family).capture(random_tokens(1, 3), site)


def test_activations_are_a_mapping_by_site_and_by_name():
    hooked, tokens = shared_model("llama"), random_tokens(2, 4)
    captured = hooked.capture(tokens, [*hooked.sites("resid_post"), "head.1"])
    assert len(captured) == N_LAYERS + 1
    assert "head.1" in captured
    assert "head.0" not in captured
    torch.testing.assert_close(captured.stack("resid_post")[2], captured[Site("resid_post", 2)])
    with pytest.raises(SiteError, match=r"head\.0 was not captured"):
        captured["head.0"]
    with pytest.raises(SiteError, match="no mlp_out"):
        captured.stack("mlp_out")
    assert not captured["head.1"].requires_grad
    at_last = hooked.capture(tokens, "resid_pre.1", positions=-1)["resid_pre.1"]
    assert at_last.untyped_storage().nbytes() == at_last.numel() * 4  # holds no whole sequence


# ---- running parts -------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_run_from_layer_gives_the_model_s_logits_and_skips_the_blocks_below(family):
    hooked, tokens = shared_model(family), random_tokens(2, 9)
    expected = hooked.model(tokens).logits
    sites = [*hooked.sites("resid_pre"), Site("resid_post", N_LAYERS - 1)]
    captured = hooked.capture(tokens, sites)
    for layer, site in enumerate(sites):
        with block_calls(hooked) as calls:
            logits = hooked.run_from_layer(layer, captured[site])
        assert calls == list(range(layer, N_LAYERS))
        torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
        final = hooked.resid_from_layer(layer, captured[site], positions=-1)
        torch.testing.assert_close(final, captured[sites[-1]][:, -1], atol=1e-5, rtol=1e-5)
    with pytest.raises(SiteError, match="layers 0 to 3"):
        hooked.run_from_layer(4, captured[sites[0]])


def test_capture_stops_after_the_last_block_it_needs():
    hooked = shared_model("llama")
    with block_calls(hooked) as calls:
        hooked.capture(random_tokens(2, 5), ["mlp_out.1", "head.0"])
    assert calls == [0, 1]


# ---- intervening ---------------------------------------------------------------------------------

PLAIN = {  # how a plain hook writes a site, by hand
    "resid_pre": ("block", input_replaced),
    "resid_post": ("block", output_replaced),
    "attn_out": ("attn", output_replaced),
    "mlp_out": ("mlp", output_replaced),
    "head": ("o", input_replaced),
    "neuron": ("down", input_replaced),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grain", PLAIN)
def test_an_intervention_is_a_plain_hook(family, grain):
    hooked, tokens = shared_model(family), random_tokens(2, 6)
    part, replaced = PLAIN[grain]
    site = Site(grain, 1)
    shape = hooked.capture(tokens, site, positions=2)[site].shape
    value = torch.randn(shape, generator=torch.Generator().manual_seed(1))

    def by_hand(tensor):
        new = tensor.clone()
        new[:, 2] = value.flatten(1)
        return new

    with replaced(module(hooked, part, 1), by_hand), torch.no_grad():
        expected = hooked.model(tokens).logits
    logits = hooked.run_with_interventions(tokens, [Intervention(site, value, positions=2)])
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-5)
    assert (logits - hooked.forward(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_writing_resid_mid_reaches_the_mlp_and_the_skip_connection(family):
    hooked, tokens = shared_model(family), random_tokens(2, 6)
    new_mid = torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(1))
    block = hooked.architecture.blocks[1]
    resid_pre = hooked.capture(tokens, "resid_pre.1")["resid_pre.1"]
    # attn_out := new_mid - resid_pre at the raw modules, so that resid_pre + attn_out == new_mid
    attention = module(hooked, "attn", 1)
    with output_replaced(attention, lambda _: new_mid - resid_pre), torch.no_grad():
        expected = hooked.model(tokens).logits
    for grad in (False, True):
        logits, captured = hooked.run(
            tokens,
            interventions=[Intervention("resid_mid.1", new_mid)],
            sites=["resid_mid.1", "mlp_out.1", "resid_post.1"],
            grad=grad,
        )
        torch.testing.assert_close(logits.detach(), expected, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(captured["resid_mid.1"].detach(), new_mid)
        total = new_mid + block.mlp_out(new_mid)
        torch.testing.assert_close(captured["resid_post.1"], total, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_putting_back_what_is_there_changes_nothing(family):
    hooked, tokens = shared_model(family), random_tokens(2, 6)
    grains = set(GRAINS) - {"pattern"} - ({"resid_mid"} if hooked.architecture.parallel else set())
    sites = [Site(grain, layer) for grain in grains for layer in range(N_LAYERS)]
    captured = hooked.capture(tokens, sites)
    interventions = [Intervention(site, captured[site]) for site in sites]
    interventions += [Intervention(site, lambda x: x) for site in sites]
    logits = hooked.run_with_interventions(tokens, interventions)
    torch.testing.assert_close(logits, hooked.forward(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_v_of_a_head_scales_z_of_its_group(family):
    """Attention is linear in v: an edit of v, fused or not, is an edit of z at the right heads."""
    hooked, tokens = shared_model(family), random_tokens(2, 6)
    groups = hooked.n_heads // hooked.n_kv_heads
    kv_head = hooked.n_kv_heads - 1
    heads = range(kv_head * groups, (kv_head + 1) * groups)

    def triple(x):
        return 3 * x

    by_v = hooked.run_with_interventions(tokens, [Intervention(Site("v", 1, kv_head), triple)])
    by_z = hooked.run_with_interventions(
        tokens, [Intervention(Site("head", 1, head), triple) for head in heads]
    )
    torch.testing.assert_close(by_v, by_z, atol=1e-5, rtol=1e-5)
    assert (by_v - hooked.forward(tokens)).abs().max() > 1e-3


@pytest.mark.parametrize(
    "family", [f for f in FAMILIES if not f.startswith(("qwen3", "gemma3", "olmo2"))]
)
def test_scaling_q_is_scaling_k(family):
    """Scores are bilinear in q and k (where they have no norms of their own)."""
    hooked, tokens = shared_model(family), random_tokens(2, 6)
    by_q, by_k = (
        hooked.run_with_interventions(tokens, [Intervention(Site(grain, 1), lambda x: 2 * x)])
        for grain in "qk"
    )
    torch.testing.assert_close(by_q, by_k, atol=1e-5, rtol=1e-5)
    assert (by_q - hooked.forward(tokens)).abs().max() > 1e-3


def test_interventions_apply_in_order_and_per_item():
    hooked, tokens = shared_model("llama"), random_tokens(3, 6)
    at = torch.tensor([0, 5, 2])
    _, captured = hooked.run(
        tokens,
        sites="resid_pre.1",
        interventions=[
            Intervention("resid_pre.1", torch.zeros(32), positions=at),
            Intervention("resid_pre.1", lambda x: x + 1, positions=[0, 2]),
        ],
    )
    plain = hooked.capture(tokens, "resid_pre.1")["resid_pre.1"].clone()
    plain[torch.arange(3), at] = 0
    plain[:, [0, 2]] += 1
    torch.testing.assert_close(captured["resid_pre.1"], plain)


def test_values_that_do_not_fit_and_sites_that_cannot_be_written_are_refused():
    hooked, tokens = shared_model("llama"), random_tokens(2, 6)
    before = n_hooks(hooked.model)

    def run(site, value, positions=None):
        hooked.run_with_interventions(tokens, [Intervention(site, value, positions)])

    with pytest.raises(SiteError, match=r"shape \(7,\) does not fit"):
        run("resid_pre.1", torch.zeros(7))
    with pytest.raises(SiteError, match="returned shape"):
        run("resid_pre.1", lambda x: x[:, :1])
    with pytest.raises(SiteError, match="not written"):
        run("pattern.1", torch.zeros(6))
    with pytest.raises(SiteError, match="layers 0 to 2"):
        run("resid_pre.3", torch.zeros(32))
    assert n_hooks(hooked.model) == before


def test_an_intervention_that_fires_twice_is_an_error():
    model = tiny_model("llama")
    model.model.layers[1] = model.model.layers[0]
    hooked = HookedModel(model, self_test=False)
    with pytest.raises(ModelError, match="fired 2 times"):
        hooked.run_with_interventions(
            random_tokens(1, 4), [Intervention("mlp_out.0", torch.zeros(32))]
        )


def test_a_site_that_is_not_written_is_an_error(monkeypatch):
    hooked = HookedModel(tiny_model("llama"), self_test=False)
    monkeypatch.setattr(hooked, "_run_blocks", lambda resid, *_: resid)
    with pytest.raises(ModelError, match=r"mlp_out.0: was not written"):
        hooked.capture(random_tokens(1, 4), "mlp_out.0")


def test_an_exception_leaves_no_hooks():
    model = tiny_model("gpt2")
    hooked = HookedModel(model)

    def fail(_):
        raise RuntimeError("from inside")

    for site in ("resid_mid.0", "head.2", "resid_post.1"):
        with pytest.raises(RuntimeError, match="from inside"):
            hooked.run(
                random_tokens(1, 4),
                sites=["resid_pre.0", "mlp_out.2"],
                interventions=[
                    Intervention("attn_out.0", torch.zeros(32)),
                    Intervention(site, fail),
                ],
            )
        assert n_hooks(model) == 0


# ---- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential"])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_at_sites_are_finite_differences(family, frozen):
    """In float64, at every writable grain. With SDPA these families compute in float64 throughout
    (NeoX's eager softmax is float32)."""
    model = tiny_model(family, dtype="float64", attn_implementation="sdpa")
    model.requires_grad_(not frozen)
    hooked, tokens = HookedModel(model), random_tokens(2, 5)
    grains = [g for g in GRAINS if g != "pattern"]
    if hooked.architecture.parallel:
        grains.remove("resid_mid")
    readout = torch.randn(2, D_VOCAB, generator=torch.Generator().manual_seed(0)).double()
    for positions in (None, 1):
        logits, captured = hooked.run(
            tokens,
            sites=[Site(grain, 1) for grain in grains],
            capture_positions=positions,
            positions=-1,
            grad=True,
        )
        gradients = torch.autograd.grad((logits * readout).sum(), list(captured.values()))
        for site, gradient in zip(captured, gradients, strict=True):
            generator = torch.Generator().manual_seed(1)
            direction = torch.randn(gradient.shape, generator=generator).double()
            ends = [
                hooked.run_with_interventions(
                    tokens,
                    [Intervention(site, captured[site].detach() + step * direction, positions)],
                    positions=-1,
                )
                for step in (1e-5, -1e-5)
            ]
            difference = ((ends[0] - ends[1]) * readout).sum() / 2e-5
            assert float((gradient * direction).sum()) == pytest.approx(float(difference), rel=1e-6)


@pytest.mark.parametrize("family", SEQUENTIAL)
def test_the_gradient_at_resid_mid_is_the_gradient_at_attn_out(family):
    hooked, tokens = shared_model(family), random_tokens(2, 5)
    logits, captured = hooked.run(tokens, sites=["attn_out.1", "resid_mid.1"], grad=True)
    at_attention, at_mid = torch.autograd.grad(
        logits[..., 3].sum(), [captured["attn_out.1"], captured["resid_mid.1"]]
    )
    torch.testing.assert_close(at_mid, at_attention, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("grain", ["resid_mid", "head", "q", "resid_pre"])
def test_gradients_reach_an_intervention_s_value(grain):
    """A learned patch: the gradient of its value is that of the site it replaces."""
    hooked, tokens = HookedModel(tiny_model("gpt2", dtype="float64")), random_tokens(2, 5)
    site = Site(grain, 1)
    value = hooked.capture(tokens, site, positions=2)[site].requires_grad_()
    logits = hooked.run_with_interventions(
        tokens, [Intervention(site, value, positions=2)], positions=-1, grad=True
    )
    (got,) = torch.autograd.grad(logits[:, 3].sum(), value)
    logits, captured = hooked.run(tokens, sites=site, capture_positions=2, positions=-1, grad=True)
    (expected,) = torch.autograd.grad(logits[:, 3].sum(), captured[site])
    torch.testing.assert_close(got, expected)


def test_a_function_of_the_activations_passes_gradients_through_both():
    hooked, tokens = HookedModel(tiny_model("gpt2", dtype="float64")), random_tokens(2, 5)
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)

    def total(factor):
        square = Intervention("resid_mid.1", lambda x: factor * x * x)
        return hooked.run_with_interventions(tokens, [square], grad=True)[..., 3].sum()

    (gradient,) = torch.autograd.grad(total(scale), scale)
    step = 1e-6
    with torch.no_grad():
        ends = [total(scale.detach() + sign * step).detach() for sign in (1, -1)]
    difference = (ends[0] - ends[1]) / (2 * step)
    assert float(gradient) == pytest.approx(float(difference), rel=1e-6)


def test_no_graph_is_built_unless_asked_for():
    hooked, tokens = shared_model("llama"), random_tokens(1, 4)
    resid = hooked.capture(tokens, "resid_pre.1")["resid_pre.1"]
    for call in (
        lambda **options: hooked.forward(tokens, **options),
        lambda **options: hooked.forward(tokens, positions=-1, **options),
        lambda **options: hooked.run(tokens, **options)[0],
        lambda **options: hooked.run_with_interventions(tokens, [], **options),
        lambda **options: hooked.run_from_layer(1, resid, **options),
        lambda **options: hooked.resid_from_layer(1, resid, **options),
    ):
        assert not call().requires_grad
        assert call(grad=True).requires_grad
    assert torch.is_grad_enabled()


# ---- padding -------------------------------------------------------------------------------------

LENGTHS = (8, 5, 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_what_they_give_alone(family, side):
    hooked = shared_model(family)
    rows = [random_tokens(1, n, seed=n) for n in LENGTHS]
    tokens = torch.full((3, 8), 7)
    mask = torch.zeros(3, 8, dtype=torch.long)
    for i, row in enumerate(rows):
        where = slice(8 - row.shape[1], 8) if side == "left" else slice(0, row.shape[1])
        tokens[i, where], mask[i, where] = row[0], 1
    last = torch.tensor([7, 7, 7] if side == "left" else [n - 1 for n in LENGTHS])
    options = {"attention_mask": mask, "positions": last}
    resid = hooked.capture(tokens, "resid_pre.2", attention_mask=mask)["resid_pre.2"]
    site = Site("head", 1)
    for logits in (
        hooked.forward(tokens, **options),
        hooked.run_from_layer(2, resid, **options),
        hooked.run_with_interventions(tokens, [Intervention(site, lambda x: x)], **options),
    ):
        for i, row in enumerate(rows):
            alone = hooked.model(row).logits[0, -1]
            torch.testing.assert_close(logits[i], alone, atol=1e-5, rtol=1e-5)
    captured = hooked.capture(tokens, site, **options)[site]
    for i, row in enumerate(rows):
        alone = hooked.capture(row, site, positions=-1)[site][0]
        torch.testing.assert_close(captured[i], alone, atol=1e-5, rtol=1e-5)


def test_left_padding_without_a_mask_is_refused():
    model = tiny_model("llama")
    model.config.pad_token_id = 9
    hooked = HookedModel(model)
    tokens = random_tokens(3, 6)
    tokens[:, 0], tokens[:, -1] = 1, 9
    hooked.forward(tokens)  # padding on the right does no harm to what stands before it
    tokens[1, 0] = 9
    for call in (
        hooked.forward,
        hooked.run,
        hooked.embed,
        lambda t: hooked.capture(t, "resid_pre.0"),
        lambda t: hooked.generate(t, max_new_tokens=1),
    ):
        with pytest.raises(ModelError, match="row 1 starts with the padding id 9"):
            call(tokens)
    hooked.forward(tokens, attention_mask=(tokens != 9).long())
    model.config.bos_token_id = 9  # then one of them is the beginning, two are padding
    hooked.forward(tokens)
    tokens[1, 1] = 9
    with pytest.raises(ModelError, match="row 1"):
        hooked.forward(tokens)


@pytest.mark.parametrize(
    ("tokens", "mask", "message"),
    [
        (torch.zeros(2, 3), None, "integers"),
        (torch.zeros(3, dtype=torch.long), None, "integers"),
        (torch.zeros(2, 0, dtype=torch.long), None, "integers"),
        (torch.full((1, 3), D_VOCAB), None, "0 to 63"),
        (torch.full((1, 3), -1), None, "0 to 63"),
        (torch.zeros(2, 3, dtype=torch.long), torch.ones(2, 4), "attention_mask"),
        (torch.zeros(2, 3, dtype=torch.long), torch.tensor([[0, 1, 1], [0, 0, 0]]), "every row"),
    ],
)
def test_malformed_inputs_are_refused(tokens, mask, message):
    with pytest.raises(ModelError, match=message):
        shared_model("llama").forward(tokens, attention_mask=mask)


# ---- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_generation_is_hugging_face_s(family):
    hooked, tokens = shared_model(family), random_tokens(3, 7)
    mask = torch.tensor([[1] * 7, [0] * 3 + [1] * 4, [0] * 6 + [1]])
    for attention_mask in (None, mask):
        expected = hooked.model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens) if attention_mask is None else mask,
            max_new_tokens=8,
            do_sample=False,
        )
        got = hooked.generate(
            tokens, max_new_tokens=8, temperature=0, attention_mask=attention_mask
        )
        assert torch.equal(got, expected)


def flat_model():
    """A model whose next-token distribution is nearly uniform over 128 tokens."""
    model = tiny_model("llama")
    model.resize_token_embeddings(128, mean_resizing=False)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(0.01)
    return HookedModel(model)


def test_sampling_is_from_the_whole_distribution_and_reproducible():
    hooked, tokens = flat_model(), random_tokens(64, 3)
    hooked_samples = [
        hooked.generate(tokens, max_new_tokens=16, generator=derive_generator(seed, "sample"))
        for seed in (0, 0, 1)
    ]
    assert torch.equal(hooked_samples[0], hooked_samples[1])
    assert not torch.equal(hooked_samples[0], hooked_samples[2])
    assert len(hooked_samples[0][:, 3:].unique()) > 120  # of 128, in 1024 draws
    torch.manual_seed(0)
    prompt = tokens[:1].expand(1024, -1)
    theirs = hooked.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=1, do_sample=True
    )
    assert len(theirs[:, 3:].unique()) <= 50  # the trap: top_k = 50 by default


def test_sampled_frequencies_are_the_model_s_probabilities():
    hooked, n = shared_model("gpt2"), 5_000
    tokens = random_tokens(1, 4)
    for temperature in (1.0, 0.5):
        p = (hooked.forward(tokens, positions=-1)[0] / temperature).softmax(-1)
        draws = hooked.generate(
            tokens.expand(n, -1),
            max_new_tokens=1,
            temperature=temperature,
            generator=derive_generator(0, temperature),
        )[:, -1]
        counts = draws.bincount(minlength=D_VOCAB)
        assert bool(((counts - n * p).abs() <= 5 * (n * p).sqrt() + 5).all())


def test_rows_that_ended_are_filled_up():
    hooked, tokens = shared_model("llama"), random_tokens(8, 4)
    free = hooked.generate(tokens, max_new_tokens=12, temperature=0)
    eos = int(free[0, 6])
    stopped = hooked.generate(tokens, max_new_tokens=12, temperature=0, eos_token_id=eos)
    for ours, whole in zip(stopped, free, strict=True):
        new = whole[4:].tolist()
        end = new.index(eos) if eos in new else len(new)
        assert ours[4 : 4 + end].tolist() == new[:end]
        assert set(ours[4 + end :].tolist()) <= {eos}
    one = hooked.generate(tokens[:1], max_new_tokens=12, temperature=0, eos_token_id=eos)
    assert one.shape[1] == 4 + free[0, 4:].tolist().index(eos) + 1  # stops when all have ended


def test_prompts_padded_on_the_right_cannot_be_continued():
    with pytest.raises(ModelError, match="padded on the left"):
        shared_model("llama").generate(
            random_tokens(1, 3), max_new_tokens=1, attention_mask=torch.tensor([[1, 1, 0]])
        )
    with pytest.raises(ModelError, match="temperature"):
        shared_model("llama").generate(random_tokens(1, 3), max_new_tokens=1, temperature=-1)


# ---- loading -------------------------------------------------------------------------------------


def test_training_mode_is_refused():
    model = tiny_model("gpt2")
    hooked = HookedModel.from_model(model)
    model.train()
    tokens = random_tokens(1, 3)
    for call in (
        lambda: HookedModel.from_model(model),
        lambda: hooked.forward(tokens),
        lambda: hooked.capture(tokens, "resid_pre.0"),
        lambda: hooked.run_from_layer(1, torch.zeros(1, 3, 32)),
        lambda: hooked.generate(tokens, max_new_tokens=1),
    ):
        with pytest.raises(ModelError, match=r"model\.eval\(\)"):
            call()
    assert model.training  # it belongs to the caller


def test_a_checkpoint_loads_as_a_hooked_model(tmp_path):
    from mechinterp.checkpoints import open_checkpoint, save_checkpoint

    model = tiny_model("llama")
    save_checkpoint(model, tmp_path / "saved")
    hooked = mechinterp.load(tmp_path / "saved")
    assert (hooked.n_layers, hooked.n_heads, hooked.n_kv_heads) == (N_LAYERS, N_HEADS, N_KV_HEADS)
    assert (hooked.d_model, hooked.d_head, hooked.d_vocab) == (32, D_HEAD, D_VOCAB)
    assert hooked.checkpoint is not None
    assert hooked.checkpoint.architecture == "LlamaForCausalLM"
    assert (hooked.dtype, hooked.device.type) == (torch.float32, "cpu")
    tokens = random_tokens(2, 5)
    torch.testing.assert_close(hooked.forward(tokens), model(tokens).logits, atol=0, rtol=0)
    options = {"dtype": "bfloat16", "attn_implementation": "sdpa"}
    half = mechinterp.load(open_checkpoint(tmp_path / "saved"), **options)
    assert half.dtype == torch.bfloat16
    assert half.model.config._attn_implementation == "sdpa"
    with pytest.raises(SiteError, match="eager"):
        half.capture(tokens, "pattern.0")


def test_the_self_test_is_cheap():
    model = tiny_model("llama")
    seconds = []
    for _ in range(5):
        start = time.process_time()
        HookedModel(model)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.05


def run_python(code):
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_does_not_import_torch():
    run_python("import sys, mechinterp; assert 'torch' not in sys.modules")


@pytest.mark.slow
def test_importing_hooked_does_not_import_transformer_lens():
    run_python(
        "import sys, torch; threads = torch.get_num_threads(); import mechinterp.hooked;"
        "assert 'transformer_lens' not in sys.modules; assert torch.get_num_threads() == threads"
    )


def test_transformer_lens_is_imported_inside_functions_only():
    for path in Path(mechinterp.__file__).parent.rglob("*.py"):
        for statement in ast.parse(path.read_text()).body:
            if isinstance(statement, ast.Import | ast.ImportFrom):
                assert "transformer_lens" not in ast.unparse(statement), path


@pytest.mark.slow
def test_smollm2(tmp_path):
    from mechinterp.smollm2 import fetch_smollm2, find_gguf

    try:
        find_gguf()
    except CheckpointError as error:
        pytest.skip(str(error))
    hooked = HookedModel.from_checkpoint(fetch_smollm2(tmp_path / "smollm2"))
    assert (hooked.n_layers, hooked.n_heads, hooked.n_kv_heads) == (30, 9, 3)
    tokens = hooked.checkpoint.load_tokenizer()(
        ["The capital of France is", "Two and two is equal"], return_tensors="pt"
    ).input_ids
    expected, logits = read_by_plain_hooks(hooked, tokens)
    sites = [Site(g, layer) for g in ("resid_mid", "head", "mlp_out") for layer in (0, 15, 29)]
    captured = hooked.capture(tokens, sites)
    for site in sites:
        torch.testing.assert_close(
            captured[site], expected[site.grain, site.layer], rtol=1e-5, atol=1e-2
        )
    resid = hooked.capture(tokens, "resid_pre.20")["resid_pre.20"]
    assert (hooked.run_from_layer(20, resid) - logits).abs().max() < 1e-3
    greedy = hooked.generate(tokens[:1], max_new_tokens=8, temperature=0)
    theirs = hooked.model.generate(
        tokens[:1], attention_mask=torch.ones_like(tokens[:1]), max_new_tokens=8, do_sample=False
    )
    assert torch.equal(greedy[:, : theirs.shape[1]], theirs)
    with torch.no_grad():
        bridge_logits, cache = hooked.bridge().run_with_cache(tokens)
    assert (bridge_logits - logits).abs().max() < 1e-3
    for site in sites:
        torch.testing.assert_close(
            captured[site], cache[site.transformer_lens_name], rtol=1e-5, atol=1e-2
        )
