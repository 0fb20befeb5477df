"""What can be read at the decision of networks with parts taken away: the decision, and latents.

Every network is read by readouts and probes of its own, cross-fitted on the same items and folds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.component_ranking import without_rounding
from analyses.streams import action_shift, read_streams
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.separability import DECISION, LATENTS
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task
from probes.crossfit import ProbeConfig, cross_fit
from probes.folds import grouped_folds
from probes.measures import Estimate, estimate, mean_estimate

STRENGTHS = (1e-1, 1e-3)  # of the probes, chosen on inner folds
TOLERANCE = 1e-3  # of their gradients, in nats per item: many networks are read
LEAST = math.log(1e-6)  # certain and wrong would cost infinitely many bits
LATENT_MEASURES = ("auroc", "information")
LOG_ODDS = -1  # in place of a layer

Left = dict[tuple[str, str], Estimate]  # (outcome, measure) -> what is left of it


@dataclass(frozen=True)
class Reading:
    """How what is left is read: the same items, folds and scale for every pruned network.

    Called with the streams at the decision by layer: (outcome, measure) -> an estimate.
    """

    model: HookedModel
    task: Task
    spec: AnalysisSpec
    items: Items
    intact: Mapping[int, Float[Tensor, "items d_model"]]
    deviation: Mapping[int, Float[Tensor, ""]]  # by layer the largest, with nothing pruned
    folds: Tensor
    shift: Tensor
    constant: Mapping[str, Tensor]
    scale: Mapping[str, float]

    @classmethod
    def of(cls, model: HookedModel, task: Task, spec: AnalysisSpec) -> Reading:
        """The reading of a network's `pruning_items` of the test split, which is run once."""
        items = task.sample(spec.pruning_items, seed=spec.seed, split="test")
        options = {"batch_size": spec.batch_size, "max_layers": spec.max_layers}
        streams = read_streams(model, items, task, **options)
        stratified = {"label": items.labels, **items.latents}
        folds = grouped_folds(
            items.groups,
            torch.stack(list(stratified.values()), 1),
            spec.ladder_folds,
            spec.seed,
            names=list(stratified),
        )
        target = items.target
        report = decisions.best_constant(target, task.utility).report.log()
        constant = _values(report.expand(len(items), -1), target, task.utility)
        if items.posterior is None:
            best = torch.nn.functional.one_hot(items.labels, len(task.actions)).double()
        else:
            best = items.posterior
        oracle = _values(decisions.bayes_logits(best, task.utility), target, task.utility)
        scale = {name: float((oracle[name] - constant[name]).mean()) for name in oracle}
        intact = {layer: x for layer, x in streams.residual.items() if layer > 0}
        varying = {layer: streams.normed[layer] for layer in intact}
        varying[LOG_ODDS] = _log_odds(streams.action_logits)
        deviation = {layer: x.std(0).max() for layer, x in varying.items()}
        shift = action_shift(model, len(task.actions))
        return cls(model, task, spec, items, intact, deviation, folds, shift, constant, scale)

    @torch.no_grad()
    def __call__(self, streams: Mapping[int, Float[Tensor, "items d_model"]]) -> Left:
        model, items, task = self.model, self.items, self.task
        normed = {layer: model.final_norm(x.to(model.device)) for layer, x in streams.items()}
        final = max(normed)
        actions = torch.tensor(task.actions)
        logits = model.unembed(normed[final], actions).double().cpu() + self.shift
        normed = {
            layer: without_rounding(x.float().cpu(), self.deviation[layer])
            for layer, x in normed.items()
        }
        refit = self._refit(normed[final], logits)
        target = items.target
        found: Left = {}
        for ending, report in (("", logits), ("_refit", refit)):
            for name, value in _values(report, target, task.utility).items():
                gain = (value - self.constant[name]) / self.scale[name]
                found[DECISION, name + ending] = mean_estimate(gain)
        for name, log_p in self._latents(normed).items():
            own = estimate(log_p, items.latents[name], self.folds, groups=items.groups)
            found |= {(f"latent {name}", measure): own[measure] for measure in LATENT_MEASURES}
        for measure in LATENT_MEASURES:
            needed = [found[f"latent {name}", measure] for name in self.needed]
            found[LATENTS, measure] = Estimate(
                sum(one.value for one in needed) / len(needed),
                torch.stack([one.influence for one in needed]).mean(0),
            )
        return found

    @property
    def needed(self) -> list[str]:
        """Names of the latents that the decision depends on."""
        return [latent.name for latent in self.task.latents if latent.needed]

    def _latents(
        self, normed: Mapping[int, Float[Tensor, "items d_model"]]
    ) -> dict[str, Float[Tensor, "items values"]]:
        """Latents of equally many values are probed together."""
        found = {}
        for n_values in {latent.n_values: None for latent in self.task.latents}:
            names = [latent.name for latent in self.task.latents if latent.n_values == n_values]
            labels = {name: self.items.latents[name] for name in names}
            found |= self._probe(normed, labels, n_values)
        return found

    def _refit(
        self, final: Float[Tensor, "items d_model"], logits: Float[Tensor, "items actions"]
    ) -> Float[Tensor, "items actions"]:
        """The best report by a probe of the label, which starts from the network's own log-odds:
        they are a feature beside those of which they are made, and so cost little penalty."""
        log_odds = without_rounding(_log_odds(logits), self.deviation[LOG_ODDS])
        x = torch.cat([final.double(), log_odds], 1)
        believed = self._probe({0: x}, {"label": self.items.labels}, len(self.task.actions))
        return decisions.bayes_logits(believed["label"].exp(), self.task.utility)

    def _probe(
        self,
        streams: Mapping[int, Float[Tensor, "items features"]],
        labels: Mapping[str, Int[Tensor, " items"]],
        n_values: int,
    ) -> dict[str, Float[Tensor, "items values"]]:
        """Out-of-fold log probabilities at the layer that is best on the other folds."""
        codes = torch.stack(list(labels.values()), 1)
        config = ProbeConfig(n_folds=self.spec.ladder_folds, strengths=STRENGTHS, tol=TOLERANCE)
        by_layer = torch.stack(
            [
                cross_fit(x, codes, n_values, self.folds, config).log_probabilities
                for x in streams.values()
            ]
        )
        right = by_layer.gather(3, codes[None, :, :, None].expand(len(by_layer), -1, -1, -1))
        in_fold = torch.nn.functional.one_hot(self.folds).bool()
        found = torch.empty_like(by_layer[0])
        for rows in in_fold.T:
            best = right[:, ~rows].sum((1, 3)).argmax(0)
            for column, layer in enumerate(best.tolist()):
                found[rows, column] = by_layer[layer, rows, column]
        return dict(zip(labels, found.clamp_min(LEAST).unbind(1), strict=True))


def _values(report: Tensor, target: decisions.Target, utility: decisions.Utility) -> dict:
    return {
        "utility": decisions.expected_utility(report, target, utility),
        "log_score": decisions.log_score(report, target, utility),
    }


def _log_odds(logits: Float[Tensor, "items actions"]) -> Float[Tensor, "items others"]:
    """Of every action but the first against it."""
    return logits[:, 1:] - logits[:, :1]
