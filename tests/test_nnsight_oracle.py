"""Sweeps and interventions against nnsight, on modules named by hand for each family."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from tiny_models import (
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    random_tokens,
    shared_model,
    tiny_model,
)

from mechinterp.interventions import Intervention
from mechinterp.patching import logit_difference, sweep

N_ITEMS, N_POSITIONS = 3, 6
CORRECT, WRONG = torch.tensor([1, 2, 3]), torch.tensor([5, 6, 7])
CHANGED = [1, 2, 4]  # where each item's prompts differ
FAMILIES = ["gpt2", "llama", "gpt_neox", "gemma2", "olmo2"]
SEQUENTIAL = [family for family in FAMILIES if family != "gpt_neox"]
GROUPED = [family for family in FAMILIES if family not in ("gpt2", "gpt_neox")]

Edit = tuple[str, int, Any, Any]  # grain, layer, index, new value or function of the old one


@pytest.fixture(scope="module", autouse=True)
def nnsight():
    nnsight = pytest.importorskip("nnsight")
    if hasattr(object, "save"):  # it gives every object of the process this method
        from nnsight._c import unmount

        unmount("save")
    return nnsight


@cache
def network(family: str):
    """A model of its own, so that what nnsight does to modules cannot reach ours."""
    from nnsight import NNsight

    return NNsight(tiny_model(family))


def place(family: str, grain: str, layer: int) -> tuple[Any, str]:
    """nnsight's module of a site, and which of its sides the site is."""
    net = network(family)
    base, attention, projection = {
        "gpt2": ("transformer.h", "attn", "c_proj"),
        "gpt_neox": ("gpt_neox.layers", "attention", "dense"),
    }.get(family, ("model.layers", "self_attn", "o_proj"))
    block = net.get(base)[layer]
    attention = getattr(block, attention)
    post_norms = family in ("gemma2", "olmo2")
    if grain in ("q", "k", "v"):
        fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value"}
        return getattr(attention, fused.get(family, f"{grain}_proj")), "output"
    if grain == "resid_mid":  # what the MLP's branch reads, the same tensor as the skip connection
        norms = {"gpt2": "ln_2", "gemma2": "pre_feedforward_layernorm", "olmo2": "mlp"}
        return getattr(block, norms.get(family, "post_attention_layernorm")), "input"
    return {
        "resid_pre": (block, "input"),
        "resid_post": (block, "output"),
        "attn_out": (block.post_attention_layernorm if post_norms else attention, "output"),
        "mlp_out": (block.post_feedforward_layernorm if post_norms else block.mlp, "output"),
        "head": (getattr(attention, projection), "input"),
    }[grain]


def columns(family: str, grain: str, head: int) -> slice:
    """Where a head stands in the tensor of its site."""
    part = "qkv".index(grain) if grain in ("q", "k", "v") else 0
    if grain == "head" or family in GROUPED:
        start = head * D_HEAD
    elif family == "gpt2":
        start = part * D_MODEL + head * D_HEAD
    else:  # GPT-NeoX: queries, keys and values of head 0, then of head 1, ...
        start = (3 * head + part) * D_HEAD
    return slice(start, start + D_HEAD)


@torch.no_grad()
def captured(family: str, tokens: torch.Tensor, grain: str, layer: int) -> torch.Tensor:
    from nnsight import save

    module, side = place(family, grain, layer)
    with network(family).trace(input_ids=tokens, use_cache=False):
        site = module.input if side == "input" else module.output
        site = site[0] if isinstance(site, tuple) else site
        value = save(site.clone())
    return value


@torch.no_grad()
def logits(family: str, tokens: torch.Tensor, edits: list[Edit]) -> torch.Tensor:
    """Of a run with edits, which must come in the order of the network."""
    from nnsight import save

    where = [place(family, grain, layer) for grain, layer, _, _ in edits]
    net = network(family)
    with net.trace(input_ids=tokens, use_cache=False):
        for (module, side), (_, _, index, new) in zip(where, edits, strict=True):
            site = module.input if side == "input" else module.output
            site = site[0] if isinstance(site, tuple) else site
            site[index] = new(site[index]) if callable(new) else new
        out = save(net.output.logits)
    return out


def difference(out: torch.Tensor) -> torch.Tensor:
    items = torch.arange(N_ITEMS)
    return out[items, -1, CORRECT] - out[items, -1, WRONG]


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    clean = random_tokens(N_ITEMS, N_POSITIONS, seed=1)
    corrupt = clean.clone()
    rows = torch.arange(N_ITEMS)
    corrupt[rows, CHANGED] = (corrupt[rows, CHANGED] + 3) % D_VOCAB
    return corrupt, clean


