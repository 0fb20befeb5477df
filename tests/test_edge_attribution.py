"""Edge attribution against exact one-edge patches by plain hooks, closed forms, TransformerLens."""

from __future__ import annotations

from functools import cache, partial

import numpy as np
import pytest
import torch
from plain_hooks import logits_by_hooks, site_by_hand
from scipy import stats
from tiny_models import (
    D_HEAD,
    D_MODEL,
    D_VOCAB,
    FAMILIES,
    N_HEADS,
    N_LAYERS,
    random_tokens,
    tiny_model,
)
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.attribution import attribute_grains
from mechinterp.patching.circuits import edge_effects
from mechinterp.patching.edge_attribution import METHODS, attribute_edges
from mechinterp.patching.edge_screening import screen_edges
from mechinterp.patching.gradients import path_points
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.metrics import logit_difference

N_ITEMS, N_POSITIONS = 2, 5
METRIC = logit_difference(correct=torch.tensor([1, 2]), wrong=torch.tensor([5, 6]))


@cache
def model(family: str) -> HookedModel:
    return HookedModel(tiny_model(family))


@cache
def without_groups() -> HookedModel:
    """A Llama whose key-value heads are as many as its heads: TransformerLens takes no others."""
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=N_HEADS,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    raw = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.add_(0.25 * torch.randn_like(parameter))
    return HookedModel(raw)


def prompts(n_items: int = N_ITEMS) -> dict[str, torch.Tensor]:
    clean = random_tokens(n_items, N_POSITIONS, seed=1)
    corrupt = clean.clone()
    for item in range(n_items):
        corrupt[item, 1 + item % 3] = (corrupt[item, 1 + item % 3] + 3) % D_VOCAB
    return {"clean": clean, "corrupt": corrupt}


def score(logits):
    return METRIC(logits[:, -1][:, METRIC.token_ids], torch.arange(len(logits)))


def linear(projection, x):
    """A projection without its bias and without its hooks."""
    weight = projection.weight
    return x @ (weight if isinstance(projection, Conv1D) else weight.T)


def reading_hooks(hooked, added):
    """Plain hooks that add `added[reader]` [items positions d_model] to what one reader reads."""
    entering, hooks = {}, []
    for block in hooked.architecture.blocks:

        def enter(x, layer=block.layer):
            entering[layer] = x
            return x

        hooks.append((block.module, "input", enter))

    def project(out, reader, columns, projection, step):
        block, x = hooked.architecture.blocks[reader.layer], entering[reader.layer]
        norm = block.attention_norm or (lambda x: x)
        change = linear(projection, norm(x + step)) - linear(projection, norm(x))
        out = out.clone()
        out[..., columns] += change[..., columns]
        return out

    for reader, step in added.items():
        if reader.kind == "logits":
            hooks.append((hooked.architecture.final_norm, "input", partial(torch.add, step)))
        elif reader.kind == "mlp":
            block = hooked.architecture.blocks[reader.layer]
            hooks.append((block.mlp_norm or block.mlp, "input", partial(torch.add, step)))
        else:
            module, side, columns = site_by_hand(hooked, reader.kind, reader.layer)
            change = partial(
                project, reader=reader, columns=columns[reader.head], projection=module, step=step
            )
            hooks.append((module, side, change))
    return hooks


def writer_outputs(hooked, tokens):
    """What every writer adds to the stream [writers items positions d_model], by plain hooks."""
    read = {}

    def see(tensor, key):
        read[key] = tensor
        return tensor

    hooks = [(hooked.architecture.blocks[0].module, "input", partial(see, key="embed"))]
    for layer in range(hooked.n_layers):
        for grain in ("head", "attn_out", "mlp_out"):
            module, side, _ = site_by_hand(hooked, grain, layer)
            hooks.append((module, side, partial(see, key=(grain, layer))))
    with torch.no_grad():
        logits = logits_by_hooks(hooked, tokens, hooks)
        outputs = []
        for writer in Graph.of(hooked).writers:
            if writer.kind == "embed":
                outputs.append(read["embed"])
            elif writer.kind == "head":
                z = read["head", writer.layer].clone()
                z[..., : writer.head * hooked.d_head] = 0
                z[..., (writer.head + 1) * hooked.d_head :] = 0
                projection = hooked.architecture.blocks[writer.layer].output_projection
                outputs.append(linear(projection, z))
            else:
                grain = "attn_out" if writer.kind == "attn" else "mlp_out"
                outputs.append(read[grain, writer.layer])
    return torch.stack(outputs), score(logits)


