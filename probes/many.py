"""Every layer, every target, every strength and every fold in one call."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.progress import progress_bar
from probes.classifier import check_device
from probes.folds import grouped_folds
from probes.grid import fit_grid

Strengths = tuple[float, ...]
ClassWeight = Mapping[int, float] | str | None


@dataclass(frozen=True)
class ManyFits:
    """Logistic probes; fold f's are fitted without the items of fold f and scored on them.

    `scores` is the accuracy and `log_loss` the mean in nats. `gradient_norm` is the certificate:
    the largest entry of the objective's gradient per unit of weight. Targets of two classes have
    one row of coefficients, as in scikit-learn; rows that a target does not have are NaN.
    """

    scores: Float[Tensor, "layer target strength fold"]
    log_loss: Float[Tensor, "layer target strength fold"]
    gradient_norm: Float[Tensor, "layer target strength fold"]
    coef: Float[Tensor, "layer target strength fold row feature"] | None
    intercept: Float[Tensor, "layer target strength fold row"] | None
    classes: tuple[tuple[int, ...], ...]
    strengths: Strengths
    folds: Int[Tensor, " item"]


@dataclass(frozen=True)
class _Plan:
    """What all layers share."""

    codes: Int[Tensor, "item target"]
    classes: tuple[tuple[int, ...], ...]
    held_out: Float[Tensor, "fold item"]  # the items' weights in the scores
    weights: Float[Tensor, "fold item target"]
    l2: Float[Tensor, "fold strength target"]
    options: dict


def fit_many(
    X: Float[Tensor, "layer item feature"] | Iterable[Float[Tensor, "item feature"]],
    Y: Int[Tensor, "target item"],
    *,
    strengths: Iterable[float] = (1e-1, 1.0, 1e1, 1e2, 1e3),
    folds: int | Int[Tensor, " item"] = 5,
    weights: Float[Tensor, " item"] | None = None,
    class_weight: ClassWeight = None,
    standardise: bool = False,
    dtype: str = "float64",
    device: str = "cpu",
    tol: float | None = None,
    max_iter: int = 1000,
    keep_coef: bool = True,
    seed: int = 0,
) -> ManyFits:
    """Cross-validated logistic probes of every target at every layer and strength.

    Each fit is `LogisticProbe(C=1 / strength)` on the other folds; all of a layer's are solved
    together. `X` may be an iterable that yields one layer at a time, such as memory maps; one layer
    is in memory at once. `folds` are each item's fold, for example of `probes.folds.grouped_folds`,
    or a number of folds, stratified by all targets and shuffled by `seed`. `weights` and
    `class_weight` ("balanced" or by class) weigh the loss, `weights` also the scores. With
    `standardise` each feature is divided by its deviation over the items fitted on, as by a
    `StandardScaler` in a pipeline; otherwise features are used as they are. Float32 takes half the
    time of float64. `tol` bounds `gradient_norm`; by default 1e-6, in float32 1e-5.

    Raises AnalysisError for invalid input and where a fold's fit lacks a class, ConvergenceError
    where `tol` is not reached in `max_iter` iterations.
    """
    strengths = tuple(float(strength) for strength in strengths)
    torch_device, Y = check_device(device), torch.as_tensor(Y)
    if Y.ndim != 2 or Y.is_floating_point():
        raise AnalysisError(f"Y: expected whole numbers [target, item], got {list(Y.shape)}")
    if not strengths or min(strengths) <= 0 or not np.isfinite(strengths).all():
        raise AnalysisError(f"strengths: must be positive numbers, got {strengths}")
    if dtype not in ("float32", "float64"):
        raise AnalysisError(f'dtype: must be "float32" or "float64", got {dtype!r}')
    working = {"dtype": getattr(torch, dtype), "device": torch_device}
    values = [row.unique(return_inverse=True) for row in Y.long().cpu()]
    classes = tuple(tuple(found.tolist()) for found, _ in values)
    codes = torch.stack([code for _, code in values], 1)
    item_weights = torch.ones(len(codes)) if weights is None else torch.as_tensor(weights).cpu()
    if item_weights.shape != (len(codes),) or not (item_weights >= 0).all():
        raise AnalysisError(f"weights: expected {len(codes)} numbers >= 0, one per item")
    if isinstance(folds, int):
        folds = grouped_folds(torch.arange(len(codes)), codes, folds, seed)
    folds = torch.as_tensor(folds).long().cpu()
    held_out = _held_out(folds, len(codes)) * item_weights.double()
    set_weights = torch.stack(
        [
            _training_weights(
                item_weights.double() - held_out, codes[:, t], t, classes[t], class_weight
            )
            for t in range(len(classes))
        ],
        2,
    )
    n_folds = len(held_out)
    tol = {"float32": 1e-5, "float64": 1e-6}[dtype] if tol is None else tol
    plan = _Plan(
        codes=codes.to(torch_device),
        classes=classes,
        held_out=held_out.to(**working),
        weights=set_weights.to(**working),
        l2=torch.tensor(strengths, **working)[:, None].expand(n_folds, -1, len(classes)),
        options={
            "standardise": standardise,
            "dtype": working["dtype"],
            "tol": tol,
            "max_iter": max_iter,
        },
    )
    layers = []
    with progress_bar("probes", operator.length_hint(X, 1), unit="layer") as advance:
        for index, layer in enumerate(X):
            x = torch.as_tensor(layer).to(**working)
            if x.ndim != 2 or len(x) != len(codes):
                raise AnalysisError(
                    f"X[{index}]: expected shape [{len(codes)}, feature], got {list(x.shape)}"
                )
            parts = _fit_layer(x, plan, index, strengths, keep_coef)
            layers.append([part.cpu() for part in parts])
            advance(1)
    if not layers:
        raise AnalysisError("X: has no layers")
    scores, log_loss, norm, coef, intercept = zip(*layers, strict=True)
    return ManyFits(
        scores=torch.stack(scores),
        log_loss=torch.stack(log_loss),
        gradient_norm=torch.stack(norm),
        coef=torch.stack(coef) if keep_coef else None,
        intercept=torch.stack(intercept) if keep_coef else None,
        classes=classes,
        strengths=strengths,
        folds=folds,
    )


def _held_out(folds: Int[Tensor, " item"], n_items: int) -> Float[Tensor, "fold item"]:
    if folds.shape != (n_items,) or folds.min() < 0:
        raise AnalysisError(
            f"folds: expected {n_items} fold numbers >= 0, one per item, got {list(folds.shape)}"
        )
    held_out = torch.nn.functional.one_hot(folds).T.double()
    if len(held_out) < 2 or not held_out.any(1).all():
        raise AnalysisError("folds: need two folds or more, numbered from 0 without a gap")
    return held_out


def _training_weights(
    weights: Float[Tensor, "fold item"],
    codes: Int[Tensor, " item"],
    target: int,
    classes: tuple[int, ...],
    class_weight: ClassWeight,
) -> Float[Tensor, "fold item"]:
    """The items' weights in each fold's fit, class weights included."""
    one_hot = torch.nn.functional.one_hot(codes, len(classes)).double()
    if len(classes) < 2:
        raise AnalysisError(f"Y[{target}]: has one class only; leave the target out")
    totals = weights @ one_hot
    if (totals == 0).any():
        fold, missing = (totals == 0).nonzero()[0].tolist()
        raise AnalysisError(
            f"Y[{target}]: the fit without fold {fold} lacks class {classes[missing]}; use folds "
            "stratified by the target (probes.folds.grouped_folds), fewer folds, or merge classes"
        )
    if class_weight is None:
        return weights
    if class_weight == "balanced":
        factors = totals.sum(1, keepdim=True) / (len(classes) * totals)
    elif isinstance(class_weight, Mapping):
        factors = torch.tensor([[class_weight.get(value, 1.0) for value in classes]]).double()
    else:
        raise AnalysisError(
            f'class_weight: must be "balanced", weights by class or None, got {class_weight!r}'
        )
    return weights * (factors @ one_hot.T)


def _fit_layer(
    x: Float[Tensor, "item feature"],
    plan: _Plan,
    layer: int,
    strengths: Strengths,
    keep_coef: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Scores, log-loss, certificate, coefficients and intercepts of one layer's fits."""
    n_classes = [len(found) for found in plan.classes]
    n_folds, n_strengths, n_targets = plan.l2.shape
    n_rows = max(1 if a == 2 else a for a in n_classes)
    shape = (n_targets, n_strengths, n_folds)
    scores, log_loss, norm = (plan.l2.new_empty(shape) for _ in range(3))
    kept = shape if keep_coef else (0, 0, 0)
    coef = x.new_full((*kept, n_rows, x.shape[1]), torch.nan)
    intercept = x.new_full((*kept, n_rows), torch.nan)
    for a in sorted(set(n_classes)):  # targets with equally many classes are fitted together
        targets = [t for t in range(n_targets) if n_classes[t] == a]

        def name(fold: int, strength: int, column: int, targets: list[int] = targets) -> str:
            return (
                f"X[{layer}], Y[{targets[column]}], strength {strengths[strength]:g}, fold {fold}"
            )

        fit = fit_grid(
            x,
            plan.codes[:, targets],
            a,
            weights=plan.weights[..., targets],
            l2=plan.l2[..., targets],
            name=name,
            **plan.options,
        )
        norm[targets] = fit.gradient_norm.permute(2, 1, 0)
        for fold, held_out in enumerate(plan.held_out):
            rows = held_out.nonzero()[:, 0]
            found = _score(
                torch.einsum("nd,skad->skna", x[rows], fit.coef[fold])
                + fit.intercept[fold][:, :, None],
                plan.codes[rows][:, targets],
                held_out[rows],
            )
            scores[targets, :, fold], log_loss[targets, :, fold] = found
        if keep_coef:
            final = fit.coef, fit.intercept
            if a == 2:
                final = [(value[:, :, :, 1] - value[:, :, :, 0])[:, :, :, None] for value in final]
            n = final[1].shape[-1]
            coef[targets, :, :, :n] = final[0].permute(2, 1, 0, 3, 4)
            intercept[targets, :, :, :n] = final[1].permute(2, 1, 0, 3)
    return scores, log_loss, norm, coef, intercept


def _score(
    logits: Float[Tensor, "strength k n a"],
    codes: Int[Tensor, "n k"],
    weights: Float[Tensor, " n"],
) -> tuple[Float[Tensor, "k strength"], Float[Tensor, "k strength"]]:
    """Accuracy and log-loss."""
    share = weights / weights.sum()
    truth = codes.T[None, :, :, None].expand(*logits.shape[:-1], 1)
    correct = (logits.argmax(-1, keepdim=True) == truth).squeeze(-1).to(share)
    log_p = logits.log_softmax(-1).gather(-1, truth).squeeze(-1)
    return (correct @ share).T, -(log_p @ share).T
