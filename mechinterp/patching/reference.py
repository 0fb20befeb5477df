"""What to patch in besides another prompt's activations: means, zeros, resampled items.

Everything here gives a list of tensors, one per layer, of one grain's activations for the items to
be patched: what `mechinterp.patching.sweeps.patch_sites` takes as `new`. Activations of another
checkpoint come from `mechinterp.patching.stored`, so that one model at a time is in memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_rng

Roles = Shaped[np.ndarray, "items positions"]
Mask = Int[Tensor, "items positions"]
OVER = ("position", "all", "role")


class ReferenceMean:
    """The mean of one grain's activations over a reference set, fed batch by batch (float64).

    Padding does not count. `over` says what is averaged together: "position" (each place in the
    prompt has its mean; of padded prompts, counted from their first real token), "all" (all
    positions have one mean) or "role" (positions that are called the same have one). Patterns have
    means of prompts of one length, without padding.

    Attributes:
        means: one [kinds *site] tensor per layer; None before the first batch.
        counts: how many activations entered the mean of each kind.
    """

    def __init__(self, model: HookedModel, grain: str, *, over: str = "position") -> None:
        if over not in OVER:
            raise AnalysisError(f"over: expected one of {', '.join(OVER)}, got {over!r}")
        if grain == "pattern" and over != "position":
            raise AnalysisError("over: attention patterns have a mean by position only")
        self.model, self.grain, self.over = model, grain, over
        self._roles: dict[str, int] = {}
        self._sums: list[Float[Tensor, " kinds *site"]] = []
        self.counts: Int[Tensor, " kinds"] = torch.zeros(0, dtype=torch.long)

    @torch.no_grad()
    def update(
        self,
        tokens: Int[Tensor, "items positions"],
        *,
        attention_mask: Mask | None = None,
        roles: Roles | None = None,
    ) -> ReferenceMean:
        """Add a batch of reference prompts; returns itself."""
        kinds = self._kinds(tuple(tokens.shape), attention_mask, roles, new=True)
        self._check_length(tokens.shape[1], attention_mask)
        sites = self.model.sites(self.grain)
        captured = self.model.capture(tokens, sites, attention_mask=attention_mask)
        used = kinds >= 0
        n_kinds = max(len(self.counts), int(kinds.max()) + 1)
        self.counts = _longer(self.counts, n_kinds).index_add(
            0, kinds[used], torch.ones_like(kinds[used])
        )
        for layer, site in enumerate(sites):
            values = captured[site]
            if self.grain == "pattern":
                values = rearrange(values, "items heads query key -> items query heads key")
            rows = values[used.to(values.device)].double()
            if len(self._sums) <= layer:
                self._sums.append(rows.new_zeros(0, *rows.shape[1:]))
            total = _longer(self._sums[layer], n_kinds)
            self._sums[layer] = total.index_add(0, kinds[used].to(rows.device), rows)
        return self

    @property
    def means(self) -> list[Float[Tensor, " kinds *site"]] | None:
        if not self._sums:
            return None
        counts = self.counts.double()
        return [
            total / counts.to(total.device).reshape(-1, *[1] * (total.ndim - 1))
            for total in self._sums
        ]

    def activations(
        self,
        shape: tuple[int, int],
        *,
        attention_mask: Mask | None = None,
        roles: Roles | None = None,
    ) -> list[Float[Tensor, "items positions *site"]]:
        """The means laid out for prompts of [items, positions]; zero at padding.

        Raises:
            AnalysisError: the reference had no such position or role, or was empty.
        """
        means = self.means
        if means is None:
            raise AnalysisError("reference mean: no batch was given; call `update` first")
        kinds = self._kinds(shape, attention_mask, roles, new=False)
        if int(kinds.max()) >= len(self.counts):
            raise AnalysisError(
                f"reference mean: the reference's longest prompt has {len(self.counts)} tokens, "
                f"these have {int(kinds.max()) + 1}; use longer reference prompts or over='all'"
            )
        self._check_length(shape[1], attention_mask)
        dtype = self.model.dtype
        if self.grain == "pattern":
            by_head = [rearrange(mean, "query heads key -> heads query key") for mean in means]
            return [mean.to(dtype).expand(shape[0], -1, -1, -1) for mean in by_head]
        if attention_mask is None and self.over != "role":  # every item the same: no copies
            return [
                mean.to(dtype)[kinds[0].to(mean.device)].expand(shape[0], *[-1] * mean.ndim)
                for mean in means
            ]
        padding = (kinds < 0).reshape(*shape, *[1] * (means[0].ndim - 1))
        return [
            mean.to(dtype)[kinds.clamp(min=0).to(mean.device)].masked_fill(
                padding.to(mean.device), 0.0
            )
            for mean in means
        ]

    def _check_length(self, n_positions: int, mask: Mask | None) -> None:
        """Patterns of other lengths, or with padding, have no mean."""
        if self.grain != "pattern":
            return
        known = self._sums[0].shape[-1] if self._sums else n_positions
        if n_positions != known or (mask is not None and not bool(mask.all())):
            raise AnalysisError(
                "reference mean: the mean of attention patterns takes prompts of one length, "
                f"without padding; got {n_positions} tokens and {known}"
            )

    def _kinds(
        self, shape: tuple[int, ...], mask: Mask | None, roles: Roles | None, *, new: bool
    ) -> Int[Tensor, "items positions"]:
        """Which mean each token belongs to; -1 for padding."""
        real = torch.ones(shape, dtype=torch.long) if mask is None else mask.cpu().long()
        if tuple(real.shape) != tuple(shape):
            raise AnalysisError(f"attention_mask: expected {tuple(shape)}, got {tuple(real.shape)}")
        if (roles is None) == (self.over == "role"):
            raise AnalysisError("roles: give them for over='role', and only then")
        if self.over == "position":
            kinds = real.cumsum(1) - 1
        elif roles is None:
            kinds = torch.zeros_like(real)
        else:
            kinds = self._role_numbers(np.asarray(roles).astype(str), real.bool(), new=new)
        return torch.where(real.bool(), kinds, -1)

    def _role_numbers(
        self, roles: np.ndarray, real: Bool[Tensor, "items positions"], *, new: bool
    ) -> Int[Tensor, "items positions"]:
        if roles.shape != tuple(real.shape):
            raise AnalysisError(
                f"roles: expected one per token, {tuple(real.shape)}, got {roles.shape}"
            )
        names, codes = np.unique(roles[real.numpy()], return_inverse=True)
        unknown = [name for name in names.tolist() if name not in self._roles]
        if new:
            self._roles |= {name: len(self._roles) + i for i, name in enumerate(unknown)}
        elif unknown:
            raise AnalysisError(
                f"roles: the reference has no {unknown[0]!r}, only {', '.join(self._roles)}"
            )
        numbers = torch.full(tuple(real.shape), -1)
        numbers[real] = torch.tensor([self._roles[n] for n in names.tolist()])[codes]
        return numbers


def mean_activations(
    model: HookedModel,
    reference: Int[Tensor, "references positions"],
    grain: str,
    *,
    over: str = "position",
    attention_mask: Mask | None = None,
    roles: Roles | None = None,
    batch_size: int = 256,
) -> ReferenceMean:
    """The mean over a reference set that is one tensor; see `ReferenceMean`.

    `mean_activations(model, reference, grain).activations(tokens.shape)` is what to patch in.
    """
    mean = ReferenceMean(model, grain, over=over)
    with progress_bar(f"mean {grain}", len(reference), unit="prompts") as advance:
        for start in range(0, len(reference), batch_size):
            rows = slice(start, start + batch_size)
            mean.update(
                reference[rows],
                attention_mask=None if attention_mask is None else attention_mask[rows],
                roles=None if roles is None else roles[rows],
            )
            advance(len(reference[rows]))
    return mean


def zero_activations(
    model: HookedModel, shape: tuple[int, int], grain: str
) -> list[Float[Tensor, "items positions *site"]]:
    """Zeros of a grain's shape for prompts of [items, positions]; they take no memory."""
    n_items, n_positions = shape
    site = site_shape(model, grain, n_positions)
    one = torch.zeros((), dtype=model.dtype, device=model.device)
    if grain == "pattern":
        return [one.expand(n_items, *site) for _ in range(model.n_layers)]
    return [one.expand(n_items, n_positions, *site) for _ in range(model.n_layers)]


