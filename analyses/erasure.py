"""Is what a probe reads what the network uses? Erase a latent at a layer, see what the decision
loses.

LEACE (see `probes.erasure`) takes all that is linearly readable of a latent out of the residual
stream at the decision position; the later layers run on what is left. They may fetch the latent
again from other positions: what is measured is the use of that site. Two controls remove equally
many directions: those of the control task's labels, and random ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from einops import rearrange, repeat
from jaxtyping import Float, Int
from torch import Tensor

from analyses.pair import Pair, run_script
from analyses.streams import DecisionStreams, action_shift, read_streams
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.patching.suffix import record
from mechinterp.progress import progress_bar
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig, cross_fit
from probes.erasure import Eraser, fit_eraser, random_eraser
from probes.folds import grouped_folds
from probes.measures import Estimate, estimate, mean_estimate
from probes.probe import control_labels, encode

N_RANDOM = 3  # random subspaces per latent and layer


@dataclass(frozen=True)
class Erasure:
    """One way to erase at one layer. Kinds: "latent", "control" labels, "random" directions."""

    layer: int
    latent: str
    kind: str
    draw: int
    eraser: Eraser


def measure_erasure(model: HookedModel, task: Task, *, spec: AnalysisSpec) -> pd.DataFrame:
    """One row per layer, latent, kind, draw and measure, as `probes` has its layers.

    Erasers are fitted on `probe_items` of the training split and applied to `erasure_items` of the
    test split. `value` is with the erasure, `base` without, `loss` their difference (of auroc, what
    the eraser took away) with its 95% interval over groups. Measures are those of the decision:
    log_odds of the likeliest label's action (nats), accuracy, utility and log_score at the task's
    utility; and auroc, of a fresh probe of the latent at the site, which tells whether it is gone:
    what the eraser leaves on items that it was not fitted on is small, but where a site has next to
    no noise a probe finds it.
    `rank` directions were removed, and `moved` is the share of the site's variance in them.
    """
    fitted_on = task.sample(spec.probe_items, seed=spec.seed, split="train")
    items = task.sample(spec.erasure_items, seed=spec.seed, split="test")
    options = {"batch_size": spec.batch_size, "max_layers": spec.max_layers}
    streams = read_streams(model, fitted_on, task, **options)
    tested = read_streams(model, items, task, **options)
    erasures = list(fit_erasures(streams, fitted_on, task, spec=spec))
    logits = run_erasures(model, items, task, erasures, batch_size=spec.batch_size)
    base = _decision(tested.action_logits, items, task)
    readable = _Readability(items, task, spec)
    unerased: dict[tuple[int, str], Estimate] = {}
    rows = []
    with progress_bar("erasure", len(erasures), unit="site") as advance:
        for erasure, own in zip(erasures, logits, strict=True):
            x = tested.residual[erasure.layer].double()
            erased = erasure.eraser(x)
            key = {name: getattr(erasure, name) for name in ("layer", "latent", "kind", "draw")}
            shared = {"rank": erasure.eraser.rank, "moved": _share_of_variance(erased - x, x)}
            found = _decision(own, items, task)
            losses = {
                measure: (base[measure], found[measure], mean_estimate(base[measure] - values))
                for measure, values in found.items()
            }
            for measure, (before, after, loss) in losses.items():
                value, start = float(after.mean()), float(before.mean())
                rows.append({**key, **_row(measure, value, start, loss, items), **shared})
            if erasure.draw == 0:
                site = erasure.layer, erasure.latent
                if site not in unerased:
                    unerased[site] = readable(x, erasure.latent)
                after = readable(erased, erasure.latent)
                loss = unerased[site] - after
                row = _row("auroc", after.value, unerased[site].value, loss, items)
                rows.append({**key, **row, **shared})
            advance(1)
    needed = {latent.name: latent.needed for latent in task.latents}
    table = pd.DataFrame(rows)
    table.insert(2, "needed", [needed[name] for name in table["latent"]])
    return table


def fit_erasures(
    streams: DecisionStreams, items: Items, task: Task, *, spec: AnalysisSpec
) -> Iterator[Erasure]:
    """For every layer but the embedding and every latent: its own, the control's, random ones."""
    for layer, x in streams.residual.items():
        if layer == 0:
            continue
        for name, latent in items.latents.items():
            codes = encode(name, latent, len(items))[1]
            generator = derive_generator(spec.seed, "control task", name)
            control = control_labels(task.control_types(items), codes, generator)
            own = fit_eraser(x, _one_hot(codes))
            yield Erasure(layer, name, "latent", 0, own)
            yield Erasure(layer, name, "control", 0, fit_eraser(x, _one_hot(control)))
            for draw in range(N_RANDOM):
                generator = derive_generator(spec.seed, "random erasure", name, layer, draw)
                eraser = random_eraser(x, own.rank, generator=generator)
                yield Erasure(layer, name, "random", draw, eraser)


