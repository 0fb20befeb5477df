"""Prompts without their padding, and which of their positions are stored."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp.errors import StoreError
from mechinterp.sites import Site
from mechinterp.store.tensor_file import as_bytes
from mechinterp.tasks.base import Items

Ids = Int[Tensor, "items positions"] | Sequence[Sequence[int]]
# "decision" (a task's is the last token), "last", "all", one, several, or one per item.
Positions = str | int | Sequence[int] | Int[Tensor, " items"]
_ROWS = 4096


@dataclass(frozen=True, eq=False)
class Prompts:
    """Items of any length, to be had in batches whose padding is on the right.

    A causal network's activations do not depend on what comes after, so they are those of each
    item alone, whichever side it was padded on.
    """

    ids: Ids
    attention_mask: Int[Tensor, "items positions"] | None = None

    @classmethod
    def of(cls, items: Items | Ids, attention_mask: Tensor | None = None) -> Prompts:
        """Raises StoreError where there is no item, an empty one, or a mask that does not fit."""
        prompts = cls(items.tokens if isinstance(items, Items) else items, attention_mask)
        if attention_mask is not None and (
            not isinstance(prompts.ids, Tensor) or attention_mask.shape != prompts.ids.shape
        ):
            raise StoreError(
                f"attention_mask: shape {tuple(attention_mask.shape)} is not that of the tokens; "
                "give one entry per token"
            )
        if len(prompts) == 0 or not prompts.lengths.all():
            raise StoreError("items: there is none, or one without tokens; leave empty ones out")
        return prompts

    def __len__(self) -> int:
        return len(self.ids)

    @cached_property
    def lengths(self) -> Int[Tensor, " items"]:
        """Real tokens of each item."""
        if self.attention_mask is not None:
            return self.attention_mask.bool().sum(1).cpu()
        if isinstance(self.ids, Tensor):
            return torch.full((len(self.ids),), self.ids.shape[1])
        return torch.tensor([len(ids) for ids in self.ids])

    @cached_property
    def max_length(self) -> int:
        return int(self.lengths.max())

    def batch(
        self, rows: slice
    ) -> tuple[Int[Tensor, "batch positions"], Int[Tensor, "batch positions"] | None]:
        """Tokens of some items, padded on the right with 0, and their mask.

        Without a mask where the items are a plain tensor, so that the model still refuses one that
        looks padded on the left.
        """
        lengths = self.lengths[rows]
        if isinstance(self.ids, Tensor) and self.attention_mask is None:
            return self.ids[rows].cpu(), None
        real = torch.arange(int(lengths.max())) < rearrange(lengths, "batch -> batch 1")
        tokens = torch.zeros(real.shape, dtype=torch.int64)
        if self.attention_mask is not None and isinstance(self.ids, Tensor):
            tokens[real] = self.ids[rows][self.attention_mask[rows].bool()].cpu().long()
        else:
            ragged = [torch.as_tensor(ids, dtype=torch.int64) for ids in self.ids[rows]]
            tokens[real] = torch.cat(ragged)
        return tokens, real.long()

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of every item's length and real tokens: the same however they are padded."""
        sha = hashlib.sha256()
        for start in range(0, len(self), _ROWS):
            rows = slice(start, start + _ROWS)
            tokens, mask = self.batch(rows)
            sha.update(as_bytes(self.lengths[rows].contiguous()))
            real = tokens if mask is None else tokens[mask.bool()]
            sha.update(as_bytes(real.long().contiguous()))
        return sha.hexdigest()


