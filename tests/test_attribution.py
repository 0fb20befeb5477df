"""Attribution patching against finite differences and plain hooks on the Hugging Face modules."""

from __future__ import annotations

from functools import cache

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from plain_hooks import logits_by_hooks, site_by_hand
from scipy import stats
from tiny_models import D_VOCAB, FAMILIES, N_HEADS, N_KV_HEADS, N_LAYERS, random_tokens, tiny_model

from mechinterp.errors import AnalysisError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.patching.attribution import attribute, attribute_grains
from mechinterp.patching.axes import AXES
from mechinterp.patching.exact_cells import patch_cells
from mechinterp.patching.gradients import path_points, with_progress
from mechinterp.patching.metrics import log_prob, logit_difference
from mechinterp.patching.screening import screen
from mechinterp.patching.sweeps import sweep
from mechinterp.patching.trust import measure_trust
from mechinterp.sites import Site

N_ITEMS, N_POSITIONS = 3, 6
METRIC = logit_difference(correct=torch.tensor([1, 2, 3]), wrong=torch.tensor([5, 6, 7]))
RESIDUAL = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]


@cache
def model(family: str, seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model(family, seed=seed))


def grains_of(family: str) -> list[str]:
    return [grain for grain in AXES if grain != "resid_mid" or family != "gpt_neox"]


def pairs(seed: int = 1) -> dict[str, torch.Tensor]:
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=seed)
    corrupt = clean.clone()
    for item, position in enumerate([1, 2, 4]):
        corrupt[item, position] = (corrupt[item, position] + 3) % D_VOCAB
    return {"clean": clean, "corrupt": corrupt}


def metric_by_hooks(hooked, tokens, hooks=()):
    logits = logits_by_hooks(hooked, tokens, hooks)[:, -1]
    return METRIC(logits[:, METRIC.token_ids], torch.arange(len(tokens)))


def moved(hooked, tokens, grain, layer, step):
    """The metric with `step` [items positions ...] added at a site."""
    module, side, columns = site_by_hand(hooked, grain, layer)

    def change(tensor):
        if columns is None:
            return tensor + step.reshape(*step.shape[:2], -1)
        tensor = tensor.clone()
        for head, where in enumerate(columns):
            tensor[..., where] += step[:, :, head]
        return tensor

    with torch.no_grad():
        return metric_by_hooks(hooked, tokens, [(module, side, change)])


def one_unit(grain, step, unit):
    """`step` where it belongs to a unit, else 0."""
    only = torch.zeros_like(step)
    index = (slice(None), unit) if grain in RESIDUAL else (slice(None), slice(None), unit)
    only[index] = step[index]
    return only


def differences(hooked, prompts, grain, direction="denoising"):
    sites = hooked.sites(grain)
    clean, corrupt = (hooked.capture(prompts[name], sites) for name in ("clean", "corrupt"))
    sign = 1 if direction == "denoising" else -1
    return [sign * (clean[site] - corrupt[site]) for site in sites]


# ---- first order ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_estimates_are_the_derivative_of_exact_patches(family):
    """In the direction of the patch, by central differences of the raw model with plain hooks."""
    hooked, prompts, h = model(family), pairs(), 0.003
    found = attribute_grains(hooked, **prompts, grains=grains_of(family), metric=METRIC)
    for grain, attribution in found.items():
        if grain == "pattern":
            continue
        layer = {"resid_pre": 1}.get(grain, 0)
        step = differences(hooked, prompts, grain)[layer]
        n_units = attribution.effect.shape[2]
        units = range(n_units) if grain != "neuron" else [0, 7, n_units - 1]
        expected = []
        for unit in units:
            only = h * one_unit(grain, step, unit)
            up = moved(hooked, prompts["corrupt"], grain, layer, only)
            down = moved(hooked, prompts["corrupt"], grain, layer, -only)
            expected.append((up - down) / (2 * h))
        expected = torch.stack(expected, 1)
        scale = float(attribution.effect[:, layer].abs().max())
        assert scale > 1e-3, grain
        torch.testing.assert_close(
            attribution.effect[:, layer, list(units)], expected,
            rtol=0, atol=5e-3 * max(scale, 0.1), msg=grain,
        )  # fmt: skip


