"""What it costs to store activations: against the bare forward pass, TransformerLens and nnsight.

    python benchmarks/store.py [--items 64] [--rounds 5]
    python benchmarks/store.py --memory

The residual stream after every layer of SmolLM2-135M, at the last token of prompts of random ids.
All methods take turns in one process on one thread, so each round gives ratios to its own bare
forward pass; their medians are shown. Ours ends with a finished store on disk, checksums and
statistics included; the others keep what they captured in memory. With --memory every method runs
in a process of its own, on some items and on ten times as many.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from measuring import add_model_options, peak_memory, seconds, smollm2
from torch import Tensor

from mechinterp.bridge import sharing_twin
from mechinterp.hooked import HookedModel
from mechinterp.store import capture

BATCH_SIZE = 16
Method = Callable[[Tensor], Tensor]  # tokens -> [layers items d_model]


def bare(model: HookedModel) -> Method:
    """Hugging Face's forward pass with logits at every position, as it is called everywhere."""

    def forward(tokens: Tensor) -> Tensor:
        return model.model(tokens, use_cache=False).logits

    return in_batches(forward)


def bare_blocks(model: HookedModel) -> Method:
    """The same without the unembedding, which a store does not need: the stricter measure."""

    def forward(tokens: Tensor) -> Tensor:
        return model.architecture.base(input_ids=tokens, use_cache=False).last_hidden_state

    return in_batches(forward)


def in_batches(forward: Method) -> Method:
    def run(tokens: Tensor) -> Tensor:
        for batch in tokens.split(BATCH_SIZE):
            forward(batch)
        return torch.empty(0)

    return run


def ours(model: HookedModel) -> Method:
    """All of it: a store that is written, synced, checksummed, with mean and covariance."""

    def run(tokens: Tensor) -> Tensor:
        with tempfile.TemporaryDirectory() as directory:
            store = capture(model, tokens, out=directory, batch_size=BATCH_SIZE)
            return torch.stack([x.clone() for _, x in store.layers("resid_post")])

    return run


def without_reading(model: HookedModel) -> Method:
    """The same, the result left on the disk."""

    def run(tokens: Tensor) -> Tensor:
        directory = tempfile.mkdtemp()
        capture(model, tokens, out=directory, batch_size=BATCH_SIZE)
        shutil.rmtree(directory)
        return torch.empty(0)

    return run


def transformer_lens(model: HookedModel, *, everything: bool = False) -> Method:
    """`run_with_cache`, of the residuals only or, as it comes, of everything."""
    bridge = model.bridge()
    names = [site.transformer_lens_name for site in model.sites("resid_post")]

    def run(tokens: Tensor) -> Tensor:
        parts = []
        for batch in tokens.split(BATCH_SIZE):
            _, cache = bridge.run_with_cache(batch, names_filter=None if everything else names)
            parts.append(torch.stack([cache[name][:, -1] for name in names]))
        return torch.cat(parts, dim=1)

    return run


def nnsight(model: HookedModel) -> Method:
    """A trace that saves the last position of every layer's output."""
    from nnsight import NNsight, save

    network = NNsight(sharing_twin(model.model))  # it changes the modules that it is given

    def run(tokens: Tensor) -> Tensor:
        parts = []
        for batch in tokens.split(BATCH_SIZE):
            with network.trace(input_ids=batch, use_cache=False):
                found = save([layer.output[:, -1].clone() for layer in network.model.layers])
            parts.append(torch.stack(list(found)))
        return torch.cat(parts, dim=1)

    return run


METHODS: dict[str, Callable[[HookedModel], Method]] = {
    "forward": bare,
    "forward without unembedding": bare_blocks,
    "store": without_reading,
    "run_with_cache, residuals": transformer_lens,
    "run_with_cache, everything": lambda model: transformer_lens(model, everything=True),
    "nnsight": nnsight,
}


def random_prompts(model: HookedModel, n: int, n_tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1000, model.d_vocab, (n, n_tokens), generator=generator).to(model.device)


@torch.no_grad()
def measure_cost(model: HookedModel, n_items: int, n_tokens: int, n_rounds: int) -> None:
    tokens = random_prompts(model, n_items, n_tokens)
    few = tokens[:4]
    expected = model.capture(few, model.sites("resid_post"), positions=-1).stack("resid_post")
    for make in (ours, transformer_lens, nnsight):
        torch.testing.assert_close(make(model)(few), expected, atol=1e-3, rtol=1e-4)
    methods = {name: make(model) for name, make in METHODS.items()}
    times: dict[str, list[float]] = {name: [] for name in methods}
    for _ in range(n_rounds):
        for name, run in methods.items():
            begun = seconds(model.device)
            run(tokens)
            times[name].append(seconds(model.device) - begun)
    print(f"{'':28} {'seconds':>8} {'items/s':>8} {'x forward':>10} {'x without unembedding':>22}")
    for name, spent in times.items():
        ratios = [
            statistics.median(a / b for a, b in zip(spent, times[base], strict=True))
            for base in list(methods)[:2]
        ]
        second = statistics.median(spent)
        print(
            f"{name:28} {second:8.2f} {n_items / second:8.1f} {ratios[0]:10.3f} {ratios[1]:22.3f}"
        )


def measure_memory(options: argparse.Namespace) -> None:
    """Peak memory of a process that does nothing but this."""
    print(f"{'':28} {'items':>6} {'peak MB':>9}")
    for name in METHODS:
        for n_items in (options.items, 10 * options.items):
            command = [sys.executable, __file__, "--only", name, "--items", str(n_items)]
            command += ["--tokens", str(options.tokens), "--device", options.device]
            if options.smollm2_dir:
                command += ["--smollm2-dir", options.smollm2_dir]
            found = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name:28} {n_items:6} {float(found.stdout):9.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--items", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--only", choices=list(METHODS), help="run it once, print its peak memory")
    add_model_options(parser)
    options = parser.parse_args()
    if options.memory:
        measure_memory(options)
        return
    torch.set_num_threads(1)
    with smollm2(options.smollm2_dir, options.device) as model, torch.no_grad():
        if options.only:
            METHODS[options.only](model)(random_prompts(model, options.items, options.tokens))
            print(peak_memory(model.device))
            return
        measure_cost(model, options.items, options.tokens, options.rounds)


if __name__ == "__main__":
    main()
