"""The fast sweep against two slow ones: full forwards with plain hooks, and TransformerLens."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, D_VOCAB, N_HEADS, N_LAYERS, SEQUENTIAL, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import logit_difference
from mechinterp.patching.naive import naive_sweep, patch_by_loop
from mechinterp.patching.plan import GRAINS, make_plan
from mechinterp.patching.reference import mean_activations
from mechinterp.patching.stored import store_activations
from mechinterp.patching.sweeps import sweep, sweep_many

N_ITEMS, N_POSITIONS = 3, 6
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen3", "olmo2", "mistral", "phi3"]
CASES = [
    (family, grain)
    for family in FAMILIES
    for grain in GRAINS
    if grain != "resid_mid" or family in SEQUENTIAL
]
METRIC = logit_difference(correct=torch.tensor([1, 2, 3]), wrong=torch.tensor([5, 6, 7]))


@cache
def model(family: str, attn_implementation: str = "eager", seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model(family, seed=seed, attn_implementation=attn_implementation))


def pairs(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Corrupt and clean prompts that differ in one token, elsewhere in each item."""
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=seed)
    corrupt = clean.clone()
    for item, position in enumerate([1, 2, 4]):
        corrupt[item, position] = (corrupt[item, position] + 3) % D_VOCAB
    return corrupt, clean


def assert_equal(fast, slow, tolerance: float = 1e-5) -> None:
    assert (fast.method, slow.method) == ("suffix", "loop")
    assert fast.axes == slow.axes
    assert float(slow.effect.abs().max()) > 0.05  # or the comparison would say nothing
    for name in ("values", "corrupt_metric", "clean_metric"):
        torch.testing.assert_close(
            getattr(fast, name), getattr(slow, name), rtol=0, atol=tolerance, msg=name
        )


@pytest.mark.parametrize(("family", "grain"), CASES)
def test_sweep_equals_the_loop(family, grain):
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    assert_equal(sweep(model(family), **options), naive_sweep(model(family), **options))