@pytest.mark.parametrize("direction", ["denoising", "noising"])
@pytest.mark.parametrize(
    ("family", "grain"),
    [
        (family, grain)
        for grain in ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
        for family in (SEQUENTIAL if grain == "resid_mid" else FAMILIES)
    ],
)
def test_sweeps_by_position_equal_nnsight(family, grain, direction):
    corrupt, clean = pairs()
    base, source = (corrupt, clean) if direction == "denoising" else (clean, corrupt)
    metric = logit_difference(correct=CORRECT, wrong=WRONG)
    ours = sweep(
        shared_model(family),
        corrupt=corrupt,
        clean=clean,
        grain=grain,
        metric=metric,
        direction=direction,
    )
    assert ours.method == "suffix"
    assert float(ours.effect.abs().max()) > 0.05
    for layer in range(N_LAYERS):
        new = captured(family, source, grain, layer)
        for position in range(N_POSITIONS):
            at = (slice(None), position)
            theirs = difference(logits(family, base, [(grain, layer, at, new[at])]))
            torch.testing.assert_close(ours.values[:, layer, position], theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("by_position", [False, True])
@pytest.mark.parametrize(
    ("family", "grain"),
    [(family, "head") for family in FAMILIES]
    + [(family, grain) for family in ("gpt2", "llama", "gpt_neox") for grain in "qkv"],
)
def test_sweeps_by_head_equal_nnsight(family, grain, by_position):
    corrupt, clean = pairs()
    metric = logit_difference(correct=CORRECT, wrong=WRONG)
    ours = sweep(
        shared_model(family),
        corrupt=corrupt,
        clean=clean,
        grain=grain,
        metric=metric,
        by_position=by_position,
    )
    n_heads = N_KV_HEADS if grain in ("k", "v") and family in GROUPED else N_HEADS
    assert ours.values.shape[:3] == (N_ITEMS, N_LAYERS, n_heads)
    assert float(ours.effect.abs().max()) > 0.01
    for layer in range(N_LAYERS):
        new = captured(family, clean, grain, layer)
        for head in range(n_heads):
            for position in range(N_POSITIONS) if by_position else [slice(None)]:
                at = (slice(None), position, columns(family, grain, head))
                theirs = difference(logits(family, corrupt, [(grain, layer, at, new[at])]))
                mine = ours.values[:, layer, head]
                mine = mine[:, position] if by_position else mine
                torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("grain", ["resid_pre", "attn_out", "mlp_out", "head", "q", "v"])
def test_ablations_and_steering_equal_nnsight(family, grain):
    """Zeros, the mean over items, and a function of what is there, at a head and some positions."""
    _, tokens = pairs()
    hooked, layer, where = shared_model(family), 1, [2, 4]
    site, chosen = f"{grain}.{layer}", slice(None)
    if grain in ("head", "q", "v"):
        site, chosen = f"{grain}.{layer}.1", columns(family, grain, 1)
    at = (slice(None), where, chosen)
    mean = captured(family, tokens, grain, layer)[at].mean(0)
    unpatched = logits(family, tokens, [])
    torch.testing.assert_close(hooked.forward(tokens), unpatched, rtol=0, atol=1e-5)
    for value in (torch.zeros(()), mean, lambda x: 2 * x - 1):
        theirs = logits(family, tokens, [(grain, layer, at, value)])
        ours = hooked.run_with_interventions(tokens, [Intervention(site, value, positions=where)])
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
        assert float((theirs - unpatched).abs().max()) > 0.01


@pytest.mark.parametrize("family", FAMILIES)
def test_interventions_at_once_equal_nnsight(family):
    """Later ones act on what earlier ones left; each item at a position of its own."""
    corrupt, clean = pairs()
    rows, at = torch.arange(N_ITEMS), torch.tensor(CHANGED)
    head = columns(family, "head", 3)
    z, mlp = (captured(family, clean, *site) for site in (("head", 0), ("mlp_out", 1)))
    edits = [
        ("head", 0, (slice(None), slice(None), head), z[..., head]),
        ("mlp_out", 1, (rows, at), mlp[rows, at]),
        ("resid_post", 1, (slice(None), -1), lambda x: 0.5 * x),
        ("attn_out", 2, (slice(None), [0, 5]), 0.0),
    ]
    interventions = [
        Intervention("head.0.3", z[..., head]),
        Intervention("mlp_out.1", mlp[rows, at], positions=at),
        Intervention("resid_post.1", lambda x: 0.5 * x, positions=-1),
        Intervention("attn_out.2", torch.zeros(()), positions=[0, 5]),
    ]
    theirs = logits(family, corrupt, edits)
    ours = shared_model(family).run_with_interventions(corrupt, interventions)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    for left_out in range(len(edits)):  # each does something
        fewer = edits[:left_out] + edits[left_out + 1 :]
        assert float((logits(family, corrupt, fewer) - theirs).abs().max()) > 0.01
