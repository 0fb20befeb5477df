"""Where each model family keeps its parts: a family is one `Layout`, a few attribute names."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from mechinterp.contexts import Context, KeyValues, record_context
from mechinterp.errors import ModelError, SiteError
from mechinterp.sites import Site


@dataclass(frozen=True)
class Layout:
    """Attribute names of one family; the defaults are Llama's, which most families share."""

    base: str = "model"
    blocks: str = "layers"
    final_norm: str = "norm"
    attention: str = "self_attn"
    qkv: tuple[str, str, str] | str = ("q_proj", "k_proj", "v_proj")  # one name: fused
    qkv_by_head: bool = False  # fused as (head, q|k|v) rather than (q|k|v, head)
    attention_projection: str = "o_proj"
    attention_norm: str | None = "input_layernorm"
    mlp: str = "mlp"
    mlp_projection: str = "down_proj"
    mlp_norm: str | None = "post_attention_layernorm"
    attention_post_norm: str | None = None
    mlp_post_norm: str | None = None
    parallel_flag: str | None = None  # the config field that says so


_LLAMA = Layout()
_GEMMA = Layout(
    mlp_norm="pre_feedforward_layernorm",
    attention_post_norm="post_attention_layernorm",
    mlp_post_norm="post_feedforward_layernorm",
)
LAYOUTS = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma2": _GEMMA,
    "gemma3_text": _GEMMA,
    "olmo2": Layout(
        attention_norm=None,
        mlp_norm=None,
        attention_post_norm="post_attention_layernorm",
        mlp_post_norm="post_feedforward_layernorm",
    ),
    "phi3": Layout(qkv="qkv_proj"),
    "gpt2": Layout(
        base="transformer",
        blocks="h",
        final_norm="ln_f",
        attention="attn",
        qkv="c_attn",
        attention_projection="c_proj",
        attention_norm="ln_1",
        mlp_projection="c_proj",
        mlp_norm="ln_2",
    ),
    "gpt_neox": Layout(
        base="gpt_neox",
        final_norm="final_layer_norm",
        attention="attention",
        qkv="query_key_value",
        qkv_by_head=True,
        attention_projection="dense",
        mlp_projection="dense_4h_to_h",
        parallel_flag="use_parallel_residual",
    ),
}


def _whole(tensor: Tensor) -> Tensor:
    return tensor


