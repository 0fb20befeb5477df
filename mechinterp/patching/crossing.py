"""The crossing: the front of one checkpoint, the back of another, cut at a layer boundary.

With A = before and B = after, U(AB) is the utility of the hybrid with A's front and B's back. The
shares say where a change sits, never what kind it is: a pure threshold shift may live in early
layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.sites import Site

# Penalties to choose from, in units of the mean variance of the front's residual: from a free map
# to nearly the identity.
RIDGES = (1e-6, 1e-4, 1e-2, 1.0, 100.0)


@dataclass(frozen=True)
class Crossing:
    """What the hybrids compute at the decision position, one entry per cut."""

    cuts: tuple[int, ...]
    final: Float[Tensor, "cuts items d_model"]  # after the back's final norm
    action_logits: Float[Tensor, "cuts items actions"]


@dataclass(frozen=True)
class Stitch:
    """Affine map x -> x + x @ weight + bias from one network's residual to another's at one cut."""

    cut: int
    weight: Float[Tensor, "d_model d_model"]
    bias: Float[Tensor, " d_model"]

    def __call__(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return resid + resid @ self.weight + self.bias


@dataclass(frozen=True)
class Shares:
    """Where the change U(BB) - U(AA) sits. `phi_front + phi_back` equals it, always.

    `valid` is False where the interaction leaves the shares without meaning (see `shapley_shares`);
    they must then not be shown.
    """

    phi_front: float
    phi_back: float
    interaction: float
    valid: bool


@torch.no_grad()
def cross(
    front: HookedModel,
    back: HookedModel,
    tokens: Int[Tensor, "items positions"],
    cuts: int | Sequence[int] | None,
    actions: Sequence[int],
    *,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    stitches: Mapping[int, Stitch] | None = None,
    batch_size: int = 256,
) -> Crossing:
    """Run `front` below each cut and `back` from there on.

    The front gives the embedding and blocks 0 .. cut-1; the back gives blocks cut .. n_layers-1,
    the final norm and the unembedding. So cut 0 differs from the back alone by the embedding only,
    and at cut n_layers the back gives only norm and unembedding. All cuts share one pass of the
    front.

    Args:
        cuts: one cut, several, or None for all of 0 .. n_layers.
        actions: token ids whose logits are wanted, in order.
        decision: the position that is read, for all items or per item.
        stitches: maps applied to the front's residual at their cut (see `fit_stitch`).

    Raises:
        AnalysisError: the networks' shapes differ, or a cut does not exist.
    """
    cuts = _check_cuts(front, back, cuts)
    token_ids = torch.as_tensor(actions, dtype=torch.long)
    finals, logits = [], []
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        mask = None if attention_mask is None else attention_mask[rows]
        at = decision if isinstance(decision, int) else decision[rows]
        captured = front.capture(
            tokens[rows], [_boundary(front, cut) for cut in cuts], attention_mask=mask
        )
        final = []
        for cut in cuts:
            resid = captured[_boundary(front, cut)].to(back.device, back.dtype)
            if stitches is not None and cut in stitches:
                resid = stitches[cut](resid)
            last = back.resid_from_layer(cut, resid, attention_mask=mask, positions=at)
            final.append(back.final_norm(last))
        finals.append(torch.stack(final))
        logits.append(back.unembed(finals[-1], token_ids))
    return Crossing(cuts, torch.cat(finals, dim=1), torch.cat(logits, dim=1))


@dataclass(frozen=True)
class StitchFit:
    """A stitch and how well it does on activations that it was not fitted on.

    `unexplained` is the mean squared error there over that of leaving the residual as it is: 0 is
    perfect, 1 no better than the identity. NaN where the two networks agree at this cut.
    """

    stitch: Stitch
    ridge: float
    unexplained: float


@torch.no_grad()
def fit_stitch(
    front: HookedModel,
    back: HookedModel,
    tokens: Int[Tensor, "items positions"],
    cut: int,
    *,
    ridge: float = 1e-4,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    batch_size: int = 256,
) -> Stitch:
    """Ridge regression of the back's residual at `cut` on the front's, over all positions.

    No labels enter. The penalty pulls towards the identity (two checkpoints of one ancestor share a
    basis) and is `ridge` times the mean variance of the front's residual; the bias is free. Use
    items other than those the crossing is measured on.

    Raises:
        AnalysisError: the networks' shapes differ, or the cut does not exist.
    """
    cuts = _check_cuts(front, back, cut)
    moments = _moments(front, back, tokens, cuts, attention_mask, batch_size)[cut]
    return _solve(moments, cut, ridge, back)


@torch.no_grad()
def fit_stitches(
    front: HookedModel,
    back: HookedModel,
    tokens: Int[Tensor, "items positions"],
    cuts: int | Sequence[int] | None,
    *,
    held_out: Bool[Tensor, " items"],
    ridges: Sequence[float] = RIDGES,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    batch_size: int = 256,
) -> dict[int, StitchFit]:
    """`fit_stitch` at each cut, its strength chosen by the error on `held_out` items; one pass.

    Only activations choose: the strength with the least squared error on the back's residual of the
    held-out items, in a fit to the others, is then used in a fit to all.

    Raises:
        AnalysisError: as `fit_stitch`, or `held_out` holds all items or none.
    """
    cuts = _check_cuts(front, back, cuts)
    if held_out.all() or not held_out.any():
        raise AnalysisError("held_out: expected some items held out and some not; give more items")
    fitted_on, tested_on = (
        _moments(
            front,
            back,
            tokens[rows],
            cuts,
            None if attention_mask is None else attention_mask[rows],
            batch_size,
        )
        for rows in (~held_out, held_out)
    )
    fits = {}
    for cut in cuts:
        errors = {
            ridge: tested_on[cut].error(_solve(fitted_on[cut], cut, ridge)) for ridge in ridges
        }
        ridge = min(errors, key=lambda ridge: errors[ridge])
        stitch = _solve(fitted_on[cut] + tested_on[cut], cut, ridge, back)
        as_it_is = tested_on[cut].square_change
        unexplained = errors[ridge] / as_it_is if as_it_is > 0 else float("nan")
        fits[cut] = StitchFit(stitch, ridge, unexplained)
    return fits


def shapley_shares(
    u_aa: float, u_ab: float, u_ba: float, u_bb: float, *, scale: float, margin: float = 0.05
) -> Shares:
    """Split U(BB) - U(AA) between front and back; U(AB) is the hybrid of A's front and B's back.

    phi_front = 1/2 [(U(BA) - U(AA)) + (U(BB) - U(AB))], phi_back likewise, and the interaction
    I = U(BB) - U(AB) - U(BA) + U(AA). The shares are invalid where |I| exceeds half of
    |U(BB) - U(AA)| or where it exceeds `margin * scale`, `scale` being (oracle - best constant
    action): either alone says that front and back cannot be told apart.
    """
    interaction = u_bb - u_ab - u_ba + u_aa
    return Shares(
        phi_front=0.5 * ((u_ba - u_aa) + (u_bb - u_ab)),
        phi_back=0.5 * ((u_ab - u_aa) + (u_bb - u_ba)),
        interaction=interaction,
        valid=abs(interaction) <= min(0.5 * abs(u_bb - u_aa), margin * scale),
    )


@dataclass(frozen=True)
class _Moments:
    """Sums over positions of x, the front's residual, and of the change from it to the back's: all
    that a ridge fit, and its error on these positions, needs."""

    n: int
    x: Float[Tensor, " d_model"]
    change: Float[Tensor, " d_model"]
    x_x: Float[Tensor, "d_model d_model"]
    x_change: Float[Tensor, "d_model d_model"]
    square_change: float

    @classmethod
    def of(
        cls, x: Float[Tensor, "positions d_model"], change: Float[Tensor, "positions d_model"]
    ) -> _Moments:
        square = float(change.square().sum())
        return cls(len(x), x.sum(0), change.sum(0), x.T @ x, x.T @ change, square)

    def __add__(self, other: _Moments) -> _Moments:
        return _Moments(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def error(self, stitch: Stitch) -> float:
        """The sum of |change - x @ weight - bias| squared over the positions."""
        weight, bias = stitch.weight, stitch.bias
        predicted = (weight * (self.x_x @ weight)).sum() + self.n * bias @ bias
        predicted = predicted + 2 * (self.x @ weight) @ bias
        cross = (weight * self.x_change).sum() + bias @ self.change
        return max(self.square_change - 2 * float(cross) + float(predicted), 0.0)


def _moments(
    front: HookedModel,
    back: HookedModel,
    tokens: Int[Tensor, "items positions"],
    cuts: Sequence[int],
    attention_mask: Int[Tensor, "items positions"] | None,
    batch_size: int,
) -> dict[int, _Moments]:
    sites = {cut: _boundary(front, cut) for cut in cuts}
    found: dict[int, _Moments] = {}
    for start in range(0, len(tokens), batch_size):
        rows = slice(start, start + batch_size)
        mask = None if attention_mask is None else attention_mask[rows]
        captured = [
            model.capture(tokens[rows], list(sites.values()), attention_mask=mask)
            for model in (front, back)
        ]
        for cut, site in sites.items():
            x, y = (
                rearrange(here[site], "items positions d -> (items positions) d").double().cpu()
                for here in captured
            )
            if mask is not None:
                kept = mask.bool().flatten().cpu()
                x, y = x[kept], y[kept]
            here = _Moments.of(x, y - x)
            found[cut] = found[cut] + here if cut in found else here
    return found


def _solve(moments: _Moments, cut: int, ridge: float, back: HookedModel | None = None) -> Stitch:
    """The ridge fit, in float64, or where and in what type `back` computes."""
    mean_x, mean_change = moments.x / moments.n, moments.change / moments.n
    covariance = moments.x_x / moments.n - mean_x.outer(mean_x)
    penalty = ridge * covariance.diagonal().mean() * torch.eye(len(mean_x), dtype=torch.float64)
    shared = moments.x_change / moments.n - mean_x.outer(mean_change)
    weight = torch.linalg.solve(covariance + penalty, shared)
    bias = mean_change - mean_x @ weight
    if back is not None:
        weight, bias = (part.to(back.device, back.dtype) for part in (weight, bias))
    return Stitch(cut, weight, bias)


def _boundary(model: HookedModel, cut: int) -> Site:
    """The residual that enters block `cut`; at cut n_layers, the one that enters the final norm."""
    if cut == model.n_layers:
        return Site("resid_post", cut - 1)
    return Site("resid_pre", cut)


def _check_cuts(
    front: HookedModel, back: HookedModel, cuts: int | Sequence[int] | None
) -> tuple[int, ...]:
    shapes = [(m.n_layers, m.d_model) for m in (front, back)]
    if shapes[0] != shapes[1]:
        raise AnalysisError(
            "crossing: front and back must have equal (n_layers, d_model), "
            f"got {shapes[0]} and {shapes[1]}"
        )
    if cuts is None:
        return tuple(range(front.n_layers + 1))
    cuts = (cuts,) if isinstance(cuts, int) else tuple(cuts)
    if not cuts or not all(0 <= cut <= front.n_layers for cut in cuts):
        raise AnalysisError(f"cuts: expected layers between 0 and {front.n_layers}, got {cuts}")
    return cuts
