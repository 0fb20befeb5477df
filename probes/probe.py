"""A linear probe for every latent at every layer, beside a control task for every latent.

The control task (Hewitt & Liang 2019) gives each *type*, such as the token that carries the latent,
a random value of the latent. What a probe achieves on it, it learnt by heart; selectivity is the
accuracy beyond that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from probes.crossfit import ProbeConfig, cross_fit
from probes.folds import grouped_folds
from probes.measures import score


@dataclass(frozen=True)
class ProbeResult:
    """`table` has columns layer, latent, kind ("latent" or "control"), measure, value.

    Measures are auroc, accuracy, balanced_accuracy and log_loss (nats), all out of fold, and for
    latents selectivity where there is a control. `log_probabilities` are out of fold too, per
    latent; their last axis follows `values`, the sorted values of the latent.
    """

    table: pd.DataFrame
    log_probabilities: Mapping[str, Float[Tensor, "layers items values"]]
    values: Mapping[str, tuple[int, ...]]
    layers: tuple[int, ...]
    folds: Int[Tensor, " items"]

    def probabilities(self, latent: str, layer: int) -> Float[Tensor, "items values"]:
        """Out-of-fold probabilities of the values of `latent`, read at `layer`."""
        return self.log_probabilities[latent][self.layers.index(layer)].exp()


def probe_latents(
    activations: Mapping[int, Float[Tensor, "items d_model"]],
    latents: Mapping[str, Int[Tensor, " items"]],
    *,
    groups: Int[Tensor, " items"],
    control_types: Int[Tensor, " items"] | Mapping[str, Int[Tensor, " items"]] | None = None,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Probe each latent at each layer by nested cross-validation over `groups`.

    All layers share the folds, which are stratified by every latent. `control_types` are the
    control task's types, one per item, for all latents or by latent; without them there is no
    control. A probe can learn the control only where its types recur across groups.

    Raises AnalysisError where a latent is constant, where a fold lacks one of its values, or where
    lengths differ.
    """
    config = config or ProbeConfig()
    values, codes = {}, {}  # codes: (latent, kind) -> index into the latent's values
    for name, latent in latents.items():
        values[name], codes[name, "latent"] = encode(name, latent, len(groups))
        if control_types is not None:
            types = control_types[name] if isinstance(control_types, Mapping) else control_types
            generator = derive_generator(config.seed, "control task", name)
            codes[name, "control"] = control_labels(types, codes[name, "latent"], generator)
    folds = grouped_folds(
        groups,
        torch.stack(list(codes.values()), 1),
        config.n_folds,
        config.seed,
        names=[f"{name} ({kind})" for name, kind in codes],
    )
    batches = {}  # what has equally many values is fitted together
    for name, kind in codes:
        batches.setdefault(len(values[name]), []).append((name, kind))

    records, log_probabilities = [], {name: [] for name in latents}
    with progress_bar("probes", len(activations), unit="layer") as advance:
        for layer, x in activations.items():
            check_activations(f"activations[{layer}]", x, len(groups))
            measured = {}
            for n_values, keys in batches.items():
                labels = torch.stack([codes[key] for key in keys], 1)
                log_p = cross_fit(x, labels, n_values, folds, config).log_probabilities
                for column, (name, kind) in enumerate(keys):
                    measured[name, kind] = score(log_p[:, column], labels[:, column], folds)
                    if kind == "latent":
                        log_probabilities[name].append(log_p[:, column])
            for name, kind in codes:
                measures = measured[name, kind]
                if kind == "latent" and control_types is not None:
                    chance = measured[name, "control"]["accuracy"]
                    measures = {**measures, "selectivity": measures["accuracy"] - chance}
                records += [(layer, name, kind, *item) for item in measures.items()]
            advance(1)
    return ProbeResult(
        table=pd.DataFrame(records, columns=["layer", "latent", "kind", "measure", "value"]),
        log_probabilities={name: torch.stack(stack) for name, stack in log_probabilities.items()},
        values=values,
        layers=tuple(activations),
        folds=folds,
    )


def encode(
    name: str, latent: Int[Tensor, " items"], n_items: int
) -> tuple[tuple[int, ...], Int[Tensor, " items"]]:
    """The sorted values of a latent, and each item's index into them."""
    if len(latent) != n_items:
        raise AnalysisError(f"latents[{name!r}]: has {len(latent)} items, groups has {n_items}")
    values, codes = latent.unique(return_inverse=True)
    if len(values) < 2:
        raise AnalysisError(f"latents[{name!r}]: has one value only; there is nothing to probe")
    return tuple(values.tolist()), codes


def check_activations(name: str, x: Float[Tensor, "items d_model"], n_items: int) -> None:
    """Raise AnalysisError unless `x` is finite and has a row per item."""
    if x.ndim != 2 or len(x) != n_items:
        raise AnalysisError(f"{name}: expected shape [{n_items}, d_model], got {list(x.shape)}")
    if not x.isfinite().all():
        raise AnalysisError(f"{name}: contains NaN or infinite values")


def control_labels(
    types: Int[Tensor, " items"], codes: Int[Tensor, " items"], generator: torch.Generator
) -> Int[Tensor, " items"]:
    """A random value per type, in the proportions in which `codes` has them.

    Types are shuffled, laid end to end by their number of items and cut where the values' shares
    end, so that the control's classes are as balanced as the latent's even with few types.
    """
    _, type_of_item, counts = types.unique(return_inverse=True, return_counts=True)
    shares = torch.bincount(codes).cumsum(0) / len(codes)
    order = torch.randperm(len(counts), generator=generator)
    middles = (counts[order].cumsum(0) - counts[order] / 2) / len(codes)
    value_of_type = torch.empty_like(order)
    value_of_type[order] = torch.searchsorted(shares, middles).clamp_max(len(shares) - 1)
    return value_of_type[type_of_item]
