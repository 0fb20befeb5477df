"""L2-regularised logistic and softmax regressions, many at once, each certified to be optimal.

The objective is scikit-learn's with C = 1 / l2 and an unpenalised intercept; targets may be soft,
items weighted, and a fixed offset added to the logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError, ConvergenceError
from probes.solver import Metric, Problems, minimise

_SINGLE_TOL = 5e-7  # what float32 reaches on most activations; float64 goes on from there
_SINGLE_ROUNDS = 2  # of preconditioners, in float32, before float64
_UNSTABLE_LOGIT = 0.5  # at an optimum another Newton step moves no logit by nearly as much


@dataclass(frozen=True)
class LogisticFit:
    """k fitted logistic regressions.

    `objective` is the minimum, a sum over items. `gradient_norm` is the certificate: the largest
    entry of the gradient, divided by the total weight.
    """

    coef: Float[Tensor, "k d"]
    intercept: Float[Tensor, " k"]
    objective: Float[Tensor, " k"]
    gradient_norm: Float[Tensor, " k"]
    n_iter: int

    def logits(
        self, X: Float[Tensor, "n d"], offset: Float[Tensor, "n k"] | None = None
    ) -> Float[Tensor, "n k"]:
        """Log-odds for the rows of `X`."""
        z = X.to(self.coef) @ self.coef.T + self.intercept
        return z if offset is None else z + offset


@dataclass(frozen=True)
class SoftmaxFit:
    """A softmax regression over a classes, or k of them; fields as for `LogisticFit`."""

    coef: Float[Tensor, "*k a d"]
    intercept: Float[Tensor, "*k a"]
    objective: Float[Tensor, "*k"]
    gradient_norm: Float[Tensor, "*k"]
    n_iter: int

    def logits(
        self, X: Float[Tensor, "n d"], offset: Float[Tensor, "n *k a"] | None = None
    ) -> Float[Tensor, "n *k a"]:
        """Class logits for the rows of `X`."""
        z = torch.einsum("nd,...d->n...", X.to(self.coef), self.coef) + self.intercept
        return z if offset is None else z + offset


def fit_logistic(
    X: Float[Tensor, "n d"],
    targets: Float[Tensor, "n k"],
    *,
    l2: float | Float[Tensor, "k d"] | Float[Tensor, " k"],
    weights: Float[Tensor, "n k"] | Float[Tensor, " n"] | None = None,
    offset: Float[Tensor, "n k"] | None = None,
    init: LogisticFit | None = None,
    families: Int[Tensor, " k"] | None = None,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-6,
    max_iter: int = 1000,
    name: Callable[[int], str] = "column {}".format,
) -> LogisticFit:
    """Fit k logistic regressions of `targets` in [0, 1] on the same `X`, in `dtype`.

    Column j minimises  sum_i w_ij CE(t_ij, sigmoid(x_i . coef_j + intercept_j + offset_ij))
    + l2_j / 2 |coef_j|^2; an `l2` of shape [k d] penalises each feature by its own strength. `init`
    is a warm start: an earlier fit of these k columns, or of one. Columns of one family (the same
    number in `families`) share a preconditioner, which saves time where they have the same targets
    and penalty and differ in which items have weight. `name` is what errors call column j.

    float64 does most of its work in float32. In float32 alone a `tol` below 1e-5 may be out of
    reach. With one strength per column and n < d the fit works in the span of the n rows.

    Raises AnalysisError for invalid input, such as a column whose targets are constant, and
    ConvergenceError where `gradient_norm` stays above `tol`, or where l2 is 0 and the targets are
    separable, so that no optimum exists.
    """
    if targets.ndim != 2 or len(targets) != len(X):
        raise AnalysisError(f"targets: expected shape [{len(X)}, k], got {list(targets.shape)}")
    if weights is None:
        weights = torch.ones(1, device=X.device)
    weights = (weights[:, None] if weights.ndim == 1 else weights).expand(targets.shape)
    problems, basis = _standardise(
        X,
        rearrange(targets, "n k -> k 1 n"),
        rearrange(weights, "n k -> k n"),
        None if offset is None else rearrange(offset, "n k -> k 1 n"),
        l2,
        dtype,
        name,
    )
    start = None if init is None else (init.coef[:, None], init.intercept[:, None])
    options = {"families": families, "tol": tol, "max_iter": max_iter, "name": name}
    coef, intercept, objective, norm, n_iter = _solve(problems, basis, start, **options)
    return LogisticFit(coef[:, 0], intercept[:, 0], objective, norm, n_iter)


def fit_softmax(
    X: Float[Tensor, "n d"],
    targets: Float[Tensor, "n *k a"],
    *,
    l2: float | Float[Tensor, "k d"] | Float[Tensor, " k"],
    offset: Float[Tensor, "n *k a"] | None = None,
    init: SoftmaxFit | None = None,
    families: Int[Tensor, " k"] | None = None,
    dtype: torch.dtype = torch.float64,
    tol: float = 1e-6,
    max_iter: int = 1000,
    name: Callable[[int], str] = "column {}".format,
) -> SoftmaxFit:
    """Fit a softmax regression over a classes, or k of them side by side, in `dtype`.

    Rows of `targets` are >= 0 and sum to the item's weight. Minimises
    -sum_ia t_ia log softmax_a(x_i . coef + intercept + offset_i) + l2 / 2 |coef|^2  with l2 > 0:
    without a penalty the weights are determined only up to a vector common to all classes. Two
    classes reduce to `fit_logistic` on their difference. Options and errors as there.
    """
    if targets.ndim not in (2, 3) or len(targets) != len(X):
        raise AnalysisError(f"targets: expected shape [{len(X)}, a], got {list(targets.shape)}")
    options = {"families": families, "tol": tol, "max_iter": max_iter, "name": name}
    if targets.ndim == 2:
        start = None if init is None else _map_tensors(init, lambda value: value[None])
        offset = None if offset is None else offset[:, None]
        fit = fit_softmax(
            X, targets[:, None], l2=l2, offset=offset, init=start, dtype=dtype, **options
        )
        return _map_tensors(fit, lambda value: value[0])

    targets = targets.to(dtype)
    weights = targets.sum(-1)
    shares = targets / torch.where(weights > 0, weights, 1.0)[..., None]
    if targets.shape[-1] == 2:
        # coef_1 = -coef_0 = v / 2, so that l2 / 2 |coef|^2 = l2 / 4 |v|^2.
        start = None if init is None else _as_difference(init)
        offset = None if offset is None else offset[..., 1] - offset[..., 0]
        fit = fit_logistic(
            X,
            shares[..., 1],
            l2=torch.as_tensor(l2, dtype=dtype) / 2,
            weights=weights,
            offset=offset,
            init=start,
            dtype=dtype,
            **options,
        )
        sign = torch.tensor([-0.5, 0.5], dtype=dtype, device=X.device)
        coef = torch.einsum("a,kd->kad", sign, fit.coef)
        intercept = torch.einsum("a,k->ka", sign, fit.intercept)
        return SoftmaxFit(coef, intercept, fit.objective, fit.gradient_norm, fit.n_iter)
    problems, basis = _standardise(
        X,
        rearrange(shares, "n k a -> k a n"),
        rearrange(weights, "n k -> k n"),
        None if offset is None else rearrange(offset, "n k a -> k a n"),
        l2,
        dtype,
        name,
    )
    if (problems.penalty[..., :-1] == 0).any():
        raise AnalysisError("l2: softmax regression needs l2 > 0; use a small value such as 1e-6")
    start = None if init is None else (init.coef, init.intercept)
    return SoftmaxFit(*_solve(problems, basis, start, **options))


def _map_tensors(fit: SoftmaxFit, change: Callable[[Tensor], Tensor]) -> SoftmaxFit:
    changed = {name: change(value) for name, value in vars(fit).items() if name != "n_iter"}
    return replace(fit, **changed)


def _as_difference(fit: SoftmaxFit) -> LogisticFit:
    coef, intercept = fit.coef[:, 1] - fit.coef[:, 0], fit.intercept[:, 1] - fit.intercept[:, 0]
    return LogisticFit(coef, intercept, fit.objective, fit.gradient_norm, fit.n_iter)


def _standardise(
    X: Float[Tensor, "n d"],
    targets: Float[Tensor, "k c n"],
    weights: Float[Tensor, "k n"],
    offset: Float[Tensor, "k c n"] | None,
    l2: float | Float[Tensor, "k d"] | Float[Tensor, " k"],
    dtype: torch.dtype,
    name: Callable[[int], str],
) -> tuple[Problems, Float[Tensor, "d n"] | None]:
    """Check the input and write it as problems on a standardised design; with n < d also the
    orthonormal columns on which that design's features are coordinates.

    Standardising changes neither optimum nor penalty: coordinate j is penalised by l2 / scale_j^2.
    """
    (n, d), k = X.shape, len(targets)
    working = {"dtype": dtype, "device": X.device}
    targets, weights = targets.to(**working).contiguous(), weights.to(**working).contiguous()
    l2 = torch.as_tensor(l2).to(**working)
    offset = None if offset is None else offset.to(**working)
    if tuple(l2.shape) not in {(), (1,), (k,), (k, 1), (k, d)}:
        raise AnalysisError(f"l2: expected one number, {k} or [{k}, {d}], got {list(l2.shape)}")
    if not l2.isfinite().all() or (l2 < 0).any() or (weights < 0).any():
        raise AnalysisError("l2, weights: must be finite and not negative")
    if not ((targets >= 0) & (targets <= 1)).all():
        raise AnalysisError("targets: must lie between 0 and 1; encode the two classes as 0 and 1")
    present = (targets * weights[:, None]).sum(2)
    if targets.shape[1] == 1:
        present = torch.cat([present, ((1 - targets) * weights[:, None]).sum(2)], 1)
    if (present <= 0).any():
        column = int((present <= 0).any(1).nonzero()[0])
        raise AnalysisError(
            f"targets: in {name(column)} a class has no weight, so no intercept is optimal; "
            "leave it out or merge classes"
        )
    totals = {"X": X.sum(dtype=torch.float64), "weights": weights.sum()}
    for field, value in {**totals, "offset": 0 if offset is None else offset.sum()}.items():
        if not torch.as_tensor(value).isfinite():
            raise AnalysisError(f"{field}: contains NaN or infinite values; remove those items")
    # At the optimum of an isotropic penalty the coefficients are a combination of the rows.
    basis = None
    if 0 < n < d and (l2.ndim < 2 or l2.shape[1] == 1):
        X, basis = _span(X.to(torch.float64))
        d = n
    design = torch.empty(n, d + 1, **working)  # worked on in place: fresh memory costs more
    design[:, :d], design[:, d] = X, 1
    centre, scale = torch.zeros(d + 1, **working), torch.ones(d + 1, **working)
    centre[:d] = design[:, :d].mean(0)
    design -= centre
    spread = torch.linalg.vector_norm(design[:, :d], dim=0) / n**0.5
    varies = spread > 10 * torch.finfo(dtype).eps ** 0.7 * centre[:d].abs()
    scale[:d] = torch.where(varies, spread, 1.0)
    design /= scale
    penalty = (l2 if l2.ndim == 2 else l2[..., None]).expand(k, d) / scale[:d] ** 2
    problems = Problems(
        design=design,
        targets=targets,
        weights=weights,
        offset=None if offset is None else offset.expand(targets.shape),
        penalty=torch.nn.functional.pad(penalty, (0, 1))[:, None],
        centre=centre,
        scale=scale,
        rotated=basis is not None,
    )
    return problems, basis


def _span(X: Float[Tensor, "n d"]) -> tuple[Float[Tensor, "n n"], Float[Tensor, "d n"]]:
    """Principal coordinates of the rows of X (n < d), and the orthonormal axes they are on."""
    orthonormal, triangle = torch.linalg.qr(X.T)
    variance, principal = torch.linalg.eigh(triangle @ triangle.T)
    coordinates = triangle.T @ principal
    # Of fewer dimensions than rows: coordinates on the others are rounding errors.
    varies = variance > len(X) * torch.finfo(X.dtype).eps * variance.max()
    return torch.where(varies, coordinates, 0.0), orthonormal @ principal


def _solve(
    problems: Problems,
    basis: Float[Tensor, "d n"] | None,
    start: tuple[Tensor, Tensor] | None,
    *,
    families: Int[Tensor, " k"] | None,
    tol: float,
    max_iter: int,
    name: Callable[[int], str],
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """(coef, intercept, objective, gradient norm, iterations) in the coordinates of X."""
    centre, scale = problems.centre[:-1], problems.scale
    k, c, _ = problems.targets.shape
    if families is None:
        families = torch.arange(k, device=scale.device)
    theta = problems.design.new_zeros(k, c, problems.design.shape[1])
    if start is not None:
        coef, intercept = (value.to(theta) for value in start)
        coef = coef if basis is None else coef @ basis.to(coef)
        theta[:] = torch.cat([coef * scale[:-1], (intercept + coef @ centre)[..., None]], -1)

    elif problems.offset is not None:
        # Where offsets are all large the loss is flat at 0 and no step leads away from it.
        theta[..., -1] = -problems.offset.median(-1).values

    theta, z, gradient, gradient_norm, n_iter = _descend(problems, theta, families, tol, max_iter)
    if not (gradient_norm <= tol).all():
        worst = int(gradient_norm.nan_to_num(torch.inf).argmax())
        raise ConvergenceError(
            f"{name(worst)}: the gradient per unit of weight is {gradient_norm[worst]:.1e} > tol "
            f"= {tol:.0e} after {n_iter} iterations; raise l2, tol or max_iter, or standardise X"
        )
    _refuse_separable(problems, z, gradient, name)
    coef = theta[..., :-1] / scale[:-1]
    intercept = theta[..., -1] - coef @ centre
    coef = coef if basis is None else coef @ basis.T.to(coef)
    return coef, intercept, problems.loss(z, theta), gradient_norm, n_iter


def _descend(
    problems: Problems,
    theta: Float[Tensor, "k c D"],
    families: Int[Tensor, " k"],
    tol: float,
    max_iter: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    """Parameters, and at them logits, gradient, certificates and the iterations it took.

    Rounds of L-BFGS, each for what has not converged yet and with a better preconditioner: a bound
    on all curvatures, each family's mean Hessian, each problem's own. In float64, float32 does the
    first rounds at half the cost and float64 finishes.
    """
    exact, n_iter = problems.design.dtype, 0
    single = problems.to(torch.float32)
    round_number = -1
    while True:
        round_number += 1
        first = round_number < _SINGLE_ROUNDS
        stage = single if first else problems
        checked = single if round_number == 1 else problems
        z = checked.logits(theta.to(checked.design))
        gradient = checked.gradient(z, theta.to(z))
        gradient_norm = checked.certificate(gradient)
        rows = ~(gradient_norm <= tol)
        if not rows.any() and checked is not problems:
            continue
        if not rows.any() or n_iter >= max_iter:
            return theta, z, gradient, gradient_norm, n_iter
        kin = families[rows] if round_number <= _SINGLE_ROUNDS else rows.nonzero()[:, 0]
        part, start = stage.select(rows), theta[rows]
        single_part = part if first else single.select(rows)
        if round_number == 0:
            metric = Metric.bound(single_part)
        else:
            metric = Metric.hessian(single_part, start.float(), kin)
        # About as many iterations as cost what the next round's Hessians do.
        patience = 8 + theta.shape[-1] * int(kin.unique().numel()) // (16 * len(kin))
        found, used = minimise(
            part,
            start.to(part.design),
            metric.to(part.design.dtype),
            tol=max(0.8 * tol, _SINGLE_TOL) if first and exact == torch.float64 else tol,
            max_iter=min(patience if round_number == 0 else 2 * patience + 16, max_iter - n_iter),
        )
        if found.shape[1] > 1:  # what all classes have in common costs penalty and changes nothing
            found = found - found.mean(1, keepdim=True)
        theta[rows] = found.to(exact)
        n_iter += max(used, 1)


def _refuse_separable(
    problems: Problems,
    z: Float[Tensor, "k c n"],
    gradient: Float[Tensor, "k c D"],
    name: Callable[[int], str],
) -> None:
    """Without a penalty a small gradient is no proof: if targets are separable it vanishes far out.

    There every Newton step still moves some logits by about 1; at an optimum it moves none.
    """
    free = problems.penalty.amax((1, 2)) == 0
    if not free.any() or problems.design.shape[1] == 1:
        return
    problems, probability = problems.select(free), z[free, 0].sigmoid()
    curvature = problems.weights * probability * (1 - probability)
    hessian = torch.einsum("ni,kn,nj->kij", problems.design, curvature, problems.design)
    step = (torch.linalg.pinv(hessian, hermitian=True) @ gradient[free].mT).mT
    moved = (problems.logits(step)[:, 0] * (problems.weights > 0)).abs().amax(1)
    if (moved > _UNSTABLE_LOGIT).any():
        column = int(free.nonzero()[int(moved.argmax()), 0])
        raise ConvergenceError(
            f"{name(column)}: the targets are (nearly) separable, so that without a penalty there "
            "is no optimum; set l2 > 0"
        )
