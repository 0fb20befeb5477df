"""Grafts against copies of the model whose state dict is edited by hand, run whole."""

from __future__ import annotations

import copy
import signal
import time
from functools import cache

import numpy as np
import pandas as pd
import pytest
import torch
from tiny_models import (
    D_HEAD,
    D_MODEL,
    FAMILIES,
    N_HEADS,
    N_KV_HEADS,
    N_LAYERS,
    random_tokens,
    tiny_model,
)
from torch import nn

from analyses.crossing import _values
from mechinterp import decisions
from mechinterp.contexts import padding_arguments
from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel
from mechinterp.patching import components as components_module
from mechinterp.patching.components import (
    components_of,
    differs,
    grafted,
    is_tied,
    n_weights,
)
from mechinterp.patching.crossing import shapley_shares
from mechinterp.patching.graft import component_shares, cross_fitted, graft_components
from mechinterp.patching.inference import infer_map

ACTIONS = (3, 11)
TOKENS = random_tokens(6, 7)
LABELS = torch.tensor([0, 1, 1, 0, 1, 0])
COSTS = {
    "symmetric": decisions.diagonal_utility([1.0, 1.0]),
    "skewed": decisions.diagonal_utility([0.3, 1.7]),
}


@cache
def model(family: str = "llama", seed: int = 0) -> HookedModel:
    return HookedModel(tiny_model(family, seed=seed))


def state(hooked: HookedModel) -> dict[str, torch.Tensor]:
    return {name: x.clone() for name, x in hooked.model.state_dict().items()}


def unchanged(hooked: HookedModel, before: dict[str, torch.Tensor]) -> bool:
    now = hooked.model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[n], before[n]) for n in now)


# ---- the oracle: state dicts edited by hand, family by family ------------------------------------

LLAMA = {
    "embed": ["model.embed_tokens.weight"],
    "final_norm": ["model.norm.weight"],
    "unembed": ["lm_head.weight"],
    "attention_norm": ["model.layers.{}.input_layernorm.weight"],
    "mlp_norm": ["model.layers.{}.post_attention_layernorm.weight"],
    "mlp": ["model.layers.{}.mlp."],
    "attention_bias": ["model.layers.{}.self_attn.o_proj.bias"],
    "q_norm": ["model.layers.{}.self_attn.q_norm.weight"],
    "k_norm": ["model.layers.{}.self_attn.k_norm.weight"],
}
GEMMA = {
    **LLAMA,
    "attention_post_norm": ["model.layers.{}.post_attention_layernorm.weight"],
    "mlp_norm": ["model.layers.{}.pre_feedforward_layernorm.weight"],
    "mlp_post_norm": ["model.layers.{}.post_feedforward_layernorm.weight"],
}
OLMO2 = {
    **LLAMA,
    "attention_post_norm": ["model.layers.{}.post_attention_layernorm.weight"],
    "mlp_post_norm": ["model.layers.{}.post_feedforward_layernorm.weight"],
}
GPT2 = {
    "embed": ["transformer.wte.weight"],
    "pos_embed": ["transformer.wpe.weight"],
    "final_norm": ["transformer.ln_f."],
    "unembed": ["lm_head.weight"],
    "attention_norm": ["transformer.h.{}.ln_1."],
    "mlp_norm": ["transformer.h.{}.ln_2."],
    "mlp": ["transformer.h.{}.mlp."],
    "attention_bias": ["transformer.h.{}.attn.c_proj.bias"],
}
NEOX = {
    "embed": ["gpt_neox.embed_in.weight"],
    "final_norm": ["gpt_neox.final_layer_norm."],
    "unembed": ["lm_head.weight"],
    "attention_norm": ["gpt_neox.layers.{}.input_layernorm."],
    "mlp_norm": ["gpt_neox.layers.{}.post_attention_layernorm."],
    "mlp": ["gpt_neox.layers.{}.mlp."],
    "attention_bias": ["gpt_neox.layers.{}.attention.dense.bias"],
}
NAMES = {"gemma2": GEMMA, "gemma3": GEMMA, "olmo2": OLMO2, "gpt2": GPT2, "gpt_neox": NEOX}


