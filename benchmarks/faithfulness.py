"""What a ten-point faithfulness curve costs, in forward passes of the model on the same batch.

Edges (or nodes) of a network are ranked by attribution and circuits of MIB's ten sizes are run,
with everything else at its corrupt value. Two networks, 16 tokens, 8 prompt pairs: SmolLM2-135M,
and a random GPT-2 of 12 layers, 12 heads and width 192. A forward pass is the model's own, on the
clean prompts, unembedded at the last position. A curve also needs the corrupt run, the clean run,
the empty circuit and a check that the full circuit is the model: they are in its time.

Pairs as in `patching.py`: `minimal` share their first two thirds, which a circuit's run reuses;
of `different` nothing is shared. Times are CPU seconds of one thread (with `--device cuda` wall
seconds); medians over rounds in which both take turns, and of the ratios within a round.
"""

from __future__ import annotations

import argparse
import statistics

from measuring import add_model_options, peak_memory, seconds, smollm2  # limits threads first

# isort: split
import torch
from edge_attribution import network
from patching import Case, make_case

from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits import faithfulness_curve
from mechinterp.patching.circuits.faithfulness import SHARES
from mechinterp.patching.edge_attribution import attribute_edges


def measure(case: Case, name: str, *, n_rounds: int) -> str:
    """A line of the table."""
    model, device = case.model, case.model.device
    prompts = {"clean": case.clean, "corrupt": case.corrupt, "metric": case.metric}
    scores = attribute_edges(model, **prompts, n_exact=0).scores
    if name == "nodes":
        scores = scores.nan_to_num().abs().sum(1)
    forward, curve, ratios = [], [], []
    for _ in range(n_rounds + 1):  # the first round is not counted
        begun = seconds(device)
        model.forward(case.clean, positions=-1)
        forward.append(seconds(device) - begun)
        begun = seconds(device)
        found = faithfulness_curve(model, **prompts, scores=scores, n_random=0)
        curve.append(seconds(device) - begun)
        ratios.append(curve[-1] / forward[-1])
    if abs(float(found.faithfulness[-1]) - 1) > 1e-3:
        raise SystemExit(f"{name}: the full circuit is not the model: {found.faithfulness}")
    ratio = statistics.median(ratios[1:])
    return (
        f"{case.name:22} {name:6} {statistics.median(forward[1:]):11.3f} "
        f"{statistics.median(curve[1:]):9.3f} {ratio:8.1f} {ratio / len(SHARES):9.2f} "
        f"{peak_memory(device):7.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["gpt2", "smollm2"])
    parser.add_argument("--pairs", nargs="+", default=["minimal", "different"])
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--items", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    add_model_options(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)

    def report(model: HookedModel) -> None:
        for pairs in options.pairs:
            case = make_case(model, options.items, options.tokens, pairs, options.seed)
            for name in ("edges", "nodes"):
                print(measure(case, name, n_rounds=options.rounds), flush=True)

    for name in options.models:
        print(name)
        print("pairs                  kept   forward (s) curve (s)   passes per point peak MB")
        if name == "gpt2":
            report(network(options.seed, options.device))
        else:
            with smollm2(options.smollm2_dir, options.device) as model:
                report(model)


if __name__ == "__main__":
    main()
