"""Coverage and size, by simulation, of every interval and test of `mechinterp.statistics`.

    python benchmarks/coverage.py [--trials 1000] [--resamples 1000] [--seeds 3 4 8 16]
        [--items 200 2000] [--scenarios normal skewed shared]

A run is a seed's mean effect plus items that are as skewed as losses are (centred lognormal, sigma
1: skewness 6.2); between seeds the standard deviation is a twentieth of that of items. Scenarios:

  normal   seeds' effects are normal, and every seed has items of its own
  skewed   seeds' effects are exponential (skewness 2)
  shared   as normal, but half of the variance of items is common to all seeds, as where all are
           measured on the same test items: the truth is the mean over all items there could be

Intervals should cover at their level; tests should be wrong at most at theirs. Cells are percent,
with exact 95% (Clopper-Pearson) intervals of the simulation itself.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import pandas as pd
from scipy import stats

from mechinterp import statistics
from mechinterp.patching.inference import adjust_false_discovery
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_rng

SCENARIOS = ("normal", "skewed", "shared")
N_CELLS = 4  # independent effects that are tested together
SIGMA = 1.0
ITEM_SD = float(stats.lognorm.std(SIGMA))
SEED_SD = ITEM_SD / 20
LARGE = 10  # standard errors, for an effect that no test misses


@dataclass(frozen=True)
class Trial:
    """Effects [cells, seeds, items] of true mean zero, and the true error of a cell's mean."""

    effects: np.ndarray
    one_run: np.ndarray  # [items] of the first run, less its true mean
    error: float
    n_resamples: int
    seed: int

    @property
    def seed_means(self) -> np.ndarray:
        return self.effects.mean(axis=2)

    @property
    def p_values(self) -> np.ndarray:
        return stats.ttest_1samp(self.seed_means, 0, axis=1).pvalue  # type: ignore[union-attr]

    @property
    def resampling(self) -> dict[str, int]:
        return {"n_resamples": self.n_resamples, "seed": self.seed}


def draw(
    scenario: str, n_seeds: int, n_items: int, *, trial: int, n_resamples: int = 1_000
) -> Trial:
    rng = derive_rng(trial, "coverage", scenario, n_seeds, n_items)
    if scenario == "skewed":
        seeds = rng.exponential(SEED_SD, (N_CELLS, n_seeds)) - SEED_SD
    else:
        seeds = rng.normal(0, SEED_SD, (N_CELLS, n_seeds))

    def items(n: int) -> np.ndarray:
        return rng.lognormal(0, SIGMA, (N_CELLS, n, n_items)) - stats.lognorm.mean(SIGMA)

    own = items(n_seeds)
    if scenario == "shared":
        own = np.sqrt(0.5) * (own + items(1))
    error = np.sqrt((SEED_SD**2 + ITEM_SD**2 / n_items) / n_seeds)
    return Trial(seeds[:, :, None] + own, own[0, 0], float(error), n_resamples, trial)


def _covers(interval: statistics.Interval) -> bool:
    return interval.low <= 0 <= interval.high


def _hierarchical(trial: Trial) -> bool:
    _, n_seeds, n_items = trial.effects.shape
    return _covers(
        statistics.hierarchical_bootstrap_interval(
            trial.effects[0].ravel(),
            seeds=np.repeat(np.arange(n_seeds), n_items),
            **trial.resampling,
        )
    )


def _dissociation(trial: Trial, learning: float, choosing: float) -> bool:
    means = trial.seed_means
    a, b = means[:2].T.copy(), means[2:].T.copy()
    a[:, 0] += learning * trial.error
    b[:, 1] += choosing * trial.error
    return statistics.double_dissociation(a, b).dissociated


