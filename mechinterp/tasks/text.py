"""Problems as text: a checkpoint's tokenizer, and the styles in which it is asked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import TaskError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STYLES = ("zero_shot", "few_shot", "chat")


@dataclass(frozen=True)
class Text:
    """The tokenizer of a `checkpoint`, which ends an answer as `style` does: "few_shot" with the
    line, the others with the tokenizer's own end token. Loaded when it is first used."""

    checkpoint: str
    style: str = "zero_shot"

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise TaskError(f"style: must be one of {', '.join(STYLES)}, got {self.style!r}")

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        from mechinterp.checkpoints import open_checkpoint

        return open_checkpoint(self.checkpoint, require_tokenizer=True).load_tokenizer()

    @property
    def vocab_size(self) -> int:
        return len(self._tokenizer)

    @cached_property
    def end_token(self) -> int:
        if self.style == "few_shot":
            return self.single("\n")
        if not isinstance(self._tokenizer.eos_token_id, int):
            raise TaskError(f"{self.checkpoint}: the tokenizer has no end token; use few_shot")
        return self._tokenizer.eos_token_id

    @property
    def pad_token(self) -> int:
        pad = self._tokenizer.pad_token_id
        return pad if isinstance(pad, int) else self.end_token

    def ids(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]  # type: ignore[return-value]

    def single(self, text: str) -> int:
        """The one token that `text` must be."""
        ids = self.ids(text)
        if len(ids) != 1:
            raise TaskError(
                f"{self.checkpoint}: the tokenizer writes {text!r} as {len(ids)} tokens; one that "
                "writes single digits and line ends as one token each is needed"
            )
        return ids[0]

    def chat(self, request: str) -> str:
        """The prompt by which the chat template asks `request`."""
        if self._tokenizer.chat_template is None:
            raise TaskError(f"{self.checkpoint}: the tokenizer has no chat template")
        return self._tokenizer.apply_chat_template(  # type: ignore[return-value]
            [{"role": "user", "content": request}], tokenize=False, add_generation_prompt=True
        )

    def read(
        self,
        completions: Int[Tensor, "problems samples tokens"],
        mask: Bool[Tensor, "problems samples tokens"],
    ) -> tuple[list[list[str]], Bool[Tensor, "problems samples"]]:
        """What was written by problem and sample, without the end token, and whether it ended."""
        is_end = (completions == self.end_token) & mask
        kept = mask & ~is_end
        texts = [
            self._tokenizer.batch_decode(
                [row[keep].tolist() for row, keep in zip(*of, strict=True)]
            )
            for of in zip(completions, kept, strict=True)
        ]
        return texts, is_end.any(-1)  # type: ignore[return-value]


def stack_left(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows width] padded on the left, and a mask that is true on what is not padding."""
    tokens, mask = stack_right([row[::-1] for row in rows], pad)
    return tokens.flip(1), mask.flip(1)


def stack_right(rows: list[list[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Tokens [rows width] padded on the right, and a mask that is true on what is not padding."""
    width = max(map(len, rows))
    tokens = torch.tensor([row + [pad] * (width - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, torch.arange(width) < lengths[:, None]
