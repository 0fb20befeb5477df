"""What a patch is scored by: one number per row of logits, read at the decision position.

A metric is any callable `metric(logits [rows tokens], items [rows]) -> [rows]` with an attribute
`token_ids`: the vocabulary entries that the columns of `logits` hold, in order (None: all of them).
Rows come in any order and number, so a metric looks up what it knows of each row's item by `items`;
naming its tokens lets a sweep unembed those alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError


class Metric(Protocol):
    """See the module's docstring."""

    @property
    def token_ids(self) -> Int[Tensor, " tokens"] | None: ...

    def __call__(
        self, logits: Float[Tensor, "rows tokens"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]: ...


@dataclass(frozen=True)
class LogitDifference:
    """Logit of each item's correct token less that of its wrong one. Made by `logit_difference`."""

    token_ids: Int[Tensor, " tokens"]
    correct: Int[Tensor, " items"]  # column of each item's correct token
    wrong: Int[Tensor, " items"]

    def __call__(
        self, logits: Float[Tensor, "rows tokens"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        return _pick(logits, self.correct, items) - _pick(logits, self.wrong, items)


@dataclass(frozen=True)
class ActionLogOdds:
    """Log-odds of each item's action against all others together. Made by `action_log_odds`."""

    token_ids: Int[Tensor, " actions"]
    labels: Int[Tensor, " items"]

    def __call__(
        self, logits: Float[Tensor, "rows actions"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        chosen = self.labels.to(logits.device)[items][:, None]
        others = logits.scatter(1, chosen, -torch.inf).logsumexp(dim=1)
        return logits.gather(1, chosen)[:, 0] - others


@dataclass(frozen=True)
class Shifted:
    """A metric of action logits to which `shift` is added first, as a checkpoint's ex-post one."""

    metric: ActionLogOdds
    shift: Float[Tensor, " actions"]

    @property
    def token_ids(self) -> Int[Tensor, " actions"]:
        return self.metric.token_ids

    def __call__(
        self, logits: Float[Tensor, "rows actions"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        return self.metric(logits + self.shift.to(logits.device), items)


@dataclass(frozen=True)
class LogProbability:
    """Log-probability (nats) of each item's token over the whole vocabulary. Made by `log_prob`."""

    right: Int[Tensor, " items"]
    token_ids: None = None

    def __call__(
        self, logits: Float[Tensor, "rows vocab"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        return _pick(logits, self.right, items) - logits.logsumexp(dim=1)


def logit_difference(
    *, correct: Int[Tensor, " items"], wrong: Int[Tensor, " items"]
) -> LogitDifference:
    """Logit of `correct[item]` minus logit of `wrong[item]`; both are token ids, one per item."""
    if correct.shape != wrong.shape or correct.ndim != 1:
        raise AnalysisError(
            f"logit_difference: correct and wrong must hold one token id per item, "
            f"got shapes {tuple(correct.shape)} and {tuple(wrong.shape)}"
        )
    token_ids, columns = torch.unique(torch.cat([correct, wrong]), return_inverse=True)
    return LogitDifference(token_ids, columns[: len(correct)], columns[len(correct) :])


def action_log_odds(actions: Sequence[int], labels: Int[Tensor, " items"]) -> ActionLogOdds:
    """Log-odds of action `labels[item]` against the other `actions` (token ids) together.

    With two actions this is the difference of their logits. Every row has the same sign of meaning
    ("towards this item's label"), so items of different labels can be averaged.
    """
    token_ids = torch.as_tensor(actions, dtype=torch.long)
    if len(token_ids) < 2 or len(token_ids.unique()) != len(token_ids):
        raise AnalysisError(f"actions: expected at least two different token ids, got {actions}")
    if labels.ndim != 1 or not bool(((labels >= 0) & (labels < len(token_ids))).all()):
        raise AnalysisError(
            f"labels: expected one index into the {len(token_ids)} actions per item, got values "
            f"{labels.unique().tolist()[:8]} of shape {tuple(labels.shape)}"
        )
    return ActionLogOdds(token_ids, labels.long())


def log_prob(right: Int[Tensor, " items"]) -> LogProbability:
    """Log-probability of token `right[item]`; needs the whole vocabulary, so it is the dear one."""
    return LogProbability(right)


def _pick(
    logits: Float[Tensor, "rows tokens"],
    columns: Int[Tensor, " items"],
    items: Int[Tensor, " rows"],
) -> Float[Tensor, " rows"]:
    return logits.gather(1, columns.to(logits.device)[items][:, None])[:, 0]
