"""Probes against scikit-learn fold by fold, and against data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score, log_loss, roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechinterp.errors import AnalysisError
from probes.crossfit import ProbeConfig, cross_fit
from probes.folds import grouped_folds
from probes.measures import MEASURES, auroc, score
from probes.probe import SURFACE_LAYER, control_labels, probe_latents
from probes.surface import surface_features


def activations(codes, n_values, d=12, noise=1.0, seed=0):
    """Activations that hold a latent linearly, with features of very different scale and place."""
    rng = np.random.default_rng(seed)
    clean = np.eye(n_values)[codes] @ rng.normal(size=(n_values, d))
    place = rng.normal(size=d) * 30
    return torch.tensor(
        (clean + noise * rng.normal(size=(len(codes), d))) * rng.gamma(1, size=d) + place
    )


def naive_cross_fit(X, y, folds, strengths, n_folds):
    """The same nested cross-validation written out with scikit-learn."""

    def fitted(train, strength):
        C = 1 / (strength * train.sum())
        regression = LogisticRegression(C=C, solver="newton-cholesky", tol=1e-10, max_iter=500)
        return make_pipeline(StandardScaler(), regression).fit(X[train], y[train])

    log_p, chosen = np.zeros((len(y), y.max() + 1)), []
    for f in range(n_folds):
        losses = np.zeros(len(strengths))
        for g in ((f - 1) % n_folds, (f + 1) % n_folds):
            inner = folds == g
            for s, strength in enumerate(strengths):
                model = fitted((folds != f) & ~inner, strength)
                p = model.predict_log_proba(X[inner])
                losses[s] -= p[np.arange(inner.sum()), y[inner]].sum()
        chosen.append(strengths[losses.argmin()])
        log_p[folds == f] = fitted(folds != f, chosen[-1]).predict_log_proba(X[folds == f])
    return log_p, chosen


@pytest.mark.parametrize("n_values", [2, 3])
def test_equals_nested_cross_validation_with_scikit_learn(n_values):
    rng = np.random.default_rng(1)
    codes = rng.integers(0, n_values, size=150)
    X = activations(codes, n_values, noise=3.0)
    labels = torch.tensor(np.stack([codes, rng.permutation(codes)], 1))
    folds = grouped_folds(torch.arange(150), labels, 5)
    config = ProbeConfig(strengths=(1.0, 0.1, 0.01), tol=1e-8)
    fit = cross_fit(X, labels, n_values, folds, config)
    for column in range(2):
        expected, chosen = naive_cross_fit(
            X.numpy(), labels[:, column].numpy(), folds.numpy(), config.strengths, 5
        )
        assert fit.strengths[:, column].tolist() == pytest.approx(chosen)
        np.testing.assert_allclose(fit.log_probabilities[:, column], expected, atol=1e-5)


def test_fits_in_parts_equal_fits_at_once(monkeypatch):
    rng = np.random.default_rng(2)
    codes = rng.integers(0, 2, size=100)
    X, labels = activations(codes, 2), torch.tensor(codes)[:, None]
    folds = grouped_folds(torch.arange(100), labels, 5)
    config = ProbeConfig(strengths=(0.1, 0.01), tol=1e-8)
    whole = cross_fit(X, labels, 2, folds, config)
    monkeypatch.setattr("probes.grid._MAX_LOGITS", 1000)
    parts = cross_fit(X, labels, 2, folds, config)
    torch.testing.assert_close(
        whole.log_probabilities, parts.log_probabilities, atol=1e-5, rtol=1e-5
    )


def test_no_fold_is_scored_by_a_probe_that_saw_it():
    """Labels of one fold are replaced by noise: its predictions must not notice."""
    rng = np.random.default_rng(3)
    labels = torch.tensor(rng.integers(0, 2, size=(120, 1)))
    X = activations(labels[:, 0].numpy(), 2)
    folds = grouped_folds(torch.arange(120), labels, 4)
    config = ProbeConfig(n_folds=4, strengths=(1.0, 0.01))
    before = cross_fit(X, labels, 2, folds, config)
    for fold in range(4):
        rows = folds == fold
        changed = torch.where(rows[:, None], 1 - labels, labels)
        after = cross_fit(X, changed, 2, folds, config)
        torch.testing.assert_close(
            after.log_probabilities[rows], before.log_probabilities[rows], atol=1e-3, rtol=1e-3
        )
        assert after.strengths[fold] == before.strengths[fold]


@pytest.mark.parametrize("n_values", [2, 4])
def test_measures_equal_scikit_learn(n_values):
    rng = np.random.default_rng(4)
    labels = np.arange(200) % n_values
    logits = torch.tensor(rng.normal(size=(200, n_values)) + np.eye(n_values)[labels])
    log_p = logits.log_softmax(1)
    folds = torch.tensor(rng.permutation(200) % 5)
    measured = score(log_p, torch.tensor(labels), folds)
    p = log_p.exp().numpy()
    areas = []
    for fold in range(5):
        rows = (folds == fold).numpy()
        scores = p[rows, 1] if n_values == 2 else p[rows]
        areas.append(roc_auc_score(labels[rows], scores, multi_class="ovr"))
    assert measured["auroc"] == pytest.approx(np.mean(areas))
    assert measured["accuracy"] == pytest.approx((p.argmax(1) == labels).mean())
    assert measured["balanced_accuracy"] == pytest.approx(
        balanced_accuracy_score(labels, p.argmax(1))
    )
    assert measured["log_loss"] == pytest.approx(log_loss(labels, p))


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 40),
    levels=st.integers(1, 12),
    batch=st.integers(1, 3),
    seed=st.integers(0, 999),
)
def test_auroc_with_ties_equals_scikit_learn(n, levels, batch, seed):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, levels, size=(batch, n)).astype(float)
    positive = rng.permuted(np.tile(np.arange(n) < max(1, n // 3), (batch, 1)), axis=1)
    areas = auroc(torch.tensor(scores), torch.tensor(positive))
    for row in range(batch):
        assert areas[row].item() == pytest.approx(roc_auc_score(positive[row], scores[row]))


def test_auroc_without_a_class_is_nan():
    assert auroc(torch.randn(5), torch.ones(5, dtype=torch.bool)).isnan()


def test_what_is_there_is_found_and_what_is_not_is_not():
    rng = np.random.default_rng(5)
    n = 600
    latents = {
        "here": torch.tensor(rng.integers(0, 2, size=n)),
        "absent": torch.tensor(rng.integers(0, 2, size=n)),
        "digit": torch.tensor(rng.integers(0, 4, size=n) * 2 + 1),
    }
    streams = {
        0: torch.tensor(rng.normal(size=(n, 10))),
        3: activations(latents["here"].numpy(), 2, d=10, noise=0.3)
        + activations((latents["digit"].numpy() - 1) // 2, 4, d=10, noise=0.3, seed=1),
    }
    types = torch.tensor(rng.integers(0, 200, size=n))
    result = probe_latents(streams, latents, groups=torch.arange(n), control_types=types)
    value = result.table.set_index(["layer", "latent", "kind", "measure"]).value
    assert len(result.table) == 2 * 3 * (8 + 7)
    assert value[3, "here", "latent", "auroc"] > 0.99
    assert value[3, "digit", "latent", "accuracy"] > 0.9
    assert value[3, "here", "latent", "selectivity"] > 0.4
    for layer, name in ((0, "here"), (3, "absent"), (0, "absent")):
        assert abs(value[layer, name, "latent", "auroc"] - 0.5) < 0.1
        assert value[layer, name, "latent", "log_loss"] < np.log(2) + 0.03
        assert abs(value[layer, name, "latent", "selectivity"]) < 0.12
    assert result.values["digit"] == (1, 3, 5, 7)
    assert result.layers == (0, 3)
    probability = result.probabilities("digit", 3)
    torch.testing.assert_close(probability.sum(1), torch.ones(n, dtype=torch.float64))
    picked = probability[torch.arange(n), (latents["digit"] - 1) // 2]
    assert value[3, "digit", "latent", "log_loss"] == pytest.approx(-picked.log().mean().item())


def test_a_probe_that_can_memorise_types_has_no_selectivity():
    """Activations that are the type itself: the control is as easy as the latent."""
    rng = np.random.default_rng(6)
    types = rng.integers(0, 8, size=400)
    latent = torch.tensor(types % 2)
    streams = {0: torch.tensor(np.eye(8)[types] + 0.01 * rng.normal(size=(400, 8)))}
    result = probe_latents(
        streams, {"z": latent}, groups=torch.arange(400), control_types=torch.tensor(types)
    )
    value = result.table.set_index(["kind", "measure"]).value
    assert value["latent", "accuracy"] == value["control", "accuracy"] == 1.0
    assert value["latent", "selectivity"] == 0.0


def test_control_labels_are_one_value_per_type_in_the_latents_proportions():
    rng = np.random.default_rng(7)
    types = torch.tensor(rng.integers(0, 60, size=3000) ** 2)
    codes = torch.tensor((rng.uniform(size=3000) < 0.3).astype(int) + 0)
    labels = control_labels(types, codes, torch.Generator().manual_seed(0))
    for kind in types.unique():
        assert len(labels[types == kind].unique()) == 1
    assert abs(labels.double().mean() - codes.double().mean()) < 0.03
    again = control_labels(types, codes, torch.Generator().manual_seed(0))
    other = control_labels(types, codes, torch.Generator().manual_seed(1))
    assert torch.equal(labels, again)
    assert not torch.equal(labels, other)


def test_groups_never_cross_folds_and_the_seed_decides():
    rng = np.random.default_rng(8)
    latent = torch.tensor(rng.integers(0, 2, size=200))
    groups = torch.tensor(rng.integers(0, 60, size=200))
    streams = {1: activations(latent.numpy(), 2)}
    runs = [
        probe_latents(streams, {"z": latent}, groups=groups, config=ProbeConfig(seed=seed))
        for seed in (0, 0, 1)
    ]
    assert runs[0].table.equals(runs[1].table)
    assert not torch.equal(runs[0].folds, runs[2].folds)
    for group in groups.unique():
        assert len(runs[0].folds[groups == group].unique()) == 1
    assert set(runs[0].table.measure) == set(MEASURES)


def test_selectivity_of_noise_is_zero_within_its_interval():
    rng = np.random.default_rng(10)
    covered = []
    for _ in range(60):
        latent = torch.tensor(rng.integers(0, 2, size=120))
        result = probe_latents(
            {0: torch.tensor(rng.normal(size=(120, 3)))},
            {"z": latent},
            groups=torch.arange(120),
            control_types=torch.tensor(rng.integers(0, 60, size=120)),
            config=ProbeConfig(n_folds=3, strengths=(0.1,), seed=len(covered)),
        )
        row = result.table.set_index("measure").loc["selectivity"]
        assert row.low < row.value < row.high
        covered.append(row.low <= 0 <= row.high)
    assert np.mean(covered) >= 0.9


def test_planted_signal_is_read_as_well_as_theory_says():
    """Classes at +-mu with unit noise: the best accuracy is Phi(mu), the best AUROC
    Phi(sqrt(2) mu)."""
    rng = np.random.default_rng(11)
    latent = torch.tensor(rng.integers(0, 2, size=4000))
    mu, direction = 0.8, np.eye(1, 10)[0]
    x = torch.tensor(rng.normal(size=(4000, 10)) + np.outer(2 * latent.numpy() - 1, mu * direction))
    result = probe_latents({0: x}, {"z": latent}, groups=torch.arange(4000))
    value = result.table.set_index("measure")
    for measure, expected in (("accuracy", norm.cdf(mu)), ("auroc", norm.cdf(2**0.5 * mu))):
        row = value.loc[measure]
        assert row.high - row.low < 0.03
        # Four standard errors; and of what the best direction reads from these very items.
        assert abs(row.value - expected) < row.high - row.low
        best = {"accuracy": (x[:, 0] > 0) == latent, "auroc": auroc(x[:, 0], latent == 1)}[measure]
        assert row.value == pytest.approx(float(best.double().mean()), abs=0.01)
    # Bits about the label, by integrating log2 p(y | x) over x.
    grid = np.linspace(-8, 8, 4001)
    density = norm.pdf(grid - mu)
    bits = 1 + (density * -np.log2(1 + np.exp(-2 * mu * grid))).sum() * (grid[1] - grid[0])
    assert value.loc["information"].low < bits < value.loc["information"].high + 0.01
    assert abs(value.loc["calibration_error"].value) < 0.02
    information = result.information("z", 0)
    assert information.shape == (4000,)
    assert float(information.mean()) == pytest.approx(value.loc["information"].value)


def test_surface_features_are_a_baseline_of_their_own():
    rng = np.random.default_rng(12)
    n = 300
    tokens = torch.tensor(rng.integers(10, 16, size=(n, 4)))
    tokens[:, -1] = 3
    latents = {
        "in the bag": (tokens == 12).any(1).long(),
        "not there": torch.tensor(rng.integers(0, 2, size=n)),
    }
    groups = torch.arange(n)
    result = probe_latents(
        {1: torch.tensor(rng.normal(size=(n, 5)))},
        latents,
        groups=groups,
        control_types=tokens[:, 0],
        surface=surface_features(tokens, groups=groups),
    )
    surface = result.table[result.table.layer == SURFACE_LAYER]
    assert set(surface.kind) == {"surface_token", "surface_bag"}
    auroc = surface[surface.measure == "auroc"].set_index(["kind", "latent"]).value
    assert auroc["surface_bag", "in the bag"] > 0.99
    assert auroc["surface_bag", "not there"] < 0.6
    assert auroc["surface_token", "in the bag"] == pytest.approx(0.5)
    assert "selectivity" not in set(surface.measure)
    assert set(result.log_probabilities) == set(latents)
    assert len(result.log_probabilities["not there"]) == 1


def test_description_length_joins_the_table_where_asked_for():
    rng = np.random.default_rng(13)
    latent = torch.tensor(rng.integers(0, 2, size=200))
    types = torch.arange(200) // 2
    result = probe_latents(
        {0: activations(latent.numpy(), 2, noise=0.3)},
        {"z": latent},
        groups=torch.arange(200),
        control_types=types,
        with_description_length=True,
        config=ProbeConfig(strengths=(0.1, 0.01)),
    )
    value = result.table.set_index(["kind", "measure"]).value
    assert value["latent", "description_length"] < 80 < 190 < value["control", "description_length"]
    assert value["latent", "compression"] == pytest.approx(
        200 / value["latent", "description_length"]
    )


def test_features_that_are_constant_are_ignored():
    rng = np.random.default_rng(9)
    latent = torch.tensor(rng.integers(0, 2, size=200))
    X = activations(latent.numpy(), 2)
    constant = torch.cat([X, torch.full((200, 1), 0.1).double(), torch.zeros(200, 1)], 1)
    plain, padded = (
        probe_latents(
            {0: x},
            {"z": latent},
            groups=torch.arange(200),
            config=ProbeConfig(strengths=(0.1,), tol=1e-8),
        )
        for x in (X, constant)
    )
    torch.testing.assert_close(
        plain.log_probabilities["z"], padded.log_probabilities["z"], atol=1e-5, rtol=1e-5
    )


def test_invalid_input_is_named():
    latent = torch.arange(100) % 2
    X = torch.randn(100, 4)
    groups = torch.arange(100)
    with pytest.raises(AnalysisError, match=r"latents\['z'\]: has one value only"):
        probe_latents({0: X}, {"z": latent * 0}, groups=groups)
    with pytest.raises(
        AnalysisError, match=r"activations\[0\]: expected shape \[100, d_model\], got \[99, 4\]"
    ):
        probe_latents({0: X[1:]}, {"z": latent}, groups=groups)
    with pytest.raises(AnalysisError, match=r"class 1 of z \(latent\)"):
        probe_latents({0: X}, {"z": (groups < 2).long()}, groups=groups)
    with pytest.raises(AnalysisError, match=r"activations\[0\]: contains NaN"):
        probe_latents({0: X / 0}, {"z": latent}, groups=groups)
    with pytest.raises(AnalysisError, match="n_inner_folds"):
        ProbeConfig(n_folds=3, n_inner_folds=3)
    with pytest.raises(AnalysisError, match="strengths"):
        ProbeConfig(strengths=(1.0, 0.0))
