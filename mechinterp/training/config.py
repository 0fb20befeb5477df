"""What to train and how, as plain values."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from mechinterp.errors import TrainingError


@dataclass(frozen=True)
class ModelConfig:
    """Shape of a model organism: a small decoder-only Llama with untied embeddings.

    `initializer_range` is the standard deviation of every initial weight matrix. At d_model = 48
    the usual 0.02 is so near zero that learning to bind takes several times as many steps.
    """

    n_layers: int = 3
    d_model: int = 48
    n_heads: int = 4
    n_kv_heads: int = 4
    d_mlp: int = 96
    n_positions: int = 64
    initializer_range: float = 0.1

    def __post_init__(self) -> None:
        _require_positive(self, *(f.name for f in fields(self)))
        if self.d_model % self.n_heads or self.n_heads % self.n_kv_heads:
            raise TrainingError(
                f"model: d_model ({self.d_model}) must be a multiple of n_heads ({self.n_heads}), "
                f"and n_heads a multiple of n_kv_heads ({self.n_kv_heads})"
            )
        if (self.d_model // self.n_heads) % 2:
            raise TrainingError(
                f"model: d_model / n_heads must be even for rotary positions, got "
                f"{self.d_model // self.n_heads}"
            )


@dataclass(frozen=True)
class TrainingConfig:
    """AdamW with linear warm-up and a cosine to `final_learning_rate` times the peak.

    `checkpoint_steps` defaults to `log_spaced_steps(n_steps, 7)`; 0 and `n_steps` are always among
    them. `n_threads` stands here because it changes the order of floating-point sums, and so the
    last bits of the weights.
    """

    n_steps: int = 400
    batch_size: int = 64
    learning_rate: float = 3e-3
    warmup_steps: int = 50
    final_learning_rate: float = 0.1
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.98)
    gradient_clip: float = 1.0
    checkpoint_steps: Sequence[int] | None = None
    n_threads: int = 1

    def __post_init__(self) -> None:
        _require_positive(
            self, "n_steps", "batch_size", "learning_rate", "gradient_clip", "n_threads"
        )
        if self.weight_decay < 0 or self.warmup_steps < 0:
            raise TrainingError("training: weight_decay and warmup_steps must not be negative")
        if not 0 <= self.final_learning_rate <= 1:
            raise TrainingError(
                f"training: final_learning_rate is a fraction of the peak, got "
                f"{self.final_learning_rate}"
            )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise TrainingError(f"training: betas must be two numbers in [0, 1), got {self.betas}")
        if self.steps[0] < 0 or self.steps[-1] > self.n_steps:
            raise TrainingError(
                f"training: checkpoint_steps must lie in 0..n_steps = {self.n_steps}, got "
                f"{self.steps}"
            )
        if self.checkpoint_steps is not None:
            object.__setattr__(self, "checkpoint_steps", self.steps)
        object.__setattr__(self, "betas", tuple(self.betas))

    def as_inputs(self) -> dict[str, Any]:
        """Its fields as a JSON file has them."""
        return {**asdict(self), "betas": list(self.betas), "checkpoint_steps": list(self.steps)}

    @property
    def steps(self) -> tuple[int, ...]:
        """The steps at which checkpoints are left, 0 and the last among them."""
        chosen = self.checkpoint_steps
        if chosen is None:
            chosen = log_spaced_steps(self.n_steps, 7)
        return tuple(sorted({0, *(int(step) for step in chosen), self.n_steps}))

    def learning_rate_at(self, step: int) -> float:
        """The rate of the update that makes `step` + 1 out of `step`."""
        warmup = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        cosine = 0.5 * (1 + math.cos(math.pi * step / self.n_steps))
        decay = self.final_learning_rate + (1 - self.final_learning_rate) * cosine
        return self.learning_rate * warmup * decay


def log_spaced_steps(n_steps: int, n_checkpoints: int) -> tuple[int, ...]:
    """0, then `n_checkpoints` steps in equal ratios from about n_steps / 64 to `n_steps`.

    Fewer where rounding makes them coincide.
    """
    if n_steps < 1 or n_checkpoints < 1:
        raise TrainingError(
            f"training: log-spaced checkpoints need n_steps >= 1 and n_checkpoints >= 1, got "
            f"{n_steps} and {n_checkpoints}"
        )
    n_ratios = max(1, n_checkpoints - 1)
    spaced = (round(n_steps * 64 ** (-k / n_ratios)) for k in range(n_checkpoints))
    return tuple(sorted({0, *(max(1, step) for step in spaced)}))


def _require_positive(config: ModelConfig | TrainingConfig, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if not value > 0:
            raise TrainingError(f"{type(config).__name__}: {name} must be positive, got {value}")