def test_attention_is_far_from_uniform():
    """Or wrong code would pass."""
    for family in ("llama", "gpt2", "gemma2"):
        pattern = model(family).capture(pairs()["clean"], "pattern.1")["pattern.1"]
        assert float(pattern[:, :, -1].max(-1).values.mean()) > 2 / N_POSITIONS


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
@pytest.mark.parametrize("grain", ["pattern", "q", "k", "v", "head"])
def test_positions_of_heads_add_up(family, grain):
    whole = attribute(model(family), **pairs(), grain=grain, metric=METRIC)
    parts = attribute(model(family), **pairs(), grain=grain, metric=METRIC, by_position=True)
    n_heads = N_KV_HEADS if grain in "kv" and model(family).n_kv_heads < N_HEADS else N_HEADS
    assert whole.effect.shape == (N_ITEMS, N_LAYERS, n_heads)
    assert parts.effect.shape == (N_ITEMS, N_LAYERS, n_heads, N_POSITIONS)
    head = "kv_head" if n_heads == N_KV_HEADS else "head"
    assert parts.axes == ("item", "layer", head, "position")
    torch.testing.assert_close(parts.effect.sum(-1), whole.effect, rtol=1e-4, atol=1e-5)


def test_patterns_have_the_gradient_of_the_raw_model():
    hooked, prompts = model("llama"), pairs()
    output = hooked.model(prompts["corrupt"], output_attentions=True, use_cache=False)
    score = METRIC(output.logits[:, -1][:, METRIC.token_ids], torch.arange(N_ITEMS))
    gradients = torch.autograd.grad(score.sum(), output.attentions)
    clean = hooked.model(prompts["clean"], output_attentions=True, use_cache=False).attentions
    expected = torch.stack(
        [
            ((c - o) * g).sum(-1)
            for c, o, g in zip(clean, output.attentions, gradients, strict=True)
        ],
        1,
    )
    found = attribute(hooked, **prompts, grain="pattern", metric=METRIC, by_position=True)
    torch.testing.assert_close(found.effect, expected.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "llama"])
def test_nodes_equal_transformer_lens(family):
    from transformer_lens.tools.analysis.attribution_patching import attribution_patch

    hooked, prompts = model(family), pairs()
    found = attribute_grains(
        hooked, **prompts, grains=["head", "mlp_out", "resid_pre"], metric=METRIC, by_position=True
    )
    for item in range(N_ITEMS):
        rows = {name: tokens[item : item + 1] for name, tokens in prompts.items()}

        def metric(logits, item=item):
            return METRIC(logits[:, -1][:, METRIC.token_ids], torch.tensor([item]))[0]

        theirs = attribution_patch(hooked.bridge(), rows["clean"], rows["corrupt"], metric)
        for node, score in theirs.node_scores.items():
            if node.kind == "embed":
                ours = found["resid_pre"].effect[item, 0, node.position]
            elif node.kind == "mlp_out":
                ours = found["mlp_out"].effect[item, node.layer, node.position]
            else:
                ours = found["head"].effect[item, node.layer, node.head, node.position]
            assert float(ours) == pytest.approx(score, abs=1e-4)


# ---- integrated gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3", "olmo2"])
def test_integrals_over_a_layer_add_up_to_its_exact_patch(family):
    hooked, prompts = model(family), pairs()
    grains = [g for g in grains_of(family) if g != "pattern"]
    found = attribute_grains(
        hooked, **prompts, grains=grains, metric=METRIC, n_steps=24, path="activations"
    )
    base = metric_by_hooks(hooked, prompts["corrupt"])
    for grain, attribution in found.items():
        for layer, step in enumerate(differences(hooked, prompts, grain)):
            exact = moved(hooked, prompts["corrupt"], grain, layer, step) - base
            total = attribution.effect[:, layer].sum(-1)
            torch.testing.assert_close(total, exact, rtol=0.02, atol=0.02, msg=f"{grain}.{layer}")
    plain = attribute(hooked, **prompts, grain="resid_pre", metric=METRIC)
    gap = plain.gap - plain.effect[:, 0].sum(-1)
    assert float(gap.abs().max()) > 0.1  # the gradient alone does not add up


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_integrals_along_the_inputs_add_up_to_the_whole_difference(direction):
    found = attribute(
        model("llama"), **pairs(), grain="resid_pre", metric=METRIC, n_steps=64, direction=direction
    )
    torch.testing.assert_close(found.effect[:, 0].sum(-1), found.gap, rtol=0.01, atol=0.01)
    assert found.method == "IG(64 inputs)"


