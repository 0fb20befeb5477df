"""From prompt to circuit on SmolLM2-135M: indirect objects, and "greater than".

usage: python docs/tutorials/smollm2_circuits.py CHECKPOINT OUT [N_PAIRS]

Writes a recovery map, a faithfulness curve and the circuit's graph per task, and their tables.
docs/tutorials/smollm2_circuits.md walks through what comes out.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from jaxtyping import Float, Int
from torch import Tensor

import figures
from analyses.circuits import circuit_of_curve
from mechinterp import load
from mechinterp.files import write_table
from mechinterp.hooked import HookedModel
from mechinterp.patching import logit_difference, sweep_many
from mechinterp.patching.circuits import faithfulness_curve
from mechinterp.patching.edge_attribution import attribute_edges
from mechinterp.patching.inference import infer_map
from mechinterp.patching.metrics import Metric
from mechinterp.patching.plots import plot_map
from mechinterp.randomness import derive_rng
from mechinterp.threads import limit_threads

NAMES = """Mary John Tom James Sarah Anna Peter Paul Jack Emma Alice Bob David Daniel Michael Laura
    Kate Simon Mark Robert""".split()
PLACES = "store park school office garden station beach restaurant".split()
THINGS = "book drink ring letter gift ball".split()
EVENTS = "war trip project siege treaty reign".split()


@dataclass(frozen=True)
class Pairs:
    """Counterfactual prompts [items positions], what is measured, and what stands at positions."""

    clean: Int[Tensor, "items positions"]
    corrupt: Int[Tensor, "items positions"]
    metric: Metric
    words: list[str]


@dataclass(frozen=True)
class GreaterThan:
    """Log-odds of the digits above each item's own against the others."""

    token_ids: Int[Tensor, " ten"]
    digit: Int[Tensor, " items"]

    def __call__(
        self, logits: Float[Tensor, "rows ten"], items: Int[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        above = (
            torch.arange(10, device=logits.device) > self.digit.to(logits.device)[items][:, None]
        )
        yes = logits.masked_fill(~above, -torch.inf).logsumexp(1)
        return yes - logits.masked_fill(above, -torch.inf).logsumexp(1)


def indirect_objects(tokenizer: Any, n: int) -> Pairs:
    """ "When Mary and John went to the store, John gave a book to" -> " Mary" (Wang et al. 2022).

    In the corrupt prompt the other one gives, so that the answer is the other name.
    """
    rng = derive_rng(0, "indirect objects")
    clean, corrupt, correct, wrong = [], [], [], []
    for _ in range(n):
        a, b = rng.choice(NAMES, 2, replace=False)
        place, thing = rng.choice(PLACES), rng.choice(THINGS)
        giver, receiver = (a, b) if rng.random() < 0.5 else (b, a)
        text = f"When {a} and {b} went to the {place}, {{}} gave a {thing} to"
        clean.append(text.format(giver))
        corrupt.append(text.format(receiver))
        correct.append(f" {receiver}")
        wrong.append(f" {giver}")
    metric = logit_difference(correct=_single(tokenizer, correct), wrong=_single(tokenizer, wrong))
    return _pairs(tokenizer, clean, corrupt, metric)


def greater_than(tokenizer: Any, n: int) -> Pairs:
    """ "The war lasted from the year 1732 to the year 17" -> a digit above 3 (Hanna et al. 2023).

    In the corrupt prompt the first year's decade is 0, so that any digit would do.
    """
    rng = derive_rng(0, "greater than")
    clean, corrupt, digits = [], [], []
    for _ in range(n):
        event, century = rng.choice(EVENTS), rng.integers(11, 19)
        decade, year = rng.integers(2, 8), rng.integers(2, 9)
        text = f"The {event} lasted from the year {century}{{}}{year} to the year {century}"
        clean.append(text.format(decade))
        corrupt.append(text.format(0))
        digits.append(int(decade))
    ids = _single(tokenizer, [str(digit) for digit in range(10)])
    return _pairs(tokenizer, clean, corrupt, GreaterThan(ids, torch.tensor(digits)))


def _single(tokenizer: Any, words: list[str]) -> Int[Tensor, " words"]:
    ids = [tokenizer(word, add_special_tokens=False)["input_ids"] for word in words]
    assert all(len(tokens) == 1 for tokens in ids), words
    return torch.tensor(ids)[:, 0]


def _pairs(tokenizer: Any, clean: list[str], corrupt: list[str], metric: Metric) -> Pairs:
    tokens = [
        torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"])
        for texts in (clean, corrupt)
    ]
    words = [tokenizer.decode([token]).strip() or "␣" for token in tokens[0][0].tolist()]
    return Pairs(*tokens, metric, words)


def analyse(model: HookedModel, name: str, pairs: Pairs, out: Path) -> None:
    """Exact maps, edge scores, faithfulness, the circuit."""
    prompts = {"clean": pairs.clean, "corrupt": pairs.corrupt}
    maps = sweep_many(
        model, **prompts, grains=["resid_pre", "head"], metrics={"metric": pairs.metric}
    )
    stream, heads = maps["resid_pre", "metric"], maps["head", "metric"]
    print(
        f"{name}: metric {stream.clean_metric.mean():+.2f} on clean prompts, "
        f"{stream.corrupt_metric.mean():+.2f} on corrupt ones, {len(pairs.clean)} pairs"
    )
    inference = infer_map(heads.effect)
    best = heads.normalized.nanmean(0).flatten().argsort(descending=True)[:5]
    for cell in best.tolist():
        layer, head = divmod(cell, model.n_heads)
        print(
            f"  head {layer}.{head}: effect {inference.mean[layer, head]:+.2f} "
            f"({inference.low[layer, head]:+.2f} to {inference.high[layer, head]:+.2f}), "
            f"q = {inference.q[layer, head]:.2g}"
        )
    edges = attribute_edges(
        model, **prompts, metric=pairs.metric, method="EAP-IG-inputs", per_item=True
    )
    curve = faithfulness_curve(
        model, pairs.clean, pairs.corrupt, pairs.metric, edges.scores, n_random=2
    )
    circuit = circuit_of_curve(edges.graph, edges.scores, curve)
    print(
        f"  CPR {curve.cpr:.2f} (random {curve.random_cpr.mean():.2f}), CMD {curve.cmd:.2f} "
        f"(random {curve.random_cmd.mean():.2f}); circuit of {int(circuit.sum())} of "
        f"{edges.graph.n_edges} edges"
    )
    keys = {"task": name, "regime": "pair", "arm": "before", "seed": 0, "step": 0}
    table = edges.to_table()
    table["in_circuit"] = circuit[edges.graph.mask].numpy()
    tables = out / name / "tables"
    write_table(tables / "circuit_edges.parquet", table.assign(**keys))
    write_table(tables / "faithfulness.parquet", curve.to_table().assign(**keys))
    write_table(tables / "resid_pre.parquet", stream.to_table())
    write_table(tables / "heads.parquet", inference.to_table(heads.axes[1:]))
    figures.draw_all(tables, out / name, ["circuits"], formats=["png"])
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(9, 4), width_ratios=[2, 1], layout="constrained"
    )
    plot_map(stream, ax=left)
    left.set_xticks(range(len(pairs.words)), pairs.words, rotation=90, fontsize=8)
    left.set_xlabel("")
    plot_map(heads, ax=right)
    figure.savefig(out / name / "maps.png", dpi=200, metadata={"Software": None})


def main(checkpoint: str, out: str, n_pairs: int = 16) -> None:
    limit_threads(2)
    model = load(checkpoint)
    tokenizer = model.checkpoint.load_tokenizer()
    for name, make in {"indirect_objects": indirect_objects, "greater_than": greater_than}.items():
        analyse(model, name, make(tokenizer, n_pairs), Path(out))


if __name__ == "__main__":
    main(*sys.argv[1:3], *(int(value) for value in sys.argv[3:]))
