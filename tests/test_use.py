"""Decodability beside use: a closed form, a circuit that forgets what it has used, and coverage."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import pytest
import torch
from micro_models import _BITS, Builder, xor
from scipy import stats
from test_erasure_analysis import Xor

from analyses.use import DOSES, Use, _slope, favours, measure_use
from mechinterp import tasks
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Latent
from probes.crossfit import ProbeConfig
from probes.steering import fit_steering_directions, random_directions

SPEC = AnalysisSpec(probe_items=300, erasure_items=200, probe_folds=3, batch_size=512)
READOUT = 4.0  # what the networks multiply their answer by


@dataclass(frozen=True)
class KnownXor(Xor):
    """The exclusive or, of which the task knows what it comes from."""

    @property
    def posterior_latents(self):
        return ("first", "second")

    def posterior_from_latents(self, probabilities):
        first, second = (probabilities[name] for name in self.posterior_latents)
        one = first[:, 0] * second[:, 1] + first[:, 1] * second[:, 0]
        return torch.stack([1 - one, one], 1)


@pytest.fixture(scope="module")
def use() -> Use:
    return measure_use(xor().model, KnownXor(), spec=SPEC)


def at(use: Use, layer: int, latent: str, kind: str) -> pd.Series:
    rows = use.slopes.query("layer == @layer and latent == @latent and kind == @kind")
    (row,) = (row for _, row in rows.iterrows())
    return row


@dataclass(frozen=True)
class OneBit(Xor):
    """The first bit is the answer; the second is fetched as well, and nobody reads it."""

    latents = (Latent("first"), Latent("second", needed=False))

    def sample(self, n, *, seed=0, split="test"):
        items = super().sample(n, seed=seed, split=split)
        latents = {name: items.latents[name] for name in ("first", "second")}
        return replace(items, labels=latents["first"], latents=latents)


def one_bit() -> HookedModel:
    b = Builder(_BITS, 6, {"first": 2, "second": 2})
    token = b.at["token"]
    asked = token[_BITS.index("=")]
    for name, mark, slot in (("0.0", "m", "first"), ("0.1", "n", "second")):
        marked = [token[_BITS.index(f"{mark}{bit}")] for bit in "01"]
        b.head(name, [(asked, dim) for dim in marked], marked, b.at[slot])
    b.unembed(b.at["first"], ["0", "1"], READOUT)
    return HookedModel(b.raw)


@pytest.fixture(scope="module")
def organism() -> Use:
    return measure_use(one_bit(), OneBit(), spec=SPEC)


KINDS = ("logistic", "mean_difference")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", [1, 2])
def test_a_planted_latent_is_decodable_and_not_used(organism, layer, kind):
    needed, unused = (at(organism, layer, name, kind) for name in ("first", "second"))
    assert needed.auroc == unused.auroc == 1
    assert needed.low > 2
    assert needed.q_zero < 0.001
    assert needed.p < 0.05
    assert unused.low < 0 < unused.high
    assert unused.high < needed.low
    assert unused.p > 0.05


def test_slopes_of_a_linear_readout_are_known(organism):
    """After block 0 there is only a norm that is the identity, and the unembedding: the slope is
    what the step writes into the dimensions that are read, whatever the item, at every dose."""
    task, model = OneBit(), one_bit()
    fitted_on = task.sample(SPEC.probe_items, split="train")
    zero, one = (model.model.lm_head.weight[_BITS.index(bit)] for bit in "01")  # type: ignore[union-attr]
    x = model.capture(fitted_on.tokens, "resid_post.0", positions=-1)["resid_post.0"]
    found = fit_steering_directions(
        x, fitted_on.latents, groups=fitted_on.groups, config=ProbeConfig(n_folds=3)
    )
    assert len(found) == 4
    for direction in found:
        slope = float(direction.step @ (one - zero).detach().double())
        slope *= -1 if argues_against(direction.latent, fitted_on) else 1
        row = at(organism, 1, direction.latent, direction.kind)
        assert row.slope == pytest.approx(slope, rel=1e-3, abs=1e-4)
        curve = organism.curves.query(
            "layer == 1 and latent == @direction.latent and kind == @direction.kind"
        )
        assert curve.effect.to_numpy() == pytest.approx(slope * np.array(DOSES), rel=0.01, abs=1e-3)
    assert at(organism, 1, "first", "logistic").saturation == pytest.approx(0, abs=0.01)
    # The two bits' own dimensions are one-hot: one deviation is half of the way between values.
    step = 2**0.5 * fitted_on.latents["first"].double().std()
    expected = float(READOUT * 2**0.5 * step)
    assert at(organism, 1, "first", "mean_difference").slope == pytest.approx(expected, rel=0.01)


def test_saturation_is_of_the_items_whose_response_is_measured(monkeypatch):
    """A straight response falls short of nothing, even where other items' slopes are others."""

    def partly_turned(task, items, *others):
        item = torch.arange(len(items))
        turned = (item >= 50) & (item % 3 == 0)
        return favours(task, items, *others).where(~turned, -favours(task, items, *others))

    monkeypatch.setattr("analyses.use.N_RUN", 50)
    monkeypatch.setattr("analyses.use.favours", partly_turned)
    found = at(measure_use(one_bit(), OneBit(), spec=SPEC), 1, "first", "logistic")
    assert abs(found.slope) > 1
    assert found.saturation == pytest.approx(0, abs=0.01)


