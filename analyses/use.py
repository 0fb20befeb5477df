"""Is what is decodable used? Steer along a latent's direction at a layer, see what the decision
does.

Decodability and use of the same direction stand side by side. The dose is in standard deviations of
the items along it. The effect is the change of the log-odds of an item's likeliest label, counted
towards what more of the latent's value argues for: in a decision between two, towards the action
that gets better. Random directions of the same length, drawn in the covariance of the stream, tell
what any displacement of that size does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams, action_shift, read_streams
from mechinterp.hooked import HookedModel
from mechinterp.patching.inference import adjust_false_discovery, mean_intervals
from mechinterp.patching.metrics import Shifted, action_log_odds
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.steering import SteeredPositions, check_sites, metric_gradients, steer
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig
from probes.measures import Estimate, estimate, mean_estimate
from probes.steering import (
    SteeringDirection,
    fit_steering_directions,
    random_directions,
)

DOSES = (-4.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0)
N_NULL = 999  # random directions per layer whose slopes are the null
N_RANDOM = 2  # of them, those whose whole response is measured
N_RUN = 200  # test items whose response is measured: runs are dear, and gradients are not
CURVE = ("layer", "latent", "needed", "value", "kind", "draw", "dose", "effect", "low", "high")


@dataclass(frozen=True)
class Use:
    """`curves`: layer, latent, needed, value, kind, draw, dose, effect (nats), low, high.

    `slopes`: layer, latent, needed, value, kind; auroc, auroc_low, auroc_high of the direction's
    value against all others; slope (nats per standard deviation, at dose 0), low, high, p_zero,
    q_zero (of no slope); null_low, null_high (95% of random directions), p, q (of a slope like
    theirs); deviation (the length of a step); saturation. q is over layers and latents.

    Kinds are "logistic" and "mean_difference", and in `curves` also "random", at the length of the
    latter. A latent of two values has one direction, towards the greater; of more one for
    each `value`. `saturation` is the share by which the response from the lowest to the highest
    dose falls short of a straight line with the slope at 0 of the same items (0: none; NaN where
    the slope may be 0).
    """

    curves: pd.DataFrame
    slopes: pd.DataFrame


def measure_use(
    model: HookedModel,
    task: Task,
    *,
    spec: AnalysisSpec,
    positions: SteeredPositions = "decision",
) -> Use:
    """Decodability and causal dose-response of each direction, at every layer but the embedding.

    Directions are fitted on `probe_items` of the training split at the decision position, scored
    and added on `erasure_items` of the test split, there or with `positions="all"` everywhere; the
    response to large doses is that of the first 200 of them.
    The 95% interval of a slope has two parts: the test items, and the fit of the direction, by a
    jackknife over blocks of the training items; without the latter the direction of a latent that
    is not used, which is never quite orthogonal to what is, would count as used. Random directions
    are a harder standard than no slope: where most of the stream's variance is along the decision
    itself, they move the decision as well.
    """
    check_sites(model, (), positions)
    fitted_on = task.sample(spec.probe_items, seed=spec.seed, split="train")
    items = task.sample(spec.erasure_items, seed=spec.seed, split="test")
    options = {"batch_size": spec.batch_size, "max_layers": spec.max_layers}
    streams = read_streams(model, fitted_on, task, **options)
    tested = read_streams(model, items, task, **options)
    metric = Shifted(
        action_log_odds(task.actions, items.likeliest_label), action_shift(model, len(task.actions))
    )
    layers = [layer for layer in streams.residual if layer > 0]
    steered: dict[str, Any] = {"positions": positions, "batch_size": spec.batch_size}
    gradients = metric_gradients(model, items.tokens, layers, metric, **steered)
    directions = _fit(streams, fitted_on, layers, spec)
    towards = {
        (name, value): favours(task, items, fitted_on, name, value)
        for name, value in {key[1:3]: None for key in directions}
    }
    randoms = {
        layer: random_directions(
            streams.residual[layer], N_NULL, generator=derive_generator(spec.seed, "use", layer)
        )
        for layer in layers
    }
    slopes = pd.DataFrame(
        [
            {
                **_key(key, task),
                **_decodability(tested.residual[key[0]], direction, items, key),
                **_slope(gradients[key[0]], towards[key[1:3]], direction, randoms[key[0]], items),
            }
            for key, direction in directions.items()
        ]
    )
    for p, q in (("p", "q"), ("p_zero", "q_zero")):
        slopes[q] = slopes.groupby("kind", sort=False)[p].transform(adjust_false_discovery)
    few = items.select(slice(0, N_RUN))
    curves = _curves(model, task, few, metric, directions, randoms, towards, steered)
    straight = [
        float((gradients[key[0]] * towards[key[1:3]][:, None])[:N_RUN].mean(0) @ direction.step)
        for key, direction in directions.items()
    ]
    slopes["saturation"] = _saturation(slopes, curves, np.array(straight))
    return Use(curves, slopes)


Key = tuple[int, str, int, str, int]  # layer, latent, value, kind, draw


def _fit(
    streams: DecisionStreams, items: Items, layers: list[int], spec: AnalysisSpec
) -> dict[Key, SteeringDirection]:
    config = ProbeConfig(n_folds=spec.probe_folds, seed=spec.seed)
    found: dict[Key, SteeringDirection] = {}
    with progress_bar("directions", len(layers), unit="layer") as advance:
        for layer in layers:
            fitted = fit_steering_directions(
                streams.residual[layer], items.latents, groups=items.groups, config=config
            )
            for direction in fitted:
                found[layer, direction.latent, direction.value, direction.kind, 0] = direction
            advance(1)
    return found


def favours(
    task: Task, items: Items, others: Items, latent: str, value: int
) -> Float[Tensor, " items"]:
    """Per item 1 where `value` of a latent argues for the item's likeliest label, else -1.

    Where the task knows the posterior given this latent: against the latent's other values, all
    other latents as they are, so that a latent may argue either way, as one of an exclusive or
    does. Elsewhere by how often `others` of that value have the label; of a latent that has
    nothing to do with the label this is chance, and the sign of its slope says nothing.
    """
    label = items.likeliest_label[:, None]
    if latent in task.posterior_latents:
        n_values = {z.name: z.n_values for z in task.latents}
        beliefs = {
            name: torch.nn.functional.one_hot(items.latents[name], n_values[name]).double()
            for name in task.posterior_latents
        }
        own = torch.zeros_like(beliefs[latent])
        own[:, value] = 1
        against = (1 - own) / (n_values[latent] - 1)
        with_value, without = (
            task.posterior_from_latents({**beliefs, latent: belief}) for belief in (own, against)
        )
        gain = (with_value - without).gather(1, label)[:, 0]
    else:
        target = torch.nn.functional.one_hot(others.labels, len(task.actions)).double()
        has = others.latents[latent] == value
        gain = (target[has].mean(0) - target[~has].mean(0))[label[:, 0]]
    # Where nothing argues either way any sign does, if it is that of one action.
    last = torch.where(label[:, 0] == len(task.actions) - 1, 1.0, -1.0).double()
    return torch.where(gain == 0, last, gain.sign())


def _key(key: Key, task: Task) -> dict[str, Any]:
    layer, latent, value, kind, _ = key
    needed = {z.name: z.needed for z in task.latents}
    return {"layer": layer, "latent": latent, "needed": needed[latent], "value": value} | {
        "kind": kind
    }


def _decodability(
    x: Float[Tensor, "items d"], direction: SteeringDirection, items: Items, key: Key
) -> dict[str, float]:
    """AUROC of the projection, on items that the direction was not fitted on."""
    scores = x.double() @ direction.step
    scores = (scores - scores.mean()) / scores.std()
    log_p = torch.nn.functional.logsigmoid(torch.stack([-scores, scores], 1))
    has = (items.latents[key[1]] == key[2]).long()
    found = estimate(log_p, has, torch.zeros_like(has), groups=items.groups)["auroc"]
    low, high = found.interval(items.groups)
    return {"auroc": found.value, "auroc_low": low, "auroc_high": high}


def _slope(
    gradient: Float[Tensor, "items d"],
    towards: Float[Tensor, " items"],
    direction: SteeringDirection,
    randoms: Float[Tensor, "n d"],
    items: Items,
) -> dict[str, float]:
    signed = gradient * towards[:, None]
    found = mean_estimate(signed @ direction.step)
    mean = signed.mean(0)
    half, p_zero = _two_part_test(found, direction.left_out @ mean, items.groups)
    deviation = float(direction.step.norm())
    null = deviation * (randoms @ mean).numpy()
    null_low, null_high = np.quantile(null, [0.025, 0.975])
    larger = int((np.abs(null) >= abs(found.value)).sum())
    return {
        "slope": found.value,
        "low": found.value - half,
        "high": found.value + half,
        "p_zero": p_zero,
        "null_low": float(null_low),
        "null_high": float(null_high),
        "p": (1 + larger) / (1 + len(null)),
        "deviation": deviation,
    }


def _two_part_test(
    found: Estimate, left_out: Float[Tensor, " blocks"], groups: Int[Tensor, " items"]
) -> tuple[float, float]:
    """Half the width of Student's interval, and p of zero: with the variance over groups of items,
    and that over fits, a jackknife's.

    The parts are independent of each other; degrees of freedom are Satterthwaite's (1946).
    """
    from scipy.special import stdtr, stdtrit

    n_groups, n_blocks = len(groups.unique()), len(left_out)
    sampling = found.standard_error(groups) ** 2
    fitting = float((n_blocks - 1) * left_out.var(correction=0))
    error = (sampling + fitting) ** 0.5
    if error == 0:
        return 0.0, float(found.value == 0)
    freedom = error**4 / (sampling**2 / (n_groups - 1) + fitting**2 / (n_blocks - 1))
    p = 2 * stdtr(freedom, -abs(found.value) / error)
    return float(stdtrit(freedom, 0.975)) * error, float(p)


def _curves(
    model: HookedModel,
    task: Task,
    items: Items,
    metric: Shifted,
    directions: Mapping[Key, SteeringDirection],
    randoms: Mapping[int, Float[Tensor, "n d"]],
    towards: Mapping[tuple[str, int], Float[Tensor, " items"]],
    steered: Mapping[str, Any],
) -> pd.DataFrame:
    steps: dict[Key, Tensor] = {}
    for key, direction in directions.items():
        steps[key] = direction.step
        if key[3] == "mean_difference":
            for draw in range(N_RANDOM):
                random = randoms[key[0]][draw] * direction.step.norm()
                steps[(*key[:3], "random", draw)] = random
    by_layer: dict[int, list[Key]] = {}
    for key in steps:
        by_layer.setdefault(key[0], []).append(key)
    doses = torch.tensor(DOSES, dtype=torch.float64)
    added = {
        layer: torch.cat([doses[:, None] * steps[key] for key in keys])
        for layer, keys in by_layer.items()
    }
    values = steer(model, items.tokens, added, metric, **steered)
    rows = []
    for layer, keys in by_layer.items():
        found = values[layer].unflatten(0, (len(keys), len(doses)))
        signs = torch.stack([towards[key[1:3]][: len(items)] for key in keys])[:, None]
        effects = (found - found[:, DOSES.index(0.0), None]) * signs
        effects = effects.permute(2, 0, 1)  # items first
        low, high = mean_intervals(effects, groups=items.groups, interval="student")
        summary = torch.stack([effects.mean(0), low, high], -1).tolist()
        for key, by_dose in zip(keys, summary, strict=True):
            shared = {**_key(key, task), "draw": key[4]}
            for dose, (effect, below, above) in zip(DOSES, by_dose, strict=True):
                numbers = {"dose": dose, "effect": effect, "low": below, "high": above}
                rows.append({**shared, **numbers})
    return pd.DataFrame(rows, columns=list(CURVE))


def _saturation(
    slopes: pd.DataFrame, curves: pd.DataFrame, straight: Float[np.ndarray, " directions"]
) -> np.ndarray:
    """`straight` are the slopes at dose 0 of the items of `curves`."""
    by = ["layer", "latent", "value", "kind"]
    ends = curves[curves["dose"].isin([DOSES[0], DOSES[-1]]) & (curves["kind"] != "random")]
    ends = ends.pivot(index=by, columns="dose", values="effect")
    reached = (ends[DOSES[-1]] - ends[DOSES[0]]).reindex(pd.MultiIndex.from_frame(slopes[by]))
    used = (slopes["low"] > 0) | (slopes["high"] < 0)
    rise = np.where(used, straight * (DOSES[-1] - DOSES[0]), np.nan)
    return 1 - reached.to_numpy() / rise


def pair_tables(pair: Pair, *, positions: SteeredPositions = "decision") -> dict[str, pd.DataFrame]:
    """Tables `use` (the responses) and `use_slopes` of every arm."""
    found = {
        arm: measure_use(model, pair.task, spec=pair.spec, positions=positions)
        for arm, model in pair.models.items()
    }
    return {
        "use": pair.join({arm: use.curves for arm, use in found.items()}),
        "use_slopes": pair.join({arm: use.slopes for arm, use in found.items()}),
    }


if __name__ == "__main__":
    run_script(pair_tables, figure="use", description=__doc__ or "")
