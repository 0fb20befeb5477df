"""Small attention models with circuits written into their weights by hand.

GPT-2s whose residual stream is divided into named slots of one-hot features: the token, the
position, and what heads and MLPs write. Two dimensions hold a large constant, +SIZE and -SIZE, and
one holds minus the sum of all others, so that the mean is always 0 and the variance that of the
constant: every layer norm is the identity on the slots to within (stream / SIZE)^2, about 1e-5.

In every model there are decoys as well: heads and MLPs with random weights that read everything and
write to a slot that nobody of the circuit reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from mechinterp.hooked import HookedModel
from mechinterp.patching.metrics import LogitDifference, logit_difference

N_LAYERS, N_HEADS, D_HEAD, D_MLP = 2, 2, 32, 8
D_MODEL = N_HEADS * D_HEAD
SIZE = 1000.0
SHARPNESS = 12.0  # of attention, in log-odds between a match and none

Dims = Sequence[int]
Edges = frozenset[tuple[str, str]]


@dataclass
class Builder:
    """A GPT-2 with empty weights and named slots, to be filled."""

    tokens: Sequence[str]
    n_positions: int
    slots: dict[str, int] = field(default_factory=dict)  # name -> width

    def __post_init__(self) -> None:
        self.at: dict[str, list[int]] = {}
        self.decoy_nodes: tuple[str, ...] = ()
        widths = {"token": len(self.tokens), "position": self.n_positions, **self.slots, "decoy": 4}
        start = 0
        for name, width in widths.items():
            self.at[name] = list(range(start, start + width))
            start += width
        self.balance = start
        assert start + 3 <= D_MODEL
        config = GPT2Config(
            vocab_size=len(self.tokens),
            n_embd=D_MODEL,
            n_layer=N_LAYERS,
            n_head=N_HEADS,
            n_inner=D_MLP,
            n_positions=self.n_positions,
            activation_function="relu",
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
            attn_implementation="eager",
        )
        self.raw = GPT2LMHeadModel(config).eval()
        self.base = self.raw.transformer
        with torch.no_grad():
            for parameter in self.raw.parameters():
                parameter.zero_()
            for norm in (
                self.base.ln_f,
                *(n for block in self.base.h for n in (block.ln_1, block.ln_2)),
            ):
                norm.weight[: self.balance] = SIZE * (2 / D_MODEL) ** 0.5
            self.write(self.base.wte.weight, torch.eye(len(self.tokens)), self.at["token"])
            self.write(self.base.wpe.weight, torch.eye(self.n_positions), self.at["position"])
            self.base.wpe.weight[:, -2:] = torch.tensor([SIZE, -SIZE])

    def write(self, matrix: torch.Tensor, values: torch.Tensor, dims: Dims) -> None:
        """Rows of `matrix` write `values` to these dimensions, and keep the stream's mean at 0."""
        matrix[:, dims] += values
        matrix[:, self.balance] -= values.sum(1)

    @torch.no_grad()
    def head(
        self, name: str, matches: Sequence[tuple[int, int]], source: Dims, target: Dims
    ) -> None:
        """A head that attends where query feature q meets key feature k, for (q, k) in `matches`,
        and copies the features `source` from there to `target`."""
        layer, head = map(int, name.split("."))
        attention = self.base.h[layer].attn
        start = head * D_HEAD
        scale = (SHARPNESS * D_HEAD**0.5) ** 0.5
        assert max(len(matches), len(source)) <= D_HEAD
        for channel, (query, key) in enumerate(matches):
            attention.c_attn.weight[query, start + channel] = scale
            attention.c_attn.weight[key, D_MODEL + start + channel] = scale
        for channel, dim in enumerate(source):
            attention.c_attn.weight[dim, 2 * D_MODEL + start + channel] = 1.0
        rows = attention.c_proj.weight[start : start + len(source)]
        self.write(rows, torch.eye(len(source)), target)

    @torch.no_grad()
    def neurons(
        self, layer: int, units: Sequence[tuple[dict[int, float], float, dict[int, float]]]
    ) -> None:
        """MLP units relu(sum of weight * feature + bias), each written with weights to features."""
        mlp = self.base.h[layer].mlp
        for unit, (read, bias, written) in enumerate(units):
            for dim, weight in read.items():
                mlp.c_fc.weight[dim, unit] = weight
            mlp.c_fc.bias[unit] = bias
            for dim, weight in written.items():
                self.write(mlp.c_proj.weight[unit : unit + 1], torch.tensor([[weight]]), [dim])

    @torch.no_grad()
    def unembed(self, dims: Dims, tokens: Sequence[str], scale: float) -> None:
        for dim, token in zip(dims, tokens, strict=True):
            self.raw.lm_head.weight[self.tokens.index(token), dim] = scale

    @torch.no_grad()
    def decoys(self, heads: Sequence[str], mlps: Sequence[int]) -> None:
        """Random heads and MLPs that read all slots and write to the decoy slot."""
        generator = torch.Generator().manual_seed(0)
        self.decoy_nodes = (
            *(f"head.{head}" for head in heads),
            *(f"mlp.{layer}" for layer in mlps),
        )

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        n = self.balance
        for name in heads:
            layer, head = map(int, name.split("."))
            attention = self.base.h[layer].attn
            for part in range(3):
                columns = slice(
                    part * D_MODEL + head * D_HEAD, part * D_MODEL + (head + 1) * D_HEAD
                )
                attention.c_attn.weight[:n, columns] = random(n, D_HEAD)
            rows = attention.c_proj.weight[head * D_HEAD : (head + 1) * D_HEAD]
            self.write(rows, 0.3 * random(D_HEAD, 4), self.at["decoy"])
        for layer in mlps:
            mlp = self.base.h[layer].mlp
            mlp.c_fc.weight[:n] = random(n, D_MLP)
            self.write(mlp.c_proj.weight, 0.3 * random(D_MLP, 4), self.at["decoy"])

    def encode(self, prompt: str) -> list[int]:
        return [self.tokens.index(token) for token in prompt.split()]