def argues_against(latent, items) -> bool:
    z, label = items.latents[latent], items.labels.double()
    return bool(label[z == 1].mean() < label[z == 0].mean())


def test_a_circuit_uses_what_it_reads_where_it_reads_it(use):
    """head.0.0 fetches the first bit in block 0; mlp.1 turns it into the answer, and then both
    stand in the stream: the one is read by the unembedding, the other by nobody."""
    used, done = at(use, 2, "answer", "logistic"), at(use, 2, "first", "logistic")
    assert used.auroc == done.auroc == 1
    assert used.low > 1
    assert used.q_zero < 0.001
    assert abs(done.slope) < 0.05 * used.slope
    for kind in KINDS:
        before = at(use, 1, "first", kind)  # argues either way, as the second bit has it
        assert before.auroc == 1
        assert before.low > 0.5
        assert before.q_zero < 0.001
        assert before.saturation > 0.1  # of relus
    assert at(use, 1, "second", "logistic").auroc < 0.7  # comes in block 1


def test_dose_zero_has_no_effect_and_doses_have_the_slope(use):
    assert use.curves.query("dose == 0").effect.eq(0).all()
    assert set(use.curves.kind) == {*KINDS, "random"}
    assert set(use.curves.query("kind == 'random'").draw) == {0, 1}
    assert use.slopes[["null_low", "null_high", "p", "q"]].notna().all(axis=None)
    assert (use.slopes.null_low < use.slopes.null_high).all()


def test_the_interval_covers_as_often_as_it_says():
    """A linear decision that reads one of two equally decodable latents: the other's slope is 0,
    its direction as fitted is never quite orthogonal. An interval over items alone would have no
    width here at all."""
    gradient = torch.zeros(100, 4, dtype=torch.float64)
    gradient[:, 0] = 1.0
    covered, found_used = {kind: [] for kind in KINDS}, []
    for replication in range(40):
        draw = derive_generator(replication, "coverage")
        z = torch.randint(0, 2, (200, 2), generator=draw)
        x = torch.randn(200, 4, generator=draw, dtype=torch.float64)
        x[:, :2] += 2 * z
        items = Items(100)
        directions = fit_steering_directions(
            x,
            {"used": z[:, 0], "unused": z[:, 1]},
            groups=torch.arange(200),
            config=ProbeConfig(n_folds=3, strengths=(1e-2,)),
        )
        randoms = random_directions(x, 99, generator=draw)
        for direction in directions:
            row = _slope(gradient, torch.ones(100).double(), direction, randoms, items)  # type: ignore[arg-type]
            if direction.latent == "unused":
                covered[direction.kind].append(row["low"] < 0 < row["high"])
            else:
                found_used.append(row["low"] > 0 and row["p_zero"] < 0.01)
    for kind in KINDS:
        # Of 40 with a chance of 0.95 each, fewer than 34 come once in 100 times.
        assert sum(covered[kind]) >= 34, kind
    assert all(found_used)


@dataclass
class Items:
    """As much of a task's items as a slope needs."""

    n: int

    @property
    def groups(self):
        return torch.arange(self.n)


def test_the_p_value_of_zero_is_students_where_directions_are_certain():
    draw = derive_generator(0, "student")
    gradient = torch.randn(40, 3, generator=draw, dtype=torch.float64) + 0.2
    step = torch.tensor([1.0, 0.0, 0.0]).double()
    direction = fit_like(step)
    row = _slope(gradient, torch.ones(40).double(), direction, torch.eye(3).double(), Items(40))  # type: ignore[arg-type]
    expected = stats.ttest_1samp(gradient[:, 0], 0)
    assert row["p_zero"] == pytest.approx(expected.pvalue)
    interval = expected.confidence_interval()
    assert (row["low"], row["high"]) == pytest.approx((interval.low, interval.high))
    assert row["p"] == pytest.approx(
        (1 + sum(abs(gradient.mean(0)) >= abs(gradient[:, 0].mean()))) / 4
    )


def fit_like(step):
    from probes.steering import SteeringDirection

    return SteeringDirection("a", 1, "logistic", step, step.expand(10, 3))


def test_what_a_value_argues_for():
    task = tasks.get("triage", linear=(1.5,), xor=(2.5,), n_unneeded=0)
    items, others = (task.sample(50, split=split) for split in ("test", "train"))
    for latent, value in (("a", 1), ("b", 1), ("c", 0)):
        found = favours(task, items, others, latent, value)
        for i in range(len(items)):
            a, b, c = (
                2 * int(value if name == latent else items.latents[name][i]) - 1 for name in "abc"
            )
            flipped = {"a": (-a, b, c), "b": (a, -b, c), "c": (a, b, -c)}[latent]
            odds = 1.5 * a + 2.5 * b * c
            other = 1.5 * flipped[0] + 2.5 * flipped[1] * flipped[2]
            sign = 1 if items.likeliest_label[i] == 1 else -1
            assert float(found[i]) == math.copysign(1, sign * (odds - other))


def test_without_a_posterior_labels_say_what_a_value_argues_for():
    task = Xor()
    items, others = (task.sample(80, split=split) for split in ("test", "train"))
    for value in (0, 1):
        found = favours(task, items, others, "answer", value)
        expected = torch.where(items.labels == value, 1.0, -1.0)
        assert torch.equal(found, expected.double())