def test_integrals_along_the_inputs_are_means_of_gradients():
    """Each step by itself: the raw model from interpolated embeddings, gradients by plain hooks."""
    hooked, prompts = model("gpt2"), pairs()
    found = attribute(hooked, **prompts, grain="mlp_out", metric=METRIC, n_steps=3)
    embeddings = [hooked.capture(prompts[n], "resid_pre.0")["resid_pre.0"] for n in prompts]
    blocks = hooked.architecture.blocks
    mean = [torch.zeros(1)] * N_LAYERS
    for where, weight in path_points(3):
        resid = embeddings[1] + where * (embeddings[0] - embeddings[1])
        live = {}

        def keep(tensor, layer, live=live):
            live[layer] = tensor
            return tensor

        hooks = [(blocks[0].module, "input", lambda _, resid=resid: resid)]
        hooks += [(b.mlp, 0, lambda t, layer=b.layer: keep(t, layer)) for b in blocks]
        score = metric_by_hooks(hooked, prompts["corrupt"], hooks)
        gradients = torch.autograd.grad(score.sum(), [live[i] for i in range(N_LAYERS)])
        mean = [m + weight * g for m, g in zip(mean, gradients, strict=True)]
    steps = differences(hooked, prompts, "mlp_out")
    expected = torch.stack([(s * g).sum(-1) for s, g in zip(steps, mean, strict=True)], 1)
    torch.testing.assert_close(found.effect, expected, rtol=1e-4, atol=1e-5)