@dataclass(frozen=True)
class MicroTask:
    """A model, pairs of prompts, and the edges through which what differs between them flows."""

    name: str
    model: HookedModel
    clean: torch.Tensor
    corrupt: torch.Tensor
    metric: LogitDifference
    edges: Edges
    decoys: tuple[str, ...]


def _task(
    name: str, builder: Builder, prompts: Sequence[tuple[str, str, str, str]], edges: Sequence[str]
) -> MicroTask:
    """`prompts`: clean, corrupt, the answer to the clean one, the answer to the corrupt one."""
    clean, corrupt = (torch.tensor([builder.encode(p[i]) for p in prompts]) for i in (0, 1))
    right, wrong = (torch.tensor([builder.encode(p[i])[0] for p in prompts]) for i in (2, 3))
    pairs = (edge.split(" -> ") for edge in edges)
    return MicroTask(
        name,
        HookedModel(builder.raw),
        clean,
        corrupt,
        logit_difference(correct=right, wrong=wrong),
        frozenset((writer, reader) for writer, reader in pairs),
        builder.decoy_nodes,
    )


def copy() -> MicroTask:
    """head.0.1 looks from the last position at position 1 and copies the token there."""
    letters = list("ABCD")
    b = Builder(letters, 5, {"answer": 4})
    position = b.at["position"]
    b.head("0.1", [(position[3], position[1])], b.at["token"], b.at["answer"])
    b.unembed(b.at["answer"], letters, 4.0)
    b.decoys(["0.0", "1.0", "1.1"], [0, 1])
    prompts = [
        ("C A B D", "C B B D", "A", "B"),
        ("D C C B", "D A C B", "C", "A"),
        ("A D B A", "A B B A", "D", "B"),
    ]
    return _task("copy", b, prompts, ["embed -> v.0.1", "head.0.1 -> logits"])


def _induction_model() -> Builder:
    """head.0.0 copies the token before; head.1.1 looks for its own token there, copies what
    follows."""
    letters = list("ABCDE")
    b = Builder(letters, 5, {"before": 5, "answer": 5})
    position, token = b.at["position"], b.at["token"]
    before = [(position[p], position[p - 1]) for p in range(1, 5)]
    b.head("0.0", before, token, b.at["before"])
    b.head("1.1", list(zip(token, b.at["before"], strict=True)), token, b.at["answer"])
    b.unembed(b.at["answer"], letters, 4.0)
    b.decoys(["0.1", "1.0"], [0, 1])
    return b


def induction() -> MicroTask:
    """A B C D A: after A comes B; in C B A D A it is D. What differs is which token is before."""
    prompts = [
        ("A B C D A", "C B A D A", "B", "D"),
        ("E C B D E", "B C E D E", "C", "D"),
        ("D A E C D", "E A D C D", "A", "C"),
    ]
    edges = ["embed -> v.0.0", "head.0.0 -> k.1.1", "head.1.1 -> logits"]
    return _task("induction", _induction_model(), prompts, edges)