def by_hand(family: str, kind: str, layer: int | None, head: int | None, to: dict, given: dict):
    """Copy a component's weights from one state dict to another, in place."""
    names = NAMES.get(family.removesuffix("_sequential"), LLAMA)
    d = 12 if family == "qwen3_wide_heads" else D_HEAD
    if kind == "embed+unembed":
        prefixes = names["embed"] + names["unembed"]
    elif kind in names:
        prefixes = [name.format(layer) for name in names[kind]]
    else:
        assert kind in ("head", "kv_head")
        at = slice(head * d, (head + 1) * d)
        if family.startswith("gpt_neox"):
            root = f"gpt_neox.layers.{layer}.attention."
            for name in ("query_key_value.weight", "query_key_value.bias"):
                to[root + name][3 * d * head : 3 * d * (head + 1)] = given[root + name][
                    3 * d * head : 3 * d * (head + 1)
                ]
            to[root + "dense.weight"][:, at] = given[root + "dense.weight"][:, at]
        elif family == "gpt2":
            root = f"transformer.h.{layer}.attn."
            for part in range(3):
                rows = slice(part * D_MODEL + head * d, part * D_MODEL + (head + 1) * d)
                for name in ("c_attn.weight", "c_attn.bias"):
                    to[root + name][..., rows] = given[root + name][..., rows]
            to[root + "c_proj.weight"][at] = given[root + "c_proj.weight"][at]
        else:
            root = f"model.layers.{layer}.self_attn."
            if family == "phi3":
                begin = {"q": 0, "k": N_HEADS * d, "v": (N_HEADS + N_KV_HEADS) * d}
                parts = {p: ("qkv_proj", b + head * d) for p, b in begin.items()}
            else:
                parts = {part: (f"{part}_proj", head * d) for part in "qkv"}
            for part in "q" if kind == "head" else "kv":
                module, start = parts[part]
                for name in (f"{root}{module}.weight", f"{root}{module}.bias"):
                    if name in to:
                        to[name][start : start + d] = given[name][start : start + d]
            if kind == "head":
                name = root + "o_proj.weight"
                to[name][:, at] = given[name][:, at]
        return
    matched = [name for name in to if any(name.startswith(prefix) for prefix in prefixes)]
    assert matched
    for name in matched:
        to[name].copy_(given[name])


def copied_with(family: str, target: HookedModel, donor: HookedModel, *components) -> nn.Module:
    copied = copy.deepcopy(target.model)
    edited = {name: x.clone() for name, x in copied.state_dict().items()}
    given = donor.model.state_dict()
    for component in components:
        by_hand(family, component.kind, component.layer, component.head, edited, given)
    copied.load_state_dict(edited)
    return copied


def plain_logits(raw: nn.Module, mask=None, decision=-1) -> torch.Tensor:
    with torch.no_grad():
        logits = raw(TOKENS, **padding_arguments(mask), use_cache=False).logits
    return logits[torch.arange(len(TOKENS)), decision][:, list(ACTIONS)].double()


def plain_values(logits: torch.Tensor, labels=LABELS) -> dict[tuple[str, str], torch.Tensor]:
    values = {}
    for cost, utility in COSTS.items():
        values[cost, "utility"] = decisions.expected_utility(logits, labels, utility).double()
        values[cost, "log_score"] = decisions.log_score(logits, labels, utility)
    return values


# ---- components ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_weight_belongs_to_one_component(family):
    target = model(family)
    touched = {name: torch.zeros_like(x, dtype=torch.int) for name, x in state(target).items()}
    for component in components_of(target):
        for piece in component.pieces:
            piece.of(touched[f"{piece.module}.{piece.name}"]).add_(1)
    parameters = dict(target.model.named_parameters(remove_duplicate=False))
    for name in parameters:
        assert bool((touched[name] == 1).all()), name
    total = sum(p.numel() for p in target.model.parameters())
    assert sum(n_weights(c, target) for c in components_of(target)) == total
    names = [str(component) for component in components_of(target)]
    assert len(set(names)) == len(names)
    assert not any(name.startswith("other") for name in names)
    assert f"head.{N_LAYERS - 1}.{N_HEADS - 1}" in names
    grouped = target.n_kv_heads < target.n_heads
    assert (f"kv_head.0.{N_KV_HEADS - 1}" in names) == grouped
    assert ("embed+unembed" in names) == is_tied(target)


