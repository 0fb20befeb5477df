"""The competence gate: a study says nothing about damage to what was never there."""

from __future__ import annotations

import pandas as pd
import torch

from analyses.streams import read_streams
from mechinterp import decisions
from mechinterp.hooked import HookedModel
from mechinterp.spec import AnalysisSpec
from mechinterp.tasks.base import Task


def measure_competence(
    model: HookedModel, task: Task, *, spec: AnalysisSpec, threshold: float = 0.9
) -> pd.DataFrame:
    """One row: value, threshold, reference and whether the network is competent.

    At symmetric costs. Where the posterior is known, the value is the utility of the network's
    decisions as a share of (oracle - best constant action). Else it is the mean log score, and the
    threshold is that of a logistic regression on the raw input, fitted to 5,000 items of the
    training split (or all that it has).
    """
    items = task.sample(spec.ladder_items, seed=spec.seed, split="test")
    streams = read_streams(model, items, task, batch_size=spec.batch_size)
    symmetric = decisions.diagonal_utility([1.0] * len(task.actions))
    if items.posterior is not None:
        constant = decisions.best_constant(items.posterior, symmetric).value.utility
        oracle = decisions.oracle_value(items.posterior, symmetric).utility
        own = decisions.value(streams.action_logits, items.posterior, symmetric).utility
        value, reference = (own - constant) / (oracle - constant), "oracle"
    else:
        value = decisions.value(streams.action_logits, items.labels, symmetric).log_score
        threshold, reference = _logistic_regression_score(task, spec), "logistic_regression"
    row = {
        "value": value,
        "threshold": threshold,
        "reference": reference,
        "competent": bool(value >= threshold),
    }
    return pd.DataFrame([row])


def _logistic_regression_score(task: Task, spec: AnalysisSpec) -> float:
    """Mean test log score of scikit-learn's regression on the raw input, its strength chosen by
    cross-validation on the training split, where several items may show one image."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, GroupKFold

    train = task.sample(5_000, seed=spec.seed, split="train")
    test = task.sample(spec.ladder_items, seed=spec.seed, split="test")
    classifier = GridSearchCV(
        LogisticRegression(max_iter=2_000),
        {"C": [10.0**k for k in range(-3, 4)]},
        scoring="neg_log_loss",
        cv=GroupKFold(5),
    )
    classifier.fit(
        task.baseline_features(train).numpy(), train.labels.numpy(), groups=train.groups.numpy()
    )
    p = classifier.predict_proba(task.baseline_features(test).numpy())
    own = torch.from_numpy(p).gather(1, test.labels[:, None])
    smallest = torch.finfo(own.dtype).eps  # certain and wrong, it would score -inf
    return float(own.clamp_min(smallest).log().mean())
