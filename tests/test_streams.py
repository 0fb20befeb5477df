"""Which layers are read, and that what is read is the network's own residual stream."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from analyses.streams import layers_to_read, read_streams
from mechinterp import tasks
from mechinterp.hooked import HookedModel
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model


@pytest.mark.parametrize(
    ("n_layers", "max_layers", "expected"),
    [
        (3, None, (0, 1, 2, 3)),
        (3, 12, (0, 1, 2, 3)),
        (30, 6, (0, 5, 10, 15, 20, 25, 30)),
        (7, 2, (0, 4, 7)),
    ],
)
def test_layers_to_read(n_layers, max_layers, expected):
    assert layers_to_read(n_layers, max_layers) == expected


@given(st.integers(1, 100), st.integers(2, 100))
def test_layers_are_evenly_spaced_and_end_with_the_last(n_layers, max_layers):
    layers = layers_to_read(n_layers, max_layers)
    gaps = [b - a for a, b in itertools.pairwise(layers)]
    assert (layers[0], layers[-1]) == (0, n_layers)
    assert len(layers) == min(n_layers, max_layers) + 1
    assert 1 <= min(gaps) <= max(gaps) <= min(gaps) + 1


def test_fewer_layers_hold_the_same_activations():
    task = tasks.get("triage", linear=[1.5], n_fillers=1)
    config = ModelConfig(n_layers=5, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    organism = initial_model(config, task, seed=0)
    model, items = HookedModel.from_model(organism), task.sample(8, seed=0)
    every, some = read_streams(model, items, task), read_streams(model, items, task, max_layers=2)
    assert list(some.normed) == [0, 2, 5]
    with torch.no_grad():
        theirs = organism(items.tokens, output_hidden_states=True)
    torch.testing.assert_close(every.residual[2], theirs.hidden_states[2][:, -1])
    torch.testing.assert_close(some.normed[5], theirs.hidden_states[5][:, -1])
    expected = theirs.logits[:, -1, list(task.actions)].double()
    for streams in (every, some):
        torch.testing.assert_close(streams.action_logits, expected, atol=1e-5, rtol=0)
        for layer in some.residual:
            torch.testing.assert_close(streams.residual[layer], every.residual[layer])
