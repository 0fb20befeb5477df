"""Resume a recorded run at any block and position: run blocks on a suffix of positions alone.

In a causal network whose positions meet only in attention, a change at position p and block l
touches neither earlier blocks nor earlier positions. So a recorded run keeps what enters every
block, and the keys and values of every attention; a changed run then starts at block l with
positions p onwards, and its attention reads the recorded keys and values of the positions before.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NoReturn

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.contexts import Context, KeyValues
from mechinterp.hooked import HookedModel
from mechinterp.interventions import Activations
from mechinterp.sites import Site

TOLERANCE = 1e-4  # of the largest residual, when `find_obstacle` compares two ways to one number


@dataclass(frozen=True)
class RecordedRun:
    """One unpatched forward pass, kept so that it can be resumed. Made by `record`.

    `resid[l]` is what enters block l; `resid[n_layers]` is what enters the final norm.
    """

    model: HookedModel
    context: Context
    padded: bool
    resid: tuple[Float[Tensor, "items positions d_model"], ...]
    activations: Activations

    def suffix(self, start: int) -> Suffix:
        """This run from position `start` on."""
        return Suffix(self, start, self.context.suffix(start))


@dataclass(frozen=True)
class Suffix:
    """A recorded run from position `start` on."""

    run: RecordedRun
    start: int
    context: Context

    def block(
        self, layer: int, x: Float[Tensor, "rows suffix d_model"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, "rows suffix d_model"]:
        """Block `layer` on positions `start` onwards; row r continues recorded item `items[r]`."""
        prefix = KeyValues(*self._prefix(layer, items))
        return self.run.model.block(layer, x, self._of(self.context, items), cache=prefix)

    def last_block(
        self, x: Float[Tensor, "rows suffix d_model"], items: Int[Tensor, " rows"], read: int
    ) -> Float[Tensor, "rows tail d_model"]:
        """The last block's output at positions `read` onwards, as nothing else is read of it.

        Earlier positions matter for their keys and values alone: their run of the block ends there.
        """
        layer = self.run.model.n_layers - 1
        full = _KeyValuesOnly(*self._prefix(layer, items))
        with contextlib.suppress(_Collected):
            self.run.model.block(layer, x, self._of(self.context, items), cache=full)
        assert full.keys is not None
        assert full.values is not None
        before = KeyValues(full.keys[:, :, :read], full.values[:, :, :read])
        context = self._of(self.run.context.suffix(read), items)
        return self.run.model.block(layer, x[:, read - self.start :], context, cache=before)

    def _prefix(self, layer: int, items: Int[Tensor, " rows"]) -> tuple[Tensor, Tensor]:
        recorded = self.run.activations.key_values[layer]
        assert recorded.keys is not None
        assert recorded.values is not None
        return (
            recorded.keys[:, :, : self.start].index_select(0, items),
            recorded.values[:, :, : self.start].index_select(0, items),
        )

    def _of(self, context: Context, items: Int[Tensor, " rows"]) -> Context:
        return context.rows(items) if self.run.padded else context


class _Collected(Exception):
    """A block's keys and values are there, and nothing more is wanted of it."""


class _KeyValuesOnly(KeyValues):
    """Ends its block's run when it has the keys and values."""

    def update(self, keys: Tensor, values: Tensor, *_: object, **__: object) -> NoReturn:
        super().update(keys, values)
        raise _Collected


@torch.no_grad()
def record(
    model: HookedModel,
    tokens: Int[Tensor, "items positions"],
    *,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    sites: Iterable[Site] = (),
) -> RecordedRun:
    """Run `tokens` and keep what a resumed run needs, with the activations at `sites`."""
    stream = [*model.sites("resid_pre"), Site("resid_post", model.n_layers - 1)]
    activations = model.capture(
        tokens, {*stream, *sites}, attention_mask=attention_mask, key_values=True
    )
    context = model.embed(tokens, attention_mask=attention_mask)[1]
    resid = tuple(activations[site] for site in stream)
    return RecordedRun(model, context, attention_mask is not None, resid, activations)


@torch.no_grad()
def find_obstacle(model: HookedModel, tokens: Int[Tensor, "items positions"]) -> str | None:
    """Why a run of this network cannot be resumed, or None; found by trying it on the first item.

    Two things must hold: another last token leaves all earlier positions as they were (causality),
    and a run resumed half-way, with nothing changed, arrives where the recorded one did (positions
    meet in attention only, and its keys and values are all in the cache).
    """
    probe = tokens[:1].repeat(2, 1)
    probe[1, -1] = (probe[1, -1] + 1) % model.d_vocab
    run = record(model, probe, attention_mask=torch.ones_like(probe))
    if any(cache.keys is None for cache in run.activations.key_values):
        return "keys and values are not cached"
    final = run.resid[-1]
    items = torch.arange(2, device=final.device)
    suffix = run.suffix(probe.shape[1] // 2)
    x = run.resid[0][:, suffix.start :]
    for layer in range(model.n_layers - 1):
        x = suffix.block(layer, x, items)
    x = suffix.last_block(x, items, probe.shape[1] - 1)
    atol = TOLERANCE * float(final.abs().max())
    if not torch.allclose(final[0, :-1], final[1, :-1], rtol=0, atol=atol):
        return "attention is not causal"
    if not torch.allclose(x, final[:, -1:], rtol=0, atol=atol):
        return "positions meet outside attention"
    return None
