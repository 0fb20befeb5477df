"""Counterfactual prompts as every patching tool is given them, checked in one place."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp.errors import AnalysisError

DIRECTIONS = ("denoising", "noising")
Tokens = Int[Tensor, "items positions"]


def check_pairs(clean: Tokens, corrupt: Tokens) -> None:
    """Raise AnalysisError unless row i of each can be one pair."""
    if corrupt.shape != clean.shape or corrupt.ndim != 2 or not corrupt.numel():
        raise AnalysisError(
            f"corrupt and clean: expected two [items, positions] of equal shape, "
            f"got {tuple(corrupt.shape)} and {tuple(clean.shape)}"
        )


def base_and_source(clean: Tokens, corrupt: Tokens, direction: str) -> tuple[Tokens, Tokens]:
    """The prompts that are patched, and those that the patches come from.

    Raises AnalysisError for an unknown direction.
    """
    if direction not in DIRECTIONS:
        raise AnalysisError(f"direction: expected 'denoising' or 'noising', got {direction!r}")
    return (corrupt, clean) if direction == "denoising" else (clean, corrupt)


def check_attention_mask(mask: Tokens | None, tokens: Tokens) -> Tokens | None:
    """The mask on the tokens' device; raises AnalysisError where it does not fit them."""
    if mask is None:
        return None
    if mask.shape != tokens.shape:
        raise AnalysisError(
            f"attention_mask: expected shape {tuple(tokens.shape)}, got {tuple(mask.shape)}"
        )
    return mask.to(tokens.device)


def decision_positions(
    decision: int | Int[Tensor, " items"], tokens: Tokens
) -> Int[Tensor, " items"]:
    """Every item's decision, counted from the first token, on the tokens' device.

    Raises AnalysisError for a position outside the prompts.
    """
    n_items, n_positions = tokens.shape
    at = torch.full((n_items,), decision) if isinstance(decision, int) else decision
    at = torch.where(at < 0, at + n_positions, at)
    if at.shape != (n_items,) or not bool(((at >= 0) & (at < n_positions)).all()):
        raise AnalysisError(
            f"decision: expected one position of 0 .. {n_positions - 1} per item, "
            f"got shape {tuple(at.shape)}"
        )
    return at.to(tokens.device)
