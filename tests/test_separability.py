"""Pruning networks whose circuits are known: apart, the same; and each run against plain hooks."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from micro_models import _BITS, Builder
from plain_hooks import logits_by_hooks, site_by_hand
from test_erasure_analysis import Xor
from tiny_models import random_tokens, shared_model

from analyses.pair import Pair
from analyses.separability import measure_separability, pair_tables
from analyses.streams import read_streams
from mechinterp import tasks
from mechinterp.errors import AnalysisError, SpecError
from mechinterp.hooked import HookedModel
from mechinterp.patching.attribution import attribute_grains
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.pruning import (
    ABLATIONS,
    KINDS,
    StreamScore,
    component_effects,
    count_components,
    first_share,
    pruned_streams,
    random_ranks,
    rank_components,
)
from mechinterp.spec import AnalysisSpec, check
from mechinterp.tasks.base import Items, Latent

SPEC = AnalysisSpec(
    pruning_items=240,
    pruning_shares=(0.25, 1.0),
    pruning_draws=4,
    probe_folds=3,
    batch_size=64,
)
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2", "qwen2_sliding"]


@dataclass(frozen=True)
class OneBit(Xor):
    """The first marked bit; that, or the second, is said to be what the decision needs."""

    needs: str = "first"

    @property
    def latents(self) -> tuple[Latent, ...]:
        return (Latent(self.needs), Latent("filler", needed=False))

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        items = super().sample(n, seed=seed, split=split)
        latents = {z.name: items.latents[z.name] for z in self.latents}
        return replace(items, labels=items.latents["first"], latents=latents)


@dataclass(frozen=True)
class Finite(OneBit):
    """Splits that hold only so many items, as those of images do."""

    sizes: tuple[tuple[str, int], ...] = ()

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        return super().sample(min(n, dict(self.sizes)[split]), seed=seed, split=split)


@pytest.fixture(scope="module")
def model() -> HookedModel:
    """head.0.0 brings the first bit to the decision, which is the decision; head.0.1 brings the
    second one to a slot that nobody reads. All else is idle."""
    b = Builder(_BITS, 6, {"answer": 2, "aside": 2})
    asked, token = b.at["position"][5], b.at["token"]
    for name, mark, slot in (("0.0", "m", "answer"), ("0.1", "n", "aside")):
        marked = [token[_BITS.index(f"{mark}{bit}")] for bit in "01"]
        b.head(name, [(asked, dim) for dim in marked], marked, b.at[slot])
    b.unembed(b.at["answer"], ["0", "1"], 4.0)
    return HookedModel(b.raw)


@pytest.fixture(scope="module")
def apart(model):
    return measure_separability(model, OneBit("second"), spec=SPEC)


@pytest.fixture(scope="module")
def same(model):
    return measure_separability(model, OneBit("first"), spec=SPEC)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_separate_circuits_are_separable(apart, ablation):
    index = {name: values[0] for name, values in apart.areas[ablation].index().items()}
    assert index == pytest.approx({"both": 1, "decision": 1, "latents": 1}, abs=0.01)
    curves = apart.curves.set_index(["ablation", "target", "outcome", "measure", "share"])
    lost = curves.sort_index().lost.loc[ablation]
    for own, other in (("decision", "latents"), ("latents", "decision")):
        for outcome, expected in ((own, 1), (other, 0)):
            measure = "information" if outcome == "latents" else "log_score_refit"
            assert float(lost.loc[own, outcome, measure, 0.25]) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_one_circuit_for_both_is_not_separable(same, ablation):
    index = {name: values[0] for name, values in same.areas[ablation].index().items()}
    assert index == pytest.approx({"both": 0, "decision": 0, "latents": 0}, abs=0.05)


def test_components_are_ranked_by_what_they_carry(apart, same):
    for found, second in ((apart, 1), (same, 0)):
        table = found.components.set_index(["target", "kind", "layer", "unit"]).sort_index()
        assert set(table.index.unique("target")) == {
            *("decision", "latents", "latent first" if found is same else "latent second")
        }
        for target, head in (("decision", 0), ("latents", second)):
            assert table.loc[target, "head", 0, head]["rank"] == 1
            assert (table.loc[target].drop(("head", 0, head)).effect.abs() < 1e-3).all()
            for kind, n in (("head", 4), ("neuron", 16)):
                assert sorted(table.loc[target, kind]["rank"]) == list(range(1, n + 1))


def test_nothing_is_left_of_a_network_without_components(apart):
    full = apart.curves[(apart.curves.share == 1) & apart.curves.needed]
    fitted = full[full.measure.isin(["log_score_refit", "information"])]
    assert (fitted.lost - 1).abs().max() < 0.05
    assert (full[full.measure == "auroc"].value - 0.5).abs().max() < 0.1
    assert set(full.n_head) == {4}
    assert set(full.n_neuron) == {16}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ablation", ABLATIONS)
def test_ablation_equals_plain_hooks(family, ablation):
    model = shared_model(family)
    tokens, other = random_tokens(5, 7), random_tokens(5, 7, seed=1)
    sets = [first_share(random_ranks(model, torch.Generator().manual_seed(i)), 0.4) for i in (0, 1)]
    found = list(
        pruned_streams(
            model, tokens, sets, layers=[1, 3], ablation=ablation, reference=other, batch_size=2
        )
    )
    assert [set(streams) for streams in found] == [{1, 3}] * 2
    for components, streams in zip(sets, found, strict=True):
        expected = pruned_by_hooks(model, tokens, other, components, ablation)
        logits = model.unembed(model.final_norm(streams[3]))
        torch.testing.assert_close(logits, expected[:, -1], atol=2e-4, rtol=1e-3)


def pruned_by_hooks(model, tokens, other, components, ablation):
    """Columns of the projections' inputs replaced by hand."""
    seen = {}

    def keep(key):
        def change(x):
            seen[key] = x.mean(0, keepdim=True) if ablation == "mean" else x
            return x

        return change

    def replace_columns(key, columns):
        def change(x):
            x = x.clone()
            for column in columns:
                x[..., column] = seen[key][..., column]
            return x

        return change

    reads, writes = [], []
    for kind in KINDS:
        width = model.d_head if kind == "head" else 1
        for layer in range(model.n_layers):
            module, side, _ = site_by_hand(model, kind, layer)
            units = components[kind][layer].nonzero().flatten().tolist()
            columns = [unit * width + offset for unit in units for offset in range(width)]
            reads.append((module, side, keep((kind, layer))))
            writes.append((module, side, replace_columns((kind, layer), columns)))
    with torch.no_grad():
        logits_by_hooks(model, other, reads)
        return logits_by_hooks(model, tokens, writes)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_nothing_pruned_changes_nothing_and_everything_leaves_nothing(ablation):
    model, task = shared_model("llama"), tasks.get("triage")
    items, other = task.sample(30), task.sample(30, split="train")
    ranks = random_ranks(model, torch.Generator().manual_seed(0))
    nothing, everything = pruned_streams(
        model,
        items.tokens,
        [first_share(ranks, 0.0), first_share(ranks, 1.0)],
        layers=[1, 2, 3],
        ablation=ablation,
        reference=other.tokens,
        batch_size=16,
    )
    own, others = (read_streams(model, some, task).residual for some in (items, other))
    for layer in (1, 2, 3):
        torch.testing.assert_close(nothing[layer], own[layer])
        if ablation == "mean":
            spread = everything[layer].std(0) / own[layer].std(0)
            assert spread.max() < 1e-4
        else:  # the last token is the same in all prompts
            torch.testing.assert_close(everything[layer], others[layer], atol=1e-4, rtol=1e-4)