@pytest.mark.parametrize("family", FAMILIES)
def test_grafts_are_state_dict_surgery(family):
    """Every component of every family, the model restored bit for bit after each."""
    target, donor = model(family), model(family, 1)
    before = state(target)
    for component in components_of(target):
        with grafted(target, donor, component) as changed:
            now = {name: x.clone() for name, x in changed.model.state_dict().items()}
            logits = changed.forward(TOKENS)
        assert unchanged(target, before)
        expected = copied_with(family, target, donor, component)
        for name, x in expected.state_dict().items():
            assert torch.equal(now[name], x), (str(component), name)
        with torch.no_grad():
            torch.testing.assert_close(logits, expected(TOKENS).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_graft_of_a_head_is_seen_in_that_head_alone(family):
    """In its block: the queries and outputs of one head; the keys and values of one group. (OLMo 2
    norms the queries of all heads together, so that there the other heads' outputs move too.)"""
    target, donor = model(family), model(family, 1)
    grains = ("q", "k", "v", "head")
    sites = [f"{grain}.1" for grain in grains]
    own = target.capture(TOKENS, sites)
    per_group = target.n_heads // target.n_kv_heads
    for component in components_of(target):
        if component.layer != 1 or component.head is None:
            continue
        with grafted(target, donor, component):
            now = target.capture(TOKENS, sites)
        seen = {
            grain: (now[site] != own[site]).any(-1).any(0).any(0).nonzero().flatten().tolist()
            for grain, site in zip(grains, sites, strict=True)
        }
        head = component.head
        if family == "olmo2":
            assert seen.pop("head") == list(range(N_HEADS))
            assert seen == (
                {"q": [], "k": [head], "v": [head]}
                if component.kind == "kv_head"
                else {"q": [head], "k": [], "v": []}
            )
        elif component.kind == "kv_head":
            group = list(range(per_group * head, per_group * (head + 1)))
            assert seen == {"q": [], "k": [head], "v": [head], "head": group}
        elif target.n_kv_heads < target.n_heads:
            assert seen == {"q": [head], "k": [], "v": [], "head": [head]}
        else:
            assert seen == {grain: [head] for grain in grains}


@pytest.mark.parametrize("family", FAMILIES)
def test_grafting_everything_gives_the_other_network(family):
    target, donor = model(family), model(family, 1)
    before, parameters = state(target), list(target.model.parameters())
    with grafted(target, donor, components_of(target)):
        assert unchanged(target, state(donor))
        assert torch.equal(target.forward(TOKENS), donor.forward(TOKENS))
    assert unchanged(target, before)
    now = list(target.model.parameters())
    assert all(x is y for x, y in zip(parameters, now, strict=True))


def test_tied_and_untied():
    """Where one network ties its embeddings and the other does not, they are two components."""
    tied = model("llama_tied_bias")
    raw = copy.deepcopy(model("llama_tied_bias", 1).model)
    raw.config.tie_word_embeddings = False
    raw.lm_head.weight = nn.Parameter(raw.lm_head.weight.detach() + 0.1)
    untied = HookedModel(raw)
    assert "embed+unembed" in map(str, components_of(tied))
    parts = {str(component): component for component in components_of(tied, tied=False)}
    own, given = state(tied), state(untied)
    with grafted(tied, untied, parts["embed"]):
        now = state(tied)
        assert torch.equal(now["model.embed_tokens.weight"], given["model.embed_tokens.weight"])
        assert torch.equal(now["lm_head.weight"], own["lm_head.weight"])
    with grafted(tied, untied, parts.values()):
        assert torch.equal(tied.forward(TOKENS), untied.forward(TOKENS))
    assert unchanged(tied, own)
    assert is_tied(tied)
    found = graft_components(tied, untied, TOKENS, LABELS, actions=ACTIONS, costs=COSTS)
    assert {"embed", "unembed"} <= set(found.table["kind"])


# ---- restoring -----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_are_back_after_an_error(error):
    target = model("phi3")
    before = state(target)

    def fail() -> None:
        with grafted(target, model("phi3", 1), components_of(target)):
            assert not unchanged(target, before)
            raise error

    with pytest.raises(error):
        fail()
    assert unchanged(target, before)


def test_weights_are_back_when_interrupted_at_any_time():
    """SIGINT at times spread over a measurement, as Ctrl-C sends it."""
    before, after = model("llama"), model("llama", 1)
    states = state(before), state(after)

    def measure() -> None:
        graft_components(
            before, after, TOKENS[:2], LABELS[:2], actions=ACTIONS, costs=COSTS, kinds=["head"]
        )

    measure()
    start = time.perf_counter()
    measure()
    duration = time.perf_counter() - start

    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    handlers = signal.getsignal(signal.SIGINT), signal.signal(signal.SIGALRM, interrupt)
    interrupted = 0
    try:
        for delay in np.linspace(0.05, 0.95, 15) * duration:
            signal.setitimer(signal.ITIMER_REAL, delay)
            try:
                measure()
            except KeyboardInterrupt:
                interrupted += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
            assert unchanged(before, states[0])
            assert unchanged(after, states[1])
    finally:
        signal.signal(signal.SIGALRM, handlers[1])
    assert interrupted > 5
    assert signal.getsignal(signal.SIGINT) is handlers[0]


def test_an_interrupt_while_weights_are_put_back_comes_after(monkeypatch):
    target = model("llama")
    before = state(target)
    undo = components_module._Swap.undo

    class Entries(list):
        def __iter__(self):
            for entry in super().__iter__():
                signal.raise_signal(signal.SIGINT)
                yield entry

    def interrupted_undo(swap) -> None:
        swap.entries = Entries(swap.entries)
        undo(swap)

    monkeypatch.setattr(components_module._Swap, "undo", interrupted_undo)
    with (
        pytest.raises(KeyboardInterrupt),
        grafted(target, model("llama", 1), components_of(target)),
    ):
        pass
    assert unchanged(target, before)


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "family", ["llama", "llama_tied_bias", "gpt2", "gpt_neox", "phi3", "gemma2"]
)
@pytest.mark.parametrize("batch_size", [4, 15, 256])
def test_values_are_those_of_whole_networks(family, batch_size):
    """Every component in both directions: a deep copy with its weights edited, a full forward."""
    models = {"before": model(family), "after": model(family, 1)}
    states = {name: state(m) for name, m in models.items()}
    found = graft_components(
        models["before"],
        models["after"],
        TOKENS,
        LABELS,
        actions=ACTIONS,
        costs=COSTS,
        per_item=True,
        batch_size=batch_size,
    )
    assert all(unchanged(m, states[name]) for name, m in models.items())
    table = found.table.set_index(["component", "direction", "costs", "currency", "readout"])
    assert len(table) == len(found.components) * 2 * len(COSTS) * 2
    own = {name: plain_values(plain_logits(m.model)) for name, m in models.items()}
    for direction in ("before_into_after", "after_into_before"):
        donor, target = direction.split("_into_")
        for i, component in enumerate(found.components):
            copied = copied_with(family, models[target], models[donor], component)
            for (cost, currency), value in plain_values(plain_logits(copied)).items():
                row = table.loc[(str(component), direction, cost, currency, "raw")]
                assert row["differs"]
                assert row["u_graft"] == pytest.approx(float(value.mean()), abs=1e-5)
                change = value - own[target][cost, currency]
                assert row["change"] == pytest.approx(float(change.mean()), abs=1e-5)
                assert row["u_target"] == pytest.approx(float(own[target][cost, currency].mean()))
                assert row["u_donor"] == pytest.approx(float(own[donor][cost, currency].mean()))
                kept = found.changes[direction, cost, currency, "raw"][:, i]
                torch.testing.assert_close(kept, change, rtol=0, atol=1e-5)
                expected = float(change.std()) / len(change) ** 0.5
                assert row["stderr"] == pytest.approx(expected, abs=1e-5)