def writer_steps(hooked, pair):
    return writer_outputs(hooked, pair["clean"])[0] - writer_outputs(hooked, pair["corrupt"])[0]


def scores_by_hooks(hooked, pair, hooks=()):
    """EAP by plain hooks: the gradient at zeros that are added to every reader's input."""
    readers = Graph.of(hooked).readers
    zeros = [torch.zeros(N_ITEMS, N_POSITIONS, hooked.d_model, requires_grad=True) for _ in readers]
    added = dict(zip(readers, zeros, strict=True))
    logits = logits_by_hooks(hooked, pair["corrupt"], [*hooks, *reading_hooks(hooked, added)])
    return torch.stack(torch.autograd.grad(score(logits).sum(), zeros))


def assert_scores(found, expected, mask, tolerance=1e-4):
    assert torch.equal(~found.isnan(), mask.expand_as(found))
    scale = float(expected[mask.expand_as(expected)].abs().max())
    assert scale > 0.05
    torch.testing.assert_close(
        found[..., mask], expected[..., mask], rtol=1e-3, atol=tolerance * max(1, scale)
    )


# ---- EAP -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_every_edge_equals_autograd_through_plain_hooks(family):
    hooked, pair = model(family), prompts()
    found = attribute_edges(hooked, **pair, metric=METRIC, per_item=True)
    gradients = scores_by_hooks(hooked, pair)
    expected = torch.einsum("wipd,ripd->iwr", writer_steps(hooked, pair), gradients)
    mask = Graph.of(hooked).mask
    assert found.position_scores is None
    assert_scores(found.item_scores, expected, mask)
    assert_scores(found.scores, expected.mean(0), mask)


@pytest.mark.parametrize("family", FAMILIES)
def test_small_exact_edge_patches(family):
    """One edge at a time, by plain hooks on the raw model: a small patch does what EAP says."""
    hooked, pair, h = model(family), prompts(), 0.01
    graph = Graph.of(hooked)
    found = attribute_edges(hooked, **pair, metric=METRIC, per_item=True)
    steps = writer_steps(hooked, pair)
    generator = torch.Generator().manual_seed(0)
    edges = graph.mask.nonzero()
    sample = edges[torch.randperm(len(edges), generator=generator)[:25]]
    scale = float(found.item_scores.nan_to_num().abs().max())
    for writer, reader in sample.tolist():
        values = []
        for sign in (1, -1):
            hooks = reading_hooks(hooked, {graph.readers[reader]: sign * h * steps[writer]})
            with torch.no_grad():
                values.append(score(logits_by_hooks(hooked, pair["corrupt"], hooks)))
        slope = (values[0] - values[1]) / (2 * h)
        torch.testing.assert_close(
            found.item_scores[:, writer, reader], slope, rtol=0.02, atol=3e-3 * scale
        )


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox", "gpt_neox_sequential", "without_groups"])
def test_edges_equal_transformer_lens(family):
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
    )

    hooked = without_groups() if family == "without_groups" else model(family)
    pair, graph = prompts(1), Graph.of(hooked)
    config = EdgeAttributionConfig(granularity="edge")
    theirs = attribution_patch(
        hooked.bridge(), pair["clean"], pair["corrupt"], lambda logits: score(logits)[0], config
    )
    kinds = {"attn_head_out": "head", "mlp_out": "mlp", "mlp_in": "mlp", "q_input": "q"}
    kinds |= {"k_input": "k", "v_input": "v", "embed": "embed", "logits": "logits"}

    def name(node):
        layer = None if node.kind == "logits" else node.layer
        return Node(kinds[node.kind], layer, node.head)

    expected = torch.zeros(*graph.mask.shape, N_POSITIONS)
    for (writer, reader), value in theirs.edge_scores.items():
        row, column = graph.writer_index(name(writer)), graph.reader_index(name(reader))
        assert graph.mask[row, column]
        expected[row, column, writer.position] = value
    assert len(theirs.edge_scores) == graph.n_edges * N_POSITIONS
    found = attribute_edges(hooked, **pair, metric=METRIC, by_position=True)
    assert_scores(found.scores, expected.sum(-1), graph.mask)
    parts = found.position_scores
    torch.testing.assert_close(parts[graph.mask], expected[graph.mask], rtol=1e-3, atol=1e-4)
    assert bool(parts[~graph.mask].isnan().all())