def test_streams_may_be_read_before_what_is_pruned():
    """Components of later layers change nothing there."""
    model, tokens = shared_model("llama"), random_tokens(4, 5)
    ranks = random_ranks(model, torch.Generator().manual_seed(0))
    options = {"ablation": "mean", "reference": random_tokens(4, 5, seed=1)}
    some = [first_share(ranks, 0.5)]
    (early,) = pruned_streams(model, tokens, some, layers=[1], **options)
    (both,) = pruned_streams(model, tokens, some, layers=[1, 3], **options)
    assert torch.equal(early[1], both[1])


def test_memory_bounds_how_many_networks_are_held_and_changes_nothing():
    model, tokens, other = shared_model("llama"), random_tokens(4, 5), random_tokens(4, 5, seed=1)
    ranks = random_ranks(model, torch.Generator().manual_seed(0))
    sets = [first_share(ranks, share) for share in (0.1, 0.5, 0.9)]
    options = {"layers": [3], "ablation": "mean", "reference": other}
    one, all_at_once = (
        torch.stack([s[3] for s in pruned_streams(model, tokens, sets, memory_mb=mb, **options)])
        for mb in (0, 256)
    )
    torch.testing.assert_close(one, all_at_once)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_effects_of_a_score_of_the_logits_are_those_of_attribution_patching(family):
    model = shared_model(family)
    tokens, source = random_tokens(6, 5), random_tokens(6, 5, seed=1)
    metric = action_log_odds([3, 9], torch.arange(6) % 2)

    def score(stream, items):
        return metric(model.unembed(stream, metric.token_ids), items)

    found = component_effects(
        model,
        tokens=tokens,
        source=source,
        scores={"odds": StreamScore(model.n_layers, score), "early": StreamScore(1, score)},
        n_steps=3,
    )
    expected = attribute_grains(
        model,
        clean=tokens,
        corrupt=source,
        grains=KINDS,
        metric=metric,
        direction="noising",
        n_steps=3,
        n_exact=0,
    )
    for kind in KINDS:
        torch.testing.assert_close(found["odds"][kind], expected[kind].mean, atol=1e-5, rtol=1e-4)
        assert (found["early"][kind][0] != 0).all()
        assert (found["early"][kind][1:] == 0).all()


