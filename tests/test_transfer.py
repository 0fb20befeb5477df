"""Transfer of probes between checkpoints whose relation is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechinterp.errors import AnalysisError
from probes.crossfit import ProbeConfig
from probes.probe import probe_latents
from probes.transfer import probe_transfer

CONFIG = ProbeConfig(strengths=(0.1, 0.01))


def streams(seed=0, n=400, d=10):
    rng = np.random.default_rng(seed)
    latents = {
        "kept": torch.tensor(rng.integers(0, 2, size=n)),
        "turned": torch.tensor(rng.integers(0, 3, size=n)),
    }
    basis = torch.linalg.qr(torch.tensor(rng.normal(size=(d, d)))).Q * 4
    kept = (latents["kept"] * 2 - 1)[:, None] * basis[0]
    one_hot = torch.nn.functional.one_hot(latents["turned"], 3).double()
    noise = torch.tensor(rng.normal(size=(2, n, d)))
    before = noise[0] + kept + one_hot @ basis[1:4]
    after = noise[1] + kept + one_hot @ basis[4:7]
    return before, after, latents


def values(table):
    return table.set_index(["layer", "latent", "fitted_on", "scored_on", "measure"]).value


def test_what_kept_its_direction_transfers_and_what_turned_does_not():
    before, after, latents = streams()
    groups = torch.arange(len(before))
    table = probe_transfer({2: before}, {2: after}, latents, groups=groups, config=CONFIG)
    value = values(table)
    for fitted_on, scored_on in (("before", "after"), ("after", "before")):
        assert value[2, "kept", fitted_on, scored_on, "auroc"] > 0.99
        assert value[2, "turned", fitted_on, scored_on, "auroc"] < 0.65
        assert value[2, "turned", fitted_on, fitted_on, "auroc"] > 0.99
    assert value[2, "kept", "before", "after", "cosine"] > 0.8
    assert abs(value[2, "turned", "before", "after", "cosine"]) < 0.3
    assert len(table) == 2 * (4 * 4 + 1)


def test_a_checkpoint_transfers_to_itself_as_its_own_probe_does():
    before, _, latents = streams()
    groups = torch.arange(len(before)) // 2
    transferred = values(
        probe_transfer({0: before}, {0: before}, latents, groups=groups, config=CONFIG)
    )
    own = probe_latents({0: before}, latents, groups=groups, config=CONFIG).table
    for row in own.itertuples():
        for pair in (("before", "after"), ("after", "before"), ("before", "before")):
            assert transferred[0, row.latent, *pair, row.measure] == pytest.approx(row.value)
    assert transferred[0, "turned", "before", "after", "cosine"] == pytest.approx(1.0)


def test_an_inverted_direction_is_worse_than_chance():
    before, _, latents = streams()
    mirrored = 2 * before.mean(0) - before
    table = probe_transfer(
        {0: before}, {0: mirrored}, latents, groups=torch.arange(len(before)), config=CONFIG
    )
    assert values(table)[0, "kept", "before", "after", "auroc"] < 0.01
    assert values(table)[0, "kept", "before", "after", "cosine"] == pytest.approx(-1, abs=1e-3)


def test_invalid_input_is_named():
    before, after, latents = streams()
    groups = torch.arange(len(before))
    with pytest.raises(AnalysisError, match=r"after: has layers \[1\], before has \[0\]"):
        probe_transfer({0: before}, {1: after}, latents, groups=groups)
    with pytest.raises(AnalysisError, match=r"after\[0\]: expected shape"):
        probe_transfer({0: before}, {0: after[1:]}, latents, groups=groups, config=CONFIG)
