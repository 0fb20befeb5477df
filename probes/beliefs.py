"""What the residual stream believes about each latent: cross-fitted probabilities by linear probes.

Per latent the layer and the ridge strength are chosen on inner folds by log-loss, as in
`probes.readout`, whose `latents` rung turns these beliefs into a decision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.tasks.base import Latent
from probes.logistic import fit_logistic, fit_softmax

Choice = tuple[int, int]  # layer, index of the strength


@dataclass
class LatentBeliefs:
    """Probabilities of each latent's values for all items, from probes that never saw chosen folds.

    `strengths` are ridge penalties per item on standardised activations.
    """

    streams: Mapping[int, Float[Tensor, "items d_model"]]
    latents: Mapping[Latent, Int[Tensor, " items"]]
    folds: Int[Tensor, " items"]
    strengths: tuple[float, ...] = (1e-3,)
    tolerance: float = 1e-4
    _fitted: dict[tuple[frozenset[int], int], dict[str, list[Tensor]]] = field(default_factory=dict)
    _chosen: dict[tuple[Latent, int], Choice] = field(default_factory=dict)

    def probabilities(
        self, held_out: frozenset[int], *, outer: int
    ) -> dict[str, Float[Tensor, "items values"]]:
        """From probes fitted without `held_out`, layer and strength chosen without `outer`."""
        beliefs = {}
        for latent in self.latents:
            if (latent, outer) not in self._chosen:
                self._chosen[latent, outer] = self._choose(latent, outer)
            layer, strength = self._chosen[latent, outer]
            beliefs[latent.name] = self._fit(held_out, layer)[latent.name][strength]
        return beliefs

    def _choose(self, latent: Latent, outer: int) -> Choice:
        """The layer and strength with the least inner log-loss; the earlier of equals."""
        values = self.latents[latent]
        losses: dict[Choice, float] = {}
        for inner in set(self.folds.tolist()) - {outer}:
            rows = self.folds == inner
            for layer in sorted(self.streams):
                fitted = self._fit(frozenset({outer, inner}), layer)[latent.name]
                for strength, probability in enumerate(fitted):
                    picked = probability[rows].gather(1, values[rows, None]).clamp_min(1e-300)
                    key = (layer, strength)
                    losses[key] = losses.get(key, 0.0) - float(picked.log().sum())
        return min(losses, key=lambda key: (losses[key], key))

    def _fit(self, held_out: frozenset[int], layer: int) -> dict[str, list[Tensor]]:
        """Per latent, for each strength, probabilities [items values] of all items."""
        key = (held_out, layer)
        if key not in self._fitted:
            train = ~torch.isin(self.folds, torch.tensor(sorted(held_out)))
            x = self.streams[layer].double()
            x = (x - x[train].mean(0)) / x[train].std(0).clamp_min(1e-8)
            binary = [latent for latent in self.latents if latent.n_values == 2]
            fitted = self._fit_binary(x, train, binary) if binary else {}
            for latent in self.latents:
                if latent.n_values > 2:
                    fitted[latent.name] = self._fit_valued(x, train, latent)
            self._fitted[key] = fitted
        return self._fitted[key]

    def _fit_binary(
        self, x: Tensor, train: Tensor, latents: list[Latent]
    ) -> dict[str, list[Tensor]]:
        """All binary latents at all strengths in one batch of columns."""
        targets = torch.stack([self.latents[latent].double() for latent in latents], dim=1)
        n_strengths = len(self.strengths)
        l2 = torch.tensor(self.strengths, dtype=torch.float64) * int(train.sum())
        fit = fit_logistic(
            x[train],
            targets[train].repeat_interleave(n_strengths, dim=1),
            l2=l2.repeat(len(latents)),
            tol=self.tolerance,
        )
        positive = torch.sigmoid(fit.logits(x))
        both = torch.stack([1 - positive, positive], dim=2)
        return {
            latent.name: [both[:, i * n_strengths + s] for s in range(n_strengths)]
            for i, latent in enumerate(latents)
        }

    def _fit_valued(self, x: Tensor, train: Tensor, latent: Latent) -> list[Tensor]:
        one_hot = torch.nn.functional.one_hot(self.latents[latent], latent.n_values).double()
        n_strengths = len(self.strengths)
        fit = fit_softmax(
            x[train],
            one_hot[train, None].expand(-1, n_strengths, -1),
            l2=torch.tensor(self.strengths, dtype=torch.float64) * int(train.sum()),
            tol=self.tolerance,
        )
        return list(fit.logits(x).softmax(2).unbind(1))
