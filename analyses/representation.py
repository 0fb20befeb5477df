"""What did training do to the representation? Information lost, directions moved, geometry."""

from __future__ import annotations

import pandas as pd

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams
from mechinterp.patching.inference import adjust_false_discovery
from mechinterp.progress import progress_bar
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig
from probes.geometry import geometry
from probes.paired import layer_shifts, paired_changes
from probes.similarity import compare_representations
from probes.transfer import probe_transfer

COLUMNS = (
    *("part", "layer", "latent", "needed", "measure"),
    *("value", "low", "high", "p", "q", "null", "null_low", "null_high"),
)


def measure_representation(
    before: DecisionStreams, after: DecisionStreams, items: Items, task: Task, *, spec: AnalysisSpec
) -> dict[str, pd.DataFrame]:
    """Tables `representation` and `latent_shifts` of two checkpoints on the same items.

    `representation`: part, layer, latent ("" where it is of no latent), needed, measure, value,
    low, high, p, q, null, null_low, null_high; 95% intervals over groups of items. Parts are

    - "own", "moved_forward", "moved_back": changes of the measures of probes, see `probes.paired`;
    - "direction": the cosine of the probes' directions, its ceiling and both corrected for noise,
      see `probes.directions`;
    - "similarity": CKA, Procrustes distance and R^2 both ways, see `probes.similarity`;
    - "geometry_before", "geometry_after", "geometry_change": see `probes.geometry`.

    `latent_shifts`: latent, needed, statistic, before, after, value, low, high, p, q, see
    `probes.paired.layer_shifts`. q is over layers x latents within a part and measure. On the
    residual stream at the decision, without the embedding, as `analyses.probes`.
    """
    some = items.select(slice(0, spec.probe_items))
    old, new = (
        {layer: x[: len(some)] for layer, x in streams.residual.items() if layer > 0}
        for streams in (before, after)
    )
    config = ProbeConfig(n_folds=spec.probe_folds, seed=spec.seed)
    transfer = probe_transfer(old, new, some.latents, groups=some.groups, config=config)
    changes = paired_changes(transfer, seed=spec.seed).rename(columns={"comparison": "part"})
    parts = [changes, _directions(transfer.directions)]
    with progress_bar("similarity, geometry", len(old), unit="layer") as advance:
        for layer in old:
            alike = compare_representations(
                old[layer], new[layer], groups=some.groups, seed=spec.seed
            )
            parts.append(alike.assign(part="similarity", layer=layer))
            shapes = geometry(
                {"before": old[layer], "after": new[layer]}, groups=some.groups, seed=spec.seed
            )
            rows = [
                (f"geometry_{of}", layer, measure, *cell) for (of, measure), cell in shapes.items()
            ]
            parts.append(
                pd.DataFrame(rows, columns=["part", "layer", "measure", "value", "low", "high"])
            )
            advance(1)
    table = pd.concat(parts, ignore_index=True)
    of_similarity = table["part"] == "similarity"
    table.loc[of_similarity, "q"] = (
        table[of_similarity].groupby("measure")["p"].transform(adjust_false_discovery)
    )
    needed = {latent.name: latent.needed for latent in task.latents}
    table["latent"] = table["latent"].fillna("")
    table["needed"] = [needed.get(latent, False) for latent in table["latent"]]
    shifts = layer_shifts(transfer, seed=spec.seed)
    shifts.insert(1, "needed", [needed[latent] for latent in shifts["latent"]])
    return {"representation": table[list(COLUMNS)], "latent_shifts": shifts}


def _directions(found: pd.DataFrame) -> pd.DataFrame:
    """Long form; the interval is the cosine's, the null is what its floor is."""
    rows = []
    for row in found.to_dict("records"):
        key = {"part": "direction", "layer": row["layer"], "latent": row["latent"]}
        bounds = {name: row[name] for name in ("low", "high", "null_low", "null_high")}
        rows.append({**key, "measure": "cosine", "value": row["cosine"], **bounds})
        rows += [
            {**key, "measure": name, "value": row[name]}
            for name in ("halves", "ceiling", "corrected")
        ]
    return pd.DataFrame(rows)


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Both tables, of every arm against the network before."""
    pair.require("after")
    found = {
        arm: measure_representation(
            *(pair.probe_streams("before"), pair.probe_streams(arm)),
            *(pair.probe_items, pair.task),
            spec=pair.spec,
        )
        for arm in pair.models
        if arm != "before"
    }
    return {
        name: pair.join({arm: tables[name] for arm, tables in found.items()})
        for name in ("representation", "latent_shifts")
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="representation", description=__doc__ or "")
