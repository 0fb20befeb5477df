"""Triage: a record lists findings as (marker, value) pairs; does the case need attention?

The label is a noisy function of binary findings. Some act alone, some only in pairs (XOR), some not
at all. The posterior is known in closed form, hence the Bayes action and the value that no network
can exceed. A finding can be read only by binding a value to the marker before it, wherever both
stand.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import TaskError
from mechinterp.randomness import derive_generator
from mechinterp.tasks.base import CounterfactualPairs, Items, Latent, Task, check_utility

START, DECIDE, NEGATIVE, POSITIVE, ABSENT, PRESENT = range(6)
FIRST_MARKER = 6


@dataclass(frozen=True)
class Triage(Task):
    """Log-odds of attention = base + (sum of `linear` x ±1 + sum of `xor` x ±1 x ±1) / difficulty.

    At difficulty 2 the findings say half as much.
    `label_noise` flips that share of the labels. `n_fillers` positions hold one of `n_filler_kinds`
    meaningless tokens; `n_decoys` values follow a filler instead of a marker and mean nothing.
    """

    linear: tuple[float, ...] = (1.5, 1.5, 1.5)
    xor: tuple[float, ...] = (2.5,)
    n_unneeded: int = 1
    base_log_odds: float = 0.0
    difficulty: float = 1.0
    label_noise: float = 0.0
    n_fillers: int = 2
    n_filler_kinds: int = 8
    n_decoys: int = 0
    utility: Any = ((1.0, 0.0), (0.0, 1.0))

    name = "triage"
    actions = (NEGATIVE, POSITIVE)
    action_names = ("routine", "attention")

    def __post_init__(self) -> None:
        object.__setattr__(self, "linear", tuple(float(v) for v in self.linear))
        object.__setattr__(self, "xor", tuple(float(v) for v in self.xor))
        object.__setattr__(self, "utility", check_utility(self.utility, n=2))
        if not 0 <= self.label_noise < 0.5:
            raise TaskError(f"triage: label_noise must be in [0, 0.5), got {self.label_noise}")
        if not self.difficulty > 0:
            raise TaskError(f"triage: difficulty must be positive, got {self.difficulty}")
        if not 1 <= self.n_latents <= 16:
            raise TaskError(
                f"triage: 1 to 16 latents are possible, these settings ask for {self.n_latents}"
            )
        if min(self.n_fillers, self.n_decoys, self.n_unneeded) < 0 or self.n_filler_kinds < 1:
            raise TaskError(
                "triage: n_fillers, n_decoys and n_unneeded must be >= 0, n_filler_kinds >= 1"
            )

    @property
    def n_latents(self) -> int:
        return self._n_needed + self.n_unneeded

    @property
    def _n_needed(self) -> int:
        return len(self.linear) + 2 * len(self.xor)

    @property
    def latents(self) -> tuple[Latent, ...]:  # type: ignore[override]
        letters = string.ascii_lowercase
        return tuple(Latent(letters[k], 2, k < self._n_needed) for k in range(self.n_latents))

    @property
    def vocab_size(self) -> int:  # type: ignore[override]
        return FIRST_MARKER + self.n_latents + self.n_filler_kinds

    @property
    def n_positions(self) -> int:  # type: ignore[override]
        return 2 + 2 * self.n_latents + self.n_fillers + 2 * self.n_decoys

    def positive_probability(self, values: Int[Tensor, "... latents"]) -> Tensor:
        """P(label = 1 | latents), latents coded 0/1 in the order of `self.latents`."""
        sign = 2.0 * values.double() - 1.0
        n_linear = len(self.linear)
        evidence = sign[..., :n_linear] @ sign.new_tensor(self.linear)
        for pair, effect in enumerate(self.xor):
            first = n_linear + 2 * pair
            evidence = evidence + effect * sign[..., first] * sign[..., first + 1]
        log_odds = self.base_log_odds + evidence / self.difficulty
        return self.label_noise + (1 - 2 * self.label_noise) * torch.sigmoid(log_odds)

    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        generator = derive_generator(seed, "triage", split)
        values = torch.randint(0, 2, (n, self.n_latents), generator=generator)
        # A record is a random order of blocks: one pair per latent, single fillers, decoy pairs.
        n_blocks = self.n_latents + self.n_fillers + self.n_decoys
        order = torch.rand(n, n_blocks, generator=generator).argsort(1)
        filler = torch.randint(0, self.n_filler_kinds, (n, n_blocks), generator=generator)
        decoy_value = torch.randint(0, 2, (n, n_blocks), generator=generator)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        tokens, kinds = self._write(values, order, filler, decoy_value)
        return self._items(tokens, kinds, values, uniform)

    def _write(
        self,
        values: Int[Tensor, "items latents"],
        order: Int[Tensor, "items blocks"],
        filler: Int[Tensor, "items blocks"],
        decoy_value: Int[Tensor, "items blocks"],
    ) -> tuple[Int[Tensor, "items positions"], Int[Tensor, "items positions"]]:
        """Tokens, and per position an index into `_role_names`."""
        is_latent = order < self.n_latents
        is_decoy = order >= self.n_latents + self.n_fillers
        width = 1 + (is_latent | is_decoy).long()
        first = 1 + width.cumsum(1) - width
        latent = order.clamp(max=self.n_latents - 1)
        filler_token = FIRST_MARKER + self.n_latents + filler
        tokens = torch.full((len(values), self.n_positions), DECIDE)
        kinds = torch.full_like(tokens, 1)  # "decision"
        tokens[:, 0], kinds[:, 0] = START, 0
        tokens.scatter_(1, first, torch.where(is_latent, FIRST_MARKER + latent, filler_token))
        kinds.scatter_(1, first, torch.where(is_latent, 4 + 2 * latent, 2))
        # Only two-token blocks write a second token; the others rewrite their first.
        has_second = width == 2
        second = first + has_second.long()
        value = torch.where(is_latent, values.gather(1, latent), decoy_value)
        tokens.scatter_(
            1, second, torch.where(has_second, ABSENT + value, tokens.gather(1, second))
        )
        second_kind = torch.where(is_latent, 5 + 2 * latent, 3)
        kinds.scatter_(1, second, torch.where(has_second, second_kind, kinds.gather(1, second)))
        return tokens, kinds

    @property
    def _role_names(self) -> np.ndarray:
        pairs = [(f"marker {latent.name}", f"value {latent.name}") for latent in self.latents]
        return np.array(["start", "decision", "filler", "decoy", *itertools.chain(*pairs)])

    def _items(
        self,
        tokens: Int[Tensor, "items positions"],
        kinds: Int[Tensor, "items positions"],
        values: Int[Tensor, "items latents"],
        uniform: Float[Tensor, " items"],
    ) -> Items:
        positive = self.positive_probability(values)
        return Items(
            tokens=tokens,
            labels=(uniform < positive).long(),
            latents={latent.name: values[:, k] for k, latent in enumerate(self.latents)},
            groups=torch.arange(len(tokens)),
            roles=self._role_names[kinds.numpy()],
            posterior=torch.stack([1 - positive, positive], dim=1),
        )

    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """One value token differs, and with it the likelier label. Needed latents in turn."""
        generator = derive_generator(seed, "triage", split, "pairs")
        n_needed, n_drawn = self._n_needed, 16 * n
        if n_needed == 0:
            raise TaskError(
                "triage: counterfactual pairs need a latent that the decision depends on"
            )
        values = torch.randint(0, 2, (n_drawn, self.n_latents), generator=generator)
        flipped_latent = torch.arange(n_drawn) % n_needed
        other = values.clone()
        other[torch.arange(n_drawn), flipped_latent] ^= 1
        usable = (self.positive_probability(values) > 0.5) != (
            self.positive_probability(other) > 0.5
        )
        # Latents in turn, so that any prefix of the pairs is balanced; a latent too weak to change
        # any decision has no pairs.
        rank = torch.empty(n_drawn, dtype=torch.long)
        for latent in range(n_needed):
            mine = usable & (flipped_latent == latent)
            rank[mine] = torch.arange(int(mine.sum()))
        chosen = usable.nonzero().flatten()
        chosen = chosen[torch.argsort(rank[chosen], stable=True)][:n]
        if len(chosen) < n:
            raise TaskError(
                f"triage: found only {len(chosen)} of {n} counterfactual pairs: with these "
                "settings hardly any single latent changes the decision; raise `linear` or `xor`"
            )
        n_blocks = self.n_latents + self.n_fillers + self.n_decoys
        order = torch.rand(n, n_blocks, generator=generator).argsort(1)
        filler = torch.randint(0, self.n_filler_kinds, (n, n_blocks), generator=generator)
        decoy_value = torch.randint(0, 2, (n, n_blocks), generator=generator)
        uniform = torch.rand(n, generator=generator, dtype=torch.float64)
        clean, corrupt = (
            self._items(*self._write(v[chosen], order, filler, decoy_value), v[chosen], uniform)
            for v in (values, other)
        )
        names = np.array([latent.name for latent in self.latents])
        latent = names[flipped_latent[chosen].numpy()]
        return CounterfactualPairs(
            clean=clean,
            corrupt=corrupt,
            latent=latent,
            roles=_roles_relative_to(latent, clean.roles),
            quality="exact: one value token differs, both prompts are from the task's distribution",
        )

    @property
    def posterior_latents(self) -> tuple[str, ...]:
        return tuple(latent.name for latent in self.latents if latent.needed)

    def posterior_from_latents(
        self, probabilities: Mapping[str, Float[Tensor, "items values"]]
    ) -> Float[Tensor, "items labels"]:
        """Sum over all settings of the needed latents, taken as independent given the prompt."""
        needed = [probabilities[latent.name].double() for latent in self.latents if latent.needed]
        positive = torch.zeros(len(needed[0]), dtype=torch.float64)
        for setting in itertools.product((0, 1), repeat=len(needed)):
            joint = torch.stack([p[:, v] for p, v in zip(needed, setting, strict=True)]).prod(0)
            values = torch.tensor([*setting, *([0] * self.n_unneeded)])
            positive += joint * self.positive_probability(values)
        return torch.stack([1 - positive, positive], dim=1)


def _roles_relative_to(latent: np.ndarray, roles: np.ndarray) -> np.ndarray:
    """The finding that changes apart from all others, whichever it is."""
    relative = roles.astype(object)
    for kind in ("marker", "value"):
        own = roles == np.char.add(f"{kind} ", latent)[:, None]
        relative[np.char.startswith(roles, kind)] = f"other {kind}"
        relative[own] = f"changed {kind}"
    return relative.astype(str)
