"""Minimise many L2-regularised logistic or softmax regressions that share one design matrix.

k problems with c logits each (c = 1: logistic, c > 1: softmax) have parameters theta [k c D]; the
last column of the design is the constant 1. Parameters and logits are rows, not columns: with few
problems [k D] @ [D n] is two to six times as fast as [n D] @ [D k].
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

_SUFFICIENT_DECREASE = 1e-4  # Armijo's constant
_MAX_HALVINGS = 30
_MEMORY = 10  # pairs of (step, change of gradient) that L-BFGS remembers
_COMPACT = 0.125  # share of the batch that has converged at which it is dropped
_TINY = 1e-30


_PER_PROBLEM = ("targets", "weights", "offset", "penalty")


@dataclass(frozen=True)
class Problems:
    """Minimise sum_i w_ki CE(t_ki, link(z_ki)) + 1/2 sum_cj penalty_kj theta_kcj^2, for every k.

    `centre` and `scale` say how the design was standardised: design = (X - centre) / scale. Where
    `rotated`, X itself is an orthogonal map of the features.
    """

    design: Float[Tensor, "n D"]
    targets: Float[Tensor, "k c n"]
    weights: Float[Tensor, "k n"]
    offset: Float[Tensor, "k c n"] | None
    penalty: Float[Tensor, "k 1 D"]
    centre: Float[Tensor, " D"]
    scale: Float[Tensor, " D"]
    rotated: bool = False

    def logits(self, theta: Float[Tensor, "k c D"]) -> Float[Tensor, "k c n"]:
        z = self.linear(theta)
        return z if self.offset is None else z + self.offset

    def linear(self, theta: Float[Tensor, "k c D"]) -> Float[Tensor, "k c n"]:
        """The design's part of the logits, without the offset."""
        rows = rearrange(theta, "k c D -> (k c) D") @ self.design.T
        return rearrange(rows, "(k c) n -> k c n", c=theta.shape[1])

    def loss(self, z: Float[Tensor, "k c n"], theta: Float[Tensor, "k c D"]) -> Float[Tensor, " k"]:
        log_partition = _softplus(z[:, 0]) if z.shape[1] == 1 else z.logsumexp(1)
        cross_entropy = log_partition - (self.targets * z).sum(1)
        return (self.weights * cross_entropy).sum(1) + 0.5 * (self.penalty * theta**2).sum((1, 2))

    def gradient(
        self, z: Float[Tensor, "k c n"], theta: Float[Tensor, "k c D"]
    ) -> Float[Tensor, "k c D"]:
        residual = (link(z) - self.targets) * self.weights[:, None]
        rows = rearrange(residual, "k c n -> (k c) n") @ self.design
        return rearrange(rows, "(k c) D -> k c D", c=theta.shape[1]) + self.penalty * theta

    def certificate(self, gradient: Float[Tensor, "k c D"]) -> Float[Tensor, " k"]:
        """The largest entry of the gradient in the coordinates of X, per unit of weight.

        Where X is a rotation of the features: its Euclidean norm, a bound on their largest entry.
        """
        original = gradient * self.scale + gradient[..., -1:] * self.centre
        size = original.norm(dim=(1, 2)) if self.rotated else original.abs().amax((1, 2))
        return size / self.weights.sum(1)

    def select(self, kept: Bool[Tensor, " k"]) -> Problems:
        if kept.all():
            return self
        names = [name for name in _PER_PROBLEM if getattr(self, name) is not None]
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def to(self, dtype: torch.dtype) -> Problems:
        tensors = {name: v for name, v in vars(self).items() if isinstance(v, Tensor)}
        return replace(self, **{name: value.to(dtype) for name, value in tensors.items()})


def link(z: Float[Tensor, "k c n"]) -> Float[Tensor, "k c n"]:
    """Probabilities from logits: of target 1 where c is 1, of each class otherwise."""
    return z.sigmoid() if z.shape[1] == 1 else z.softmax(1)


def _softplus(z: Tensor) -> Tensor:
    # torch's default is linear above 20, an error of 2e-9 that a float64 line search would feel.
    return torch.nn.functional.softplus(z, threshold=40)


