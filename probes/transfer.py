"""Do the probes of one checkpoint read the other? Same items, same folds, both ways.

A latent that both checkpoints hold but along other directions is found by each one's own probe and
missed by the transferred one. `probes.paired` turns this into changes with intervals.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.progress import progress_bar
from probes.crossfit import ProbeConfig, cross_fit, out_of_fold
from probes.directions import Direction, compare_directions
from probes.folds import grouped_folds
from probes.measures import estimate
from probes.probe import check_activations, encode

Activations = Mapping[int, Float[Tensor, "items d_model"]]


@dataclass(frozen=True)
class Transfer:
    """Out-of-fold predictions for the items of two checkpoints by the probes of both.

    `log_probabilities[fitted_on, scored_on, latent]` have the layers in the order of `layers`;
    `codes` are each item's index into the sorted values of a latent. `directions` has columns
    layer, latent and the fields of `probes.directions.Direction`.
    """

    layers: tuple[int, ...]
    codes: Mapping[str, Int[Tensor, " items"]]
    groups: Int[Tensor, " items"]
    folds: Int[Tensor, " items"]
    log_probabilities: Mapping[tuple[str, str, str], Float[Tensor, "layers items values"]]
    directions: pd.DataFrame

    def scores(self) -> pd.DataFrame:
        """layer, latent, fitted_on, scored_on, measure, value: the measures of `probe_latents`."""
        records = []
        for (fitted_on, scored_on, name), stack in self.log_probabilities.items():
            for layer, log_p in zip(self.layers, stack, strict=True):
                found = estimate(log_p, self.codes[name], self.folds, groups=self.groups)
                key = (layer, name, fitted_on, scored_on)
                records += [(*key, measure, each.value) for measure, each in found.items()]
        columns = ["layer", "latent", "fitted_on", "scored_on", "measure", "value"]
        return pd.DataFrame(records, columns=columns)


def probe_transfer(
    before: Activations,
    after: Activations,
    latents: Mapping[str, Int[Tensor, " items"]],
    *,
    groups: Int[Tensor, " items"],
    config: ProbeConfig | None = None,
) -> Transfer:
    """Fit on one checkpoint's activations, score on the other's, always on folds not fitted on.

    Raises AnalysisError where the layers differ, and as `probe_latents` does.
    """
    config = config or ProbeConfig()
    if before.keys() != after.keys():
        raise AnalysisError(
            f"after: has layers {sorted(after)}, before has {sorted(before)}; give both the same"
        )
    values, codes = {}, {}
    for name, latent in latents.items():
        values[name], codes[name] = encode(name, latent, len(groups))
    labels = torch.stack(list(codes.values()), 1)
    folds = grouped_folds(groups, labels, config.n_folds, config.seed, names=list(codes))

    predicted: dict[tuple[str, str, str], list[Tensor]] = {}
    directions = []
    with progress_bar("probe transfer", len(before), unit="layer") as advance:
        for layer in before:
            streams: dict[str, Tensor] = {
                "before": before[layer].double(),
                "after": after[layer].double(),
            }
            for source, x in streams.items():
                check_activations(f"{source}[{layer}]", x, len(groups))
            for n_values in sorted({len(found) for found in values.values()}):
                names = [name for name in codes if len(values[name]) == n_values]
                chosen = torch.stack([codes[name] for name in names], 1)
                fits = {
                    source: cross_fit(x, chosen, n_values, folds, config)
                    for source, x in streams.items()
                }
                for fitted_on, scored_on in itertools.product(streams, streams):
                    log_p = out_of_fold(fits[fitted_on].probes, streams[scored_on], folds)
                    for name, column in zip(names, log_p.unbind(1), strict=True):
                        predicted.setdefault((fitted_on, scored_on, name), []).append(column)
                found = compare_directions(streams, fits, chosen, n_values, groups, config)
                directions += _rows(layer, names, found)
            advance(1)
    return Transfer(
        layers=tuple(before),
        codes=codes,
        groups=groups,
        folds=folds,
        log_probabilities={key: torch.stack(stack) for key, stack in predicted.items()},
        directions=pd.DataFrame(directions),
    )


def _rows(layer: int, names: list[str], found: list[Direction]) -> Iterator[dict[str, object]]:
    for name, direction in zip(names, found, strict=True):
        yield {"layer": layer, "latent": name, **vars(direction)}
