"""Known answers: damage of known kind on a trained network, and the ladder must name it.

They come before any finding: an instrument that fails here has nothing to say about training.
"""

from __future__ import annotations

import pytest
import torch

from analyses.ladder import measure_ladder
from analyses.streams import DecisionStreams, read_streams, task_costs
from mechinterp import lesions, tasks
from mechinterp.checkpoints import open_checkpoint, save_checkpoint, with_action_shift
from mechinterp.decisions import diagonal_utility
from mechinterp.hooked import HookedModel, load
from mechinterp.randomness import derive_generator
from mechinterp.refits import fold, retrain_classifier
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.triage import ABSENT, FIRST_MARKER, PRESENT
from mechinterp.training.config import TrainingConfig
from mechinterp.training.supervised import train
from mechinterp.verdict import judge_side, word
from probes.crossfit import ProbeConfig
from probes.probe import probe_latents

LOSSES = ("threshold", "readout", "choosing", "discarded", "learning")
N_ITEMS = 6000


class Bench:
    """A competent network, the items it is measured on, and others to fit lesions to."""

    def __init__(self, directory):
        self.task = tasks.get("triage", linear=(1.5, 1.5), n_fillers=1)
        config = TrainingConfig(n_steps=320, checkpoint_steps=(320,))
        self.checkpoint = train(self.task, config=config, out=directory / "control")[-1]
        self.directory = directory
        self.model = load(self.checkpoint)
        self.items = self.task.sample(N_ITEMS)
        self.other_items = self.task.sample(4000, split="validation")
        self.other = read_streams(self.model, self.other_items, self.task)
        self.normed = self.other.normed[self.model.n_layers]
        self.reference = self.ladder(self.model)

    def ladder(self, model):
        spec = AnalysisSpec(ladder_items=N_ITEMS)
        streams = read_streams(model, self.items, self.task)
        costs = task_costs(self.task)
        return measure_ladder(streams, self.items, self.task, costs=costs, spec=spec)["symmetric"]

    def states(self, model) -> dict[str, str]:
        ladder = self.ladder(model)
        return {
            loss: judge_side(
                ladder.loss("log_score", loss) - self.reference.loss("log_score", loss),
                self.items.groups,
            ).state
            for loss in LOSSES
        }

    def saved(self, model, name) -> HookedModel:
        """The lesion as a user would open it: written to disk and read back."""
        return load(save_checkpoint(model, self.directory / name))

    def branch(self, name, *, data_order):
        config = TrainingConfig(n_steps=60, warmup_steps=10, checkpoint_steps=(60,))
        out = self.directory / name
        return train(
            self.task, config=config, out=out, start=self.checkpoint, data_order=data_order
        )[-1]

    def readability(self, model) -> dict[str, float]:
        """The best AUROC over layers of each latent at the decision."""
        streams = read_streams(model, self.other_items, self.task)
        table = probe_latents(
            {layer: x for layer, x in streams.residual.items() if layer > 0},
            self.other_items.latents,
            groups=self.other_items.groups,
            config=ProbeConfig(n_folds=3),
        ).table
        return table[table["measure"] == "auroc"].groupby("latent")["value"].max().to_dict()


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    return Bench(tmp_path_factory.mktemp("known-answers"))


INTACT = dict.fromkeys(LOSSES, "intact")


def test_the_control_is_competent(bench):
    ladder = bench.reference
    assert float(ladder.loss("utility", "total").mean()) < 0.1
    assert float(ladder.loss("log_score", "learning").mean()) < 0.1


def test_shift_of_the_action_logits_is_choosing_by_threshold(bench):
    model = lesions.shift_actions(
        bench.model.model, bench.task.actions, (-0.5, 0.5), normed=bench.normed
    )
    states = bench.states(bench.saved(model, "shift"))
    assert states == {**INTACT, "threshold": "damaged", "choosing": "damaged"}


def test_shift_in_the_provenance_is_the_same_lesion(bench):
    shifted = with_action_shift(bench.checkpoint, bench.directory / "ex-post", (-0.5, 0.5))
    states = bench.states(load(shifted))
    assert states == {**INTACT, "threshold": "damaged", "choosing": "damaged"}
    assert load(shifted).checkpoint.provenance.action_shift == (-0.5, 0.5)  # type: ignore[union-attr]


