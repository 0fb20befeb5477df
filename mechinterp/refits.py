"""The last layer refitted, everything before it left alone: the cheapest repairs of a decision.

    retrain_classifier   cRT: a new classifier on the old features (Kang et al. 2020)
    scale_classes        LWS: one learnt scale per class (Kang et al. 2020, arXiv:1910.09217)
    normalise_rows       tau-norm: rows divided by their norm to the power tau (Kang et al. 2020)
    refit_held_out       DFR: refits on items that training has not seen, averaged over balanced
                         subsets (Kirichenko et al. 2022, arXiv:2204.02937)

All maximise the log score at a utility, on residuals at the decision after the final norm. `fold`
puts a readout into a checkpoint's unembedding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

from mechinterp.decisions import Target, Utility, action_weights, log_score
from mechinterp.errors import AnalysisError
from mechinterp.folding import constant_direction, untied_copy
from probes.logistic import fit_softmax


@dataclass(frozen=True)
class ActionReadout:
    """Action logits = normed @ weight.T + bias."""

    weight: Float[Tensor, "actions d_model"]
    bias: Float[Tensor, " actions"]

    def __call__(self, normed: Float[Tensor, "items d_model"]) -> Float[Tensor, "items actions"]:
        return normed.to(self.weight) @ self.weight.T + self.bias


def retrain_classifier(
    normed: Float[Tensor, "items d_model"],
    target: Target,
    *,
    utility: Utility,
    ridge: float = 1e-5,
) -> ActionReadout:
    """The readout with the best log score at `utility`, shrunk by `ridge` per unit of weight.

    `target` are labels, or a posterior. With a diagonal utility its weights do what cRT does by
    class-balanced sampling.
    """
    targets = action_weights(target, utility)
    fit = fit_softmax(normed, targets, l2=ridge * float(targets.sum()))
    return ActionReadout(fit.coef, fit.intercept)


def retrain_exactly(
    normed: Float[Tensor, "items d_model"],
    target: Target,
    *,
    utility: Utility,
    ridge: float = 1e-5,
) -> ActionReadout:
    """As `retrain_classifier`, but without a bias: `fold` then loses nothing.

    A constant direction stands in for a bias only as far as the network has one, which damage may
    take away.
    """
    x = normed.double()
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    kept = values > 1e-9 * values.max()
    to_white = vectors[:, kept] / values[kept].sqrt()
    white = x @ to_white
    shares = action_weights(target, utility).double()
    shares = shares / shares.sum(1).mean()
    weight = white.new_zeros(shares.shape[1], white.shape[1]).requires_grad_()
    search = torch.optim.LBFGS([weight], max_iter=500, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        fit = -(shares * (white @ weight.T).log_softmax(1)).sum(1).mean()
        value = fit + ridge / 2 * weight.pow(2).sum()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)  # type: ignore[arg-type]
    rows = (weight.detach() @ to_white.T).to(normed)
    return ActionReadout(rows, rows.new_zeros(len(rows)))


def scale_classes(
    readout: ActionReadout,
    normed: Float[Tensor, "items d_model"],
    labels: Int[Tensor, " items"],
    *,
    utility: Utility,
) -> ActionReadout:
    """`readout` with each action's logit multiplied by the scale that serves `utility` best."""
    logits = readout(normed).double()
    scale = torch.ones(logits.shape[1], dtype=torch.float64, requires_grad=True)
    search = torch.optim.LBFGS([scale], max_iter=200, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        search.zero_grad()
        value = -log_score(scale * logits, labels, utility).mean()
        value.backward()
        return value

    with torch.enable_grad():
        search.step(loss)  # type: ignore[arg-type]
    best = scale.detach().to(readout.weight)
    return ActionReadout(best[:, None] * readout.weight, best * readout.bias)


def normalise_rows(readout: ActionReadout, *, tau: float = 1.0) -> ActionReadout:
    """`readout` with every row divided by its norm to the power `tau`: 0 changes nothing.

    As in the paper the bias is dropped: an unembedding has none.
    """
    norms = readout.weight.norm(dim=1, keepdim=True)
    if not (norms > 0).all():
        raise AnalysisError("tau-norm: an action's row of the unembedding is zero")
    return ActionReadout(readout.weight / norms**tau, torch.zeros_like(readout.bias))


def refit_held_out(
    normed: Float[Tensor, "items d_model"],
    labels: Int[Tensor, " items"],
    *,
    utility: Utility,
    generator: torch.Generator,
    ridge: float = 1e-5,
    n_fits: int = 10,
) -> ActionReadout:
    """The mean of `n_fits` readouts, each fitted on another subset with equally many of each label.

    `normed` are of items that training has not seen. The utility's weights enter the loss.
    """
    counts = torch.bincount(labels, minlength=len(action_weights(labels[:1], utility)[0]))
    if not (counts > 0).all():
        raise AnalysisError(f"DFR: label {int(counts.argmin())} has no items; give more items")
    fits = []
    for _ in range(n_fits):
        order = torch.randperm(len(labels), generator=generator)
        subset = torch.cat(
            [order[labels[order] == y][: int(counts.min())] for y in range(len(counts))]
        )
        fits.append(
            retrain_classifier(normed[subset], labels[subset], utility=utility, ridge=ridge)
        )
    return ActionReadout(
        torch.stack([fit.weight for fit in fits]).mean(0),
        torch.stack([fit.bias for fit in fits]).mean(0),
    )


def own_readout(model: PreTrainedModel, actions: Sequence[int]) -> ActionReadout:
    """The rows of a Hugging Face model's unembedding for `actions`."""
    head: Any = model.get_output_embeddings()
    weight = head.weight.detach()[list(actions)]
    bias = weight.new_zeros(len(weight)) if head.bias is None else head.bias.detach()[list(actions)]
    return ActionReadout(weight, bias)


def fold(
    model: PreTrainedModel,
    actions: Sequence[int],
    readout: ActionReadout,
    *,
    normed: Float[Tensor, "items d_model"],
) -> LlamaForCausalLM:
    """A copy of `model` whose unembedding of `actions` is `readout`.

    A bias, which Llama's unembedding lacks, goes in as a direction that is 1 on all of `normed`.
    """
    refitted = untied_copy(model)
    one = constant_direction(normed)
    weight = refitted.lm_head.weight
    with torch.no_grad():
        rows = readout.weight.to(weight) + torch.outer(readout.bias.to(weight), one.to(weight))
        weight[list(actions)] = rows
    return refitted
