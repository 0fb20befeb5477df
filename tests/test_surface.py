"""Designs made of tokens, against counting."""

from __future__ import annotations

from collections import Counter

import torch

from probes.surface import surface_features

TOKENS = torch.tensor(
    [
        [1, 7, 5, 2, 9],
        [1, 5, 5, 2, 9],
        [1, 6, 5, 2, 8],
        [1, 6, 7, 2, 9],
    ]
)


def test_bag_counts_the_tokens_that_vary_and_recur_across_groups():
    bag = surface_features(TOKENS, groups=torch.arange(4))["bag"]
    # 1 and 2 stand in every item; 8 in one group only
    expected = [[Counter(row)[token] for token in (5, 6, 7, 9)] for row in TOKENS.tolist()]
    assert bag.tolist() == expected
    one_group = surface_features(TOKENS, groups=torch.tensor([0, 1, 2, 2]))["bag"]
    assert one_group.tolist() == [[row[0], row[2], row[3]] for row in expected]


def test_token_is_one_hot_at_the_probed_position_and_the_bag_ends_there():
    features = surface_features(TOKENS, groups=torch.arange(4), position=1)
    assert features["token"].tolist() == [[0], [0], [1], [1]]  # 6; 5 and 7 are in one group each
    assert features["bag"].tolist() == [[0], [0], [1], [1]]


def test_where_nothing_varies_there_is_a_column_of_zeros():
    features = surface_features(TOKENS, groups=torch.arange(4), position=-2)
    assert features["token"].tolist() == [[0]] * 4


def test_the_most_widespread_tokens_are_kept():
    bag = surface_features(TOKENS, groups=torch.arange(4), max_features=2)["bag"]
    assert bag.tolist() == [[1, 1], [2, 1], [1, 0], [0, 1]]  # 5 and 9
