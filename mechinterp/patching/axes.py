"""The dimensions of sites' activations, and which of them number the cells of a map."""

from __future__ import annotations

from einops import reduce
from jaxtyping import Float
from torch import Tensor

from mechinterp.hooked import HookedModel

# What the dimensions of a site's activations are, after the item's.
AXES = {
    **dict.fromkeys(
        ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"), ("position", "feature")
    ),
    **dict.fromkeys(("head", "q", "k", "v"), ("position", "head", "feature")),
    "pattern": ("head", "position", "key"),
    "neuron": ("position", "neuron"),
}


def sum_by_unit(grain: str, values: Float[Tensor, " items *site"], by_position: bool) -> Tensor:
    """Sums over what is not a unit, with the position last."""
    dims = AXES[grain]
    kept = map_axes(grain, by_position)[2:]
    return reduce(values, f"item {' '.join(dims)} -> item {' '.join(kept)}", "sum")


def map_axes(grain: str, by_position: bool) -> tuple[str, ...]:
    dims = AXES[grain]
    unit = next((dim for dim in ("head", "neuron") if dim in dims), None)
    if unit is None:
        return ("item", "layer", "position")
    return ("item", "layer", unit, *(("position",) if by_position else ()))


def axis_names(model: HookedModel, grain: str, by_position: bool) -> tuple[str, ...]:
    grouped = grain in ("k", "v") and model.n_kv_heads < model.n_heads
    names = map_axes(grain, by_position)
    return tuple("kv_head" if grouped and name == "head" else name for name in names)
