"""How much faster exact sweeps are here than in TransformerLens, on the same work, equal results.

A sweep of every grain on SmolLM2-135M (30 layers, 9 heads, 3 key-value heads), 8 prompt pairs, with
the logits' difference as the metric; two kinds of pairs:

  different   every token of the two prompts differs: what is gained without luck
  minimal     the prompts share their first two thirds, as counterfactual pairs mostly do

TransformerLens runs one full forward pass per cell, whatever the cell, with its own hooks (its
`get_act_patch_*` are that loop; they have no grouped keys and values, and take hours here), so its
time is measured on random cells, in turns with our whole sweeps, and scaled to all cells: marked
"extrapolated". On those cells the results must agree. With --organism, a small network instead, on
which both run everything.

Times are CPU seconds of one thread (with `--device cuda` wall seconds); a ratio is the median over
rounds. `--together` sweeps the grains by position in one call and one by one. `--scaling` shows how
our time grows with layers, tokens, items and heads, beside the count of token-layers that it should
grow with.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

from measuring import add_model_options, peak_memory, seconds, smollm2  # limits threads first

# isort: split
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from mechinterp.hooked import HookedModel
from mechinterp.patching import PatchingResult, logit_difference, sweep, sweep_many
from mechinterp.patching.metrics import LogitDifference
from mechinterp.sites import Site

TOLERANCE = 1e-4  # of the metric's scale
GRAINS = {  # name -> (our grain, one position at a time)
    "resid_pre": ("resid_pre", None),
    "attn_out": ("attn_out", None),
    "mlp_out": ("mlp_out", None),
    "head x position": ("head", True),
    "head": ("head", False),
    "q": ("q", False),
    "k": ("k", False),
    "v": ("v", False),
    "pattern": ("pattern", False),
}


@dataclass(frozen=True)
class Case:
    """A model and its counterfactual prompts."""

    name: str
    model: HookedModel
    corrupt: torch.Tensor
    clean: torch.Tensor
    metric: LogitDifference


def make_case(model: HookedModel, n_items: int, n_tokens: int, pairs: str, seed: int) -> Case:
    generator = torch.Generator().manual_seed(seed)
    clean = torch.randint(100, 1000, (n_items, n_tokens), generator=generator) % model.d_vocab
    first = 0 if pairs == "different" else 2 * n_tokens // 3
    corrupt = clean.clone()
    corrupt[:, first:] = (corrupt[:, first:] + 7) % model.d_vocab
    correct, wrong = torch.randint(model.d_vocab, (2, n_items), generator=generator)
    metric = logit_difference(correct=correct, wrong=wrong)
    name = f"{pairs}, {n_tokens} tokens"
    return Case(name, model, corrupt.to(model.device), clean.to(model.device), metric)


def organism(n_layers: int = 3, n_heads: int = 4, device: str = "cpu") -> HookedModel:
    """A Llama of the size that the studies train."""
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=12 * n_heads,
        intermediate_size=128,
        num_hidden_layers=n_layers,
        num_attention_heads=n_heads,
        num_key_value_heads=n_heads,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return HookedModel(model.to(device).eval())


def ours(case: Case, name: str) -> PatchingResult:
    grain, by_position = GRAINS[name]
    return sweep(
        case.model,
        corrupt=case.corrupt,
        clean=case.clean,
        grain=grain,
        by_position=by_position,
        metric=case.metric,
    )


def theirs(case: Case, name: str, cells: list[tuple[int, ...]]) -> torch.Tensor:
    """TransformerLens's loop: one forward pass with one hook per cell. Values [cells items]."""
    grain, by_position = GRAINS[name]
    bridge = case.model.bridge()
    items = torch.arange(len(case.clean), device=case.model.device)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(
            case.clean, names_filter=lambda hook: hook.endswith(_hook(grain, 0).split(".", 2)[2])
        )
        values = []
        for layer, *unit in cells:
            hook_name = _hook(grain, layer)

            def write(site, hook, name=hook_name, unit=unit):  # type: ignore[no-untyped-def]
                clean = cache[name]
                if grain == "pattern" or by_position is None:
                    site[:, unit[0]] = clean[:, unit[0]]
                elif by_position:
                    site[:, unit[1], unit[0]] = clean[:, unit[1], unit[0]]
                else:
                    site[:, :, unit[0]] = clean[:, :, unit[0]]
                return site

            logits = bridge.run_with_hooks(case.corrupt, fwd_hooks=[(hook_name, write)])
            values.append(case.metric(logits[:, -1][:, case.metric.token_ids], items))
    return torch.stack(values)


def _hook(grain: str, layer: int) -> str:
    return Site(grain, layer).transformer_lens_name


