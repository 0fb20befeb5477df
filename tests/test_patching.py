"""Metrics, results and tables of patching, and what a sweep refuses, skips and falls back to."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from tiny_models import CONFIGS, D_VOCAB, N_HEADS, N_LAYERS, random_tokens, tiny_model

from mechinterp.errors import AnalysisError, ModelError, SiteError
from mechinterp.hooked import HookedModel
from mechinterp.patching.inference import infer_map
from mechinterp.patching.maps import MIN_GAP
from mechinterp.patching.metrics import action_log_odds, log_prob, logit_difference
from mechinterp.patching.naive import naive_sweep, patch_by_loop
from mechinterp.patching.plan import GRAINS, make_plan
from mechinterp.patching.result import PatchingResult, by_role, pooled_recovery
from mechinterp.patching.sweeps import patch_by_suffix, record_for, sweep

N_ITEMS, N_POSITIONS = 4, 6
CHANGED = torch.tensor([1, 2, 2, 4])  # where each item's prompts differ
METRIC = logit_difference(correct=torch.tensor([1, 2, 3, 4]), wrong=torch.tensor([5, 6, 7, 8]))


@cache
def model(family: str = "llama", seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model(family, seed=seed))


@cache
def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=1)
    corrupt = clean.clone()
    rows = torch.arange(N_ITEMS)
    corrupt[rows, CHANGED] = (corrupt[rows, CHANGED] + 3) % D_VOCAB
    return corrupt, clean


def run(grain: str = "resid_pre", **options) -> PatchingResult:
    corrupt, clean = pairs()
    defaults = {"corrupt": corrupt, "clean": clean, "grain": grain, "metric": METRIC}
    return sweep(model(options.pop("family", "llama")), **{**defaults, **options})


# ---- metrics -------------------------------------------------------------------------------------


def test_metrics_follow_the_item_of_each_row():
    logits = torch.randn(5, 10, generator=torch.Generator().manual_seed(0))
    items = torch.tensor([2, 0, 2, 1, 0])
    right, wrong = torch.tensor([9, 3, 3]), torch.tensor([0, 9, 4])
    expected = torch.stack(
        [logits[r, right[i]] - logits[r, wrong[i]] for r, i in enumerate(items.tolist())]
    )
    metric = logit_difference(correct=right, wrong=wrong)
    assert metric.token_ids.tolist() == [0, 3, 4, 9]
    torch.testing.assert_close(metric(logits[:, metric.token_ids], items), expected)
    expected = torch.stack(
        [logits[r].log_softmax(0)[right[i]] for r, i in enumerate(items.tolist())]
    )
    metric = log_prob(right)
    assert metric.token_ids is None
    torch.testing.assert_close(metric(logits, items), expected)


def test_action_log_odds_are_the_log_odds_of_the_label():
    logits = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    labels, items = torch.tensor([2, 0]), torch.tensor([0, 1, 1, 0])
    p = logits.double().softmax(1)[torch.arange(4), labels[items]]
    metric = action_log_odds((7, 5, 6), labels)
    assert metric.token_ids.tolist() == [7, 5, 6]
    torch.testing.assert_close(metric(logits, items).double(), p.logit(), rtol=1e-5, atol=1e-5)
    two = action_log_odds((7, 5), torch.tensor([1]))(logits[:, :2], torch.zeros(4, dtype=int))
    torch.testing.assert_close(two, logits[:, 1] - logits[:, 0])


@pytest.mark.parametrize(
    "make",
    [
        lambda: logit_difference(correct=torch.tensor([1, 2]), wrong=torch.tensor([1])),
        lambda: action_log_odds((4, 4), torch.tensor([0])),
        lambda: action_log_odds((4,), torch.tensor([0])),
        lambda: action_log_odds((4, 5), torch.tensor([0, 2])),
    ],
)
def test_metrics_refuse_what_does_not_fit(make):
    with pytest.raises(AnalysisError):
        make()


def test_a_metric_over_the_whole_vocabulary_sweeps():
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": "mlp_out"}
    metric = log_prob(torch.tensor([1, 2, 3, 4]))
    fast = sweep(model("gemma2"), metric=metric, **options)
    slow = naive_sweep(model("gemma2"), metric=metric, **options)
    torch.testing.assert_close(fast.values, slow.values, rtol=0, atol=1e-5)


# ---- identities ----------------------------------------------------------------------------------


@pytest.mark.parametrize("grain", GRAINS)
def test_patching_a_run_with_itself_changes_nothing(grain):
    corrupt, _ = pairs()
    plan = make_plan(
        model(),
        corrupt,
        grain=grain,
        metric=METRIC,
    )
    own, base = plan.capture(model(), corrupt)
    recorded = record_for(model(), corrupt, [plan])
    values, _ = patch_by_suffix(recorded, own, plan, budget=2**27, skip_equal=False)
    expected = base[:, None, None].expand_as(values)
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)
    values, unpatched = patch_by_suffix(recorded, own, plan, budget=2**27)
    assert bool((values == unpatched[:, None, None]).all())


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "olmo2"])
def test_a_patch_of_all_that_differs_recovers_all(family, direction):
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "metric": METRIC, "direction": direction}
    pre = sweep(model(family), grain="resid_pre", **options)
    at_change = pre.normalized[torch.arange(N_ITEMS), 0, CHANGED]
    post = sweep(model(family), grain="resid_post", **options)
    for recovery in (at_change, post.normalized[:, -1, -1]):
        torch.testing.assert_close(recovery, torch.ones(N_ITEMS), rtol=0, atol=1e-4)
    before = torch.arange(N_POSITIONS) < CHANGED[:, None]
    assert bool(
        (pre.normalized.transpose(1, 2)[before] == 0).all()
    )  # exactly: these cells are not run
    assert bool((pre.normalized[:, 0] != 0).sum(1).eq(1).all())


def test_only_what_a_patch_can_reach_is_run(monkeypatch):
    """Each MLP runs the base and the source once, then suffixes of what is patched before it, and
    the last one then only the decision position."""
    corrupt, clean = pairs()
    seen = [0] * N_LAYERS
    fresh = HookedModel(tiny_model("llama"), self_test=False)
    monkeypatch.setattr("mechinterp.patching.sweeps.find_obstacle", lambda *_: None)
    for layer, block in enumerate(fresh.architecture.blocks):

        def count(module, args, layer=layer):
            seen[layer] += args[0].shape[0] * args[0].shape[1]

        block.mlp.register_forward_pre_hook(count)
    sweep(fresh, corrupt=corrupt, clean=clean, grain="resid_pre", metric=METRIC)
    per_item = [N_POSITIONS - int(p) for p in CHANGED]
    whole = 2 * N_ITEMS * N_POSITIONS
    # Layer 0 differs at the changed position alone; later layers also at all that follow it.
    first = sum(per_item)
    later = sum(n * (n + 1) // 2 for n in per_item)
    rows = N_ITEMS + 2 * sum(per_item)
    assert seen == [whole + first, whole + first + later, whole + rows]


def test_after_the_last_block_only_the_decision_is_scored():
    corrupt, clean = pairs()
    fresh = HookedModel(tiny_model("llama"), self_test=False)
    seen = []
    fresh.architecture.final_norm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    sweep(fresh, corrupt=corrupt, clean=clean, grain="resid_post", metric=METRIC)
    changed = sum(N_POSITIONS - int(p) for p in CHANGED)
    scored = sum(len(x) for x in seen if x.ndim == 2)  # the model's own calls have positions too
    assert scored == 2 * N_ITEMS + (N_LAYERS - 1) * changed + N_ITEMS


def test_small_memory_changes_nothing():
    whole, pieces = run("head"), run("head", memory_mb=0)
    torch.testing.assert_close(whole.values, pieces.values, rtol=0, atol=1e-5)
    assert whole.clean_metric.shape == pieces.clean_metric.shape == (N_ITEMS,)


def test_positions_may_differ_between_items():
    everywhere = run("attn_out")
    columns = torch.stack([CHANGED, torch.full((N_ITEMS,), -1)], dim=1)
    aligned = run("attn_out", positions=columns)
    assert aligned.values.shape == (N_ITEMS, N_LAYERS, 2)
    items = torch.arange(N_ITEMS)
    torch.testing.assert_close(
        aligned.values[..., 0], everywhere.values[items, :, CHANGED], rtol=0, atol=1e-5
    )
    torch.testing.assert_close(
        aligned.values[..., 1], everywhere.values[..., -1], rtol=0, atol=1e-5
    )
    assert list(aligned.to_table()["column"].unique()) == [0, 1]
    some = run("attn_out", positions=[4, 5])
    torch.testing.assert_close(some.values, everywhere.values[..., 4:], rtol=0, atol=1e-5)
    assert list(some.to_table()["position"].unique()) == [4, 5]


def looks_ahead_by_config() -> HookedModel:
    config = CONFIGS["llama"]()
    config.is_causal = False
    raw = type(tiny_model("llama"))._from_config(config, attn_implementation="eager")
    return HookedModel(raw.eval())


def looks_ahead_by_mask() -> HookedModel:
    raw = tiny_model("llama")

    def unmask(module, args, kwargs):
        return args, {**kwargs, "attention_mask": torch.zeros_like(kwargs["attention_mask"])}

    for layer in raw.model.layers:
        layer.self_attn.register_forward_pre_hook(unmask, with_kwargs=True)
    return HookedModel(raw)


@pytest.mark.parametrize("make", [looks_ahead_by_config, looks_ahead_by_mask])
def test_a_network_that_looks_ahead_gets_the_loop(make):
    both_ways = make()
    corrupt, clean = pairs()
    options = {"corrupt": corrupt, "clean": clean, "grain": "resid_pre", "metric": METRIC}
    result = sweep(both_ways, **options)
    assert result.method == "loop: attention is not causal"
    torch.testing.assert_close(result.values, naive_sweep(both_ways, **options).values)
    assert bool((result.effect[:, 1, 0].abs() > 0).all())  # position 0 sees the changed token


def test_a_patch_that_did_not_fire_raises():
    corrupt, _ = pairs()
    broken = HookedModel(tiny_model("llama"))
    blocks = list(broken.architecture.blocks)
    blocks[1] = replace(blocks[1], mlp=torch.nn.Identity())  # the forward never calls it
    broken.architecture.blocks = tuple(blocks)
    plan = make_plan(
        broken,
        corrupt,
        grain="mlp_out",
        metric=METRIC,
        positions=[2],
    )
    new = [torch.zeros(N_ITEMS, N_POSITIONS, broken.d_model)] * N_LAYERS
    with pytest.raises(ModelError, match=r"mlp_out\.1 fired 0 times"):
        patch_by_loop(broken, corrupt, new, plan)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"grain": "resid"}, "grain"),
        ({"direction": "both"}, "direction"),
        ({"clean": torch.zeros(2, 3, dtype=torch.long)}, "corrupt and clean"),
        ({"positions": [6]}, "positions"),
        ({"positions": []}, "positions"),
        ({"positions": torch.zeros(3, 2, dtype=torch.long)}, "positions"),
        ({"by_position": False}, "by_position"),
        ({"grain": "head", "positions": [1], "by_position": False}, "by_position"),
        ({"neurons": [1]}, "neurons"),
        ({"grain": "neuron", "neurons": [1, 1]}, "neurons"),
        ({"grain": "neuron", "neurons": [999]}, "neurons"),
        ({"grain": "head", "directions": torch.ones(1, 32)}, "directions"),
        ({"directions": torch.ones(1, 31)}, "directions"),
        ({"directions": torch.zeros(1, 32)}, "directions"),
        ({"decision": 6}, "decision"),
        ({"decision": torch.tensor([1, 2])}, "decision"),
        ({"attention_mask": torch.ones(4, 5)}, "attention_mask"),
    ],
)
def test_sweep_refuses_what_does_not_fit(options, words):
    with pytest.raises(AnalysisError, match=words):
        run(**options)


def test_parallel_blocks_have_no_resid_mid():
    with pytest.raises(SiteError, match="parallel"):
        run("resid_mid", family="gpt_neox")


def test_source_must_have_the_same_shape():
    with pytest.raises(AnalysisError, match="source"):
        run(source=model("qwen3_wide_heads"))


# ---- results and tables --------------------------------------------------------------------------


def result_of(values, corrupt, clean, **fields) -> PatchingResult:
    values = torch.as_tensor(values, dtype=torch.float32).permute(2, 0, 1)
    defaults = {
        "grain": "resid_pre",
        "direction": "denoising",
        "method": "suffix",
        "axes": ("item", "layer", "position"),
        "positions": torch.arange(values.shape[2]).expand(len(values), -1),
    }
    return PatchingResult(
        values=values,
        corrupt_metric=torch.as_tensor(corrupt, dtype=torch.float32),
        clean_metric=torch.as_tensor(clean, dtype=torch.float32),
        **{**defaults, **fields},
    )


def test_recovery_by_hand():
    # One layer, one position; the third item has no gap.
    result = result_of([[[1.0, 4.0, 9.0]]], corrupt=[0, 2, 5], clean=[4, 0, 5 + MIN_GAP / 2])
    assert result.effect.flatten().tolist() == [1, 2, 4]
    recovery = result.normalized.flatten()
    assert recovery[:2].tolist() == [0.25, -1.0]
    assert bool(recovery[2].isnan())
    row = result.to_table().iloc[0]
    assert (row["layer"], row["position"], row["n_items"]) == (0, 0, 2)
    assert row["recovery"] == pytest.approx(np.mean([0.25, -1.0]))
    assert row["stderr"] == pytest.approx(stats.sem([0.25, -1.0]))
    assert row["effect"] == pytest.approx(7 / 3)
    # Noising counts from the clean run: all the way to the corrupt value is 1.
    noising = result_of([[[0.0, 1.0]]], corrupt=[0, 2], clean=[4, 0], direction="noising")
    assert noising.normalized.flatten().tolist() == [1.0, 0.5]


@pytest.mark.parametrize("index", [slice(1, 3), np.array([False, True, True, False])])
def test_selected_items_are_a_result_of_their_own(index):
    corrupt, clean = pairs()
    selected = run("mlp_out").select(index)
    metric = logit_difference(correct=torch.tensor([2, 3]), wrong=torch.tensor([6, 7]))
    alone = run("mlp_out", corrupt=corrupt[1:3], clean=clean[1:3], metric=metric)
    torch.testing.assert_close(selected.normalized, alone.normalized, rtol=1e-3, atol=1e-4)
    assert len(by_role(selected, np.full((2, N_POSITIONS), "a"))) == N_LAYERS
    assert run("head").select(index).to_table()["n_items"].max() <= 2


def test_head_table_names_heads():
    table = run("head").to_table()
    assert table.columns[:4].tolist() == ["grain", "direction", "layer", "head"]
    assert len(table) == N_LAYERS * N_HEADS
    assert table["head"].tolist()[: N_HEADS + 1] == [0, 1, 2, 3, 0]


def test_roles_average_within_items_first():
    roles = np.array([["filler", "x", "filler"], ["x", "filler", "end"]])
    values = torch.tensor([[[1.0, 10.0], [2.0, 20.0], [3.0, 60.0]]])  # [layer, position, item]
    result = result_of(values, corrupt=[0, 0], clean=[10, 100])
    table = by_role(result, roles).set_index("role")
    assert table.index.tolist() == ["end", "filler", "x"]
    assert table.loc["end", "recovery"] == pytest.approx(0.6)
    assert table.loc["end", "n_items"] == 1
    assert np.isnan(table.loc["end", "stderr"])
    assert table.loc["filler", "recovery"] == pytest.approx((0.2 + 0.2) / 2)
    assert table.loc["x", "recovery"] == pytest.approx((0.2 + 0.1) / 2)
    assert table.loc["x", "stderr"] == pytest.approx(stats.sem([0.2, 0.1]))
    assert table.loc["x", "pooled_recovery"] == pytest.approx(12 / 110)
    assert table.loc["x", "effect"] == pytest.approx(6)


def test_roles_at_positions_that_differ_between_items():
    roles = np.full((N_ITEMS, N_POSITIONS), "filler", dtype="U8")
    roles[np.arange(N_ITEMS), CHANGED] = "value"
    roles[:, -1] = "decision"
    everywhere = by_role(run("mlp_out"), roles).set_index(["layer", "role"])
    columns = torch.stack([CHANGED, torch.full((N_ITEMS,), -1)], dim=1)
    aligned = by_role(run("mlp_out", positions=columns), roles).set_index(["layer", "role"])
    assert aligned.index.get_level_values("role").unique().tolist() == ["decision", "value"]
    expected = everywhere.loc[aligned.index, "recovery"]
    np.testing.assert_allclose(aligned["recovery"], expected, atol=1e-4)


def test_roles_are_refused_where_they_do_not_fit():
    with pytest.raises(AnalysisError, match="not by layer and position"):
        by_role(run("head"), np.full((N_ITEMS, N_POSITIONS), "a"))
    with pytest.raises(AnalysisError, match="roles"):
        by_role(run(), np.full((N_ITEMS, N_POSITIONS - 1), "a"))


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_pooled_recovery_is_the_ratio_of_means(data):
    n = data.draw(st.integers(2, 30))
    floats = st.lists(st.floats(-10, 10), min_size=n, max_size=n)
    effect, gap = (np.array(data.draw(floats)) for _ in range(2))
    ratio, stderr = pooled_recovery(torch.tensor(effect), torch.tensor(gap))
    oriented = effect * np.sign(gap)
    if np.abs(gap).mean() < MIN_GAP:
        assert ratio.isnan()
        return
    expected = oriented.sum() / np.abs(gap).sum()
    assert float(ratio) == pytest.approx(expected, rel=1e-9, abs=1e-12)
    residual = oriented - expected * np.abs(gap)  # its mean is 0
    assert float(stderr) == pytest.approx(
        residual.std(ddof=1) / np.sqrt(n) / np.abs(gap).mean(), rel=1e-6, abs=1e-9
    )


def test_pooled_recovery_drops_absent_items():
    effect = torch.tensor([1.0, torch.nan, 3.0])
    present, _ = pooled_recovery(effect[[0, 2]], torch.tensor([2.0, 4.0]))
    with_absent, _ = pooled_recovery(effect, torch.tensor([2.0, 100.0, 4.0]))
    assert float(with_absent) == float(present) == pytest.approx(4 / 6)


def test_a_result_infers_and_plots_itself():
    import matplotlib

    matplotlib.use("Agg")
    result = run("head")
    inference = result.infer(n_resamples=50)
    expected = infer_map(result.effect, n_resamples=50)
    for name in ("mean", "low", "high", "p", "q"):
        torch.testing.assert_close(getattr(inference, name), getattr(expected, name))
    assert inference.mean.shape == (N_LAYERS, N_HEADS)
    ax = result.plot(normalized=False)
    drawn = torch.as_tensor(np.asarray(ax.images[0].get_array())).float()
    torch.testing.assert_close(drawn, result.mean, rtol=0, atol=1e-6)
    assert ax.get_xlabel() == "head"
    with pytest.raises(AnalysisError, match="axes"):
        run("head", by_position=True).plot()
