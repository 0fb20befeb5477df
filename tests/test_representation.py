"""What training did to a representation, on networks whose relation is known."""

from __future__ import annotations

import pytest

from analyses.pair import Pair
from analyses.representation import COLUMNS, pair_tables
from mechinterp import lesions, tasks
from mechinterp.checkpoints import save_checkpoint
from mechinterp.cli import main
from mechinterp.errors import AnalysisError
from mechinterp.files import read_table
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec, TaskSpec
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

SETTINGS = {"linear": [1.5], "xor": [2.0], "n_fillers": 1}
SPEC = TaskSpec(
    task="triage",
    settings=SETTINGS,
    analysis=AnalysisSpec(ladder_items=300, trajectory_items=300, probe_items=300, probe_folds=3),  # type: ignore[call-arg]
)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A random network (which carries its prompt along), itself in another basis, and another."""
    folder = tmp_path_factory.mktemp("checkpoints")
    config = ModelConfig(n_layers=2, d_model=24, n_heads=2, n_kv_heads=2, d_mlp=32)
    task = tasks.get("triage", **SETTINGS)
    model = initial_model(config, task, seed=0)
    turned = lesions.rotate_residual_basis(model, generator=derive_generator(0, "basis"))
    other = initial_model(config, task, seed=1)
    for name, network in {"before": model, "turned": turned, "other": other}.items():
        save_checkpoint(network, folder / name)
    return folder


@pytest.fixture(scope="module")
def tables(checkpoints):
    before, after, control = (checkpoints / name for name in ("before", "turned", "other"))
    return pair_tables(Pair.open(before, after, control=control, task=SPEC))


def test_a_rotated_network_lost_nothing_but_its_directions(tables):
    table = tables["representation"]
    rows = table[table["arm"] == "after"]
    readable = rows[(rows["measure"] == "auroc") & (rows["layer"] == 2)].set_index(
        ["part", "latent"]
    )
    assert readable.value["own"].abs().max() < 0.01
    assert (readable.q["own"] > 0.05).all()
    moved = readable.loc["moved_forward"]
    assert (moved["high"] < 0).any()
    assert moved.q.min() < 0.05
    similar = rows[rows["part"] == "similarity"].groupby("measure")["value"]
    assert similar.min()["cka"] == pytest.approx(1, abs=1e-5)
    assert similar.max()["procrustes"] == pytest.approx(0, abs=1e-4)
    assert similar.min()["r2_forward"] > 0.9
    shape = rows[rows["part"] == "geometry_change"]
    assert shape["value"].abs().max() < 1e-3
    shifts = tables["latent_shifts"]
    # The penalty on standardised features is not the same in another basis, hence not exactly 0.
    assert (shifts[shifts["arm"] == "after"]["value"].dropna().abs() < 0.5).all()


def test_another_network_is_not_the_same(tables):
    """Two random networks read the same prompts: alike beyond the null, but not the same."""
    table = tables["representation"]
    rows = table[(table["arm"] == "control") & (table["measure"] == "cka")]
    assert (rows["high"] < 0.99).all()
    assert (rows["null_low"] < 0).all()


def test_tables_are_tidy(tables):
    table = tables["representation"]
    assert list(table.columns) == ["task", "regime", "arm", "seed", "step", *COLUMNS]
    key = ["arm", "part", "layer", "latent", "measure"]
    assert not table.duplicated(key).any()
    assert table["value"].notna().mean() > 0.9
    assert set(table["layer"]) == {1, 2}
    of_latents = table["part"].isin(["own", "moved_forward", "moved_back", "direction"])
    assert (of_latents == (table["latent"] != "")).all()
    assert set(tables["latent_shifts"]["statistic"]) == {"reached", "centre"}


def test_command(checkpoints, tmp_path, capsys):
    task = tmp_path / "task.yaml"
    task.write_text(SPEC.model_dump_json())
    arguments = [checkpoints / "before", checkpoints / "turned", "--task", task]
    with pytest.raises(SystemExit) as done:
        main(["represent", *map(str, arguments), "--out", str(tmp_path / "out")])
    assert done.value.code == 0
    printed = capsys.readouterr().out
    assert len(read_table(tmp_path / "out" / "tables" / "representation.parquet"))
    assert "representation_triage.pdf" in printed


def test_one_checkpoint_is_not_enough(checkpoints):
    with pytest.raises(AnalysisError, match="two checkpoints"):
        pair_tables(Pair.open(checkpoints / "before", task=SPEC))
