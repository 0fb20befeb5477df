"""What lesions are fitted to: a network, its task, and what the network holds at the decision."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from mechinterp.hooked import HookedModel
from mechinterp.sites import Site
from mechinterp.tasks.base import Items, Task

BATCH = 1024


@dataclass(frozen=True)
class Subject:
    """`n_items` of the training split stand for what it sees; nothing is measured on them."""

    model: HookedModel
    task: Task
    n_items: int = 6_000
    seed: int = 0

    def with_model(self, model: PreTrainedModel) -> Subject:
        """The same task and items with another network."""
        hooked = HookedModel.from_model(model)
        return Subject(hooked, self.task, self.n_items, self.seed)

    @cached_property
    def items(self) -> Items:
        return self.task.sample(self.n_items, seed=self.seed, split="train")

    @cached_property
    def residual(self) -> Float[Tensor, "items d_model"]:
        """The final residual at the decision, before the final norm."""
        return self.read("resid_post")

    @cached_property
    def mlp_input(self) -> Float[Tensor, "items d_model"]:
        """What the last MLP reads at the decision, after its norm."""
        network: Any = self.model.model
        with torch.no_grad():
            return network.model.layers[-1].post_attention_layernorm(self.read("resid_mid"))

    @cached_property
    def normed(self) -> Float[Tensor, "items d_model"]:
        """The final residual after the final norm, which the unembedding reads."""
        with torch.no_grad():
            return self.model.final_norm(self.residual)

    @cached_property
    def logits(self) -> Float[Tensor, "items actions"]:
        actions = torch.tensor(self.task.actions)
        with torch.no_grad():
            return self.model.unembed(self.normed, actions).double()

    @cached_property
    def least_used_direction(self) -> Float[Tensor, " d_model"]:
        """The unit direction along which final residuals are smallest."""
        x = self.residual.double()
        return torch.linalg.eigh(x.T @ x).eigenvectors[:, 0]

    def normed_of(self, model: PreTrainedModel) -> Float[Tensor, "items d_model"]:
        """`normed` of another network on the same items."""
        return self.with_model(model).normed

    def read(self, grain: str) -> Float[Tensor, "items d_model"]:
        """A site of the last block at the decision, such as "resid_mid"."""
        site = Site(grain, self.model.n_layers - 1)
        parts = []
        with torch.no_grad():
            for tokens in self.items.tokens.split(BATCH):
                captured = self.model.capture(tokens.to(self.model.device), [site], positions=-1)
                parts.append(captured[site].float().cpu())
        return torch.cat(parts)
