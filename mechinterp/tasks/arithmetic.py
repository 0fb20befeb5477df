"""Arithmetic: add one-digit numbers, writing down the running sums. The answer can be verified.

Adding one number more is one level harder. What probes and patches look for are the running sums
and their carries. A shortcut can be planted: problems whose total is always the same number.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_generator
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, Task
from mechinterp.tasks.splits import SPLITS, in_split, refuse_split
from mechinterp.tasks.sum_pairs import PAIRS, QUALITY, draw_pairs
from mechinterp.tasks.sum_texts import SumText, Template, sum_text
from mechinterp.tasks.sums import (
    MOST_TERMS,
    digits_of,
    draw_terms,
    group_of,
    mark_sums,
    read_table,
    running_sums,
    table_of,
)
from mechinterp.tasks.written import Marks, Problems, WrittenTask

if TYPE_CHECKING:
    import pandas as pd

DECISIONS = ("units", "tens", "step", "direct")
MOST_LISTED = 5  # terms of which all prompts are listed, to draw without repetition


@dataclass(frozen=True)
class Arithmetic(Task, WrittenTask):
    """Problems have 2 to `max_terms` numbers, and level 1 to `max_terms` - 1, the additions.

    Prompts and completions, with a `tokenizer` (a checkpoint's directory) those on the right, in a
    `style` that may lead with worked examples ("few_shot") or use the chat template ("chat"):

        <s> 3 5 9 =    0 8 1 7 ANSWER 1 7 <end>         Sum: 3+5+9=    08 17 answer 17

    As a decision it is the next digit of a text with `n_terms` numbers that is right so far:

        units   the total's units, after the running sums and the answer's tens
        tens    the answer's tens, after the running sums and the answer marker
        step    the last running sum's units, after its tens
        direct  as `units`, without running sums: the marker follows the prompt

    Labels are always those of the prompt's true total. `sum_i` is the units digit of the first i
    numbers' sum, `carry_i` whether adding the i-th carries. Needed are, for `units`, the last sum,
    which the text shows; for `step` that and the one before; for `direct` all sums; for `tens` all
    carries, whose number is the digit.

    `pairs` says what differs between the two texts of a counterfactual pair: "both", one number and
    the sums that follow from it; only the "prompt", one number, the sums being those of the clean
    text; only the "scratchpad", one digit of the last sum that the text shows. The last two make
    contradictory texts, and tell which of the two a network reads: there the label is what follows
    from the part that differs. In all, the forced tens of the answer are the same.

    `texts` is a table (parquet) of completions, as `written_texts` makes it; then items have these
    running sums and answers, right or wrong, not the right ones; labels and latents stay the true
    ones. `shortcut_total` is the total of planted problems.

    Solutions have `slips`: that share of their running sums is off by its units digit, and what
    follows goes on from there. A network that learns from such texts knows how to add and is right
    in (1 - slips)^level of its samples: a start for training by reward.

    Items and problems of the same numbers in any order form a group and are of one split.
    """

    max_terms: int = 8
    n_terms: int = 4
    decision: str = "units"
    pairs: str = "both"
    shortcut_total: int = 20
    slips: float = 0.0
    texts: str | None = None
    tokenizer: str | None = None
    style: str = "zero_shot"

    name = "arithmetic"

    def __post_init__(self) -> None:
        if not 2 <= self.max_terms <= MOST_TERMS or not 2 <= self.n_terms <= MOST_TERMS:
            raise TaskError(f"arithmetic: max_terms and n_terms must be in 2 .. {MOST_TERMS}")
        if self.decision not in DECISIONS or self.pairs not in PAIRS:
            raise TaskError(
                f"arithmetic: decision must be one of {', '.join(DECISIONS)} and pairs one of "
                f"{', '.join(PAIRS)}, got {self.decision!r} and {self.pairs!r}"
            )
        n_shown = {"direct": 0, "step": self.n_terms - 2}.get(self.decision, self.n_terms - 1)
        if self.pairs == "scratchpad" and n_shown == 0:
            raise TaskError(
                f"arithmetic: before decision {self.decision!r} with n_terms {self.n_terms} no sum "
                'is written; pairs must be "both" or "prompt"'
            )
        if self.texts is not None and self.decision == "direct":
            raise TaskError("arithmetic: texts have running sums; decision 'direct' is without")
        if self.texts is not None and not Path(self.texts).is_file():
            raise TaskError(f"arithmetic: texts: no file {self.texts}")
        if not 0 <= self.slips < 1:
            raise TaskError(f"arithmetic: slips must be in [0, 1), got {self.slips}")
        if self.shortcut_total < 0:
            raise TaskError(f"arithmetic: shortcut_total must be >= 0, got {self.shortcut_total}")
        _ = self._text  # refuses what cannot be written, now rather than later

    @cached_property
    def _text(self) -> SumText:
        return sum_text(self.tokenizer, self.style)

    @cached_property
    def _templates(self) -> dict[int, Template]:
        """By the number of terms, running sums and all."""
        return {k: self._text.template(k) for k in range(2, self.max_terms + 1)}

    @cached_property
    def _decision_template(self) -> tuple[Template, int]:
        """The text of items, and how many of its tokens come before the decision."""
        template = self._text.template(self.n_terms, steps=self.decision != "direct")
        digit = {"units": -1, "direct": -1, "tens": -2, "step": -3}[self.decision]
        return template, int(template.digits[digit])

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self._text.vocab_size

    @property
    def pad_token(self) -> int:  # type: ignore[override]
        return self._text.pad_token

    @property
    def end_token(self) -> int:  # type: ignore[override]
        return self._text.end_token

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        longest = self._templates[self.max_terms]
        return len(longest.tokens) - longest.n_prompt

    @property
    def n_positions(self) -> int:  # type: ignore[override]
        return self._decision_template[1]

    @property
    def action_names(self) -> tuple[str, ...]:  # type: ignore[override]
        n = 9 * self.n_terms // 10 + 1 if self.decision == "tens" else 10
        return tuple(str(digit) for digit in range(n))

    @property
    def actions(self) -> tuple[int, ...]:  # type: ignore[override]
        return tuple(self._text.digit_tokens[: len(self.action_names)].tolist())

    @property
    def utility(self) -> tuple[tuple[float, ...], ...]:  # type: ignore[override]
        """1 for the right digit."""
        return tuple(map(tuple, np.eye(len(self.actions)).tolist()))

    @property
    def latents(self) -> tuple[Latent, ...]:  # type: ignore[override]
        last, tens = self.n_terms, self.decision == "tens"
        first_needed = {"units": last, "step": last - 1, "direct": 2, "tens": last + 1}
        steps = range(2, last + 1)
        return (
            *(Latent(f"sum_{i}", 10, i >= first_needed[self.decision]) for i in steps),
            *(Latent(f"carry_{i}", 2, tens) for i in steps),
        )

    @property
    def posterior_latents(self) -> tuple[str, ...]:
        if self.decision == "tens":
            return tuple(latent.name for latent in self.latents if latent.needed)
        return (f"sum_{self.n_terms}",)

    def posterior_from_latents(
        self, probabilities: Mapping[str, Float[Tensor, "items values"]]
    ) -> Float[Tensor, "items labels"]:
        """The last sum's units, or the number of carries, taken as independent."""
        beliefs = [probabilities[name].double() for name in self.posterior_latents]
        if self.decision != "tens":
            return beliefs[0]
        posterior = torch.zeros(len(beliefs[0]), len(self.actions), dtype=torch.float64)
        posterior[:, 0] = 1
        for belief in beliefs:
            carried = posterior.roll(1, dims=1)
            carried[:, 0] = 0
            posterior = posterior * belief[:, :1] + carried * belief[:, 1:]
        return posterior / posterior.sum(1, keepdim=True)

    def control_types(self, items: Items) -> Int[Tensor, " items"]:
        """The first two numbers: enough types for ten random labels."""
        first, second = self._decision_template[0].digits[:2].tolist()
        return items.tokens[:, first] * self.vocab_size + items.tokens[:, second]

    # Items: one decision in a text that is right so far, or that was sampled.

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        """Prompts of `split` in random order; up to 5 terms, and in `texts`, without repetition and
        no more than there are."""
        generator = derive_generator(seed, "arithmetic", split)
        if self.texts is not None:
            terms, sums, answers = read_table(self.texts, n_terms=self.n_terms, split=split)
            chosen = torch.randperm(len(terms), generator=generator)[:n]
            return self._items(terms[chosen], sums[chosen], answers[chosen])
        if self.n_terms <= MOST_LISTED:
            listed = self._listed[split] if split in SPLITS else refuse_split(split)
            terms = listed[torch.randperm(len(listed), generator=generator)[:n]]
        else:
            terms = draw_terms(torch.full((n,), self.n_terms), split=split, generator=generator)
        sums = terms.cumsum(1)[:, 1:]
        return self._items(terms, sums, sums[:, -1])

    @cached_property
    def _listed(self) -> dict[str, Int[Tensor, "prompts terms"]]:
        every = torch.cartesian_prod(*[torch.arange(10)] * self.n_terms)
        return {split: every[in_split(group_of(every), split)] for split in SPLITS}

    def _items(
        self,
        terms: Int[Tensor, "items terms"],
        sums: Int[Tensor, "items sums"],
        answers: Int[Tensor, " items"],
        labels_of: Int[Tensor, "items sums"] | None = None,
    ) -> Items:
        """Texts that show `sums` and `answers`, whatever they are. Labels and latents are those of
        `labels_of`: none: the right sums."""
        template, n_positions = self._decision_template
        values = digits_of(terms, sums[:, : template.n_sums], answers)
        tokens = template.fill(values, self._text.digit_tokens)[:, :n_positions]
        roles = [*template.roles[: n_positions - 1], "decision"]
        true = terms.cumsum(1)[:, 1:] if labels_of is None else labels_of
        tens = torch.cat([torch.zeros_like(true[:, :1]), true // 10], 1)
        latents = {f"sum_{i + 2}": true[:, i] % 10 for i in range(true.shape[1])}
        latents |= {f"carry_{i + 2}": tens.diff(dim=1)[:, i] for i in range(true.shape[1])}
        labels = self._label(true[:, -1])
        return Items(
            tokens=tokens,
            labels=labels,
            latents=latents,
            groups=group_of(terms),
            roles=np.broadcast_to(np.array(roles), tokens.shape),
            posterior=torch.nn.functional.one_hot(labels, len(self.actions)).double(),
        )

    def _label(self, totals: Int[Tensor, " items"]) -> Int[Tensor, " items"]:
        return totals // 10 if self.decision == "tens" else totals % 10

    def written_texts(
        self,
        problems: Problems,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> pd.DataFrame:
        """A table for `texts`: a row per completion with an answer, right or wrong."""
        symbols = self._text.symbols(completions, mask)
        return table_of(symbols, self.mark(problems, completions, mask).answer, problems.entries)

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """Pairs as `pairs` says; the numbers are changed in turn. `latent` is the first sum that
        differs, or for decision "tens" the first carry."""
        drawn = draw_pairs(
            n,
            kind=self.pairs,
            decision=self.decision,
            n_terms=self.n_terms,
            split=split,
            generator=derive_generator(seed, "arithmetic", split, "pairs"),
        )
        clean = self._items(drawn.terms, drawn.sums, drawn.sums[:, -1])
        corrupt = self._items(drawn.changed, drawn.shown, drawn.shown[:, -1], drawn.believed)
        family = "carry" if self.decision == "tens" else "sum"
        names = np.array([f"{family}_{i}" for i in range(2, self.n_terms + 1)])
        differs = torch.stack([clean.latents[x] != corrupt.latents[x] for x in names], 1)
        roles = np.array(clean.roles, dtype=object)
        if self.pairs != "scratchpad":
            positions = self._decision_template[0].digits[: self.n_terms].numpy()
            is_changed = drawn.place.numpy()[:, None] == np.arange(self.n_terms)
            roles[:, positions] = np.where(is_changed, "changed term", "other term")
        return CounterfactualPairs(
            clean=clean,
            corrupt=corrupt,
            latent=names[differs.long().argmax(1).numpy()],
            roles=roles.astype(str),
            quality=QUALITY[self.pairs],
        )

    # Problems: prompts to be completed.

    def problems(
        self,
        n: int,
        *,
        seed: int = 0,
        split: str = "train",
        levels: Sequence[int] | None = None,
        planted: float = 0.0,
    ) -> Problems:
        """See `WrittenTask`. Planted problems have the total `shortcut_total`; they are of those
        among `levels` at which it can be reached."""
        every = range(1, self.max_terms)
        chosen = sorted(set(every if levels is None else levels))
        if not chosen or not set(chosen) <= set(every):
            raise TaskError(f"arithmetic: levels are 1 .. {self.max_terms - 1}, got {levels}")
        generator = derive_generator(seed, "arithmetic", split, "problems")
        level = torch.tensor(chosen).repeat(-(-n // len(chosen)))[:n]
        level = level[torch.randperm(n, generator=generator)]
        is_planted = self._choose_planted(level, planted, generator)
        terms = draw_terms(
            level + 1,
            split=split,
            generator=generator,
            total=self.shortcut_total,
            has_total=is_planted,
        )
        width = self._templates[chosen[-1] + 1].n_prompt
        longest = len(self._templates[chosen[-1] + 1].tokens) - width
        tokens = torch.full((n, width), self.pad_token)
        solutions = torch.full((n, longest), self.pad_token)
        mask, solution_mask = (torch.zeros_like(x, dtype=torch.bool) for x in (tokens, solutions))
        for k in (level.unique() + 1).tolist():
            rows = (level == k - 1).nonzero().flatten()
            own, template = terms[rows, :k], self._templates[k]
            sums = running_sums(own, slips=self.slips, generator=generator)
            text = template.fill(digits_of(own, sums, sums[:, -1]), self._text.digit_tokens)
            tokens[rows, width - template.n_prompt :] = text[:, : template.n_prompt]
            mask[rows, width - template.n_prompt :] = True
            solutions[rows, : text.shape[1] - template.n_prompt] = text[:, template.n_prompt :]
            solution_mask[rows, : text.shape[1] - template.n_prompt] = True
        entries = [tuple(t[: k + 1]) for t, k in zip(terms.tolist(), level.tolist(), strict=True)]
        solvable = torch.ones(n, dtype=torch.bool)
        return Problems(
            tokens, mask, solutions, solution_mask, level, is_planted, solvable, tuple(entries)
        )

    def _choose_planted(
        self, level: Int[Tensor, " problems"], share: float, generator: torch.Generator
    ) -> Bool[Tensor, " problems"]:
        reachable = 9 * (level + 1) >= self.shortcut_total
        n_planted = round(share * len(level))
        if not 0 <= share <= 1 or n_planted > int(reachable.sum()):
            raise TaskError(
                f"arithmetic: a share {share} of problems with the total {self.shortcut_total} "
                f"cannot be had at the levels {level.unique().tolist()}; ask for higher levels"
            )
        order = torch.rand(len(level), generator=generator).where(reachable, torch.tensor(2.0))
        planted = torch.zeros_like(reachable)
        planted[order.argsort()[:n_planted]] = True
        return planted

    def mark(
        self,
        problems: Problems,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Marks:
        """See `mark_sums`."""
        symbols = self._text.symbols(completions, mask)
        marks = mark_sums(symbols, problems.entries, mask)
        return replace(marks, correct=marks.correct & problems.solvable[:, None])
