"""Activation patching: exact sweeps, patches across checkpoints, crossings of front and back."""

from __future__ import annotations