@dataclass(frozen=True)
class Metric:
    """Approximate inverse Hessians, one for each logit's parameters, which precondition L-BFGS."""

    inverse: Float[Tensor, "groups D D"]
    group: Int[Tensor, "k c"]  # which inverse serves a logit
    size: Float[Tensor, " k"]  # the Hessian of problem k is about size_k times the group's

    @classmethod
    def bound(cls, problems: Problems) -> Metric:
        """h N_k (G + l2_k / (h N_k) diag(unit)), a bound on the Hessian everywhere.

        G is the Gram matrix of the design per unit of weight, N_k the total weight, and h = 1/4
        (logistic) or 1/2 (softmax; Böhning 1992, Ann. Inst. Statist. Math. 44).
        """
        total, c = problems.weights.sum(1), problems.targets.shape[1]
        size = (0.25 if c == 1 else 0.5) * total
        strength = problems.penalty.mean((1, 2))
        unit = problems.penalty.mean((0, 1)) / strength.mean().clamp_min(_TINY)
        # It only preconditions, so one inverse serves all strengths within a factor of two.
        octaves, group = (strength / size).log2().round().unique(return_inverse=True)
        gram = _grams(problems.design, (problems.weights / total[:, None]).mean(0, keepdim=True))
        inverse = _inverses(gram, octaves.exp2()[:, None] * unit)
        return cls(inverse, group[:, None].expand(-1, c), size)

    @classmethod
    def hessian(
        cls, problems: Problems, theta: Float[Tensor, "k c D"], families: Int[Tensor, " k"]
    ) -> Metric:
        """The Hessian at `theta`, its mean over a family; for softmax a diagonal block per class.

        Problems that differ in the items left out have nearly the same Hessian, and a Hessian costs
        as much as D / 4 iterations of one problem.
        """
        n_classes = theta.shape[1]
        _, family, counts = families.unique(return_inverse=True, return_counts=True)
        predicted = link(problems.logits(theta))
        curvature = predicted * (1 - predicted) * problems.weights[:, None]
        curvature = _family_means(curvature, family, counts)
        penalty = _family_means(problems.penalty, family, counts)
        grams = _grams(problems.design, rearrange(curvature, "f c n -> (f c) n"))
        inverse = _inverses(grams, penalty[:, 0].repeat_interleave(n_classes, 0))
        group = family[:, None] * n_classes + torch.arange(n_classes, device=theta.device)
        return cls(inverse, group, torch.ones_like(theta[:, 0, 0]))

    def solve(self, gradient: Float[Tensor, "k c D"]) -> Float[Tensor, "k c D"]:
        rows = rearrange(gradient, "k c D -> (k c) D")
        solution = torch.empty_like(rows)
        for inverse, members in self._served:
            solution[members] = rows[members] @ inverse
        return solution.view_as(gradient) / self.size[:, None, None]

    @cached_property
    def _served(self) -> list[tuple[Float[Tensor, "D D"], Int[Tensor, " rows"]]]:
        group = self.group.flatten()
        return [(self.inverse[g], (group == g).nonzero()[:, 0]) for g in group.unique()]

    def select(self, kept: Bool[Tensor, " k"]) -> Metric:
        return replace(self, group=self.group[kept], size=self.size[kept])

    def to(self, dtype: torch.dtype) -> Metric:
        return replace(self, inverse=self.inverse.to(dtype), size=self.size.to(dtype))


def _family_means(
    values: Float[Tensor, "k ..."], family: Int[Tensor, " k"], counts: Int[Tensor, " f"]
) -> Float[Tensor, "f ..."]:
    sums = values.new_zeros(len(counts), *values.shape[1:]).index_add_(0, family, values)
    return sums / counts.view(-1, *[1] * (values.ndim - 1))


def _grams(design: Float[Tensor, "n D"], weights: Float[Tensor, "g n"]) -> Float[Tensor, "g D D"]:
    # A loop: one batched product would first write g scaled copies of the design to memory.
    grams = design.new_empty(len(weights), design.shape[1], design.shape[1])
    for gram, row in zip(grams, weights, strict=True):
        scaled = design * row.sqrt()[:, None]
        if design.device.type == "cpu":
            # numpy sees that the factors are one matrix and computes half of the product (syrk).
            gram[:] = torch.from_numpy(scaled.numpy().T @ scaled.numpy())
        else:
            torch.mm(scaled.T, scaled, out=gram)
    return grams