# ---- AtP* ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grain", ["q", "k"])
def test_attention_fix_is_the_change_of_the_raw_models_pattern(family, grain):
    hooked, prompts, layer = model(family), pairs(), 1
    options = {"grain": grain, "metric": METRIC, "attention_fix": True}
    by_head = attribute(hooked, **prompts, **options)
    by_position = attribute(hooked, **prompts, **options, by_position=True, memory_mb=0.01)
    assert by_head.method == "AtP + attention fix"
    output = hooked.model(prompts["corrupt"], output_attentions=True, use_cache=False)
    score = METRIC(output.logits[:, -1][:, METRIC.token_ids], torch.arange(N_ITEMS))
    (gradient,) = torch.autograd.grad(score.sum(), [output.attentions[layer]])
    step = differences(hooked, prompts, grain)[layer]
    module, side, columns = site_by_hand(hooked, grain, layer)
    attention = hooked.architecture.blocks[layer].attention

    def effect(only):
        seen = []

        def change(tensor):
            tensor = tensor.clone()
            for head, dims in enumerate(columns):
                tensor[..., dims] += only[:, :, head]
            return tensor

        def see(pattern):
            seen.append(pattern)
            return pattern

        with torch.no_grad():
            metric_by_hooks(
                hooked, prompts["corrupt"], [(module, side, change), (attention, 1, see)]
            )
        return ((seen[0] - output.attentions[layer]) * gradient).sum((1, 2, 3)).detach()

    for head in range(step.shape[2]):
        whole = torch.zeros_like(step)
        whole[:, :, head] = step[:, :, head]
        torch.testing.assert_close(
            by_head.effect[:, layer, head], effect(whole), rtol=1e-3, atol=1e-4
        )
        for position in range(N_POSITIONS):
            only = torch.zeros_like(step)
            only[:, position, head] = step[:, position, head]
            torch.testing.assert_close(
                by_position.effect[:, layer, head, position], effect(only), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize("grain", ["q", "k"])
def test_attention_fix_helps_where_attention_is_saturated(grain):
    raw = tiny_model("llama")
    with torch.no_grad():
        for layer in raw.model.layers:
            layer.self_attn.q_proj.weight *= 4
    hooked, prompts = HookedModel(raw), pairs()
    cells = torch.cartesian_prod(
        torch.arange(N_LAYERS), torch.arange(N_HEADS if grain == "q" else N_KV_HEADS)
    )
    exact = patch_cells(hooked, **prompts, grain=grain, cells=cells, metric=METRIC).flatten()
    errors = {}
    for fix in (False, True):
        found = attribute(hooked, **prompts, grain=grain, metric=METRIC, attention_fix=fix)
        errors[fix] = float((found.effect.flatten() - exact).abs().median())
    assert errors[True] < 0.8 * errors[False]


def test_attention_fix_needs_patterns():
    sdpa = HookedModel(tiny_model("llama", attn_implementation="sdpa"))
    attribute(sdpa, **pairs(), grain="q", metric=METRIC)
    with pytest.raises(SiteError, match="eager"):
        attribute(sdpa, **pairs(), grain="q", metric=METRIC, attention_fix=True)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2"])
def test_grad_drop_is_the_mean_magnitude_without_one_layers_gradient(family):
    hooked, prompts = model(family), pairs()
    found = attribute(hooked, **prompts, grain="head", metric=METRIC, grad_drop=True)
    assert not found.signed
    blocks = hooked.architecture.blocks
    steps = differences(hooked, prompts, "head")
    total = torch.zeros(N_ITEMS, N_LAYERS, N_HEADS)
    for dropped in range(N_LAYERS):
        live = {}

        def keep(tensor, layer, live=live):
            live[layer] = tensor
            return tensor

        hooks = [(b.output_projection, "input", lambda t, i=b.layer: keep(t, i)) for b in blocks]
        for grain in ("attn_out", "mlp_out"):
            module, side, _ = site_by_hand(hooked, grain, dropped)
            hooks.append((module, side, torch.Tensor.detach))
        score = metric_by_hooks(hooked, prompts["corrupt"], hooks)
        order = [live[layer] for layer in range(N_LAYERS)]
        gradients = torch.autograd.grad(score.sum(), order, allow_unused=True)
        for layer, gradient in enumerate(gradients):
            if gradient is not None:
                product = steps[layer] * gradient.unflatten(-1, (N_HEADS, -1))
                total[:, layer] += product.sum((1, 3)).abs()
    torch.testing.assert_close(found.effect, total / (N_LAYERS - 1), rtol=1e-4, atol=1e-5)


# ---- batches, padding, guards --------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("options", [{}, {"n_steps": 3}, {"attention_fix": True}])
def test_padded_batches_equal_single_items(side, options):
    hooked, prompts = model("llama"), pairs()
    lengths = [6, 5, 4]
    grains = ["resid_pre", "q", "k", "mlp_out"]
    options = {"grains": grains, "by_position": True, **options}
    position = torch.arange(N_POSITIONS)
    n = torch.tensor(lengths)[:, None]
    mask = (position >= N_POSITIONS - n if side == "left" else position < n).long()
    decision = -1 if side == "left" else n[:, 0] - 1
    padded = attribute_grains(
        hooked, **prompts, metric=METRIC, attention_mask=mask, decision=decision, **options
    )
    for item, length in enumerate(lengths):
        real = slice(N_POSITIONS - length, None) if side == "left" else slice(length)
        one = {name: tokens[item : item + 1, real] for name, tokens in prompts.items()}
        metric = logit_difference(correct=torch.tensor([1 + item]), wrong=torch.tensor([5 + item]))
        alone = attribute_grains(hooked, **one, metric=metric, **options)
        for grain in grains:
            torch.testing.assert_close(
                padded[grain].effect[item][..., real], alone[grain].effect[0], rtol=1e-3, atol=1e-4
            )


def test_small_memory_gives_the_same():
    for options in ({}, {"n_steps": 4}, {"n_steps": 4, "path": "activations"}, {"grad_drop": True}):
        arguments = {**pairs(), "grain": "head", "metric": METRIC, **options}
        whole = attribute(model("llama"), **arguments)
        small = attribute(model("llama"), **arguments, memory_mb=1e-3)
        torch.testing.assert_close(small.effect, whole.effect, rtol=1e-4, atol=1e-6)


def test_directions_mirror_each_other_and_own_activations_do_nothing():
    prompts = pairs()
    swapped = {"clean": prompts["corrupt"], "corrupt": prompts["clean"]}
    noising = attribute(model("llama"), **prompts, grain="head", metric=METRIC, direction="noising")
    denoising = attribute(model("llama"), **swapped, grain="head", metric=METRIC)
    assert torch.equal(noising.effect, denoising.effect)
    assert torch.equal(noising.gap, denoising.gap)
    same = {"clean": prompts["clean"], "corrupt": prompts["clean"]}
    for grain in ("resid_pre", "k", "neuron"):
        nothing = attribute(model("llama"), **same, grain=grain, metric=METRIC)
        assert not nothing.effect.any()
        assert not nothing.changed.any()


def test_another_checkpoint_as_the_source():
    hooked, other, prompts = model("llama"), model("llama", seed=1), pairs()
    same = {"clean": prompts["corrupt"], "corrupt": prompts["corrupt"]}
    found = attribute(hooked, **same, grain="attn_out", metric=METRIC, source=other)
    site, h = Site("attn_out", 1), 0.01
    step = other.capture(same["clean"], site)[site] - hooked.capture(same["clean"], site)[site]
    step[:, :-1] = 0
    up, down = (moved(hooked, same["corrupt"], "attn_out", 1, s * step) for s in (h, -h))
    torch.testing.assert_close(found.effect[:, 1, -1], (up - down) / (2 * h), rtol=0.01, atol=0.02)


def test_the_model_is_left_as_it_was():
    hooked = HookedModel(tiny_model("llama"))
    hooked.model.requires_grad_(False)
    with torch.no_grad():
        for options in ({}, {"grad_drop": True}, {"attention_fix": True}, {"n_steps": 2}):
            attribute(hooked, **pairs(), grain="q", metric=METRIC, **options)
        attribute(hooked, **pairs(), grain="q", metric=METRIC, n_steps=2, path="activations")
    modules = list(hooked.model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    assert all(p.grad is None and not p.requires_grad for p in hooked.model.parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"grain": "heads"}, "grain: expected one of"),
        ({"direction": "both"}, "direction: expected"),
        ({"clean": torch.zeros(2, 6).long()}, "of equal shape"),
        ({"n_steps": 0}, "n_steps: expected at least 1"),
        ({"path": "weights"}, "path: expected"),
        ({"n_steps": 2, "path": "activations", "grad_drop": True}, "go with 'inputs'"),
        ({"n_exact": -1}, "n_exact: expected at least 0, got -1"),
        ({"decision": 6}, "decision: expected one position"),
        ({"attention_mask": torch.ones(3, 5).long()}, "attention_mask: expected shape"),
    ],
)
def test_errors_say_what_is_wrong(wrong, message):
    arguments = {**pairs(), "grain": "q", "metric": METRIC, **wrong}
    with pytest.raises(AnalysisError, match=message):
        attribute(model("llama"), **arguments)