@torch.no_grad()
def resampled_activations(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    grain: str,
    *,
    strata: Shaped[Any, " items"] | None = None,
    attention_mask: Mask | None = None,
    seed: int = 0,
    draw: int = 0,
    batch_size: int = 256,
) -> tuple[list[Float[Tensor, "items positions *site"]], Int[Tensor, " items"]]:
    """Each item's activations are another item's; also says whose (see `derangement`).

    Raises:
        AnalysisError: as `derangement`, or an item would get those of an item padded otherwise.
    """
    order = derangement(len(tokens), strata=strata, seed=seed, draw=draw)
    if attention_mask is not None and not torch.equal(attention_mask[order], attention_mask):
        raise AnalysisError(
            "resampling: an item would get the activations of a prompt of another length; "
            "give strata that tell the lengths apart"
        )
    return capture_grain(
        model, tokens[order], grain, attention_mask=attention_mask, batch_size=batch_size
    ), order


def derangement(
    n: int, *, strata: Shaped[Any, " items"] | None = None, seed: int = 0, draw: int = 0
) -> Int[Tensor, " n"]:
    """A permutation of n items that leaves none in place, uniform among all such.

    Args:
        strata: items are exchanged only with items of the same stratum (the same label, length).
        seed, draw: name the random stream "derangement".

    Raises:
        AnalysisError: a stratum has a single item, for which there is no other.
    """
    if strata is None:
        labels = np.zeros(n, dtype=int)
    else:
        labels = strata.cpu().numpy() if isinstance(strata, Tensor) else np.asarray(strata)
    if labels.shape != (n,):
        raise AnalysisError(f"strata: expected one per item, ({n},), got {labels.shape}")
    rng = derive_rng(seed, "derangement", draw)
    order = np.arange(n)
    for name in np.unique(labels):
        members = np.flatnonzero(labels == name)
        if len(members) < 2:
            raise AnalysisError(
                f"resampling: stratum {name} has {len(members)} item; each needs at least two"
            )
        # One permutation in e leaves none in place, however many items there are.
        places = np.arange(len(members))
        while (order[members] == members).any():
            order[members] = members[rng.permutation(places)]
    return torch.from_numpy(order)