@pytest.mark.parametrize("grain", ["resid_pre", "mlp_out", "head"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_sweep_equals_the_loop_under_sdpa(family, grain):
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    sdpa = model(family, "sdpa")
    assert_equal(sweep(sdpa, **options), naive_sweep(sdpa, **options))


@pytest.mark.parametrize("grain", ["resid_pre", "resid_mid", "attn_out", "head"])
def test_noising_and_another_source_equal_the_loop(grain):
    corrupt, clean = pairs()
    options = {
        "corrupt": corrupt,
        "clean": clean,
        "grain": grain,
        "metric": METRIC,
        "direction": "noising",
        "source": model("llama", seed=1),
    }
    assert_equal(sweep(model("llama"), **options), naive_sweep(model("llama"), **options))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("grain", ["resid_pre", "attn_out", "head"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_prompts_equal_the_loop(family, grain, side):
    corrupt, clean = pairs()
    lengths = torch.tensor([6, 5, 5])
    position = torch.arange(N_POSITIONS)
    if side == "left":
        mask = (position >= N_POSITIONS - lengths[:, None]).long()
        decision = -1
    else:
        mask = (position < lengths[:, None]).long()
        decision = lengths - 1
    options = {
        "corrupt": corrupt,
        "clean": clean,
        "grain": grain,
        "metric": METRIC,
        "attention_mask": mask,
        "decision": decision,
    }
    assert_equal(sweep(model(family), **options), naive_sweep(model(family), **options))


@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_random_prompts_and_cells(data):
    family = data.draw(st.sampled_from(["llama", "gemma2", "gpt_neox"]))
    grain = data.draw(st.sampled_from([g for g in GRAINS if g != "resid_mid"]))
    n_items = data.draw(st.integers(1, 3))
    length = data.draw(st.integers(1, 6))
    token = st.integers(0, D_VOCAB - 1)
    prompts = st.lists(
        st.lists(token, min_size=length, max_size=length), min_size=n_items, max_size=n_items
    )
    corrupt, clean = (torch.tensor(data.draw(prompts)) for _ in range(2))
    each = st.lists(st.integers(-length, length - 1), min_size=n_items, max_size=n_items)
    decision = torch.tensor(data.draw(each))
    positions = None
    if data.draw(st.booleans()):
        positions = torch.stack([torch.tensor(data.draw(each)) for _ in range(2)], dim=1)
    ids = st.lists(token, min_size=n_items, max_size=n_items)
    metric = logit_difference(
        correct=torch.tensor(data.draw(ids)), wrong=torch.tensor(data.draw(ids))
    )
    options = {
        "corrupt": corrupt,
        "clean": clean,
        "grain": grain,
        "metric": metric,
        "positions": positions,
        "decision": decision,
    }
    fast = sweep(model(family), **options, memory_mb=data.draw(st.sampled_from([0, 128])))
    slow = naive_sweep(model(family), **options)
    assert fast.method == "suffix"
    torch.testing.assert_close(fast.values, slow.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_sweep_equals_transformer_lens(family):
    from transformer_lens import patching as tl

    tl.tqdm = lambda iterable, **_: iterable
    corrupt, clean = pairs()
    bridge = model(family).bridge()
    _, clean_cache = bridge.run_with_cache(clean)
    items = torch.arange(N_ITEMS)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return METRIC(logits[:, -1][:, METRIC.token_ids], items)

    by_position = {
        "resid_pre": tl.get_act_patch_resid_pre,
        "attn_out": tl.get_act_patch_attn_out,
        "mlp_out": tl.get_act_patch_mlp_out,
        "head": tl.get_act_patch_attn_head_out_all_pos,
    }
    for grain, patch in by_position.items():
        with torch.no_grad():
            theirs = patch(bridge, corrupt, clean_cache, metric, reduce="none", baseline=True)
        ours = sweep(model(family), corrupt=corrupt, clean=clean, grain=grain, metric=METRIC)
        n_units = N_HEADS if grain == "head" else N_POSITIONS
        assert theirs.values.shape == (N_LAYERS, n_units, N_ITEMS)
        by_item = theirs.values.permute(2, 0, 1)
        torch.testing.assert_close(ours.values, by_item, rtol=0, atol=1e-5)
        torch.testing.assert_close(ours.corrupt_metric, theirs.baseline, rtol=0, atol=1e-5)
        table = theirs.to_dataframe()
        assert len(table) == N_LAYERS * n_units * N_ITEMS


@pytest.mark.parametrize(
    ("family", "grain"),
    [("gpt2", g) for g in ("q", "k", "v", "pattern")] + [("llama", "q"), ("llama", "pattern")],
)
def test_inside_attention_equals_transformer_lens(family, grain):
    """Theirs has no keys and values of grouped queries."""
    from transformer_lens import patching as tl

    tl.tqdm = lambda iterable, **_: iterable
    patch = {
        "q": tl.get_act_patch_attn_head_q_all_pos,
        "k": tl.get_act_patch_attn_head_k_all_pos,
        "v": tl.get_act_patch_attn_head_v_all_pos,
        "pattern": tl.get_act_patch_attn_head_pattern_all_pos,
    }[grain]
    corrupt, clean = pairs()
    bridge = model(family).bridge()
    _, clean_cache = bridge.run_with_cache(clean)

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return METRIC(logits[:, -1][:, METRIC.token_ids], torch.arange(N_ITEMS))

    with torch.no_grad():
        theirs = patch(bridge, corrupt, clean_cache, metric, reduce="none", baseline=True)
    ours = sweep(model(family), corrupt=corrupt, clean=clean, grain=grain, metric=METRIC)
    assert float(ours.effect.abs().max()) > 0.01
    by_item = theirs.values.permute(2, 0, 1)
    torch.testing.assert_close(ours.values, by_item, rtol=0, atol=1e-5)


def test_resid_mid_and_post_are_the_next_resid_pre():
    corrupt, clean = pairs()
    run = partial(sweep, model("llama"), corrupt=corrupt, clean=clean, metric=METRIC)
    mid, post, pre = (run(grain=g).values for g in ("resid_mid", "resid_post", "resid_pre"))
    torch.testing.assert_close(mid, post, rtol=0, atol=1e-5)
    torch.testing.assert_close(post[:, :-1], pre[:, 1:], rtol=0, atol=1e-5)


@pytest.mark.parametrize("grain", ["head", "q", "k", "v", "pattern", "neuron"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3", "olmo2", "phi3"])
def test_one_position_of_a_head_or_neuron_equals_the_loop(family, grain):
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    options |= {"by_position": True, "neurons": [0, 7, 30] if grain == "neuron" else None}
    fast = sweep(model(family), **options)
    assert fast.axes[-1] == "position"
    slow = naive_sweep(model(family), **options)
    torch.testing.assert_close(fast.values, slow.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grain", ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"])
@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_single_directions_equal_the_loop(family, grain):
    corrupt, clean = pairs()
    directions = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
    options = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    fast = sweep(model(family), **options, directions=directions)
    assert fast.axes == ("item", "layer", "direction", "position")
    slow = naive_sweep(model(family), **options, directions=directions)
    torch.testing.assert_close(fast.values, slow.values, rtol=0, atol=1e-5)
    scaled = sweep(model(family), **options, directions=7 * directions)
    torch.testing.assert_close(fast.values, scaled.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_several_grains_and_metrics_at_once_equal_one_at_a_time(family, direction):
    corrupt, clean = pairs()
    grains = ["attn_out", "resid_post", "resid_pre", "head", "k"]
    grains += ["resid_mid"] if family in SEQUENTIAL else []
    metrics = {
        "difference": METRIC,
        "other": logit_difference(correct=torch.tensor([9, 9, 9]), wrong=torch.tensor([1, 1, 2])),
    }
    options = {"corrupt": corrupt, "clean": clean, "direction": direction}
    together = sweep_many(model(family), grains=grains, metrics=metrics, **options)
    assert set(together) == {(grain, name) for grain in grains for name in metrics}
    for (grain, name), result in together.items():
        alone = sweep(model(family), grain=grain, metric=metrics[name], **options)
        assert (result.axes, result.grain) == (alone.axes, grain)
        torch.testing.assert_close(result.values, alone.values, rtol=0, atol=1e-5)
        torch.testing.assert_close(result.clean_metric, alone.clean_metric)


@pytest.mark.parametrize("grain", ["mlp_out", "head"])
def test_given_activations_are_patched_in(grain, tmp_path):
    """Means as the source, and another network's activations from a file."""
    corrupt, clean = pairs()
    means = mean_activations(model("llama"), clean, grain).activations(corrupt.shape)
    common = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    ablated = sweep(model("llama"), **common, direction="noising", source=means)
    plan = make_plan(model("llama"), clean, grain=grain, metric=METRIC)
    slow, base = patch_by_loop(model("llama"), clean, means, plan)
    torch.testing.assert_close(ablated.values, slow[0].permute(2, 0, 1), rtol=0, atol=1e-5)
    torch.testing.assert_close(ablated.baseline, base[0])
    assert bool(ablated.normalized.isnan().all())

    other = model("llama", seed=1)
    stored = store_activations(other, clean, grain, tmp_path / "a.safetensors", metric=METRIC)
    from_file = sweep(model("llama"), **common, source=stored)
    live = sweep(model("llama"), **common, source=other)
    for name in ("values", "clean_metric", "normalized"):
        torch.testing.assert_close(getattr(from_file, name), getattr(live, name))
    with pytest.raises(AnalysisError, match="source"):
        sweep(model("llama"), **common, source=means[:1])


@pytest.mark.parametrize("width", [16, 32])
def test_neurons_of_an_mlp_no_wider_than_the_stream(width):
    config = CONFIGS["llama"]()
    config.intermediate_size = width
    torch.manual_seed(0)
    narrow = HookedModel(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    )
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": "neuron", "metric": METRIC}
    fast = sweep(narrow, **options)
    assert fast.values.shape == (N_ITEMS, N_LAYERS, width)
    torch.testing.assert_close(
        fast.values, naive_sweep(narrow, **options).values, rtol=0, atol=1e-5
    )