@dataclass(frozen=True, eq=False)
class Selection:
    """Which positions of each item are stored, counted along its real tokens.

    Attributes:
        name: what stands in the store's key.
        n: how many there are; None where the stored tensors have no axis for them.
    """

    name: str | tuple[int, ...]
    n: int | None
    _per_item: Int[Tensor, " items"] | None = None

    @classmethod
    def of(cls, positions: Positions, prompts: Prompts) -> Selection:
        """Raises StoreError for an unknown name or a position that an item lacks or has twice."""
        if isinstance(positions, str):
            if positions == "all":
                return cls("all", prompts.max_length)
            if positions in ("decision", "last"):
                return cls("last", None)
            raise StoreError(
                f"positions: {positions!r} is unknown; give decision, last, all or indexes"
            )
        if isinstance(positions, Tensor):
            if positions.shape != (len(prompts),):
                raise StoreError(
                    f"positions: a tensor gives one position per item, so its shape must be "
                    f"({len(prompts)},), got {tuple(positions.shape)}"
                )
            selection = cls(
                hashlib.sha256(as_bytes(positions.long().cpu().contiguous())).hexdigest(),
                None,
                positions.long().cpu(),
            )
        elif isinstance(positions, int):
            selection = cls("last", None) if positions == -1 else cls((positions,), None)
        else:
            selection = cls(tuple(int(p) for p in positions), len(positions))
        if selection.n == 0:
            raise StoreError("positions: none is given; give decision, last, all or indexes")
        selection._check(prompts.lengths)
        return selection

    def _check(self, lengths: Int[Tensor, " items"]) -> None:
        columns = self.columns(slice(None), lengths).sort(dim=1).values
        outside = (columns[:, 0] < 0) | (columns[:, -1] >= lengths)
        twice = (columns.diff(dim=1) == 0).any(1)
        for found, what in ((outside, "too few for"), (twice, "one of them named twice by")):
            if found.any():
                item = int(found.nonzero()[0])
                given = columns[item].tolist()
                raise StoreError(
                    f"positions: item {item} has {int(lengths[item])} tokens, {what} {given}; "
                    "give positions that every item has, each once"
                )

    @property
    def key(self) -> str | list[int] | int:
        """As in the store's key: a position without an axis differs from a list of one."""
        if isinstance(self.name, str):
            return self.name
        return self.name[0] if self.n is None else list(self.name)

    def columns(
        self, rows: slice, lengths: Int[Tensor, " batch"]
    ) -> Int[Tensor, "batch positions"]:
        """The selected columns of a batch that is padded on the right; `rows` are its items."""
        if self._per_item is not None:
            index = rearrange(self._per_item[rows], "batch -> batch 1")
        elif self.name == "all":
            index = torch.arange(int(lengths.max())).expand(len(lengths), -1)
        else:
            wanted = torch.tensor([-1] if self.name == "last" else self.name)
            index = wanted.expand(len(lengths), -1)
        return torch.where(index < 0, index + rearrange(lengths, "batch -> batch 1"), index)

    def to_capture(
        self, columns: Int[Tensor, "batch positions"]
    ) -> int | list[int] | Int[Tensor, " batch"] | None:
        """`positions` for `HookedModel.capture`; None (all) where it can only be picked after."""
        if self.name == "all":
            return None
        if (columns == columns[0]).all():
            return columns[0].tolist() if self.n is not None else int(columns[0, 0])
        return columns[:, 0] if self.n is None else None

    def pick(
        self,
        captured: Tensor,
        site: Site,
        columns: Int[Tensor, "batch positions"],
        lengths: Int[Tensor, " batch"],
        max_length: int,
    ) -> Tensor:
        """[batch *site] or [batch positions *site] from what was captured at `to_capture`."""
        if site.grain == "pattern":
            if self.n is not None and site.head is None:
                captured = rearrange(captured, "b heads query key -> b query heads key")
            captured = _widen(captured, captured.ndim - 1, max_length)
        if self.name == "all":
            captured = captured.clone()
            real = real_positions(lengths, captured.shape[1])
            captured[~real.to(captured.device)] = 0
            return _widen(captured, 1, max_length)
        if self.n is not None and self.to_capture(columns) is None:
            rows = torch.arange(len(columns)).unsqueeze(1)
            return captured[rows.to(captured.device), columns.to(captured.device)]
        return captured


def real_positions(
    lengths: Int[Tensor, " items"], n_positions: int
) -> Bool[Tensor, "items positions"]:
    return torch.arange(n_positions) < rearrange(lengths, "items -> items 1")


def _widen(values: Tensor, axis: int, length: int) -> Tensor:
    """Zeros after what is there, along `axis`."""
    missing = length - values.shape[axis]
    if missing == 0:
        return values
    shape = [*values.shape[:axis], missing, *values.shape[axis + 1 :]]
    return torch.cat([values, values.new_zeros(shape)], dim=axis)
