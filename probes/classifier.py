"""What classifiers with linear scores share: scikit-learn's checks, weights, and predictions."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.utils import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from mechinterp.errors import AnalysisError


def check_device(device: str) -> torch.device:
    """The torch device; raises AnalysisError where this machine lacks it."""
    if torch.device(device).type == "cuda" and not torch.cuda.is_available():
        raise AnalysisError(f"device: {device!r} is not available here; use 'cpu'")
    return torch.device(device)


def check_labels(
    labels: Int[Tensor, "n k"], n: int, weights: Float[Tensor, " n"], *, least: int = 2
) -> Int[Tensor, "n k"]:
    """`labels` as int64; raises AnalysisError unless every column has two classes or more, each of
    `least` items with weight or more.
    """
    if labels.ndim != 2 or len(labels) != n or labels.is_floating_point() or (labels < 0).any():
        raise AnalysisError(
            f"labels: expected whole numbers >= 0 of shape [{n}, k], got {list(labels.shape)} of "
            f"{labels.dtype}"
        )
    labels = labels.to(weights.device, torch.int64)
    counts = torch.nn.functional.one_hot(labels[weights > 0]).sum(0)
    for column, count in enumerate(counts):
        if ((count > 0) & (count < least)).any() or (count > 0).sum() < 2:
            raise AnalysisError(
                f"labels: column {column} needs two classes or more of at least {least} items; "
                "merge classes or leave the column out"
            )
    return labels


@dataclass(frozen=True)
class Labelled:
    """Items with weight, on the estimator's device; `labels` index the classes."""

    X: Float[Tensor, "n d"]
    labels: Int[Tensor, " n"]
    one_hot: Float[Tensor, "n classes"]
    weights: Float[Tensor, " n"]


class ProbeClassifier(ClassifierMixin, BaseEstimator):
    """A classifier whose scores are X coef_^T + intercept_; for two classes one row, class 1's."""

    classes_: np.ndarray
    coef_: np.ndarray
    intercept_: np.ndarray

    def _encode(self, X, y, sample_weight) -> Labelled:
        """Check the input, set `classes_`; items of weight 0 are as good as absent."""
        X, y = validate_data(self, X, y, dtype=np.float64)
        check_classification_targets(y)
        weights = _check_sample_weight(sample_weight, X, dtype=np.float64, ensure_non_negative=True)
        present = weights > 0
        weights = weights[present]
        self.classes_, labels = np.unique(y[present], return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"y: a classifier needs two classes or more, got {len(self.classes_)} class"
            )
        weights = weights * self._class_weights(y[present], weights)[labels]
        device = check_device(getattr(self, "device", "cpu"))
        labels = torch.tensor(labels, device=device)
        return Labelled(
            torch.tensor(X[present], device=device),
            labels,
            torch.nn.functional.one_hot(labels).double(),
            torch.tensor(weights, device=device),
        )

    def _class_weights(self, y, weights) -> np.ndarray:
        class_weight = getattr(self, "class_weight", None)
        return compute_class_weight(class_weight, classes=self.classes_, y=y, sample_weight=weights)

    def _set_logits(
        self, coef: Float[Tensor, "classes d"], intercept: Float[Tensor, " classes"]
    ) -> None:
        """Keep the logits of all classes, or of two classes their difference."""
        if len(coef) == 2:
            coef, intercept = coef[1:] - coef[:1], intercept[1:] - intercept[:1]
        self.coef_, self.intercept_ = coef.cpu().numpy(), intercept.cpu().numpy()

    def decision_function(self, X) -> np.ndarray:
        """Scores: of `classes_[1]` [n], or of more than two classes [n, classes]."""
        check_is_fitted(self)
        X = validate_data(self, X, dtype=np.float64, reset=False)
        z = X @ self.coef_.T + self.intercept_
        return z[:, 0] if len(self.classes_) == 2 else z

    def predict(self, X) -> np.ndarray:
        """The class of the highest score for each row."""
        z = self.decision_function(X)
        return self.classes_[(z > 0).astype(int) if z.ndim == 1 else z.argmax(1)]


class LogitClassifier(ProbeClassifier):
    """A classifier whose scores are log-odds, or logits of more than two classes."""

    def predict_proba(self, X) -> np.ndarray:
        """Probabilities [n, classes]."""
        return np.exp(self.predict_log_proba(X))

    def predict_log_proba(self, X) -> np.ndarray:
        """Log probabilities [n, classes], exact where a probability underflows."""
        z = torch.from_numpy(self.decision_function(X))
        log = torch.nn.functional.logsigmoid
        return (log(torch.stack([-z, z], 1)) if z.ndim == 1 else z.log_softmax(1)).numpy()
