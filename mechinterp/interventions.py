"""Reading and writing sites while blocks run: positions, interventions, captured activations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.architectures import Block
from mechinterp.contexts import KeyValues
from mechinterp.errors import ModelError, SiteError
from mechinterp.sites import Site

# All positions, one position, several, or one for each item of the batch.
Positions = int | Sequence[int] | Int[Tensor, " batch"] | None


@dataclass(frozen=True, eq=False)
class Intervention:
    """Replace what stands at a site.

    Args:
        site: where; a `Site` or its name.
        value: the new activations, broadcast to the selected ones, or a function of the selected
            ones that returns as many. Gradients flow through either.
        positions: all (None), one, several, or one per item (a LongTensor [batch]). Selected
            activations have shape [batch pos ...]; without `pos` for one position.
    """

    site: Site | str
    value: Tensor | Callable[[Tensor], Tensor]
    positions: Positions = None


@dataclass(frozen=True, eq=False)
class Activations(Mapping[Site, Tensor]):
    """Captured activations by site. Keys may be given as names: `activations["resid_pre.3"]`."""

    values_by_site: dict[Site, Tensor]
    key_values: tuple[KeyValues, ...] = field(default=())  # per block, if they were asked for

    def __getitem__(self, site: Site | str) -> Tensor:
        site = Site.parse(site)
        if site not in self.values_by_site:
            raise SiteError(f"{site} was not captured; captured: {', '.join(map(str, self))}")
        return self.values_by_site[site]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.values_by_site)

    def __len__(self) -> int:
        return len(self.values_by_site)

    def __contains__(self, site: object) -> bool:
        return isinstance(site, Site | str) and Site.parse(site) in self.values_by_site

    def stack(self, grain: str) -> Float[Tensor, "layers batch *rest"]:
        """The captured sites of one grain, stacked in order of layer (and head)."""
        sites = sorted(site for site in self if site.grain == grain)
        if not sites:
            raise SiteError(f"no {grain} was captured; captured: {', '.join(map(str, self))}")
        return torch.stack([self[site] for site in sites])


@contextmanager
def capturing(
    blocks: Sequence[Block], sites: Iterable[Site], positions: Positions, *, grad: bool
) -> Iterator[dict[Site, Tensor]]:
    """Within, every run of the blocks leaves its activations in the yielded dictionary.

    With `grad` the captured tensors are the ones that the network goes on with, at every site and
    position, so that `torch.autograd.grad(metric, captured)` works.

    Raises:
        ModelError: on leaving, the blocks ran past a site without writing it.
    """
    captured: dict[Site, Tensor] = {}
    sites = tuple(sites)
    with ExitStack() as hooks:
        for site in sites:
            location = blocks[site.layer].location(site)

            def see(tensor: Tensor, site: Site = site) -> None:
                selected = _select(tensor, site, positions)
                # A copy of a few positions, so that the whole sequence can be freed.
                captured[site] = selected if positions is None else selected.clone()

            def pass_through(tensor: Tensor, site: Site = site) -> None:
                index = position_index(positions, tensor)
                captured[site] = tensor[index].clone()
                if not captured[site].requires_grad:
                    captured[site].requires_grad_()
                tensor[index] = captured[site]

            handle = location.on_write(pass_through) if grad else location.on_read(see)
            hooks.callback(handle.remove)
        yield captured
    if silent := [site for site in sites if site not in captured]:
        raise ModelError(
            f"{silent[0]}: was not written during the run; is the network's code what its "
            "architecture says?"
        )


@contextmanager
def intervening(blocks: Sequence[Block], interventions: Iterable[Intervention]) -> Iterator[None]:
    """Within, one run of the blocks is intervened on.

    Raises:
        ModelError: on leaving, an intervention fired other than exactly once.
        SiteError: a value does not fit its site.
    """
    interventions = list(interventions)
    fired = [0] * len(interventions)
    with ExitStack() as hooks:
        for i, intervention in enumerate(interventions):
            site = Site.parse(intervention.site)

            def edit(tensor: Tensor, i: int = i, site: Site = site) -> None:
                fired[i] += 1
                _write(tensor, site, interventions[i])

            location = blocks[site.layer].location(site)
            hooks.callback(location.on_write(edit).remove)
        yield
    for intervention, count in zip(interventions, fired, strict=True):
        if count != 1:
            raise ModelError(
                f"the intervention at {intervention.site} fired {count} times in one run instead "
                "of once; this network does not run that site as its layout says"
            )


def _write(tensor: Tensor, site: Site, intervention: Intervention) -> None:
    index = position_index(intervention.positions, tensor)
    selected = tensor[index]
    if callable(intervention.value):
        new = intervention.value(selected.clone())
        if new.shape != selected.shape:
            raise SiteError(
                f"{site}: the intervention's function returned shape {tuple(new.shape)} "
                f"for activations of shape {tuple(selected.shape)}"
            )
    else:
        new = intervention.value
        try:
            new = new.to(selected).broadcast_to(selected.shape)
        except RuntimeError:
            raise SiteError(
                f"{site}: a value of shape {tuple(new.shape)} does not fit the selected "
                f"activations of shape {tuple(selected.shape)}"
            ) from None
    tensor[index] = new


def _select(tensor: Tensor, site: Site, positions: Positions) -> Tensor:
    if site.grain != "pattern" or site.head is not None:
        return tensor[position_index(positions, tensor)]
    by_query = tensor.transpose(1, 2)  # [batch query heads key]
    selected = by_query[position_index(positions, by_query)]
    return selected if selected.ndim < 4 else selected.transpose(1, 2)


def position_index(
    positions: Positions, tensor: Float[Tensor, "batch pos *rest"]
) -> tuple[slice | int | Tensor, ...]:
    """An index that selects `positions` of [batch pos ...].

    Raises:
        SiteError: a position outside the sequence, twice the same, or not one per item.
    """
    batch, length = tensor.shape[:2]
    if positions is None:
        return (slice(None),)
    flat = [positions] if isinstance(positions, int) else [int(p) for p in positions]
    if bad := [p for p in flat if not -length <= p < length]:
        raise SiteError(f"position {bad[0]} is outside a sequence of {length} tokens")
    if isinstance(positions, int):
        return (slice(None), positions)
    if isinstance(positions, Tensor):
        if positions.shape != (batch,):
            raise SiteError(
                f"positions: a tensor gives one position per item, so its shape must be "
                f"({batch},), got {tuple(positions.shape)}; give a list for positions in every item"
            )
        return (torch.arange(batch, device=tensor.device), positions.to(tensor.device))
    if len({p % length for p in flat}) < len(flat):
        raise SiteError(f"positions {flat} name one position twice")
    return (slice(None), torch.tensor(flat, device=tensor.device))
