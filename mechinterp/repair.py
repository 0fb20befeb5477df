"""Repair by training: low-rank adapters in chosen places, or all weights, under the symmetric loss.

Where damage is repaired, in how few steps and by how few directions tells what was damaged. LoRA
(Hu et al. 2021, arXiv:2106.09685) by `peft`; training all weights on what a network once knew is
the reverse fine-tuning of Jain et al. (2023, arXiv:2311.12786). `mechinterp.refits` repairs the
last layer without taking a step.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.adapters import Adapters, add_adapters, merged, seeded
from mechinterp.errors import TrainingError
from mechinterp.objectives import cross_entropy
from mechinterp.training.config import TrainingConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Batch = tuple[Int[Tensor, "batch positions"], Int[Tensor, " batch"]]

# The rate does not fall, so that a step is the same step in a short and in a long repair.
FEW_STEPS = TrainingConfig(
    n_steps=32,
    batch_size=32,
    learning_rate=3e-3,
    warmup_steps=8,
    final_learning_rate=1.0,
    weight_decay=0.0,
)


class Repair:
    """A copy of `model` in training: its `adapters`, or without them all of its weights.

    The loss is the cross-entropy of the logits of `actions` at the last position, with `shift`
    added (what a checkpoint's provenance records). Adapters start as zero, so that nothing changes
    before the first step; their other factor is drawn by `generator`.

    Raises:
        ModelError: a layer that the network lacks, or a rank below 1.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        actions: Sequence[int],
        *,
        adapters: Adapters | None = None,
        config: TrainingConfig = FEW_STEPS,
        shift: Float[Tensor, " actions"] | None = None,
        generator: torch.Generator,
    ) -> None:
        self.config = config
        self.n_steps = 0
        self._actions = list(actions)
        self._shift = torch.zeros(len(actions)) if shift is None else shift
        self._network = copy.deepcopy(model).requires_grad_(True)
        if adapters is not None:
            add_adapters(self._network, adapters, generator)
        self._network.eval()
        trained = [p for p in self._network.parameters() if p.requires_grad]
        self.n_trained = sum(p.numel() for p in trained)
        self._optimizer = torch.optim.AdamW(
            trained, betas=config.betas, weight_decay=config.weight_decay, fused=True
        )

    def update(self, tokens: Int[Tensor, "batch positions"], labels: Int[Tensor, " batch"]) -> None:
        """Take one step; raises TrainingError where the loss or its gradient is not finite."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.n_steps)
        with torch.enable_grad():
            logits = self._logits(tokens)
            loss = cross_entropy(logits, labels.to(logits.device)).mean()
        self._optimizer.zero_grad()
        loss.backward()
        trained = (p for group in self._optimizer.param_groups for p in group["params"])
        norm = torch.nn.utils.clip_grad_norm_(trained, self.config.gradient_clip)
        if not math.isfinite(loss.item() + norm.item()):
            raise TrainingError(
                f"repair: loss {loss.item()} with gradient norm {norm.item()} at step "
                f"{self.n_steps}; lower the learning rate"
            )
        self._optimizer.step()
        self.n_steps += 1

    @torch.no_grad()
    def action_logits(
        self, tokens: Int[Tensor, "items positions"], *, batch_size: int = 512
    ) -> Float[Tensor, "items actions"]:
        """Of the network as it stands, with the shift, in float64 on the CPU."""
        return torch.cat([self._logits(part).double().cpu() for part in tokens.split(batch_size)])

    def merged(self) -> PreTrainedModel:
        """A copy of the network as it stands, adapters added to the weights: a plain model."""
        return merged(self._network)

    def _logits(self, tokens: Int[Tensor, "batch positions"]) -> Float[Tensor, "batch actions"]:
        device = self._network.device
        output = self._network(input_ids=tokens.to(device), use_cache=False, logits_to_keep=1)
        logits = output.logits[:, -1, self._actions]
        return logits + self._shift.to(logits)


def repair(
    model: PreTrainedModel,
    actions: Sequence[int],
    tokens: Int[Tensor, "items positions"],
    labels: Int[Tensor, " items"],
    *,
    adapters: Adapters | None = None,
    config: TrainingConfig = FEW_STEPS,
    shift: Float[Tensor, " actions"] | None = None,
    generator: torch.Generator,
) -> PreTrainedModel:
    """`model` after `config.n_steps` steps on these items: see `Repair`, `few_batches`."""
    options = {"adapters": adapters, "config": config, "shift": shift}
    run = Repair(model, actions, **options, generator=generator)
    batches = few_batches(tokens, labels, batch_size=config.batch_size, generator=generator)
    for batch in itertools.islice(batches, config.n_steps):
        run.update(*batch)
    return run.merged()


def few_batches(
    tokens: Int[Tensor, "items positions"],
    labels: Int[Tensor, " items"],
    *,
    batch_size: int,
    generator: torch.Generator,
) -> Iterator[Batch]:
    """Batches without end: all items in a random order, then again in another."""
    while True:
        order = torch.randperm(len(labels), generator=generator)
        for chosen in order.split(batch_size):
            yield tokens[chosen], labels[chosen]


def fresh_network(model: PreTrainedModel, *, generator: torch.Generator) -> PreTrainedModel:
    """A network of the same architecture with random weights, as its configuration draws them."""
    from transformers import AutoModelForCausalLM

    with seeded(generator):
        fresh = AutoModelForCausalLM.from_config(
            copy.deepcopy(model.config),
            dtype=model.dtype,
            attn_implementation=model.config._attn_implementation,
        )
    return fresh.to(model.device).eval()
