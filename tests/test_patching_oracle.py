"""The fast sweep against two slow ones: full forwards with plain hooks, and TransformerLens."""

from __future__ import annotations

from functools import cache, partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, D_VOCAB, N_HEADS, N_LAYERS, SEQUENTIAL, random_tokens, tiny_model
from transformers import AutoModelForCausalLM

from mechinterp.architectures import LAYOUTS
from mechinterp.errors import AnalysisError, CheckpointError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import logit_difference
from mechinterp.patching.naive import naive_sweep, patch_by_loop
from mechinterp.patching.plan import GRAINS, HEAD_GRAINS, RESIDUAL_GRAINS, make_plan
from mechinterp.patching.reference import mean_activations
from mechinterp.patching.stored import store_activations
from mechinterp.patching.sweeps import sweep, sweep_many
from mechinterp.sites import Site
from mechinterp.smollm2 import fetch_smollm2

N_ITEMS, N_POSITIONS = 3, 6
FAMILIES = [  # all that the library names
    *("llama", "gpt2", "gpt_neox", "gemma2", "gemma3"),
    *("qwen2", "qwen3", "olmo2", "mistral", "phi3"),
]
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


def test_every_family_is_tested_and_attends_far_from_uniformly():
    """Or wrong code would pass."""
    assert {CONFIGS[family]().model_type for family in FAMILIES} == LAYOUTS.keys()
    _, clean = pairs()
    for family in FAMILIES:
        captured = model(family).capture(clean, model(family).sites("pattern"))
        last = captured.stack("pattern")[..., -1, :]  # [layers items heads keys]
        entropy = torch.special.entr(last).sum(-1) / torch.log((last > 0).sum(-1))
        assert float(entropy.mean()) < 0.8, family  # 1 is uniform
        assert float(entropy.min()) < 0.5, family


def theirs(family: str, name: str) -> torch.Tensor:
    """Values [items, layers, ...] of TransformerLens's own `get_act_patch_*`."""
    from transformer_lens import patching as tl

    tl.tqdm = lambda iterable, **_: iterable
    corrupt, clean = pairs()
    bridge = model(family).bridge()

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return METRIC(logits[:, -1][:, METRIC.token_ids], torch.arange(N_ITEMS))

    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        patch = getattr(tl, f"get_act_patch_{name}")
        result = patch(bridge, corrupt, cache, metric, reduce="none", baseline=True)
    return result.values.movedim(-1, 0)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grain", ["resid_pre", "attn_out", "mlp_out"])
def test_positions_equal_transformer_lens(family, grain):
    corrupt, clean = pairs()
    ours = sweep(model(family), corrupt=corrupt, clean=clean, grain=grain, metric=METRIC)
    assert ours.values.shape == (N_ITEMS, N_LAYERS, N_POSITIONS)
    assert float(ours.effect.abs().max()) > 0.05
    torch.testing.assert_close(ours.values, theirs(family, grain), rtol=0, atol=1e-5)


GROUPED = [family for family in FAMILIES if family not in ("gpt2", "gpt_neox")]
HEADS = [  # theirs has no keys and values of grouped queries
    (family, grain)
    for family in FAMILIES
    for grain in ("head", "q", "k", "v", "pattern")
    if grain not in ("k", "v") or family not in GROUPED
]


@pytest.mark.parametrize(("family", "grain"), HEADS)
def test_heads_equal_transformer_lens(family, grain):
    check_heads(family, grain, by_position=False)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "grain"), HEADS)
def test_heads_by_position_equal_transformer_lens(family, grain):
    check_heads(family, grain, by_position=True)


def check_heads(family: str, grain: str, *, by_position: bool) -> None:
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    ours = sweep(model(family), **options, by_position=by_position)
    assert float(ours.effect.abs().max()) > 0.01
    part = "out" if grain == "head" else grain
    values = theirs(family, f"attn_head_{part}_{'by_pos' if by_position else 'all_pos'}")
    if by_position and grain != "pattern":  # theirs has positions before heads
        values = values.transpose(2, 3)
    assert ours.values.shape == (N_ITEMS, N_LAYERS, N_HEADS, N_POSITIONS)[: 3 + by_position]
    torch.testing.assert_close(ours.values, values, rtol=0, atol=1e-5)


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


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    try:
        checkpoint = fetch_smollm2(tmp_path_factory.mktemp("smollm2") / "checkpoint")
    except CheckpointError as error:
        pytest.skip(str(error))
    return HookedModel.from_checkpoint(checkpoint)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grain", "by_position"),
    [(grain, True) for grain in (*RESIDUAL_GRAINS, "head")]
    + [(grain, False) for grain in HEAD_GRAINS],
)
def test_random_cells_of_smollm2_equal_transformer_lens(smollm2, grain, by_position):
    """Cells at random by TransformerLens's hooks, as in its `get_act_patch_*`, which would take
    hours here; it has none for keys and values of grouped queries."""
    clean = torch.randint(100, 1000, (2, 9), generator=torch.Generator().manual_seed(0))
    corrupt = clean.clone()
    corrupt[:, 6:] += 7
    metric = logit_difference(correct=torch.tensor([260, 284]), wrong=torch.tensor([2000, 3000]))
    run = partial(sweep, smollm2, corrupt=corrupt, clean=clean, metric=metric)
    ours = run(grain=grain, by_position=by_position)
    assert ours.method == "suffix"
    bridge, items = smollm2.bridge(), torch.arange(2)
    # TransformerLens 4.3 writes resid_mid on the MLP's branch alone; in one network this is
    # the same patch one site on.
    grain = "resid_post" if grain == "resid_mid" else grain
    scale = float(ours.values.abs().max())
    n_cells, shape = 6, ours.values.shape[1:]
    flat = ours.effect.abs().amax(0).flatten()
    some = torch.randint(flat.numel(), (n_cells // 2,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        _, cache = bridge.run_with_cache(clean)
        for cell in [*some.tolist(), *flat.topk(n_cells // 2).indices.tolist()]:
            layer, *unit = (int(i) for i in torch.unravel_index(torch.tensor(cell), shape))
            name = Site(grain, layer).transformer_lens_name
            if grain == "pattern" or grain in RESIDUAL_GRAINS:
                at = (slice(None), unit[0])
            else:
                at = (slice(None), unit[1] if by_position else slice(None), unit[0])

            def write(site, hook, at=at, name=name):
                site[at] = cache[name][at]
                return site

            logits = bridge.run_with_hooks(corrupt, fwd_hooks=[(name, write)])
            theirs = metric(logits[:, -1][:, metric.token_ids], items)
            difference = (ours.values[:, layer][(slice(None), *unit)] - theirs).abs().max()
            assert float(difference) < 1e-4 * scale, (layer, unit)
    assert float(flat.max()) > 0.05
