"""Gradients of objectives: against a plain loop over items, closed forms, and in every family."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from test_erasure_analysis import Xor
from tiny_models import CONFIGS, FAMILIES, N_LAYERS, shared_model, tiny_model

from analyses.gradients import (
    BATCH_SIZE,
    MIN_BATCHES,
    batch_gradients,
    measure_gradients,
    pair_tables,
    weights_by_part,
)
from analyses.pair import Pair
from analyses.streams import task_costs
from mechinterp import objectives, tasks
from mechinterp.hooked import HookedModel
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Latent

N_ITEMS, N_BATCHES = 512, 8
SPEC = AnalysisSpec(gradient_items=N_ITEMS)
FEW = AnalysisSpec(gradient_items=64)  # batches of 8
TRIAGE = tasks.get("triage")
OBJECTIVES = {
    "symmetric": objectives.get("cross_entropy"),
    "weighted": objectives.get("utility_weighted", utility=[[0.2, 0.0], [0.0, 1.8]]),
    "hard": objectives.get("hard_examples", share=0.25),
}


@pytest.fixture(scope="module")
def tables() -> dict[str, pd.DataFrame]:
    return measure_gradients(shared_model("llama"), TRIAGE, OBJECTIVES, spec=SPEC)


@pytest.fixture(scope="module")
def few() -> dict[str, pd.DataFrame]:
    return measure_gradients(shared_model("llama"), TRIAGE, OBJECTIVES, spec=FEW)


def wide(table: pd.DataFrame, *index: str) -> pd.DataFrame:
    return table.pivot(index=["objective", *index], columns="measure", values="value")


def plain_gradients(raw, items, objective, rows) -> tuple[dict, torch.Tensor]:
    """Of the mean loss over some items: in every weight by name, and in all hidden states."""
    raw.zero_grad()
    out = raw(input_ids=items.tokens[rows], output_hidden_states=True)
    for state in out.hidden_states:
        state.retain_grad()
    logits = out.logits[:, -1, list(TRIAGE.actions)]
    objective(logits, items.labels[rows]).mean().backward()
    weights = {name: weight.grad.clone() for name, weight in raw.named_parameters()}
    return weights, torch.stack([state.grad[:, -1] for state in out.hidden_states[1:]])


@pytest.mark.parametrize("name", OBJECTIVES)
def test_parts_equal_a_plain_loop_over_batches(name, tables):
    raw = tiny_model("llama")
    items = TRIAGE.sample(N_ITEMS, seed=SPEC.seed, split="train")
    batches, reference = (
        [
            plain_gradients(raw, items, OBJECTIVES[n], rows)[0]
            for rows in torch.arange(N_ITEMS).split(64)
        ]
        for n in (name, "symmetric")
    )
    found = wide(tables["gradients"], "part").loc[name]
    prefixes = {
        "embed": ("model.embed_tokens",),
        "norm": ("model.norm",),
        "unembed": ("lm_head",),
        "all": ("",),
    }
    for layer in range(N_LAYERS):
        block = f"model.layers.{layer}."
        prefixes[f"attn {layer}"] = (f"{block}self_attn", f"{block}input_layernorm")
        prefixes[f"mlp {layer}"] = (f"{block}mlp", f"{block}post_attention_layernorm")
    assert set(found.index) == set(prefixes)
    squares = {}
    for part, starts in prefixes.items():
        one, other = (
            torch.stack(
                [
                    torch.cat([g.flatten() for n, g in batch.items() if n.startswith(starts)])
                    for batch in some
                ]
            ).double()
            for some in (batches, reference)
        )
        mean, trace = one.mean(0), one.var(0).sum()
        squares[part] = max(float(mean @ mean - trace / N_BATCHES), 0.0)
        row = found.loc[part]
        assert row["norm"] == pytest.approx(squares[part] ** 0.5, rel=1e-4, abs=1e-5)
        assert row["noise"] == pytest.approx(float(trace) ** 0.5, rel=1e-4)
        assert row["snr"] == pytest.approx(row["norm"] / row["noise"])
        cosine = torch.cosine_similarity(mean, other.mean(0), dim=0)
        assert row["cosine"] == pytest.approx(float(cosine), abs=1e-5)
    total = sum(squares[part] for part in squares if part != "all")
    for part in set(squares) - {"all"}:
        assert found.loc[part, "share"] == pytest.approx(squares[part] / total, rel=1e-3, abs=1e-6)
    assert found.loc["all", "share"] == 1


def one_by_one(raw, items, name) -> torch.Tensor:
    """Each item's own gradient in the streams [layers items d_model], with nothing in a batch;
    where the loss depends on the batch, from the batch."""
    if name == "hard":
        batches = torch.arange(len(items)).split(8)
        parts = [plain_gradients(raw, items, OBJECTIVES[name], rows)[1] * 8 for rows in batches]
    else:
        rows = [torch.tensor([i]) for i in range(len(items))]
        parts = [plain_gradients(raw, items, OBJECTIVES[name], row)[1] for row in rows]
    return torch.cat(parts, dim=1).double()


@pytest.mark.parametrize("name", ["weighted", "hard"])
def test_latents_equal_a_plain_loop_over_items(name, few):
    raw = tiny_model("llama")
    items = TRIAGE.sample(64, seed=FEW.seed, split="train")
    gradients = one_by_one(raw, items, name)
    with torch.no_grad():
        states = raw(input_ids=items.tokens, output_hidden_states=True).hidden_states
        streams = [x[:, -1].double() for x in states[1:]]
    # The last state that the model itself shows is after the final norm, and its gradient too.
    found = wide(few["gradients_latents"], "layer", "latent").loc[name]
    for layer in range(1, N_LAYERS):
        g, x = gradients[layer - 1], streams[layer - 1]
        everything = []
        for latent in TRIAGE.latents:
            value = items.latents[latent.name]
            d = x[value == 1].mean(0) - x[value == 0].mean(0)
            d /= d.norm()
            everything += [d] if latent.needed else []
            push = -(g @ d) * (2 * value - 1)
            row = found.loc[layer, latent.name]
            assert row["share"] == pytest.approx(float((g @ d).square().sum() / g.square().sum()))
            assert row["chance"] == 1 / g.shape[1]
            assert row["push"] == pytest.approx(float(push.mean()), rel=1e-3, abs=1e-6)
            assert row["snr"] == pytest.approx(float(push.mean() / push.std()), rel=1e-3, abs=1e-5)
        # What least squares explains of the gradients by the needed directions together.
        basis = torch.stack(everything, 1).numpy()
        fitted = basis @ np.linalg.lstsq(basis, g.T.numpy(), rcond=None)[0]
        row = found.loc[layer, "all needed"]
        assert row["share"] == pytest.approx((fitted**2).sum() / float(g.square().sum()))
        assert row["chance"] == len(everything) / g.shape[1]
        assert np.isnan(row["push"])


def test_posterior_equals_a_plain_loop_over_items(few):
    model, name = shared_model("llama"), "weighted"
    items = TRIAGE.sample(64, seed=FEW.seed, split="train")
    norms = []
    for i in range(len(items)):
        row = items.tokens[i : i + 1]
        last = model.run(row, sites="resid_post.2", positions=-1)[1]["resid_post.2"][:, -1]
        last.requires_grad_()
        logits = model.unembed(model.final_norm(last))[:, list(TRIAGE.actions)]
        loss = OBJECTIVES[name](logits, items.labels[i : i + 1]).sum()
        norms.append(float(torch.autograd.grad(loss, last)[0].norm()))
    assert items.posterior is not None
    odds = (items.posterior[:, 1] / items.posterior[:, 0]).log().numpy()
    table = few["gradients_posterior"].query("objective == @name")
    found = table.pivot(index="log_odds", columns="measure", values="value")
    for log_odds, row in found.iterrows():
        distance = odds - float(str(log_odds))
        inside = (distance > -0.5 - 1e-6) & (distance < 0.5 - 1e-6)  # halves go up
        own = np.array(norms)[inside]
        assert row["norm"] == pytest.approx(own.mean(), rel=1e-4)
        assert row["share"] == pytest.approx(own.sum() / sum(norms), rel=1e-4)
        assert row["items"] == pytest.approx(inside.mean())
    assert found[["share", "items"]].sum().tolist() == pytest.approx([1, 1])


def test_readout_has_the_closed_form():
    """In the weights of an action's row of the unembedding it is the mean of (p - y) x."""
    model = shared_model("llama")
    items = TRIAGE.sample(64, seed=1)
    gradients, residual = batch_gradients(
        model, TRIAGE, items, {"symmetric": OBJECTIVES["symmetric"]}, batch_size=64
    )
    with torch.no_grad():
        x = model.final_norm(residual[N_LAYERS])
        p = model.unembed(x)[:, list(TRIAGE.actions)].softmax(1)
    y = torch.nn.functional.one_hot(items.labels, 2)
    expected = torch.zeros(model.d_vocab, model.d_model)
    expected[list(TRIAGE.actions)] = (p - y).T @ x / 64
    found = gradients["symmetric"].mean["unembed"]
    torch.testing.assert_close(found.view_as(expected), expected, atol=1e-6, rtol=1e-4)


