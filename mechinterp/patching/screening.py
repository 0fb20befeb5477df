"""Screening: attribution over the whole map, exact patches of what it finds and of a sample beside.

Attribution patching is cheap and can be wrong. So its top cells are patched exactly, and so is a
random sample of the cells that it passed over: the first gives effects to report, the second says
how many the screen missed, with an exact binomial interval (after Kramar et al. 2024, who bound
what their screen misses by sampling, too).
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Int
from torch import Tensor

from mechinterp.hooked import HookedModel
from mechinterp.patching.attribution import attribute
from mechinterp.patching.exact_cells import Screening, patch_some
from mechinterp.patching.metrics import Metric
from mechinterp.patching.trust import check_count
from mechinterp.randomness import derive_generator


def screen(
    model: HookedModel,
    *,
    clean: Int[Tensor, "items positions"],
    corrupt: Int[Tensor, "items positions"],
    metric: Metric,
    grain: str,
    top_k: int = 20,
    n_sampled: int = 40,
    by_position: bool = False,
    direction: str = "denoising",
    source: HookedModel | None = None,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: float | None = None,
    level: float = 0.95,
    seed: int = 0,
    **options: Any,
) -> Screening:
    """Attribution of every cell, then exact patches of the `top_k` and of `n_sampled` others.

    Cells whose activations are the same in both runs have no effect for certain: they are neither
    selected nor sampled. Arguments as of `mechinterp.patching.attribution.attribute_grains`, whose
    remaining `options` say how to estimate; `seed` draws the sample.

    Raises:
        AnalysisError: the arguments do not fit together.
    """
    check_count("top_k", top_k, least=1)
    check_count("n_sampled", n_sampled)
    prompts = {
        "clean": clean,
        "corrupt": corrupt,
        "metric": metric,
        "source": source,
        "attention_mask": attention_mask,
        "decision": decision,
        "memory_mb": memory_mb,
    }
    found = attribute(
        model,
        grain=grain,
        by_position=by_position,
        direction=direction,
        n_exact=0,
        **prompts,
        **options,
    )
    return patch_some(
        model,
        found,
        top_k=top_k,
        n_sampled=n_sampled,
        generator=derive_generator(seed, "screening", grain),
        level=level,
        **prompts,
    )
