"""Weighted training against train-symmetric-then-shift, in numpy, where the truth is known.

usage: python docs/findings/sanity_runs.py [OUT]

Two models on inputs x ~ N(0, I_12), y ~ Bernoulli(sigmoid(signal * f(x))), f of variance 1:
a network 12-64-32-1 on a truth with main effects and interactions, and logistic regression fitted
to convergence, once on a linear truth (well specified) and once on the network's (misspecified).
All losses are expectations over the known posterior of 20,000 test items, in nats; refits see
10,000 other items and their posterior. The learning rate is the one with the lowest symmetric
validation loss, from seeds of its own; the others are run beside it.

Writes OUT/sanity_runs.csv, then its figure and tables as `sanity_report.py` does; OUT is
docs/findings/utility_weighted unless given.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import sanity_report
from jaxtyping import Float
from scipy.special import expit, logit
from threadpoolctl import threadpool_limits

from figures.tables import over_seeds
from mechinterp.files import write_text
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_rng

N_INPUTS, WIDTHS = 12, (64, 32)
SIGNALS = (1.0, 3.0)
WEIGHTS = {1.8: (0.2, 1.8), 1.98: (0.02, 1.98)}  # of label 0 and label 1, by the latter
N_TRAIN, N_HELD_OUT, N_TEST, BATCH = 4_000, 10_000, 20_000, 64
EPOCHS = (1, 2, 4, 6, 8, 16, 32, 40, 64)
FEWER_EPOCHS = (2, 6, 16, 40)  # at the learning rates that were not chosen
LEARNING_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
MLP_SEEDS, TUNING_SEEDS, LOGISTIC_SEEDS = range(8), range(100, 104), range(32)
LOGISTIC_SIZES = (200, 1_000, 4_000)
CONDITIONS = ["truth", "signal", "weights", "n", "learning_rate", "epochs"]
Weights = tuple[float, float]
Parameters = list[np.ndarray]  # weight and bias of each layer in turn


class Sample(NamedTuple):
    x: Float[np.ndarray, "items inputs"]
    posterior: Float[np.ndarray, " items"]
    labels: Float[np.ndarray, " items"]


class Data(NamedTuple):
    train: Sample  # of the seed
    held_out: Sample  # these two are the same for all seeds
    test: Sample


def sample(truth: str, signal: float, n: int, seed: int, split: str) -> Sample:
    """`n` items of the "linear" or the "interaction" truth; four of the twelve inputs matter."""
    rng = derive_rng(seed, "sanity runs", truth, signal, split)
    x = rng.standard_normal((n, N_INPUTS))
    f = x[:, :4].sum(1) / 2
    if truth == "interaction":
        f = (x[:, :4].sum(1) + x[:, 0] * x[:, 1] + x[:, 2] * x[:, 3]) / np.sqrt(6)
    posterior = expit(signal * f)
    return Sample(x, posterior, (rng.random(n) < posterior).astype(float))


def draw_data(truth: str, signal: float, seed: int) -> Data:
    splits = {"train": (N_TRAIN, seed), "held out": (N_HELD_OUT, 0), "test": (N_TEST, 0)}
    return Data(*(sample(truth, signal, n, of, split) for split, (n, of) in splits.items()))


def ex_post_shift(weights: Weights) -> float:
    """What serving the weights adds to the log-odds of a symmetric model."""
    return float(np.log(weights[1] / weights[0]))


def weighted_loss(z: np.ndarray, target: np.ndarray, weights: Weights = (1, 1)) -> np.ndarray:
    """-w1 t log p - w0 (1 - t) log(1 - p) per item, p = sigmoid(z), t a label or a posterior."""
    positive, negative = weights[1] * target, weights[0] * (1 - target)
    return positive * np.logaddexp(0, -z) + negative * np.logaddexp(0, z)


def slope(z: np.ndarray, target: np.ndarray, weights: Weights = (1, 1)) -> np.ndarray:
    """Derivative of `weighted_loss` by z."""
    positive, negative = weights[1] * target, weights[0] * (1 - target)
    return (positive + negative) * expit(z) - positive


def initial_parameters(rng: np.random.Generator) -> Parameters:
    """He et al. (2015): normal weights of variance 2 / inputs, no biases."""
    sizes = itertools.pairwise((N_INPUTS, *WIDTHS, 1))
    layers = [(rng.normal(0, np.sqrt(2 / i), (i, o)), np.zeros(o)) for i, o in sizes]
    return [array for layer in layers for array in layer]


def forward(parameters: Parameters, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Both hidden layers [items width] and the log-odds [items]."""
    w1, b1, w2, b2, w3, b3 = parameters
    first = np.maximum(x @ w1 + b1, 0)
    second = np.maximum(first @ w2 + b2, 0)
    return first, second, (second @ w3 + b3)[:, 0]


