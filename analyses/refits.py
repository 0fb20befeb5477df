"""The last layer of a checkpoint refitted to a utility, on items that nothing is measured on."""

from __future__ import annotations

from analyses.streams import read_streams
from mechinterp import refits
from mechinterp.arms import Refit
from mechinterp.decisions import Utility
from mechinterp.hooked import HookedModel
from mechinterp.randomness import derive_generator
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task


def refit_readout(
    model: HookedModel, task: Task, refit: Refit, *, utility: Utility, spec: AnalysisSpec
) -> refits.ActionReadout:
    """cRT and LWS are fitted on training items, DFR on validation items, tau-norm on none.

    `spec.refit_items` of them, or all that the split holds.
    """
    own = refits.own_readout(model.model, task.actions)
    if refit == "tau_norm":
        return refits.normalise_rows(own)
    split = "validation" if refit == "dfr" else "train"
    items = task.sample(spec.refit_items, seed=spec.seed, split=split)
    streams = read_streams(
        model, items, task, batch_size=spec.batch_size, max_layers=spec.max_layers
    )
    normed = streams.normed[model.n_layers]
    if refit == "crt":
        return refits.retrain_classifier(normed, items.labels, utility=utility)
    if refit == "lws":
        return refits.scale_classes(own, normed, items.labels, utility=utility)
    generator = derive_generator(spec.seed, "DFR")
    return refits.refit_held_out(normed, items.labels, utility=utility, generator=generator)