def test_padding_posteriors_decisions_and_shifts():
    before, after = model("llama"), model("llama", 1)
    lengths = torch.tensor([7, 4, 5, 6, 7, 3])
    mask = (torch.arange(7) < lengths[:, None]).long()
    posterior = torch.tensor([[0.2, 0.8]] * 6, dtype=torch.float64)
    shift = torch.tensor([0.5, -0.5], dtype=torch.float64)
    found = graft_components(
        before,
        after,
        TOKENS,
        posterior,
        actions=ACTIONS,
        costs=COSTS,
        kinds=["head", "mlp", "unembed"],
        directions=["before_into_after"],
        attention_mask=mask,
        decision=lengths - 1,
        action_shifts=(None, shift),
        per_item=True,
        batch_size=14,
    )
    own = plain_values(plain_logits(after.model, mask, lengths - 1) + shift, posterior)
    for i, component in enumerate(found.components):
        copied = copied_with("llama", after, before, component)
        logits = plain_logits(copied, mask, lengths - 1) + shift
        for key, value in plain_values(logits, posterior).items():
            kept = found.changes["before_into_after", *key, "raw"][:, i]
            torch.testing.assert_close(kept, value - own[key], rtol=0, atol=1e-5)


def test_refits_are_given_the_grafted_network():
    before, after = model("llama"), model("llama", 1)
    seen = []

    def refit(logits, final, utility):
        seen.append(final)
        return {"flipped": -logits}

    found = graft_components(
        before,
        after,
        TOKENS,
        LABELS,
        actions=ACTIONS,
        costs={"symmetric": COSTS["symmetric"]},
        kinds=["mlp"],
        directions=["after_into_before"],
        refit=refit,
    )
    assert set(found.table["readout"]) == {"raw", "flipped"}
    assert len(seen) == 2 + N_LAYERS  # the two networks and every MLP
    copied = copied_with("llama", before, after, found.components[1])
    with torch.no_grad():
        final = copied.model(TOKENS).last_hidden_state[:, -1]
    torch.testing.assert_close(seen[3], final, rtol=0, atol=1e-5)
    row = found.table.query("readout == 'flipped' and layer == 1 and currency == 'log_score'")
    expected = plain_values(-plain_logits(copied))["symmetric", "log_score"].mean()
    assert row["u_graft"].item() == pytest.approx(float(expected), abs=1e-5)


