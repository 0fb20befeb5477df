"""Written tasks that can be solved on paper: copying, and a bandit that states a confidence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mechinterp.randomness import derive_generator
from mechinterp.tasks.written import Marks, Problems, WrittenTask

PAD, END, ASKED, FIRST = 0, 1, 2, 3


def marks(correct: torch.Tensor, answer: torch.Tensor, mask: torch.Tensor, **others) -> Marks:
    nothing = torch.full(correct.shape, torch.nan)
    fields = {
        "confidence": nothing,
        "confidence_tokens": torch.zeros_like(mask),
        "steps_missing": nothing,
        "steps_wrong": nothing,
    }
    return Marks(correct=correct, answer=answer, **{**fields, **others})


@dataclass(frozen=True)
class Copying(WrittenTask):
    """A problem of level n is n letters, to be written again; planted ones have equal letters."""

    n_letters: int = 4

    name = "copying"
    pad_token = PAD
    end_token = END
    max_new_tokens = 4

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return FIRST + self.n_letters

    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        generator = derive_generator(seed, "copying", split)
        levels = torch.tensor(levels or (1, 2, 3))
        level = levels[torch.randint(len(levels), (n,), generator=generator)]
        letters = torch.randint(FIRST, self.vocab_size, (n, 3), generator=generator)
        is_planted = torch.rand(n, generator=generator) < planted
        letters[is_planted] = letters[is_planted, :1]
        mask = torch.arange(3) >= 3 - level[:, None]
        texts = [row[kept].tolist() for row, kept in zip(letters, mask, strict=True)]
        solutions = torch.tensor([[*t, END, *[PAD] * (3 - len(t))] for t in texts])
        asked = torch.full((n, 1), ASKED)
        return Problems(
            tokens=torch.cat([letters.masked_fill(~mask, PAD), asked], 1),
            mask=torch.cat([mask, asked.bool()], 1),
            solutions=solutions,
            solution_mask=torch.arange(4) <= level[:, None],
            level=level,
            planted=is_planted,
            solvable=torch.ones(n, dtype=torch.bool),
            entries=tuple(map(tuple, texts)),
        )

    def mark(self, problems: Problems, completions: torch.Tensor, mask: torch.Tensor) -> Marks:
        right = torch.tensor(
            [
                [text[kept].tolist() == [*entry, END] for text, kept in zip(*group, strict=True)]
                for entry, *group in zip(problems.entries, completions, mask, strict=True)
            ]
        )
        return marks(right & problems.solvable[:, None], completions[..., 0], mask)


REPORTS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclass(frozen=True)
class Bandit(WrittenTask):
    """One prompt: choose between two answers, then state a confidence, one token each.

    Which answer is right is not in the prompt: the first is in a share `honesty` of problems.
    """

    honesty: float = 0.7

    name = "bandit"
    vocab_size = FIRST + 2 + len(REPORTS)
    pad_token = PAD
    end_token = END
    max_new_tokens = 2

    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        draws = torch.rand(n, generator=derive_generator(seed, "bandit", split))
        is_first, column = draws < self.honesty, torch.ones(n, 1, dtype=torch.long)
        return Problems(
            tokens=column * ASKED,
            mask=column.bool(),
            solutions=column * END,
            solution_mask=column.bool(),
            level=column[:, 0],
            planted=~column[:, 0].bool(),
            solvable=column[:, 0].bool(),
            entries=tuple(is_first.tolist()),
        )

    def mark(self, problems: Problems, completions: torch.Tensor, mask: torch.Tensor) -> Marks:
        completions = torch.nn.functional.pad(completions, (0, 2 - completions.shape[2]))
        answer = completions[..., 0] - FIRST
        answer = answer.where((answer == 0) | (answer == 1), torch.tensor(-1))
        right = torch.tensor([0 if first else 1 for first in problems.entries])
        said = completions[..., 1] - FIRST - 2
        is_said = (said >= 0) & (said < len(REPORTS)) & (mask.sum(-1) == 2)
        reports = torch.tensor(REPORTS)[said.clamp(0, len(REPORTS) - 1)]
        is_second = torch.arange(mask.shape[2]) == 1
        return marks(
            answer == right[:, None],
            answer,
            mask,
            confidence=reports.where(is_said, torch.tensor(torch.nan)),
            confidence_tokens=mask & is_second,
        )
