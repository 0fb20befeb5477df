"""A linear probe for every latent at every layer, beside a control task for every latent.

The control task (Hewitt & Liang 2019) gives each *type*, such as the token that carries the latent,
a random value of the latent. What a probe achieves on it, it learnt by heart; selectivity is the
accuracy beyond that. Features of the tokens alone (`probes.surface`) are the other baseline.
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
from probes.description_length import description_length
from probes.folds import grouped_folds
from probes.information import pointwise_information
from probes.measures import Estimate, estimate

SURFACE_LAYER = -1  # in the table, of what is read from the tokens and not from the network
COLUMNS = ("layer", "latent", "kind", "measure", "value", "low", "high")


@dataclass(frozen=True)
class ProbeResult:
    """`table` has columns layer, latent, kind, measure, value, low, high.

    Kinds are "latent", "control", and at layer -1 "surface_token" and "surface_bag" where surface
    features were given. Measures are those of `probes.measures.estimate`, out of fold, and for
    latents selectivity where there is a control; their 95% intervals are over groups, for the
    probes as fitted. Where asked for, description_length (bits) and compression, without interval.
    `log_probabilities` are out of fold too, per latent; their last axis follows `values`, the
    sorted values of the latent, as `labels` do.
    """

    table: pd.DataFrame
    log_probabilities: Mapping[str, Float[Tensor, "layers items values"]]
    labels: Mapping[str, Int[Tensor, " items"]]
    values: Mapping[str, tuple[int, ...]]
    layers: tuple[int, ...]
    folds: Int[Tensor, " items"]

    def probabilities(self, latent: str, layer: int) -> Float[Tensor, "items values"]:
        """Out-of-fold probabilities of the values of `latent`, read at `layer`."""
        return self.log_probabilities[latent][self.layers.index(layer)].exp()

    def information(self, latent: str, layer: int) -> Float[Tensor, " items"]:
        """Pointwise V-information of each item in bits; see `probes.information`."""
        log_p = self.log_probabilities[latent][self.layers.index(layer)]
        return pointwise_information(log_p, self.labels[latent], self.folds)

    def best_information(self, latent: str) -> Float[Tensor, " items"]:
        """The same at the best layer, which for each fold is the one that is best on the others: no
        item has a say in the layer that it is read at."""
        gains = torch.stack([self.information(latent, layer) for layer in self.layers])
        best = torch.empty_like(gains[0])
        for fold in self.folds.unique():
            here = self.folds == fold
            best[here] = gains[gains[:, ~here].mean(1).argmax(), here]
        return best


def probe_latents(
    activations: Mapping[int, Float[Tensor, "items d_model"]],
    latents: Mapping[str, Int[Tensor, " items"]],
    *,
    groups: Int[Tensor, " items"],
    control_types: Int[Tensor, " items"] | Mapping[str, Int[Tensor, " items"]] | None = None,
    surface: Mapping[str, Float[Tensor, "items features"]] | None = None,
    with_description_length: bool = False,
    config: ProbeConfig | None = None,
) -> ProbeResult:
    """Probe each latent at each layer by nested cross-validation over `groups`.

    All layers share the folds, which are stratified by every latent. `control_types` are the
    control task's types, one per item, for all latents or by latent; without them there is no
    control. A probe can learn the control only where its types recur across groups. `surface` are
    designs to probe for the latents in the same way, as `probes.surface` makes them.

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
    options = {"folds": folds, "groups": groups, "config": config}
    records, log_probabilities = [], {name: [] for name in latents}
    with progress_bar("probes", len(activations), unit="layer") as advance:
        for layer, x in activations.items():
            check_activations(f"activations[{layer}]", x, len(groups))
            found = _read(x, codes, values, coded=with_description_length, **options)
            for name in latents:
                log_probabilities[name].append(found[name, "latent"][0])
            for (name, kind), (_, measures) in found.items():
                if kind == "latent" and (name, "control") in found:
                    control = found[name, "control"][1]
                    measures["selectivity"] = measures["accuracy"] - control["accuracy"]
                records += _rows((layer, name, kind), measures, groups)
            advance(1)
    own = {key: code for key, code in codes.items() if key[1] == "latent"}
    for design, x in (surface or {}).items():
        check_activations(f"surface[{design!r}]", x, len(groups))
        found = _read(x, own, values, coded=with_description_length, **options)
        for (name, _), (_, measures) in found.items():
            records += _rows((SURFACE_LAYER, name, f"surface_{design}"), measures, groups)
    return ProbeResult(
        table=pd.DataFrame(records, columns=list(COLUMNS)),
        log_probabilities={name: torch.stack(stack) for name, stack in log_probabilities.items()},
        labels={name: codes[name, "latent"] for name in latents},
        values=values,
        layers=tuple(activations),
        folds=folds,
    )


def _read(
    x: Float[Tensor, "items d"],
    codes: Mapping[tuple[str, str], Int[Tensor, " items"]],
    values: Mapping[str, tuple[int, ...]],
    *,
    folds: Int[Tensor, " items"],
    groups: Int[Tensor, " items"],
    config: ProbeConfig,
    coded: bool,
) -> dict[tuple[str, str], tuple[Tensor, dict[str, Estimate]]]:
    """(latent, kind) -> out-of-fold log probabilities, and measures of them."""
    batches: dict[int, list[tuple[str, str]]] = {}  # equally many values are fitted together
    for key in codes:
        batches.setdefault(len(values[key[0]]), []).append(key)
    found = {}
    for n_values, keys in batches.items():
        labels = torch.stack([codes[key] for key in keys], 1)
        log_p = cross_fit(x, labels, n_values, folds, config).log_probabilities
        for column, key in enumerate(keys):
            own = log_p[:, column]
            found[key] = own, estimate(own, labels[:, column], folds, groups=groups)
        if coded:
            code = description_length(x, labels, n_values, groups=groups, config=config)
            unknown = torch.full((len(x),), torch.nan, dtype=torch.float64)
            for key, bits, compression in zip(keys, code.bits, code.compression, strict=True):
                found[key][1]["description_length"] = Estimate(float(bits), unknown)
                found[key][1]["compression"] = Estimate(float(compression), unknown)
    return {key: found[key] for key in codes}


def _rows(
    key: tuple[int, str, str], measures: Mapping[str, Estimate], groups: Int[Tensor, " items"]
) -> list[tuple[int | str | float, ...]]:
    return [
        (*key, measure, found.value, *found.interval(groups)) for measure, found in measures.items()
    ]


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
