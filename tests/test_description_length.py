"""Online code lengths against hand-computed bits and against scikit-learn block by block."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mechinterp.errors import AnalysisError
from probes.crossfit import ProbeConfig
from probes.description_length import _order, description_length

ONE = ProbeConfig(strengths=(0.01,), tol=1e-9)


def test_a_hand_computed_case_in_bits():
    """Nothing to read: each block is coded with the shares of the values sent before it.

    All items of a kind belong to one group, so the order of the groups is all that the seed
    decides: 1 1 0 | 0 1 | 1 1 1 or with the first two blocks the other way round.
    """
    labels = torch.tensor([1, 1, 0, 0, 0, 1, 1, 1])
    groups = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2])
    order, _ = _order(groups, (0.25, 0.6, 1.0), seed=0)
    code = description_length(
        torch.zeros(8, 2), labels[:, None], 2, groups=groups, config=ONE, block_ends=(0.25, 0.6, 1)
    )
    by_order = {
        # 110 | 00 | 111: 3 bits; two zeros at 1/3 each; three ones at 2/5 each
        (0, 1, 2): (3 - 2 * math.log2(1 / 3) - 3 * math.log2(2 / 5), (3, 5, 8)),
        # 110 | 111 | 00: three ones at 2/3; two zeros at 1/6
        (0, 2, 1): (3 - 3 * math.log2(2 / 3) - 2 * math.log2(1 / 6), (3, 6, 8)),
        # 00 | 110 | 111: no one before the second block, so one bit each; three ones at 2/5
        (1, 0, 2): (2 + 3 - 3 * math.log2(2 / 5), (2, 5, 8)),
        # 00 | 111 | 110: the same for the second; then 1 1 at 3/5 and 0 at 2/5
        (1, 2, 0): (2 + 3 - 2 * math.log2(3 / 5) - math.log2(2 / 5), (2, 5, 8)),
        # 111 | 110: no zero before; 00 at 1/6
        (2, 0, 1): (3 + 3 - 2 * math.log2(1 / 6), (3, 6, 8)),
        # 111 | 00: then 1 1 at 3/5 and 0 at 2/5
        (2, 1, 0): (3 + 2 - 2 * math.log2(3 / 5) - math.log2(2 / 5), (3, 5, 8)),
    }
    drawn = tuple(dict.fromkeys(groups[order].tolist()))
    bits, ends = by_order[drawn]
    assert code.ends == ends
    assert code.bits.tolist() == pytest.approx([bits], abs=1e-6)
    assert code.uniform_bits == 8
    assert float(code.compression) == pytest.approx(8 / bits)


@pytest.mark.parametrize("n_values", [2, 3])
def test_equals_the_sum_over_blocks_with_scikit_learn(n_values):
    rng = np.random.default_rng(0)
    n, ends, strengths = 240, (0.125, 0.25, 0.5, 1.0), (0.1, 0.01)
    labels = rng.integers(0, n_values, size=n)
    X = rng.normal(size=(n, 6)) * 3 + np.eye(n_values, 6)[labels] * 4 + 7
    groups = torch.arange(n) // 2
    config = ProbeConfig(strengths=strengths, tol=1e-9, seed=4)
    code = description_length(
        torch.tensor(X),
        torch.tensor(labels)[:, None],
        n_values,
        groups=groups,
        config=config,
        block_ends=ends,
    )
    order, counts = _order(groups, ends, seed=4)
    X, labels = X[order], labels[order]
    assert counts == (30, 60, 120, 240)
    totals = []
    for strength in strengths:
        bits = 30 * math.log2(n_values)
        for start, end in itertools.pairwise(counts):
            scaler = StandardScaler().fit(X[:start])
            probe = LogisticRegression(
                C=1 / (strength * start), solver="newton-cholesky", tol=1e-10
            ).fit(scaler.transform(X[:start]), labels[:start])
            log_p = probe.predict_log_proba(scaler.transform(X[start:end]))
            bits -= log_p[np.arange(end - start), labels[start:end]].sum() / math.log(2)
        totals.append(bits)
    mixture = -math.log2(np.mean([2.0**-bits for bits in totals]))
    assert float(code.bits) == pytest.approx(mixture, abs=1e-4)
    assert min(totals) <= float(code.bits) <= min(totals) + math.log2(len(strengths))


def test_no_group_is_split_and_the_seed_decides_the_order():
    rng = np.random.default_rng(1)
    groups = torch.tensor(rng.integers(0, 40, size=300))
    order, ends = _order(groups, (0.01, 0.1, 0.5, 1.0), seed=0)
    assert sorted(order.tolist()) == list(range(300))
    assert ends[-1] == 300
    sent = groups[order]
    for end in ends[:-1]:
        assert not set(sent[:end].tolist()) & set(sent[end:].tolist())
    assert torch.equal(order, _order(groups, (0.5, 1.0), seed=0)[0])
    assert not torch.equal(order, _order(groups, (0.5, 1.0), seed=1)[0])


def test_noise_costs_a_little_more_than_the_uniform_code_and_signal_less():
    rng = np.random.default_rng(2)
    labels = torch.tensor(rng.integers(0, 2, size=(1000, 2)))
    X = torch.tensor(rng.normal(size=(1000, 20)))
    X[:, 3] += 4 * labels[:, 1]
    code = description_length(X, labels, 2, groups=torch.arange(1000))
    assert 1000 < float(code.bits[0]) < 1100
    assert float(code.bits[1]) < 350
    assert float(code.compression[0]) < 1 < float(code.compression[1])


def test_blocks_must_rise_to_one():
    X, labels = torch.zeros(8, 1), torch.arange(8)[:, None] % 2
    for ends in ((0.5,), (0.5, 0.2, 1.0), (0.0, 1.0)):
        with pytest.raises(AnalysisError, match="block_ends: must rise"):
            description_length(X, labels, 2, groups=torch.arange(8), block_ends=ends)
