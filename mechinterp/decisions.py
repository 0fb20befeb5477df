"""From a posterior to an action to its value, in two currencies: utility and log score.

A decision problem is a utility matrix u[action, label]. A network reports p, the softmax over the
logits of its *actions*. Two values of that report, higher is better in both:

    utility    u(a, y) of the action a = argmax p
    log score  S(p, y) = sum_a v(a, y) log p_a,   v(a, y) = u(a, y) - min_a u(a, y) >= 0

Minus the log score is the utility-weighted cross-entropy: with u diagonal it is -w_y log p_y with
class weights w, with u the identity it is the cross-entropy. Under a posterior q its expectation is
W(q) [-H(p_u) - KL(p_u || p)], W(q) = sum_a sum_y q_y v(a, y), and the best report is
p_u,a = sum_y q_y v(a, y) / W(q), whose argmax is the Bayes action of u for any matrix
(its diagonal case reconstructs "utility-weighted prediction" of Autor et al., arXiv:2511.07699).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError, TaskError

Utility = Sequence[Sequence[float]] | Float[Tensor, "actions labels"]
Target = Int[Tensor, " items"] | Float[Tensor, "items labels"]


@dataclass(frozen=True)
class Value:
    """Mean value of a set of reports: utility of the chosen actions, and log score."""

    utility: float
    log_score: float


@dataclass(frozen=True)
class BestConstant:
    """The best that can be done without looking at the prompt, in each currency."""

    action: int
    report: Float[Tensor, " actions"]
    value: Value


def diagonal_utility(weights: Sequence[float]) -> tuple[tuple[float, ...], ...]:
    """The utility with class weights on its diagonal: (1, 1) is symmetric, (0.2, 1.8) favours 1."""
    return tuple(
        tuple(float(weight) if action == label else 0.0 for label in range(len(weights)))
        for action, weight in enumerate(weights)
    )


def relative_utility(utility: Utility) -> Float[Tensor, "actions labels"]:
    """v(a, y) = u(a, y) - min_a u(a, y), in float64: non-negative, the same best actions."""
    u = torch.as_tensor(utility, dtype=torch.float64)
    if u.ndim != 2 or not u.isfinite().all():
        raise TaskError(
            f"utility: expected finite numbers u[action][label], got shape {tuple(u.shape)}"
        )
    return u - u.amin(dim=0)


def action_weights(target: Target, utility: Utility) -> Float[Tensor, "items actions"]:
    """sum_y q_y v(a, y) for each item and action, q the posterior or, for labels, certainty."""
    v = relative_utility(utility).to(target.device)
    n_labels = v.shape[1]
    if target.is_floating_point():
        if target.ndim != 2 or target.shape[1] != n_labels:
            raise TaskError(
                f"utility: has {n_labels} labels, but the posterior has shape {tuple(target.shape)}"
            )
        return target.to(v.dtype) @ v.T
    if len(target) and (int(target.min()) < 0 or int(target.max()) >= n_labels):
        raise TaskError(f"utility: has {n_labels} labels, but labels go up to {int(target.max())}")
    return v.T[target]


def log_score(
    action_logits: Float[Tensor, "items actions"], target: Target, utility: Utility
) -> Float[Tensor, " items"]:
    """sum_a v(a, y) log p_a per item; with a posterior as target, its expectation over the label.

    The expectation is the Rao-Blackwell version of the score: same mean, no label noise.
    """
    _check_actions(action_logits, utility)
    weights = action_weights(target, utility).to(action_logits.dtype)
    log_p = action_logits.log_softmax(dim=-1)
    # A weight of zero makes log p_a irrelevant, even where p_a = 0.
    return torch.where(weights > 0, weights * log_p, 0.0).sum(dim=-1)


def expected_utility(
    action_logits: Float[Tensor, "items actions"], target: Target, utility: Utility
) -> Float[Tensor, " items"]:
    """u(a, y) per item of the action a with the largest logit (the first of equals).

    With a posterior as target, its expectation over the label.
    """
    _check_actions(action_logits, utility)
    u = torch.as_tensor(utility, dtype=torch.float64, device=target.device)
    chosen = u[action_logits.argmax(dim=-1).to(target.device)]
    if target.is_floating_point():
        return (chosen * target).sum(dim=-1)
    return chosen.gather(1, target[:, None]).squeeze(1)


def value(action_logits: Float[Tensor, "items actions"], target: Target, utility: Utility) -> Value:
    """Mean over items of both currencies."""
    return Value(
        utility=float(expected_utility(action_logits, target, utility).mean()),
        log_score=float(log_score(action_logits.double(), target, utility).mean()),
    )


def bayes_logits(
    posterior: Float[Tensor, "items labels"], utility: Utility
) -> Float[Tensor, "items actions"]:
    """Log of the optimal report p_a = sum_y q_y v(a, y) / W(q), in float64.

    Its argmax maximises expected utility, because sum_y q_y v(a, y) is the expected utility of a
    minus what does not depend on a. Where every action is worth the same (W = 0) it is uniform.
    """
    weights = action_weights(posterior, utility)
    total = weights.sum(dim=-1, keepdim=True)
    report = torch.where(total > 0, weights / total, 1.0 / weights.shape[1])
    return report.log()


def oracle_value(posterior: Float[Tensor, "items labels"], utility: Utility) -> Value:
    """Mean value of the optimal report under the posterior itself: nothing does better."""
    return value(bayes_logits(posterior, utility), posterior, utility)


def best_constant(target: Target, utility: Utility) -> BestConstant:
    """The best constant action (utility) and the best constant report (log score) on these items.

    They are the Bayes action and report for the items' mean label distribution.
    """
    n_labels = relative_utility(utility).shape[1]
    if target.is_floating_point():
        base_rates = target.double().mean(dim=0, keepdim=True)
    else:
        counts = torch.bincount(target, minlength=n_labels)
        base_rates = counts[None].double() / len(target)
    logits = bayes_logits(base_rates, utility)
    return BestConstant(
        action=int(logits.argmax()),
        report=logits.exp().squeeze(0),
        value=value(logits, base_rates, utility),
    )


def ex_post_shift(utility: Utility) -> Float[Tensor, " actions"]:
    """What to add to the action logits of a symmetrically trained network to serve `utility`.

    log v(a, a), centred to mean zero over the actions: with class weights w the optimum of the
    weighted loss is p_u,k = w_k q_k / sum_j w_j q_j, a constant shift of the log posterior. For two
    actions the log-odds move by log(w_1 / w_0).

    Raises AnalysisError where v is not diagonal (the optimal report is then no shift of the log
    posterior) or has a zero on its diagonal.
    """
    v = relative_utility(utility)
    if v.shape[0] != v.shape[1] or (v - v.diag().diag()).any():
        raise AnalysisError(
            "utility: no constant shift of the logits serves a utility that is not diagonal after "
            "taking off each column's minimum; use bayes_logits on the network's posterior"
        )
    if (v.diag() <= 0).any():
        raise AnalysisError(
            "utility: a label for which all actions are worth the same has no finite shift; "
            "give each label's own action a strictly larger utility"
        )
    shift = v.diag().log()
    return shift - shift.mean()


def _check_actions(action_logits: Tensor, utility: Utility) -> None:
    if action_logits.ndim != 2 or action_logits.shape[1] != len(utility):
        raise TaskError(
            f"utility: has {len(utility)} actions, but the action logits have shape "
            f"{tuple(action_logits.shape)}; expected [items, {len(utility)}]"
        )
