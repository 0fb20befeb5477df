"""What a task is: items with latents and labels, a decision, and counterfactual pairs."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import TaskError


@dataclass(frozen=True)
class Latent:
    """A variable that the prompt determines. `needed` says whether the decision depends on it."""

    name: str
    n_values: int = 2
    needed: bool = True


@dataclass(frozen=True)
class Items:
    """Prompts of equal length with all that is known about them; the last token is the decision's.

    `posterior` is P(label | prompt), where the task knows it. Items of one `group` (the same image,
    the same surface form) never stand on both sides of a split.
    """

    tokens: Int[Tensor, "items positions"]
    labels: Int[Tensor, " items"]
    latents: Mapping[str, Int[Tensor, " items"]]
    groups: Int[Tensor, " items"]
    roles: np.ndarray  # [items, positions] of str: what stands at each position, e.g. "value b"
    posterior: Float[Tensor, "items labels"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def target(self) -> Tensor:
        """What decisions are scored against: the posterior where that is known, else the labels."""
        return self.labels if self.posterior is None else self.posterior

    @property
    def likeliest_label(self) -> Int[Tensor, " items"]:
        """The label with the largest posterior, where that is known, else the label itself."""
        return self.labels if self.posterior is None else self.posterior.argmax(1)

    def select(self, index: Any) -> Items:
        """The items at `index` (a slice, an index array or a mask)."""
        picked: dict[str, Any] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "latents":
                picked[field.name] = {name: tensor[index] for name, tensor in value.items()}
            else:
                picked[field.name] = None if value is None else value[index]
        return Items(**picked)


@dataclass(frozen=True)
class CounterfactualPairs:
    """Prompts that differ in exactly one latent: patching moves `clean` activations into `corrupt`.

    `latent` names, per pair, what differs; `roles` say what stands at each position in relation to
    that difference, so that pairs can be averaged. `quality` is free text for the report: how
    natural the corrupt prompts are, measured where that is possible.
    """

    clean: Items
    corrupt: Items
    latent: np.ndarray  # [pairs] of str
    roles: np.ndarray  # [pairs, positions] of str
    quality: str = ""

    def __len__(self) -> int:
        return len(self.clean)


class Task(ABC):
    """One decision problem. Subclasses are frozen dataclasses whose fields are the task's settings.

    A task's randomness is named by (seed, split), so `sample` gives the same items everywhere.
    """

    name: str
    version: ClassVar[int] = 1  # raised when equal settings give other items: studies measure anew
    actions: tuple[int, ...]  # token id of each action; action a is right when the label is a
    action_names: tuple[str, ...]
    latents: tuple[Latent, ...]
    vocab_size: int  # ids run from 0 to vocab_size - 1
    n_positions: int  # prompt length in tokens
    utility: tuple[tuple[float, ...], ...]  # u[action][label]

    @abstractmethod
    def sample(self, n: int, *, seed: int = 0, split: str = "test") -> Items:
        """`n` items of `split` ("train", "validation", "test"); splits never share a group."""

    @abstractmethod
    def counterfactual_pairs(
        self, n: int, *, seed: int = 0, split: str = "test"
    ) -> CounterfactualPairs:
        """`n` pairs, the latents in turn, the two prompts of a pair with different best actions."""

    @property
    def posterior_latents(self) -> tuple[str, ...]:
        """The latents that `posterior_from_latents` reads; none where it is not known."""
        return ()

    def posterior_from_latents(
        self, probabilities: Mapping[str, Float[Tensor, "items values"]]
    ) -> Float[Tensor, "items labels"]:
        """P(label | prompt) from independent beliefs about `posterior_latents`."""
        raise NotImplementedError(f"task {self.name!r} knows no posterior given its latents")

    def baseline_features(self, items: Items) -> Float[Tensor, "items features"]:
        """The raw input as a linear model would take it: one-hot tokens by position."""
        one_hot = torch.nn.functional.one_hot(items.tokens, self.vocab_size)
        return one_hot.flatten(1).float()

    def control_types(self, items: Items) -> Int[Tensor, " items"]:
        """The type whose random label a control task predicts (Hewitt and Liang 2019): a surface
        feature that the network can see, here the first token after the opening one."""
        return items.tokens[:, 1]

    def settings(self) -> dict[str, Any]:
        """The settings as plain values, enough to make this task again."""
        return plain_settings(self)


def plain_settings(task: Any) -> dict[str, Any]:
    """The fields of a task's dataclass as plain values."""
    return {field.name: plain(getattr(task, field.name)) for field in fields(task)}


def plain(value: Any) -> Any:
    """Tuples as lists, as a YAML or JSON file has them."""
    return [plain(v) for v in value] if isinstance(value, tuple | list) else value


def check_utility(utility: Any, *, n: int) -> tuple[tuple[float, ...], ...]:
    """Validate an n x n utility matrix u[action][label]; raises TaskError."""
    matrix = np.asarray(utility, dtype=float)
    if matrix.shape != (n, n) or not np.isfinite(matrix).all():
        raise TaskError(
            f"utility: expected {n} x {n} finite numbers u[action][label], got {matrix.shape}; "
            "for costs that differ by label only use the diagonal, e.g. [[0.2, 0], [0, 1.8]]"
        )
    if (matrix.argmax(axis=0) != np.arange(n)).any():
        raise TaskError(
            "utility: for each label the action of the same index must be the best one; "
            f"the columns' best actions are {matrix.argmax(axis=0).tolist()}"
        )
    return tuple(tuple(float(v) for v in row) for row in matrix)