def test_out_of_memory_halves_the_batch():
    sizes = []

    def run(rows):
        sizes.append(rows.stop - rows.start)
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("no memory")
        return list(range(rows.start, rows.stop))

    assert [i for part in with_progress("test", 9, 8, run) for i in part] == list(range(9))
    assert sizes == [8, 4, 2, 2, 2, 2, 1]
    with pytest.raises(RuntimeError, match="other"):
        with_progress("test", 9, 8, lambda _: (_ for _ in ()).throw(RuntimeError("other")))


# ---- screening -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "grain", "by_position"),
    [
        *(("llama", grain, False) for grain in [*RESIDUAL, "neuron"]),
        ("gpt2", "resid_mid", False),
        ("gpt_neox", "k", False),
        *(("gemma2", grain, True) for grain in ("q", "k", "v", "head", "neuron")),
        ("phi3", "v", True),
    ],
)
def test_screened_cells_are_patched_exactly(family, grain, by_position):
    hooked, prompts = model(family), pairs()
    options = {"grain": grain, "metric": METRIC, "by_position": by_position}
    found = screen(hooked, **prompts, **options, top_k=4, n_sampled=5, memory_mb=0.5)
    clean = hooked.capture(prompts["clean"], hooked.sites(grain))
    corrupt = hooked.capture(prompts["corrupt"], hooked.sites(grain))
    base = metric_by_hooks(hooked, prompts["corrupt"])
    assert len(found.cells) == 9
    assert len(found.cells.unique(dim=0)) == 9
    for cell, effect in zip(found.cells.tolist(), found.effect.T, strict=True):
        layer, unit, *position = cell
        site = Site(grain, layer)
        step = clean[site] - corrupt[site]
        only = one_unit(grain, step, unit)
        if position:
            only[:, [p for p in range(N_POSITIONS) if p != position[0]]] = 0
        exact = moved(hooked, prompts["corrupt"], grain, layer, only) - base
        torch.testing.assert_close(effect, exact, rtol=1e-3, atol=1e-4)
    assert found.attribution.trust is found.trust
    assert found.trust.n_selected == 4
    table = found.to_table()
    assert table["selected"].tolist() == [True] * 4 + [False] * 5
    np.testing.assert_allclose(table["effect"], found.effect.mean(0), rtol=1e-5)