def induction_query() -> MicroTask:
    """The same model; what differs is the token asked about."""
    prompts = [("A B C D A", "A B C D C", "B", "D"), ("E C B D E", "E C B D B", "C", "D")]
    return _task(
        "induction_query", _induction_model(), prompts, ["embed -> q.1.1", "head.1.1 -> logits"]
    )


def induction_value() -> MicroTask:
    """The same model; what differs is the token that follows."""
    prompts = [("A B C D A", "A E C D A", "B", "E"), ("E C B D E", "E A B D E", "C", "A")]
    return _task(
        "induction_value", _induction_model(), prompts, ["embed -> v.1.1", "head.1.1 -> logits"]
    )


# A marked bit, first or second: m0 m1, n0 n1; bits without a mark: 0 1; what is asked: =.
_BITS = ["0", "1", "m0", "m1", "n0", "n1", "="]


def _bits_model(write: Callable[[Builder], None]) -> Builder:
    """head.0.0 fetches the bit with mark m, head.1.0 that with mark n; mlp.1 puts them together."""
    b = Builder(_BITS, 6, {"first": 2, "second": 2, "answer": 2})
    token = b.at["token"]
    asked = token[_BITS.index("=")]
    for name, mark, slot in (("0.0", "m", "first"), ("1.0", "n", "second")):
        marked = [token[_BITS.index(f"{mark}{bit}")] for bit in "01"]
        b.head(name, [(asked, dim) for dim in marked], marked, b.at[slot])
    write(b)
    b.unembed(b.at["answer"], ["0", "1"], 4.0)
    b.decoys(["0.1", "1.1"], [0])
    return b


def xor() -> MicroTask:
    """The answer is the exclusive or of the two marked bits; unmarked bits stand between."""

    def write(b: Builder) -> None:
        (f0, f1), (s0, s1), (zero, one) = b.at["first"], b.at["second"], b.at["answer"]
        both = [
            ({first: 1.0, second: 1.0}, -1.0, {one if i != j else zero: 1.0})
            for i, first in enumerate((f0, f1))
            for j, second in enumerate((s0, s1))
        ]
        b.neurons(1, both)

    prompts = []
    for first, second in ((0, 0), (0, 1), (1, 0), (1, 1)):
        for flip in (0, 1):
            bits, flipped = [first, second], [first, second]
            flipped[flip] = 1 - flipped[flip]
            pair = [f"1 m{b[0]} 0 n{b[1]} 1 =" for b in (bits, flipped)]
            prompts.append((*pair, str(first ^ second), str(1 - (first ^ second))))
    edges = [
        "embed -> v.0.0",
        "head.0.0 -> mlp.1",
        "embed -> v.1.0",
        "head.1.0 -> mlp.1",
        "mlp.1 -> logits",
    ]
    return _task("xor", _bits_model(write), prompts, edges)


def two_paths() -> MicroTask:
    """The same bit with mark m by head.0.0 and by head.1.0; mlp.1 says 1 if either says so.

    Each path is enough, so either may be taken out of the network and nothing happens.
    """
    b = Builder(_BITS, 6, {"first": 2, "second": 2, "answer": 2})
    token = b.at["token"]
    asked = token[_BITS.index("=")]
    marked = [token[_BITS.index(f"m{bit}")] for bit in "01"]
    for name, slot in (("0.0", "first"), ("1.0", "second")):
        b.head(name, [(asked, dim) for dim in marked], marked, b.at[slot])
    (_, f1), (_, s1), (zero, one) = b.at["first"], b.at["second"], b.at["answer"]
    either = {f1: 1.0, s1: 1.0}
    b.neurons(1, [(either, 0.0, {one: 1.0}), (either, -1.0, {one: -1.0}), ({}, 1.0, {zero: 0.5})])
    b.unembed(b.at["answer"], ["0", "1"], 4.0)
    b.decoys(["0.1", "1.1"], [0])
    prompts = [
        ("1 m1 0 n0 1 =", "1 m0 0 n0 1 =", "1", "0"),
        ("0 m1 1 n1 0 =", "0 m0 1 n1 0 =", "1", "0"),
        ("0 n0 1 m1 0 =", "0 n0 1 m0 0 =", "1", "0"),
    ]
    edges = [
        "embed -> v.0.0",
        "head.0.0 -> mlp.1",
        "embed -> v.1.0",
        "head.1.0 -> mlp.1",
        "mlp.1 -> logits",
    ]
    return _task("two_paths", b, prompts, edges)


SINGLE = (copy, induction, induction_query, induction_value, xor)