@torch.no_grad()
def run_erasures(
    model: HookedModel,
    items: Items,
    task: Task,
    erasures: list[Erasure],
    *,
    batch_size: int = 512,
) -> list[Float[Tensor, "items actions"]]:
    """Action logits under each erasure at the decision position, any recorded shift included.

    Earlier positions and layers stay as they are, so only the last position of the later layers is
    run again, for all erasures of a layer side by side.
    """
    actions = torch.tensor(task.actions)
    shift = action_shift(model, len(actions))
    by_layer: dict[int, list[int]] = {}
    for index, erasure in enumerate(erasures):
        by_layer.setdefault(erasure.layer, []).append(index)
    logits: list[list[Tensor]] = [[] for _ in erasures]
    n_at_once = max(1, batch_size // max(len(found) for found in by_layer.values()))
    with progress_bar("erased runs", len(items), unit="item") as advance:
        for tokens in items.tokens.split(n_at_once):
            run = record(model, tokens.to(model.device))
            suffix = run.suffix(tokens.shape[1] - 1)
            for layer, found in by_layer.items():
                site = run.resid[layer][:, -1].double()
                x = torch.stack([erasures[i].eraser(site) for i in found]).to(model.dtype)
                rows = repeat(torch.arange(len(tokens)), "b -> (e b)", e=len(found))
                x = rearrange(x, "e b d -> (e b) 1 d")
                for block in range(layer, model.n_layers):
                    x = suffix.block(block, x, rows.to(model.device))
                own = model.unembed(model.final_norm(x[:, 0]), actions).double().cpu()
                for i, part in zip(found, own.split(len(tokens)), strict=True):
                    logits[i].append(part + shift)
            advance(len(tokens))
    return [torch.cat(parts) for parts in logits]


class _Readability:
    """AUROC of fresh probes of the test items' latents, on one set of folds."""

    def __init__(self, items: Items, task: Task, spec: AnalysisSpec) -> None:
        self.config = ProbeConfig(n_folds=spec.probe_folds, seed=spec.seed)
        self.groups = items.groups
        encoded = {name: encode(name, z, len(items)) for name, z in items.latents.items()}
        self.codes = {name: codes for name, (_, codes) in encoded.items()}
        self.n_values = {name: len(values) for name, (values, _) in encoded.items()}
        labels = torch.stack(list(self.codes.values()), 1)
        self.folds = grouped_folds(
            items.groups, labels, spec.probe_folds, spec.seed, names=list(self.codes)
        )

    def __call__(self, x: Float[Tensor, "items d_model"], latent: str) -> Estimate:
        codes = self.codes[latent]
        fit = cross_fit(x, codes[:, None], self.n_values[latent], self.folds, self.config)
        return estimate(fit.log_probabilities[:, 0], codes, self.folds, groups=self.groups)["auroc"]


def _decision(
    action_logits: Float[Tensor, "items actions"], items: Items, task: Task
) -> Mapping[str, Float[Tensor, " items"]]:
    """Measures of a decision, per item."""
    target = items.target
    chosen = items.likeliest_label[:, None]
    others = action_logits.scatter(1, chosen, -torch.inf).logsumexp(1)
    return {
        "log_odds": action_logits.gather(1, chosen)[:, 0] - others,
        "accuracy": (action_logits.argmax(1) == chosen[:, 0]).double(),
        "utility": decisions.expected_utility(action_logits, target, task.utility),
        "log_score": decisions.log_score(action_logits, target, task.utility),
    }


def _row(
    measure: str, value: float, base: float, loss: Estimate, items: Items
) -> dict[str, str | float]:
    low, high = loss.interval(items.groups)
    numbers = {"value": value, "base": base, "loss": loss.value, "low": low, "high": high}
    return {"measure": measure, **numbers}


def _share_of_variance(moved: Float[Tensor, "items d"], x: Float[Tensor, "items d"]) -> float:
    return float(moved.var(0).sum() / x.var(0).sum())


def _one_hot(codes: Int[Tensor, " items"]) -> Float[Tensor, "items values"]:
    return torch.nn.functional.one_hot(codes).double()


def pair_tables(pair: Pair) -> dict[str, pd.DataFrame]:
    """Table `erasure` of every arm."""
    tables = {
        arm: measure_erasure(model, pair.task, spec=pair.spec) for arm, model in pair.models.items()
    }
    return {"erasure": pair.join(tables)}


if __name__ == "__main__":
    run_script(pair_tables, figure="erasure", description=__doc__ or "")
