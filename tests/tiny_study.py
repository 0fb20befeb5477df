"""A study small enough for tests: every kind of step, on networks that learnt nothing."""

from __future__ import annotations

from pathlib import Path

import yaml

ANALYSIS = {
    "ladder_items": 240,
    "trajectory_items": 120,
    "probe_items": 120,
    "probe_folds": 3,
    "patch_pairs": 6,
    "crossing_items": 120,
    "stitch_items": 60,
    "graft_items": 60,
    "gradient_items": 64,
}
SPEC = {
    "name": "tiny",
    "seeds": 2,
    "weights": {"1.8": [0.2, 1.8]},
    "tasks": {
        "triage": {
            "task": "triage",
            "settings": {"linear": [1.5], "xor": [2.0], "n_fillers": 1},
            "init_steps": 12,
            "branch_steps": 8,
            "n_checkpoints": 2,
            "model": {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 16},
            "training": {"batch_size": 8, "warmup_steps": 2},
            "analysis": ANALYSIS,
        }
    },
    "presets": {"one": {"seeds": 1}},
}


def write_spec(directory: Path) -> Path:
    path = directory / "tiny.yaml"
    path.write_text(yaml.safe_dump(SPEC))
    return path