@pytest.mark.parametrize("grain", ["resid_pre", "k", "head", "pattern"])
def test_screening_everything_is_the_exact_sweep(grain):
    hooked, prompts = model("llama"), pairs()
    found = screen(hooked, **prompts, grain=grain, metric=METRIC, top_k=1000)
    exact = sweep(hooked, **prompts, grain=grain, metric=METRIC)
    assert found.attribution.axes == exact.axes
    whole = torch.zeros_like(exact.values)
    whole[(slice(None), *found.cells.unbind(1))] = found.effect
    torch.testing.assert_close(whole, exact.effect, rtol=1e-3, atol=1e-4)
    correlation = np.corrcoef(
        *(x.mean(0)[tuple(found.cells.T)] for x in (found.attribution.effect, whole))
    )
    assert found.trust.pearson == pytest.approx(correlation[0, 1], abs=1e-4)
    assert np.isnan(found.trust.miss_rate)  # nothing was left to sample


def test_results_look_like_those_of_a_sweep():
    found = attribute(
        model("llama"), **pairs(), grain="mlp_out", metric=METRIC, direction="noising"
    )
    torch.testing.assert_close(found.values[:, 2, 3] - found.clean_metric, found.effect[:, 2, 3])
    torch.testing.assert_close(found.normalized[:, 2, 3], found.effect[:, 2, 3] / found.gap)
    expected = found.effect.std(0) / N_ITEMS**0.5
    torch.testing.assert_close(found.stderr, expected)
    assert found.labels("position").tolist() == list(range(N_POSITIONS))


def test_screening_keeps_to_cells_that_can_have_an_effect():
    found = screen(
        model("llama"), **pairs(), grain="resid_pre", metric=METRIC, top_k=3, n_sampled=100
    )
    # Layer 0: three changed tokens; layers 1 and 2: positions from the first changed one on.
    assert found.trust.n_cells == 3 + 2 * 5
    assert found.trust.n_selected + found.trust.n_sampled == 13
    largest = found.attribution.mean.abs().flatten().topk(3).values
    torch.testing.assert_close(found.estimated.mean(0)[:3].abs(), largest)
    again = screen(
        model("llama"), **pairs(), grain="resid_pre", metric=METRIC, top_k=3, n_sampled=5, seed=1
    )
    assert again.trust.n_sampled == 5


def test_trust_is_what_scipy_says():
    rng = np.random.default_rng(0)
    exact = torch.tensor(rng.normal(size=12))
    estimated = exact + torch.tensor(rng.normal(size=12))
    selected = torch.arange(12) < 4
    exact[:4] = torch.tensor([3.0, -2.5, 2.0, 0.6])
    exact[4:] = torch.tensor([0.1, -0.7, 0.2, 0.5, 0.0, -0.3, 0.65, 0.1])
    trust = measure_trust(estimated, exact, selected, n_cells=50)
    assert trust.spearman == pytest.approx(stats.spearmanr(estimated, exact).statistic)
    assert trust.kendall == pytest.approx(stats.kendalltau(estimated, exact).statistic)
    assert trust.pearson == pytest.approx(np.corrcoef(estimated, exact)[0, 1])
    assert (trust.n_missed, trust.n_sampled, trust.miss_rate) == (2, 8, 0.25)
    assert trust.miss_low == pytest.approx(stats.beta.ppf(0.025, 2, 7))
    assert trust.miss_high == pytest.approx(stats.beta.ppf(0.975, 3, 6))
    assert "missed 2 of 8" in str(trust)
    none = measure_trust(estimated[:9], exact[:9], selected[:9] | True, n_cells=9)
    assert np.isnan(none.miss_rate)
    exact[4:] = 0
    perfect = measure_trust(estimated, exact, selected, n_cells=50)
    assert perfect.miss_high == pytest.approx(1 - 0.025 ** (1 / 8))  # closed form for 0 of 8