def measure(case: Case, name: str, *, n_cells: int, n_rounds: int, seed: int) -> str:
    """A line of the table: medians over rounds in which we run everything and they a few cells."""
    case.model.bridge()  # built outside the clock
    device = case.model.device
    generator = torch.Generator().manual_seed(seed)
    fast, slow, error, scale = [], [], 0.0, 1.0
    shape: tuple[int, ...] = ()
    for _ in range(n_rounds):
        begun = seconds(device)
        result = ours(case, name)
        fast.append(seconds(device) - begun)
        shape = tuple(result.values.shape[1:])
        flat = torch.randint(result.values[0].numel(), (n_cells // n_rounds,), generator=generator)
        cells = [tuple(int(i) for i in torch.unravel_index(cell, shape)) for cell in flat]
        begun = seconds(device)
        values = theirs(case, name, cells)
        slow.append((seconds(device) - begun) / len(cells))
        mine = torch.stack([result.values[(slice(None), *cell)] for cell in cells])
        error = max(error, float((mine.to(values) - values).abs().max()))
        scale = max(scale, float(result.values.abs().max()))
    if error > TOLERANCE * scale:
        raise SystemExit(f"{case.name}, {name}: the sweeps differ by {error:.2g}")
    n_all = torch.tensor(shape).prod().item()
    whole = [n_all * each for each in slow]
    ratio = statistics.median(s / f for s, f in zip(whole, fast, strict=True))
    return (
        f"{case.name:22} {name:16} {n_all:6} {statistics.median(fast):8.2f} "
        f"{statistics.median(whole):10.1f}* {ratio:7.1f}x {error / scale:9.1e} "
        f"{peak_memory(device):7.0f}"
    )


def measure_together(case: Case, n_rounds: int) -> str:
    """All position grains in one sweep against one sweep each."""
    grains = ["resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out"]
    prompts = {"corrupt": case.corrupt, "clean": case.clean}
    device, together, apart = case.model.device, [], []
    for _ in range(n_rounds):
        begun = seconds(device)
        sweep_many(case.model, **prompts, grains=grains, metrics={"": case.metric})
        together.append(seconds(device) - begun)
        begun = seconds(device)
        for grain in grains:
            sweep(case.model, **prompts, grain=grain, metric=case.metric)
        apart.append(seconds(device) - begun)
    ratio = statistics.median(a / t for a, t in zip(apart, together, strict=True))
    return (
        f"{case.name}: {len(grains)} position grains in one sweep "
        f"{statistics.median(together):.1f} s, one by one {statistics.median(apart):.1f} s: "
        f"{ratio:.2f}x; peak {peak_memory(device):.0f} MB"
    )


def measure_scaling(n_rounds: int, device: torch.device) -> Iterator[str]:
    """Our time for resid_pre where every token differs, against the token-layers it should cost."""
    yield "layers tokens  items  heads  seconds  ns/token-layer"
    base = {"n_layers": 6, "n_tokens": 16, "n_items": 32, "n_heads": 4}
    changes = [{}, {"n_layers": 12}, {"n_tokens": 32}, {"n_items": 64}, {"n_heads": 8}]
    for change in changes:
        size = {**base, **change}
        model = organism(size["n_layers"], size["n_heads"], str(device))
        case = make_case(model, size["n_items"], size["n_tokens"], "different", 0)
        times = []
        for _ in range(n_rounds):
            begun = seconds(device)
            ours(case, "resid_pre")
            times.append(seconds(device) - begun)
        layers, tokens = size["n_layers"], size["n_tokens"]
        work = layers * (layers + 1) / 2 * tokens * (tokens + 1) / 2 * size["n_items"]
        spent = statistics.median(times)
        yield (
            f"{layers:6} {tokens:6} {size['n_items']:6} {size['n_heads']:6} {spent:8.2f} "
            f"{1e9 * spent / work:15.0f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--grains", nargs="+", default=list(GRAINS), choices=list(GRAINS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[16])
    parser.add_argument("--pairs", nargs="+", default=["minimal", "different"])
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--cells", type=int, default=33, help="TransformerLens's sample (33)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--organism", action="store_true", help="a small network, not SmolLM2")
    parser.add_argument("--together", action="store_true", help="several grains in one sweep")
    parser.add_argument("--scaling", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.scaling:
        for line in measure_scaling(options.rounds, torch.device(options.device)):
            print(line, flush=True)
        return
    if options.organism:
        context = contextlib.nullcontext(organism(device=options.device))
    else:
        context = smollm2(options.smollm2_dir, options.device)
    with context as model:
        cases = [
            make_case(model, options.items, n_tokens, pairs, options.seed)
            for pairs in options.pairs
            for n_tokens in options.tokens
        ]
        if options.together:
            for case in cases:
                print(measure_together(case, options.rounds), flush=True)
            return
        print(
            f"{'pairs':22} {'grain':16} {'cells':>6} {'ours (s)':>8} {'TL (s)':>11} {'ratio':>8} "
            f"{'max diff':>9} {'peak MB':>7}"
        )
        for case in cases:
            for name in options.grains:
                print(
                    measure(case, name, n_cells=options.cells, n_rounds=options.rounds, seed=0),
                    flush=True,
                )
        print("* extrapolated from random cells")


if __name__ == "__main__":
    main()
