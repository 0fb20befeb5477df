"""`capture`: one forward pass per batch, no further than the last site, straight to the disk."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import SiteError, StoreError
from mechinterp.files import atomic_file
from mechinterp.hooked import HookedModel
from mechinterp.model_checks import check_sites
from mechinterp.progress import progress_bar
from mechinterp.sites import GRAINS, Site
from mechinterp.store.moments import Moments
from mechinterp.store.plan import (
    ABOUT,
    LENGTHS,
    TOKENS,
    StoreKey,
    StorePlan,
    storable_dtype,
    weights_hash,
)
from mechinterp.store.prompts import Ids, Positions, Prompts, Selection, real_positions
from mechinterp.store.reading import ActivationStore, open_store
from mechinterp.store.tensor_file import TensorFile, as_bytes
from mechinterp.tasks.base import Items

SHARD_BYTES = 512 * 2**20
COVARIANCE_WIDTH = 1024


@torch.no_grad()
def capture(
    model: HookedModel,
    items: Items | Ids,
    *,
    out: str | Path,
    sites: Site | str | Iterable[Site | str] = "resid_post",
    layers: Iterable[int] | None = None,
    positions: Positions = "decision",
    attention_mask: Int[Tensor, "items positions"] | None = None,
    dtype: str | torch.dtype = "float32",
    batch_size: int = 32,
    shard_bytes: int = SHARD_BYTES,
    covariance_width: int = COVARIANCE_WIDTH,
) -> ActivationStore:
    """Run `items` through `model` once and leave activations and their statistics in `out`.

    The same call goes on where an earlier one stopped: shards that are there are verified, not run
    again. Memory is that of one batch and of the statistics, whatever the number of items.

    Args:
        items: a task's items, token ids [items positions], or sequences of any length.
        sites: grains ("resid_post": every layer), sites ("head.2.5"), or several of either.
        layers: keep only these layers of the grains.
        positions: "decision" or "last" (each item's last token), "all", an index, several, or one
            per item [items]; counted along the item's real tokens, negative from their end. "all"
            holds zeros after an item's end.
        attention_mask: where `items` is a padded tensor, on either side.
        dtype: float32, float16 or bfloat16, of the stored values.
        batch_size: not in the key; it changes at most a value's last digits.
        shard_bytes: size of a file, and so how much work an interruption can lose.
        covariance_width: the widest site whose covariance is kept, where there are as many rows:
            8 width^2 bytes, in memory until the end, and 2 width^2 operations in float64 per row.

    Raises:
        StoreError: `out` holds something else or something damaged, the disk is full, or a value
            is not finite in `dtype`.
        SiteError: a site is misspelt or not in this network.
    """
    out, prompts = Path(out), Prompts.of(items, attention_mask)
    chosen = choose_sites(model, sites, layers)
    selection = Selection.of(positions, prompts)
    key = StoreKey(
        checkpoint=weights_hash(model),
        items=prompts.content_hash,
        sites=tuple(str(site) for site in chosen),
        positions=selection.key,
        dtype=storable_dtype(dtype),
        computed_in=str(model.dtype).removeprefix("torch."),
    )
    plan = _plan_there(out, key)
    if plan is None:
        plan = _new_plan(model, prompts, selection, key, out, chosen, shard_bytes)
        _check_space(plan)
        plan.write()
    else:
        _check_space(plan)
    statistics = plan.finished_statistics()
    wanted = plan.statistics(covariance_width)
    if (
        statistics is not None
        and not plan.missing
        and set(wanted.tensors) <= set(statistics.tensors)
    ):
        store = open_store(out)
        store.verify()
        return store
    moments = {
        name: Moments(plan.width(name), covariance=f"covariance.{name}" in wanted.tensors)
        for name in key.sites
    }
    with progress_bar("capturing", plan.n_items, unit="items") as advance:
        for index, shard in enumerate(plan.shards):
            rows = plan.rows(index)
            if shard.path.is_file():
                shard.check()
                for name, checksum in _scan(shard, prompts.lengths[rows], plan, moments):
                    shard.compare(name, checksum)
                advance(rows.stop - rows.start)
                continue
            with _naming_a_full_disk(shard), atomic_file(shard.path) as temporary:
                part = replace(shard, path=temporary)
                part.reserve()
                for start in range(rows.start, rows.stop, batch_size):
                    batch = slice(start, min(start + batch_size, rows.stop))
                    _run(model, prompts, selection, chosen, plan, batch, rows.start, part)
                    advance(batch.stop - batch.start)
                part.seal(dict(_scan(part, prompts.lengths[rows], plan, moments)))
    with _naming_a_full_disk(wanted), atomic_file(wanted.path) as temporary:
        _write_statistics(replace(wanted, path=temporary), moments)
    return open_store(out)


def choose_sites(
    model: HookedModel,
    sites: Site | str | Iterable[Site | str],
    layers: Iterable[int] | None = None,
) -> list[Site]:
    """Sites in the network's order; a grain stands for its sites at `layers`, or at all.

    Raises:
        SiteError: one is misspelt or not in this network.
    """
    within = range(model.n_layers) if layers is None else sorted(set(layers))
    chosen: set[Site] = set()
    for name in [sites] if isinstance(sites, Site | str) else sites:
        if isinstance(name, str) and (name in GRAINS or "." not in name):
            chosen |= {Site(name, layer) for layer in within}
        else:
            chosen.add(Site.parse(name))
    if not chosen:
        raise SiteError("sites: none is given; name a grain such as resid_post")
    return check_sites(model, sorted(chosen))


def _plan_there(out: Path, key: StoreKey) -> StorePlan | None:
    """The plan of a store that is in `out` already, cleared of what a killed run left.

    Raises:
        StoreError: what is there is something else.
    """
    if out.exists() and not out.is_dir():
        raise StoreError(f"{out}: is a file; give a directory as --out")
    if not (out / ABOUT).exists():
        if out.exists() and any(out.iterdir()):
            raise StoreError(f"{out}: holds files but no store; give an empty or new --out")
        return None
    for left in out.glob(".*.tmp-*"):
        left.unlink(missing_ok=True)
    if not any(out.glob("*.safetensors")):  # it failed before its first shard: nothing to lose
        return None
    plan = StorePlan.read(out)
    plan.refuse_other(key)
    return plan


def _new_plan(
    model: HookedModel,
    prompts: Prompts,
    selection: Selection,
    key: StoreKey,
    out: Path,
    sites: list[Site],
    shard_bytes: int,
) -> StorePlan:
    """The layout, with shapes from a run of one token."""
    tokens, mask = prompts.batch(slice(0, 1))
    mask = None if mask is None else mask[:, :1]
    sample = model.capture(tokens[:, :1], sites, positions=0, attention_mask=mask)
    shapes = {}
    for site in sites:
        shape = tuple(sample[site].shape[1:])
        shapes[str(site)] = (*shape[:-1], prompts.max_length) if site.grain == "pattern" else shape
    plan = StorePlan(
        path=out,
        key=key,
        site_shapes=shapes,
        n_positions=selection.n,
        n_items=len(prompts),
        max_length=prompts.max_length,
        items_per_shard=1,
    )
    per_shard = min(len(prompts), max(1, shard_bytes // plan.item_bytes))
    return replace(plan, items_per_shard=per_shard)


def _run(
    model: HookedModel,
    prompts: Prompts,
    selection: Selection,
    sites: list[Site],
    plan: StorePlan,
    batch: slice,
    first: int,
    part: TensorFile,
) -> None:
    """Run one batch and write it."""
    tokens, mask = prompts.batch(batch)
    lengths, start = prompts.lengths[batch], batch.start - first
    columns = selection.columns(batch, lengths)
    captured = model.capture(
        tokens, sites, positions=selection.to_capture(columns), attention_mask=mask
    )
    for site in sites:
        values = selection.pick(captured[site], site, columns, lengths, plan.max_length)
        values = values.to(plan.dtype)
        if not torch.isfinite(values).all():
            raise StoreError(_why_not_finite(site, captured[site], plan, batch))
        part.write(str(site), start, values)
    padded = torch.full((len(lengths), plan.max_length), 0)
    padded[:, : tokens.shape[1]] = tokens
    part.write(TOKENS, start, padded)
    part.write(LENGTHS, start, lengths)


def _why_not_finite(site: Site, captured: Tensor, plan: StorePlan, batch: slice) -> str:
    where = f"{plan.path}: {site}, items {batch.start} to {batch.stop - 1}"
    if not torch.isfinite(captured).all():
        return f"{where}: the network's own activations are not finite; use another checkpoint"
    largest = float(captured.abs().max())
    return f"{where}: {largest:.3g} does not fit {plan.key.dtype}; use --dtype bfloat16 or float32"


def _scan(
    file: TensorFile,
    lengths: Int[Tensor, " items"],
    plan: StorePlan,
    moments: dict[str, Moments],
) -> Iterator[tuple[str, str]]:
    """Read a shard back: the checksum of each tensor, and the sites into their moments.

    So statistics are those of the bytes that are stored, the same after an interruption.
    """
    for name in file.tensors:
        sha = hashlib.sha256()
        for start, block in file.blocks(name):
            sha.update(as_bytes(block))
            if name in moments:
                rows = block.reshape(-1, plan.width(name))
                if plan.key.positions == "all":
                    of_block = lengths[start : start + len(block)]
                    rows = rows[real_positions(of_block, plan.max_length).flatten()]
                moments[name].update(rows)
        yield name, sha.hexdigest()


def _write_statistics(file: TensorFile, moments: dict[str, Moments]) -> None:
    file.reserve()
    count = next(iter(moments.values())).count
    file.write("count", 0, torch.tensor([count]))
    for name, found in moments.items():
        file.write(f"mean.{name}", 0, found.mean)
        file.write(f"variance.{name}", 0, found.variance)
        if f"covariance.{name}" in file.tensors and found.covariance is not None:
            file.write(f"covariance.{name}", 0, found.covariance)
    file.seal({name: file.checksum(name) for name in file.tensors})


def _check_space(plan: StorePlan) -> None:
    """Raise StoreError, before anything is run, where the disk cannot hold what is missing."""
    needed = sum(shard.n_bytes for shard in plan.missing)
    place = next(
        path for path in (plan.path.absolute(), *plan.path.absolute().parents) if path.exists()
    )
    free = shutil.disk_usage(place).free
    if needed > free:
        raise StoreError(
            f"{plan.path}: needs {needed / 1e6:,.1f} MB and the disk has {free / 1e6:,.1f} MB "
            "free; free some, or store fewer items, sites or positions, or another dtype"
        )


@contextlib.contextmanager
def _naming_a_full_disk(file: TensorFile) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise StoreError(
            f"{file.path}: the disk is full ({file.n_bytes / 1e6:,.1f} MB are needed); free some "
            "and give the same capture again: finished shards are kept"
        ) from error
