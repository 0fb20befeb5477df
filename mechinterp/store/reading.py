"""`open_store`: what was captured, as memory maps, compared with its checksums when first read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import SiteError, StoreError
from mechinterp.sites import Site
from mechinterp.store.moments import Statistics
from mechinterp.store.plan import LENGTHS, TOKENS, StorePlan
from mechinterp.store.tensor_file import TensorFile


@dataclass(frozen=True, eq=False)
class ActivationStore(Mapping[Site, Tensor]):
    """A finished store: `store["resid_post.3"]` is [items *site] or [items positions *site].

    Tensors are memory maps where the store is one shard, else one site's shards put together;
    `chunks` gives memory maps always. A site's bytes are compared with their checksum when it is
    first read. Writing to a tensor changes memory, never the file.
    """

    plan: StorePlan
    verified: bool = False  # do not compare with checksums
    _seen: set[tuple[Path, str]] = field(default_factory=set, repr=False)

    @property
    def path(self) -> Path:
        return self.plan.path

    @property
    def n_items(self) -> int:
        return self.plan.n_items

    def __getitem__(self, site: Site | str) -> Float[Tensor, "items *rest"]:
        return self._read(self._name(site))

    def __iter__(self) -> Iterator[Site]:
        return iter(self.plan.sites)

    def __len__(self) -> int:
        return len(self.plan.sites)

    def layer(self, grain: str, layer: int) -> Float[Tensor, "items *rest"]:
        """One grain at one layer.

        Raises:
            SiteError: it is not in the store.
            StoreError: its bytes are not those that were written.
        """
        return self[Site(grain, layer)]

    def layers(self, grain: str) -> Iterator[tuple[int, Float[Tensor, "items *rest"]]]:
        """Layer and activations, from the first layer to the last, one in memory at a time."""
        sites = [site for site in self if site.grain == grain and site.head is None]
        if not sites:
            raise self._absent(grain)
        return ((site.layer, self[site]) for site in sites)

    def chunks(self, site: Site | str) -> Iterator[Float[Tensor, "some_items *rest"]]:
        """A site's items in order, one memory map per shard, for data larger than memory."""
        name = self._name(site)
        return (self._map(shard, name) for shard in self.plan.shards)

    def statistics(self, site: Site | str) -> Statistics:
        """Count, mean, variance and covariance of what is stored at a site."""
        name, file = self._name(site), self.plan.finished_statistics()
        if file is None:
            raise StoreError(f"{self.path}: its statistics are missing; capture it again")
        covariance = f"covariance.{name}"
        return Statistics(
            count=int(self._map(file, "count")),
            mean=self._map(file, f"mean.{name}"),
            variance=self._map(file, f"variance.{name}"),
            covariance=self._map(file, covariance) if covariance in file.tensors else None,
        )

    @property
    def tokens(self) -> Int[Tensor, "items positions"]:
        """The items' tokens, zeros after an item's end."""
        return self._read(TOKENS)

    @property
    def lengths(self) -> Int[Tensor, " items"]:
        """How many tokens each item has."""
        return self._read(LENGTHS)

    def describe(self) -> str:
        """What is in the store, in a few lines."""
        key, shapes = self.plan.key, self.plan.site_shapes
        axes = () if self.plan.n_positions is None else (self.plan.n_positions,)
        shape = " ".join(str(n) for n in (self.n_items, *axes, *shapes[key.sites[0]]))
        return "\n".join(
            (
                f"store       {self.path}",
                f"sites       {len(self)}: {key.sites[0]} to {key.sites[-1]}",
                f"each        [{shape}] {key.dtype}",
                f"size        {self.plan.item_bytes * self.n_items / 1e6:,.1f} MB",
                f"key         {key.hash}",
            )
        )

    def verify(self) -> None:
        """Compare every byte with its checksum.

        Raises:
            StoreError: naming the file, the site and the remedy.
        """
        statistics = self.plan.finished_statistics()
        for file in (*self.plan.shards, *([statistics] if statistics else [])):
            for name in file.tensors:
                file.verify(name)

    def _read(self, name: str) -> Tensor:
        parts = [self._map(shard, name) for shard in self.plan.shards]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _map(self, file: TensorFile, name: str) -> Tensor:
        if not self.verified and (file.path, name) not in self._seen:
            file.verify(name)
            self._seen.add((file.path, name))
        return file.map(name)

    def _name(self, site: Site | str) -> str:
        name = str(Site.parse(site))
        if name not in self.plan.key.sites:
            raise self._absent(name)
        return name

    def _absent(self, name: str) -> SiteError:
        some = ", ".join(self.plan.key.sites[:4])
        more = f" and {len(self) - 4} more" if len(self) > 4 else ""
        return SiteError(f"{self.path}: {name} is not in this store, which has {some}{more}")


def open_store(path: str | Path, *, verify: bool = True) -> ActivationStore:
    """Open what `capture` left.

    Args:
        verify: compare each site with its checksum when it is first read, which reads it whole;
            without, only sizes and headers are checked.

    Raises:
        StoreError: there is no store, it is not finished, or a file is damaged.
    """
    plan = StorePlan.read(Path(path))
    if plan.missing or plan.finished_statistics() is None:
        n_done = plan.n_shards - len(plan.missing)
        raise StoreError(
            f"{path}: is not finished ({n_done} of {plan.n_shards} shards); give the same capture "
            "again to go on"
        )
    for shard in plan.shards:
        shard.check()
    return ActivationStore(plan, verified=not verify)