# name -> (nominal rate, whether the trial counts). An interval counts when it covers, a test when
# it finds what is not there; tests with a margin are tried with the truth at the margin.
PROCEDURES: dict[str, tuple[float, Callable[[Trial], bool]]] = {
    "covers: t_interval": (0.95, lambda t: _covers(statistics.t_interval(t.seed_means[0]))),
    "covers: bootstrap_t_interval": (
        0.95,
        lambda t: _covers(statistics.bootstrap_t_interval(t.seed_means[0], **t.resampling)),
    ),
    "covers: hierarchical_bootstrap_interval": (0.95, _hierarchical),
    "covers: t_interval, items of one run": (
        0.95,
        lambda t: _covers(statistics.t_interval(t.one_run)),
    ),
    "covers: bootstrap_t_interval, items of one run": (
        0.95,
        lambda t: _covers(statistics.bootstrap_t_interval(t.one_run, **t.resampling)),
    ),
    "wrong: damaged, truth at the margin": (
        0.025,
        lambda t: statistics.t_interval(t.seed_means[0]).low > 0,
    ),
    "wrong: improved, truth at the margin": (
        0.025,
        lambda t: statistics.t_interval(t.seed_means[0]).high < 0,
    ),
    "wrong: equivalence_test, truth at the margin": (
        0.05,
        lambda t: (
            statistics.equivalence_test(
                t.seed_means[0] + LARGE * t.error, margin=LARGE * t.error
            ).equivalent
        ),
    ),
    "wrong: sign_flip_test": (
        0.05,
        lambda t: statistics.sign_flip_test(t.seed_means[0]) <= 0.05,
    ),
    "wrong: double_dissociation, one of two": (0.05, lambda t: _dissociation(t, 0, LARGE)),
    "wrong: double_dissociation, none of two": (0.05, lambda t: _dissociation(t, 0, 0)),
    "wrong: holm, any of four": (0.05, lambda t: bool((statistics.holm(t.p_values) < 0.05).any())),
    "wrong: adjust_false_discovery, any of four": (
        0.05,
        lambda t: bool((adjust_false_discovery(t.p_values) < 0.05).any()),
    ),
}


def simulate(
    scenario: str,
    n_seeds: int,
    n_items: int,
    *,
    n_trials: int,
    n_resamples: int = 1_000,
    procedures: Iterable[str] = tuple(PROCEDURES),
) -> pd.DataFrame:
    """How often each procedure covers or is wrong; columns scenario, n_seeds, n_items, procedure,
    nominal, rate, low, high."""
    hits = dict.fromkeys(procedures, 0)
    for number in range(n_trials):
        trial = draw(scenario, n_seeds, n_items, trial=number, n_resamples=n_resamples)
        for name in hits:
            hits[name] += PROCEDURES[name][1](trial)
    rows = []
    for name, count in hits.items():
        interval = statistics.proportion_interval(count, n_trials)
        rows.append((name, PROCEDURES[name][0], count / n_trials, *interval))
    table = pd.DataFrame(rows, columns=["procedure", "nominal", "rate", "low", "high"])
    return table.assign(scenario=scenario, n_seeds=n_seeds, n_items=n_items)


def as_markdown(table: pd.DataFrame) -> str:
    """One line per procedure, one column per size."""
    text = table.apply(
        lambda row: f"{100 * row['rate']:.1f} ({100 * row['low']:.1f}-{100 * row['high']:.1f})",
        axis=1,
    )
    wide = table.assign(text=text).pivot_table(
        index=["procedure", "nominal"],
        columns=["n_seeds", "n_items"],
        values="text",
        aggfunc="first",
        sort=False,
    )
    heads = [f"{n_seeds} x {n_items}" for n_seeds, n_items in wide.columns]
    lines = [f"| seeds x items | nominal | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for (name, nominal), cells in wide.iterrows():  # type: ignore[misc]
        lines.append(f"| {name} | {100 * nominal:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Coverage and size, by simulation.")
    parser.add_argument("--trials", type=int, default=1_000)
    parser.add_argument("--resamples", type=int, default=1_000)
    parser.add_argument("--seeds", type=int, nargs="+", default=[3, 4, 8, 16])
    parser.add_argument("--items", type=int, nargs="+", default=[200, 2_000])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=SCENARIOS)
    options = parser.parse_args()
    sizes = [(n_seeds, n_items) for n_items in options.items for n_seeds in options.seeds]
    for scenario in options.scenarios:
        with progress_bar(scenario, len(sizes)) as advance:
            tables = []
            for n_seeds, n_items in sizes:
                trials = {"n_trials": options.trials, "n_resamples": options.resamples}
                tables.append(simulate(scenario, n_seeds, n_items, **trials))
                advance(1)
        print(f"\n{scenario}: {options.trials} trials, {options.resamples} resamples\n")
        print(as_markdown(pd.concat(tables)), flush=True)


if __name__ == "__main__":
    main()
