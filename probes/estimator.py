"""The logistic solver behind scikit-learn's interface."""

from __future__ import annotations

import torch

from probes.classifier import LogitClassifier
from probes.logistic import fit_logistic, fit_softmax


class LogisticProbe(LogitClassifier):
    """L2 logistic regression, softmax for more than two classes, with a certificate of optimality.

    Finds the optimum of scikit-learn's `LogisticRegression(C, class_weight)`. Features are used as
    they are: put a `StandardScaler` before it where their scales differ. After `fit`: `classes_`,
    `coef_` [1 or classes, features], `intercept_`, `n_iter_` and `gradient_norm_`, the certificate:
    the largest entry of the objective's gradient per unit of weight, at most `tol` (default 1e-10,
    in `dtype` "float32" 1e-5).

    Raises ConvergenceError where the certificate stays above `tol`, or where C is infinite and the
    classes are separable.
    """

    def __init__(
        self,
        C: float = 1.0,
        *,
        class_weight=None,
        tol: float | None = None,
        max_iter: int = 1000,
        dtype: str = "float64",
        device: str = "cpu",
    ):
        self.C = C
        self.class_weight = class_weight
        self.tol = tol
        self.max_iter = max_iter
        self.dtype = dtype
        self.device = device

    def fit(self, X, y, sample_weight=None) -> LogisticProbe:
        if not self.C > 0:
            raise ValueError(f"C: must be positive, got {self.C}")
        data = self._encode(X, y, sample_weight)
        dtype = {"float64": torch.float64, "float32": torch.float32}[self.dtype]
        tol = {"float64": 1e-10, "float32": 1e-5}[self.dtype] if self.tol is None else self.tol
        options = {"l2": 1 / self.C, "dtype": dtype, "tol": tol, "max_iter": self.max_iter}
        if len(self.classes_) == 2:
            fit = fit_logistic(data.X, data.one_hot[:, 1:], weights=data.weights, **options)
        else:
            fit = fit_softmax(data.X, data.one_hot * data.weights[:, None], **options)
        self.coef_, self.intercept_ = fit.coef.cpu().numpy(), fit.intercept.cpu().numpy()
        self.n_iter_, self.gradient_norm_ = fit.n_iter, float(fit.gradient_norm.max())
        return self
