"""Checkpoints: open, verify, hash, save, compare.

A checkpoint is a Hugging Face directory: `config.json`, weights as safetensors (one file, or shards
and their index), and tokenizer files where a task needs them. Nothing else is read, pickles never.
Everything refused is a `CheckpointError` of one line that names the file, the cause and the remedy.
"""

from __future__ import annotations

from mechinterp.checkpoints.opening import Checkpoint, open_checkpoint
from mechinterp.checkpoints.pairs import CheckpointPair
from mechinterp.checkpoints.provenance import Provenance
from mechinterp.checkpoints.saving import save_checkpoint, with_action_shift
from mechinterp.checkpoints.trajectories import Trajectory, step_directory

__all__ = [
    "Checkpoint",
    "CheckpointPair",
    "Provenance",
    "Trajectory",
    "open_checkpoint",
    "save_checkpoint",
    "step_directory",
    "with_action_shift",
]
