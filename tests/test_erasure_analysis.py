"""Erasing a latent in the running network: the same as a hook does, and what circuits predict."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from micro_models import _BITS, xor
from tiny_models import shared_model

from analyses.erasure import Erasure, fit_erasures, measure_erasure, run_erasures
from analyses.streams import DecisionStreams, read_streams
from mechinterp import tasks
from mechinterp.interventions import Intervention
from mechinterp.randomness import derive_rng
from mechinterp.sites import Site
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Latent, Task
from probes.probe import probe_latents

SPEC = AnalysisSpec(probe_items=300, erasure_items=200, probe_folds=3, batch_size=64)


@dataclass(frozen=True)
class Xor(Task):
    """The exclusive or of two marked bits; an unmarked one stands before them."""

    name = "xor"
    actions = (0, 1)
    action_names = ("0", "1")
    latents = (
        Latent("first"),
        Latent("second"),
        Latent("answer"),
        Latent("filler", needed=False),
    )
    vocab_size = len(_BITS)
    n_positions = 6
    utility = ((1.0, 0.0), (0.0, 1.0))

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        first, second, filler, other = derive_rng(seed, "xor", split).integers(0, 2, size=(4, n))
        prompts = [
            [_BITS.index(token) for token in (str(z), f"m{a}", str(o), f"n{b}", "1", "=")]
            for a, b, z, o in zip(first, second, filler, other, strict=True)
        ]
        latents = {"first": first, "second": second, "answer": first ^ second, "filler": filler}
        return Items(
            tokens=torch.tensor(prompts),
            labels=torch.tensor(first ^ second),
            latents={name: torch.tensor(values) for name, values in latents.items()},
            groups=torch.arange(n),
            roles=np.full((n, 6), ""),
        )

    def counterfactual_pairs(self, n, *, seed=0, split="test"):
        raise NotImplementedError

    def control_types(self, items):
        return torch.arange(len(items)) // 2


def test_a_circuit_loses_what_it_reads_where_it_reads_it():
    """head.0.0 fetches the first bit in block 0; the second and the answer come in block 1."""
    model = xor().model
    table = measure_erasure(model, Xor(), spec=SPEC)
    at = table.set_index(["layer", "latent", "kind", "draw", "measure"]).sort_index()
    assert at.base.xs("accuracy", level="measure").eq(1).all()
    for layer, latent in ((1, "first"), (2, "answer")):
        row = at.loc[layer, latent, "latent", 0]
        assert row.loc["accuracy"].value < 0.7
        assert row.loc["log_odds"].low > 2
        assert row.loc["log_score"].low > 0
        assert row.loc["auroc"].base == 1
        assert row.loc["accuracy", "rank"] == 1
        # The stream has few directions, so that any of them matters a little.
        controls = at.loc[layer, latent].drop(index="latent").xs("accuracy", level="measure")
        assert controls.value.min() > row.loc["accuracy"].value + 0.1
    for layer, latent in ((2, "first"), (1, "second"), (1, "answer"), (1, "filler"), (2, "filler")):
        assert at.loc[layer, latent, "latent", 0, "accuracy"].value > 0.98, (layer, latent)
    assert set(at.xs("random", level="kind").index.get_level_values("draw")) == {0, 1, 2}
    assert not table.set_index("latent").needed["filler"].any()


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "qwen2_sliding"])
def test_equals_an_intervention_in_a_full_run(family):
    model = shared_model(family)
    task = tasks.get("triage")
    items = task.sample(70, split="test")
    fitted_on = task.sample(200, split="train")
    streams = read_streams(model, fitted_on, task)
    erasures = list(fit_erasures(streams, fitted_on, task, spec=SPEC))
    assert {erasure.layer for erasure in erasures} == {1, 2, 3}
    found = run_erasures(model, items, task, erasures, batch_size=50)
    for erasure, logits in zip(erasures, found, strict=True):
        expected = intervened(model, items, task, erasure)
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-3)


def intervened(model, items, task, erasure: Erasure):
    site = Site("resid_post", erasure.layer - 1)
    edit = Intervention(site, lambda x: erasure.eraser(x.double()).to(x), positions=-1)
    logits = model.run_with_interventions(items.tokens, [edit], positions=-1)
    return logits[:, list(task.actions)].double()


def test_a_trained_probe_no_longer_reads_an_erased_latent():
    """In noise, unlike above, the sampling error of an eraser hides nothing that a probe finds."""
    rng = derive_rng(0, "noisy streams")
    task = Xor()
    fitted_on, items = (task.sample(2000, split=split) for split in ("train", "test"))

    def stream(some: Items) -> torch.Tensor:
        noise = torch.tensor(rng.normal(size=(len(some), 8)))
        return noise + some.latents["first"][:, None] * torch.arange(8)

    streams = DecisionStreams({1: stream(fitted_on)}, {}, torch.zeros(2000, 2))
    found = [e for e in fit_erasures(streams, fitted_on, task, spec=SPEC) if e.draw == 0]
    x, first = stream(items), {"first": items.latents["first"]}
    left = {
        e.kind: probe_latents({1: e.eraser(x)}, first, groups=items.groups)
        .table.set_index("measure")
        .value["auroc"]
        for e in found
        if e.latent == "first"
    }
    assert left["latent"] < 0.56
    assert min(left["control"], left["random"]) > 0.9