class _Linear(nn.Module):
    """An MLP without its nonlinearity."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(x)


@cache
def linear_network() -> HookedModel:
    """Two layers without norms, with linear MLPs and uniform attention (queries are zero)."""
    config = LlamaConfig(
        vocab_size=D_VOCAB,
        hidden_size=D_MODEL,
        num_hidden_layers=2,
        num_attention_heads=N_HEADS,
        num_key_value_heads=2,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    raw = LlamaForCausalLM._from_config(config, attn_implementation="eager").eval()
    raw.model.norm = nn.Identity()
    generator = torch.Generator().manual_seed(0)
    for block in raw.model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
        block.mlp = _Linear(D_MODEL)
    with torch.no_grad():
        for parameter in raw.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        for block in raw.model.layers:
            block.self_attn.q_proj.weight.zero_()
    return HookedModel(raw)


@pytest.mark.parametrize("method", METHODS)
def test_a_linear_network_in_closed_form(method):
    """Every edge of head by head matrix products; there all methods are exact."""
    hooked, pair = linear_network(), prompts()
    raw, graph = hooked.model, Graph.of(hooked)
    found = attribute_edges(hooked, **pair, metric=METRIC, method=method, per_item=True)
    with torch.no_grad():
        embed = raw.model.embed_tokens.weight
        step = embed[pair["clean"]] - embed[pair["corrupt"]]
        head = raw.lm_head.weight
        readout = torch.stack([head[1] - head[5], head[2] - head[6]])
        mean = torch.tril(torch.ones(N_POSITIONS, N_POSITIONS))
        mean = mean / mean.sum(1, keepdim=True)
        values = [b.self_attn.v_proj.weight.view(2, D_HEAD, D_MODEL) for b in raw.model.layers]
        outputs = [
            b.self_attn.o_proj.weight.view(D_MODEL, N_HEADS, D_HEAD) for b in raw.model.layers
        ]
        mlps = [b.mlp.down_proj.weight for b in raw.model.layers]
        # Forwards: what each writer adds. Backwards: what one unit at each reader's input adds.
        stream, steps = step, {"embed": step}
        for layer in range(2):
            mixed = torch.einsum("qk,ikd->iqd", mean, stream)
            for h in range(N_HEADS):
                matrix = outputs[layer][:, h] @ values[layer][h // 2]
                steps[f"head.{layer}.{h}"] = mixed @ matrix.T
                stream = stream + mixed @ matrix.T
            steps[f"mlp.{layer}"] = stream @ mlps[layer].T
            stream = stream + steps[f"mlp.{layer}"]
        gradient = torch.zeros(N_ITEMS, N_POSITIONS, D_MODEL)
        gradient[:, -1] = readout
        readers = {"logits": gradient}
        for layer in (1, 0):
            readers[f"mlp.{layer}"] = gradient @ mlps[layer]
            gradient = gradient + readers[f"mlp.{layer}"]
            through = 0
            for group in range(2):
                matrix = (
                    sum(outputs[layer][:, 2 * group + i] for i in (0, 1)) @ values[layer][group]
                )
                back = torch.einsum("qk,iqd->ikd", mean, gradient @ matrix)
                readers[f"v.{layer}.{group}"] = back
                through = through + back
            gradient = gradient + through
    for w, writer in enumerate(graph.writers):
        for r, reader in enumerate(graph.readers):
            if not graph.mask[w, r]:
                continue
            expected = torch.zeros(N_ITEMS)  # nothing passes through queries and keys
            if str(reader) in readers:
                expected = (steps[str(writer)] * readers[str(reader)]).sum((1, 2))
            torch.testing.assert_close(
                found.item_scores[:, w, r], expected, rtol=1e-3, atol=1e-5, msg=f"{writer} {reader}"
            )
    assert float(found.scores.nan_to_num().abs().max()) > 0.05


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "olmo2"])
def test_a_writers_edges_add_up_to_its_node(family):
    hooked, pair, graph = model(family), prompts(), Graph.of(model(family))
    found = attribute_edges(hooked, **pair, metric=METRIC)
    nodes = attribute_grains(
        hooked, **pair, grains=["resid_pre", "head", "attn_out", "mlp_out"], metric=METRIC
    )
    for writer, total in zip(graph.writers, found.writer_scores.tolist(), strict=True):
        if writer.kind == "embed":
            expected = nodes["resid_pre"].mean[0].sum()
        elif writer.kind == "head":
            expected = nodes["head"].mean[writer.layer, writer.head]
        else:
            grain = "attn_out" if writer.kind == "attn" else "mlp_out"
            expected = nodes[grain].mean[writer.layer].sum()
        assert total == pytest.approx(float(expected), abs=1e-4, rel=1e-3)


@pytest.mark.parametrize("family", ["llama", "gemma3", "mistral"])
def test_sdpa_gives_the_same(family):
    """Only the patterns need eager attention."""
    sdpa = HookedModel(tiny_model(family, attn_implementation="sdpa"))
    for method in METHODS:
        both = [
            attribute_edges(m, **prompts(), metric=METRIC, method=method)
            for m in (sdpa, model(family))
        ]
        torch.testing.assert_close(
            both[0].scores, both[1].scores, rtol=1e-3, atol=1e-4, equal_nan=True
        )


# ---- EAP-IG --------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2", "phi3"])
def test_ig_inputs_is_the_mean_of_gradients_along_the_embeddings(family):
    hooked, pair = model(family), prompts()
    found = attribute_edges(
        hooked, **pair, metric=METRIC, method="EAP-IG-inputs", n_steps=3, per_item=True
    )
    steps = writer_steps(hooked, pair)
    base = writer_outputs(hooked, pair["corrupt"])[0][0]
    first = hooked.architecture.blocks[0].module
    gradients = 0
    for where, weight in path_points(3):
        resid = base + where * steps[0]
        hooks = [(first, "input", lambda _, resid=resid: resid)]
        gradients = gradients + weight * scores_by_hooks(hooked, pair, hooks)
    expected = torch.einsum("wipd,ripd->iwr", steps, gradients)
    assert_scores(found.item_scores, expected, Graph.of(hooked).mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
def test_ig_activations_is_the_mean_of_gradients_along_each_layers_output(family):
    hooked, pair = model(family), prompts()
    graph = Graph.of(hooked)
    found = attribute_edges(
        hooked, **pair, metric=METRIC, method="EAP-IG-activations", n_steps=3, per_item=True
    )
    steps = writer_steps(hooked, pair)
    groups = [("resid_pre", 0, slice(0, 1))]
    for layer in range(N_LAYERS):
        mlp = graph.mlp_writer(layer)
        groups.append(("attn_out", layer, graph.attention_writers(layer)))
        groups.append(("mlp_out", layer, slice(mlp, mlp + 1)))
    expected = torch.zeros(N_ITEMS, len(graph.writers), len(graph.readers))
    for grain, layer, writers in groups:
        module, side, _ = site_by_hand(hooked, grain, layer)
        for where, weight in path_points(3):
            step = where * steps[writers].sum(0)
            hooks = [(module, side, partial(torch.add, step))]
            gradients = weight * scores_by_hooks(hooked, pair, hooks)
            expected[:, writers] += torch.einsum("wipd,ripd->iwr", steps[writers], gradients)
    assert_scores(found.item_scores, expected, graph.mask)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma3"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_integrals_add_up(family, direction):
    """All edges out of the embedding are worth the whole difference (IG-inputs), those out of one
    layer's output its exact exchange (IG-activations)."""
    hooked, pair, graph = model(family), prompts(), Graph.of(model(family))
    run = partial(
        attribute_edges, hooked, **pair, metric=METRIC, direction=direction, per_item=True
    )
    inputs = run(method="EAP-IG-inputs", n_steps=24)
    sign = 1 if direction == "denoising" else -1
    gap = sign * (inputs.clean_metric - inputs.corrupt_metric)
    total = inputs.item_scores[:, 0].nansum(-1)
    torch.testing.assert_close(total, gap, rtol=0.02, atol=0.02)
    activations = run(method="EAP-IG-activations", n_steps=24)
    tokens = pair["corrupt" if sign == 1 else "clean"]
    steps = sign * writer_steps(hooked, pair)
    base = writer_outputs(hooked, tokens)[1]
    for grain in ("attn_out", "mlp_out"):
        for layer in range(N_LAYERS):
            mlp = graph.mlp_writer(layer)
            writers = slice(mlp, mlp + 1)
            if grain == "attn_out":
                writers = graph.attention_writers(layer)
            module, side, _ = site_by_hand(hooked, grain, layer)
            with torch.no_grad():
                hooks = [(module, side, partial(torch.add, steps[writers].sum(0)))]
                exact = score(logits_by_hooks(hooked, tokens, hooks)) - base
            total = activations.item_scores[:, writers].nansum((1, 2))
            torch.testing.assert_close(total, exact, rtol=0.02, atol=0.02)