def test_rotation_of_the_readout_is_choosing_by_readout(bench):
    model = lesions.rotate_readout(
        bench.model.model,
        bench.task.actions,
        60,
        normed=bench.normed,
        generator=derive_generator(0, "rotation"),
    )
    states = bench.states(bench.saved(model, "rotation"))
    assert states == {**INTACT, "readout": "damaged", "choosing": "damaged"}


def test_erasure_of_everything_is_learning(bench):
    """PRESENT and ABSENT become one token: no latent is readable at any site."""
    model = lesions.erase_token(bench.model.model, PRESENT, like=[ABSENT])
    model = refit(bench, model)
    assert max(bench.readability(HookedModel.from_model(model)).values()) < 0.55
    assert bench.states(bench.saved(model, "erasure")) == {**INTACT, "learning": "damaged"}


def test_erasure_of_one_needed_latent_is_learning(bench):
    """Without their markers the values of b and of an unneeded latent cannot be told apart.

    (Without one marker alone the value is known by elimination, and nothing is lost.)
    """
    task = bench.task
    first_filler = FIRST_MARKER + task.n_latents
    fillers = range(first_filler, first_filler + task.n_filler_kinds)
    model = bench.model.model
    for name in ("b", "e"):
        latent = [x.name for x in task.latents].index(name)
        model = lesions.erase_token(model, FIRST_MARKER + latent, like=fillers)
    model = refit(bench, model)
    before, after = bench.readability(bench.model), bench.readability(HookedModel.from_model(model))
    assert before["b"] - after["b"] > 0.05
    assert all(before[x] - after[x] < 0.05 for x in "acd")
    states = bench.states(bench.saved(model, "one-latent"))
    assert states == {**INTACT, "learning": "damaged"}


def refit(bench, model):
    streams = read_streams(HookedModel.from_model(model), bench.other_items, bench.task)
    normed = streams.normed[bench.model.n_layers]
    symmetric = diagonal_utility((1.0, 1.0))
    best = retrain_classifier(normed, bench.other_items.labels, utility=symmetric)
    return fold(model, bench.task.actions, best, normed=normed)


def test_erasure_in_the_last_layer_only_is_discarded(bench):
    """What the last layer lost and an earlier one still holds is not called learning."""
    streams = read_streams(bench.model, bench.items, bench.task)
    final = bench.model.n_layers
    nothing = torch.randn(streams.normed[final].shape, generator=derive_generator(0, "noise"))
    late = DecisionStreams(
        streams.residual,
        {**streams.normed, final: nothing},
        torch.zeros_like(streams.action_logits),
    )
    spec = AnalysisSpec(ladder_items=N_ITEMS)
    costs = task_costs(bench.task)
    ladder = measure_ladder(late, bench.items, bench.task, costs=costs, spec=spec)["symmetric"]
    lost = {loss: float(ladder.loss("log_score", loss).mean()) for loss in LOSSES}
    assert lost["discarded"] > 0.5
    assert lost["choosing"] < 0.01
    learning = float(bench.reference.loss("log_score", "learning").mean())
    assert lost["learning"] - learning < 0.4  # the layer before holds less than the last did


def test_another_basis_is_none(bench):
    generator = derive_generator(0, "basis")
    model = lesions.rotate_residual_basis(bench.model.model, generator=generator)
    with torch.no_grad():
        tokens = bench.items.tokens[:64]
        gap = (model(tokens).logits - bench.model.model(tokens).logits).abs().max()
    assert gap < 1e-3
    assert bench.states(bench.saved(model, "basis")) == INTACT


def test_another_order_of_the_data_is_none(bench):
    orders = [bench.branch(f"order-{i}", data_order=i) for i in (1, 2)]
    assert orders[0].content_hash != orders[1].content_hash
    first, second = (bench.ladder(load(open_checkpoint(o.path))) for o in orders)
    sides = [
        judge_side(
            second.loss("log_score", loss) - first.loss("log_score", loss), bench.items.groups
        )
        for loss in ("learning", "choosing")
    ]
    assert word(*sides) == "none"
