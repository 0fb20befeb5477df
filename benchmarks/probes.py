"""`fit_many` against the loop over scikit-learn's LogisticRegression, on SmolLM2's activations.

    python benchmarks/probes.py [CHECKPOINT] [--layers 6] [--threads 1]
    python benchmarks/probes.py [CHECKPOINT] --scaling

4,000 sums and differences of two numbers; the residual stream after each layer at the last token,
features standardised; 4 latents from easy to hard (operation, larger, carry, parity), or 40 targets
with 9 control tasks for each latent; 5 folds; C = 1 / (penalty n) with penalties of 1 to 1e-4 per
item. Both sides have the same matrices and dtype; tolerances bound the largest entry of the
gradient per item. In float32 each has its default; in float64 both have 1e-6.

The sides take turns: on each of some layers ours does all fits, scikit-learn those of one fold (all
latents, or of 40 targets a random eighth) times the number left out; the ratio is the median over
layers, and "30 layers" multiplies. Time is CPU time on one thread, wall time on several or on a
GPU. Excess is the largest (F - F*) / F* of an objective over its minimum. Activations are kept in a
store for the next run.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from measuring import seconds, smollm2
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from threadpoolctl import threadpool_limits
from torch import Tensor

from mechinterp.randomness import derive_generator, derive_rng
from mechinterp.store import ActivationStore, capture
from probes import ManyFits, fit_many
from probes.folds import grouped_folds
from probes.probe import control_labels

N_ITEMS, N_CONTROLS, PENALTIES = 4000, 9, (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
SOLVERS = ("lbfgs", "newton-cholesky")
N_FOLDS, N_TRAIN = 5, N_ITEMS * 4 // 5
STRENGTHS = tuple(penalty * N_TRAIN for penalty in PENALTIES)


def items() -> tuple[list[str], dict[str, Tensor], Tensor]:
    """Prompts, latents, and the first operand, which is the type of the control tasks."""
    rng = derive_rng(0, "probes benchmark")
    minus = rng.integers(0, 2, N_ITEMS)
    a, b = rng.integers(10, 100, (2, N_ITEMS))
    text = [f"Q: What is {x} {'+-'[o]} {y}?\nA:" for x, y, o in zip(a, b, minus, strict=True)]
    result = np.where(minus, a - b, a + b)
    latents = {
        "operation": minus,
        "larger": a > b,
        "carry": np.where(minus, a % 10 < b % 10, a % 10 + b % 10 > 9),
        "parity": result % 2,
    }
    return text, {name: torch.tensor(v).long() for name, v in latents.items()}, torch.tensor(a)


def stored(checkpoint: str | None, text: list[str], device: str) -> ActivationStore:
    with smollm2(checkpoint, device) as model:
        assert model.checkpoint is not None
        tokens = model.checkpoint.load_tokenizer()(text, return_tensors="pt").input_ids
        out = Path(tempfile.gettempdir(), f"mechinterp-probes-benchmark-{model.d_model}")
        return capture(model, tokens, out=out, batch_size=100)


def standardised(layer: Tensor, dtype: torch.dtype) -> Tensor:
    x = layer.double()
    return ((x - x.mean(0)) / x.std(0)).to(dtype)


def objective(x: Tensor, y: Tensor, coef: Tensor, intercept: Tensor, strength: float) -> float:
    z = x.double() @ coef.double() + intercept.double()
    loss = torch.nn.functional.softplus(torch.where(y == 1, -z, z), threshold=40).sum()
    return float(loss + 0.5 * strength * coef.double().square().sum())


def compare(
    layers: list[Tensor],
    Y: Tensor,
    folds: Tensor,
    dtype: str,
    tol: float,
    their_tol: float,
    options,
) -> None:
    """One line per solver of scikit-learn."""
    device = torch.device(options.device)
    warnings.simplefilter("ignore", ConvergenceWarning)
    grid = [(t, s) for t in range(len(Y)) for s in range(len(STRENGTHS))]
    total = len(grid) * N_FOLDS
    ours, theirs, accuracy = [], {name: [] for name in SOLVERS}, []
    excess = dict.fromkeys(("ours", *SOLVERS), 0.0)
    certificate, gap = 0.0, 0.0
    for index, layer in enumerate(layers):
        x = standardised(layer, getattr(torch, dtype))
        clock = seconds if options.threads == 1 else wall
        start = clock(device)
        fits = fit_many(
            [x], Y, strengths=STRENGTHS, folds=folds, dtype=dtype, tol=tol, device=options.device
        )
        ours.append(clock(device) - start)
        assert fits.coef is not None
        assert fits.intercept is not None
        certificate = max(certificate, float(fits.gradient_norm.max()))
        fold = index % N_FOLDS
        train = folds != fold
        sample = grid
        if len(Y) > 4:  # as many of every strength and kind as there are
            chosen = derive_rng(index, "targets").permutation(len(Y))[: len(Y) // 8]
            sample = [(int(t), s) for t in chosen for s in range(len(STRENGTHS))]
        best = reference(x, Y, folds, fold, sample)
        x_train, x_test = x[train].numpy(), x[~train].numpy()
        y = Y.numpy()
        for solver in SOLVERS:
            spent = 0.0
            for t, s in sample:
                model = LogisticRegression(
                    C=1 / STRENGTHS[s], tol=their_tol, solver=solver, max_iter=10_000
                )
                start = clock(torch.device("cpu"))
                model.fit(x_train, y[t, train])
                spent += clock(torch.device("cpu")) - start
                args = x[train], Y[t, train]
                minimum = best[t, s]
                coef = torch.from_numpy(model.coef_[0])
                found = objective(*args, coef, torch.from_numpy(model.intercept_)[0], STRENGTHS[s])
                excess[solver] = max(excess[solver], found / minimum - 1)
                if solver == SOLVERS[0]:
                    mine = fits.coef[0, t, s, fold, 0], fits.intercept[0, t, s, fold, 0]
                    value = objective(*args, *mine, STRENGTHS[s])
                    excess["ours"] = max(excess["ours"], value / minimum - 1)
                    gap = max(gap, float((mine[0] - coef).abs().max()))
                    score = model.score(x_test, y[t, ~train])
                    accuracy.append((float(fits.scores[0, t, s, fold]), score))
            theirs[solver].append(spent * total / len(sample))
    mean, other = np.mean(accuracy, 0)
    for solver in SOLVERS:
        ratios = [b / a for a, b in zip(ours, theirs[solver], strict=True)]
        mine, its = statistics.median(ours), statistics.median(theirs[solver])
        print(
            f"| {len(Y)} | {dtype} | {tol:.0e} | {their_tol:.0e} | {solver} | {mine:.2f} | "
            f"{its:.1f} | {statistics.median(ratios):.1f} | {min(ratios):.1f}-{max(ratios):.1f} | "
            f"{30 * mine:.0f} | {30 * its:.0f} | {excess['ours']:.1e} | {excess[solver]:.1e} | "
            f"{mean:.4f} | {other:.4f} |",
            flush=True,
        )
    print(f"<!-- certificate {certificate:.1e}; coefficients differ by {gap:.1e} at most -->")


def wall(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def reference(
    x: Tensor, Y: Tensor, folds: Tensor, fold: int, sample: list[tuple[int, int]]
) -> dict[tuple[int, int], float]:
    """The minima, from fits to 1e-10 in float64."""
    targets = sorted({t for t, _ in sample})
    train = folds != fold
    two = torch.where(train, 1, 0)  # fold 0 is the one held out
    fits = fit_many([x], Y[targets], strengths=STRENGTHS, folds=two, tol=1e-10)
    assert fits.coef is not None
    assert fits.intercept is not None
    coef, intercept = fits.coef[0, :, :, 0, 0], fits.intercept[0, :, :, 0, 0]
    minima = {}
    for t, s in sample:
        at = targets.index(t), s
        minima[t, s] = objective(x[train], Y[t, train], coef[at], intercept[at], STRENGTHS[s])
    return minima


def scaling(options) -> None:
    """How our time grows: planted targets in noise of a power-law spectrum, one thing at a time."""
    print("| layers | items | features | classes | targets | seconds | ms per fit |")
    print("|---|---|---|---|---|---|---|")
    for n_layers, n, d, a, k in [
        (1, 2000, 256, 2, 4),
        (2, 2000, 256, 2, 4),
        (4, 2000, 256, 2, 4),
        (1, 4000, 256, 2, 4),
        (1, 8000, 256, 2, 4),
        (1, 2000, 512, 2, 4),
        (1, 2000, 1024, 2, 4),
        (1, 500, 2048, 2, 4),
        (1, 2000, 256, 4, 4),
        (1, 2000, 256, 8, 4),
        (1, 2000, 256, 2, 16),
    ]:
        rng = derive_rng(0, "scaling", n, d, a, k)
        spectrum = np.arange(1, d + 1) ** -0.7 + 0.02
        X = rng.normal(size=(n_layers, n, d)) * spectrum
        Z = X[0] @ rng.normal(size=(k, d, a)) * 2 + rng.gumbel(size=(k, n, a))
        X = torch.tensor(X / X.std(1, keepdims=True))
        device = torch.device(options.device)
        start = seconds(device)
        strengths = [penalty * n * 0.8 for penalty in PENALTIES]
        fits: ManyFits = fit_many(
            X, torch.tensor(Z.argmax(2)), strengths=strengths, device=options.device
        )
        spent = seconds(device) - start
        print(
            f"| {n_layers} | {n} | {d} | {a} | {k} | {spent:.2f} | "
            f"{1e3 * spent / fits.scores.numel():.1f} |",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("checkpoint", nargs="?", help="default: SmolLM2, put in a temporary place")
    parser.add_argument("--layers", type=int, default=6, help="how many layers are timed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", help="of our side: cpu (default) or cuda")
    parser.add_argument(
        "--scaling", action="store_true", help="how our time grows, and nothing else"
    )
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with threadpool_limits(options.threads):
        if options.scaling:
            scaling(options)
            return
        text, latents, types = items()
        store = stored(options.checkpoint, text, options.device)
        every = [layer for _, layer in store.layers("resid_post")]
        chosen = np.linspace(0, len(every) - 1, options.layers).round().astype(int)
        layers = [every[index] for index in chosen]
        four = torch.stack(list(latents.values()))
        controls = [
            control_labels(types, latent, derive_generator(0, "control", name, index))
            for name, latent in latents.items()
            for index in range(N_CONTROLS)
        ]
        forty = torch.cat([four, torch.stack(controls)])
        folds = grouped_folds(torch.arange(N_ITEMS), four.T, N_FOLDS)
        print(
            "| targets | dtype | our tolerance | scikit-learn's | its solver | "
            "ours, one layer (s) | scikit-learn (s) | ratio | range | ours, 30 layers (s) | "
            "scikit-learn (s) | "
            "excess, ours | scikit-learn | accuracy, ours | scikit-learn |"
        )
        print("|" + "---|" * 15)
        for Y in (four, forty):
            for dtype, tol, their_tol in (("float32", 1e-5, 1e-4), ("float64", 1e-6, 1e-6)):
                compare(layers, Y, folds, dtype, tol, their_tol, options)


if __name__ == "__main__":
    main()