# ---- batches, padding, guards --------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_equal_single_items(method, side):
    hooked, pair, lengths = model("llama"), prompts(), torch.tensor([[5], [4]])
    position = torch.arange(N_POSITIONS)
    real = position >= N_POSITIONS - lengths if side == "left" else position < lengths
    padded = attribute_edges(
        hooked,
        **pair,
        metric=METRIC,
        method=method,
        per_item=True,
        attention_mask=real.long(),
        decision=-1 if side == "left" else lengths[:, 0] - 1,
    )
    for item in range(N_ITEMS):
        one = {name: tokens[item : item + 1, real[item]] for name, tokens in pair.items()}
        metric = logit_difference(correct=torch.tensor([1 + item]), wrong=torch.tensor([5 + item]))
        alone = attribute_edges(hooked, **one, metric=metric, method=method)
        torch.testing.assert_close(
            padded.item_scores[item], alone.scores, rtol=1e-3, atol=1e-4, equal_nan=True
        )


@pytest.mark.parametrize("method", METHODS)
def test_small_memory_gives_the_same(method):
    run = partial(attribute_edges, model("gpt_neox"), **prompts(), metric=METRIC, method=method)
    whole, small = run(), run(memory_mb=1e-3)
    assert whole.item_scores is None
    torch.testing.assert_close(whole.scores, small.scores, rtol=1e-3, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(whole.clean_metric, small.clean_metric)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "gemma2"])
