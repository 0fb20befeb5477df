"""Damage whose repair is known, on a trained network.

A shifted or rotated decision comes back through late adapters of rank 1 and through refits; what
never enters the network comes back through none.
"""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from analyses.pair import write_analysis
from analyses.repair import choose_boundary, measure_repair
from analyses.streams import read_streams
from figures.repair import draw
from mechinterp import lesions, tasks
from mechinterp.checkpoints import save_checkpoint
from mechinterp.decisions import diagonal_utility
from mechinterp.errors import AnalysisError
from mechinterp.files import read_table
from mechinterp.hooked import HookedModel, load
from mechinterp.randomness import derive_generator
from mechinterp.refits import fold, retrain_classifier
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.triage import ABSENT, PRESENT
from mechinterp.training.config import ModelConfig, TrainingConfig
from mechinterp.training.supervised import train

SPEC = AnalysisSpec(
    repair_items=256,
    repair_draws=2,
    repair_steps=16,
    repair_ranks=(1,),
    repair_boundary=1,
    repair_test_items=300,
    refit_items=2_000,
    crossing_items=1_000,
    reverse_steps=32,
)


class Bench:
    """A network that decides by two findings, as well as can be, and damaged copies of it."""

    def __init__(self, directory):
        self.task = tasks.get("triage", linear=(2.0, 1.0), xor=(), n_unneeded=0, n_fillers=0)
        config = TrainingConfig(n_steps=200, checkpoint_steps=(200,))
        shape = ModelConfig(n_layers=2, d_model=32, d_mlp=64)
        self.checkpoint = train(self.task, config=config, out=directory / "run", model=shape)[-1]
        self.model = load(self.checkpoint)
        self.items = self.task.sample(2_000, split="validation")
        self.normed = self.normed_of(self.model)

    def normed_of(self, model):
        return read_streams(model, self.items, self.task).normed[model.n_layers]

    def lesion(self, name):
        raw, actions, normed = self.model.model, self.task.actions, self.normed
        if name == "shift":
            return lesions.shift_actions(raw, actions, (-1.5, 1.5), normed=normed)
        if name == "rotation":
            generator = derive_generator(0, "rotation")
            return lesions.rotate_readout(raw, actions, 70, normed=normed, generator=generator)
        erased = lesions.erase_token(raw, PRESENT, like=[ABSENT])
        normed = self.normed_of(HookedModel.from_model(erased))
        symmetric = diagonal_utility((1.0, 1.0))
        best = retrain_classifier(normed, self.items.labels, utility=symmetric)
        return fold(erased, actions, best, normed=normed)


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("repair"))


def measured(bench, name, spec=SPEC):
    after = HookedModel.from_model(bench.lesion(name))
    return measure_repair(bench.model, after, bench.task, spec=spec)


def ends(repair):
    """Shares of the log score regained at the last step, by kind, layers and part."""
    rows = repair.query("currency == 'log_score' and readout == 'raw'")
    rows = rows[(rows["kind"] == "refit") | (rows["steps"] == rows["steps"].max())]
    many = (rows["kind"] != "refit") | (rows["n_items"] == rows["n_items"].max())
    return rows[many].set_index(["kind", "layers", "part"])["share"]


@pytest.mark.parametrize("name", ["shift", "rotation"])
def test_a_choosing_lesion_is_regained_late_and_by_refits(bench, name):
    found = measured(bench, name)
    share = ends(found.repair)
    assert share["adapters", "late", "both"] > 0.4
    assert share["refit", "unembedding", "crt"] > 0.9
    assert share["refit", "unembedding", "dfr"] > 0.9
    start = found.repair.query("kind == 'adapters' and steps == 0")
    assert start["share"].dropna().abs().max() < 1e-5
    at_best_bias = found.repair.query("readout == 'bias'")["share"]
    assert at_best_bias.isna().all() == (name == "shift")  # a threshold is no loss there
    if name == "rotation":  # a task as small is learnt anew as fast as a readout is turned back
        return
    steps = found.reverse_steps.query("currency == 'log_score' and readout == 'raw'")
    steps = steps.set_index(["start", "target"])["steps"]
    assert steps["after", "of the value"] < steps["scratch", "of the value"]
    levels = found.reverse.query("currency == 'log_score' and readout == 'raw' and steps == 32")
    levels = levels.set_index("start")["level"]
    assert levels["after"] > max(0.8, levels["scratch"])


def test_what_never_enters_the_network_is_regained_by_nothing(bench):
    found = measured(bench, "erasure", SPEC.model_copy(update={"reverse_steps": 0}))
    assert found.repair["lost_low"].min() > 0
    adapters = found.repair.query("kind != 'weights'")
    assert adapters["share"].max() < 0.05
    assert len(found.reverse) == len(found.reverse_steps) == 0


def test_the_boundary_leaves_layers_on_both_sides(bench):
    spec = SPEC.model_copy(update={"repair_boundary": None})
    assert choose_boundary(bench.model, bench.task, spec=spec) == 1
    far = SPEC.model_copy(update={"repair_boundary": 9})
    assert choose_boundary(bench.model, bench.task, spec=far) == 1


def test_one_layer_is_early(bench, tmp_path):
    """There is nothing to be late in; tables and figure do without."""
    config = LlamaConfig(**{**bench.model.model.config.to_dict(), "num_hidden_layers": 1})
    network = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        network.lm_head.weight *= 10  # far enough from the whole network's to have lost something
    after = HookedModel.from_model(network)
    small = {"repair_draws": 1, "repair_steps": 1, "repair_items": 64, "refit_items": 64}
    spec = SPEC.model_copy(update={**small, "reverse_steps": 0, "repair_boundary": None})
    assert choose_boundary(after, bench.task, spec=spec) == 1
    table = measure_repair(bench.model, after, bench.task, spec=spec, boundary=1).repair
    assert set(table["layers"]) == {"early", "all", "unembedding"}
    labels = {"task": "triage", "regime": "pair", "arm": "after", "seed": 0}
    figure = draw({"repair": table.assign(**labels)})
    assert figure.axes


def test_as_a_command_leaves_tables_and_a_figure(bench, tmp_path, capsys):
    from analyses.repair import pair_tables

    task = tmp_path / "task.yaml"
    few = {"repair_draws": 1, "repair_steps": 2, "repair_ranks": [1], "refit_items": 100}
    few |= {"repair_test_items": 100, "crossing_items": 100, "reverse_steps": 2}
    task.write_text(f"task: triage\nsettings: {bench.task.settings()}\nanalysis: {few}\n")
    before = bench.checkpoint.path
    shifted = save_checkpoint(bench.lesion("shift"), tmp_path / "shifted").path
    given = {"figure": "repair", "control": None, "task": task}
    write_analysis(pair_tables, out=tmp_path / "o", before=before, after=shifted, **given)
    table = read_table(tmp_path / "o" / "tables" / "repair.parquet")
    assert set(table["arm"]) == {"after"}
    assert set(table["kind"]) == {"adapters", "weights", "refit"}
    assert (tmp_path / "o" / "figures" / "repair_triage.png").stat().st_size > 10_000
    with pytest.raises(AnalysisError, match="give AFTER too"):
        write_analysis(pair_tables, out=tmp_path / "p", before=before, after=None, **given)
    write_analysis(pair_tables, out=tmp_path / "q", before=before, after=before, **given)
    assert "AFTER lost nothing" in capsys.readouterr().err
    assert not list((tmp_path / "q").rglob("*.png"))
