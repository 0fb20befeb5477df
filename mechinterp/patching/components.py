"""The components of a network as pieces of its weights, and exchanging them between two networks.

Every weight belongs to exactly one component:

    embed, pos_embed     token and learned position embeddings
    head l.h             one query head: its rows of the query projection and its columns of the
                         output projection; where every head has its own keys and values, those too
    kv_head l.g          where query heads share them: one key/value head
    attention_bias l     the output projection's bias, which belongs to no head
    attention_norm l, mlp_norm l, attention_post_norm l, mlp_post_norm l, q_norm l, k_norm l
    mlp l
    other                anything else, by block or outside the blocks, so that nothing is left out
    final_norm, unembed
    embed+unembed        where both networks tie the two: one weight, one component

Where queries or keys are normed over all heads together (OLMo 2), the weights of one head move the
attention of the others too.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from mechinterp.architectures import Block
from mechinterp.errors import AnalysisError, ModelError
from mechinterp.hooked import HookedModel

NORMS = ("attention_norm", "mlp_norm", "attention_post_norm", "mlp_post_norm")
QK_NORMS = ("q_norm", "k_norm")
PARTS = ("component", "sublayer", "block")
# Ends of the names of config fields that do not change what a network in eval mode computes.
_NOT_COMPUTED_WITH = ("_token_id", "dropout", "pdrop", "initializer_range", "name_or_path")


@dataclass(frozen=True)
class Piece:
    """A parameter by its module and name, or `length` of its entries along `axis` from `start`."""

    module: str
    name: str
    axis: int | None = None  # None: all of it
    start: int = 0
    length: int = 0

    def of(self, tensor: Tensor) -> Tensor:
        return tensor if self.axis is None else tensor.narrow(self.axis, self.start, self.length)


@dataclass(frozen=True)
class Component:
    """A part of the network with weights of its own; `str(component)` is "head.2.5" or "mlp.2"."""

    kind: str
    layer: int | None
    head: int | None
    pieces: tuple[Piece, ...]

    def __str__(self) -> str:
        parts = (self.kind, self.layer, self.head)
        return ".".join(str(part) for part in parts if part is not None)


def components_of(model: HookedModel, *, tied: bool | None = None) -> tuple[Component, ...]:
    """All components in the order of computation; together they hold every weight exactly once.

    Args:
        tied: whether embedding and unembedding are one component; None: whether they are one
            weight in this network.

    Raises:
        ModelError: a projection is not laid out as its family's is.
    """
    raw, architecture = model.model, model.architecture
    paths = {id(module): path for path, module in raw.named_modules()}
    embedding, unembedding = raw.get_input_embeddings(), raw.get_output_embeddings()
    assert isinstance(embedding, nn.Module)
    assert isinstance(unembedding, nn.Module)
    if tied is None:
        tied = is_tied(model)
    taken: set[tuple[str, str]] = set()

    def whole(module: nn.Module | None) -> tuple[Piece, ...]:
        """All parameters of a module that no component has yet."""
        if module is None:
            return ()
        names = ((path.rpartition(".")) for path, _ in _named_parameters(module))
        root = paths[id(module)]
        pieces = [Piece(".".join(p for p in (root, path) if p), name) for path, _, name in names]
        new = tuple(piece for piece in pieces if (piece.module, piece.name) not in taken)
        taken.update((piece.module, piece.name) for piece in new)
        return new

    ends = whole(unembedding)
    first = [("embed", whole(embedding))]
    if tied:
        first, ends = [("embed+unembed", first[0][1] + ends)], ()
    positions = getattr(architecture.base, "wpe", None)
    first.append(("pos_embed", whole(positions)))
    last = [("final_norm", whole(architecture.final_norm)), ("unembed", ends)]
    inside: list[Component] = []
    for block in architecture.blocks:
        inside += _heads(block, paths, taken)
        for name in QK_NORMS:
            norm = getattr(block.attention, name, None)
            inside.append(Component(name, block.layer, None, whole(norm)))
        bias = whole(block.output_projection)
        inside.append(Component("attention_bias", block.layer, None, bias))
        for name in NORMS:
            inside.append(Component(name, block.layer, None, whole(getattr(block, name))))
        inside.append(Component("mlp", block.layer, None, whole(block.mlp)))
        inside.append(Component("other", block.layer, None, whole(block.module)))
    rest = Component("other", None, None, whole(raw))
    before = [Component(kind, None, None, pieces) for kind, pieces in first]
    after = [Component(kind, None, None, pieces) for kind, pieces in last]
    ordered = [*before, rest, *inside, *after]
    return tuple(component for component in ordered if component.pieces)


def merge_components(components: Sequence[Component], by: str) -> tuple[Component, ...]:
    """Components of a block as one: by "block", or by "sublayer", its attention and its MLP, each
    with its norms. By "component" they stay as they are, and outside the blocks always.

    Raises:
        AnalysisError: another `by`.
    """
    if by not in PARTS:
        raise AnalysisError(f"by: expected one of {', '.join(PARTS)}, got {by!r}")
    merged: dict[tuple[str, int | None, int | None], tuple[Piece, ...]] = {}
    for component in components:
        kind, head = component.kind, component.head
        if component.layer is not None and by == "block":
            kind, head = "block", None
        elif component.layer is not None and by == "sublayer" and kind != "other":
            kind, head = "mlp" if kind.startswith("mlp") else "attention", None
        key = (kind, component.layer, head)
        merged[key] = merged.get(key, ()) + component.pieces
    return tuple(Component(*key, pieces) for key, pieces in merged.items())


def is_tied(model: HookedModel) -> bool:
    """Whether embedding and unembedding are one weight."""
    embedding: Any = model.model.get_input_embeddings()
    unembedding: Any = model.model.get_output_embeddings()
    return embedding.weight is unembedding.weight


def check_graftable(donor: HookedModel, target: HookedModel) -> None:
    """Raise an AnalysisError unless the two differ in nothing but their weights."""
    from mechinterp.checkpoints.pretrained import essential_config

    if donor.architecture.name != target.architecture.name:
        raise AnalysisError(
            f"graft: expected networks of one architecture, got {donor.architecture.name} and "
            f"{target.architecture.name}"
        )
    one, other = (dict(_named_parameters(m.model)) for m in (donor, target))
    for name in one | other:
        here, there = (m.get(name) for m in (one, other))
        if here is None or there is None or here.shape != there.shape or here.dtype != there.dtype:
            raise AnalysisError(
                f"graft: {name} is {_describe(here)} in one network and {_describe(there)} in the "
                "other; graft between checkpoints of one shape and dtype"
            )
    constants = dict(donor.model.named_buffers())
    for name, buffer in target.model.named_buffers():
        given = constants.get(name)
        if given is None or not torch.equal(given.to(buffer.device), buffer):
            raise AnalysisError(f"graft: the networks' constants {name} differ, beside the weights")
    configs = [essential_config(m.model.config) for m in (donor, target)]
    for name in configs[0] | configs[1]:
        if name != "tie_word_embeddings" and not name.endswith(_NOT_COMPUTED_WITH):
            here, there = (config.get(name) for config in configs)
            if here != there:
                raise AnalysisError(f"graft: the configs differ in {name}: {here} and {there}")


def differs(component: Component, donor: HookedModel, target: HookedModel) -> bool:
    """Whether any weight of the component differs between the networks, bit for bit."""
    for piece in component.pieces:
        here, there = (piece.of(_parameter(m.model, piece)) for m in (target, donor))
        if not torch.equal(here, there.to(here.device)):
            return True
    return False


def n_weights(component: Component, model: HookedModel) -> int:
    """How many numbers the component has; a weight that stands in two places counts once."""
    sizes = {}
    for piece in component.pieces:
        parameter = _parameter(model.model, piece)
        sizes[id(parameter), piece.axis, piece.start] = piece.of(parameter).numel()
    return sum(sizes.values())


@contextlib.contextmanager
def grafted(
    target: HookedModel, donor: HookedModel, components: Component | Iterable[Component]
) -> Iterator[HookedModel]:
    """Within, `target` has the donor's weights in `components`; then its own again, bit for bit.

    The target's own weights are never written to: where pieces are exchanged, its modules hold
    another tensor for the time being (the donor's own, for whole weights on one device; so train
    neither network inside). So they are back after an error or an interrupt too. Networks are
    taken to fit: see `check_graftable`.
    """
    components = [components] if isinstance(components, Component) else list(components)
    by_weight: dict[tuple[str, str], list[Piece]] = {}
    for component in components:
        for piece in component.pieces:
            by_weight.setdefault((piece.module, piece.name), []).append(piece)
    swap = _Swap()
    # Twice, as an interrupt can come between the end of the inner block and the first step of
    # putting things back.
    try:
        try:
            for pieces in by_weight.values():
                swap.add(target.model, pieces[0], _mixed(target, donor, pieces))
            swap.apply()
            yield target
        finally:
            swap.undo()
    finally:
        swap.undo()


class _Swap:
    """Parameters that stand in their modules in place of others, until `undo`."""

    def __init__(self) -> None:
        self.entries: list[tuple[nn.Module, str, nn.Parameter, nn.Parameter]] = []

    def add(self, model: nn.Module, piece: Piece, new: nn.Parameter) -> None:
        module = model.get_submodule(piece.module)
        self.entries.append((module, piece.name, _parameter(model, piece), new))

    def apply(self) -> None:
        for module, name, _, new in self.entries:
            module._parameters[name] = new

    def undo(self) -> None:
        with _interrupts_later():
            for module, name, own, _ in self.entries:
                module._parameters[name] = own


@contextlib.contextmanager
def _interrupts_later() -> Iterator[None]:
    """Ctrl-C takes effect after the block."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.getsignal(signal.SIGINT)
    if not callable(previous):  # ignored, or handled outside Python
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if came:
            previous(*came[-1])


