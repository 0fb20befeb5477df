"""Where the algebra of weighted losses has an exact prediction, the code is held to it.

Here: optima by a generic optimiser, the ladder between them, effective sample size, gradients. The
other exact predictions have their tests beside the code:

    best report and Bayes action for any matrix, the shift as a map    tests/test_decisions.py
    each objective and its gradient, optima of one item                tests/test_objectives.py
    a last layer refitted at a cost is the ex-post shift               tests/test_refits.py
    chances of resampling, effective share of a mean                   tests/test_sampling.py
    the curve of the incentive as a curvature                          tests/test_incentives.py
    shifts and rotations of streams, and of trained networks           tests/test_readout.py,
                                                                       tests/test_known_answers.py
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy.special import entr, rel_entr

from analyses.incentives import relative_incentive
from analyses.ladder import measure_ladder
from analyses.streams import DecisionStreams
from mechinterp import decisions, objectives, tasks
from mechinterp.spec import AnalysisSpec
from mechinterp.training import sampling
from probes.measures import auroc

WEIGHTS = (0.2, 1.8)
UTILITY = decisions.diagonal_utility(WEIGHTS)
SYMMETRIC = decisions.diagonal_utility((1, 1))
SHIFT = np.log(WEIGHTS[1] / WEIGHTS[0])
CROSS_ENTROPY = objectives.get("cross_entropy")
WEIGHTED = objectives.get("utility_weighted", utility=UTILITY)
ADJUSTED = objectives.get("logit_adjusted", priors=[1 / weight for weight in WEIGHTS])
TASK = tasks.get("triage", linear=(1.0, 0.5), xor=(1.5,), n_unneeded=0, n_fillers=0)
SPEC = AnalysisSpec(ladder_items=6_000)  # type: ignore[call-arg]


@pytest.fixture(scope="module")
def items():
    return TASK.sample(SPEC.ladder_items)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def features(items, *, complete: bool) -> torch.Tensor:
    """Findings a and b as ±1, the product of c and d, and a constant: all that the posterior needs.

    Not `complete`: whether both c and d are present instead of their product.
    """
    a, b, c, d = (2.0 * items.latents[name].double() - 1 for name in "abcd")
    return torch.stack([a, b, c * d if complete else (1 + c) * (1 + d) / 4, torch.ones_like(a)], 1)


def as_logits(log_odds: torch.Tensor) -> torch.Tensor:
    return torch.stack([-log_odds / 2, log_odds / 2], -1)


def minimise(loss: Callable[[torch.Tensor], torch.Tensor], *shape: int) -> torch.Tensor:
    parameters = torch.zeros(shape, dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS(
        [parameters],
        max_iter=1_000,
        tolerance_grad=1e-10,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        search.zero_grad()
        value = loss(parameters)
        value.backward()
        return value

    search.step(closure)
    return parameters.detach()


def logistic_optimum(objective, items, x: torch.Tensor) -> torch.Tensor:
    """Coefficients with the least expected loss under the posterior."""

    def loss(coefficients):
        logits = as_logits(x @ coefficients)
        by_label = [
            objective(logits, torch.full((len(items),), label)) for label in range(len(UTILITY))
        ]
        return (torch.stack(by_label, 1) * items.posterior).sum(1).mean()

    return minimise(loss, x.shape[1])


# The ex-post shift


def test_a_well_specified_optimum_moves_by_the_shift_alone(items):
    x = features(items, complete=True)
    symmetric = logistic_optimum(CROSS_ENTROPY, items, x)
    torch.testing.assert_close(symmetric, torch.tensor([1.0, 0.5, 1.5, 0.0]).double())
    moved = logistic_optimum(WEIGHTED, items, x) - symmetric
    torch.testing.assert_close(moved, torch.tensor([0, 0, 0, SHIFT]).double(), rtol=0, atol=1e-6)


def test_a_misspecified_optimum_does_not(items):
    """The best directions depend on which errors count most: no shift is enough."""
    x = features(items, complete=False)
    moved = logistic_optimum(WEIGHTED, items, x) - logistic_optimum(CROSS_ENTROPY, items, x)
    assert (moved[:3].abs() > 0.01).all()
    assert abs(float(moved[3]) - SHIFT) > 0.01


def test_a_table_of_finite_data_moves_by_the_shift_of_every_class():
    """A saturated model is always well specified: exact in the sample, with three classes too."""
    rng = np.random.default_rng(0)
    weights = (0.3, 1.2, 2.0)
    utility = decisions.diagonal_utility(weights)
    cells = torch.from_numpy(rng.integers(6, size=2_000))
    rates = rng.dirichlet([3, 3, 3], size=6)
    labels = torch.tensor([rng.choice(3, p=rates[cell]) for cell in cells])

    def optimum(objective):
        found = minimise(lambda table: objective(table[cells], labels).mean(), 6, 3)
        return found - found.mean(1, keepdim=True)

    weighted = optimum(objectives.get("utility_weighted", utility=utility))
    expected = optimum(CROSS_ENTROPY) + decisions.ex_post_shift(utility)
    torch.testing.assert_close(weighted, expected, rtol=0, atol=1e-6)


def test_the_ladder_calls_a_shift_left_out_a_threshold_and_nothing_else(items):
    x = features(items, complete=True)
    streams = {1: x[:, :3].float(), 2: x[:, :3].float()}
    ladders = {
        name: measure_ladder(
            DecisionStreams(streams, streams, as_logits(x @ logistic_optimum(loss, items, x))),
            items,
            TASK,
            costs={"w": UTILITY},
            spec=SPEC,
        )["w"]
        for name, loss in (("weighted", WEIGHTED), ("symmetric", CROSS_ENTROPY))
    }
    lost = {
        (name, loss): float(ladder.loss("log_score", loss).mean())
        for name, ladder in ladders.items()
        for loss in ("threshold", "readout", "discarded", "learning")
    }
    q = items.posterior.numpy()
    worth = q @ np.array(WEIGHTS)
    optimum = q * WEIGHTS / worth[:, None]
    left_out = (worth * rel_entr(optimum, q).sum(1)).mean() / ladders["symmetric"].scale[
        "log_score"
    ]
    assert left_out > 0.3
    # What is left is the price of estimating the constant on items: about 1 / n.
    assert lost["symmetric", "threshold"] == pytest.approx(left_out, abs=2e-3)
    assert lost["weighted", "threshold"] == pytest.approx(0, abs=2e-3)
    for loss in ("readout", "discarded", "learning"):
        assert lost["symmetric", loss] == pytest.approx(lost["weighted", loss], abs=2e-3)
        assert lost["symmetric", loss] == pytest.approx(0, abs=5e-3)


# Invariance to the bias


@pytest.fixture(scope="module")
def half_blind(items):
    """A network whose report and streams each hold a part of the posterior."""
    noise = torch.randn(len(items), 2, generator=generator(), dtype=torch.float64)
    x = features(items, complete=True)
    early = torch.cat([x[:, :3], noise], 1)
    late = torch.cat([x[:, :1], x[:, 1:3] + 2 * noise], 1)
    log_odds = 0.8 * x[:, 0] + x[:, 2] + noise[:, 0]
    return items, {1: early, 2: late}, as_logits(log_odds)


def values_of(half_blind, constants, *, n: int = 2_000):
    items, streams, logits = half_blind
    shifted = DecisionStreams(streams, streams, logits + torch.tensor(constants).double())
    found = measure_ladder(
        shifted.select(slice(0, n)),
        items.select(slice(0, n)),
        TASK,
        costs={"w": UTILITY},
        spec=SPEC,
    )["w"]
    ranks = auroc(shifted.action_logits.diff(dim=1).squeeze(1), items.labels == 1)
    return {rung: float(x.mean()) for rung, x in found.values["log_score"].items()}, float(ranks)


@settings(max_examples=8, deadline=None)
@given(constants=st.tuples(st.floats(-4, 4), st.floats(-4, 4)))
def test_constants_change_no_rung_above_raw(half_blind, constants):
    """To the noise of estimating a constant, which a report that needs none may be spared."""
    reference, ranks = values_of(half_blind, (0.0, 0.0))
    found, same = values_of(half_blind, constants)
    assert same == pytest.approx(ranks, abs=1e-12)
    unit = reference["oracle"] - reference["constant"]
    for rung in ("bias", "head", "depth", "oracle"):
        assert found[rung] == pytest.approx(reference[rung], abs=5e-3 * unit), rung


def test_constants_far_from_the_best_change_exactly_raw(half_blind):
    one, _ = values_of(half_blind, (2.0, -1.5))
    other, _ = values_of(half_blind, (-1.0, -1.8))
    for rung in ("bias", "head", "depth", "constant", "oracle"):
        assert one[rung] == pytest.approx(other[rung], abs=1e-5), rung
    assert abs(one["raw"] - other["raw"]) > 0.1


# Learning and choosing


@st.composite
def reports(draw):
    """A utility matrix of any shape and values, with posteriors and reports for it."""
    n_actions, n_labels = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    finite = st.floats(-5, 5, width=32)
    utility = draw(hnp.arrays(float, (n_actions, n_labels), elements=finite))
    raw = draw(hnp.arrays(float, (6, n_labels), elements=st.floats(0.015625, 1, width=32)))
    logits = draw(hnp.arrays(float, (6, n_actions), elements=finite))
    return utility, raw / raw.sum(1, keepdims=True), torch.from_numpy(logits)


def split_by_hand(q, utility, logits) -> tuple[float, float]:
    """W(q) H(p_u) and W(q) KL(p_u || p) of one posterior and report."""
    v = utility - utility.min(0)
    weights = v @ q
    if weights.sum() == 0:
        return 0.0, 0.0
    p_u = weights / weights.sum()
    p = np.exp(logits) / np.exp(logits).sum()
    return weights.sum() * entr(p_u).sum(), weights.sum() * rel_entr(p_u, p).sum()


@settings(max_examples=150, deadline=None)
@given(reports())
def test_the_expected_loss_is_learning_plus_choosing_for_any_matrix(problem):
    utility, q, logits = problem
    matrix = utility.tolist()
    posterior = torch.from_numpy(q)
    loss = -decisions.log_score(logits, posterior, matrix)
    floor = -decisions.log_score(decisions.bayes_logits(posterior, matrix), posterior, matrix)
    for i in range(len(q)):
        learning, choosing = split_by_hand(q[i], utility, logits[i].numpy())
        assert float(floor[i]) == pytest.approx(learning, abs=1e-9)
        assert float(loss[i] - floor[i]) == pytest.approx(choosing, abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(reports(), st.integers(0, 2**32 - 1))
def test_the_loss_of_a_batch_is_learning_plus_choosing_of_its_frequencies(problem, seed):
    """Six prompts, each several times in the batch: q is what their labels turned out to be."""
    utility, q, logits = problem
    rng = np.random.default_rng(seed)
    prompts = rng.integers(6, size=64)
    labels = np.array([rng.choice(q.shape[1], p=q[prompt]) for prompt in prompts])
    objective = objectives.get("utility_weighted", utility=utility.tolist())
    loss = objective(logits[prompts], torch.from_numpy(labels)).mean()
    by_hand = 0.0
    for prompt in np.unique(prompts):
        own = labels[prompts == prompt]
        frequencies = np.bincount(own, minlength=q.shape[1]) / len(own)
        split = split_by_hand(frequencies, utility, logits[prompt].numpy())
        by_hand += len(own) / len(labels) * sum(split)
    assert float(loss) == pytest.approx(by_hand, abs=1e-9)


# Gradients


def test_a_gradient_at_the_optimum_is_the_incentive_times_the_symmetric_one(items):
    """Item by item and whatever the label, so that signal and noise shrink alike."""
    gradients = {}
    for name, loss, utility in (
        ("weighted", WEIGHTED, UTILITY),
        ("symmetric", CROSS_ENTROPY, SYMMETRIC),
    ):
        best = decisions.bayes_logits(items.posterior, utility)
        log_odds = (best[:, 1] - best[:, 0]).requires_grad_()
        total = loss(as_logits(log_odds), items.labels).sum()
        (gradients[name],) = torch.autograd.grad(total, log_odds)
    weights = torch.tensor(WEIGHTS).double()
    incentive = relative_incentive(items.posterior, weights) * (items.posterior @ weights).mean()
    torch.testing.assert_close(gradients["weighted"], incentive * gradients["symmetric"])
    assert gradients["weighted"].sum().abs() > 0


def test_weights_that_the_gradient_does_not_know_cost_sample_size():
    """Labels (y, c) of which only c carries the weight; the gradient is that of what predicts y.

    Over draws of n items it varies as without weights on a random share of effective size.
    """
    n_draws, n, w = 6_000, 80, (0.02, 1.98)
    utility = decisions.diagonal_utility([w[c] for _y in (0, 1) for c in (0, 1)])
    weighted = objectives.get("utility_weighted", utility=utility)
    share = sampling.effective_share(w, torch.tensor([0.5, 0.5]))

    def gradient_variance(objective, n_items) -> float:
        random = generator(1)
        x = torch.randn(n_draws, n_items, 2, generator=random, dtype=torch.float64)
        truth = torch.tensor([1.0, -0.5], dtype=torch.float64)
        q = (x @ truth).sigmoid()
        y = (torch.rand(q.shape, generator=random, dtype=torch.float64) < q).long()
        c = torch.randint(2, q.shape, generator=random)
        coefficients = truth.repeat(n_draws, 1).requires_grad_()  # a draw each, at the optimum
        log_odds = torch.einsum("kni,ki->kn", x, coefficients)
        of_c = torch.tensor(w).double().log() if objective is weighted else torch.zeros(2).double()
        logits = (as_logits(log_odds)[..., :, None] + of_c).flatten(-2)
        loss = objective(logits.flatten(0, 1), (2 * y + c).flatten()).view(n_draws, n_items)
        (gradients,) = torch.autograd.grad(loss.mean(1).sum(), coefficients)
        assert gradients.mean(0).abs().max() < 4.5 * gradients.std() / n_draws**0.5
        return float(gradients.var(0).sum())

    fewer = sampling.get("random_share", share=share)(TASK.sample, n, generator=generator())
    assert len(fewer) == round(n * share) == 41
    variance = gradient_variance(weighted, n)
    assert variance == pytest.approx(gradient_variance(CROSS_ENTROPY, 41), rel=0.1)
    assert variance > 1.7 * gradient_variance(CROSS_ENTROPY, n)


def logistic_gradient(objective, x, labels, coefficients) -> torch.Tensor:
    coefficients = coefficients.clone().requires_grad_()
    loss = objective(as_logits(x @ coefficients), labels).mean()
    return torch.autograd.grad(loss, coefficients)[0]


def test_resampling_has_the_weighted_gradient_up_to_its_scale():
    n = 100_000
    coefficients = torch.tensor([0.5, -1.0, 0.3, 0.8]).double()
    candidates = TASK.sample(sampling.CANDIDATES * n, split="train")
    by_weight = sampling.get("by_weight", weights=WEIGHTS)
    chosen = by_weight(lambda m: candidates.select(slice(0, m)), n, generator=generator())
    resampled = logistic_gradient(
        CROSS_ENTROPY, features(chosen, complete=True), chosen.labels, coefficients
    )
    x = features(candidates, complete=True)
    weighted = logistic_gradient(WEIGHTED, x, candidates.labels, coefficients)
    scale = torch.tensor(WEIGHTS)[candidates.labels].double().mean()
    # Each entry of an item's gradient is at most 1.
    torch.testing.assert_close(resampled, weighted / scale, rtol=0, atol=4.5 / n**0.5)
    plain = logistic_gradient(CROSS_ENTROPY, x, candidates.labels, coefficients)
    assert (plain - weighted / scale).abs().max() > 5 * 4.5 / n**0.5


@pytest.mark.parametrize("complete", [True, False])
def test_logit_adjustment_is_symmetric_training_and_a_shift_even_where_weighting_is_not(
    items, complete
):
    """The offset is a change of variables: the symmetric optimum shifted, well specified or not."""
    x = features(items, complete=complete)
    moved = logistic_optimum(ADJUSTED, items, x) - logistic_optimum(CROSS_ENTROPY, items, x)
    torch.testing.assert_close(moved, torch.tensor([0, 0, 0, SHIFT]).double(), rtol=0, atol=1e-6)


def test_logit_adjustment_and_weighting_start_alike_and_part_on_the_way_to_one_optimum(items):
    """Weights that sum to 2: from a constant report both take the same first step."""
    x = features(items, complete=True)
    nothing = torch.zeros(x.shape[1], dtype=torch.float64)
    trained = logistic_optimum(CROSS_ENTROPY, items, x)
    ways = [
        [logistic_gradient(loss, x, items.labels, start) for loss in (ADJUSTED, WEIGHTED)]
        for start in (nothing, trained)
    ]
    torch.testing.assert_close(*ways[0])
    assert torch.cosine_similarity(*ways[1], dim=0) < 0.97
    optima = [logistic_optimum(loss, items, x) for loss in (ADJUSTED, WEIGHTED)]
    torch.testing.assert_close(*optima, rtol=0, atol=1e-6)
