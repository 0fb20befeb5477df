"""All that is measured on one checkpoint's decision, from one pass over the items."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import pandas as pd
import torch

from analyses.calibration import measure_calibration
from analyses.incentives import measure_incentives
from analyses.ladder import Ladder, ladder_table, latent_beliefs, losses_table, measure_ladder
from analyses.probes import measure_probes
from analyses.refits import LastLayer
from analyses.streams import read_streams
from mechinterp import decisions
from mechinterp.arms import Refit
from mechinterp.hooked import HookedModel
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task


@dataclass(frozen=True)
class Reading:
    """One way to read a checkpoint: its decision shifted by `shift`, valued at `costs`.

    With `refit` (of `mechinterp.refits`) its last layer is first refitted to them.
    """

    costs: Mapping[str, decisions.Utility]
    shift: Sequence[float] | None = None
    refit: Refit | None = None


@dataclass(frozen=True)
class CheckpointMeasures:
    """Tables by name with a column `arm`, each arm's ladders (per item), and the items."""

    tables: dict[str, pd.DataFrame]
    ladders: dict[str, dict[str, Ladder]]
    items: Items


def measure_checkpoint(
    model: HookedModel,
    task: Task,
    readings: Mapping[str, Reading],
    *,
    spec: AnalysisSpec,
    n_items: int,
    with_latents: bool = True,
    with_probes: bool = True,
) -> CheckpointMeasures:
    """Ladder, calibration and probes of `model`, once per named reading (an arm).

    An ex-post arm is the same network with another shift, so it shares the pass; probes read the
    stream below any shift and are stated for the first arm only.
    """
    items = task.sample(n_items, seed=spec.seed, split="test")
    streams = read_streams(
        model, items, task, batch_size=spec.batch_size, max_layers=spec.max_layers
    )
    # Beliefs about latents do not depend on any shift of the decision.
    beliefs = latent_beliefs(streams, items, task, spec=spec) if with_latents else None
    last_layer = LastLayer(model, task, spec)
    tables: dict[str, list[pd.DataFrame]] = {}
    ladders = {}
    for arm, reading in readings.items():
        shift = torch.tensor(reading.shift or [0.0] * len(task.actions), dtype=torch.float64)
        shifted = replace(streams, action_logits=streams.action_logits + shift)
        if reading.refit is not None:
            (utility,) = reading.costs.values()
            readout = last_layer.refit(reading.refit, utility)
            shifted = replace(streams, action_logits=readout(streams.normed[model.n_layers]))
        ladders[arm] = measure_ladder(
            shifted, items, task, costs=reading.costs, spec=spec, beliefs=beliefs
        )
        found = {
            "ladder": ladder_table(ladders[arm]),
            "losses": losses_table(ladders[arm]),
            **measure_calibration(
                shifted, items, costs=reading.costs, n_bins=spec.calibration_bins
            ),
        }
        if with_latents:
            found["incentives"] = measure_incentives(shifted, items, costs=reading.costs)
        if with_probes and arm == next(iter(readings)):
            # Along trajectories the latents alone: their baselines cost more than they do.
            found["probes"] = measure_probes(
                streams, items, task, spec=spec, with_baselines=with_latents
            )
        for name, table in found.items():
            tables.setdefault(name, []).append(table.assign(arm=arm))
    joined = {name: pd.concat(parts, ignore_index=True) for name, parts in tables.items()}
    return CheckpointMeasures(joined, ladders, items)