def _mixed(target: HookedModel, donor: HookedModel, pieces: Sequence[Piece]) -> nn.Parameter:
    """The target's parameter with the donor's in these pieces of it."""
    own, given = (_parameter(m.model, pieces[0]) for m in (target, donor))
    if any(piece.axis is None for piece in pieces):
        return nn.Parameter(given.detach().to(own.device), requires_grad=own.requires_grad)
    with torch.no_grad():
        new = own.detach().clone()
        for piece in pieces:
            piece.of(new).copy_(piece.of(given))
    return nn.Parameter(new, requires_grad=own.requires_grad)


def _heads(block: Block, paths: dict[int, str], taken: set[tuple[str, str]]) -> list[Component]:
    """The block's query heads, and its key/value heads where those are fewer."""
    grouped = block.n_kv_heads < block.n_heads
    counts = (block.n_heads, block.n_kv_heads, block.n_kv_heads)
    n_out = [n * block.d_head for n in counts]
    fused = len(block.qkv) == 1

    def rows(part: int, head: int) -> list[Piece]:
        """Of q, k or v: the outputs of one head, in weight and bias."""
        module = block.qkv[0 if fused else part]
        if not fused:
            start, n = head * block.d_head, n_out[part]
        elif block.qkv_by_head:
            start, n = (3 * head + part) * block.d_head, sum(n_out)
        else:
            start, n = sum(n_out[:part]) + head * block.d_head, sum(n_out)
        return pieces(module, "output", start, n, names=("weight", "bias"))

    def pieces(
        module: nn.Module, side: str, start: int, n: int, *, names: Sequence[str]
    ) -> list[Piece]:
        path = paths[id(module)]
        if not isinstance(module, nn.Linear | Conv1D):
            raise ModelError(f"graft: {path} is a {type(module).__name__}, not a linear projection")
        outputs = 0 if isinstance(module, nn.Linear) else 1  # Conv1D is transposed
        axis = outputs if side == "output" else 1 - outputs
        found = []
        for name in names:
            parameter = module._parameters.get(name)
            if parameter is None:
                continue
            at = axis if parameter.ndim == 2 else 0
            if parameter.shape[at] != n:
                raise ModelError(
                    f"graft: {path}.{name} has {parameter.shape[at]} entries where its heads take "
                    f"{n}; this network is not laid out as its family is"
                )
            taken.add((path, name))
            found.append(Piece(path, name, at, start, block.d_head))
        return found

    def columns(head: int) -> list[Piece]:
        start, n = head * block.d_head, n_out[0]
        return pieces(block.output_projection, "input", start, n, names=("weight",))

    heads = []
    for head in range(block.n_heads):
        parts = (0,) if grouped else (0, 1, 2)
        own = [piece for part in parts for piece in rows(part, head)] + columns(head)
        heads.append(Component("head", block.layer, head, tuple(own)))
    for head in range(block.n_kv_heads if grouped else 0):
        shared = tuple(piece for part in (1, 2) for piece in rows(part, head))
        heads.append(Component("kv_head", block.layer, head, shared))
    return heads


def _named_parameters(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters, also those that stand in two places."""
    return module.named_parameters(remove_duplicate=False)


def _parameter(model: nn.Module, piece: Piece) -> nn.Parameter:
    parameter = model.get_submodule(piece.module)._parameters[piece.name]
    assert parameter is not None
    return parameter


def _describe(parameter: Tensor | None) -> str:
    return "absent" if parameter is None else f"{parameter.dtype} {tuple(parameter.shape)}"