def gradient(
    parameters: Parameters,
    x: np.ndarray,
    target: np.ndarray,
    weights: Weights = (1, 1),
    offset: float = 0.0,
) -> Parameters:
    """Of the mean loss of the log-odds plus `offset`, in the order of the parameters."""
    _, _, w2, _, w3, _ = parameters
    first, second, z = forward(parameters, x)
    by_z = slope(z + offset, target, weights)[:, None] / len(x)
    by_second = by_z @ w3.T * (second > 0)
    by_first = by_second @ w2.T * (first > 0)
    layers = ((x, by_first), (first, by_second), (second, by_z))
    return [array for below, by in layers for array in (below.T @ by, by.sum(0))]


class Adam:
    """Kingma and Ba (2015), algorithm 1, with its defaults."""

    def __init__(self, parameters: Parameters, learning_rate: float) -> None:
        self.parameters, self.learning_rate, self.n_steps = parameters, learning_rate, 0
        self.moments = [(np.zeros_like(array), np.zeros_like(array)) for array in parameters]

    def step(self, gradients: Parameters) -> None:
        """Change the parameters in place."""
        self.n_steps += 1
        first_bias, second_bias = 1 - 0.9**self.n_steps, 1 - 0.999**self.n_steps
        for array, by, (first, second) in zip(
            self.parameters, gradients, self.moments, strict=True
        ):
            first += 0.1 * (by - first)
            second += 0.001 * (by * by - second)
            array -= (
                self.learning_rate * (first / first_bias) / (np.sqrt(second / second_bias) + 1e-8)
            )