def test_bias_and_head_refits_are_the_crossings():
    """`analyses.crossing` reads its hybrids the same way."""
    before, after = model("llama"), model("llama", 1)
    tokens = random_tokens(60, 7, seed=5)
    labels = torch.arange(60) % 2
    folds = torch.arange(60) // 2 % 3
    found = graft_components(
        before,
        after,
        tokens,
        labels,
        actions=ACTIONS,
        costs=COSTS,
        kinds=["unembed"],
        directions=["before_into_after"],
        refit=cross_fitted(labels, folds),
    ).table.set_index(["costs", "currency", "readout"])
    last = after.capture(tokens, "resid_post.2", positions=-1)["resid_post.2"]
    with torch.no_grad():
        final = after.final_norm(last)
        logits = before.unembed(final, torch.tensor(ACTIONS)).double()
    for cost, utility in COSTS.items():
        weights = decisions.action_weights(labels, utility)
        expected = _values(logits, final, weights, folds, labels, utility)
        for (currency, readout), value in expected.items():
            row = found.loc[(cost, currency, readout)]
            assert row["u_graft"] == pytest.approx(float(value.mean()), abs=1e-4)


def test_what_does_not_differ_changes_nothing_and_is_not_run(monkeypatch):
    before = model("llama")
    raw = copy.deepcopy(before.model)
    with torch.no_grad():
        raw.model.layers[1].self_attn.q_proj.weight[D_HEAD : 2 * D_HEAD] += 0.5
    after = HookedModel(raw)
    changed = [str(c) for c in components_of(before) if differs(c, before, after)]
    assert changed == ["head.1.1"]
    found = graft_components(
        before, after, TOKENS, LABELS, actions=ACTIONS, costs=COSTS, per_item=True
    )
    rows = found.table[found.table["differs"]]
    assert set(rows["component"]) == {"head.1.1"}
    # Nothing else differs, so this component is the whole change.
    scores = rows[rows["currency"] == "log_score"]
    np.testing.assert_allclose(scores["u_graft"], scores["u_donor"], atol=1e-6)
    assert bool((found.table.loc[~found.table["differs"], "change"] == 0).all())
    shares = component_shares(found.table, scale={"utility": 1.0, "log_score": 1.0})
    here = shares.query("component == 'head.1.1' and currency == 'log_score'")
    gap = scores[scores["direction"] == "after_into_before"].eval("u_donor - u_target")
    np.testing.assert_allclose(here["share"].sort_values(), gap.sort_values(), atol=1e-6)
    np.testing.assert_allclose(here["interaction"], 0, atol=1e-6)
    inferred = found.infer(direction="after_into_before", costs="skewed")
    expected = infer_map(found.changes["after_into_before", "skewed", "log_score", "raw"])
    torch.testing.assert_close(inferred.p, expected.p)
    assert int((inferred.p < 1).sum()) <= 1


