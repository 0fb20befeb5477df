"""Time of permutation tests (ridge classifier) against scikit-learn's logistic regressions.

    python benchmarks/permutations.py [--permutations 1000] [--rounds 3]

Theirs is ten `LogisticRegression` fits at their defaults on the same activations, the classifier of
the usual permutation test, which needs permutations x folds of them. Ours is everything: one
decomposition, out-of-fold scores in 5 folds, accuracy and AUROC of every permutation. Both take
turns, in one process on one thread; CPU seconds, medians of rounds. The two classifiers differ: the
null is the ridge classifier's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression

from mechinterp.randomness import derive_rng
from probes.folds import grouped_folds
from probes.permutations import ridge_permutation_test

FOLDS = 5


def activations(n: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Standardised activations with a power-law spectrum, and labels that are partly readable."""
    rng = derive_rng(0, "benchmark", "permutations", n, d)
    spectrum = np.arange(1, d + 1) ** -0.7 + 0.02
    X = (rng.normal(size=(n, d)) * spectrum) @ np.linalg.qr(rng.normal(size=(d, d)))[0]
    X = (X - X.mean(0)) / X.std(0)
    z = X @ rng.normal(size=d) / np.sqrt(d)
    return X, (rng.uniform(size=n) < 1 / (1 + np.exp(-z))).astype(int)


def cpu_seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def compare(n: int, d: int, n_permutations: int, rounds: int) -> str:
    X, y = activations(n, d)
    data, labels = torch.from_numpy(X), torch.from_numpy(y)[:, None]
    folds = grouped_folds(torch.arange(n), labels, FOLDS)
    ours, theirs = [], []
    for _ in range(rounds):
        ours.append(
            cpu_seconds(
                lambda: ridge_permutation_test(data, labels, folds, n_permutations=n_permutations)
            )
        )
        theirs.append(
            cpu_seconds(lambda: [LogisticRegression(max_iter=10_000).fit(X, y) for _ in range(10)])
        )
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    own, ten = statistics.median(ours), statistics.median(theirs)
    refits = ten / 10 * n_permutations * FOLDS
    return f"| {n} | {d} | {n_permutations} | {own:.2f} | {ten:.2f} | {ratio:.1f} | {refits:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--permutations", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    compare(200, 20, 10, 1)  # warm up
    print("| n | d | permutations | ours (s) | ten fits (s) | ratio | refits, extrapolated (s) |")
    print("|---|---|---|---|---|---|---|")
    for n, d in ((4000, 576), (1000, 576), (400, 2048)):
        print(compare(n, d, options.permutations, options.rounds), flush=True)


if __name__ == "__main__":
    main()
