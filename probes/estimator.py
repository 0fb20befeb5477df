"""The logistic solver behind scikit-learn's interface."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from probes.logistic import fit_logistic, fit_softmax


class LogisticProbe(ClassifierMixin, BaseEstimator):
    """L2 logistic regression, softmax for more than two classes, with a certificate of optimality.

    Finds the optimum of scikit-learn's `LogisticRegression(C=1 / l2)`. Features are used as they
    are: put a `StandardScaler` before it where their scales differ. After `fit`: `classes_`,
    `coef_` [1 or classes, features], `intercept_`, `n_iter_` and `gradient_norm_`, the certificate.

    Raises ConvergenceError where the gradient per item stays above `tol`.
    """

    def __init__(self, l2: float = 1.0, *, tol: float = 1e-6, max_iter: int = 1000):
        self.l2 = l2
        self.tol = tol
        self.max_iter = max_iter

    def fit(self, X, y, sample_weight=None) -> LogisticProbe:
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        present = weights > 0
        self.classes_, encoded = np.unique(y[present], return_inverse=True)
        n_classes = len(self.classes_)
        if n_classes < 2:
            raise ValueError(f"y: a classifier needs two classes or more, got {n_classes} class")
        design, weights = torch.from_numpy(X[present]), torch.from_numpy(weights[present])
        options = {"l2": self.l2, "tol": self.tol, "max_iter": self.max_iter}
        one_hot = torch.eye(n_classes, dtype=torch.float64)[torch.from_numpy(encoded)]
        if n_classes == 2:
            fit = fit_logistic(design, one_hot[:, 1:], weights=weights, **options)
        else:
            fit = fit_softmax(design, one_hot * weights[:, None], **options)
        self.coef_, self.intercept_ = fit.coef.numpy(), fit.intercept.numpy()
        self.n_iter_, self.gradient_norm_ = fit.n_iter, float(fit.gradient_norm.max())
        return self

    def decision_function(self, X) -> np.ndarray:
        """Log-odds of `classes_[1]` [n], or logits [n, classes] of more than two classes."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        z = X @ self.coef_.T + self.intercept_
        return z[:, 0] if len(self.classes_) == 2 else z

    def predict_proba(self, X) -> np.ndarray:
        """Probabilities [n, classes]."""
        z = torch.from_numpy(self.decision_function(X))
        return (torch.stack([-z, z], 1).sigmoid() if z.ndim == 1 else z.softmax(1)).numpy()

    def predict_log_proba(self, X) -> np.ndarray:
        """Log probabilities [n, classes], exact where a probability underflows."""
        z = torch.from_numpy(self.decision_function(X))
        log = torch.nn.functional.logsigmoid
        return (log(torch.stack([-z, z], 1)) if z.ndim == 1 else z.log_softmax(1)).numpy()

    def predict(self, X) -> np.ndarray:
        """The most probable class of each row."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]
