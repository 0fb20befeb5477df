"""Damage of known kind and set dose, put in on purpose to test the instrument.

`LESIONS` names every kind, says which side of the verdict it belongs to and which rungs of the
ladder it lowers; `damage` puts one or more of them into a network. All are folded into the weights
of a Llama-type network (RMSNorm, no biases), so that the result is a valid checkpoint.
"""

from __future__ import annotations

from mechinterp.lesions.catalogue import LESIONS, Dose, Lesion, damage, parse_doses, side_of
from mechinterp.lesions.choosing import (
    add_readout_noise,
    rewire_decision,
    rotate_readout,
    scale_actions,
    shift_actions,
    swap_for_subgroup,
)
from mechinterp.lesions.discarding import discard_late
from mechinterp.lesions.learning import (
    erase_token,
    flatten_attention,
    noise_early,
    prune_heads,
    refit_decision,
    stop_early,
    tokens_that_tell,
)
from mechinterp.lesions.preserving import (
    append_block,
    permute_neurons,
    rescale_parts,
    rotate_residual_basis,
    round_to_half,
)
from mechinterp.lesions.subject import Subject

__all__ = [
    "LESIONS",
    "Dose",
    "Lesion",
    "Subject",
    "add_readout_noise",
    "append_block",
    "damage",
    "discard_late",
    "erase_token",
    "flatten_attention",
    "noise_early",
    "parse_doses",
    "permute_neurons",
    "prune_heads",
    "refit_decision",
    "rescale_parts",
    "rewire_decision",
    "rotate_readout",
    "rotate_residual_basis",
    "round_to_half",
    "scale_actions",
    "shift_actions",
    "side_of",
    "stop_early",
    "swap_for_subgroup",
    "tokens_that_tell",
]
