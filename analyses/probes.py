"""Linear probes: is each latent readable at each layer, beyond a control task, a network of random
weights and the tokens alone?"""

from __future__ import annotations

from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_seed
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig
from probes.probe import ProbeResult, probe_latents
from probes.surface import surface_features


def measure_probes(
    streams: DecisionStreams,
    items: Items,
    task: Task,
    *,
    spec: AnalysisSpec,
    with_baselines: bool = True,
) -> pd.DataFrame:
    """Columns layer, latent, needed, kind, measure, value, low, high: see `ProbeResult`.

    On the residual stream at the decision, before the final norm. Layer 0, the embedding of the
    last token, is the same in every item and is left out. Layer -1 is the tokens, a baseline as the
    control task is.
    """
    return _table(_probe(streams, items, task, spec, with_baselines), task)


def _probe(
    streams: DecisionStreams, items: Items, task: Task, spec: AnalysisSpec, with_baselines: bool
) -> ProbeResult:
    some = items.select(slice(0, spec.probe_items))
    return probe_latents(
        {layer: x[: spec.probe_items] for layer, x in streams.residual.items() if layer > 0},
        some.latents,
        groups=some.groups,
        control_types=task.control_types(some) if with_baselines else None,
        surface=surface_features(some.tokens, groups=some.groups) if with_baselines else None,
        with_description_length=spec.description_length,
        config=ProbeConfig(n_folds=spec.probe_folds, seed=spec.seed),
    )


def _table(result: ProbeResult, task: Task) -> pd.DataFrame:
    needed = {latent.name: latent.needed for latent in task.latents}
    return result.table.assign(needed=[needed[name] for name in result.table["latent"]])


def information_table(
    result: ProbeResult, task: Task, groups: Int[Tensor, " items"]
) -> pd.DataFrame:
    """latent, needed, item, group and information: bits about the latent in each item, at the layer
    that is best (see `ProbeResult.best_information`)."""
    needed = {latent.name: latent.needed for latent in task.latents}
    rows = [
        pd.DataFrame(
            {
                "latent": name,
                "needed": needed[name],
                "item": range(len(groups)),
                "group": groups.numpy(),
                "information": result.best_information(name).numpy(),
            }
        )
        for name in result.labels
    ]
    return pd.concat(rows, ignore_index=True)


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `probes` of every arm, with those of a network of random weights as the floor, and
    `information_items` (see `information_table`)."""
    items, task, spec = pair.probe_items, pair.task, pair.spec
    found = {
        arm: _probe(pair.probe_streams(arm), items, task, spec, with_baselines=True)
        for arm in pair.models
    }
    random = pair.read(random_network(pair.models["before"], seed=spec.seed), items)
    floor = measure_probes(random, items, task, spec=spec)
    floor = floor[floor["kind"] == "latent"].assign(kind="random_init")
    tables = {arm: pd.concat([_table(result, task), floor]) for arm, result in found.items()}
    information = {
        arm: information_table(result, task, items.groups) for arm, result in found.items()
    }
    return {"probes": pair.join(tables), "information_items": pair.join(information)}


def random_network(model: HookedModel, *, seed: int) -> HookedModel:
    """A network of the same architecture with freshly initialised weights."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_seed(seed, "random network"))
        fresh: Any = type(model.model)(model.model.config)
    return HookedModel.from_model(fresh.to(model.dtype).eval(), self_test=False)


if __name__ == "__main__":
    run_script(pair_tables, figure="probes", description=__doc__ or "")
