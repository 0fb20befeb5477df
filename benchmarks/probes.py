"""Time of our probe fits against scikit-learn's on the same problems, to the same tolerance.

    python benchmarks/probes.py [--layers 31] [--tolerance 1e-6]

Both solve each problem in turn, in one process on one thread; the ratio is the median over pairs of
CPU times. Rows: one target per layer with a strong and a weak penalty, and a cross-validation grid
(8 targets x 5 strengths) per layer, which is what probing a network amounts to. Penalties are per
item; scikit-learn's C is 1 / (penalty n).
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from mechinterp.randomness import derive_rng
from probes.logistic import fit_logistic


def layer(index: int, n: int, d: int, n_targets: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised activations with a power-law spectrum; targets ever easier to read."""
    rng = derive_rng(0, "benchmark", index)
    spectrum = np.arange(1, d + 1) ** -0.7 + 0.02
    X = (rng.normal(size=(n, d)) * spectrum) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    X = (X - X.mean(0)) / X.std(0)
    z = X @ rng.normal(size=(d, n_targets)) / np.sqrt(d) * (0.5 + index / 10)
    return X, (rng.uniform(size=z.shape) < 1 / (1 + np.exp(-z))).astype(float)


def compare(n_layers: int, n: int, d: int, targets: int, strengths: list[float], tol: float) -> str:
    ours, theirs, gap = [], [], 0.0
    for index in range(n_layers):
        X, Y = layer(index, n, d, targets)
        l2 = np.repeat(strengths, targets) * n
        columns = np.tile(Y, (1, len(strengths)))
        start = time.process_time()
        fit = fit_logistic(
            torch.from_numpy(X), torch.from_numpy(columns), l2=torch.from_numpy(l2), tol=tol
        )
        ours.append(time.process_time() - start)
        start = time.process_time()
        coefs = [
            LogisticRegression(C=1 / strength, tol=tol, max_iter=10_000).fit(X, y).coef_[0]
            for strength, y in zip(l2, columns.T, strict=True)
        ]
        theirs.append(time.process_time() - start)
        gap = max(gap, float(np.abs(fit.coef.numpy() - coefs).max()))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    fits = targets * len(strengths)
    penalty = f"{max(strengths):g}" if len(strengths) == 1 else "grid"
    return (
        f"{n_layers:6d} {fits:5d} {penalty:>8} {1e3 * statistics.median(ours) / fits:10.1f} "
        f"{1e3 * statistics.median(theirs) / fits:13.1f} {ratio:7.1f} {gap:12.1e}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=31)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(
        f"n = 1500, d = 576, tolerance {options.tolerance:g}; CPU ms per fit, medians over layers"
    )
    print("layers  fits  penalty       ours  scikit-learn   ratio  largest gap of coefficients")
    compare(1, 200, 20, 1, [0.1], 1e-4)  # warm up
    few = max(1, options.layers // 10)
    for n_layers, targets, strengths in (
        (options.layers, 1, [0.01]),
        (options.layers, 1, [1e-3]),
        (few, 8, [1.0, 0.1, 0.01, 1e-3, 1e-4]),
    ):
        print(compare(n_layers, 1500, 576, targets, strengths, options.tolerance), flush=True)


if __name__ == "__main__":
    main()
