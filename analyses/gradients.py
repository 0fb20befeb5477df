"""What do objectives teach? Share, norm and signal-to-noise of their gradients at a checkpoint.

By part of the network as training sees it, batch by batch; and in the residual stream at the
decision, item by item: along the directions of the latents, and by posterior.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from analyses.incentives import log_odds_bins
from analyses.pair import Pair, run_script
from analyses.streams import check_fits, decision_sites
from mechinterp import objectives as losses
from mechinterp.hooked import HookedModel
from mechinterp.objectives import Objective, Shifted
from mechinterp.patching.components import components_of, merge_components
from mechinterp.progress import progress_bar
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Latent, Task

BATCH_SIZE = 64  # of training, which signal-to-noise refers to
MIN_BATCHES = 8
REFERENCE = "symmetric"  # the objective with which the others' gradients are compared
ALL_NEEDED = Latent("all needed")
_PARTS = {
    "pos_embed": "embed",
    "embed+unembed": "embed",
    "attention": "attn",
    "final_norm": "norm",
}


@dataclass(frozen=True)
class ObjectiveGradients:
    """One objective's gradients over batches of equal size.

    `mean` is that of the mean loss in all weights, by part; `squared_norms` the squared norm of a
    batch's gradient, mean over the batches, by part; `streams` by layer that of each item's own
    loss in the residual stream at the decision.
    """

    mean: Mapping[str, Float[Tensor, " weights"]]
    squared_norms: Mapping[str, float]
    streams: Mapping[int, Float[Tensor, "items d_model"]]


def measure_gradients(
    model: HookedModel,
    task: Task,
    objectives: Mapping[str, Objective | Shifted],
    *,
    spec: AnalysisSpec,
) -> dict[str, pd.DataFrame]:
    """Tables `gradients`, `gradients_latents` and, where a posterior is known, of that.

    On `spec.gradient_items` items of the training split in batches of 64; of fewer where it has too
    few items for eight batches, and then the noise is scaled to 64. Without any shift of the action
    logits that provenance records: training would not see it.

    `gradients`: objective, part, measure, value. Parts are "embed", "attn l" and "mlp l" with their
    norms, "norm", "unembed" (with "embed" where the two are tied) and "all".

    - norm: of the mean gradient, without what noise adds to it: ||mean||^2 - tr(cov) / batches;
    - noise: square root of the trace of the covariance of a batch's gradient;
    - snr: norm / noise;
    - share: norm^2 as a share of the sum over parts;
    - cosine: of the mean gradient with that of the objective "symmetric", where that is given.

    `gradients_latents`: objective, layer, latent, needed, measure, value. g_i is the gradient of
    item i's own loss in the residual stream at the decision after that many blocks, d the unit
    difference of the means of the latent's two values there; several values span a subspace. The
    latent "all needed" is the subspace of all latents that the decision needs, whose own directions
    need not be orthogonal, so that their shares may add up to more.

    - share: sum_i (g_i d)^2 / sum_i |g_i|^2;
    - chance: that of a random direction, rank / d_model;
    - push: mean of -s_i g_i d, s_i = +1 or -1 by the latent's value: how hard a step drives its
      two values apart;
    - snr: of that push over items, mean / standard deviation.

    `gradients_posterior`, of two actions: objective, log_odds (of the posterior, to the nearest
    integer), n_items, measure, value. |g_i| is that in the last layer's stream.

    - norm: mean |g_i|;
    - share: of sum_i |g_i|;
    - items: share of the items.

    Raises:
        TaskError: the task's tokens do not fit the model.
    """
    check_fits(model, task)
    items = task.sample(spec.gradient_items, seed=spec.seed, split="train")
    batch_size = min(BATCH_SIZE, max(len(items) // MIN_BATCHES, 1))
    items = items.select(slice(0, len(items) // batch_size * batch_size))
    gradients, residual = batch_gradients(
        model, task, items, objectives, batch_size=batch_size, max_layers=spec.max_layers
    )
    directions = {
        layer: {latent.name: value_differences(x, items, latent) for latent in task.latents}
        for layer, x in residual.items()
    }
    reference = gradients.get(REFERENCE)
    tables: dict[str, list[pd.DataFrame]] = {}
    for name, of in gradients.items():
        found = {
            "gradients": _parts_table(of, reference, len(items) // batch_size, batch_size),
            "gradients_latents": _latents_table(of, directions, items, task),
        }
        if items.posterior is not None and len(task.actions) == 2:
            found["gradients_posterior"] = _posterior_table(of.streams[model.n_layers], items)
        for table, rows in found.items():
            rows.insert(0, "objective", name)
            tables.setdefault(table, []).append(rows)
    return {table: pd.concat(rows, ignore_index=True) for table, rows in tables.items()}


def weights_by_part(model: HookedModel) -> dict[str, list[nn.Parameter]]:
    """Every weight of the network once, by the part that it belongs to."""
    parts: dict[str, dict[nn.Parameter, None]] = {}
    for component in merge_components(components_of(model), "sublayer"):
        kind = _PARTS.get(component.kind, component.kind)
        part = kind if component.layer is None else f"{kind} {component.layer}"
        for piece in component.pieces:
            weight = model.model.get_parameter(f"{piece.module}.{piece.name}")
            parts.setdefault(part, {})[weight] = None
    return {part: list(weights) for part, weights in parts.items()}


def batch_gradients(
    model: HookedModel,
    task: Task,
    items: Items,
    objectives: Mapping[str, Objective | Shifted],
    *,
    batch_size: int,
    max_layers: int | None = None,
) -> tuple[dict[str, ObjectiveGradients], dict[int, Float[Tensor, "items d_model"]]]:
    """The gradients of each objective, and the residual stream at the decision by layer from 1 on.

    One forward pass per batch serves all objectives. `batch_size` divides the number of items.
    """
    parts = weights_by_part(model)
    weights = [weight for some in parts.values() for weight in some]
    sizes = [sum(weight.numel() for weight in some) for some in parts.values()]
    layers = {
        layer: s for layer, s in decision_sites(model, max_layers=max_layers).items() if layer
    }
    actions = list(task.actions)
    n_batches = len(items) // batch_size
    mean = {name: torch.zeros(sum(sizes), device=model.device) for name in objectives}
    squares = {name: torch.zeros(len(parts), dtype=torch.float64) for name in objectives}
    residual: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    streams: dict[str, dict[int, list[Tensor]]] = {
        name: {layer: [] for layer in layers} for name in objectives
    }
    with progress_bar("gradients", n_batches, unit="batch") as advance:
        for rows in torch.arange(len(items)).split(batch_size):
            logits, captured = model.run(
                items.tokens[rows],
                sites=layers.values(),
                capture_positions=-1,
                positions=-1,
                grad=True,
            )
            read = [captured[site] for site in layers.values()]
            for layer, x in zip(layers, read, strict=True):
                residual[layer].append(x.detach().float().cpu())
            labels = items.labels[rows].to(model.device)
            for name, objective in objectives.items():
                found = torch.autograd.grad(
                    objective(logits[:, actions], labels).mean(),
                    [*weights, *read],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                flat = torch.cat([x.flatten() for x in found[: len(weights)]]).float()
                mean[name] += flat / n_batches
                norms = [x.norm(dtype=torch.float64) for x in flat.split(sizes)]
                squares[name] += torch.stack(norms).cpu().square() / n_batches
                for layer, x in zip(layers, found[len(weights) :], strict=True):
                    streams[name][layer].append(batch_size * x.float().cpu())
            advance(1)
    gradients = {
        name: ObjectiveGradients(
            dict(zip(parts, mean[name].cpu().split(sizes), strict=True)),
            dict(zip(parts, squares[name].tolist(), strict=True)),
            {layer: torch.cat(some) for layer, some in streams[name].items()},
        )
        for name in objectives
    }
    return gradients, {layer: torch.cat(some) for layer, some in residual.items()}


def value_differences(
    residual: Float[Tensor, "items d_model"], items: Items, latent: Latent
) -> Float[Tensor, "values-1 d_model"]:
    """The mean of each value of a latent that occurs, less that of its lowest value."""
    values = items.latents[latent.name]
    means = [residual[values == value].double().mean(0) for value in values.unique()]
    return torch.stack(means)[1:] - means[0]


def _parts_table(
    of: ObjectiveGradients, reference: ObjectiveGradients | None, n_batches: int, batch_size: int
) -> pd.DataFrame:
    """Columns part, measure, value."""

    def with_sum(by_part: Mapping[str, float]) -> pd.Series:
        return pd.Series({**by_part, "all": sum(by_part.values())})

    def products(other: ObjectiveGradients) -> pd.Series:
        return with_sum({p: float(x.double() @ other.mean[p].double()) for p, x in of.mean.items()})

    biased = products(of)
    trace = (with_sum(of.squared_norms) - biased).clip(lower=0) * n_batches / (n_batches - 1)
    squared = (biased - trace / n_batches).clip(lower=0)
    wide = pd.DataFrame({"norm": squared**0.5})
    wide["noise"] = (trace * batch_size / BATCH_SIZE) ** 0.5
    wide["snr"] = wide["norm"] / wide["noise"]
    wide["share"] = squared / squared.drop("all").sum()
    wide.loc["all", "share"] = 1.0
    if reference is not None:
        theirs = with_sum({p: float(x.double().square().sum()) for p, x in reference.mean.items()})
        wide["cosine"] = products(reference) / (biased * theirs) ** 0.5
    return wide.rename_axis("part").reset_index().melt("part", var_name="measure")


def _latents_table(
    of: ObjectiveGradients,
    directions: Mapping[int, Mapping[str, Float[Tensor, "values-1 d_model"]]],
    items: Items,
    task: Task,
) -> pd.DataFrame:
    """Columns layer, latent, needed, measure, value."""
    rows = []
    for layer, by_latent in directions.items():
        gradient = of.streams[layer].double()
        together = [by_latent[latent.name] for latent in task.latents if latent.needed]
        everything = {**by_latent, ALL_NEEDED.name: torch.cat(together)}
        for latent in (*task.latents, ALL_NEEDED):
            differences = everything[latent.name]
            basis = _orthonormal(differences)
            inside = (gradient @ basis.T).square().sum() / gradient.square().sum()
            measures = {"share": float(inside), "chance": len(basis) / gradient.shape[1]}
            if latent in task.latents and len(differences) == 1:
                push = _pushes(gradient, differences[0], items.latents[latent.name])
                measures |= {"push": float(push.mean()), "snr": float(push.mean() / push.std())}
            where = {"layer": layer, "latent": latent.name, "needed": latent.needed}
            rows += [{**where, "measure": name, "value": v} for name, v in measures.items()]
    return pd.DataFrame(rows)


def _orthonormal(
    differences: Float[Tensor, "values-1 d_model"],
) -> Float[Tensor, "rank d_model"]:
    """A basis of the space that the differences of means span."""
    basis = torch.linalg.svd(differences, full_matrices=False).Vh
    return basis[: int(torch.linalg.matrix_rank(differences))]


def _pushes(
    gradient: Float[Tensor, "items d_model"],
    difference: Float[Tensor, " d_model"],
    values: Int[Tensor, " items"],
) -> Float[Tensor, " items"]:
    """How far a step against each item's gradient moves it to its own value's side."""
    side = 2.0 * (values == values.max()) - 1
    return -side * (gradient @ F.normalize(difference, dim=0))


def _posterior_table(gradient: Float[Tensor, "items d_model"], items: Items) -> pd.DataFrame:
    """Columns log_odds, n_items, measure, value."""
    assert items.posterior is not None
    bins = log_odds_bins(items.posterior)
    table = pd.DataFrame({"log_odds": bins, "norm": gradient.double().norm(dim=1)})
    by_bin = table.groupby("log_odds")["norm"]
    wide = by_bin.agg(n_items="count", norm="mean").reset_index()
    wide["share"] = wide["n_items"] * wide["norm"] / table["norm"].sum()
    wide["items"] = wide["n_items"] / len(table)
    return wide.melt(["log_odds", "n_items"], var_name="measure")


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Every table of every arm, for the utility-weighted loss at each of the pair's costs.

    At symmetric costs that is the cross-entropy.
    """
    objectives = {
        name: losses.get("utility_weighted", utility=utility)
        for name, utility in pair.costs.items()
    }
    by_arm = {
        arm: measure_gradients(model, pair.task, objectives, spec=pair.spec)
        for arm, model in pair.models.items()
    }
    names = next(iter(by_arm.values()))
    return {
        name: pair.join({arm: tables[name] for arm, tables in by_arm.items()}) for name in names
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="gradients", description=__doc__ or "")
