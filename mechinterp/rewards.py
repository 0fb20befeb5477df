"""Rewards of sampled answers: being right, and saying how likely that is.

A proper score s(q, c) of a confidence q about correctness c is best in expectation at q = p, the
probability of being right; its value there is S(p). What it does to the *choice of the answer* is
another matter: with R = c + weight * s(q, c) the best report earns p + weight * S(p), and since
S'(p) = s(p, 1) - s(p, 0) that increases in p, so that the likeliest answer wins, if and only if

    weight * (s(q, 0) - s(q, 1)) <= 1 for all q.

The difference is largest at q = 0. It is 1 for the Brier and the spherical score, so weights up to
1 are safe (Damani et al. 2025, arXiv:2507.16806: any *bounded* proper score; how large the bound
may be follows from the line above). It is infinite for the log score: see `log_score`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import reduce
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp.errors import SpecError, TrainingError

Correct = Bool[Tensor, "prompts samples"] | Float[Tensor, "prompts samples"]  # 1 right, 0 wrong
Confidence = Float[Tensor, "prompts samples"]  # stated probability of being right, in [0, 1]
Reward = Float[Tensor, "prompts samples"]


def binary(correct: Correct) -> Reward:
    """1 for a right answer, 0 for a wrong one: every confidence is as good as any other."""
    return correct if correct.is_floating_point() else correct.to(torch.get_default_dtype())


def brier(correct: Correct, confidence: Confidence) -> Reward:
    """-(c - q)^2, in [-1, 0]; S(p) = -p (1 - p)."""
    _check_confidence(confidence)
    return -((correct.to(confidence) - confidence) ** 2)


def spherical(correct: Correct, confidence: Confidence) -> Reward:
    """q_c / sqrt(q^2 + (1 - q)^2), q_1 = q and q_0 = 1 - q, in [0, 1]; S(p) is that root at p."""
    _check_confidence(confidence)
    return _said_of_outcome(correct, confidence) / (confidence**2 + (1 - confidence) ** 2).sqrt()


def log_score(correct: Correct, confidence: Confidence, *, floor: float = 1e-6) -> Reward:
    """log q_c in nats, q kept within [floor, 1 - floor]; S(p) = p log p + (1 - p) log(1 - p).

    Proper, and still not to be added to a reward for right answers: p + S(p) decreases for
    p < 1 / (1 + e) = 0.269. An answer that is surely wrong, said to be so, earns 0, more than the
    -0.193 of an answer that is right half of the time. The floor bounds the score at log(floor),
    which mends nothing below floor = 0.269.
    """
    _check_confidence(confidence)
    if not 0 < floor < 0.5:
        raise SpecError(f"log_score: floor must be in (0, 0.5), got {floor}")
    return _said_of_outcome(correct, confidence.clamp(floor, 1 - floor)).log()


SCORES: dict[str, Callable[..., Reward]] = {
    "brier": brier,
    "spherical": spherical,
    "log": log_score,
}


def calibrated(
    correct: Correct, confidence: Confidence, *, score: str = "brier", weight: float = 1.0
) -> Reward:
    """c + weight * s(q, c). With the Brier score R = c - (q - c)^2, the reward of RLCR.

    RLCR: Damani et al. 2025, arXiv:2507.16806. Its code adds 1 to the Brier term and weighs both
    terms by 0.5, which changes no preference; a sample whose format is wrong earns 0 there, the
    least that a sample can earn. Here the least is -weight for the Brier score.

    Raises:
        SpecError: an unknown score, or a negative weight.
        TrainingError: a confidence outside [0, 1]. A sample without a readable confidence needs a
            reward that the caller chooses.
    """
    if score not in SCORES or weight < 0:
        raise SpecError(
            f"calibrated: score must be one of {', '.join(SCORES)} and weight not negative; "
            f"got {score!r} and {weight}"
        )
    return correct.to(confidence) + weight * SCORES[score](correct, confidence)


def group_calibration(
    correct: Correct, confidence: Confidence, *, own_share: float = 0.5, weight: float = 0.5
) -> Reward:
    """-weight * (own_share * c_i + (1 - own_share) * mean_j c_j - q_i)^2: DCPO's confidence reward.

    The defaults are those of the code of Ma et al. 2026 (arXiv:2603.09117); the paper is said to
    have the absolute error in place of the square, which is not proper: its best report is the
    target's median. The best report here is p, as for the Brier score (own_share = 1), from a
    target with less noise: its variance is p (1 - p) (own_share^2 + (1 - own_share^2) / samples).
    Meant for the confidence tokens alone (`mechinterp.advantages.routed`).
    """
    _check_confidence(confidence)
    if not 0 <= own_share <= 1 or weight < 0:
        raise SpecError(
            "group_calibration: own_share must be in [0, 1] and weight not negative; "
            f"got {own_share} and {weight}"
        )
    right = correct.to(confidence)
    group_mean = reduce(right, "prompts samples -> prompts 1", "mean")
    return -weight * (own_share * right + (1 - own_share) * group_mean - confidence) ** 2


def _said_of_outcome(correct: Correct, confidence: Confidence) -> Confidence:
    """The probability that the report gave to what came true."""
    return torch.where(correct.bool(), confidence, 1 - confidence)


def _check_confidence(confidence: Confidence) -> None:
    bad = ~((confidence >= 0) & (confidence <= 1))  # NaN is neither
    if bad.any():
        where = bad.nonzero()[0].tolist()
        raise TrainingError(
            f"confidence: expected numbers in [0, 1], got {float(confidence[tuple(where)])} at "
            f"{where} (prompt, sample); give samples without a readable one a reward of their own"
        )
