"""How much faster edge attribution is here than in TransformerLens, for the same scores.

Both score all edges of a random GPT-2 of 12 layers, 12 heads and width 192 on prompts of 16 tokens,
in pairs, one after the other, and must agree. TransformerLens scores every edge at every position;
ours is timed both ways, summed over positions (what a circuit is selected by) and by position.
TransformerLens takes one prompt pair at a time, so more pairs cost it in proportion. Integrated
gradients, which it lacks, are timed alone. Neither checks its scores against exact patches, as ours
would by default.

Times are CPU seconds of one thread (with `--device cuda` wall seconds): medians of the runs, and of
the ratios within pairs of runs.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

from measuring import seconds as clock  # limits threads first

# isort: split
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechinterp.hooked import HookedModel
from mechinterp.patching.edge_attribution import attribute_edges
from mechinterp.patching.edge_attribution_result import EdgeAttribution
from mechinterp.patching.graph import Graph, Node
from mechinterp.patching.metrics import LogitDifference, logit_difference

N_POSITIONS, VOCABULARY = 16, 1000
TOLERANCE = 1e-4  # of the largest score


def network(seed: int, device: str = "cpu") -> HookedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_embd=192,
        n_layer=12,
        n_head=12,
        n_positions=N_POSITIONS,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    model = GPT2LMHeadModel._from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():  # or attention would be uniform
            if parameter.ndim == 2:
                parameter.mul_(4)
    return HookedModel(model.to(device))


def theirs(model: HookedModel, pairs: dict[str, torch.Tensor], metric: LogitDifference) -> dict:
    """TransformerLens's scores by edge; the metric knows items by number, so one call per pair."""
    from transformer_lens.tools.analysis.attribution_patching import (
        EdgeAttributionConfig,
        attribution_patch,
    )

    def score(logits: torch.Tensor, item: int) -> torch.Tensor:
        return metric(
            logits[:, -1][:, metric.token_ids], torch.tensor([item], device=model.device)
        )[0]

    totals: dict = {}
    n_items = len(pairs["clean"])
    for item in range(n_items):
        found = attribution_patch(
            model.bridge(),
            pairs["clean"][item : item + 1],
            pairs["corrupt"][item : item + 1],
            partial(score, item=item),
            EdgeAttributionConfig(granularity="edge"),
        )
        if n_items == 1:
            return found.edge_scores
        for edge, value in found.edge_scores.items():
            totals[edge] = totals.get(edge, 0.0) + value / n_items
    return totals


def largest_difference(model: HookedModel, ours: EdgeAttribution, scores: dict) -> float:
    """Between their scores and ours by position, in units of the largest."""
    kinds = {"attn_head_out": "head", "mlp_out": "mlp", "mlp_in": "mlp"}
    kinds |= {"q_input": "q", "k_input": "k", "v_input": "v"}
    graph = Graph.of(model)

    def node(theirs) -> Node:
        kind = kinds.get(theirs.kind, theirs.kind)
        return Node(kind, None if kind == "logits" else theirs.layer, theirs.head)

    assert ours.position_scores is not None
    expected = torch.full_like(ours.position_scores, torch.nan)
    for (writer, reader), value in scores.items():
        row, column = graph.writer_index(node(writer)), graph.reader_index(node(reader))
        expected[row, column, writer.position] = value
    if not torch.equal(expected.isnan(), ours.position_scores.isnan()):
        raise SystemExit("the two score different edges")
    error = (expected - ours.position_scores).nan_to_num().abs().max()
    return float(error / expected.nan_to_num().abs().max())


def timed(run: Callable[[], object], device: torch.device) -> tuple[object, float]:
    start = clock(device)
    result = run()
    return result, clock(device) - start


def measure(model: HookedModel, n_items: int, n_pairs: int) -> None:
    clean, corrupt = torch.randint(VOCABULARY, (2, n_items, N_POSITIONS)).to(model.device)
    pairs = {"clean": clean, "corrupt": corrupt}
    correct, wrong = torch.randint(VOCABULARY, (2, n_items))
    metric = logit_difference(correct=correct, wrong=wrong)
    ours = partial(attribute_edges, model, **pairs, metric=metric, n_exact=0)
    runs = {
        "EAP": ours,
        "EAP by position": partial(ours, by_position=True),
        "TransformerLens": partial(theirs, model, pairs, metric),
    }
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    results = {label: run() for label, run in runs.items()}  # the first run is not timed
    for _ in range(n_pairs):
        for label, run in runs.items():
            results[label], spent = timed(run, model.device)
            seconds[label].append(spent)
    error = largest_difference(model, results["EAP by position"], results["TransformerLens"])
    both = results["EAP"].scores - results["EAP by position"].position_scores.sum(-1)
    error = max(
        error, float(both.nan_to_num().abs().max() / results["EAP"].scores.nan_to_num().abs().max())
    )
    if error > TOLERANCE:
        raise SystemExit(f"{n_items} prompt pairs: the scores differ by {error:.2g}")
    for label in ("EAP", "EAP by position"):
        paired = zip(seconds["TransformerLens"], seconds[label], strict=True)
        print(
            f"{n_items:5}  {label:24} {statistics.median(seconds[label]):9.3f} "
            f"{statistics.median(seconds['TransformerLens']):15.2f} "
            f"{statistics.median(s / f for s, f in paired):6.1f}x {error:9.1e}",
            flush=True,
        )
    for method, n_steps in (("EAP-IG-inputs", 5), ("EAP-IG-activations", 5)):
        run = partial(ours, method=method, n_steps=n_steps)
        spent = statistics.median(timed(run, model.device)[1] for _ in range(n_pairs))
        print(f"{n_items:5}  {method + ', 5 steps':24} {spent:9.3f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=5, help="pairs of runs (5)")
    parser.add_argument("--items", type=int, nargs="+", default=[1, 4], help="prompt pairs (1 4)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    options = parser.parse_args()
    torch.set_num_threads(1)
    model = network(options.seed, options.device)
    print(f"{Graph.of(model).n_edges} edges, {N_POSITIONS} positions")
    print("items  method                    ours (s)  TransformerLens   ratio  max diff")
    for n_items in options.items:
        measure(model, n_items, options.pairs)


if __name__ == "__main__":
    main()