def train(
    x: np.ndarray, labels: np.ndarray, seed: int, learning_rate: float, n_epochs: int, **loss: Any
) -> Iterator[tuple[int, Parameters]]:
    """Epoch and parameters (in place) at EPOCHS; `loss` is the weights or offset of `gradient`.

    Arms of one seed share initial values and order of items. An epoch is 4,000 / 64 = 62 batches,
    however many items there are; nothing decays.
    """
    parameters = initial_parameters(derive_rng(seed, "sanity runs", "initial"))
    adam = Adam(parameters, learning_rate)
    rng, order = derive_rng(seed, "sanity runs", "order"), np.empty(0, int)
    for epoch in range(1, n_epochs + 1):
        for _ in range(N_TRAIN // BATCH):
            order = order if len(order) >= BATCH else rng.permutation(len(x))
            batch, order = order[:BATCH], order[BATCH:]
            adam.step(gradient(parameters, x[batch], labels[batch], **loss))
        if epoch in EPOCHS:
            yield epoch, parameters


def fit_logistic(
    features: np.ndarray,
    target: np.ndarray,
    weights: Weights = (1, 1),
    offset: np.ndarray | float = 0.0,
    ridge: float = 0.0,
) -> Float[np.ndarray, " features"]:
    """Newton's method to the minimum of mean loss + ridge / 2 |beta|^2, steps halved as needed."""

    def objective(beta: np.ndarray) -> float:
        loss = weighted_loss(offset + features @ beta, target, weights).mean()
        return float(loss + ridge / 2 * beta @ beta)

    beta = np.zeros(features.shape[1])
    each = weights[1] * target + weights[0] * (1 - target)
    for _ in range(100):
        z = offset + features @ beta
        by = features.T @ slope(z, target, weights) / len(z) + ridge * beta
        if np.abs(by).max() < 1e-8 and objective(beta) > 1e-6:
            return beta
        curvature = features.T @ ((each * expit(z) * expit(-z))[:, None] * features) / len(z)
        step = np.linalg.solve(curvature + ridge * np.eye(len(beta)), by)
        while objective(beta - step) > objective(beta) + 1e-12:
            step = step / 2
        beta = beta - step
    raise RuntimeError("logistic regression: no minimum; the labels can be separated")


def auroc(z: np.ndarray, posterior: np.ndarray) -> float:
    """Expected over the labels; no two items have the same z."""
    q = posterior[np.argsort(z)]
    below = np.cumsum(1 - q) - (1 - q) / 2
    return float(q @ below / (q.sum() * (1 - q).sum()))


def measures(z: np.ndarray, z_held_out: np.ndarray, data: Data, weights: Weights) -> dict[str, Any]:
    """Of log-odds: both currencies, AUROC, the loss after a bias refit; the decision is z > 0."""
    q = data.test.posterior
    ones = np.ones((len(z_held_out), 1))
    bias = fit_logistic(ones, data.held_out.posterior, weights, offset=z_held_out)
    return {
        "weighted_loss": weighted_loss(z, q, weights).mean(),
        "after_bias_refit": weighted_loss(z + bias, q, weights).mean(),
        "utility": np.where(z > 0, weights[1] * q, weights[0] * (1 - q)).mean(),
        "auroc": auroc(z, q),
    }


def head_refit(
    testing: np.ndarray, fitting: np.ndarray, data: Data, weights: Weights
) -> dict[str, Any]:
    """The loss of the best readout of the last hidden layer; its share is the learning loss."""
    # The ridge matters only to units that are off for all items.
    head = fit_logistic(with_ones(fitting), data.held_out.posterior, weights, ridge=1e-6)
    loss = weighted_loss(with_ones(testing) @ head, data.test.posterior, weights).mean()
    share = as_share(loss, data.test.posterior, weights)
    return {"after_head_refit": loss, "learning_share": share}


def with_ones(features: np.ndarray) -> np.ndarray:
    return np.column_stack([features, np.ones(len(features))])


def as_share(loss: float, posterior: np.ndarray, weights: Weights) -> float:
    """(loss - oracle) / (best constant - oracle)."""
    reports = (logit(p) + ex_post_shift(weights) for p in (posterior, posterior.mean()))
    oracle, constant = (weighted_loss(z, posterior, weights).mean() for z in reports)
    return (loss - oracle) / (constant - oracle)


def mlp_runs(
    signal: float, seed: int, learning_rate: float, epochs: tuple[int, ...], all_arms: bool
) -> list[dict[str, Any]]:
    """One row per arm, weights and epoch; without `all_arms` weighted, symmetric and ex post."""
    data = draw_data("interaction", signal, seed)
    x, labels = data.train.x, data.train.labels
    readings = [("symmetric", name, 0.0) for name in WEIGHTS]
    readings += [("ex_post", name, ex_post_shift(weights)) for name, weights in WEIGHTS.items()]
    trainings: list[Any] = [(slice(None), {}, readings)]
    for name, weights in WEIGHTS.items():
        shift = ex_post_shift(weights)
        trainings.append((slice(None), {"weights": weights}, [("weighted", name, 0.0)]))
        if all_arms:
            trainings.append((slice(None), {"offset": -shift}, [("logit_adjusted", name, 0.0)]))
            part = effective_part(labels, weights, seed)
            trainings.append((part, {}, [("subsampled_ex_post", name, shift)]))
    rows = []
    for part, loss, readings in trainings:
        for epoch, parameters in train(
            x[part], labels[part], seed, learning_rate, max(epochs), **loss
        ):
            if epoch not in epochs:
                continue
            _, fitting, z_fitting = forward(parameters, data.held_out.x)
            _, testing, z = forward(parameters, data.test.x)
            served = {name for _, name, _ in readings}
            heads = {name: head_refit(testing, fitting, data, WEIGHTS[name]) for name in served}
            for arm, name, shift in readings:
                keys = {"truth": "interaction", "signal": signal, "weights": name, "n": N_TRAIN}
                row = keys | {"learning_rate": learning_rate, "epochs": epoch}
                row |= {"arm": arm, "seed": seed} | heads[name]
                rows.append(row | measures(z + shift, z_fitting + shift, data, WEIGHTS[name]))
    return rows


def effective_part(labels: np.ndarray, weights: Weights, seed: int) -> np.ndarray:
    """A random part of the items, as many as (sum w)^2 / sum w^2."""
    w = np.where(labels > 0, weights[1], weights[0])
    order = derive_rng(seed, "sanity runs", "subsample").permutation(len(labels))
    return order[: round(w.sum() ** 2 / (w @ w))]


def validation_losses(signal: float, seed: int, learning_rate: float) -> list[dict[str, Any]]:
    """The symmetric loss of the symmetric network on held-out items."""
    data = draw_data("interaction", signal, seed)
    keys = {"truth": "interaction", "signal": signal, "learning_rate": learning_rate}
    rows = []
    x, labels = data.train.x, data.train.labels
    for epoch, parameters in train(x, labels, seed, learning_rate, max(EPOCHS)):
        z = forward(parameters, data.held_out.x)[2]
        loss = weighted_loss(z, data.held_out.posterior).mean()
        row = keys | {"epochs": epoch, "n": N_TRAIN, "arm": "symmetric", "seed": seed}
        rows.append(row | {"validation_loss": loss})
    return rows


def choose_learning_rate(validation: pd.DataFrame) -> float:
    """The lowest loss at its best epoch, averaged over the signals."""
    loss = validation.groupby(["learning_rate", "signal", "epochs"])["validation_loss"].mean()
    best = loss.groupby(["learning_rate", "signal"]).min().groupby("learning_rate").mean()
    return float(best.idxmin())  # type: ignore[arg-type]


def logistic_runs(truth: str, signal: float, seed: int) -> list[dict[str, Any]]:
    """Weighted and ex-post logistic regression on the first n items of the seed."""
    data = draw_data(truth, signal, seed)
    fitting, held_out, testing = (with_ones(s.x) for s in data)
    rows = []
    for n in LOGISTIC_SIZES:
        x, labels = fitting[:n], data.train.labels[:n]
        symmetric = fit_logistic(x, labels)
        for name, weights in WEIGHTS.items():
            weighted = fit_logistic(x, labels, weights)
            shifted = symmetric + np.append(np.zeros(N_INPUTS), ex_post_shift(weights))
            for arm, beta in (("weighted", weighted), ("ex_post", shifted)):
                keys = {"truth": truth, "signal": signal, "n": n, "weights": name}
                row = keys | {"arm": arm, "seed": seed}
                rows.append(row | measures(testing @ beta, held_out @ beta, data, weights))
    return rows


def summarise(runs: pd.DataFrame) -> pd.DataFrame:
    """Each arm, and each arm less ex post seed by seed: mean and 95% t interval over seeds."""
    keys = [key for key in CONDITIONS if key in runs]
    values = [column for column in runs if column not in {*keys, "arm", "seed"}]
    long = runs.melt([*keys, "arm", "seed"], values, "measure")
    by_arm = long.pivot(index=[*keys, "measure", "seed"], columns="arm", values="value")
    tables = [long]
    if "ex_post" in by_arm:
        differences = by_arm.drop(columns="ex_post").sub(by_arm["ex_post"], axis=0)
        differences = differences.rename(columns="{} - ex_post".format).reset_index()
        tables.append(differences.melt([*keys, "measure", "seed"], var_name="arm"))
    return over_seeds(pd.concat(tables), [*keys, "arm", "measure"])


def main(out: str | Path = Path(__file__).parent / "utility_weighted") -> None:
    tuning = list(itertools.product(SIGNALS, TUNING_SEEDS, LEARNING_RATES))
    cells = list(itertools.product(SIGNALS, MLP_SEEDS, LEARNING_RATES))
    logistic = list(itertools.product(("linear", "interaction"), SIGNALS, LOGISTIC_SEEDS))
    rows: dict[str, list[dict[str, Any]]] = {"validation": [], "mlp": [], "logistic": []}
    n_cells = len(tuning) + len(cells) + len(logistic)
    # On matrices this small a second thread only gets in the way.
    with threadpool_limits(1), progress_bar("Sanity runs", n_cells) as advance:
        for cell in tuning:
            rows["validation"] += validation_losses(*cell)
            advance(1)
        chosen = choose_learning_rate(pd.DataFrame(rows["validation"]))
        for signal, seed, rate in cells:
            main_run = rate == chosen
            epochs = EPOCHS if main_run else FEWER_EPOCHS
            rows["mlp"] += mlp_runs(signal, seed, rate, epochs, all_arms=main_run)
            advance(1)
        for cell in logistic:
            rows["logistic"] += logistic_runs(*cell)
            advance(1)
    models = {"validation": "mlp", "mlp": "mlp", "logistic": "logistic"}
    table = pd.concat(
        [summarise(pd.DataFrame(rows[key])).assign(model=model) for key, model in models.items()]
    )
    table = table[["model", *CONDITIONS, "arm", "measure", "mean", "low", "high", "n_seeds"]]
    write_text(Path(out) / "sanity_runs.csv", table.to_csv(index=False, float_format="%.4g"))
    sanity_report.main(out)


if __name__ == "__main__":
    main(*sys.argv[1:])
