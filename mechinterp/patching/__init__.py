"""Activation patching: exact sweeps, patches across checkpoints, crossings of front and back."""

from __future__ import annotations

from mechinterp.patching.metrics import action_log_odds, log_prob, logit_difference
from mechinterp.patching.result import PatchingResult
from mechinterp.patching.sweeps import sweep, sweep_many

__all__ = [
    "PatchingResult",
    "action_log_odds",
    "log_prob",
    "logit_difference",
    "sweep",
    "sweep_many",
]
