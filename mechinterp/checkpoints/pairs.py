"""Which checkpoints may be compared: one architecture, one size, one vocabulary, one tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mechinterp.checkpoints.opening import Checkpoint, open_checkpoint
from mechinterp.errors import CheckpointError

UNEMBEDDING = "lm_head.weight"


@dataclass(frozen=True)
class CheckpointPair:
    """A before and an after, and a control where there is one, that can be compared.

    Raises `CheckpointError` with the first difference in architecture, size, vocabulary, tensors or
    tokenizer. The weights may differ, and so may the type they are stored in.
    """

    before: Checkpoint
    after: Checkpoint
    control: Checkpoint | None = None

    def __post_init__(self) -> None:
        for other in (self.after, self.control):
            if other is not None and (reason := _why_incomparable(self.before, other)):
                raise CheckpointError(
                    f"{other.path}: cannot be compared with {self.before.path}: {reason}"
                )

    @classmethod
    def open(
        cls,
        before: str | Path,
        after: str | Path,
        control: str | Path | None = None,
        *,
        require_tokenizer: bool = False,
        allow_hub: bool = False,
    ) -> CheckpointPair:
        """Open the directories (see `open_checkpoint`) and compare them."""
        checkpoints = [
            open_checkpoint(path, require_tokenizer=require_tokenizer, allow_hub=allow_hub)
            for path in (before, after, control)
            if path is not None
        ]
        return cls(*checkpoints)


def describe_size_difference(
    architectures: tuple[str, str], sizes: tuple[dict[str, int], dict[str, int]]
) -> str | None:
    """The first difference between two models' architectures and sizes, or None."""
    if architectures[0] != architectures[1]:
        return f"it is a {architectures[1]}, the other a {architectures[0]}"
    for name in sizes[0] | sizes[1]:
        if sizes[0].get(name) != sizes[1].get(name):
            return f"{name} is {sizes[1].get(name)}, the other's {sizes[0].get(name)}"
    return None


def _why_incomparable(before: Checkpoint, other: Checkpoint) -> str | None:
    if difference := describe_size_difference(
        (before.architecture, other.architecture), (before.sizes, other.sizes)
    ):
        return f"{difference}; choose checkpoints of one architecture and size"
    for name in before.shapes | other.shapes:
        here, there = other.shapes.get(name), before.shapes.get(name)
        if name == UNEMBEDDING and None in (here, there):
            continue  # one of them ties it to the embedding, the other has its own: same function
        if here != there:
            return f"tensor {name!r} is {_shape(here)}, the other's {_shape(there)}; {_SAME_MODEL}"
    if before.has_tokenizer != other.has_tokenizer:
        without = before if other.has_tokenizer else other
        return f"{without.path} has no tokenizer; copy the other's tokenizer files into it"
    ours, theirs = other.tokenizer_parts, before.tokenizer_parts
    if differing := [name for name in sorted(ours | theirs) if ours.get(name) != theirs.get(name)]:
        return (
            f"their tokenizers differ in {', '.join(differing)}; choose checkpoints that share one"
        )
    return None


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else str(shape)


_SAME_MODEL = "choose checkpoints of one architecture and size"