@dataclass(frozen=True)
class Location:
    """A site as a writable view of one tensor that a module receives or returns.

    `shared`: the block uses the same tensor again on its skip connection, so that only a write in
    place reaches both readers (this is what makes resid_mid right, for values and gradients).
    """

    module: nn.Module
    side: str  # "input" or "output"
    view: Callable[[Tensor], Tensor] = _whole
    item: int = 0  # of the output, when that is a tuple
    shared: bool = False
    read_only: str = ""  # why, if it is

    def on_read(self, see: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `see` with the site's live tensor whenever it is computed."""

        def read(tensor: Tensor) -> None:
            see(self.view(tensor))

        return self._register(read)

    def on_write(self, edit: Callable[[Tensor], None]) -> RemovableHandle:
        """Call `edit` with a view of the site, to be changed in place; the network goes on with it.

        Raises:
            SiteError: the site can be read only.
        """
        if self.read_only:
            raise SiteError(self.read_only)

        def write(tensor: Tensor) -> Tensor:
            target = tensor if self.shared else tensor.clone()
            edit(self.view(target))
            return target

        return self._register(write)

    def _register(self, visit: Callable[[Tensor], Tensor | None]) -> RemovableHandle:
        def before(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            new = visit(args[0])
            return None if new is None else (new, *args[1:])

        def after(module: nn.Module, args: Any, output: Any) -> Any:
            if not isinstance(output, tuple):
                return visit(output)
            new = visit(output[self.item])
            if new is None:
                return None
            return (*output[: self.item], new, *output[self.item + 1 :])

        if self.side == "input":
            return self.module.register_forward_pre_hook(before)
        return self.module.register_forward_hook(after)


@dataclass(frozen=True)
class Block:
    """One transformer block: its parts, and what they add to the residual stream."""

    layer: int
    module: nn.Module
    attention: nn.Module
    qkv: tuple[nn.Module, ...]  # three projections, or one fused
    output_projection: nn.Module
    attention_norm: nn.Module | None
    mlp: nn.Module
    mlp_projection: nn.Module
    mlp_norm: nn.Module | None
    attention_post_norm: nn.Module | None
    mlp_post_norm: nn.Module | None
    parallel: bool
    n_heads: int
    n_kv_heads: int
    d_head: int
    qkv_by_head: bool
    cache_argument: str

    def run(
        self,
        resid: Float[Tensor, "rows positions d_model"],
        arguments: dict[str, Any],
        cache: KeyValues | None = None,
    ) -> Float[Tensor, "rows positions d_model"]:
        """The block itself, on residuals that enter it; `arguments` from a `Context`."""
        if cache is not None:
            arguments = {**arguments, self.cache_argument: cache}
        output = self.module(resid, **arguments)
        return output[0] if isinstance(output, tuple) else output

    def attn_out(self, z: Float[Tensor, "*batch heads d_head"]) -> Float[Tensor, "*batch d_model"]:
        """What attention adds to the residual stream, from the heads' outputs."""
        out = self.output_projection(z.flatten(-2))
        return out if self.attention_post_norm is None else self.attention_post_norm(out)

    def mlp_out(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """What the MLP adds to the stream. It reads resid_mid, in a parallel block resid_pre."""
        out = self.mlp(resid if self.mlp_norm is None else self.mlp_norm(resid))
        return out if self.mlp_post_norm is None else self.mlp_post_norm(out)

    def qkv_weight(
        self, part: str
    ) -> tuple[Float[Tensor, "d_model heads d_head"], Float[Tensor, "heads d_head"] | None]:
        """Views of the weight and bias of the projection `part` ("q", "k" or "v"), by head.

        Raises:
            ModelError: the projection is not one plain matrix (an adapter, a quantised layer).
        """
        location = self.location(Site(part, self.layer))
        weight, bias = _matrix(location.module)
        return location.view(weight), None if bias is None else location.view(bias)

    def output_weight(self) -> Float[Tensor, "heads d_head d_model"]:
        """A view of the output projection, by head; its bias, if any, belongs to no head.

        Raises:
            ModelError: as of `qkv_weight`.
        """
        return _matrix(self.output_projection)[0].unflatten(0, (-1, self.d_head))

    def location(self, site: Site) -> Location:
        """Where `site` lives.

        Raises:
            SiteError: the block has no such site.
        """
        if site.grain == "resid_pre":
            return Location(self.module, "input")
        if site.grain == "resid_post":
            return Location(self.module, "output")
        if site.grain == "attn_out":
            return Location(self.attention_post_norm or self.attention, "output")
        if site.grain == "mlp_out":
            return Location(self.mlp_post_norm or self.mlp, "output")
        if site.grain == "neuron":
            return Location(self.mlp_projection, "input")
        if site.grain == "resid_mid":
            if self.parallel:
                raise SiteError(
                    f"{site}: attention and MLP run in parallel in this network, so there is no "
                    "residual between them; use resid_pre or resid_post"
                )
            return Location(self.mlp_norm or self.mlp, "input", shared=True)
        n_heads = self.n_kv_heads if site.grain in "kv" else self.n_heads
        if site.head is not None and site.head >= n_heads:
            raise SiteError(f"{site}: this network has heads 0 to {n_heads - 1} there")
        if site.grain == "pattern":
            view = _whole if site.head is None else _take(site.head, dim=1)
            why = f"{site} can be read but not written: intervene on head, q or k instead"
            return Location(self.attention, "output", view, item=1, read_only=why)
        if site.grain == "head":
            module, side = self.output_projection, "input"
        else:
            module, side = self.qkv["qkv".index(site.grain) % len(self.qkv)], "output"
        return Location(module, side, self._head_view(site))

    def _head_view(self, site: Site) -> Callable[[Tensor], Tensor]:
        counts = (self.n_heads, self.n_kv_heads, self.n_kv_heads)

        def view(tensor: Tensor) -> Tensor:
            if site.grain != "head" and len(self.qkv) == 1:
                part = "qkv".index(site.grain)
                if self.qkv_by_head:
                    tensor = tensor.unflatten(-1, (self.n_heads, 3, self.d_head))[..., part, :]
                else:
                    start, n = sum(counts[:part]) * self.d_head, counts[part] * self.d_head
                    tensor = tensor.narrow(-1, start, n).unflatten(-1, (-1, self.d_head))
            else:
                tensor = tensor.unflatten(-1, (-1, self.d_head))
            return tensor if site.head is None else tensor[..., site.head, :]

        return view


def _matrix(module: nn.Module) -> tuple[Float[Tensor, "inputs outputs"], Tensor | None]:
    """Weight, as `x @ weight`, and bias of a projection."""
    if isinstance(module, nn.Linear):
        return module.weight.T, module.bias
    if isinstance(module, Conv1D):
        return module.weight, module.bias
    raise ModelError(
        f"{type(module).__name__}: expected a plain linear layer; merge adapters into the weights "
        "and load the model unquantised"
    )


def _take(index: int, *, dim: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.select(dim, index)


class Architecture:
    """A causal language model's parts, by role. Holds the live model: trained weights show at once.

    Raises:
        ModelError: the model is not laid out like any known family.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        config: Any = model.config.get_text_config()
        layout = LAYOUTS.get(config.model_type, _LLAMA)
        self.name = type(model).__name__
        self.family: str = config.model_type
        self.listed = config.model_type in LAYOUTS
        self.parallel = bool(layout.parallel_flag and getattr(config, layout.parallel_flag))
        self.n_heads: int = config.num_attention_heads
        self.n_kv_heads: int = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_model: int = config.hidden_size
        self.d_head: int = getattr(config, "head_dim", None) or self.d_model // self.n_heads
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self._layout = layout
        try:
            self._head = cast(nn.Linear, model.get_output_embeddings())
            self.d_vocab: int = self._head.weight.shape[0]
            self.base = cast(PreTrainedModel, getattr(model, layout.base))
            self.final_norm = cast(nn.Module, getattr(self.base, layout.final_norm))
            modules = cast(nn.ModuleList, getattr(self.base, layout.blocks))
            self.blocks = tuple(self._block(i, module) for i, module in enumerate(modules))
            shape = cast(Tensor, self.blocks[0].mlp_projection.weight).shape
            # [d_model d_mlp], or transposed.
            self.d_mlp: int = next((n for n in shape if n != self.d_model), self.d_model)
        except AttributeError as error:
            raise ModelError(
                f"{self.name} (model_type {self.family!r}) is not supported: {error}; "
                f"supported: {', '.join(LAYOUTS)} and others laid out like Llama"
            ) from None

    def _block(self, layer: int, module: nn.Module) -> Block:
        layout = self._layout
        attention, mlp = getattr(module, layout.attention), getattr(module, layout.mlp)
        names = (layout.qkv,) if isinstance(layout.qkv, str) else layout.qkv
        parameters = inspect.signature(module.forward).parameters
        caches = [name for name in ("past_key_values", "layer_past") if name in parameters]
        if not caches:
            raise AttributeError(f"{type(module).__name__} takes no key-value cache")

        def optional(name: str | None) -> nn.Module | None:
            return None if name is None else getattr(module, name)

        return Block(
            layer=layer,
            module=module,
            attention=attention,
            qkv=tuple(getattr(attention, name) for name in names),
            output_projection=getattr(attention, layout.attention_projection),
            attention_norm=optional(layout.attention_norm),
            mlp=mlp,
            mlp_projection=attrgetter(layout.mlp_projection)(mlp),
            mlp_norm=optional(layout.mlp_norm),
            attention_post_norm=optional(layout.attention_post_norm),
            mlp_post_norm=optional(layout.mlp_post_norm),
            parallel=self.parallel,
            n_heads=self.n_heads,
            n_kv_heads=self.n_kv_heads,
            d_head=self.d_head,
            qkv_by_head=layout.qkv_by_head,
            cache_argument=caches[0],
        )

    def embed(
        self,
        tokens: Int[Tensor, "batch pos"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> tuple[Float[Tensor, "batch pos d_model"], Context]:
        """What enters block 0, and what else the blocks are given for this batch."""
        return record_context(self.base, self._layout.blocks, attention_mask, input_ids=tokens)

    def context(
        self,
        resid: Float[Tensor, "batch pos d_model"],
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> Context:
        """What the blocks are given for a batch of this shape, whatever the residuals hold."""
        blocks = self._layout.blocks
        return record_context(self.base, blocks, attention_mask, inputs_embeds=resid)[1]

    def unembed(
        self,
        normed: Float[Tensor, "*batch d_model"],
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "*batch vocab"]:
        """Logits from the final norm's output, of all tokens or of `token_ids` in their order."""
        head = self._head
        if token_ids is None:
            logits = head(normed)
        else:
            token_ids = token_ids.to(head.weight.device)
            bias = None if head.bias is None else head.bias[token_ids]
            logits = F.linear(normed, head.weight[token_ids], bias)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        return logits
