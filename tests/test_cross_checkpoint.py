"""Patches across checkpoints: the loop, networks that differ in known places, the controls."""

from __future__ import annotations

import copy
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import N_HEADS, N_LAYERS, random_tokens, tiny_model

from analyses.cross_checkpoint import measure_cross_checkpoint
from mechinterp import tasks
from mechinterp.checkpoints import save_checkpoint, with_action_shift
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel, load
from mechinterp.patching.cross_checkpoint import _Directions, patch_across, patch_both_ways
from mechinterp.patching.metrics import Shifted, action_log_odds
from mechinterp.patching.naive import naive_sweep
from mechinterp.patching.plan import make_plan
from mechinterp.spec import AnalysisSpec

N_ITEMS, N_POSITIONS = 6, 5
TOKENS = random_tokens(N_ITEMS, N_POSITIONS, seed=2)
METRIC = action_log_odds((3, 11), torch.tensor([0, 1, 1, 0, 1, 0]))
ROLES = np.array([["a", "b", "a", "b", "decision"], ["b", "a", "b", "a", "decision"]] * 3)
ROLES[-1] = ["a", "a", "b", "b", "decision"]  # another order of items shows


@cache
def model(seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model("llama", seed=seed))


def changed(layer: int) -> HookedModel:
    """`model(0)` with another MLP in one layer."""
    raw = copy.deepcopy(model().model)
    for parameter in raw.model.layers[layer].mlp.parameters():
        parameter.data.add_(
            0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(layer))
        )
    return HookedModel(raw)


@pytest.mark.parametrize("grain", ["resid_pre", "resid_mid", "attn_out", "mlp_out", "head"])
def test_patches_equal_the_loop(grain):
    crossed = patch_across(model(1), model(0), TOKENS, grain=grain, metric=METRIC)
    slow = naive_sweep(
        model(0), corrupt=TOKENS, clean=TOKENS, grain=grain, metric=METRIC, source=model(1)
    )
    assert crossed.patched.method == "suffix"
    for name in ("values", "corrupt_metric", "clean_metric"):
        torch.testing.assert_close(
            getattr(crossed.patched, name), getattr(slow, name), rtol=0, atol=1e-5
        )


def test_a_change_in_one_layer_is_found_there():
    after = changed(1)
    table = patch_both_ways(model(), after, TOKENS, grain="resid_post", metric=METRIC)
    patch = table[~table["control"]].set_index(["direction", "layer", "unit"])
    for direction in ("after_into_before", "before_into_after"):
        # Before the changed layer the networks agree: nothing to patch, and no control either.
        early = table[(table["direction"] == direction) & (table["layer"] == 0)]
        assert (early["raw_effect"] == 0).all()
        assert patch.loc[(direction, 2, "position 4"), "effect"] == pytest.approx(1, abs=1e-3)
        assert patch.loc[(direction, 2, "position 4"), "low"] == pytest.approx(1, abs=1e-2)
        assert patch.loc[(direction, 2, "position 3"), "effect"] == 0
    mlp = patch_across(after, model(), TOKENS, grain="mlp_out", metric=METRIC).patched
    assert bool((mlp.effect[:, 0] == 0).all())
    assert float(mlp.effect[:, 1].abs().max()) > 0.1


def test_a_recorded_shift_is_a_gap_that_no_patch_closes(tmp_path):
    """Equal weights, of which one says +1 nat: known gaps, no effects, and NaN nowhere."""
    task, spec = tasks.get("triage"), AnalysisSpec(patch_pairs=4)
    plain = save_checkpoint(model().model, tmp_path / "plain")
    before = load(plain)
    after = load(with_action_shift(plain, tmp_path / "shifted", [0.0, 1.0]))
    table = measure_cross_checkpoint(before, after, task, spec=spec)
    assert (table["effect"] == 0).all()
    tokens = task.sample(4).tokens
    metric = action_log_odds(task.actions, torch.ones(4, dtype=torch.long))
    shifted = Shifted(metric, torch.tensor([0.0, 1.0]))
    for source_metric, gap in ((shifted, 1.0), (None, 0.0)):
        options = {"grain": "mlp_out", "metric": metric, "source_metric": source_metric}
        crossed = patch_across(before, before, tokens, **options)
        assert crossed.patched.gap == pytest.approx(gap, abs=1e-6)


def test_the_gap_between_shifted_networks_is_that_of_their_decisions():
    shifts = [torch.tensor([-1.0, 1.0]), torch.tensor([0.5, -0.5])]
    scores = [Shifted(METRIC, shift) for shift in shifts]
    crossed, plain = (
        patch_across(model(1), model(0), TOKENS, grain="mlp_out", metric=m, source_metric=s)
        for m, s in (scores, (METRIC, METRIC))
    )
    towards = torch.where(METRIC.labels == 1, 1.0, -1.0)
    # The source moves by -1 nat towards action 1, the target by +2.
    torch.testing.assert_close(crossed.patched.gap, plain.patched.gap - 3 * towards)
    torch.testing.assert_close(crossed.patched.effect, plain.patched.effect, atol=1e-5, rtol=1e-4)