@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_screened_edges_are_patched_exactly(family, direction):
    hooked, pair = model(family), prompts()
    found = screen_edges(
        hooked, **pair, metric=METRIC, top_k=6, n_sampled=9, direction=direction, seed=2
    )
    graph, sign = found.attribution.graph, 1 if direction == "denoising" else -1
    tokens = pair["corrupt" if sign == 1 else "clean"]
    steps = sign * writer_steps(hooked, pair)
    base = writer_outputs(hooked, tokens)[1]
    assert len(found.edges.unique(dim=0)) == 15
    for (writer, reader), effect in zip(found.edges.tolist(), found.effect.T, strict=True):
        hooks = reading_hooks(hooked, {graph.readers[reader]: steps[writer]})
        with torch.no_grad():
            exact = score(logits_by_hooks(hooked, tokens, hooks)) - base
        torch.testing.assert_close(effect, exact, rtol=1e-3, atol=1e-4)
    top = [(str(w), str(r)) for w, r, _ in found.attribution.top_edges(6)]
    table = found.to_table()
    assert list(zip(table["writer"][:6], table["reader"][:6], strict=True)) == top
    assert table["selected"].tolist() == [True] * 6 + [False] * 9
    assert found.trust.pearson == pytest.approx(table["score"].corr(table["effect"]), abs=1e-5)
    sampled = table[~table["selected"]]["effect"].abs()
    missed = int((sampled > table[table["selected"]]["effect"].abs().min()).sum())
    assert (found.trust.n_missed, found.trust.n_sampled) == (missed, 9)


@pytest.mark.parametrize("direction", ["denoising", "noising"])
def test_scores_say_how_far_they_agree_with_exact_patches(direction):
    hooked, pair = model("llama"), prompts()
    options = {**pair, "metric": METRIC, "direction": direction}
    found = attribute_edges(hooked, **options, n_exact=10**6)
    exact = edge_effects(hooked, **options)
    possible = found.scores.nan_to_num() != 0
    x, y = found.scores[possible], exact[possible]
    assert found.trust.n_exact == found.trust.n_cells == len(x)
    assert found.trust.pearson == pytest.approx(stats.pearsonr(x, y).statistic, abs=1e-4)
    assert found.trust.spearman == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-4)
    few = attribute_edges(hooked, **options, n_exact=7, generator=torch.Generator().manual_seed(1))
    assert few.trust.n_exact == 7
    assert f"Pearson {few.trust.pearson:.2f}" in repr(few)
    assert few.to_table()["n_exact"].tolist() == [7] * few.graph.n_edges
    assert attribute_edges(hooked, **options, n_exact=0).trust is None


