"""How sums are written: in words of our own, or as text in a language model's tokens.

    <s> 3 5 9 =           0 8 1 7 ANSWER 1 7 <end>
    Sum: 3+5+9=           08 17 answer 17<end>

Texts with as many terms have their digits at the same positions, so that they are one template
whose digits are filled in. Whatever is written, in either way, is read as the same symbols: the
digits as themselves, `ANSWER`, `END`, and `OTHER` for all else.
"""

from __future__ import annotations

import itertools
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.tasks.text import Text

START, EQUALS, ANSWER, END, PAD = range(10, 15)  # the digits are 0 .. 9
OTHER = PAD
EXAMPLES = ((4, 9), (2, 8, 6), (8, 1, 5, 3), (7, 0, 8, 9, 5))  # all of the training split
INSTRUCTION = (
    "Add the numbers one after the other. Write each running sum with two digits, then the word "
    "answer and the total."
)


@dataclass(frozen=True)
class Template:
    """A text of `n_terms` terms whose digits, all 0 here, stand at `digits`: the terms', then two
    for each running sum (if written) and for the total. The first `n_prompt` tokens are given."""

    tokens: Int[Tensor, " positions"]
    digits: Int[Tensor, " digits"]
    n_prompt: int
    n_terms: int

    @property
    def n_sums(self) -> int:
        return (len(self.digits) - self.n_terms) // 2 - 1

    def fill(
        self, values: Int[Tensor, "texts digits"], digit_tokens: Int[Tensor, " 10"]
    ) -> Int[Tensor, "texts positions"]:
        tokens = self.tokens.repeat(len(values), 1)
        tokens[:, self.digits] = digit_tokens[values]
        return tokens

    @property
    def roles(self) -> list[str]:
        """What stands at each position; signs and spaces are named by what they lead to."""
        names = [f"term {i + 1}" for i in range(self.n_terms)]
        gaps = ["start"] + ["plus"] * (self.n_terms - 1)
        for j in range(self.n_sums):
            names += [f"sum {j + 2} tens", f"sum {j + 2} units"]
            gaps += ["equals" if j == 0 else "space", "space"]
        names += ["answer tens", "answer units"]
        gaps += ["answer marker", "space"]
        roles, following = [], 0
        digits = self.digits.tolist()
        for position in range(len(self.tokens)):
            if following == len(digits):
                roles.append("end")
            elif position == digits[following]:
                roles.append(names[following])
                following += 1
            elif following == self.n_terms and position < self.n_prompt:
                roles.append("equals")
            else:
                roles.append(gaps[following])
        return roles


