"""Names of places in a network: a grain, a layer and, where the grain has heads, a head.

    resid_pre   what enters a block                        [batch pos d_model]
    resid_mid   between attention and MLP; sequential blocks only
    resid_post  what leaves a block
    attn_out    what attention adds to the residual stream (after a post-norm, where there is one)
    mlp_out     what the MLP adds to the residual stream (likewise)
    q k v       outputs of the projections, before any norm of theirs and before rotary embedding
                                                           [batch pos heads d_head]
    pattern     attention weights                          [batch heads query key]
    head        each head's output before the output projection (TransformerLens's z)
                                                           [batch pos heads d_head]
    neuron      MLP neurons after the activation and gate  [batch pos d_mlp]

`str(Site("resid_pre", 3))` is `resid_pre.3`; `head.2.5` is head 5 of layer 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import total_ordering

from mechinterp.errors import SiteError

# In the order in which a block computes them; the value is TransformerLens's name within the block.
GRAINS = {
    "resid_pre": "hook_resid_pre",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
    "pattern": "attn.hook_pattern",
    "head": "attn.hook_z",
    "attn_out": "hook_attn_out",
    "resid_mid": "hook_resid_mid",
    "neuron": "mlp.hook_post",
    "mlp_out": "hook_mlp_out",
    "resid_post": "hook_resid_post",
}
GRAINS_WITH_HEADS = frozenset({"q", "k", "v", "pattern", "head"})
# What 4.x calls the same tensors, where that is the same in every family.
_CANONICAL = {
    "hook_in": "resid_pre",
    "hook_out": "resid_post",
    "attn.q.hook_out": "q",
    "attn.k.hook_out": "k",
    "attn.v.hook_out": "v",
    "attn.o.hook_in": "head",
    "mlp.out.hook_in": "neuron",
}
_FROM_TRANSFORMER_LENS = {**{name: grain for grain, name in GRAINS.items()}, **_CANONICAL}


@total_ordering
@dataclass(frozen=True)
class Site:
    """A named place in the network. Sites sort by layer, then in the order of computation.

    Args:
        grain: one of `GRAINS`.
        layer: block index from 0.
        head: for q, k, v, pattern and head: one head (of k and v: one key-value head); None is all.

    Raises:
        SiteError: unknown grain, negative layer, or a head where the grain has none.
    """

    grain: str
    layer: int
    head: int | None = None

    def __post_init__(self) -> None:
        if self.grain not in GRAINS:
            raise SiteError(f"unknown grain {self.grain!r}{_nearest(self.grain, GRAINS)}")
        if not isinstance(self.layer, int) or self.layer < 0:
            raise SiteError(f"{self.grain}: layer must be an integer from 0, got {self.layer!r}")
        if self.head is not None and self.grain not in GRAINS_WITH_HEADS:
            raise SiteError(f"{self.grain}.{self.layer}: this grain has no heads; leave `head` out")
        if self.head is not None and (not isinstance(self.head, int) or self.head < 0):
            raise SiteError(
                f"{self.grain}.{self.layer}: head must be an integer from 0, got {self.head!r}"
            )

    def __str__(self) -> str:
        head = "" if self.head is None else f".{self.head}"
        return f"{self.grain}.{self.layer}{head}"

    def __lt__(self, other: Site) -> bool:
        return self._key < other._key

    @property
    def _key(self) -> tuple[int, int, int]:
        order = list(GRAINS).index(self.grain)
        return (self.layer, order, -1 if self.head is None else self.head)

    @property
    def transformer_lens_name(self) -> str:
        """The hook of a `TransformerBridge` with this site (all of its heads)."""
        return f"blocks.{self.layer}.{GRAINS[self.grain]}"

    @classmethod
    def parse(cls, name: str | Site) -> Site:
        """`resid_pre.3`, `head.2.5`, TransformerLens's `blocks.3.hook_resid_pre`, or a site itself.

        Raises:
            SiteError: not a site; the message has the nearest names.
        """
        if isinstance(name, Site):
            return name
        if match := re.fullmatch(r"blocks\.(\d+)\.(.+)", name):
            layer, hook = int(match[1]), match[2]
            if hook in _FROM_TRANSFORMER_LENS:
                return cls(_FROM_TRANSFORMER_LENS[hook], layer)
            raise SiteError(f"unknown site {name!r}{_nearest(hook, _FROM_TRANSFORMER_LENS)}")
        if match := re.fullmatch(r"([^.]+)\.(\d+)(?:\.(\d+))?", name):
            return cls(match[1], int(match[2]), None if match[3] is None else int(match[3]))
        raise SiteError(
            f"unknown site {name!r}: expected GRAIN.LAYER such as resid_pre.3, or head.LAYER.HEAD"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return (
        f": did you mean {' or '.join(near)}?" if near else f": expected one of {', '.join(known)}"
    )
