"""Read safetensors files strictly: what they hold, whether they are whole, a digest per tensor.

Only the documented format is read (8 bytes of header length, a JSON header, the data), so torch is
not needed and nothing can be executed. Memory use is one buffer, whatever the file's size.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from mechinterp.errors import CheckpointError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"

_ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
# The bits that are all set in a NaN or infinity and in nothing else: the exponent. E4M3 has no
# infinity; its NaN has every bit set but the sign.
_NON_FINITE_BITS = {
    "F8_E4M3": 0x7F,
    "F8_E5M2": 0x7C,
    "F16": 0x7C00,
    "BF16": 0x7F80,
    "F32": 0x7F80_0000,
    "F64": 0x7FF0_0000_0000_0000,
}
_BUFFER_BYTES = 1 << 22
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: `offset` and `n_bytes` count bytes of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    offset: int
    n_bytes: int


def read_tensors(directory: Path) -> dict[str, StoredTensor]:
    """Every tensor of a checkpoint by name, from `model.safetensors` or the shards of its index.

    Raises `CheckpointError` when weights are missing, pickled, truncated or do not fit their index.
    """
    if (directory / WEIGHTS).is_file():
        return {tensor.name: tensor for tensor in _read_header(directory / WEIGHTS)}
    if not (directory / INDEX).is_file():
        raise CheckpointError(_why_no_weights(directory))
    shard_of = _read_index(directory / INDEX)
    shards = sorted(set(shard_of.values()))
    if missing := [shard for shard in shards if not (directory / shard).is_file()]:
        raise CheckpointError(
            f"{directory / INDEX}: shards missing from the directory: {_listed(missing)}; "
            "copy or download them again"
        )
    tensors: dict[str, StoredTensor] = {}
    for shard in shards:
        for tensor in _read_header(directory / shard):
            if tensor.name in tensors:
                raise CheckpointError(
                    f"{directory / shard}: tensor {tensor.name!r} is also in "
                    f"{tensors[tensor.name].file.name}; save the model again"
                )
            tensors[tensor.name] = tensor
    if absent := [name for name, shard in shard_of.items() if _file_name(tensors, name) != shard]:
        raise CheckpointError(
            f"{directory / INDEX}: names tensors that are not in their shard: {_listed(absent)}; "
            "copy or download index and shards again"
        )
    return tensors


def digest_tensor(tensor: StoredTensor) -> str:
    """SHA-256 of a tensor's bytes, in hex; the same pass refuses NaN and infinity."""
    sha = hashlib.sha256()
    for chunk in _chunks(tensor):
        sha.update(chunk)
        if _has_non_finite(chunk, tensor.dtype):
            raise CheckpointError(
                f"{tensor.file}: tensor {tensor.name!r} holds NaN or infinity; "
                "training diverged or the file is damaged, use an earlier checkpoint"
            )
    return sha.hexdigest()


def _chunks(tensor: StoredTensor) -> Iterator[memoryview]:
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, tensor.n_bytes)))
    left = tensor.n_bytes
    with open(tensor.file, "rb") as file:
        file.seek(tensor.offset)
        while left:
            chunk = buffer[: min(left, len(buffer))]
            if file.readinto(chunk) < len(chunk):
                raise CheckpointError(f"{tensor.file}: became shorter while it was read; try again")
            left -= len(chunk)
            yield chunk


def _has_non_finite(chunk: memoryview, dtype: str) -> bool:
    import numpy as np

    if dtype not in _NON_FINITE_BITS:
        return False
    items = np.frombuffer(chunk, f"<u{_ITEM_BYTES[dtype]}")
    bits = items.dtype.type(_NON_FINITE_BITS[dtype])
    return bool(((items & bits) == bits).any())


def _read_header(path: Path) -> list[StoredTensor]:
    """The tensors of one file, whose header and data must account for every byte of it."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        if start == b"version ":
            raise CheckpointError(
                f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull`"
            )
        header_bytes = int.from_bytes(start, "little")
        if size < 8 or (header_bytes <= _MAX_HEADER_BYTES and size < 8 + header_bytes):
            raise CheckpointError(_truncated(path, size))
        if header_bytes > _MAX_HEADER_BYTES:
            raise CheckpointError(f"{path}: is not a safetensors file; {_AGAIN}")
        text = file.read(header_bytes)
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = [_stored(path, 8 + header_bytes, name, entry) for name, entry in header.items()]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: has no valid safetensors header; {_AGAIN}") from error
    end = 8 + header_bytes
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.n_bytes)):
        if tensor.offset != end:
            raise CheckpointError(
                f"{path}: tensor {tensor.name!r} leaves a gap or overlap; {_AGAIN}"
            )
        end += tensor.n_bytes
    if size < end:
        raise CheckpointError(_truncated(path, size, end))
    if size > end:
        raise CheckpointError(f"{path}: has {size - end} bytes after its last tensor; {_AGAIN}")
    return tensors


def _stored(path: Path, data_start: int, name: str, entry: dict[str, Any]) -> StoredTensor:
    if entry["dtype"] not in _ITEM_BYTES:
        raise CheckpointError(
            f"{path}: tensor {name!r} is stored as {entry['dtype']}, which is not supported; "
            "save the model in float32, bfloat16 or float16"
        )
    begin, end = (int(offset) for offset in entry["data_offsets"])
    shape = tuple(int(length) for length in entry["shape"])
    if end - begin != prod(shape) * _ITEM_BYTES[entry["dtype"]]:
        raise ValueError(f"{name}: its length in bytes does not fit its shape")
    return StoredTensor(name, entry["dtype"], shape, path, data_start + begin, end - begin)


def _read_index(path: Path) -> dict[str, str]:
    try:
        shard_of = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        shards = set(shard_of.values())
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}: is not a safetensors index; {_AGAIN}") from error
    if strange := [shard for shard in shards if not _is_file_name(shard)]:
        raise CheckpointError(
            f"{path}: {strange[0]!r} is not the name of a .safetensors file beside it; {_AGAIN}"
        )
    if not shard_of:
        raise CheckpointError(f"{path}: names no tensors; {_AGAIN}")
    return shard_of


def _is_file_name(shard: object) -> bool:
    """A path could point outside the checkpoint, another suffix to a pickle."""
    return isinstance(shard, str) and shard.endswith(".safetensors") and Path(shard).name == shard


def _why_no_weights(directory: Path) -> str:
    names = sorted(path.name for path in directory.iterdir() if path.is_file())
    if shards := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"{directory}: has {_listed(shards)} but neither {WEIGHTS} nor {INDEX}; "
            "copy or download the missing file"
        )
    suffixes = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    if pickled := [name for name in names if name.endswith(suffixes)]:
        return (
            f"{directory}: has no {WEIGHTS}, only pickled weights ({_listed(pickled)}), which can "
            "run code and are never read; convert them where you trust them: "
            "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)"
        )
    return f"{directory}: has no {WEIGHTS}; copy or download it, or save the model again"


def _truncated(path: Path, size: int, expected: int | None = None) -> str:
    of = f" of {expected:,}" if expected else ""
    return f"{path}: is truncated ({size:,}{of} bytes); {_AGAIN}"


def _file_name(tensors: dict[str, StoredTensor], name: str) -> str | None:
    return tensors[name].file.name if name in tensors else None


def _listed(names: list[str], limit: int = 3) -> str:
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


_AGAIN = "copy, download or save it again"
