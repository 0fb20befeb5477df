"""Open a checkpoint: verify everything that can be wrong with it, then hash it."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.checkpoints.pretrained import (
    essential_config,
    fit_tensors,
    one_line,
    quiet_transformers,
    read_model_class,
    read_sizes,
)
from mechinterp.checkpoints.provenance import Provenance
from mechinterp.checkpoints.weights import digest_tensor, read_tensors
from mechinterp.errors import CheckpointError
from mechinterp.files import file_hash, value_hash

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CONFIG = "config.json"
# A tokenizer is there when its vocabulary is: without one transformers may make up an empty one.
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
TOKENIZER_FILES = (
    *_VOCABULARIES,
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
_DTYPES = ("float32", "bfloat16", "float16", "float64")
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was found whole when it was opened.

    `content_hash` covers the config and the weights, not the provenance: it stays the same when the
    checkpoint is saved again, sharded or moved, and changes with any weight. `config` is what is in
    config.json. `shapes` has the model's tensors by name, each tied weight once. `sizes` has
    `hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size` and the like, under
    these names whatever the config calls them.
    """

    path: Path
    config: dict[str, Any] = field(repr=False, compare=False)
    content_hash: str
    provenance: Provenance | None = field(repr=False, hash=False)
    has_tokenizer: bool
    shapes: dict[str, tuple[int, ...]] = field(repr=False, compare=False)
    sizes: dict[str, int] = field(repr=False, compare=False)

    @property
    def architecture(self) -> str:
        """The model class in transformers, for example "LlamaForCausalLM"."""
        return self.config["architectures"][0]

    @property
    def vocab_size(self) -> int:
        return self.sizes["vocab_size"]

    @property
    def n_parameters(self) -> int:
        return sum(prod(shape) for shape in self.shapes.values())

    @property
    def behaviour_hash(self) -> str:
        """The address of whatever depends on decisions: `content_hash` and the recorded shift."""
        shift = self.provenance.action_shift if self.provenance else None
        return self.content_hash if shift is None else value_hash([self.content_hash, list(shift)])

    def load_model(
        self,
        *,
        dtype: str = "float32",
        attn_implementation: str = "eager",
        device: str = "cpu",
    ) -> PreTrainedModel:
        """The raw Hugging Face model, in evaluation mode."""
        import torch
        import transformers

        if dtype not in _DTYPES:
            raise CheckpointError(f"dtype {dtype!r} is unknown; use one of {', '.join(_DTYPES)}")
        try:
            with quiet_transformers():
                model = getattr(transformers, self.architecture).from_pretrained(
                    self.path,
                    dtype=getattr(torch, dtype),
                    attn_implementation=attn_implementation,
                    use_safetensors=True,
                    local_files_only=True,
                )
        except (OSError, ValueError, ImportError) as error:
            raise CheckpointError(
                f"{self.path}: cannot be loaded with attn_implementation={attn_implementation!r} "
                f"({one_line(error)}); use 'eager' or 'sdpa'"
            ) from error
        return model.to(device).eval()

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer saved with the checkpoint; never one made up, never one from elsewhere."""
        from transformers import AutoTokenizer

        if not self.has_tokenizer:
            raise CheckpointError(_no_tokenizer(self.path))
        try:
            with quiet_transformers():
                tokenizer = AutoTokenizer.from_pretrained(self.path, local_files_only=True)
            largest = max(tokenizer.get_vocab().values())
        except Exception as error:  # damaged files can fail anywhere
            raise CheckpointError(
                f"{self.path}: its tokenizer cannot be loaded ({one_line(error)}); {_RESTORE}"
            ) from error
        if largest >= self.vocab_size:
            raise CheckpointError(
                f"{self.path}: its tokenizer makes ids up to {largest} but {CONFIG} has vocab_size "
                f"{self.vocab_size}; {_RESTORE}"
            )
        return tokenizer

    @cached_property
    def tokenizer_parts(self) -> dict[str, str]:
        """A hash of each part of the tokenizer that decides how text becomes ids, by name."""
        path = self.path / "tokenizer.json"
        if not path.is_file():
            files = [self.path / name for name in (*_VOCABULARIES, "merges.txt")]
            return {file.name: file_hash(file) for file in files if file.is_file()}
        parts = read_json_object(path, _RESTORE)
        for does_not_decide in ("padding", "truncation", "version"):
            parts.pop(does_not_decide, None)
        merges = parts.get("model", {}).get("merges")
        if merges and isinstance(merges[0], list):  # older versions write "a b" for ["a", "b"]
            parts["model"]["merges"] = [" ".join(pair) for pair in merges]
        return {name: value_hash(part) for name, part in parts.items()}


def open_checkpoint(
    path: str | Path, *, require_tokenizer: bool = False, allow_hub: bool = False
) -> Checkpoint:
    """Open and verify a checkpoint directory, or raise a `CheckpointError` with reason and remedy.

    Reads every weight once (for NaN, infinity and the hash). With `allow_hub`, a `path` that is not
    a directory is downloaded as a Hugging Face hub id; without, there is no network.
    """
    directory = Path(path)
    if not directory.is_dir():
        if not (allow_hub and _is_hub_id(path)):
            raise CheckpointError(_why_no_directory(path))
        directory = _download(str(path))
    return verify(directory, require_tokenizer=require_tokenizer)


def verify(directory: Path, *, require_tokenizer: bool = False) -> Checkpoint:
    """Check a directory in order of cost, so that most refusals come before torch is imported."""
    values = read_config(directory)
    tensors = read_tensors(directory)
    provenance = Provenance.read(directory)
    has_tokenizer = any((directory / name).is_file() for name in _VOCABULARIES)
    if require_tokenizer and not has_tokenizer:
        raise CheckpointError(_no_tokenizer(directory))
    with quiet_transformers():
        model_class, config = read_model_class(directory / CONFIG, values)
        layout = fit_tensors(directory, model_class, config, tensors)
    contents = {
        name: (tensors[stored].dtype, tensors[stored].shape, digest_tensor(tensors[stored]))
        for stored, name in layout.names.items()
    }
    for name, source in layout.tied.items():
        content = contents.pop(name, None)
        if content is not None and contents.setdefault(source, content) != content:
            raise CheckpointError(
                f"{directory}: {name!r} and {source!r} differ although {CONFIG} ties them; "
                'set "tie_word_embeddings": false there'
            )
    described = [model_class.__name__, essential_config(config), sorted(contents.items())]
    canonical = json.dumps(described, sort_keys=True, default=str)
    return Checkpoint(
        path=directory,
        config={**values, "architectures": [model_class.__name__]},
        content_hash=hashlib.sha256(canonical.encode()).hexdigest(),
        provenance=provenance,
        has_tokenizer=has_tokenizer,
        shapes={name: contents[name][1] for name in sorted(contents)},
        sizes=read_sizes(config),
    )


def read_config(directory: Path) -> dict[str, Any]:
    """The content of config.json."""
    path = directory / CONFIG
    if not path.is_file():
        if (directory / "adapter_config.json").is_file():
            raise CheckpointError(
                f"{directory}: is an adapter, not a model; merge it with PEFT's "
                "`merge_and_unload()` and save the merged model"
            )
        if any(directory.glob("step-*")):
            raise CheckpointError(f"{directory}: is a trajectory; give one of its checkpoints")
        raise CheckpointError(
            f"{directory}: has no {CONFIG}; give a directory saved with `model.save_pretrained`"
        )
    return read_json_object(path, "restore the one saved with the weights")


def read_json_object(path: Path, remedy: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON; {remedy}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: is not a JSON object; {remedy}")
    return value


def _is_hub_id(path: str | Path) -> bool:
    return _HUB_ID.fullmatch(str(path)) is not None


def _why_no_directory(path: str | Path) -> str:
    if Path(path).exists():
        return f"{path}: is a file; give the directory that has {CONFIG} and the weights"
    if _is_hub_id(path):
        return (
            f"{path}: there is no such directory; if it is a hub id, download it first: "
            f"`hf download {path} --local-dir DIR`"
        )
    return f"{path}: there is no such directory; correct the path"


def _download(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
            )
        )
    except Exception as error:  # offline, gated, renamed: many classes of error
        raise CheckpointError(
            f"{hub_id}: cannot be downloaded from the hub ({one_line(error)}); check the id, the "
            "network and your access"
        ) from error


def _no_tokenizer(directory: Path) -> str:
    return (
        f"{directory}: has no tokenizer files; save them there with "
        "`tokenizer.save_pretrained(DIR)`, or use a task that brings its own token ids"
    )


_RESTORE = "restore the tokenizer files saved with the weights"