def _inverses(
    grams: Float[Tensor, "#g D D"], penalty: Float[Tensor, "g D"]
) -> Float[Tensor, "g D D"]:
    """Inverses of gram + diag(penalty), damped until they are positive definite in rounding."""
    ridge, largest = torch.diag_embed(penalty), grams.diagonal(dim1=1, dim2=2).amax(1)
    for damping in (1e-7, 1e-5, 1e-3, 1.0):
        added = damping * largest.clamp_min(_TINY)[:, None].expand(-1, grams.shape[-1])
        factor, failed = torch.linalg.cholesky_ex(grams + torch.diag_embed(added) + ridge)
        if not failed.any():
            break
    return torch.cholesky_inverse(factor)


class _Memory:
    """L-BFGS's inverse Hessian: one memory per problem on top of the metric."""

    def __init__(self, metric: Metric) -> None:
        self.metric = metric
        self.pairs: list[tuple[Tensor, Tensor, Tensor]] = []  # step, change, 1 / <step, change>

    def solve(self, gradient: Float[Tensor, "k c D"]) -> Float[Tensor, "k c D"]:
        result, coefficients = gradient.clone(), []
        for step, change, inverse in reversed(self.pairs):
            coefficients.append(inverse * _inner(step, result))
            result -= coefficients[-1] * change
        result = self.metric.solve(result)
        for (step, change, inverse), coefficient in zip(
            self.pairs, reversed(coefficients), strict=True
        ):
            result += (coefficient - inverse * _inner(change, result)) * step
        return result

    def add(self, step: Float[Tensor, "k c D"], change: Float[Tensor, "k c D"]) -> None:
        product = _inner(step, change)
        inverse = torch.where(product > _TINY, 1 / product, 0.0)  # 0: the pair is ignored
        self.pairs = [*self.pairs[1 - _MEMORY :], (step, change, inverse)]

    def select(self, kept: Bool[Tensor, " k"]) -> None:
        self.metric = self.metric.select(kept)
        self.pairs = [(step[kept], change[kept], i[kept]) for step, change, i in self.pairs]


def _inner(a: Float[Tensor, "k c D"], b: Float[Tensor, "k c D"]) -> Float[Tensor, "k 1 1"]:
    return (a * b).sum((1, 2), keepdim=True)


def minimise(
    problems: Problems,
    theta: Float[Tensor, "k c D"],
    metric: Metric,
    *,
    tol: float,
    max_iter: int,
) -> tuple[Float[Tensor, "k c D"], int]:
    """Preconditioned L-BFGS with Armijo's line search; every problem has its own memory and
    step length.

    A problem is done when its certificate is at most `tol` or no step decreases its loss. The
    caller checks the certificates. Returns the parameters and the number of iterations.
    """
    solution, iteration = theta.clone(), 0
    active = torch.arange(len(theta), device=theta.device)
    rounding = 10 * torch.finfo(theta.dtype).eps
    memory = _Memory(metric)
    z = problems.logits(theta)
    loss, gradient = problems.loss(z, theta), problems.gradient(z, theta)
    done = stuck = torch.zeros_like(active, dtype=torch.bool)
    for iteration in range(max_iter + 1):
        ended = ~done & (stuck | (problems.certificate(gradient) <= tol))
        if iteration == max_iter:
            ended = ~done
        solution[active[ended]] = theta[ended]
        done = done | ended
        if done.all():
            break
        if done.double().mean() >= _COMPACT:  # copying costs as much as it saves before
            kept = ~done
            problems, active = problems.select(kept), active[kept]
            theta, z, loss, gradient = theta[kept], z[kept], loss[kept], gradient[kept]
            done = done[kept]
            memory.select(kept)
        step = -memory.solve(gradient)
        slope, z_step = _inner(gradient, step)[:, 0, 0], problems.linear(step)
        length = torch.ones_like(loss)
        for _ in range(_MAX_HALVINGS):
            new_theta = theta + length[:, None, None] * step
            new_z = z + length[:, None, None] * z_step
            new_loss = problems.loss(new_z, new_theta)
            ceiling = loss + _SUFFICIENT_DECREASE * length * slope + rounding * loss.abs()
            stuck = ~(new_loss <= ceiling)
            if not (stuck & ~done).any():
                break
            length = torch.where(stuck, 0.5 * length, length)
        new_gradient = problems.gradient(new_z, new_theta)
        memory.add(new_theta - theta, new_gradient - gradient)
        theta, z, loss, gradient = new_theta, new_z, new_loss, new_gradient
    return solution, iteration