class SumText(ABC):
    """A way of writing sums."""

    vocab_size: int
    pad_token: int
    end_token: int
    digit_tokens: Int[Tensor, " 10"]

    @abstractmethod
    def template(self, n_terms: int, *, steps: bool = True) -> Template:
        """The text of `n_terms` terms, with its running sums or with the total alone."""

    @abstractmethod
    def symbols(
        self,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Int[Tensor, "problems samples symbols"]:
        """What was written, as symbols."""


@dataclass(frozen=True)
class WordText(SumText):
    """One token per symbol: token ids are the symbols themselves."""

    vocab_size = PAD + 1
    pad_token = PAD
    end_token = END
    digit_tokens = torch.arange(10)

    def template(self, n_terms: int, *, steps: bool = True) -> Template:
        n_sum_digits = 2 * (n_terms - 1) * steps
        tokens = [START, *[0] * n_terms, EQUALS, *[0] * n_sum_digits, ANSWER, 0, 0, END]
        tokens = torch.tensor(tokens)
        return Template(tokens, (tokens == 0).nonzero().flatten(), n_terms + 2, n_terms)

    def symbols(
        self,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Int[Tensor, "problems samples symbols"]:
        return completions.where(mask, torch.tensor(OTHER))


@dataclass(frozen=True)
class TokenizerText(SumText):
    """Text in the tokens of a checkpoint, which must write each digit as a token of its own."""

    text: Text

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return self.text.vocab_size

    @property
    def pad_token(self) -> int:  # type: ignore[override]
        return self.text.pad_token

    @property
    def end_token(self) -> int:  # type: ignore[override]
        return self.text.end_token

    @cached_property
    def digit_tokens(self) -> Int[Tensor, " 10"]:  # type: ignore[override]
        return torch.tensor([self.text.single(str(digit)) for digit in range(10)])

    def _prompt(self, terms: Sequence[int]) -> str:
        plus = "+".join(map(str, terms))
        if self.text.style == "chat":
            return self.text.chat(f"{INSTRUCTION}\n{plus}=")
        examples = ""
        if self.text.style == "few_shot":
            for example in EXAMPLES:
                shown = "+".join(map(str, example))
                examples += f"Sum: {shown}={_completion(_running(example))}\n"
        return f"{examples}Sum: {plus}="

    def template(self, n_terms: int, *, steps: bool = True) -> Template:
        zero = self._write([0] * n_terms, [0] * (n_terms - 1), steps=steps)
        n_digits = n_terms + 2 * (n_terms - 1) * steps + 2
        tokens = torch.tensor([*zero[0], *zero[1], self.end_token])
        digits = (tokens == self.digit_tokens[0]).nonzero().flatten()[-n_digits:]
        template = Template(tokens, digits, len(zero[0]), n_terms)
        terms = [(3 + 4 * i) % 10 for i in range(n_terms)]
        running = _running(terms)
        values = [*terms, *_digits(running if steps else []), *_digits(running[-1:])]
        written = self._write(terms, running, steps=steps)
        filled = template.fill(torch.tensor([values]), self.digit_tokens)[0].tolist()
        if filled != [*written[0], *written[1], self.end_token]:
            raise TaskError(
                f"{self.text.checkpoint}: the tokenizer joins digits with what stands "
                "beside them; one that writes each digit as a token of its own is needed"
            )
        return template

    def _write(
        self, terms: list[int], running: list[int], *, steps: bool
    ) -> tuple[list[int], list[int]]:
        """Tokens of the prompt and of the completion."""
        completion = _completion(running, steps=steps)
        return self.text.ids(self._prompt(terms)), self.text.ids(completion)

    def symbols(
        self,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> Int[Tensor, "problems samples symbols"]:
        texts, ended = self.text.read(completions, mask)
        read = [
            _read(text) + [END] * int(end)
            for row, ends in zip(texts, ended, strict=True)
            for text, end in zip(row, ends, strict=True)
        ]
        symbols = torch.full((len(read), max(map(len, read), default=0)), OTHER)
        for row, found in zip(symbols, read, strict=True):
            row[: len(found)] = torch.tensor(found)
        return symbols.unflatten(0, completions.shape[:2])


def _running(terms: Sequence[int]) -> list[int]:
    return list(itertools.accumulate(terms))[1:]


def _completion(running: list[int], *, steps: bool = True) -> str:
    sums = [f"{total:02}" for total in running]
    return f"{' '.join(sums) if steps else ''} answer {sums[-1]}"


def _digits(sums: list[int]) -> list[int]:
    return [digit for total in sums for digit in divmod(total, 10)]


def _read(text: str) -> list[int]:
    """Symbols of a text; a number of one or two digits is two symbols."""
    symbols = []
    for word in re.findall(r"[0-9]+|[^\W\d]+|\S", text):
        if re.fullmatch("[0-9]{1,2}", word):
            symbols += divmod(int(word), 10)
        else:
            symbols.append(ANSWER if word == "answer" else OTHER)
    return symbols


def sum_text(tokenizer: str | None, style: str) -> SumText:
    """The way of writing for a task's settings; raises TaskError."""
    if tokenizer is not None:
        return TokenizerText(Text(tokenizer, style))
    if style != "zero_shot":
        raise TaskError(f"arithmetic: style {style!r} needs a tokenizer: a checkpoint's path")
    return WordText()
