"""What a verdict is put together from, item by item: changes of the ladder's rungs and losses, the
shares of the crossing, and information about latents."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.patching.crossing import shapley_shares
from mechinterp.verdict import (
    INFORMATION_MARGIN,
    Change,
    CrossingShares,
    Side,
    change_of,
    judge_side,
)

if TYPE_CHECKING:
    import pandas as pd

    from analyses.ladder import Ladder

RUNGS = ("raw", "bias", "head", "depth", "latents", "oracle")


def rung_changes(
    own: Ladder, other: Ladder, groups: Int[Tensor, " items"], *, currency: str = "log_score"
) -> dict[str, Change]:
    """How much more each rung of `own` is worth than of `other`, of those that both have."""
    values, others = own.values[currency], other.values[currency]
    return {
        rung: change_of((values[rung] - others[rung]) / own.scale[currency], groups)
        for rung in RUNGS
        if rung in values and rung in others
    }


def loss_change(
    own: Ladder,
    other: Ladder,
    loss: str,
    groups: Int[Tensor, " items"],
    *,
    margin: float,
    currency: str = "log_score",
) -> Side | None:
    """How much more `own` loses than `other`; None where either was not measured."""
    mine, theirs = own.loss(currency, loss), other.loss(currency, loss)
    if mine is None or theirs is None:
        return None
    return judge_side(mine - theirs, groups, margin=margin)


def crossing_shares(
    crossing_items: pd.DataFrame, *, costs: str, margin: float
) -> dict[str, CrossingShares]:
    """By readout, from the rows of `analyses.crossing` at the verdict's cut, in log score."""
    here = crossing_items[
        (crossing_items["costs"] == costs) & (crossing_items["currency"] == "log_score")
    ]
    found = {}
    for readout, rows in here.groupby("readout", sort=False):
        u = {
            name: torch.from_numpy(rows[name].to_numpy(copy=True) / rows["scale"].to_numpy())
            for name in ("u_aa", "u_ab", "u_ba", "u_bb")
        }
        means = {name: float(value.mean()) for name, value in u.items()}
        valid = shapley_shares(**means, scale=1.0, margin=margin).valid
        groups = torch.from_numpy(rows["group"].to_numpy(copy=True))
        front = ((u["u_ba"] - u["u_aa"]) + (u["u_bb"] - u["u_ab"])) / 2
        back = ((u["u_ab"] - u["u_aa"]) + (u["u_bb"] - u["u_ba"])) / 2
        interaction = u["u_bb"] - u["u_ab"] - u["u_ba"] + u["u_aa"]
        found[str(readout)] = CrossingShares(
            cut=int(rows["cut"].iloc[0]),
            change=change_of(u["u_bb"] - u["u_aa"], groups),
            phi_front=change_of(front, groups) if valid else None,
            phi_back=change_of(back, groups) if valid else None,
            interaction=change_of(interaction, groups),
        )
    return found


def information_lost(
    information_items: pd.DataFrame,
    *,
    reference: str,
    needed: bool,
    margin: float = INFORMATION_MARGIN,
) -> dict[str, Side]:
    """Bits that the after network's probes read less about each latent, from the rows of
    `analyses.probes`."""
    some = information_items[information_items["needed"] == needed]
    lost = {}
    for latent, rows in some.groupby("latent", sort=False):
        by_arm: Mapping[str, pd.DataFrame] = {
            str(arm): part.sort_values("item") for arm, part in rows.groupby("arm")
        }
        own, other = by_arm["after"], by_arm[reference]
        change = torch.from_numpy(
            other["information"].to_numpy(copy=True) - own["information"].to_numpy(copy=True)
        )
        groups = torch.from_numpy(own["group"].to_numpy(copy=True))
        lost[str(latent)] = judge_side(change, groups, margin=margin)
    return lost
