"""Sequences of one-digit numbers to be added: drawn, put into splits, and marked when written."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mechinterp.errors import TaskError
from mechinterp.tasks.splits import in_split
from mechinterp.tasks.sum_texts import ANSWER, END, OTHER
from mechinterp.tasks.written import Marks

if TYPE_CHECKING:
    import pandas as pd

MOST_TERMS = 11  # whose total still has two digits
TEXT_COLUMNS = ("terms", "sums", "answer")
CANDIDATES = 8  # drawn per problem, of which the first in the split is taken
MOST_DRAWS = 100


def draw_terms(
    n_terms: Int[Tensor, " problems"],
    *,
    split: str,
    generator: torch.Generator,
    total: int = 0,
    has_total: Bool[Tensor, " problems"] | None = None,
) -> Int[Tensor, "problems terms"]:
    """Terms of problems in `split`, -1 after their last, each sequence as likely as any other.

    Where `has_total`, these are the sequences with that `total`. Raises TaskError where there are
    none.
    """
    terms = torch.full((len(n_terms), int(n_terms.max())), -1)
    missing = torch.arange(len(n_terms))
    for _ in range(MOST_DRAWS):
        drawn = _candidates(n_terms[missing], generator)
        if has_total is not None and has_total.any():
            chosen = has_total[missing]
            drawn[chosen] = _with_total(n_terms[missing][chosen], total, drawn[chosen], generator)
        usable = in_split(group_of(drawn), split)
        found, first = usable.any(1), usable.long().argmax(1)
        terms[missing[found], : drawn.shape[2]] = drawn[found, first[found]]
        missing = missing[~found]
        if len(missing) == 0:
            return terms
    raise TaskError(
        f"arithmetic: split {split!r} has no {int(n_terms[missing[0]])} numbers with the total "
        f"{total}; ask for more numbers or another total"
    )


def _candidates(
    n_terms: Int[Tensor, " problems"], generator: torch.Generator
) -> Int[Tensor, "problems candidates terms"]:
    shape = (len(n_terms), CANDIDATES, int(n_terms.max()))
    terms = torch.randint(0, 10, shape, generator=generator)
    return terms.where(torch.arange(shape[2]) < n_terms[:, None, None], -1)


def _with_total(
    n_terms: Int[Tensor, " problems"],
    total: int,
    like: Int[Tensor, "problems candidates terms"],
    generator: torch.Generator,
) -> Int[Tensor, "problems candidates terms"]:
    """Term by term, each digit as likely as there are ways to go on from it to the total."""
    ways = _ways(like.shape[2], total)
    left = n_terms.repeat_interleave(like.shape[1])
    rest = torch.full_like(left, total)
    columns = []
    for _ in range(like.shape[2]):
        left = left - 1
        after = rest[:, None] - torch.arange(10)
        weights = ways[left.clamp(min=0)[:, None], after.clamp(min=0)] * (after >= 0)
        weights[left < 0] = 1  # no further term: any digit, not to be used
        digit = weights.multinomial(1, generator=generator)[:, 0]
        rest = torch.where(left < 0, rest, rest - digit)
        columns.append(digit.where(left >= 0, -1))
    return torch.stack(columns, 1).reshape(like.shape)


def _ways(n_terms: int, total: int) -> Float[Tensor, "terms totals"]:
    """How many sequences of so many digits have each total up to `total`."""
    ways = torch.zeros(n_terms + 1, total + 1, dtype=torch.float64)
    ways[0, 0] = 1
    for k in range(n_terms):
        for digit in range(min(10, total + 1)):
            ways[k + 1, digit:] += ways[k, : total + 1 - digit]
    return ways


def digits_of(
    terms: Int[Tensor, "texts terms"],
    sums: Int[Tensor, "texts sums"],
    answers: Int[Tensor, " texts"],
) -> Int[Tensor, "texts digits"]:
    """The digits of a text in their order."""
    pairs = torch.cat([sums, answers[:, None]], 1)
    pairs = torch.stack([pairs // 10, pairs % 10], -1)
    return torch.cat([terms, rearrange(pairs, "text sum place -> text (sum place)")], 1)


def group_of(terms: Int[Tensor, "... terms"]) -> Int[Tensor, "..."]:
    """A number for what the terms are in any order; -1 is no term."""
    powers = MOST_TERMS ** torch.arange(terms.shape[-1])
    return ((terms.sort(-1, descending=True).values + 1) * powers).sum(-1)


def mark_sums(
    symbols: Int[Tensor, "problems samples symbols"],
    entries: Sequence[tuple[int, ...]],
    mask: Bool[Tensor, "problems samples tokens"],
) -> Marks:
    """Marks of what was written for the terms `entries`, as symbols; `mask` is of the tokens.

    The answer is two digits after the first answer marker; the text must end there. The j-th pair
    of digits at the beginning is the j-th running sum; what is written after the last running sum,
    or after anything else than a digit, is none.
    """
    terms = pad_sequence([torch.tensor(entry) for entry in entries], True)
    n_sums = torch.tensor([len(entry) - 1 for entry in entries])
    sums = terms.cumsum(1)[:, 1:]
    n_pairs = sums.shape[1]
    symbols = torch.nn.functional.pad(symbols, (0, max(4, 2 * n_pairs)), value=OTHER)

    is_marker = symbols == ANSWER
    place = is_marker.long().argmax(-1, keepdim=True)
    tens, units, end = (
        symbols.gather(-1, (place + i).clamp(max=symbols.shape[-1] - 1))[..., 0] for i in (1, 2, 3)
    )
    answered = is_marker.any(-1) & (tens < 10) & (units < 10)
    answer = torch.where(answered, 10 * tens + units, -1)
    right = (answer == sums[:, -1:]) & (end == END)

    written = symbols[..., : 2 * n_pairs]
    is_written = (written < 10).long().cumprod(-1)[..., 1::2].bool()
    values = 10 * written[..., ::2] + written[..., 1::2]
    expected = (torch.arange(n_pairs) < n_sums[:, None])[:, None]
    missing = (~is_written & expected).sum(-1) / n_sums[:, None]
    wrong = (is_written & expected & (values != sums[:, None])).sum(-1) / n_sums[:, None]
    return Marks(
        correct=right,
        answer=answer,
        confidence=torch.full(answer.shape, torch.nan),
        confidence_tokens=torch.zeros_like(mask),
        steps_missing=missing,
        steps_wrong=wrong,
    )


def table_of(
    symbols: Int[Tensor, "problems samples symbols"],
    answers: Int[Tensor, "problems samples"],
    entries: Sequence[tuple[int, ...]],
) -> pd.DataFrame:
    """A row per completion that has an answer (not -1): its problem's `terms`, the `sums` that it
    begins with and its `answer`, each as text, numbers with spaces between."""
    import pandas as pd

    n_digits = (symbols < 10).long().cumprod(-1).sum(-1)
    rows = []
    for problem, sample in (answers >= 0).nonzero().tolist():
        digits = symbols[problem, sample, : n_digits[problem, sample] // 2 * 2]
        sums = (10 * digits[::2] + digits[1::2]).tolist()
        parts = (entries[problem], sums, [int(answers[problem, sample])])
        rows.append([" ".join(map(str, part)) for part in parts])
    return pd.DataFrame(rows, columns=list(TEXT_COLUMNS))


def read_table(
    path: str | Path, *, n_terms: int, split: str
) -> tuple[Int[Tensor, "texts terms"], Int[Tensor, "texts sums"], Int[Tensor, " texts"]]:
    """Terms, sums and answers of the texts in `split` with `n_terms` terms and all their sums.

    Raises TaskError where the file lacks a column of `table_of`, or has no such text.
    """
    import pandas as pd

    table = pd.read_parquet(path)
    if missing := [column for column in TEXT_COLUMNS if column not in table]:
        raise TaskError(f"{path}: no column {missing[0]!r}; see Arithmetic.written_texts")
    widths = (n_terms, n_terms - 1, 1)
    rows = [
        [[int(word) for word in text.split()] for text in row]
        for row in table[list(TEXT_COLUMNS)].itertuples(index=False)
    ]
    rows = [[*row[0], *row[1], *row[2]] for row in rows if tuple(map(len, row)) == widths]
    every = torch.tensor(rows, dtype=torch.long).reshape(len(rows), sum(widths))
    texts = every[in_split(group_of(every[:, :n_terms]), split)]
    if len(texts) == 0:
        raise TaskError(f"{path}: no text of {n_terms} terms with all sums in split {split!r}")
    terms, sums, answers = texts.split(widths, dim=1)
    return terms, sums, answers[:, 0]


def running_sums(
    terms: Int[Tensor, "texts terms"], *, slips: float, generator: torch.Generator
) -> Int[Tensor, "texts sums"]:
    """Sums of the first two terms, of the first three and so on, each with probability `slips` off
    by its units digit; those after it go on from there."""
    if slips == 0:
        return terms.cumsum(1)[:, 1:]
    total, sums = terms[:, 0], []
    for term in terms.T[1:]:
        total = total + term
        slipped = torch.rand(len(terms), generator=generator) < slips
        off = torch.randint(1, 10, (len(terms),), generator=generator)
        total = torch.where(slipped, total // 10 * 10 + (total + off) % 10, total)
        total = total.clamp(max=99)
        sums.append(total)
    return torch.stack(sums, 1)
