"""Every kind of lesion: its side of the verdict, its dose, the rungs of the ladder that fall."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from transformers import LlamaForCausalLM

from mechinterp.errors import ModelError
from mechinterp.lesions import choosing, discarding, learning, preserving
from mechinterp.lesions.subject import Subject

Side = Literal["choosing", "learning", "both", "discarded", "none"]
Rung = Literal["raw", "bias", "head", "depth"]
Make = Callable[[Subject, float, torch.Generator], LlamaForCausalLM]
ALL: tuple[Rung, ...] = ("raw", "bias", "head", "depth")
REFITTED: tuple[Side, ...] = ("learning", "discarded")  # their lesions end with a new readout


class Dose(NamedTuple):
    """So much of a kind of lesion."""

    lesion: str
    amount: float


@dataclass(frozen=True)
class Lesion:
    """`make` returns the damaged network. `lowers` are the rungs that fall with the dose; the
    others stay. `dose` says in words what an amount means."""

    side: Side
    lowers: tuple[Rung, ...]
    dose: str
    make: Make


def _refitted(make: Make) -> Make:
    """So that nothing but learning is wrong, the decision makes the best of what is left."""
    return lambda s, d, g: learning.refit_decision(s, make(s, d, g))


def _shift(s: Subject, amount: float, _: torch.Generator) -> LlamaForCausalLM:
    shift = torch.linspace(-amount / 2, amount / 2, len(s.task.actions)).tolist()
    return choosing.shift_actions(s.model.model, s.task.actions, shift, normed=s.normed)


def _rotate(s: Subject, amount: float, g: torch.Generator) -> LlamaForCausalLM:
    actions = s.task.actions
    return choosing.rotate_readout(s.model.model, actions, amount, normed=s.normed, generator=g)


def _swap(s: Subject, amount: float, _: torch.Generator) -> LlamaForCausalLM:
    binary = next((x for x in s.task.latents if x.n_values == 2 and x.needed), None)
    if binary is None:
        raise ModelError(f"swap: task {s.task.name!r} has no needed latent of two values")
    return choosing.swap_for_subgroup(s, binary.name, amount)


def _erase(s: Subject, amount: float, _: torch.Generator) -> LlamaForCausalLM:
    telling = learning.tokens_that_tell(s.task)
    return learning.erase_token(s.model.model, telling, like=telling, share=amount)


def _discard(s: Subject, amount: float, _: torch.Generator) -> LlamaForCausalLM:
    # Refitted on other items (of a task with few images on other noise): on those that the erasure
    # was fitted to, nothing at all is left.
    others = Subject(s.model, s.task, s.n_items, s.seed + 1)
    return learning.refit_decision(others, discarding.discard_late(s, amount))


def _scale(s: Subject, amount: float, _: torch.Generator) -> LlamaForCausalLM:
    return choosing.scale_actions(s.model.model, s.task.actions, math.exp(-amount))


def _noisy_readout(s: Subject, amount: float, g: torch.Generator) -> LlamaForCausalLM:
    return choosing.add_readout_noise(s.model.model, s.task.actions, amount, generator=g)


LESIONS: dict[str, Lesion] = {
    "shift": Lesion("choosing", ("raw",), "nats between the first and the last action", _shift),
    "rotate": Lesion("choosing", ("raw", "bias"), "degrees of the readout direction", _rotate),
    "temperature": Lesion(
        "choosing", ("raw", "bias"), "log of what the action logits are divided by", _scale
    ),
    "readout_noise": Lesion(
        "choosing", ("raw", "bias"), "noise per size of the action rows", _noisy_readout
    ),
    "swap": Lesion(
        "choosing", ("raw", "bias"), "share of the way to the opposite, in half the items", _swap
    ),
    "rewire": Lesion(
        "choosing",
        ("raw", "bias"),
        "share of the last block's part (attention or MLP, the larger) that goes elsewhere",
        lambda s, d, g: choosing.rewire_decision(s, d),
    ),
    "erase": Lesion(
        "learning",
        ALL,
        "share of the way to one embedding for all tokens that tell",
        _refitted(_erase),
    ),
    "noise_early": Lesion(
        "learning",
        ALL,
        "noise per size of the first block's weights, all later ones trained again",
        _refitted(lambda s, d, g: learning.noise_early(s, d, generator=g)),
    ),
    "stop_early": Lesion(
        "learning",
        ALL,
        "share of the training steps left out",
        _refitted(lambda s, d, g: learning.stop_early(s, d)),
    ),
    "prune": Lesion(
        "learning",
        ALL,
        "share of the attention heads cut, the most needed first",
        _refitted(lambda s, d, g: learning.prune_heads(s, d)),
    ),
    "flatten": Lesion(
        "learning",
        ALL,
        "share by which attention scores shrink",
        _refitted(lambda s, d, g: learning.flatten_attention(s.model.model, d)),
    ),
    "discard": Lesion(
        "discarded",
        ("raw", "bias", "head"),
        "share of the needed latents, at 1 the posterior too; compare with append_block",
        _discard,
    ),
    "refit": Lesion("none", (), "none", lambda s, d, g: learning.refit_decision(s, s.model.model)),
    "basis": Lesion(
        "none",
        (),
        "none: another basis of the residual stream",
        lambda s, d, g: preserving.rotate_residual_basis(s.model.model, generator=g),
    ),
    "permute": Lesion(
        "none",
        (),
        "none: another order of the neurons",
        lambda s, d, g: preserving.permute_neurons(s.model.model, generator=g),
    ),
    "rescale": Lesion(
        "none",
        (),
        "none: factors moved between matrices",
        lambda s, d, g: preserving.rescale_parts(s.model.model, generator=g),
    ),
    "half": Lesion(
        "none",
        (),
        "none: float16 and back",
        lambda s, d, g: preserving.round_to_half(s.model.model),
    ),
    "append_block": Lesion(
        "none",
        (),
        "none: a block that adds nothing",
        lambda s, d, g: preserving.append_block(s.model.model),
    ),
}


def damage(
    subject: Subject, doses: Sequence[Dose], *, generator: torch.Generator
) -> LlamaForCausalLM:
    """The subject's network with every dose in turn: those that end with a refit of the decision
    before those of choosing, which it would heal.

    Raises ModelError for the wrong order, or for a network or task that a lesion cannot damage.
    """
    sides = [LESIONS[dose.lesion].side for dose in doses]
    after = doses[sides.index("choosing") :] if "choosing" in sides else ()
    if any(dose.lesion == "refit" or LESIONS[dose.lesion].side in REFITTED for dose in after):
        raise ModelError("lesions: put those of learning, and refit, before those of choosing")
    model: Any = subject.model.model
    for dose in doses:
        if model is not subject.model.model:
            subject = subject.with_model(model)
        model = LESIONS[dose.lesion].make(subject, dose.amount, generator)
    return model


def side_of(doses: Sequence[Dose]) -> Side:
    """What several lesions do together."""
    sides = {LESIONS[dose.lesion].side for dose in doses}
    if {"choosing", "learning"} <= sides:
        return "both"
    return next((side for side in get_args(Side) if side in sides), "none")


def parse_doses(text: str) -> list[Dose]:
    """Doses from "shift=2" or "erase=0.9+shift=2"; raises ModelError."""
    doses = []
    for part in text.split("+"):
        name, _, amount = part.partition("=")
        if name not in LESIONS:
            raise ModelError(f"lesion {name!r}: not known; known: {', '.join(LESIONS)}")
        try:
            doses.append(Dose(name, float(amount or 0)))
        except ValueError:
            raise ModelError(
                f"lesion {part!r}: expected KIND=DOSE such as shift=2, got {amount!r} as dose"
            ) from None
    return doses