def test_ranks_are_by_magnitude_and_ties_are_random():
    effects = {"head": torch.tensor([[0.1, -3.0], [0.0, 0.0]])}
    ranks = [
        rank_components(effects, torch.Generator().manual_seed(i))["head"].tolist()
        for i in range(20)
    ]
    assert all(r[0] == [1, 0] for r in ranks)
    assert {tuple(r[1]) for r in ranks} == {(2, 3), (3, 2)}


def test_random_components_are_as_many_of_each_kind():
    model = shared_model("llama")
    for seed in range(3):
        chosen = first_share(random_ranks(model, torch.Generator().manual_seed(seed)), 0.25)
        for kind, (n_layers, n_units) in count_components(model).items():
            assert chosen[kind].shape == (n_layers, n_units)
            assert int(chosen[kind].sum()) == round(0.25 * n_layers * n_units)


def test_two_networks_that_are_one_have_not_moved(model):
    spec = SPEC.model_copy(update={"pruning_draws": 2})
    pair = Pair({"before": model, "after": model}, OneBit(), spec, {})
    tables = pair_tables(pair)
    index = tables["separability_index"]
    after = index[index.arm == "after"]
    assert (after[["change", "change_low", "change_high"]] == 0).all(axis=None)
    assert index[index.arm == "before"].change.isna().all()
    areas = tables["separability_areas"]
    assert ((areas.area_low <= areas.area) & (areas.area <= areas.area_high)).all()
    by_hand = (areas.area - areas.random_area) / (1 - areas.random_area)
    np.testing.assert_allclose(areas.excess, by_hand)
    curves = tables["separability"]
    # Nobody brings the filler to the decision: there is nothing of it to lose.
    bits = curves[curves.measure == "information"]
    assert (bits.lost.isna() == (bits.outcome == "latent filler")).all()
    curves = curves[curves.needed]
    assert ((curves.low <= curves.lost + 1e-12) & (curves.lost <= curves.high + 1e-12)).all()


def test_a_test_split_with_fewer_items_takes_as_many_of_the_training_split(model):
    spec = SPEC.model_copy(update={"pruning_draws": 1})
    task = Finite("second", (("train", 240), ("test", 150)))
    found = measure_separability(model, task, spec=spec)
    index = {name: values[0] for name, values in found.areas["resample"].index().items()}
    assert index == pytest.approx({"both": 1, "decision": 1, "latents": 1}, abs=0.01)
    with pytest.raises(AnalysisError, match="100 training items for 150 test items"):
        measure_separability(model, replace(task, sizes=(("train", 100), ("test", 150))), spec=spec)


def test_bad_input_is_one_line():
    tokens, ranks = random_tokens(3, 5), random_ranks(shared_model("llama"), torch.Generator())
    sets = [first_share(ranks, 0.5)]
    options = {"layers": [1], "reference": tokens}
    with pytest.raises(AnalysisError, match="ablation: expected one of mean, resample"):
        list(pruned_streams(shared_model("llama"), tokens, sets, ablation="zero", **options))
    options["reference"] = random_tokens(3, 6)
    with pytest.raises(AnalysisError, match="reference: expected prompts of 5 positions"):
        list(pruned_streams(shared_model("llama"), tokens, sets, ablation="mean", **options))
    unneeded = tasks.get("triage", linear=(), xor=(), n_unneeded=1)
    with pytest.raises(AnalysisError, match="'triage' has no latent that the decision needs"):
        measure_separability(shared_model("llama"), unneeded, spec=SPEC)
    with pytest.raises(SpecError, match=r"pruning_shares: .*rising order"):
        check(AnalysisSpec, {"pruning_shares": [0.5, 0.1]}, source="spec")