def test_debiasing_takes_off_what_noise_adds():
    """Where the posterior is met, the mean gradient is zero and all that is seen is noise."""
    model = HookedModel.from_model(tiny_model("llama"), self_test=False)
    with torch.no_grad():
        model.model.get_output_embeddings().weight.zero_()  # type: ignore[union-attr]
    fair = tasks.get("triage", linear=[0.0], xor=[], n_unneeded=0)
    one = {"symmetric": OBJECTIVES["symmetric"]}
    squared, biased = [], []
    for seed in range(12):
        spec = SPEC.model_copy(update={"seed": seed})
        table = measure_gradients(model, fair, one, spec=spec)["gradients"]
        row = wide(table, "part").loc["symmetric", "all"]
        squared.append(row["norm"] ** 2)
        biased.append(row["noise"] ** 2 / N_BATCHES)
    assert np.mean(squared) < 0.6 * np.mean(biased)
    assert np.median(squared) < 0.3 * np.mean(biased)


def test_scale_changes_the_norm_alone():
    utility = np.array([[0.2, 0.0], [0.0, 1.8]])
    scaled = {
        "symmetric": OBJECTIVES["symmetric"],
        "one": objectives.get("utility_weighted", utility=utility.tolist()),
        "ten": objectives.get("utility_weighted", utility=(10 * utility).tolist()),
    }
    found = measure_gradients(shared_model("llama"), TRIAGE, scaled, spec=SPEC)
    parts = wide(found["gradients"], "part")
    one, ten = parts.loc["one"], parts.loc["ten"]
    for measure in ("norm", "noise"):
        np.testing.assert_allclose(ten[measure], 10 * one[measure], rtol=1e-3, atol=1e-5)
    for measure in ("snr", "share", "cosine"):
        np.testing.assert_allclose(ten[measure], one[measure], rtol=1e-3, atol=1e-5)
    latents = wide(found["gradients_latents"], "layer", "latent")
    for measure in ("share", "chance", "snr"):
        np.testing.assert_allclose(latents.loc["ten", measure], latents.loc["one", measure], 1e-4)
    np.testing.assert_allclose(latents.loc["ten", "push"], 10 * latents.loc["one", "push"], 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_parts_hold_every_weight_once_in_every_family(family):
    model = shared_model(family)
    parts = weights_by_part(model)
    held = [id(weight) for weights in parts.values() for weight in weights]
    assert sorted(held) == sorted(id(weight) for weight in model.model.parameters())
    blocks = {f"{kind} {layer}" for layer in range(N_LAYERS) for kind in ("attn", "mlp")}
    tied = CONFIGS[family]().tie_word_embeddings
    assert set(parts) == {"embed", *blocks, "norm", *(() if tied else ("unembed",))}
    embedding = model.model.get_input_embeddings()
    assert any(weight is embedding.weight for weight in parts["embed"])
    table = measure_gradients(model, TRIAGE, OBJECTIVES, spec=FEW)["gradients"]
    assert set(table["part"]) == {*parts, "all"}
    assert (table[table["measure"] == "noise"]["value"] > 0).all()


@dataclass(frozen=True)
class Few(Xor):
    """A task with few items, no posterior and a latent of three values."""

    latents = (Latent("first"), Latent("sum", 3, needed=False))

    def sample(self, n, *, seed=0, split="test"):
        items = super().sample(min(n, 100), seed=seed, split=split)
        z = items.latents
        return replace(items, latents={"first": z["first"], "sum": z["first"] + z["second"]})


def test_a_small_split_gives_smaller_batches_and_noise_as_of_whole_ones():
    model = shared_model("llama")
    found = measure_gradients(model, Few(), OBJECTIVES, spec=SPEC)
    assert set(found) == {"gradients", "gradients_latents"}
    size = 100 // MIN_BATCHES
    items = Few().sample(100, seed=SPEC.seed, split="train")
    items = items.select(slice(0, size * MIN_BATCHES))
    gradients, residual = batch_gradients(
        model, Few(), items, {"symmetric": OBJECTIVES["symmetric"]}, batch_size=size
    )
    of = gradients["symmetric"]
    squared = sum(float(x.square().sum()) for x in of.mean.values())
    trace = (sum(of.squared_norms.values()) - squared) * MIN_BATCHES / (MIN_BATCHES - 1)
    noise = wide(found["gradients"], "part").loc[("symmetric", "all"), "noise"]
    assert noise == pytest.approx((trace * size / BATCH_SIZE) ** 0.5, rel=1e-4)
    # Three values: the plane of their means.
    x, g = residual[2].double(), of.streams[2].double()
    means = torch.stack([x[items.latents["sum"] == v].mean(0) for v in range(3)])
    plane = torch.linalg.qr((means - means.mean(0))[:2].T).Q
    row = wide(found["gradients_latents"], "layer", "latent").loc[("symmetric", 2, "sum")]
    assert row["share"] == pytest.approx(float((g @ plane).square().sum() / g.square().sum()))
    assert row["chance"] == 2 / 32
    assert row[["push", "snr"]].isna().all()


def test_a_pair_has_the_weighted_loss_at_each_of_its_costs():
    models = {arm: shared_model("llama") for arm in ("before", "after")}
    costs = task_costs(TRIAGE, {"w1.8": (0.2, 1.8)})
    found = pair_tables(Pair(models, TRIAGE, SPEC, costs))
    own = measure_gradients(models["after"], TRIAGE, OBJECTIVES, spec=SPEC)
    assert set(found) == set(own)
    for name, table in found.items():
        assert list(table.columns[:6]) == ["task", "regime", "arm", "seed", "step", "objective"]
        assert set(table["objective"]) == {"symmetric", "w1.8"}
        for costs, ours in {"symmetric": "symmetric", "w1.8": "weighted"}.items():
            after = table[(table["arm"] == "after") & (table["objective"] == costs)]["value"]
            expected = own[name][own[name]["objective"] == ours]["value"]
            np.testing.assert_allclose(after, expected, rtol=1e-4, atol=1e-6)
