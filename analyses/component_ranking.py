"""Which attention heads and MLP neurons carry the decision, and which carry each latent.

By attribution patching along the path of the inputs, one prompt into another. The score of a latent
is the log-odds of the item's own value by a probe of the stream at the decision that was fitted
without the item's fold.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from analyses.streams import read_streams
from mechinterp.hooked import HookedModel
from mechinterp.patching.attribution import attribute_grains
from mechinterp.patching.metrics import action_log_odds
from mechinterp.patching.pruning import KINDS, Effects, StreamScore, component_effects
from mechinterp.separability import DECISION, LATENTS
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig, cross_fit
from probes.folds import grouped_folds
from probes.measures import mean_estimate

N_RANKED = 512  # prompts on which components are ranked
ROUNDING = 1e-4  # of a stream's largest deviation: features that vary less are taken as constant


def rank_targets(
    model: HookedModel, items: Items, task: Task, *, spec: AnalysisSpec
) -> dict[str, Effects]:
    """Target -> the estimated effect of exchanging each component's activations for the next
    prompt's: nats of log-odds; for "latents" the mean over needed ones of |effect| / sum |effect|.
    """
    some = items.select(slice(0, min(N_RANKED, len(items))))
    source = some.tokens.roll(1, 0)
    metric = action_log_odds(task.actions, some.likeliest_label)
    found = attribute_grains(
        model,
        clean=some.tokens,
        corrupt=source,
        grains=KINDS,
        metric=metric,
        direction="noising",
        n_steps=spec.circuit_steps,
        n_exact=0,
    )
    needed = [latent.name for latent in task.latents if latent.needed]
    of_latents = component_effects(
        model,
        tokens=some.tokens,
        source=source,
        scores=latent_scores(model, items, task, needed, spec=spec),
        n_steps=spec.circuit_steps,
    )
    return {
        DECISION: {kind: found[kind].mean for kind in KINDS},
        LATENTS: _together(list(of_latents.values())),
        **{f"latent {name}": effects for name, effects in of_latents.items()},
    }


def latent_scores(
    model: HookedModel, items: Items, task: Task, names: list[str], *, spec: AnalysisSpec
) -> dict[str, StreamScore]:
    """Per latent the log-odds of each item's own value by a probe that was fitted without the
    item's fold, at the first layer whose log-loss is within one standard error of the least."""
    streams = read_streams(
        model, items, task, batch_size=spec.batch_size, max_layers=spec.max_layers
    )
    config = ProbeConfig(n_folds=spec.probe_folds, seed=spec.seed)
    codes = {name: items.latents[name] for name in names}
    folds = grouped_folds(
        items.groups, torch.stack(list(codes.values()), 1), spec.probe_folds, spec.seed, names=names
    )
    n_values = {latent.name: latent.n_values for latent in task.latents}
    scores = {}
    for name, own in codes.items():
        fits = {
            layer: cross_fit(
                without_rounding(x, x.std(0).max()), own[:, None], n_values[name], folds, config
            )
            for layer, x in streams.normed.items()
            if layer > 0
        }
        right = {
            layer: fit.log_probabilities[:, 0].gather(1, own[:, None])[:, 0]
            for layer, fit in fits.items()
        }
        best = max(right.values(), key=lambda log_p: float(log_p.sum()))
        behind = {layer: mean_estimate(best - log_p) for layer, log_p in right.items()}
        first = min(
            layer for layer, gap in behind.items() if gap.value <= gap.standard_error(items.groups)
        )
        probes = fits[first].probes
        coef, intercept = (x[folds, 0].to(model.dtype) for x in (probes.coef, probes.intercept))

        def score(
            stream: Tensor,
            rows: Tensor,
            coef: Tensor = coef,
            intercept: Tensor = intercept,
            own: Tensor = own,
        ) -> Float[Tensor, " rows"]:
            rows = rows.cpu()
            logits = torch.einsum("rd,rad->ra", stream, coef[rows].to(stream.device))
            logits = logits + intercept[rows].to(stream.device)
            return action_log_odds(range(logits.shape[1]), own)(logits, rows.to(stream.device))

        scores[name] = StreamScore(first, score)
    return scores


def without_rounding(
    x: Float[Tensor, "items d"], deviation: float | Tensor
) -> Float[Tensor, "items d"]:
    """`x` without the features that vary next to nothing beside `deviation`: standardised, rounding
    errors would be features like any other."""
    return torch.where(x.std(0) > ROUNDING * deviation, x, 0.0)


def _together(effects: list[Effects]) -> Effects:
    """Each latent counts the same, however large its probe's log-odds are."""
    sizes = [{kind: effect[kind].abs() for kind in KINDS} for effect in effects]
    totals = [sum(float(size[kind].sum()) for kind in KINDS) or 1.0 for size in sizes]
    return {
        kind: torch.stack([size[kind] / n for size, n in zip(sizes, totals, strict=True)]).mean(0)
        for kind in KINDS
    }
