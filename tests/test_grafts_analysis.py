"""Grafts of a pair with a known difference: one head, and nothing else."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from analyses.grafts import measure_grafts
from analyses.streams import task_costs
from mechinterp import tasks
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.components import components_of, grafted, merge_components
from mechinterp.spec import AnalysisSpec
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

TASK = tasks.get("triage", linear=(1.5,), xor=(2.0,), n_fillers=1)
SHAPE = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
SPEC = AnalysisSpec(graft_items=80)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def before():
    return HookedModel.from_model(initial_model(SHAPE, TASK, seed=0))


def with_another_head(model: HookedModel) -> HookedModel:
    """Head 1 of layer 1 moves the decision: its output projection writes something else."""
    raw = copy.deepcopy(model.model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        weight = raw.model.layers[1].self_attn.o_proj.weight
        weight[:, 8:] = torch.randn(16, 8, generator=generator)
    return HookedModel.from_model(raw)


@pytest.mark.parametrize(
    ("parts", "part"),
    [("component", "head.1.1"), ("sublayer", "attention.1"), ("block", "block.1")],
)
def test_the_part_that_differs_carries_all_of_the_change(before, parts, part):
    spec = SPEC.model_copy(update={"graft_parts": parts})
    after = with_another_head(before)
    table = measure_grafts(before, after, TASK, costs=task_costs(TASK), spec=spec)
    assert set(table.loc[table["differs"], "component"]) == {part, "whole"}
    own = table[table["component"] == part]
    np.testing.assert_allclose(own["change"], own["total"], atol=1e-7)
    np.testing.assert_allclose(own["total"], own["u_donor"] - own["u_target"], atol=1e-7)
    assert (table.loc[table["currency"] == "log_score", "total"].abs() > 1e-3).all()
    rest = table[~table["differs"]]
    assert (rest[["change", "low", "high"]] == 0).all(axis=None)
    assert (rest["q"] == 1).all()
    whole = table[table["component"] == "whole"].set_index(["direction", "currency"])
    for currency in ("utility", "log_score"):
        there = whole.loc[("after_into_before", currency)]
        back = whole.loc[("before_into_after", currency)]
        assert there["change"] == pytest.approx(-back["change"])
        assert there["low"] < there["change"] < there["high"] or there["change"] == 0
    n = sum(p.numel() for p in before.model.parameters())
    assert (whole["n_weights"] == n).all()


def test_merged_parts_are_their_components_together(before):
    after = HookedModel.from_model(initial_model(SHAPE, TASK, seed=1))
    tokens = TASK.sample(5).tokens
    components = components_of(before)
    for by, kind in (("block", "block"), ("sublayer", "attention")):
        (merged,) = [c for c in merge_components(components, by) if (c.kind, c.layer) == (kind, 1)]
        inside = [c for c in components if c.layer == 1 and (by == "block" or "mlp" not in c.kind)]
        with grafted(before, after, inside):
            expected = before.forward(tokens)
        with grafted(before, after, merged):
            torch.testing.assert_close(before.forward(tokens), expected, rtol=0, atol=0)
    assert merge_components(components, "component") == components
    with pytest.raises(AnalysisError, match="by"):
        merge_components(components, "layer")
