"""Tasks whose answers a network writes itself, token by token, so that they can be rewarded.

A `Task` is one decision after a given text. A `WrittenTask` has problems: a prompt, the text that
solves it, and marks for whatever is written instead. A class may be both, so that training by
reward and the analyses speak of the same thing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.tasks.base import plain_settings


@dataclass(frozen=True)
class Problems:
    """Prompts padded on the left, with a right completion of each padded on the right.

    `level` is how hard a problem is by construction, from 1; what it takes of a network is measured
    as its pass rate. `planted` says that a shortcut was put in, which solves it. A problem that is
    not `solvable` is marked wrong whatever is written.
    """

    tokens: Int[Tensor, "problems positions"]
    mask: Bool[Tensor, "problems positions"]  # true on the prompt, false on padding
    solutions: Int[Tensor, "problems tokens"]  # the end token is their last
    solution_mask: Bool[Tensor, "problems tokens"]
    level: Int[Tensor, " problems"]
    planted: Bool[Tensor, " problems"]
    solvable: Bool[Tensor, " problems"]
    entries: tuple[Any, ...]  # what the task needs to mark an answer, one per problem

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, index: Sequence[int] | Int[Tensor, " chosen"]) -> Problems:
        """The problems at `index`, in that order."""
        index = [int(i) for i in index]
        picked: dict[str, Any] = {f.name: getattr(self, f.name)[index] for f in fields(self)[:-1]}
        return Problems(**picked, entries=tuple(self.entries[i] for i in index))


def unsolvable(problems: Problems) -> Problems:
    """The same problems, to be marked wrong whatever is written."""
    return replace(problems, solvable=torch.zeros_like(problems.solvable))


@dataclass(frozen=True)
class Marks:
    """What is found in sampled completions.

    `answer` numbers the answers given, equal numbers for equal answers to any problem; -1 where
    there is none. `confidence` is the stated probability of being right, NaN where there is none,
    and `confidence_tokens` are those that state it, or what stands in their place. `steps_missing`
    is the share of the intermediate results that were not written, `steps_wrong` the share written
    and wrong; both NaN where a task has none. `score` is what a task's own scorer gives where that
    is not all or nothing; right is then a score of 1.
    """

    correct: Bool[Tensor, "problems samples"]
    answer: Int[Tensor, "problems samples"]
    confidence: Float[Tensor, "problems samples"]
    confidence_tokens: Bool[Tensor, "problems samples tokens"]
    steps_missing: Float[Tensor, "problems samples"]
    steps_wrong: Float[Tensor, "problems samples"]
    score: Float[Tensor, "problems samples"] | None = None


class WrittenTask(ABC):
    """Problems to be answered in writing. Subclasses are frozen dataclasses, as tasks are."""

    name: str
    version: ClassVar[int] = 1  # raised when equal settings give other items: studies measure anew
    vocab_size: int
    pad_token: int
    end_token: int  # its sampling ends a completion
    max_new_tokens: int  # the longest right completion, end token included

    @abstractmethod
    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        """`n` problems of `levels` (none: all) in equal shares, a share `planted` of them with a
        shortcut. Raises TaskError for a level that the task lacks, and for shortcuts where it
        knows none."""

    @abstractmethod
    def mark(
        self,
        problems: Problems,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Marks:
        """Marks of completions, `mask` true up to and with the end token (or all, if there is none:
        such a completion is wrong)."""

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, enough to make this task again."""
        return plain_settings(self)