def test_shares_are_the_crossings():
    before, after = model("llama"), model("llama", 1)
    table = graft_components(
        before, after, TOKENS, LABELS, actions=ACTIONS, costs=COSTS, kinds=["mlp"]
    ).table
    shares = component_shares(table, scale={"utility": 2.0, "log_score": 3.0}, margin=0.1)
    one = table.query("component == 'mlp.2' and costs == 'skewed' and currency == 'log_score'")
    into_before, into_after = (
        one[one["direction"] == d].iloc[0] for d in ("after_into_before", "before_into_after")
    )
    expected = shapley_shares(
        into_before["u_target"],
        into_after["u_graft"],
        into_before["u_graft"],
        into_after["u_target"],
        scale=3.0,
        margin=0.1,
    )
    row = shares.query("component == 'mlp.2' and costs == 'skewed' and currency == 'log_score'")
    assert row["share"].item() == pytest.approx(expected.phi_front)
    assert row["interaction"].item() == pytest.approx(expected.interaction)
    assert row["valid"].item() == expected.valid


def test_refusals():
    before = model("llama")

    def run(after: HookedModel, **options) -> pd.DataFrame:
        options = {"actions": ACTIONS, "costs": COSTS, **options}
        return graft_components(before, after, TOKENS, LABELS, **options).table

    capped = copy.deepcopy(before.model)
    capped.config.rms_norm_eps = 0.1
    rotated = copy.deepcopy(before.model)
    rotated.model.rotary_emb.inv_freq *= 2
    shorter = copy.deepcopy(before.model)
    shorter.model.layers = shorter.model.layers[:2]
    for bad, match in (
        (lambda: run(model("qwen3")), "one architecture"),
        (lambda: run(HookedModel(shorter, self_test=False)), "one shape and dtype"),
        (lambda: run(HookedModel(copy.deepcopy(before.model).double())), "one shape and dtype"),
        (lambda: run(HookedModel(capped)), "rms_norm_eps"),
        (lambda: run(HookedModel(rotated)), "inv_freq"),
        (lambda: run(before, kinds=["neuron"]), "kinds"),
        (lambda: run(before, directions=["a_into_b"]), "directions"),
    ):
        with pytest.raises(AnalysisError, match=match):
            bad()
    found = graft_components(before, before, TOKENS, LABELS, actions=ACTIONS, costs=COSTS)
    with pytest.raises(AnalysisError, match="per_item"):
        found.infer(direction="before_into_after", costs="skewed")
    odd = copy.deepcopy(before.model)
    odd.model.layers[0].self_attn.k_proj = nn.Sequential(odd.model.layers[0].self_attn.k_proj)
    with pytest.raises(ModelError, match="Sequential"):
        components_of(HookedModel(odd, self_test=False))
