"""Do the probes of one checkpoint read the other? Same items, same folds, both ways.

A latent that both checkpoints hold but along other directions is found by each one's own probe and
missed by the transferred one.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import pandas as pd
import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.progress import progress_bar
from probes.crossfit import LinearProbes, ProbeConfig, cross_fit, out_of_fold
from probes.folds import grouped_folds
from probes.measures import score
from probes.probe import check_activations, encode

Activations = Mapping[int, Float[Tensor, "items d_model"]]


def probe_transfer(
    before: Activations,
    after: Activations,
    latents: Mapping[str, Int[Tensor, " items"]],
    *,
    groups: Int[Tensor, " items"],
    config: ProbeConfig | None = None,
) -> pd.DataFrame:
    """Fit on one checkpoint's activations, score on the other's, always on folds not fitted on.

    Returns columns layer, latent, fitted_on, scored_on ("before" or "after"), measure, value, with
    the measures of `probe_latents`; and measure "cosine" between the two checkpoints' directions
    (fitted_on "before", scored_on "after"), the mean over folds. Errors as for `probe_latents`.
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

    records = []
    with progress_bar("probe transfer", len(before), unit="layer") as advance:
        for layer in before:
            streams = {"before": before[layer].double(), "after": after[layer].double()}
            for source, x in streams.items():
                check_activations(f"{source}[{layer}]", x, len(groups))
            for n_values in sorted({len(found) for found in values.values()}):
                names = [name for name in codes if len(values[name]) == n_values]
                chosen = torch.stack([codes[name] for name in names], 1)
                probes = {
                    source: cross_fit(x, chosen, n_values, folds, config).probes
                    for source, x in streams.items()
                }
                for fitted_on, scored_on in itertools.product(streams, streams):
                    log_p = out_of_fold(probes[fitted_on], streams[scored_on], folds)
                    for column, name in enumerate(names):
                        measures = score(log_p[:, column], chosen[:, column], folds)
                        key = (layer, name, fitted_on, scored_on)
                        records += [(*key, *item) for item in measures.items()]
                cosines = _cosine(probes["before"], probes["after"])
                records += [
                    (layer, name, "before", "after", "cosine", float(cosine))
                    for name, cosine in zip(names, cosines, strict=True)
                ]
            advance(1)
    columns = ["layer", "latent", "fitted_on", "scored_on", "measure", "value"]
    return pd.DataFrame(records, columns=columns)


def _cosine(a: LinearProbes, b: LinearProbes) -> Float[Tensor, " k"]:
    """Between all values' directions at once, in the coordinates of the stream; mean over folds.

    A direction common to all values changes no probability and is taken out first.
    """
    flat = [
        rearrange(p.coef - p.coef.mean(-2, keepdim=True), "f k a d -> f k (a d)") for p in (a, b)
    ]
    return torch.nn.functional.cosine_similarity(*flat, dim=-1).mean(0)
