"""Every lesion does to each rung of the ladder what it says, and is a valid checkpoint."""

from __future__ import annotations

import pytest
import torch
from tiny_models import shared_model
from transformers import LlamaConfig, LlamaForCausalLM

from analyses.ladder import measure_ladder
from analyses.streams import read_streams, task_costs
from mechinterp import tasks
from mechinterp.checkpoints import open_checkpoint, save_checkpoint
from mechinterp.errors import ModelError
from mechinterp.hooked import HookedModel, load
from mechinterp.lesions import (
    LESIONS,
    Dose,
    Subject,
    append_block,
    damage,
    parse_doses,
    permute_neurons,
    rescale_parts,
    side_of,
    tokens_that_tell,
)
from mechinterp.lesions.catalogue import ALL
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.triage import ABSENT, PRESENT
from mechinterp.training.config import TrainingConfig
from mechinterp.training.supervised import train

N_ITEMS = 4000
FALLS, STAYS = 0.05, 0.03  # of (oracle - constant)
# Doses that cost the decision something; found once on this network, they say nothing of others.
DOSES = {
    "shift": 1.0,
    "rotate": 45.0,
    "temperature": 1.0,
    "readout_noise": 2.0,
    "swap": 0.5,
    "rewire": 2.0,
    "erase": 0.95,
    "noise_early": 2.0,
    "stop_early": 0.8,
    "prune": 0.2,
    "flatten": 0.95,
    "discard": 1.0,
}


class Bench:
    def __init__(self, directory):
        self.task = tasks.get("triage", linear=(1.5, 1.5), n_fillers=1)
        config = TrainingConfig(n_steps=320, checkpoint_steps=(40, 160, 320))
        checkpoint = train(self.task, config=config, out=directory / "control")[-1]
        self.subject = Subject(load(checkpoint), self.task, n_items=4000)
        self.items = self.task.sample(N_ITEMS)

    def rungs(self, model) -> dict[str, float]:
        streams = read_streams(model, self.items, self.task)
        spec, costs = AnalysisSpec(ladder_items=N_ITEMS), task_costs(self.task)
        ladder = measure_ladder(streams, self.items, self.task, costs=costs, spec=spec)["symmetric"]
        unit = ladder.scale["log_score"]
        return {rung: float(ladder.values["log_score"][rung].mean()) / unit for rung in ALL}

    def damaged(self, *doses: Dose) -> HookedModel:
        generator = torch.Generator().manual_seed(0)
        return HookedModel.from_model(damage(self.subject, doses, generator=generator))


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("lesions"))


@pytest.fixture(scope="module")
def whole(bench):
    return bench.rungs(bench.subject.model)


@pytest.mark.parametrize("name", LESIONS)
def test_a_lesion_lowers_the_rungs_that_it_names_and_no_other(name, bench, whole):
    rungs = bench.rungs(bench.damaged(Dose(name, DOSES.get(name, 0.0))))
    lost = {rung: whole[rung] - rungs[rung] for rung in ALL}
    lesion = LESIONS[name]
    assert all(lost[rung] > FALLS for rung in lesion.lowers), lost
    assert all(abs(lost[rung]) < STAYS for rung in ALL if rung not in lesion.lowers), lost
    if lesion.side == "learning":  # nothing but learning is wrong
        assert abs(lost["raw"] - lost["head"]) < STAYS


@pytest.mark.parametrize("name", ["basis", "permute", "rescale", "append_block"])
def test_what_preserves_the_function_leaves_the_logits(name, bench):
    tokens = bench.items.tokens[:64]
    changed = bench.damaged(Dose(name, 0.0)).model
    with torch.no_grad():
        before, after = bench.subject.model.model(tokens).logits, changed(tokens).logits
    assert (before - after).abs().max() < 1e-3 * before.abs().max()
    weights = (dict(m.named_parameters()) for m in (bench.subject.model.model, changed))
    first, second = weights
    assert any(name not in first or not torch.equal(first[name], w) for name, w in second.items())


@pytest.mark.parametrize("name", ["shift", "rotate", "temperature", "readout_noise", "rewire"])
def test_a_dose_of_zero_changes_nothing(name, bench):
    tokens = bench.items.tokens[:64]
    with torch.no_grad():
        before = bench.subject.model.model(tokens).logits[:, -1]
        after = bench.damaged(Dose(name, 0.0)).model(tokens).logits[:, -1]
    assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("name", ["swap", "discard", "prune"])
def test_a_lesion_is_a_checkpoint(name, bench, tmp_path):
    model = bench.damaged(Dose(name, DOSES[name]))
    saved = open_checkpoint(save_checkpoint(model.model, tmp_path / "lesioned").path)
    tokens = bench.items.tokens[:16]
    with torch.no_grad():
        assert torch.equal(load(saved).model(tokens).logits, model.model(tokens).logits)


def test_an_appended_block_can_be_appended_to(bench):
    longer = append_block(append_block(bench.subject.model.model))
    assert len(longer.model.layers) == longer.config.num_hidden_layers == 5
    HookedModel.from_model(longer).self_test()


def test_the_tokens_that_tell_are_the_values(bench):
    assert tokens_that_tell(bench.task) == [ABSENT, PRESENT]


def test_equal_seeds_give_equal_damage(bench):
    first, second = (bench.damaged(Dose("noise_early", 1.0)).model for _ in range(2))
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)


def test_sides_of_several_lesions():
    shift, erase = Dose("shift", 1.0), Dose("erase", 1.0)
    assert side_of([erase, shift]) == "both"
    assert side_of([Dose("basis", 0.0), erase]) == "learning"
    assert side_of([Dose("basis", 0.0)]) == side_of([]) == "none"


@pytest.mark.parametrize("last", ["erase", "discard", "refit"])
def test_what_would_heal_a_lesion_of_choosing_may_not_follow_it(last):
    subject = Subject(shared_model("llama"), tasks.get("triage"), n_items=60)
    doses = [Dose("shift", 6.0), Dose("basis", 0.0), Dose(last, 1.0)]
    with pytest.raises(ModelError, match="learning, and refit, before those of choosing"):
        damage(subject, doses, generator=torch.Generator())


@pytest.mark.parametrize("biased", ["mlp_bias", "attention_bias"])
@pytest.mark.parametrize("lesion", [permute_neurons, rescale_parts])
def test_networks_with_biases_are_refused(lesion, biased):
    config = LlamaConfig(**{**shared_model("llama").model.config.to_dict(), biased: True})
    with pytest.raises(ModelError, match=r"without biases are supported, got model.layers.0.*bias"):
        lesion(LlamaForCausalLM(config), generator=torch.Generator())


def test_errors_name_what_is_wrong(bench):
    with pytest.raises(ModelError, match="lesion 'bad': not known; known: shift"):
        parse_doses("erase=1+bad=1")
    with pytest.raises(ModelError, match="no checkpoint that lacks 150%"):
        bench.damaged(Dose("stop_early", 1.5))
    with pytest.raises(ModelError, match="needs a checkpoint of a trajectory"):
        bench.damaged(Dose("erase", 0.5), Dose("stop_early", 0.5))
    with pytest.raises(ModelError, match="expected KIND=DOSE"):
        parse_doses("shift=much")
    assert parse_doses("erase=0.9+shift=2") == [Dose("erase", 0.9), Dose("shift", 2.0)]
