"""Screening of edges: attribution of all, exact patches of the top ones and of a sample beside."""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from mechinterp.hooked import HookedModel
from mechinterp.patching.edge_attribution import attribute_edges
from mechinterp.patching.exact_edges import EdgeScreening, patch_some_edges
from mechinterp.patching.metrics import Metric
from mechinterp.patching.trust import check_count
from mechinterp.randomness import derive_generator


def screen_edges(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    method: str = "EAP-IG-inputs",
    top_k: int = 20,
    n_sampled: int = 40,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> EdgeScreening:
    """Scores of every edge, then exact patches of the `top_k` edges and of `n_sampled` others.

    Edges whose score is exactly 0 (their writer is the same in both runs) are neither selected nor
    sampled. Arguments as of `mechinterp.patching.edge_attribution.attribute_edges`, whose remaining
    `options` say how to estimate; `seed` draws the sample, `level` is that of the interval of the
    miss rate.

    Raises:
        AnalysisError: the arguments do not fit together.
    """
    check_count("top_k", top_k, least=1)
    check_count("n_sampled", n_sampled)
    prompts = {
        "clean": clean,
        "corrupt": corrupt,
        "metric": metric,
        "attention_mask": attention_mask,
        "decision": decision,
        "memory_mb": memory_mb,
    }
    found = attribute_edges(model, method=method, n_exact=0, **prompts, **options)
    return patch_some_edges(
        model,
        found,
        top_k=top_k,
        n_sampled=n_sampled,
        generator=derive_generator(seed, "screening", "edges"),
        level=level,
        **prompts,
    )
