"""A network as a graph: who writes to the residual stream, who reads from it, and which edges are.

Writers are the embedding, every attention head (its z through its slice of the output projection)
and every MLP. Readers are the inputs of every head's queries, of every key-value head's keys and
values (at their own grain: grouped-query models have fewer), of every MLP, and the final norm. As
the stream is a sum, a reader reads every writer before it, each by an edge of its own (Elhage et
al. 2021; edges as in ACDC, Conmy et al. 2023, and EAP, Syed et al. 2023).

Attention's output bias belongs to no head and is on no edge: it is the same in every run. Where a
norm follows the attention (Gemma 2 and 3, OLMo 2) heads do not add up, and a layer's attention is
one writer, `attn`. In parallel blocks the MLP does not read its own layer's attention.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

import torch
from einops import rearrange
from jaxtyping import Bool
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.sites import Site

WRITER_KINDS = ("embed", "head", "attn", "mlp")
READER_KINDS = ("q", "k", "v", "mlp", "logits")
_WITHOUT_LAYER = ("embed", "logits")
_WITH_HEAD = ("head", "q", "k", "v")
_SITES = {"head": "head", "attn": "attn_out", "mlp": "mlp_out"}


@dataclass(frozen=True)
class Node:
    """A writer, a reader, or (`mlp`) both. `head` counts key-value heads for k and v.

    `str(node)`: embed, head.2.5, attn.2, mlp.3, q.2.5, k.2.1, logits.
    """

    kind: str
    layer: int | None = None
    head: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in (*WRITER_KINDS, *READER_KINDS):
            kinds = ", ".join(dict.fromkeys((*WRITER_KINDS, *READER_KINDS)))
            raise AnalysisError(f"node kind {self.kind!r}: expected one of {kinds}")
        wants = (self.kind not in _WITHOUT_LAYER, self.kind in _WITH_HEAD)
        if wants != (self.layer is not None, self.head is not None):
            raise AnalysisError(
                f"node {self}: a {self.kind} has {'a' if wants[0] else 'no'} layer and "
                f"{'a' if wants[1] else 'no'} head"
            )

    def __str__(self) -> str:
        parts = (self.kind, self.layer, self.head)
        return ".".join(str(part) for part in parts if part is not None)

    @classmethod
    def parse(cls, name: str | Node) -> Node:
        """`head.2.5`, `logits`, ... or a node itself.

        Raises:
            AnalysisError: not a node.
        """
        if isinstance(name, Node):
            return name
        match = re.fullmatch(r"([a-z]+)(?:\.(\d+))?(?:\.(\d+))?", name)
        if match is None:
            raise AnalysisError(f"node {name!r}: expected KIND, KIND.LAYER or KIND.LAYER.HEAD")
        return cls(match[1], *(None if part is None else int(part) for part in match.groups()[1:]))

    @property
    def site(self) -> Site:
        """Where a writer's activation is read: the head's z, attn_out or mlp_out.

        Raises:
            AnalysisError: the node is the embedding or no writer.
        """
        if self.kind not in _SITES or self.layer is None:
            raise AnalysisError(f"node {self} is at no site")
        return Site(_SITES[self.kind], self.layer, self.head)


@dataclass(frozen=True)
class Graph:
    """Writers and readers of a network, in the order of computation, and the edges between them.

    Every reader reads the first `n_writers_before(reader)` writers and no others. Graphs of
    networks of one shape are equal.

    Attributes:
        heads_write: each head is a writer; otherwise each layer's attention is (`attn`).
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    parallel: bool
    heads_write: bool

    @classmethod
    def of(cls, model: HookedModel) -> Graph:
        """The graph of a network."""
        post_norms = [block.attention_post_norm for block in model.architecture.blocks]
        return cls(
            n_layers=model.n_layers,
            n_heads=model.n_heads,
            n_kv_heads=model.n_kv_heads,
            parallel=model.architecture.parallel,
            heads_write=all(norm is None for norm in post_norms),
        )

    @cached_property
    def writers(self) -> tuple[Node, ...]:
        nodes = [Node("embed")]
        for layer in range(self.n_layers):
            if self.heads_write:
                nodes += [Node("head", layer, head) for head in range(self.n_heads)]
            else:
                nodes.append(Node("attn", layer))
            nodes.append(Node("mlp", layer))
        return tuple(nodes)

    @cached_property
    def readers(self) -> tuple[Node, ...]:
        nodes = []
        for layer in range(self.n_layers):
            nodes += [Node("q", layer, head) for head in range(self.n_heads)]
            nodes += [Node(part, layer, g) for part in "kv" for g in range(self.n_kv_heads)]
            nodes.append(Node("mlp", layer))
        return (*nodes, Node("logits"))

    @property
    def n_edges(self) -> int:
        return int(self.mask.sum())

    @cached_property
    def mask(self) -> Bool[Tensor, "writers readers"]:
        """Which edges exist (on the CPU)."""
        before = torch.tensor([self.n_writers_before(reader) for reader in self.readers])
        return rearrange(torch.arange(len(self.writers)), "w -> w 1") < before

    @cached_property
    def feeds(self) -> Bool[Tensor, "readers writers"]:
        """Which writers a reader's input is turned into: q of a head into that head, k and v of a
        key-value head into all heads of its group, an MLP's input into its output."""
        feeds = torch.zeros(len(self.readers), len(self.writers), dtype=torch.bool)
        group = self.n_heads // self.n_kv_heads
        for row, reader in enumerate(self.readers):
            if reader.layer is None:
                continue
            if reader.kind == "mlp":
                feeds[row, self.mlp_writer(reader.layer)] = True
                continue
            columns = self.attention_writers(reader.layer)
            if self.heads_write:
                assert reader.head is not None
                width = 1 if reader.kind == "q" else group
                start = columns.start + reader.head * width
                columns = slice(start, start + width)
            feeds[row, columns] = True
        return feeds

    def writer_index(self, node: Node | str) -> int:
        """The row of a writer.

        Raises:
            AnalysisError: not a writer of this network.
        """
        return self._index(node, self._writer_rows, "writer")

    def reader_index(self, node: Node | str) -> int:
        """The column of a reader.

        Raises:
            AnalysisError: not a reader of this network.
        """
        return self._index(node, self._reader_columns, "reader")

    def n_writers_before(self, reader: Node | str) -> int:
        """How many writers, counted from the first, a reader reads."""
        reader = self.readers[self.reader_index(reader)]
        if reader.layer is None:
            return len(self.writers)
        before = self.attention_writers(reader.layer)
        return before.stop if reader.kind == "mlp" and not self.parallel else before.start

    def writers_before(self, reader: Node | str) -> tuple[Node, ...]:
        """The writers that a reader reads."""
        return self.writers[: self.n_writers_before(reader)]

    def edges(self) -> list[tuple[Node, Node]]:
        """All edges (writer, reader), in the order of `mask.nonzero()`."""
        return [(self.writers[w], self.readers[r]) for w, r in self.mask.nonzero().tolist()]

    def attention_writers(self, layer: int) -> slice:
        """The rows of a layer's heads, or of its `attn`."""
        n = self.n_heads if self.heads_write else 1
        start = 1 + layer * (n + 1)
        return slice(start, start + n)

    def mlp_writer(self, layer: int) -> int:
        """The row of a layer's MLP."""
        return self.attention_writers(layer).stop

    def attention_readers(self, layer: int, part: str = "qkv") -> slice:
        """The columns of a layer's `q`, `k` or `v`, or of all three."""
        counts = {"q": self.n_heads, "k": self.n_kv_heads, "v": self.n_kv_heads}
        start = layer * (sum(counts.values()) + 1)
        if part == "qkv":
            return slice(start, start + sum(counts.values()))
        start += sum(counts[p] for p in "qkv"[: "qkv".index(part)])
        return slice(start, start + counts[part])

    def mlp_reader(self, layer: int) -> int:
        """The column of a layer's MLP."""
        return self.attention_readers(layer).stop

    @cached_property
    def _writer_rows(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.writers)}

    @cached_property
    def _reader_columns(self) -> dict[Node, int]:
        return {node: i for i, node in enumerate(self.readers)}

    def _index(self, node: Node | str, known: dict[Node, int], role: str) -> int:
        node = Node.parse(node)
        if node not in known:
            nodes = list(known)
            raise AnalysisError(
                f"{node} is no {role} of this network, whose {role}s are {nodes[0]}, {nodes[1]}, "
                f"... {nodes[-2]}, {nodes[-1]}"
            )
        return known[node]
