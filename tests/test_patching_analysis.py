"""The recovery maps' table against its definitions, written out per cell."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from analyses.pair import Pair
from analyses.patching import RecoveryMap, measure_recovery, pair_tables, recovery_maps
from analyses.streams import task_costs
from mechinterp import tasks
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.result import by_role
from mechinterp.patching.sweeps import sweep
from mechinterp.spec import AnalysisSpec
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

TASK = tasks.get("triage", linear=(1.5,), xor=(2.0,), n_fillers=1)
SPEC = AnalysisSpec(patch_pairs=24, patch_grains=("resid_pre", "head"))  # type: ignore[call-arg]
SHAPE = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
CELL = ["grain", "layer", "unit", "latent"]


@pytest.fixture(scope="module")
def models():
    return {
        arm: HookedModel.from_model(initial_model(SHAPE, TASK, seed=seed))
        for seed, arm in enumerate(("before", "after"))
    }


def test_recovery_and_its_error_are_those_of_the_sweep(models):
    table = measure_recovery(models["after"], TASK, spec=SPEC)
    pairs = TASK.counterfactual_pairs(24, seed=SPEC.seed)
    metric = action_log_odds(TASK.actions, pairs.clean.likeliest_label)
    prompts = {"clean": pairs.clean.tokens, "corrupt": pairs.corrupt.tokens}
    for latent in np.unique(pairs.latent):
        rows = np.flatnonzero(pairs.latent == latent)
        result = sweep(models["after"], grain="resid_pre", metric=metric, **prompts).select(rows)
        expected = by_role(result, pairs.roles[rows]).set_index(["layer", "role"])
        own = table[(table["grain"] == "resid_pre") & (table["latent"] == latent)]
        own = own.set_index(["layer", "unit"])
        assert len(own) == len(expected)
        for column in ("recovery", "stderr"):
            ours, theirs = own[column], expected[f"pooled_{column}"].reindex(own.index)
            np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_q_controls_each_grains_map_and_p_is_a_sign_flip(models):
    table = measure_recovery(models["after"], TASK, spec=SPEC)
    maps = recovery_maps(models["after"], TASK, spec=SPEC)
    for (grain, latent), cells in table.groupby(["grain", "latent"]):
        tested = cells["p"] < 1
        q = stats.false_discovery_control(cells.loc[tested, "p"])
        np.testing.assert_allclose(cells.loc[tested, "q"], q)
        assert (cells["low"] <= cells["recovery"] + 1e-9).all()
        assert (cells["recovery"] <= cells["high"] + 1e-9).all()
        x = maps[grain, latent].contributions[:, -1, -1]
        if len(x) <= 12 and len(set(maps[grain, latent].groups.tolist())) == len(x):
            exact = stats.permutation_test(
                (x.numpy(),), np.mean, permutation_type="samples", n_resamples=np.inf
            )
            assert cells["p"].to_numpy()[-1] == pytest.approx(exact.pvalue, abs=1e-6)


def test_the_change_is_taken_pair_by_pair(models):
    costs = task_costs(TASK)
    table = pair_tables(Pair(models, TASK, SPEC, costs))["patching"]
    wide = table.pivot(index=CELL, columns="checkpoint", values="recovery")
    np.testing.assert_allclose(wide["change"], wide["after"] - wide["before"], atol=1e-9)
    same = {"before": models["before"], "after": models["before"]}
    change = pair_tables(Pair(same, TASK, SPEC, costs))["patching"].query("checkpoint == 'change'")
    assert (change[["recovery", "low", "high"]] == 0).all(axis=None)
    assert (change[["p", "q"]] == 1).all(axis=None)


def test_a_planted_change_is_found_and_the_rest_is_not():
    """Two maps with the same large spread between pairs, which only a paired test sees through."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.randn(64, 1, 10, generator=generator, dtype=torch.float64)
    shift = torch.zeros(10, dtype=torch.float64)
    shift[3] = 0.2
    before, after = (
        RecoveryMap(
            grain="head",
            latent="all",
            method="suffix",
            layers=np.arange(1),
            units=np.array([f"head {i}" for i in range(10)]),
            groups=torch.arange(64),
            contributions=spread
            + step * shift
            + 0.1 * torch.randn(64, 1, 10, generator=generator, dtype=torch.float64),
        )
        for step in (0, 1)
    )
    table = before.change_to(after).to_table()
    assert table.index[table["q"] < 0.05].tolist() == [3]
    assert table.loc[3, "low"] > 0.1
    unpaired = stats.ttest_ind(after.contributions[:, 0, 3], before.contributions[:, 0, 3])
    assert unpaired.pvalue > 0.05