def test_screening_of_edges_where_nothing_differs():
    same = {"clean": prompts()["clean"], "corrupt": prompts()["clean"]}
    found = screen_edges(model("llama"), **same, metric=METRIC)
    assert found.effect.shape == (N_ITEMS, 0)
    assert found.trust.n_cells == 0
    with pytest.raises(AnalysisError, match="top_k: expected at least 1"):
        screen_edges(model("llama"), **same, metric=METRIC, top_k=0)


class _LargestTensor(TorchDispatchMode):
    """Remembers the number of elements of the largest tensor that any operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel())
        return result


@pytest.mark.parametrize("method", METHODS)
def test_memory_does_not_grow_with_edges_times_tokens(method):
    n_positions, width = 32, 8
    config = GPT2Config(
        vocab_size=D_VOCAB, n_embd=width, n_layer=6, n_head=4, bos_token_id=None, eos_token_id=None
    )
    hooked = HookedModel(GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval())
    graph = Graph.of(hooked)
    clean, corrupt = (random_tokens(1, n_positions, seed=seed) for seed in (1, 2))
    n_steps = None if method == "EAP" else 2
    with _LargestTensor() as seen:
        attribute_edges(
            hooked, clean=clean, corrupt=corrupt, metric=METRIC, method=method, n_steps=n_steps,
            n_exact=0,
        )  # fmt: skip
    # The writers' differences, or with two steps as rows the attention patterns.
    assert seen.largest <= max(len(graph.writers) * width, 2 * 4 * n_positions) * n_positions
    assert graph.n_edges * n_positions > 4 * seen.largest


def test_directions_mirror_each_other_and_own_activations_do_nothing():
    pair = prompts()
    swapped = {"clean": pair["corrupt"], "corrupt": pair["clean"]}
    run = partial(attribute_edges, model("llama"), metric=METRIC)
    noising, denoising = run(**pair, direction="noising"), run(**swapped)
    torch.testing.assert_close(noising.scores, denoising.scores, equal_nan=True)
    assert torch.equal(noising.clean_metric, denoising.corrupt_metric)
    nothing = run(clean=pair["clean"], corrupt=pair["clean"])
    assert not nothing.scores.nan_to_num().any()


def test_the_model_is_left_as_it_was():
    hooked = HookedModel(tiny_model("gpt2"))
    hooked.model.requires_grad_(False)
    with torch.no_grad():
        for method in METHODS:
            attribute_edges(hooked, **prompts(), metric=METRIC, method=method, n_steps=None)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in hooked.model.modules())
    assert all(p.grad is None for p in hooked.model.parameters())


def test_tables_and_top_edges():
    found = attribute_edges(model("llama"), **prompts(), metric=METRIC, per_item=True)
    table = found.to_table()
    assert len(table) == found.graph.n_edges
    row = table.query("writer == 'head.0.3' and reader == 'k.2.1'").iloc[0]
    w, r = found.graph.writer_index("head.0.3"), found.graph.reader_index("k.2.1")
    assert row["score"] == pytest.approx(float(found.scores[w, r]))
    values = found.item_scores[:, w, r]
    assert row["stderr"] == pytest.approx(float(values.std() / N_ITEMS**0.5), rel=1e-4)
    top = found.top_edges(3)
    largest = np.sort(table["score"].abs())[::-1][:3]
    np.testing.assert_allclose([abs(value) for *_, value in top], largest, rtol=1e-6)
    assert found.graph.mask[
        found.graph.writer_index(top[0][0]), found.graph.reader_index(top[0][1])
    ]
    assert len(found.top_edges(10**6)) == found.graph.n_edges


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"method": "eap"}, "method: expected one of EAP"),
        ({"n_steps": 5}, "n_steps: EAP has one"),
        ({"method": "EAP-IG-inputs", "n_steps": 0}, "n_steps: expected at least 1"),
        ({"direction": "both"}, "direction: expected"),
    ],
)
def test_errors_say_what_is_wrong(wrong, message):
    with pytest.raises(AnalysisError, match=message):
        attribute_edges(model("llama"), **{**prompts(), "metric": METRIC, **wrong})
