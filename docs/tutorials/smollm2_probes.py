"""What SmolLM2-135M knows where: latents of sums and of sentences, at every layer and position.

usage: python docs/tutorials/smollm2_probes.py CHECKPOINT OUT [LAYER_STRIDE]

Writes a store of activations, a map per latent and its table, and prints the numbers of
docs/tutorials/smollm2_probes.md, which walks through them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

import figures
from analyses.probe_positions import STRENGTH, map_positions
from mechinterp import load
from mechinterp.files import write_table
from mechinterp.hooked import HookedModel
from mechinterp.store import ActivationStore, capture
from mechinterp.tasks.base import Items
from mechinterp.tasks.sentiment import NEGATIVE, POSITIVE
from mechinterp.threads import limit_threads
from probes import fit_many
from probes.folds import grouped_folds

SUMMANDS = list(product(range(20, 80), range(10)))
EXAMPLES = "12 + 5 = 17\n43 + 9 = 52\n"
MALE = """man/men boy/boys king/kings father/fathers brother/brothers son/sons husband/husbands
    prince/princes actor/actors lord/lords monk/monks knight/knights guy/guys hero/heroes""".split()
FEMALE = """woman/women girl/girls queen/queens mother/mothers sister/sisters daughter/daughters
    wife/wives lady/ladies nun/nuns mom/moms witch/witches goddess/goddesses widow/widows
    female/females""".split()
VERBS = """saw/sees/see found/finds/find wanted/wants/want loved/loves/love watched/watches/watch
    bought/buys/buy needed/needs/need liked/likes/like took/takes/take used/uses/use kept/keeps/keep
    sold/sells/sell visited/visits/visit left/leaves/leave""".split()
OBJECTS = "house book garden film hotel room car song story city park picture table river".split()
N_FOLDS, N_PERMUTATIONS = 5, 200


@dataclass(frozen=True)
class Prompts:
    """Prompts of equal length, of which the last `len(roles)` positions are probed."""

    tokens: Int[Tensor, "items positions"]
    roles: tuple[str, ...]
    latents: Mapping[str, Int[Tensor, " items"]]
    groups: Int[Tensor, " items"]
    control_types: Mapping[str, Int[Tensor, " items"]]

    @property
    def items(self) -> Items:
        shape = len(self.tokens), len(self.roles)
        return Items(
            tokens=self.tokens[:, -len(self.roles) :],
            labels=torch.zeros(len(self.tokens), dtype=torch.int64),  # nothing is decided here
            latents=self.latents,
            groups=self.groups,
            roles=np.broadcast_to(np.array(self.roles), shape),
        )


def arithmetic(tokenizer: Any) -> Prompts:
    """ "23 + 8 = 3" -> "1": all a from 20 to 79 with all b from 0 to 9, after two worked examples.

    Items with the same two ones digits, in either order, are a group. The control task gives each
    digit of the number that carries the latent a random value.
    """
    a, b = torch.tensor(SUMMANDS).T
    total, ones = a + b, a % 10
    texts = [f"{EXAMPLES}{x} + {y} = {(x + y) // 10}" for x, y in SUMMANDS]
    return Prompts(
        tokens=torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"]),
        roles=("tens of a", "ones of a", "+", "space", "b", "=", "space", "tens of sum"),
        latents={
            "a is 50 or more": (a >= 50).long(),
            "a is odd": a % 2,
            "carry": (ones + b >= 10).long(),
            "sum is odd": total % 2,
            "sum ends in 5 to 9": (total % 10 >= 5).long(),
        },
        groups=torch.minimum(ones, b) * 10 + torch.maximum(ones, b),
        control_types={
            "a is 50 or more": a // 10,
            "a is odd": ones,
            **dict.fromkeys(("carry", "sum is odd", "sum ends in 5 to 9"), b),
        },
    )


def sentences(tokenizer: Any) -> Prompts:
    """ "The queens visited the dreadful hotel because": 14 sets of words, which share none.

    A set is a group, so that a probe is tested on words that it has not seen. Within a set all
    combinations of the four latents occur, each with two adjectives.
    """
    single = [
        [word for word in words if len(tokenizer(f" {word}", add_special_tokens=False)[0]) == 1]
        for words in (NEGATIVE, POSITIVE)
    ]
    texts, rows = [], []
    for group, verb in enumerate(VERBS):
        for female, plural, past, positive, which in product(range(2), repeat=5):
            noun = (MALE, FEMALE)[female][group].split("/")[plural]
            form = verb.split("/")[0 if past else 1 + plural]
            adjective = single[positive][2 * group + which]
            texts.append(f"The {noun} {form} the {adjective} {OBJECTS[group]} because")
            rows.append((female, plural, past, positive, group, 4 * group + 2 * positive + which))
    female, plural, past, positive, group, adjective = torch.tensor(rows).T
    return Prompts(
        tokens=torch.tensor(tokenizer(texts, add_special_tokens=False)["input_ids"]),
        roles=("The", "noun", "verb", "the", "adjective", "object", "because"),
        latents={
            "subject is female": female,
            "subject is plural": plural,
            "past tense": past,
            "adjective is positive": positive,
        },
        groups=group,
        control_types={
            "subject is female": 4 * group + 2 * female + plural,
            "subject is plural": 4 * group + 2 * female + plural,
            "past tense": 4 * group + torch.where(past == 1, 2, plural),
            "adjective is positive": adjective,
        },
    )


def layers(
    store: ActivationStore, stride: int
) -> Iterator[tuple[int, Float[Tensor, "items positions d_model"]]]:
    """The embedding as layer 0, and the output of every block, or of some."""
    yield 0, store["resid_pre.0"]
    for block, x in store.layers("resid_post"):
        if (block + 1) % stride == 0:
            yield block + 1, x


def analyse(model: HookedModel, name: str, prompts: Prompts, out: Path, stride: int) -> None:
    positions = list(range(-len(prompts.roles), 0))
    store = capture(
        model,
        prompts.tokens,
        sites=["resid_pre.0", "resid_post"],
        positions=positions,
        out=out / name / "store",
        covariance_width=0,
    )
    items = prompts.items
    found = map_positions(
        layers(store, stride),
        items,
        control_types=prompts.control_types,
        n_folds=N_FOLDS,
        n_permutations=N_PERMUTATIONS,
    )
    keys = {"task": name, "regime": "pair", "arm": "before", "seed": 0, "step": 0}
    table = found.to_table()
    write_table(
        out / name / "tables" / "probe_positions.parquet", table.assign(needed=True, **keys)
    )
    figures.draw_all(out / name / "tables", out / name, ["probe_positions"], formats=["png"])
    print(f"\n{name}: {len(items)} prompts in {len(items.groups.unique())} groups")
    print_cells(table, items)
    check_strength(store, prompts, stride)


def print_cells(table: pd.DataFrame, items: Items) -> None:
    """AUROC at the last token by layer, beside what the tokens say in order; where it starts."""
    last = str(items.roles[0, -1])
    for latent in items.latents:
        own = table[(table["latent"] == latent) & (table["unit"] == last)]
        own = own.set_index(["kind", "measure", "layer"]).sort_index()
        auroc = own.loc[("latent", "auroc")]
        surface = own.loc[("surface_ordered", "auroc", -1)]
        of_latent = (table["kind"] == "latent") & (table["measure"] == "auroc")
        shown = table[of_latent & (table["latent"] == latent)]
        embedded = shown[shown["layer"] == 0].sort_values("value").iloc[-1]
        print(f"{latent}: in the embedding best at {embedded['unit']!r}, {_interval(embedded)}")
        print(f"  at {last!r}: tokens in order {_interval(surface)}")
        for layer in sorted({*range(0, 31, 5)} & set(auroc.index)):
            selectivity = own.loc[("latent", "selectivity", layer)]
            print(
                f"  layer {layer:2}: AUROC {_interval(auroc.loc[layer])}, "
                f"p {auroc.p_map[layer]:.3f}; selectivity {_interval(selectivity)}"
            )
        sure = shown[shown["p_map"] <= 0.05]
        first = sure.groupby("unit", sort=False)["layer"].min()
        where = ", ".join(f"{unit} {layer}" for unit, layer in first.items())
        print(f"  above chance in {len(sure)} of {len(shown)} cells; from layer: {where or 'none'}")


def _interval(row: pd.Series) -> str:
    return f"{row['value']:.2f} ({row['low']:.2f} to {row['high']:.2f})"


def check_strength(store: ActivationStore, prompts: Prompts, stride: int) -> None:
    """Accuracy at the last token with a tenth and ten times the penalty, all layers in one call."""
    labels = torch.stack(list(prompts.latents.values()))
    folds = grouped_folds(prompts.groups, labels.T, N_FOLDS)
    penalty = STRENGTH * len(folds) * (N_FOLDS - 1) / N_FOLDS
    fits = fit_many(
        (x[:, -1] for _, x in layers(store, stride)),
        labels,
        strengths=[0.1 * penalty, penalty, 10 * penalty],
        folds=folds,
        standardise=True,
        keep_coef=False,
    )
    accuracy = fits.scores.mean(-1)  # layer target strength
    for target, latent in enumerate(prompts.latents):
        moved = (accuracy[:, target, ::2] - accuracy[:, target, 1:2]).mean(0)
        print(
            f"{latent}: accuracy over layers {accuracy[:, target, 1].mean():.3f}; with a tenth of "
            f"the penalty {moved[0]:+.3f}, with ten times {moved[1]:+.3f}"
        )


def print_answers(model: HookedModel, tokenizer: Any, prompts: Prompts) -> None:
    """How often the network itself gives the sum's last digit, on every seventh prompt."""
    with torch.no_grad():
        answers = model(prompts.tokens[::7])[:, -1].argmax(-1).tolist()
    right = [
        tokenizer.decode([answer]) == str((a + b) % 10)
        for answer, (a, b) in zip(answers, SUMMANDS[::7], strict=True)
    ]
    print(f"the network's own last digit is right in {np.mean(right):.0%} of {len(right)} prompts")


def main(checkpoint: str, out: str, stride: int = 1) -> None:
    limit_threads(2)
    model = load(checkpoint)
    tokenizer = model.checkpoint.load_tokenizer()
    for name, make in {"arithmetic": arithmetic, "sentences": sentences}.items():
        prompts = make(tokenizer)
        analyse(model, name, prompts, Path(out), stride)
        if name == "arithmetic":
            print_answers(model, tokenizer, prompts)


if __name__ == "__main__":
    main(*sys.argv[1:3], *(int(value) for value in sys.argv[3:]))
