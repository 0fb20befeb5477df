"""The generators of reasoning-gym (Stojanovski et al. 2025) as problems, their scorers as marks."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_seed
from mechinterp.tasks.marking import guarded
from mechinterp.tasks.splits import in_split
from mechinterp.tasks.text import Text, stack_left, stack_right
from mechinterp.tasks.written import Marks, Problems, WrittenTask

N_EXAMPLES = 3
CANDIDATES = 100  # drawn per problem before giving up


@dataclass(frozen=True)
class Reasoning(WrittenTask):
    """Entries of the generator `dataset` with its settings `config`, in the tokens of `tokenizer`,
    a checkpoint's directory.

    The question is followed by "Answer:" ("zero_shot"), led by worked examples too ("few_shot"), or
    asked by the chat template ("chat"). All that is written until the end is the answer. It is
    right if the generator's scorer gives 1 for it; the score itself is in the marks. A scorer that
    raises, takes longer than `seconds` or returns no number raises TaskError with the question.

    `level` names the entry of the metadata, a whole number such as "num_terms", that is a problem's
    level; without it all are of level 1. Right completions have at most `max_new_tokens`.
    Equal questions are of one split. Needs the package reasoning-gym (the extra `reasoning`).
    """

    dataset: str
    tokenizer: str
    config: Any = None  # a mapping; None: the generator's defaults
    level: str | None = None
    style: str = "zero_shot"
    max_new_tokens: int = 32
    seconds: float = 5.0

    name = "reasoning_gym"

    def __post_init__(self) -> None:
        if self.config is not None and not isinstance(self.config, Mapping):
            raise TaskError(f"reasoning_gym: config must be a mapping, got {self.config!r:.60}")
        if self.max_new_tokens < 2 or not self.seconds > 0:
            raise TaskError("reasoning_gym: max_new_tokens must be >= 2 and seconds positive")
        _ = self._text, self._scorer  # refuses what cannot be made, now rather than later

    @cached_property
    def _text(self) -> Text:
        return Text(self.tokenizer, self.style)

    @cached_property
    def _scorer(self) -> Any:
        return self._generator(size=1, seed=0)

    def _generator(self, *, size: int, seed: int) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise TaskError(
                f"reasoning_gym: the package does not load ({error}); "
                "pip install 'mechinterp[reasoning]'"
            ) from error
        try:
            settings = {**(self.config or {}), "size": size, "seed": seed}
            return reasoning_gym.create_dataset(self.dataset, **settings)
        except (TypeError, ValueError, AssertionError) as error:
            raise TaskError(f"reasoning_gym: {self.dataset}: {error}") from error

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self._text.vocab_size

    @property
    def pad_token(self) -> int:  # type: ignore[override]
        return self._text.pad_token

    @property
    def end_token(self) -> int:  # type: ignore[override]
        return self._text.end_token

    @cached_property
    def _examples(self) -> str:
        entries = self._draw(N_EXAMPLES, derive_seed(0, "examples"), "train", None)
        return "".join(f"{entry['question']}\nAnswer:{self._answer(entry)}\n" for entry in entries)

    def _prompt(self, entry: Mapping[str, Any]) -> str:
        if self.style == "chat":
            return self._text.chat(entry["question"])
        examples = self._examples if self.style == "few_shot" else ""
        return f"{examples}{entry['question']}\nAnswer:"

    def _answer(self, entry: Mapping[str, Any]) -> str:
        if entry["answer"] is None:
            raise TaskError(f"reasoning_gym: {self.dataset} has no right answers to learn from")
        answer = str(entry["answer"])
        return answer if self.style == "chat" else f" {answer}"

    def _level(self, entry: Mapping[str, Any]) -> int:
        if self.level is None:
            return 1
        level = entry["metadata"].get(self.level)
        if not isinstance(level, int):
            whole = [key for key, value in entry["metadata"].items() if isinstance(value, int)]
            raise TaskError(
                f"reasoning_gym: level: {self.dataset} has no whole number {self.level!r} in its "
                f"metadata; it has: {', '.join(whole) or 'none'}"
            )
        return level

    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        """See `WrittenTask`; entries are the generator's. Without `levels` problems come as they
        are drawn. There are no shortcuts to plant."""
        if planted:
            raise TaskError("reasoning_gym: there are no shortcuts to plant")
        entries = list(self._draw(n, seed, split, levels))
        prompts = [self._text.ids(self._prompt(entry)) for entry in entries]
        answers = [[*self._text.ids(self._answer(entry)), self.end_token] for entry in entries]
        for entry, answer in zip(entries, answers, strict=True):
            if len(answer) > self.max_new_tokens or self.end_token in answer[:-1]:
                raise TaskError(
                    f"reasoning_gym: the answer to {entry['question']!r:.60} has {len(answer)} "
                    f"tokens or several lines; raise max_new_tokens, or use another style"
                )
        tokens, mask = stack_left(prompts, self.pad_token)
        solutions, solution_mask = stack_right(answers, self.pad_token)
        return Problems(
            tokens=tokens,
            mask=mask,
            solutions=solutions,
            solution_mask=solution_mask,
            level=torch.tensor([self._level(entry) for entry in entries]),
            planted=torch.zeros(n, dtype=torch.bool),
            solvable=torch.ones(n, dtype=torch.bool),
            entries=tuple(entries),
        )

    def _draw(
        self, n: int, seed: int, split: str, levels: Sequence[int] | None
    ) -> Iterator[dict[str, Any]]:
        """Entries in `split`, of these levels in turn."""
        stream = derive_seed(seed, "reasoning_gym", self.dataset, split) % 2**31
        source = iter(self._generator(size=CANDIDATES * n, seed=stream))
        waiting: dict[int, deque[dict[str, Any]]] = {}
        for i in range(n):
            wanted = None if levels is None else sorted(set(levels))[i % len(set(levels))]
            while not waiting.get(wanted or 0):
                entry = next(source, None)
                if entry is None:
                    of_level = "" if wanted is None else f" of level {wanted}"
                    raise TaskError(
                        f"reasoning_gym: {self.dataset} gave {i} of {n} problems{of_level} in "
                        f"split {split!r}; ask for fewer, or change config"
                    )
                if in_split(torch.tensor([derive_seed(0, entry["question"])]), split):
                    level = 0 if levels is None else self._level(entry)
                    waiting.setdefault(level, deque()).append(entry)
            yield waiting[wanted or 0].popleft()

    def mark(
        self,
        problems: Problems,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Marks:
        """See `Reasoning`; a text that does not end is wrong and scores 0."""
        texts, ended = self._text.read(completions, mask)
        answers = [[text.strip() for text in row] for row in texts]
        scores = torch.tensor(
            [
                [scored[text] for text in row]
                for row, scored in (
                    (row, {text: self._score(text, entry) for text in set(row)})
                    for row, entry in zip(answers, problems.entries, strict=True)
                )
            ]
        )
        scores = scores.masked_fill(~(ended & problems.solvable[:, None]), 0.0)
        numbers = [[derive_seed(0, text) if text else -1 for text in row] for row in answers]
        nothing = torch.full(ended.shape, torch.nan)
        return Marks(
            correct=scores >= 1,
            answer=torch.tensor(numbers),
            confidence=nothing,
            confidence_tokens=torch.zeros_like(mask),
            steps_missing=nothing,
            steps_wrong=nothing,
            score=scores,
        )

    def _score(self, text: str, entry: dict[str, Any]) -> float:
        item = f"reasoning_gym: {self.dataset}, question {entry['question']!r:.60}"
        return guarded(self._scorer.score_answer, text, entry, item=item, seconds=self.seconds)
