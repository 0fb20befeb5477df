"""What every measurement of a decision reads: the residual stream there, layer by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp import decisions
from mechinterp.errors import TaskError
from mechinterp.hooked import HookedModel
from mechinterp.sites import Site
from mechinterp.tasks.base import Items, Task


@dataclass(frozen=True)
class DecisionStreams:
    """At the decision position of each item: residuals by layer, and the action logits.

    Layer 0 is the embedding, layer l the output of block l; the last is always there. `normed`
    holds the same streams after the network's final norm. `action_logits` include the shift that
    the checkpoint's provenance records, if any.
    """

    residual: Mapping[int, Float[Tensor, "items d_model"]]
    normed: Mapping[int, Float[Tensor, "items d_model"]]
    action_logits: Float[Tensor, "items actions"]

    def select(self, rows: Tensor | slice) -> DecisionStreams:
        return DecisionStreams(
            {layer: x[rows] for layer, x in self.residual.items()},
            {layer: x[rows] for layer, x in self.normed.items()},
            self.action_logits[rows],
        )


def layers_to_read(n_layers: int, max_layers: int | None = None) -> tuple[int, ...]:
    """0 and at most `max_layers` layers beyond it, evenly spaced up to and with the last."""
    n_read = min(n_layers, max_layers or n_layers)
    return tuple(round(n_layers * i / n_read) for i in range(n_read + 1))


def decision_sites(model: HookedModel, *, max_layers: int | None = None) -> dict[int, Site]:
    """Layer -> the site whose activation is that layer's residual stream."""
    _, *later = layers_to_read(model.n_layers, max_layers)
    return {0: Site("resid_pre", 0), **{layer: Site("resid_post", layer - 1) for layer in later}}


def read_streams(
    model: HookedModel,
    items: Items,
    task: Task,
    *,
    batch_size: int = 512,
    max_layers: int | None = None,
) -> DecisionStreams:
    """Run `items` through `model`, reading all layers or `max_layers` evenly spaced ones.

    Raises TaskError if the task's tokens do not fit the model.
    """
    check_fits(model, task)
    sites = decision_sites(model, max_layers=max_layers)
    residual: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    normed: dict[int, list[Tensor]] = {layer: [] for layer in sites}
    logits = []
    actions = torch.tensor(task.actions)
    with torch.no_grad():
        for tokens in items.tokens.split(batch_size):
            captured = model.capture(tokens.to(model.device), list(sites.values()), positions=-1)
            for layer, site in sites.items():
                residual[layer].append(captured[site].float().cpu())
                normed[layer].append(model.final_norm(captured[site]).float().cpu())
            final = model.final_norm(captured[sites[model.n_layers]])
            logits.append(model.unembed(final, actions).double().cpu())
    return DecisionStreams(
        {layer: torch.cat(parts) for layer, parts in residual.items()},
        {layer: torch.cat(parts) for layer, parts in normed.items()},
        torch.cat(logits) + action_shift(model, len(task.actions)),
    )


def action_shift(model: HookedModel, n_actions: int) -> Float[Tensor, " actions"]:
    """The ex-post shift of the action logits that the provenance records, else zeros."""
    provenance = model.checkpoint.provenance if model.checkpoint else None
    shift: Sequence[float] | None = provenance.action_shift if provenance else None
    if shift is None:
        return torch.zeros(n_actions, dtype=torch.float64)
    if len(shift) != n_actions:
        raise TaskError(
            f"{model.checkpoint.path}: provenance.json: action_shift has {len(shift)} entries, "  # type: ignore[union-attr]
            f"the task has {n_actions} actions"
        )
    return torch.tensor(shift, dtype=torch.float64)


def check_fits(model: HookedModel, task: Task) -> None:
    """Raise TaskError if the model cannot read the task's tokens."""
    if task.vocab_size > model.d_vocab:
        raise TaskError(
            f"task {task.name!r} needs {task.vocab_size} token ids, the model has {model.d_vocab}; "
            "give the settings that the model was trained with"
        )


def task_costs(task: Task, costs: Mapping[str, Any] | None = None) -> dict[str, decisions.Utility]:
    """The named costs to measure at: always "symmetric", the task's own if they differ, and
    `costs`.
    """
    n = len(task.actions)
    symmetric = decisions.diagonal_utility([1.0] * n)
    named: dict[str, decisions.Utility] = {"symmetric": symmetric}
    if task.utility != symmetric:
        named["task"] = task.utility
    for name, value in (costs or {}).items():
        is_matrix = isinstance(value[0], tuple | list)
        named[name] = value if is_matrix else decisions.diagonal_utility(value)
    return named
