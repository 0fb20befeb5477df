"""Before and after on the same items and folds: changes of what probes read, with intervals.

A measure is its value plus an influence of each item (`probes.measures.estimate`; for AUROC that of
DeLong, DeLong and Clarke-Pearson 1988), so that a change is a paired mean over items, and has the
intervals, tests and error control of `mechinterp.patching.inference`, over groups of items. They
speak of the probes as fitted: how these would come out on other training items is not in them.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp.patching.inference import adjust_false_discovery, infer_map
from mechinterp.randomness import derive_rng
from probes.information import pointwise_information
from probes.measures import MEASURES, estimate
from probes.transfer import Transfer

# name -> what is subtracted from what: (fitted_on, scored_on). The change of what a fixed probe of
# before reads is `own` + `moved_forward`: information lost, and direction moved.
COMPARISONS = {
    "own": (("before", "before"), ("after", "after")),
    "moved_forward": (("after", "after"), ("before", "after")),
    "moved_back": (("before", "before"), ("after", "before")),
}
SHARE = 0.95  # of the best layer's information, which "reached" asks for
N_FLIPS = 10_000


def paired_changes(transfer: Transfer, *, level: float = 0.95, seed: int = 0) -> pd.DataFrame:
    """Columns comparison, layer, latent, measure, value, low, high, p, q.

    `comparison` is "own", each checkpoint's own probes, after - before; "moved_forward", before's
    probe on after less after's own; or "moved_back", after's probe on before less before's own.
    Bounds are bootstrap-t, p is of sign flips, both over groups; q controls the share of false
    discoveries over layers x latents of one comparison and measure. AUROC compares orders alone;
    the other measures count a changed offset or scale of the read-out as moved too.
    """
    items = {
        key: torch.stack([_item_values(p, transfer, key[2]) for p in stack])
        for key, stack in transfer.log_probabilities.items()
    }
    names, table = list(transfer.codes), []
    for comparison, (base, other) in COMPARISONS.items():
        # [latents layers items measures]
        differences = torch.stack([items[(*other, z)] - items[(*base, z)] for z in names])
        result = infer_map(
            differences.permute(2, 3, 1, 0),
            groups=transfer.groups,
            level=level,
            n_flips=N_FLIPS,
            seed=seed,
        )
        labels = {"measure": MEASURES, "layer": transfer.layers, "latent": names}
        rows = result.to_table(("measure", "layer", "latent"), labels)
        rows["q"] = rows.groupby("measure", sort=False)["p"].transform(adjust_false_discovery)
        table.append(rows.assign(comparison=comparison).rename(columns={"mean": "value"}))
    columns = ["comparison", "layer", "latent", "measure", "value", "low", "high", "p", "q"]
    return pd.concat(table, ignore_index=True)[columns]


def layer_shifts(
    transfer: Transfer, *, level: float = 0.95, n_resamples: int = 2_000, seed: int = 0
) -> pd.DataFrame:
    """Is a latent readable earlier or later? latent, statistic, before, after, value, low, high, p,
    q; `value` = after - before, in layers.

    From the information that each layer's own probes have (`probes.information`). Statistics:
    "reached", the first layer, by linear interpolation, at which it is 95% of the best layer's;
    "centre", its centre of mass over layers, where negative counts as none. Percentile intervals
    over bootstrapped groups, the same for both checkpoints; q over latents. NaN where a
    checkpoint's best layer is not above zero at `level`, corrected for the number of layers.
    """
    _, group = transfer.groups.unique(return_inverse=True)
    n_groups = int(group.max()) + 1
    rng = derive_rng(seed, "layer shifts")
    counts = rng.multinomial(n_groups, np.full(n_groups, 1 / n_groups), size=n_resamples)
    weights = torch.from_numpy(np.concatenate([np.ones((1, n_groups)), counts])).double()
    sizes = weights @ torch.bincount(group, minlength=n_groups).double()
    layers = torch.tensor(transfer.layers, dtype=torch.float64)
    tail = 0.5 - level / 2
    rows = []
    for name, labels in transfer.codes.items():
        found: dict[str, dict[str, Tensor]] = {}
        for source in ("before", "after"):
            stack = transfer.log_probabilities[source, source, name]
            gain = torch.stack([pointwise_information(p, labels, transfer.folds) for p in stack])
            summed = torch.zeros(n_groups, len(layers), dtype=torch.float64)
            summed.index_add_(0, group, gain.T)
            curves = weights @ summed / sizes[:, None]
            # The best of several layers is above zero by luck more often than one is.
            readable = bool(curves[1:, curves[0].argmax()].quantile(tail / len(layers)) > 0)
            curves = curves if readable else torch.full_like(curves, torch.nan)
            found[source] = {"reached": reached(curves, layers), "centre": centre(curves, layers)}
        for statistic in ("reached", "centre"):
            first, second = found["before"][statistic], found["after"][statistic]
            moved = second - first
            ends = (float(first[0]), float(second[0]), float(moved[0]))
            low = high = p = float("nan")
            if not moved[0].isnan():
                drawn = moved[1:][~moved[1:].isnan()]
                low, high = drawn.quantile(drawn.new_tensor([tail, 1 - tail])).tolist()
                on_a_side = min(int((drawn <= 0).sum()), int((drawn >= 0).sum()))
                p = min(1.0, 2 * (on_a_side + 1) / (len(drawn) + 1))
            rows.append((name, statistic, *ends, low, high, p))
    columns = ["latent", "statistic", "before", "after", "value", "low", "high", "p"]
    table = pd.DataFrame(rows, columns=columns)
    table["q"] = table.groupby("statistic", sort=False)["p"].transform(adjust_false_discovery)
    return table


def reached(
    curves: Float[Tensor, "*curves layers"], layers: Float[Tensor, " layers"], share: float = SHARE
) -> Float[Tensor, "*curves"]:
    """The first layer, by linear interpolation, at which a curve is at `share` of its maximum; NaN
    where that is not positive."""
    goal = share * curves.amax(-1, keepdim=True)
    at = (curves >= goal).double().argmax(-1, keepdim=True)
    previous = (at - 1).clamp_min(0)
    low, high = curves.gather(-1, previous), curves.gather(-1, at)
    step = torch.where(at > 0, (goal - low) / (high - low), 1.0)
    start, end = layers[previous], layers[at]
    return torch.where(goal > 0, start + step * (end - start), torch.nan)[..., 0]


def centre(
    curves: Float[Tensor, "*curves layers"], layers: Float[Tensor, " layers"]
) -> Float[Tensor, "*curves"]:
    """The mean layer, weighted by a curve's positive part."""
    positive = curves.clamp_min(0)
    return positive @ layers / positive.sum(-1)


def _item_values(
    log_probabilities: Float[Tensor, "items values"], transfer: Transfer, latent: str
) -> Float[Tensor, "items measures"]:
    """One number per item whose means are the measures."""
    found = estimate(
        log_probabilities, transfer.codes[latent], transfer.folds, groups=transfer.groups
    )
    n = len(log_probabilities)
    return torch.stack([found[m].value + n * found[m].influence for m in MEASURES], 1)