def test_screening_other_options():
    drop = screen(
        model("llama"), **pairs(), grain="head", metric=log_prob(torch.tensor([1, 2, 3])),
        top_k=3, grad_drop=True, direction="noising",
    )  # fmt: skip
    assert drop.attribution.method == "AtP + GradDrop"
    with pytest.raises(AnalysisError, match="top_k: expected at least 1, got 0"):
        screen(model("llama"), **pairs(), grain="head", metric=METRIC, top_k=0)
    same = {"clean": pairs()["clean"], "corrupt": pairs()["clean"]}
    empty = screen(model("llama"), **same, grain="head", metric=METRIC)
    assert empty.effect.shape == (N_ITEMS, 0)
    assert empty.trust.n_cells == 0


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("grain", ["resid_pre", "v", "pattern"])
def test_every_map_says_how_far_it_agrees_with_exact_patches(grain, direction):
    """Against a whole exact sweep: of all cells, and of the few that a generator draws."""
    options = {**pairs(), "grain": grain, "metric": METRIC, "direction": direction}
    found = attribute(model("llama"), **options, n_exact=1000)
    exact = sweep(model("llama"), **options).mean
    possible = found.changed.any(0)
    x, y = found.mean[possible], exact[possible]
    assert found.trust.n_exact == found.trust.n_cells == len(x)
    assert found.trust.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-4)
    assert found.trust.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-4)
    assert np.isnan([found.trust.miss_rate, found.trust.miss_low]).all()  # nothing was selected
    draw = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1, 2, 3)]
    few = [attribute(model("llama"), **options, n_exact=4, generator=g).trust for g in draw]
    assert few[0].n_exact == 4
    assert few[0].pearson == few[1].pearson
    assert len({trust.pearson for trust in few}) > 1  # of six cells two seeds may draw the same


def test_maps_tables_and_plots_carry_the_trust():
    options = {**pairs(), "grain": "k", "metric": METRIC}
    found = attribute(model("llama"), **options, by_position=True, n_exact=0)
    assert found.trust is None
    assert "not compared with exact patches" in repr(found)
    table = found.to_table()
    assert list(table.columns[3:6]) == ["layer", "kv_head", "position"]
    assert len(table) == N_LAYERS * N_KV_HEADS * N_POSITIONS
    row = table.query("layer == 1 and kv_head == 0 and position == 5").iloc[0]
    assert row["effect"] == pytest.approx(float(found.effect[:, 1, 0, 5].mean()))
    assert np.isnan(row["spearman"])
    assert row["n_exact"] == 0
    found = attribute(model("llama"), **options)
    assert found.to_table()["pearson"].iloc[0] == found.trust.pearson
    says = f"Pearson {found.trust.pearson:.2f}, Spearman {found.trust.spearman:.2f}"
    assert says in repr(found)
    assert says in found.plot().get_title()
    plt.close("all")
    screened = screen(model("llama"), **options, top_k=2)
    assert screened.attribution.to_table()["spearman"].iloc[0] == screened.trust.spearman


def test_intervening_by_hand_is_the_same_patch():
    """One cell of `patch_cells` by a run of HookedModel."""
    hooked, prompts = model("gemma3"), pairs()
    given = hooked.capture(prompts["clean"], "v.1")["v.1"]
    runs = [
        hooked.run_with_interventions(prompts["corrupt"], patches, positions=-1)
        for patches in ([], [Intervention("v.1.1", given[:, 2, 1], positions=2)])
    ]
    items = torch.arange(N_ITEMS)
    base, patched = (METRIC(logits[:, METRIC.token_ids], items) for logits in runs)
    cells = torch.tensor([[1, 1, 2], [0, 0, 0]])
    effect = patch_cells(hooked, **prompts, grain="v", cells=cells, metric=METRIC)
    torch.testing.assert_close(effect[:, 0], patched - base, rtol=1e-4, atol=1e-5)
