"""Transfer of probes between checkpoints whose relation is known, and the changes it comes to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechinterp.errors import AnalysisError
from mechinterp.statistics import bootstrap_t_interval
from probes.crossfit import ProbeConfig
from probes.measures import score
from probes.paired import centre, layer_shifts, paired_changes, reached
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


def planted(z, direction, noise, seed):
    """The binary latent z along a direction, in noise."""
    rng = np.random.default_rng(seed)
    signal = (z * 2.0 - 1)[:, None] * direction
    return signal + noise * torch.tensor(rng.normal(size=(len(z), len(direction))))


@pytest.fixture(scope="module")
def known():
    """Layers of known change: 1 the same but for noise, 2 rotated, 3 noisier, 4 nothing to read."""
    n, d = 600, 8
    rng = np.random.default_rng(0)
    z = torch.tensor(rng.integers(0, 2, size=n))
    along, other = torch.eye(d).double()[:2]
    turn = torch.linalg.qr(torch.tensor(rng.normal(size=(d, d)))).Q
    clear = planted(z, along, 1.0, 1)
    before = {1: clear, 2: clear, 3: clear, 4: planted(z, 0 * other, 1.0, 2)}
    after = {
        1: planted(z, along, 1.0, 3),
        2: clear @ turn,
        3: planted(z, along, 3.0, 4),
        4: planted(z, 0 * other, 1.0, 5),
    }
    groups = torch.arange(n) // 2
    return probe_transfer(before, after, {"z": z}, groups=groups, config=CONFIG)


def values(transfer):
    keys = ["layer", "latent", "fitted_on", "scored_on", "measure"]
    return transfer.scores().set_index(keys).value


def changes(transfer):
    return paired_changes(transfer).set_index(["comparison", "layer", "latent", "measure"])


def test_what_kept_its_direction_transfers_and_what_turned_does_not():
    before, after, latents = streams()
    groups = torch.arange(len(before))
    transfer = probe_transfer({2: before}, {2: after}, latents, groups=groups, config=CONFIG)
    value, cosines = values(transfer), transfer.directions.set_index("latent").cosine
    for fitted_on, scored_on in (("before", "after"), ("after", "before")):
        assert value[2, "kept", fitted_on, scored_on, "auroc"] > 0.99
        assert value[2, "turned", fitted_on, scored_on, "auroc"] < 0.65
        assert value[2, "turned", fitted_on, fitted_on, "auroc"] > 0.99
    assert cosines["kept"] > 0.8
    assert abs(cosines["turned"]) < 0.3


def test_a_checkpoint_transfers_to_itself_as_its_own_probe_does():
    before, _, latents = streams()
    groups = torch.arange(len(before)) // 2
    transfer = probe_transfer({0: before}, {0: before}, latents, groups=groups, config=CONFIG)
    value = values(transfer)
    own = probe_latents({0: before}, latents, groups=groups, config=CONFIG).table
    for row in own.itertuples():
        for pair in (("before", "after"), ("after", "before"), ("before", "before")):
            assert value[0, row.latent, *pair, row.measure] == pytest.approx(row.value, abs=1e-6)
    found = transfer.directions.set_index("latent")
    assert found.cosine["turned"] == pytest.approx(1.0)
    assert found.halves["turned"] == pytest.approx(found.ceiling["turned"])
    assert found.ceiling["turned"] < 0.999
    table = paired_changes(transfer)
    assert table[["value", "low", "high"]].abs().max().max() < 1e-9
    assert (table["p"] == 1).all()


def test_an_inverted_direction_is_worse_than_chance():
    before, _, latents = streams()
    mirrored = 2 * before.mean(0) - before
    transfer = probe_transfer(
        {0: before}, {0: mirrored}, latents, groups=torch.arange(len(before)), config=CONFIG
    )
    assert values(transfer)[0, "kept", "before", "after", "auroc"] < 0.01
    cosines = transfer.directions.set_index("latent").cosine
    assert cosines["kept"] == pytest.approx(-1, abs=1e-3)


def test_information_lost_and_direction_moved_are_told_apart(known):
    row = changes(known)
    for measure, worse in (("auroc", -1), ("accuracy", -1), ("log_loss", 1)):

        def is_worse(comparison, layer, measure=measure, worse=worse):
            found = row.loc[comparison, layer, "z", measure]
            bound = found.low if worse > 0 else -found.high
            return bound > 0 and found.q < 0.05

        assert not is_worse("own", 1)
        assert not is_worse("moved_forward", 1)
        # A rotated representation has transfer loss but no information loss.
        assert abs(row.value["own", 2, "z", measure]) < 0.01
        assert not is_worse("own", 2)
        assert is_worse("moved_forward", 2)
        assert is_worse("moved_back", 2)
        # More noise along the same direction is the opposite.
        assert is_worse("own", 3)
    assert abs(row.value["moved_forward", 3, "z", "auroc"]) < 0.02
    assert row.low["own", 4, "z", "auroc"] < 0 < row.high["own", 4, "z", "auroc"]


def test_the_parts_add_up(known):
    row, value = changes(known).value, values(known)
    for layer in known.layers:
        for measure in ("log_loss", "auroc", "brier"):
            total = (
                value[layer, "z", "before", "after", measure]
                - value[layer, "z", "before", "before", measure]
            )
            parts = row["own", layer, "z", measure] + row["moved_forward", layer, "z", measure]
            assert parts == pytest.approx(total)


def test_changes_are_paired_over_groups(known):
    """For log-loss, the mean over items of the difference, with the interval of plain numbers."""
    labels = known.codes["z"][:, None]
    for layer in (1, 3):
        index = known.layers.index(layer)
        loss = {
            source: -known.log_probabilities[source, source, "z"][index].gather(1, labels)[:, 0]
            for source in ("before", "after")
        }
        expected = bootstrap_t_interval(
            (loss["after"] - loss["before"]).numpy(), groups=known.groups.numpy()
        )
        row = changes(known).loc["own", layer, "z", "log_loss"]
        assert (row.value, row.low, row.high) == pytest.approx(
            (expected.mean, expected.low, expected.high)
        )


def test_the_interval_of_an_auroc_change_is_that_of_fitting_nothing_again(known):
    """Against a bootstrap over groups that measures AUROC anew on each resample."""
    index, labels = known.layers.index(3), known.codes["z"]
    rng = np.random.default_rng(0)
    n_groups = int(known.groups.max()) + 1
    drawn = []
    for _ in range(200):
        picked = torch.tensor(rng.integers(0, n_groups, size=n_groups))
        rows = torch.stack([2 * picked, 2 * picked + 1], 1).flatten()
        areas = {
            source: score(
                known.log_probabilities[source, source, "z"][index][rows],
                labels[rows],
                known.folds[rows],
            )["auroc"]
            for source in ("before", "after")
        }
        drawn.append(areas["after"] - areas["before"])
    row = changes(known).loc["own", 3, "z", "auroc"]
    low, high = np.quantile(drawn, [0.025, 0.975])
    width = high - low
    assert row.low == pytest.approx(low, abs=0.2 * width)
    assert row.high == pytest.approx(high, abs=0.2 * width)


def test_directions_have_a_ceiling_and_a_floor(known):
    row = known.directions.set_index("layer")
    assert row.cosine[1] > 0.9
    assert row.ceiling[1] == pytest.approx(row.halves[1], abs=0.1)
    assert row.corrected[1] == pytest.approx(1, abs=0.1)
    assert row.null_low[1] < 0 < row.null_high[1] < row.cosine[1]
    assert abs(row.corrected[2]) < 0.9
    assert row.ceiling[2] > 0.8
    assert row.low[2] < row.cosine[2] < row.high[2]
    # Where there is nothing to read the two halves do not agree either.
    assert row.ceiling[4] < 0.7


def test_reached_and_centre_by_hand():
    layers = torch.tensor([1.0, 2, 4])
    curves = torch.tensor([[0.0, 0.5, 1.0], [1.0, 0.2, 0.1], [-1.0, 0.95, 1.0], [0.0, 1.0, 0.5]])
    assert reached(curves, layers).tolist() == pytest.approx([3.8, 1, 2, 1.95])
    assert centre(curves, layers).tolist() == pytest.approx(
        [(1 + 4) / 1.5, (1 + 0.4 + 0.4) / 1.3, (1.9 + 4) / 1.95, (2 + 2) / 1.5]
    )


def test_a_latent_that_is_readable_later_is_called_so():
    n, d = 500, 6
    rng = np.random.default_rng(0)
    z = {name: torch.tensor(rng.integers(0, 2, size=n)) for name in ("late", "same", "absent")}
    axes = dict(zip(z, torch.eye(d).double(), strict=False))
    strength = {  # by layer
        "before": {"late": (0.3, 2, 2, 2), "same": (0.3, 2, 2, 2), "absent": (0,) * 4},
        "after": {"late": (0.1, 0.3, 0.5, 2), "same": (0.3, 2, 2, 2), "absent": (0,) * 4},
    }
    made = {
        source: {
            layer: sum(
                (strength[source][name][layer] * (values * 2.0 - 1)[:, None] * axes[name])
                for name, values in z.items()
            )
            + torch.tensor(rng.normal(size=(n, d)))
            for layer in range(4)
        }
        for source in strength
    }
    transfer = probe_transfer(
        made["before"], made["after"], z, groups=torch.arange(n), config=CONFIG
    )
    row = layer_shifts(transfer).set_index(["latent", "statistic"])
    for statistic in ("reached", "centre"):
        assert row.low["late", statistic] > 0
        assert row.q["late", statistic] < 0.05
        assert row.low["same", statistic] <= 0 <= row.high["same", statistic]
        assert np.isnan(row.value["absent", statistic])
        assert np.isnan(row.q["absent", statistic])
    assert row.before["late", "reached"] == pytest.approx(1, abs=0.2)
    assert row.after["late", "reached"] > 2.5


def test_invalid_input_is_named():
    before, after, latents = streams()
    groups = torch.arange(len(before))
    with pytest.raises(AnalysisError, match=r"after: has layers \[1\], before has \[0\]"):
        probe_transfer({0: before}, {1: after}, latents, groups=groups)
    with pytest.raises(AnalysisError, match=r"after\[0\]: expected shape"):
        probe_transfer({0: before}, {0: after[1:]}, latents, groups=groups, config=CONFIG)
