"""What must hold exactly, or be refused: own activations, everything, padding, memory, hooks."""

from __future__ import annotations

import pytest
import torch
from tiny_models import D_VOCAB, N_LAYERS, random_tokens, shared_model, tiny_model

from mechinterp.architectures import Location
from mechinterp.errors import ModelError
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Intervention
from mechinterp.patching import logit_difference, sweep
from mechinterp.patching.naive import naive_sweep
from mechinterp.patching.plan import GRAINS
from mechinterp.patching.suffix import Suffix

N_ITEMS, N_POSITIONS = 3, 6
CORRECT, WRONG = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])
METRIC = logit_difference(correct=CORRECT, wrong=WRONG)
CHANGED = torch.tensor([1, 2, 2])
FAMILIES = ["llama", "gpt2", "gpt_neox", "gemma2"]


def pairs() -> dict[str, torch.Tensor]:
    """Prompts that differ in one token each."""
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=1)
    corrupt = clean.clone()
    rows = torch.arange(N_ITEMS)
    corrupt[rows, CHANGED] = (corrupt[rows, CHANGED] + 3) % D_VOCAB
    return {"clean": clean, "corrupt": corrupt}


@pytest.mark.parametrize("run", [sweep, naive_sweep])
@pytest.mark.parametrize("grain", GRAINS)
def test_own_activations_have_exactly_no_effect(grain, run):
    tokens = pairs()["clean"]
    options = {"neurons": [0, 9, 30]} if grain == "neuron" else {}
    for direction in ("denoising", "noising"):
        result = run(
            shared_model("llama"),
            clean=tokens,
            corrupt=tokens,
            grain=grain,
            metric=METRIC,
            direction=direction,
            **options,
        )
        if run is naive_sweep and grain == "pattern":  # recomputes what the patterns give
            torch.testing.assert_close(result.effect, 0 * result.effect, rtol=0, atol=1e-5)
        else:
            assert torch.equal(result.effect, 0 * result.effect)


@pytest.mark.parametrize("family", FAMILIES)
def test_patching_everything_is_exactly_the_source_s_run(family):
    """Clean activations at all that a later part reads, in the corrupt run: bit for bit."""
    model, prompts = shared_model(family), pairs()
    components = ["attn_out", "mlp_out"], ["head", "mlp_out"], ["head", "neuron"]
    cuts = [[f"resid_pre.{layer}"] for layer in range(N_LAYERS)]
    cuts += [[f"resid_post.{layer}"] for layer in range(N_LAYERS)]
    cuts += [
        ["resid_pre.0", *(f"{grain}.{layer}" for grain in grains for layer in range(N_LAYERS))]
        for grains in components
    ]
    expected = model.forward(prompts["clean"])
    assert not torch.equal(model.forward(prompts["corrupt"]), expected)
    for sites in cuts:
        values = model.capture(prompts["clean"], sites)
        patches = [Intervention(site, values[site]) for site in sites]
        assert torch.equal(model.run_with_interventions(prompts["corrupt"], patches), expected)
        reverse = model.capture(prompts["corrupt"], sites)
        patches = [Intervention(site, reverse[site]) for site in sites]
        logits = model.run_with_interventions(prompts["clean"], patches)
        assert torch.equal(logits, model.forward(prompts["corrupt"]))


@pytest.mark.parametrize("run", [sweep, naive_sweep])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_cell_that_is_everything_has_the_source_s_metric(family, run):
    """The embedding of the one token that differs; the last residual at the decision."""
    model, rows = shared_model(family), torch.arange(N_ITEMS)
    pre, post = (
        run(model, **pairs(), grain=grain, metric=METRIC) for grain in ("resid_pre", "resid_post")
    )
    for values in (pre.values[rows, 0, CHANGED], post.values[:, -1, -1]):
        if run is naive_sweep:
            assert torch.equal(values, pre.clean_metric)
        torch.testing.assert_close(values, pre.clean_metric, rtol=0, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_padded_batches_equal_single_items(family, grain, side):
    model, prompts, lengths = shared_model(family), pairs(), [6, 5, 4]
    n, position = torch.tensor(lengths)[:, None], torch.arange(N_POSITIONS)
    mask = (position >= N_POSITIONS - n if side == "left" else position < n).long()
    options = {"grain": grain, "neurons": [0, 9, 30] if grain == "neuron" else None}
    batch = sweep(
        model,
        **prompts,
        metric=METRIC,
        attention_mask=mask,
        decision=-1 if side == "left" else n[:, 0] - 1,
        **options,
    )
    for item, length in enumerate(lengths):
        real = slice(N_POSITIONS - length, None) if side == "left" else slice(length)
        one = {name: tokens[item : item + 1, real] for name, tokens in prompts.items()}
        metric = logit_difference(correct=CORRECT[[item]], wrong=WRONG[[item]])
        alone = sweep(model, **one, metric=metric, **options)
        values = batch.values[item]
        if "position" in batch.axes:
            padding = (mask[item] == 0).expand_as(values)
            assert bool((values[padding] == batch.corrupt_metric[item]).all())
            values = values[..., real]
        torch.testing.assert_close(values, alone.values[0], rtol=0, atol=1e-5)
        for name in ("clean_metric", "corrupt_metric"):
            mine, theirs = getattr(batch, name)[item], getattr(alone, name)[0]
            torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("grain", ["resid_pre", "mlp_out", "head", "k"])
def test_a_sweep_out_of_memory_halves_its_batch_and_goes_on(grain, monkeypatch):
    model, block, rows = shared_model("llama"), Suffix.block, []
    whole = sweep(model, **pairs(), grain=grain, metric=METRIC)

    def small(suffix, layer, x, items):
        rows.append(len(x))
        if len(x) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return block(suffix, layer, x, items)

    monkeypatch.setattr(Suffix, "block", small)
    monkeypatch.setattr("mechinterp.patching.sweeps.find_obstacle", lambda *_: None)
    again = sweep(model, **pairs(), grain=grain, metric=METRIC)
    assert max(rows) > 2 >= min(rows)
    torch.testing.assert_close(again.values, whole.values, rtol=0, atol=1e-5)


@pytest.mark.parametrize("times", [0, 2])
@pytest.mark.parametrize("grain", ["q", "k", "v"])
def test_a_write_that_does_not_happen_once_per_run_is_refused(grain, times, monkeypatch):
    model, on_write = HookedModel(tiny_model("llama")), Location.on_write

    def other(location, edit):
        return on_write(location, lambda tensor: [edit(tensor) for _ in range(times)])

    monkeypatch.setattr(Location, "on_write", other)
    with pytest.raises(ModelError, match=rf"{grain}\.\d fired {times} times"):
        sweep(model, **pairs(), grain=grain, metric=METRIC)
    with pytest.raises(ModelError, match=f"fired {times} times"):
        model.run_with_interventions(
            pairs()["clean"], [Intervention(f"{grain}.1", torch.zeros(()))]
        )
