"""Safetensors files that are filled in place, sealed with a checksum per tensor, and mapped.

The format: 8 bytes with the header's length, a JSON header with each tensor's type, shape and
place, and the tensors' bytes, row-major and little-endian. The checksums are in its metadata.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mechinterp.errors import StoreError

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_BLOCK_BYTES = 1 << 20
_NO_HASH = "0" * 64

Tensors = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class TensorFile:
    """One safetensors file of known content: names, types and shapes in the order of the file.

    `about` are strings to keep beside the tensors; `remedy` ends the message when it is damaged.
    """

    path: Path
    tensors: Tensors
    about: Mapping[str, str] = field(default_factory=dict)
    remedy: str = "write it again"

    @cached_property
    def offsets(self) -> dict[str, tuple[int, int]]:
        """Where each tensor begins and ends, counted from the end of the header."""
        places, end = {}, 0
        for name, (dtype, shape) in self.tensors.items():
            begin, end = end, end + prod(shape) * dtype.itemsize
            places[name] = (begin, end)
        return places

    @cached_property
    def n_bytes(self) -> int:
        return self._data_start + sum(end - begin for begin, end in self.offsets.values())

    @cached_property
    def _data_start(self) -> int:
        return len(self._header(dict.fromkeys(self.tensors, _NO_HASH)))

    def _header(self, checksums: Mapping[str, str]) -> bytes:
        """Of the same length whatever the checksums are, so that it can be written last."""
        header: dict[str, object] = {
            "__metadata__": {**self.about, "sha256": json.dumps(dict(checksums))}
        }
        for name, (dtype, shape) in self.tensors.items():
            header[name] = {
                "dtype": _NAMES[dtype],
                "shape": list(shape),
                "data_offsets": list(self.offsets[name]),
            }
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # tensors start at multiples of 8 bytes
        return len(text).to_bytes(8, "little") + text

    # ---- writing ---------------------------------------------------------------------------------

    def reserve(self) -> None:
        """Make the file at its full size, so that a full disk shows before anything is computed."""
        with open(self.path, "wb") as file:
            try:
                os.posix_fallocate(file.fileno(), 0, self.n_bytes)
            except OSError as error:
                if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                    raise
                file.truncate(self.n_bytes)  # a file system that cannot reserve
            except AttributeError:  # an operating system that cannot
                file.truncate(self.n_bytes)

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Put `values` at rows `start` onwards of a tensor of a reserved file."""
        dtype, shape = self.tensors[name]
        row_bytes = prod(shape[1:]) * dtype.itemsize
        offset = self._data_start + self.offsets[name][0] + start * row_bytes
        raw = values.to(dtype).cpu().contiguous().flatten().view(torch.uint8).numpy()
        with open(self.path, "r+b", buffering=0) as file:
            file.seek(offset)
            left = raw.data
            while left:  # a raw file may take less than it is given
                left = left[file.write(left) :]

    def seal(self, checksums: Mapping[str, str]) -> None:
        """Write the header, the last thing to be written, and wait for the disk."""
        with open(self.path, "r+b") as file:
            file.write(self._header(checksums))
            file.flush()
            os.fsync(file.fileno())

    # ---- reading ---------------------------------------------------------------------------------

    def check(self) -> dict[str, str]:
        """Compare size and header with what they must be; returns the recorded checksums.

        Raises:
            StoreError: the file is missing, truncated, or its header is damaged.
        """
        try:
            size = self.path.stat().st_size
            with open(self.path, "rb") as file:
                header = file.read(self._data_start)
        except OSError as error:
            raise self.damaged(f"cannot be read ({error.strerror})") from None
        if size != self.n_bytes:
            what = "is truncated" if size < self.n_bytes else "is too long"
            raise self.damaged(f"{what} ({size:,} of {self.n_bytes:,} bytes)")
        try:
            checksums = json.loads(json.loads(header[8:])["__metadata__"]["sha256"])
            intact = header == self._header(checksums)
        except (ValueError, KeyError, TypeError):
            intact, checksums = False, {}
        if not intact or set(checksums) != set(self.tensors):
            raise self.damaged("its header is not the one that was written")
        return checksums

    def damaged(self, what: str) -> StoreError:
        return StoreError(f"{self.path}: {what}; {self.remedy}")

    def blocks(self, name: str) -> Iterator[tuple[int, Tensor]]:
        """A tensor's rows from first to last, some megabytes at a time: first row, rows.

        A block is valid until the next one is asked for.
        """
        dtype, (n_rows, *rest) = self.tensors[name]
        row_bytes = prod(rest) * dtype.itemsize
        step = max(1, _BLOCK_BYTES // row_bytes)
        buffer = bytearray(min(step, n_rows) * row_bytes)
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self._data_start + self.offsets[name][0])
            for start in range(0, n_rows, step):
                n = min(step, n_rows - start)
                block, n_read = memoryview(buffer)[: n * row_bytes], 0
                while n_read < len(block):
                    if not (more := file.readinto(block[n_read:])):
                        raise self.damaged("became shorter while it was read")
                    n_read += more
                yield start, torch.frombuffer(block, dtype=dtype).view(n, *rest)

    def checksum(self, name: str) -> str:
        sha = hashlib.sha256()
        for _, block in self.blocks(name):
            sha.update(as_bytes(block))
        return sha.hexdigest()

    def verify(self, name: str) -> None:
        """Read a tensor's bytes against its checksum; raises StoreError where they differ."""
        self.compare(name, self.checksum(name))

    def compare(self, name: str, checksum: str) -> None:
        """The same where the checksum of its bytes is known."""
        if checksum != self.check()[name]:
            raise self.damaged(f"{name}: its bytes are not those that were written")

    def map(self, name: str) -> Tensor:
        """A tensor as a memory map. Writing to it changes memory, never the file."""
        dtype, shape = self.tensors[name]
        begin, end = self.offsets[name]
        raw = np.memmap(
            self.path,
            dtype=np.uint8,
            mode="c",
            offset=self._data_start + begin,
            shape=(end - begin,),
        )
        return torch.from_numpy(raw).view(dtype).view(shape)


def as_bytes(values: Tensor) -> memoryview:
    """The memory of a contiguous tensor, for a checksum."""
    return values.flatten().view(torch.uint8).numpy().data
