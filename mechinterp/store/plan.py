"""What a store holds, by content, and the files that it is made of: `store.json`."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from mechinterp.errors import StoreError
from mechinterp.files import read_json, value_hash, write_json
from mechinterp.hooked import HookedModel
from mechinterp.sites import Site
from mechinterp.store.tensor_file import TensorFile, as_bytes

ABOUT = "store.json"
STATISTICS = "statistics.safetensors"
TOKENS, LENGTHS = "tokens", "lengths"
_FORMAT = 1
_SIZES = ("n_positions", "n_items", "max_length", "items_per_shard")
_STORABLE = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class StoreKey:
    """All that the values depend on, and nothing else: no path, no date, no batch size.

    Attributes:
        checkpoint: the content hash of config and weights.
        items: a hash of every item's real tokens, in order.
        sites: their names, sorted.
        positions: "last", "all", an index, a list of them, or a hash of one per item.
        dtype: in which values are stored.
        computed_in: the model's own dtype while it ran.
    """

    checkpoint: str
    items: str
    sites: tuple[str, ...]
    positions: str | int | list[int]
    dtype: str
    computed_in: str

    @property
    def hash(self) -> str:
        return value_hash(asdict(self))


@dataclass(frozen=True)
class StorePlan:
    """A store's key and the layout of its files. `site_shapes` are those of one item and position;
    `n_positions` is None where one position is stored without an axis."""

    path: Path
    key: StoreKey
    site_shapes: Mapping[str, tuple[int, ...]]
    n_positions: int | None
    n_items: int
    max_length: int
    items_per_shard: int

    @classmethod
    def read(cls, path: Path) -> StorePlan:
        """Raises StoreError where `path` holds no store, or its store.json is damaged."""
        if not (path / ABOUT).is_file():
            raise StoreError(f"{path}: is no store of activations: it has no {ABOUT}; capture one")
        try:
            about = read_json(path / ABOUT)
            content, checksum = about["store"], about["sha256"]
        except (ValueError, KeyError, TypeError):
            content, checksum = {}, ""
        if value_hash(content) != checksum:
            raise StoreError(
                f"{path / ABOUT}: is not what was written; delete {path} and capture it again"
            )
        if content["format"] != _FORMAT:
            raise StoreError(
                f"{path / ABOUT}: format: {content['format']} is not the format {_FORMAT} of this "
                f"version; delete {path} and capture it again"
            )
        key = StoreKey(**{**content["key"], "sites": tuple(content["key"]["sites"])})
        shapes = {name: tuple(shape) for name, shape in content["site_shapes"].items()}
        sizes = {name: content[name] for name in _SIZES}
        return cls(path=path, key=key, site_shapes=shapes, **sizes)

    def write(self) -> None:
        content: dict[str, Any] = {"format": _FORMAT, "key": asdict(self.key)}
        content["site_shapes"] = {name: list(shape) for name, shape in self.site_shapes.items()}
        content |= {name: getattr(self, name) for name in _SIZES}
        write_json(self.path / ABOUT, {"store": content, "sha256": value_hash(content)})

    def refuse_other(self, key: StoreKey) -> None:
        """Raise StoreError, naming the field, unless this is the store of `key`."""
        for field in fields(StoreKey):
            ours, wanted = getattr(self.key, field.name), getattr(key, field.name)
            if ours != wanted:
                raise StoreError(
                    f"{self.path / ABOUT}: {field.name}: this is a store of {_short(ours)}, not "
                    f"of {_short(wanted)}; give another --out, or delete {self.path}"
                )

    # ---- files -----------------------------------------------------------------------------------

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.key.dtype)

    @property
    def sites(self) -> tuple[Site, ...]:
        return tuple(Site.parse(name) for name in self.key.sites)

    @property
    def item_bytes(self) -> int:
        """What one item takes on the disk."""
        axis = 1 if self.n_positions is None else self.n_positions
        numbers = axis * sum(self.width(name) for name in self.key.sites)
        return numbers * self.dtype.itemsize + 8 * (self.max_length + 1)

    @property
    def n_shards(self) -> int:
        return -(-self.n_items // self.items_per_shard)

    def rows(self, shard: int) -> slice:
        """The items of a shard."""
        start = shard * self.items_per_shard
        return slice(start, min(start + self.items_per_shard, self.n_items))

    @cached_property
    def shards(self) -> tuple[TensorFile, ...]:
        return tuple(self._shard(i, self.path / _shard_name(i)) for i in range(self.n_shards))

    def _shard(self, index: int, path: Path) -> TensorFile:
        rows = self.rows(index)
        n = rows.stop - rows.start
        axes = () if self.n_positions is None else (self.n_positions,)
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            TOKENS: (torch.int64, (n, self.max_length)),
            LENGTHS: (torch.int64, (n,)),
        }
        for name in self.key.sites:
            tensors[name] = (self.dtype, (n, *axes, *self.site_shapes[name]))
        about = {"format": "pt", "key": self.key.hash, "items": f"{rows.start}:{rows.stop}"}
        remedy = f"delete {path} and give the same capture again: only it is redone"
        return TensorFile(path, tensors, about, remedy)

    def width(self, site: str) -> int:
        """How many numbers the site has at one position of one item."""
        return prod(self.site_shapes[site])

    def statistics(self, covariance_width: int) -> TensorFile:
        """The file of mean, variance and, for sites of at most this width, covariance.

        Where there are fewer rows than numbers in one, it would be singular and take more space
        than the activations: it is not kept.
        """
        widest = min(covariance_width, self.n_items * (self.n_positions or 1))
        tensors: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {"count": (torch.int64, (1,))}
        for name in self.key.sites:
            tensors[f"mean.{name}"] = (torch.float64, self.site_shapes[name])
            tensors[f"variance.{name}"] = (torch.float64, self.site_shapes[name])
            if (width := self.width(name)) <= widest:
                tensors[f"covariance.{name}"] = (torch.float64, (width, width))
        path = self.path / STATISTICS
        about = {
            "format": "pt",
            "key": self.key.hash,
            "covariance_width": str(covariance_width),
        }
        remedy = f"delete {path} and give the same capture again: only it is redone"
        return TensorFile(path, tensors, about, remedy)

    def finished_statistics(self) -> TensorFile | None:
        """The file of statistics as it lies there, whatever covariances it has; None without one.

        Raises:
            StoreError: it is damaged.
        """
        path = self.path / STATISTICS
        if not path.is_file():
            return None
        try:
            with open(path, "rb") as file:
                header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            width = int(header["__metadata__"]["covariance_width"])
        except (OSError, ValueError, KeyError, TypeError, OverflowError, MemoryError):
            raise self.statistics(0).damaged("its header is damaged") from None
        statistics = self.statistics(width)
        statistics.check()
        return statistics

    @property
    def missing(self) -> list[TensorFile]:
        """Shards that are not there yet."""
        return [shard for shard in self.shards if not shard.path.is_file()]


def _shard_name(index: int) -> str:
    return f"shard-{index:05d}.safetensors"


def _short(value: Any) -> str:
    """Enough of a field's value to tell two apart in a line."""
    if isinstance(value, tuple):
        value = ", ".join(value)
        return value if len(value) <= 60 else f"{value[:40]} ... ({value.count(',') + 1} sites)"
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text


def weights_hash(model: HookedModel) -> str:
    """A checkpoint's content hash; of a live model, a hash of its config and weights now."""
    if model.checkpoint is not None:
        return model.checkpoint.content_hash
    sha = hashlib.sha256(model.model.config.to_json_string().encode())
    for name, tensor in sorted(model.model.state_dict().items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(as_bytes(tensor.detach().cpu().contiguous()))
    return sha.hexdigest()


def storable_dtype(dtype: str | torch.dtype) -> str:
    """Its name; raises StoreError for any but float32, float16 and bfloat16."""
    names = {str(known).removeprefix("torch."): known for known in _STORABLE}
    for name, known in names.items():
        if dtype in (name, known):
            return name
    raise StoreError(f"dtype: {dtype} cannot be stored; use one of {', '.join(names)}")
