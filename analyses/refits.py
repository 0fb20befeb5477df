"""The last layer of a checkpoint refitted to a utility, on items that nothing is measured on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

from jaxtyping import Float, Int
from torch import Tensor

from analyses.streams import read_streams
from mechinterp import refits
from mechinterp.arms import Refit
from mechinterp.decisions import Utility
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Items, Task

FITTED_ON: Mapping[Refit, str] = {"crt": "train", "lws": "train", "dfr": "validation"}


@dataclass(frozen=True)
class LastLayer:
    """A checkpoint's last layer, and the streams to refit it on: read once for every refit.

    `given` are items by split, in place of a sample of `spec.refit_items`.
    """

    model: HookedModel
    task: Task
    spec: AnalysisSpec
    given: Mapping[str, Items] = field(default_factory=dict)

    def refit(self, refit: Refit, utility: Utility) -> refits.ActionReadout:
        """cRT and LWS are fitted on training items, DFR on validation items, tau-norm on none.

        `spec.refit_items` of them, or all that the split holds.
        """
        own = refits.own_readout(self.model.model, self.task.actions)
        if refit == "tau_norm":
            return refits.normalise_rows(own)
        if refit == "dfr":
            generator = derive_generator(self.spec.seed, "DFR")
            return refits.refit_held_out(*self._held_out, utility=utility, generator=generator)
        if refit == "crt":
            return refits.retrain_classifier(*self._seen, utility=utility)
        return refits.scale_classes(own, *self._seen, utility=utility)

    @cached_property
    def _seen(self) -> tuple[Float[Tensor, "items d_model"], Int[Tensor, " items"]]:
        return self._read("train")

    @cached_property
    def _held_out(self) -> tuple[Float[Tensor, "items d_model"], Int[Tensor, " items"]]:
        return self._read("validation")

    def _read(self, split: str) -> tuple[Tensor, Tensor]:
        items = self.given.get(split)
        if items is None:
            items = self.task.sample(self.spec.refit_items, seed=self.spec.seed, split=split)
        options = {"batch_size": self.spec.batch_size, "max_layers": self.spec.max_layers}
        streams = read_streams(self.model, items, self.task, **options)
        return streams.normed[self.model.n_layers], items.labels
