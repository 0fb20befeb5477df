"""Save checkpoints: whole or not at all, verified, and with their provenance."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

from mechinterp.checkpoints.opening import CONFIG, TOKENIZER_FILES, Checkpoint, verify
from mechinterp.checkpoints.pretrained import one_line, quiet_transformers
from mechinterp.checkpoints.provenance import (
    PROVENANCE,
    Provenance,
    is_action_shift,
    library_versions,
)
from mechinterp.checkpoints.weights import INDEX, WEIGHTS, read_tensors
from mechinterp.errors import CheckpointError
from mechinterp.files import atomic_directory

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def save_checkpoint(
    model: PreTrainedModel,
    path: str | Path,
    *,
    provenance: Provenance | None = None,
    tokenizer: PreTrainedTokenizerBase | Checkpoint | None = None,
    extra_files: Mapping[str, bytes] | None = None,
) -> Checkpoint:
    """Save a raw Hugging Face model: afterwards all of it is at `path`, or nothing is.

    What was written is verified before it takes its name, so a model with NaN weights, or one whose
    modules were wrapped, is refused. `tokenizer` may be a checkpoint, whose tokenizer files are
    copied as they are. `extra_files` has contents by relative name, such as
    "training_state/optimizer.safetensors"; opening a checkpoint ignores them.
    """
    path = Path(path)
    check_replaceable(path)
    provenance = provenance or Provenance()
    provenance = replace(provenance, versions=library_versions() | provenance.versions)
    with _errors_name(path), atomic_directory(path) as directory:
        try:
            with quiet_transformers():
                model.save_pretrained(directory)
        except (RuntimeError, ValueError) as error:
            raise CheckpointError(
                f"{directory}: the model cannot be saved ({one_line(error)}); save the raw Hugging "
                "Face model, not one that a bridge has wrapped, with a valid generation config"
            ) from error
        for weights in directory.glob("*.safetensors"):  # safetensors lets only their owner read
            weights.chmod((directory / CONFIG).stat().st_mode)
        if isinstance(tokenizer, Checkpoint):
            _copy_present(TOKENIZER_FILES, tokenizer.path, directory)
        elif tokenizer is not None:
            tokenizer.save_pretrained(directory)
        provenance.write(directory)
        for name, content in (extra_files or {}).items():
            _write_extra(directory, name, content)
        checkpoint = verify(directory, require_tokenizer=tokenizer is not None)
    return replace(checkpoint, path=path)


def with_action_shift(
    checkpoint: Checkpoint, path: str | Path, shift: Sequence[float]
) -> Checkpoint:
    """The same weights at `path`, whose provenance records `shift`, one number for each action.

    A shift recorded earlier is added to. The weights are hard links where the file system has them,
    so edit neither checkpoint in place; elsewhere they are copies.
    """
    path = Path(path)
    check_replaceable(path)
    if not is_action_shift(shift := tuple(shift)):
        raise CheckpointError(f"{path}: shift {shift} must be finite numbers, one for each action")
    origin = checkpoint.provenance or Provenance(versions=library_versions())
    earlier = origin.action_shift or (0.0,) * len(shift)
    if len(earlier) != len(shift):
        raise CheckpointError(
            f"{checkpoint.path / PROVENANCE}: action_shift has {len(earlier)} numbers, but the "
            f"shift to add has {len(shift)}; give one number for each action"
        )
    total = tuple(float(old + new) for old, new in zip(earlier, shift, strict=True))
    provenance = replace(origin, action_shift=total, parent_hash=checkpoint.content_hash)
    with atomic_directory(path) as directory:
        for weights in {tensor.file for tensor in read_tensors(checkpoint.path).values()}:
            _link_or_copy(weights, directory / weights.name)
        _copy_present(
            (CONFIG, "generation_config.json", INDEX, *TOKENIZER_FILES), checkpoint.path, directory
        )
        provenance.write(directory)
    return replace(checkpoint, path=path, provenance=provenance)


def check_replaceable(path: Path) -> None:
    """Saving replaces a directory, which must not be one with anything but a checkpoint in it."""
    if path.is_dir() and any(path.iterdir()):
        names = {entry.name for entry in path.iterdir()}
        if CONFIG not in names or not names & {WEIGHTS, INDEX}:
            raise CheckpointError(
                f"{path}: exists and is not a checkpoint; choose another path, or empty it"
            )
    elif path.exists() and not path.is_dir():
        raise CheckpointError(f"{path}: is a file; choose another path")


@contextlib.contextmanager
def _errors_name(path: Path) -> Iterator[None]:
    """Let errors found in the temporary directory speak of the path that was asked for."""
    try:
        yield
    except CheckpointError as error:
        temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        raise CheckpointError(str(error).replace(str(temporary), str(path))) from error


def _copy_present(names: tuple[str, ...], source: Path, target: Path) -> None:
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source.resolve(), target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def _write_extra(directory: Path, name: str, content: bytes) -> None:
    relative = PurePosixPath(name)
    target = directory / relative
    if relative.is_absolute() or ".." in relative.parts or target.exists():
        raise CheckpointError(f"extra file {name!r} must be a new name inside the checkpoint")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes(content)
