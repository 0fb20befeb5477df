"""Low-rank adapters in chosen places of a network: LoRA (Hu et al. 2021, arXiv:2106.09685)."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mechinterp.architectures import Architecture
from mechinterp.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Part = Literal["attention", "mlp", "both"]

# An adapter adds ALPHA / rank times its matrices' product: the first steps then move a network
# about as far at every rank.
ALPHA = 16


@dataclass(frozen=True)
class Adapters:
    """Low-rank additions to every matrix of `part` in `layers`; all else stays as it is."""

    layers: tuple[int, ...]
    part: Part = "both"
    rank: int = 4


def add_adapters(model: PreTrainedModel, adapters: Adapters, generator: torch.Generator) -> None:
    """Replace matrices of `model` by adapted ones, and let nothing but the adapters be trained.

    Adapters start as zero, so that nothing changes before the first step; their other factor is
    drawn by `generator`.

    Raises:
        ModelError: a layer that the network lacks, or a rank below 1.
    """
    from peft import LoraConfig, inject_adapter_in_model

    if adapters.rank < 1:
        raise ModelError(f"adapters: the rank must be at least 1, got {adapters.rank}")
    config = LoraConfig(
        r=adapters.rank, lora_alpha=ALPHA, target_modules=_matrices(model, adapters), bias="none"
    )
    with seeded(generator), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # of names that peft still asks for
        inject_adapter_in_model(config, model)
    model.eval()


def merged(model: PreTrainedModel) -> PreTrainedModel:
    """A copy whose adapters are added to the weights: a plain model."""
    from peft.tuners.lora import LoraLayer

    plain = copy.deepcopy(model)
    for parent in list(plain.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, LoraLayer):
                module.merge()
                setattr(parent, name, module.get_base_layer())
    return plain.requires_grad_(True)


def _matrices(model: PreTrainedModel, adapters: Adapters) -> list[str]:
    """Full names of the matrices to adapt."""
    blocks = Architecture(model).blocks
    parts = []
    for layer in adapters.layers:
        if not 0 <= layer < len(blocks):
            raise ModelError(f"adapters: layer {layer}: this network has 0 to {len(blocks) - 1}")
        block = blocks[layer]
        parts += [block.attention] if adapters.part in ("attention", "both") else []
        parts += [block.mlp] if adapters.part in ("mlp", "both") else []
    wanted = {
        id(module)
        for part in parts
        for module in part.modules()
        if isinstance(module, nn.Linear | Conv1D)
    }
    if not wanted:
        raise ModelError(f"adapters: no matrices in the {adapters.part} of {adapters.layers}")
    return [name for name, module in model.named_modules() if id(module) in wanted]


@contextlib.contextmanager
def seeded(generator: torch.Generator) -> Iterator[None]:
    """What initialises weights asks the global random state; it is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**63 - 1, (), generator=generator)))
        yield
