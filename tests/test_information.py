"""V-information against the definition, written out fold by fold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from probes.information import null_log_probabilities, pointwise_information


def test_null_model_is_the_share_of_each_value_outside_the_fold():
    rng = np.random.default_rng(0)
    labels = torch.tensor(rng.integers(0, 3, size=90))
    folds = torch.tensor(rng.integers(0, 4, size=90))
    log_p = null_log_probabilities(labels, folds, 3)
    for i in range(90):
        others = labels[folds != folds[i]]
        shares = [float((others == value).double().mean()) for value in range(3)]
        assert log_p[i].exp().tolist() == pytest.approx(shares)


def test_bits_by_hand():
    labels = torch.tensor([0, 1, 0, 1])
    folds = torch.tensor([0, 0, 1, 1])
    p = torch.tensor([[1.0, 0.0], [0.5, 0.5], [0.25, 0.75], [0.125, 0.875]])
    found = pointwise_information(p.double().log(), labels, folds)
    assert found.tolist() == pytest.approx([1.0, 0.0, -1.0, np.log2(0.875) + 1])


def test_a_probe_that_sees_nothing_has_no_information():
    rng = np.random.default_rng(1)
    labels = torch.tensor(rng.integers(0, 2, size=50))
    folds = torch.arange(50) % 5
    null = null_log_probabilities(labels, folds, 2)
    assert pointwise_information(null, labels, folds).abs().max() == 0
