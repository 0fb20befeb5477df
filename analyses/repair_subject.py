"""What a repaired network is measured by: the same test items as before the damage and after it.

Valued at symmetric costs, since the symmetric loss repairs. The readout "raw" is the decision as it
is, "bias" the same after the best bias, to which a threshold is no loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.streams import read_streams
from mechinterp import decisions
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_seed
from mechinterp.repair import Repair
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.logistic import fit_softmax
from probes.measures import mean_estimate

READOUTS = ("raw", "bias")
MIN_LOST = 0.02  # of (reference - best constant): of less, a share says nothing
UNKNOWN = (float("nan"),) * 3

Values = Mapping[tuple[str, str], Float[Tensor, "*draws items"]]  # by currency and readout


@dataclass(frozen=True)
class RepairSubject:
    """A network to repair, and what its repairs are measured by, on the same test items."""

    after: HookedModel
    task: Task
    spec: AnalysisSpec
    items: Items
    goal: Values  # of the reference
    start: Values
    constant: Values

    @classmethod
    def read(
        cls, reference: HookedModel, after: HookedModel, task: Task, spec: AnalysisSpec
    ) -> RepairSubject:
        items = task.sample(spec.repair_test_items, seed=spec.seed, split="test")
        goal, start = (
            read_streams(model, items, task, batch_size=spec.batch_size, max_layers=1)
            for model in (reference, after)
        )
        report = decisions.best_constant(items.target, symmetric_utility(task)).report.log()
        constant = values_of(report.expand(len(items), -1), items, task)
        return cls(
            after,
            task,
            spec,
            items,
            goal=values_of(goal.action_logits, items, task),
            start=values_of(start.action_logits, items, task),
            constant=constant,
        )

    def unit(self, currency: str, readout: str) -> float:
        """(reference - best constant): not above 0 where the reference is no better than that, and
        nothing can be a share of it."""
        key = currency, readout
        return float((self.goal[key] - self.constant[key]).mean())

    def values(self, run: Repair) -> Values:
        logits = run.action_logits(self.items.tokens, batch_size=self.spec.batch_size)
        return values_of(logits, self.items, self.task)

    def few(self, draw: int) -> Items:
        """Items of the validation split, which training has not seen."""
        return self.drawn(draw, self.spec.repair_items, split="validation")

    def drawn(self, draw: int, n_items: int, *, split: str) -> Items:
        """One of `repair_draws` draws of a split; where it holds too few for `n_items` in each, an
        equal part of it, since draws of nearly all there is would hardly differ.

        Raises AnalysisError where there are more draws than items.
        """
        n_draws = self.spec.repair_draws
        there_are = self.task.sample(n_items * n_draws, seed=self.spec.seed, split=split)
        if len(there_are) == n_items * n_draws:
            seed = derive_seed(self.spec.seed, "repair", draw)
            return self.task.sample(n_items, seed=seed, split=split)
        size = len(there_are) // n_draws
        if size == 0:
            raise AnalysisError(
                f"repair_draws: {n_draws} draws of the {len(there_are)} items that the {split} "
                f"split of task {self.task.name!r} holds; give fewer"
            )
        return there_are.select(slice(draw * size, (draw + 1) * size))

    def rows(self, repaired: Values) -> Iterator[dict[str, Any]]:
        """Rows of `Repairs.repair`, from values [draws, items]."""
        groups = self.items.groups
        for (currency, readout), values in repaired.items():
            start, goal = self.start[currency, readout], self.goal[currency, readout]
            lost = mean_estimate(goal - start)
            low, high = lost.interval(groups)
            unit = self.unit(currency, readout)
            is_loss = unit > 0 and low > MIN_LOST * unit
            share = share_regained(values, start, goal, groups) if is_loss else UNKNOWN
            yield {
                "currency": currency,
                "readout": readout,
                "value": float(values.mean()),
                "lost": lost.value,
                "lost_low": low,
                "lost_high": high,
                **dict(zip(("share", "low", "high"), share, strict=True)),
                "n_draws": len(values),
            }


def share_regained(
    repaired: Float[Tensor, "draws items"],
    start: Float[Tensor, " items"],
    goal: Float[Tensor, " items"],
    groups: Tensor,
) -> tuple[float, float, float]:
    """(repaired - start) / (goal - start) with its 95% interval, over draws and over items.

    Student's, of the sum of the two variances, with Satterthwaite's (1946) degrees of freedom: that
    of the draws' shares, and that over groups of items of the ratio (delta method). One draw has
    the latter alone.
    """
    from scipy.special import stdtrit

    distance = float((goal - start).mean())
    shares = (repaired - start).mean(1) / distance
    share = float(shares.mean())
    linear = ((repaired.mean(0) - start) - share * (goal - start)) / distance
    sampling = mean_estimate(linear).standard_error(groups) ** 2
    n_draws, n_groups = len(shares), len(groups.unique())
    drawing = float(shares.var() / n_draws) if n_draws > 1 else 0.0
    variance = sampling + drawing
    if variance == 0:
        return share, share, share
    spread = sampling**2 / (n_groups - 1) + (drawing**2 / (n_draws - 1) if n_draws > 1 else 0.0)
    half = float(stdtrit(variance**2 / spread, 0.975)) * variance**0.5
    return share, share - half, share + half


def values_of(action_logits: Float[Tensor, "items actions"], items: Items, task: Task) -> Values:
    """Per item, at symmetric costs. The best bias is fitted on these items: one number to spoil
    thousands."""
    target, utility = items.target, symmetric_utility(task)
    weights = decisions.action_weights(target, utility)
    nothing = torch.zeros(len(items), 1, dtype=torch.float64)
    bias = fit_softmax(nothing, weights, l2=1.0, offset=action_logits.double()).intercept
    values = {}
    for readout, logits in zip(READOUTS, (action_logits, action_logits + bias), strict=True):
        values["utility", readout] = decisions.expected_utility(logits, target, utility)
        values["log_score", readout] = decisions.log_score(logits, target, utility)
    return values


def stack_draws(draws: Sequence[Values]) -> dict[tuple[str, str], Float[Tensor, "draws items"]]:
    return {key: torch.stack([draw[key] for draw in draws]) for key in draws[0]}


def symmetric_utility(task: Task) -> decisions.Utility:
    return decisions.diagonal_utility([1.0] * len(task.actions))