def test_directions_are_named_after_the_giver_and_the_taker():
    both = patch_both_ways(model(0), model(1), TOKENS, grain="mlp_out", metric=METRIC)
    for direction, (source, target) in {
        "after_into_before": (model(1), model(0)),
        "before_into_after": (model(0), model(1)),
    }.items():
        one = patch_across(source, target, TOKENS, grain="mlp_out", metric=METRIC).to_table()
        rows = both[both["direction"] == direction].drop(columns="direction")
        pd.testing.assert_frame_equal(rows.reset_index(drop=True), one)


def test_equal_networks_have_no_gap():
    table = patch_across(model(), model(), TOKENS, grain="resid_pre", metric=METRIC).to_table()
    assert table["effect"].isna().all()
    assert (table["raw_effect"] == 0).all()
    assert (table["n_items"] == N_ITEMS).all()


def test_table_by_role_by_hand():
    crossed = patch_across(
        model(1), model(0), TOKENS, grain="attn_out", metric=METRIC, roles=ROLES, n_controls=2
    )
    table = crossed.to_table()
    assert len(table) == N_LAYERS * 3 * (1 + 2)
    assert sorted(table["unit"].unique()) == ["a", "b", "decision"]
    assert table.groupby(["control", "draw"]).size().to_dict() == {
        (False, 0): 9,
        (True, 0): 9,
        (True, 1): 9,
    }
    effect = crossed.patched.effect[:, 1].numpy()  # [items, positions]
    gap = crossed.patched.gap.numpy()
    of_role = np.array([effect[i, ROLES[i] == "a"].mean() for i in range(N_ITEMS)])
    row = table[(table["unit"] == "a") & (table["layer"] == 1) & ~table["control"]].iloc[0]
    expected = (of_role * np.sign(gap)).sum() / np.abs(gap).sum()
    assert row["effect"] == pytest.approx(expected, abs=1e-5)
    assert row["raw_effect"] == pytest.approx(of_role.mean(), abs=1e-5)
    assert row["low"] < row["effect"] < row["high"]
    assert row["n_items"] == N_ITEMS


def test_heads_have_no_roles_but_names():
    crossed = patch_across(model(1), model(0), TOKENS, grain="head", metric=METRIC, roles=ROLES)
    assert crossed.to_table()["unit"].tolist()[:N_HEADS] == [f"head {h}" for h in range(N_HEADS)]


@pytest.mark.parametrize("grain", ["mlp_out", "head"])
@pytest.mark.parametrize("roles", [None, ROLES])
def test_controls_step_as_far_in_shared_directions(grain, roles):
    plan = make_plan(
        model(),
        TOKENS,
        grain=grain,
        metric=METRIC,
    )
    own, _ = plan.capture(model(0), TOKENS)
    given, _ = plan.capture(model(1), TOKENS)
    directions = _Directions.draw(model(), plan, TOKENS, roles, 0, 0)
    moved = directions.step(slice(0, N_ITEMS), own, given)
    for start, end, new in zip(own, given, moved, strict=True):
        length = (end - start).norm(dim=-1)
        torch.testing.assert_close((new - start).norm(dim=-1), length, rtol=1e-4, atol=1e-5)
        unit = (new - start) / length[..., None]  # [items positions (heads) width]
        if grain == "head":
            torch.testing.assert_close(unit, unit[:1, :1].expand_as(unit), rtol=0, atol=1e-4)
            assert float((unit[0, 0, 0] - unit[0, 0, 1]).norm()) > 0.1
        elif roles is None:
            torch.testing.assert_close(unit, unit[:1].expand_as(unit), rtol=0, atol=1e-4)
            assert float((unit[0, 0] - unit[0, 1]).norm()) > 0.1
        else:
            for role in ("a", "b", "decision"):
                same = unit[torch.as_tensor(roles == role)]
                torch.testing.assert_close(same, same[:1].expand_as(same), rtol=0, atol=1e-4)


def test_draws_have_named_streams():
    def controls(n: int, seed: int = 0) -> list[torch.Tensor]:
        crossed = patch_across(
            model(1),
            model(0),
            TOKENS,
            grain="resid_pre",
            metric=METRIC,
            n_controls=n,
            seed=seed,
        )
        return [control.values for control in crossed.controls]

    one, two, other = controls(1), controls(2), controls(1, seed=1)
    assert controls(0) == []
    torch.testing.assert_close(one[0], two[0], rtol=0, atol=0)
    assert not torch.allclose(two[0], two[1], atol=1e-2)
    assert not torch.allclose(one[0], other[0], atol=1e-2)


def test_refused_shapes():
    other = HookedModel(tiny_model("qwen3_wide_heads"))
    with pytest.raises(AnalysisError, match="source"):
        patch_across(other, model(), TOKENS, grain="head", metric=METRIC)
    with pytest.raises(AnalysisError, match="roles"):
        patch_across(
            model(1), model(), TOKENS, grain="resid_pre", metric=METRIC, roles=ROLES[:, :4]
        )
