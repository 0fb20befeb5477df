"""Repairs: where adapters may write, plain training beside ours, shares of what was lost."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import random_tokens, shared_model

from analyses.repair import _counted, _refitted, steps_to_reach
from analyses.repair_subject import (
    RepairSubject,
    share_regained,
    stack_draws,
    symmetric_utility,
    values_of,
)
from analyses.streams import read_streams
from mechinterp import tasks
from mechinterp.adapters import Adapters
from mechinterp.checkpoints import open_checkpoint, save_checkpoint, with_action_shift
from mechinterp.decisions import best_constant
from mechinterp.errors import AnalysisError, ModelError, TrainingError
from mechinterp.hooked import load
from mechinterp.randomness import derive_generator, derive_seed
from mechinterp.refits import normalise_rows, own_readout
from mechinterp.repair import Repair, few_batches, fresh_network, repair
from mechinterp.spec import AnalysisSpec
from mechinterp.statistics import t_interval
from mechinterp.training.config import TrainingConfig

ACTIONS = (3, 5)
ATTENTION, MLP = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
QUICK = TrainingConfig(
    n_steps=3, learning_rate=1e-2, warmup_steps=0, final_learning_rate=1.0, weight_decay=0.0
)


def batch(seed: int = 0):
    tokens = random_tokens(24, 6, seed=seed)
    return tokens, tokens[:, 2] % 2


def repaired(model, **options):
    options = {"config": QUICK, "generator": derive_generator(0, "repair"), **options}
    return repair(model, ACTIONS, *batch(), **options)


# Adapters


@pytest.mark.parametrize("part", ["attention", "mlp", "both"])
@pytest.mark.parametrize("layers", [(0,), (1, 2)])
def test_adapters_change_what_they_sit_in_by_their_rank_and_nothing_else(part, layers):
    model = shared_model("llama").model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    after = repaired(model, adapters=Adapters(layers, part, rank=2)).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert after.keys() == before.keys()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    names = {"attention": ATTENTION, "mlp": MLP, "both": (*ATTENTION, *MLP)}[part]
    assert {tuple(name.split(".")[i] for i in (2, 4)) for name in changed} == {
        (str(layer), name) for layer in layers for name in names
    }
    for name in changed:
        sizes = torch.linalg.svdvals((after[name] - before[name]).double())
        assert sizes[1] > 1e-3 * sizes[0]
        assert sizes[2] < 1e-5 * sizes[0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_merged_is_unmerged_and_a_plain_checkpoint(family, tmp_path):
    model = shared_model(family).model
    adapters = Adapters((1, 2), "both", rank=3)
    generator = derive_generator(0, "repair")
    run = Repair(model, ACTIONS, adapters=adapters, config=QUICK, generator=generator)
    tokens, labels = batch()
    own = model(tokens).logits[:, -1, list(ACTIONS)].detach().double()
    torch.testing.assert_close(run.action_logits(tokens), own, atol=1e-5, rtol=1e-5)
    for _ in range(5):
        run.update(tokens, labels)
    live = run.action_logits(tokens, batch_size=7)
    assert (live - own).abs().max() > 0.1
    saved = open_checkpoint(save_checkpoint(run.merged(), tmp_path / "merged").path)
    hooked = load(saved)
    assert type(hooked.model) is type(model)
    merged = hooked.forward(tokens)[:, -1, list(ACTIONS)].detach().double()
    torch.testing.assert_close(merged, live, atol=1e-4, rtol=1e-4)


def test_adapters_have_as_many_numbers_as_their_factors():
    model = shared_model("llama").model
    adapters = Adapters((0, 2), "mlp", rank=5)
    run = Repair(model, ACTIONS, adapters=adapters, generator=derive_generator(0, "n"))
    mlp = model.model.layers[0].mlp
    shapes = [getattr(mlp, name).weight.shape for name in MLP]
    assert run.n_trained == 2 * 5 * sum(sum(shape) for shape in shapes)
    everything = Repair(model, ACTIONS, generator=derive_generator(0, "n"))
    assert everything.n_trained == sum(p.numel() for p in model.parameters())


def test_the_generator_decides_and_nothing_else_does():
    model = shared_model("llama").model
    adapters = Adapters((2,), "attention", rank=1)

    def weights(seed):
        network = repaired(model, adapters=adapters, generator=derive_generator(seed, "repair"))
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    first, state = weights(0), torch.get_rng_state()
    torch.rand(3)
    assert torch.equal(weights(0), first)
    assert not torch.equal(weights(1), first)
    torch.set_rng_state(state)
    weights(0)
    assert torch.equal(torch.get_rng_state(), state)


# Training


@pytest.mark.parametrize("shift", [None, (-1.0, 2.0)])
def test_all_weights_are_trained_as_a_plain_loop_does(shift):
    model = shared_model("llama").model
    offset = None if shift is None else torch.tensor(shift)
    run = Repair(model, ACTIONS, config=QUICK, shift=offset, generator=derive_generator(0, "x"))
    plain = fresh_network(model, generator=derive_generator(0, "anything"))
    plain.load_state_dict(model.state_dict())
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2, betas=(0.9, 0.98), weight_decay=0)
    for seed in range(3):
        tokens, labels = batch(seed)
        run.update(tokens, labels)
        logits = plain(tokens).logits[:, -1][:, list(ACTIONS)]
        logits = logits if shift is None else logits + torch.tensor(shift)
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
    # Adam divides by the gradient's size, so that rounding shows where gradients are next to zero.
    found = run.merged().state_dict()
    for name, value in plain.state_dict().items():
        assert (found[name] - value).abs().mean() < 1e-5, name


def test_every_round_holds_all_items_once_in_another_order():
    tokens, labels = torch.arange(10)[:, None], torch.arange(10)
    batches = few_batches(tokens, labels, batch_size=4, generator=derive_generator(0, "few"))
    rounds = [torch.cat([labels for _, labels in itertools.islice(batches, 3)]) for _ in range(2)]
    assert all(torch.equal(each.sort().values, labels) for each in rounds)
    assert not torch.equal(*rounds)


def test_a_fresh_network_is_of_the_same_kind_and_holds_nothing_of_the_old():
    model = shared_model("qwen3").model
    first, again, other = (
        fresh_network(model, generator=derive_generator(seed, "fresh")).state_dict()
        for seed in (0, 0, 1)
    )
    for name, old in model.state_dict().items():
        assert first[name].shape == old.shape
        assert torch.equal(first[name], again[name])
        if old.ndim == 2:
            assert not torch.equal(first[name], other[name])
            assert abs(np.corrcoef(first[name].flatten(), old.flatten())[0, 1]) < 0.1


@pytest.mark.parametrize(
    ("adapters", "message"),
    [(Adapters((3,)), "layer 3: this network has 0 to 2"), (Adapters((0,), rank=0), "at least 1")],
)
def test_adapters_that_cannot_be_are_refused(adapters, message):
    with pytest.raises(ModelError, match=message):
        repaired(shared_model("llama").model, adapters=adapters)


def test_divergence_is_refused():
    config = replace(QUICK, learning_rate=1e30)
    with pytest.raises(TrainingError, match="lower the learning rate"):
        repaired(shared_model("llama").model, config=config)


# What it is trained and measured on


def subject_of(task, **settings) -> RepairSubject:
    return RepairSubject(
        shared_model("llama"), task, AnalysisSpec(**settings), task.sample(60), {}, {}, {}
    )


def test_draws_of_a_small_split_share_no_item():
    """`digits` has 180 validation images: four draws of 256 would be the same 180."""
    subject = subject_of(tasks.get("digits"), repair_items=256, repair_draws=4)
    draws = [set(subject.few(draw).groups.tolist()) for draw in range(4)]
    assert [len(draw) for draw in draws] == [45] * 4
    assert len(set.union(*draws)) == 180
    many = subject_of(tasks.get("digits"), repair_draws=181)
    with pytest.raises(AnalysisError, match="repair_draws: 181 draws of the 180 items"):
        many.few(0)


def test_draws_of_a_split_without_end_are_samples():
    task = tasks.get("triage")
    subject = subject_of(task, repair_items=20, repair_draws=3)
    for draw in range(3):
        seed = derive_seed(0, "repair", draw)
        expected = task.sample(20, seed=seed, split="validation").tokens
        assert torch.equal(subject.few(draw).tokens, expected)


def test_refits_say_how_many_items_they_had():
    task, model = tasks.get("digits"), shared_model("llama")
    spec = AnalysisSpec(repair_test_items=60, repair_draws=2, repair_items=128, refit_items=300)
    rows = pd.DataFrame(_refitted(RepairSubject.read(model, model, task, spec)))
    sizes = rows.groupby("part")["n_items"].unique().map(list).to_dict()
    assert sizes == {"crt": [90, 300], "lws": [90, 300], "tau_norm": [90, 300], "dfr": [90]}


def test_refits_of_the_readout_keep_a_recorded_shift_and_new_readouts_do_not(tmp_path):
    task, shift = tasks.get("triage"), torch.tensor([-2.0, 2.0], dtype=torch.float64)
    plain = save_checkpoint(shared_model("llama").model, tmp_path / "plain")
    before = load(plain)
    after = load(with_action_shift(plain, tmp_path / "shifted", shift.tolist()))
    spec = AnalysisSpec(repair_test_items=60, repair_draws=1, repair_items=64, refit_items=64)
    values = {}
    for name, model in (("before", before), ("after", after)):
        subject = RepairSubject.read(before, model, task, spec)
        rows = pd.DataFrame(_refitted(subject)).query("currency == 'log_score'")
        values[name] = rows.query("readout == 'raw'").set_index("part")["value"]
    assert values["after"]["crt"] == values["before"]["crt"]
    assert values["after"]["dfr"] == values["before"]["dfr"]
    own = normalise_rows(own_readout(before.model, task.actions))
    items = task.sample(60)
    normed = read_streams(before, items, task).normed[before.n_layers]
    expected = values_of(own(normed).double() + shift, items, task)["log_score", "raw"].mean()
    assert values["after"]["tau_norm"] == pytest.approx(float(expected))
    assert values["after"]["lws"] < values["before"]["lws"] - 0.1


# What is regained


def test_steps_are_read_off_between_measurements():
    steps, values = [0, 2, 6, 10], [0.0, 1.0, 3.0, 2.0]
    assert steps_to_reach(steps, values, 0.0) == 0
    assert steps_to_reach(steps, values, 1.0) == 2
    assert steps_to_reach(steps, values, 2.0) == 4
    assert steps_to_reach(steps, values, 3.5) == float("inf")


def test_nothing_is_a_share_of_a_reference_without_value():
    """An overconfident network may score below the best constant: what it lost has no unit."""
    task = tasks.get("triage")
    items = task.sample(300)
    wild = values_of(8 * items.posterior.log(), items, task)
    worse = values_of(16 * items.posterior.log(), items, task)
    report = best_constant(items.target, symmetric_utility(task)).report.log()
    constant = values_of(report.expand(len(items), -1), items, task)
    own = shared_model("llama")
    subject = RepairSubject(own, task, AnalysisSpec(), items, wild, worse, constant)
    assert subject.unit("log_score", "raw") < 0 < subject.unit("utility", "raw")
    rows = pd.DataFrame(subject.rows(stack_draws([wild, wild]))).query("currency == 'log_score'")
    assert (rows["lost_low"] > 0).all()
    assert rows[["share", "low", "high"]].isna().all(axis=None)
    counted = pd.DataFrame(_counted(subject, "after", [{0: worse, 2: wild}]))
    assert set(counted["currency"]) == {"utility"}


def test_share_of_draws_alone_has_students_interval():
    """Where all items are alike the draws are all that varies."""
    start, goal = torch.full((50,), -2.0), torch.full((50,), 2.0)
    values = torch.tensor([1.0, 1.5, 0.5, 1.8])
    expected = t_interval((values.numpy() + 2) / 4)
    found = share_regained(values[:, None].expand(-1, 50), start, goal, torch.arange(50))
    assert found == pytest.approx((expected.mean, expected.low, expected.high))


def test_share_of_items_alone_has_the_interval_of_a_regression_through_the_origin():
    """One draw: the delta method's error of a ratio of means, against the jackknife's."""
    generator = derive_generator(0, "ratio")
    start = torch.randn(400, generator=generator).double()
    goal = start + 1 + torch.rand(400, generator=generator)
    values = start + 0.7 * (goal - start) + 0.5 * torch.randn(400, generator=generator)
    share, low, high = share_regained(values[None], start, goal, torch.arange(400))
    gained, lost = (values - start).numpy(), (goal - start).numpy()
    left_out = [np.delete(gained, i).mean() / np.delete(lost, i).mean() for i in range(400)]
    error = np.sqrt(399 * np.var(left_out))
    assert share == pytest.approx(gained.mean() / lost.mean())
    assert (high - low) / 2 == pytest.approx(1.966 * error, rel=0.01)