@torch.no_grad()
def capture_grain(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    grain: str,
    *,
    attention_mask: Mask | None = None,
    batch_size: int = 256,
) -> list[Float[Tensor, "items positions *site"]]:
    """One grain's activations of all items, one tensor per layer."""
    sites = model.sites(grain)
    parts: list[list[Tensor]] = [[] for _ in sites]
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        mask = None if attention_mask is None else attention_mask[rows]
        captured = model.capture(tokens[rows], sites, attention_mask=mask)
        for kept, site in zip(parts, sites, strict=True):
            kept.append(captured[site])
    return [torch.cat(kept) for kept in parts]


def site_shape(model: HookedModel, grain: str, n_positions: int) -> tuple[int, ...]:
    """Shape of a grain's activations beyond [items positions]; of patterns, beyond [items]."""
    if grain == "pattern":
        return (model.n_heads, n_positions, n_positions)
    if grain in ("q", "head"):
        return (model.n_heads, model.d_head)
    if grain in ("k", "v"):
        return (model.n_kv_heads, model.d_head)
    if grain == "neuron":
        return (model.d_mlp,)
    return (model.d_model,)


def _longer(tensor: Tensor, length: int) -> Tensor:
    """With zeros appended along the first dimension."""
    if len(tensor) == length:
        return tensor
    extra = tensor.new_zeros(length - len(tensor), *tensor.shape[1:])
    return torch.cat([tensor, extra])
