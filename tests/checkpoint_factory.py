"""Tiny checkpoints with a real tokenizer, and ways to spoil or change them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import D_VOCAB, tiny_model
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechinterp.checkpoints import Checkpoint, save_checkpoint

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
UP = "model.layers.1.mlp.up_proj.weight"  # some weight of a Llama
Change = Callable[[Path], object]


def tiny_tokenizer(n_words: int = D_VOCAB, first: str = "word") -> PreTrainedTokenizerFast:
    vocabulary = {f"{first}{index}": index for index in range(n_words - 1)}
    tokenizer = Tokenizer(WordLevel({**vocabulary, "unknown": n_words - 1}, unk_token="unknown"))
    tokenizer.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="unknown")


def tiny_checkpoint(path: Path, family: str = "llama", **options) -> Checkpoint:
    return save_checkpoint(tiny_model(family), path, tokenizer=tiny_tokenizer(), **options)


def same_weights(model: PreTrainedModel, other: PreTrainedModel) -> bool:
    first, second = model.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


def edit_json(path: Path, **changes) -> None:
    """Set fields of a JSON object; None removes a field."""
    values = json.loads(path.read_text())
    for name, value in changes.items():
        values.pop(name, None) if value is None else values.update({name: value})
    path.write_text(json.dumps(values))


# Changes to make in a checkpoint's directory.


def set_config(**changes) -> Change:
    return lambda path: edit_json(path / "config.json", **changes)


def write(name: str, content: str | bytes) -> Change:
    content = content.encode() if isinstance(content, str) else content
    return lambda path: (path / name).write_bytes(content)


def remove(*names: str) -> Change:
    return lambda path: [(path / name).unlink() for name in names]


def edit_bytes(change: Callable[[bytes], bytes]) -> Change:
    return lambda path: (path / WEIGHTS).write_bytes(change((path / WEIGHTS).read_bytes()))


def edit_tensors(
    change: Callable[[dict[str, torch.Tensor]], object], file: str = WEIGHTS
) -> Change:
    def apply(path: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(path / file).items()}
        change(tensors)
        save_file(tensors, path / file, metadata={"format": "pt"})

    return apply


def put(value: float) -> Change:
    """Set one weight."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[UP][-1, -1] = value

    return edit_tensors(change)


def edit_index(**changes: str) -> Change:
    def apply(path: Path) -> None:
        index = json.loads((path / INDEX).read_text())
        index["weight_map"].update(changes)
        (path / INDEX).write_text(json.dumps(index))

    return apply


class Bomb:
    """Leaves the file "exploded" behind when it is unpickled."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def __reduce__(self):
        return Path.write_text, (self.directory / "exploded", "")
