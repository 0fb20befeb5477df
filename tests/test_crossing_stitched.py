"""The stitched crossing on known answers: another basis of the residual stream is no change."""

from __future__ import annotations

import pytest

from analyses import crossing
from analyses.crossing import measure_crossing
from analyses.pair import Pair
from analyses.streams import task_costs
from mechinterp import lesions, tasks
from mechinterp.hooked import HookedModel, load
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.organism import initial_model
from mechinterp.training.supervised import train

SPEC = AnalysisSpec(crossing_items=1000, stitch_items=400)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def crossed(tmp_path_factory):
    """A network that knows a small task, crossed with itself in another basis: log scores of its
    own logits, and the span between knowing everything and nothing."""
    task = tasks.get("triage", linear=(3.0,), n_fillers=1)
    config = TrainingConfig(n_steps=120, checkpoint_steps=(120,))
    shape = ModelConfig(n_layers=2, d_model=32, n_heads=2, n_kv_heads=2, d_mlp=64)
    out = tmp_path_factory.mktemp("run")
    before = load(train(task, config=config, model=shape, out=out)[-1])
    generator = derive_generator(0, "basis")
    after = HookedModel.from_model(
        lesions.rotate_residual_basis(before.model, generator=generator)  # type: ignore[arg-type]
    )
    return measure_crossing(before, after, task, costs=task_costs(task), spec=SPEC)


def rows(table, **values):
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def test_another_basis_breaks_hybrids_joined_as_they_are(crossed):
    table = rows(crossed, stitch="identity", currency="log_score", readout="raw")
    for hybrid in ("u_ab", "u_ba"):
        assert ((table["u_aa"] - table[hybrid]) > 0.3 * table["scale"]).all()
    assert not table["shares_valid"].any()


def test_stitched_hybrids_of_another_basis_are_the_network_itself(crossed):
    for readout in ("raw", "bias", "head"):
        table = rows(crossed, stitch="ridge", currency="log_score", readout=readout)
        assert (table["u_aa"] > -0.5).all()  # it does know the task
        for column in ("u_ab", "u_ba", "u_bb"):
            assert (table["u_aa"] - table[column]).abs().max() < 0.01 * table["scale"].max()
        assert (table["interaction"].abs() < 0.02 * table["scale"]).all()
    assert (rows(crossed, stitch="ridge")["unexplained_ab"] < 0.01).all()


def test_the_identity_rows_do_not_depend_on_the_stitched_ones():
    task = tasks.get("triage", linear=(3.0,), n_fillers=1)

    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    models = [HookedModel.from_model(initial_model(shape, task, seed=seed)) for seed in (0, 1)]
    spec = SPEC.model_copy(update={"crossing_items": 120, "stitch_items": 60})
    both = measure_crossing(*models, task, costs=task_costs(task), spec=spec)
    alone = measure_crossing(
        *models,
        task,
        costs=task_costs(task),
        spec=spec.model_copy(update={"stitch_items": 0}),
    )
    assert set(both["stitch"]) == {"identity", "ridge"}
    kept = rows(both, stitch="identity").reset_index(drop=True)
    assert kept.equals(alone)


def test_items_at_the_verdicts_cut_average_to_its_rows(monkeypatch):
    task = tasks.get("triage", linear=(3.0,), n_fillers=1)
    shape = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    models = {
        arm: HookedModel.from_model(initial_model(shape, task, seed=seed))
        for seed, arm in enumerate(("before", "after"))
    }
    spec = SPEC.model_copy(update={"crossing_items": 120, "stitch_items": 60})
    monkeypatch.setattr(crossing, "find_verdict_cut", lambda *_, **__: 1)
    tables = crossing.pair_tables(Pair(models, task, spec, task_costs(task)))
    cell, hybrids = ["costs", "currency", "readout", "cut"], ["u_aa", "u_ab", "u_ba", "u_bb"]
    own = rows(tables["crossing"], stitch="identity", cut=1).set_index(cell)[hybrids]
    means = tables["crossing_items"].groupby(cell)[hybrids].mean()
    assert len(own) == 6
    assert (means.reindex(own.index) - own).abs().max().max() < 1e-12
    monkeypatch.setattr(crossing, "find_verdict_cut", lambda *_, **__: None)
    assert set(crossing.pair_tables(Pair(models, task, spec, task_costs(task)))) == {"crossing"}
