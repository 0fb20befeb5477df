"""Circuits by plain forward hooks on a Hugging Face model: slow, and nothing of ours.

The model runs on its own, so its residual stream holds what the writers write in this run. Whoever
reads it is stopped and told what it would have read: the stream, less the writers of its ablated
edges, plus what those write in the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

Edge = tuple[str, str]


class Parts:
    """Where a family keeps what the hooks need, written out by hand."""

    def __init__(self, raw: Any) -> None:
        config = raw.config
        self.raw, self.family = raw, config.model_type
        self.base = getattr(raw, {"gpt2": "transformer", "gpt_neox": "gpt_neox"}.get(
            self.family, "model"
        ))  # fmt: skip
        self.blocks = list(self.base.h if self.family == "gpt2" else self.base.layers)
        self.final_norm = {"gpt2": "ln_f", "gpt_neox": "final_layer_norm"}.get(self.family, "norm")
        self.final_norm = getattr(self.base, self.final_norm)
        self.n_heads = config.num_attention_heads
        self.n_kv = getattr(config, "num_key_value_heads", None) or self.n_heads
        self.d_head = getattr(config, "head_dim", None) or config.hidden_size // self.n_heads
        self.parallel = self.family == "gpt_neox" and config.use_parallel_residual
        self.post_norms = self.family in ("gemma2", "gemma3_text", "olmo2")

    def attention(self, block: Any) -> Any:
        name = {"gpt2": "attn", "gpt_neox": "attention"}.get(self.family, "self_attn")
        return getattr(block, name)

    def output(self, block: Any) -> Any:
        name = {"gpt2": "c_proj", "gpt_neox": "dense"}.get(self.family, "o_proj")
        return getattr(self.attention(block), name)

    def attention_norm(self, block: Any) -> Callable[[Tensor], Tensor]:
        if self.family == "olmo2":
            return lambda x: x
        return (block.ln_1 if self.family == "gpt2" else block.input_layernorm).forward

    def mlp_norm(self, block: Any) -> Any:
        if self.family == "olmo2":
            return None
        if self.family == "gpt2":
            return block.ln_2
        post = self.family in ("gemma2", "gemma3_text")
        return block.pre_feedforward_layernorm if post else block.post_attention_layernorm

    def projections(self, block: Any) -> dict[str, Any]:
        """The module that makes q, k and v; the same one where they are fused."""
        attention = self.attention(block)
        fused = {"gpt2": "c_attn", "gpt_neox": "query_key_value", "phi3": "qkv_proj"}
        if self.family in fused:
            return dict.fromkeys("qkv", getattr(attention, fused[self.family]))
        return {part: getattr(attention, f"{part}_proj") for part in "qkv"}

    def columns(self, part: str, head: int) -> slice:
        """Where one head's q, k or v stands in the projection's output."""
        d = self.d_head
        if self.family == "gpt_neox":
            start = head * 3 * d + "qkv".index(part) * d
        elif self.family in ("gpt2", "phi3"):
            offset = {"q": 0, "k": self.n_heads, "v": self.n_heads + self.n_kv}[part]
            start = (offset + head) * d
        else:
            start = head * d
        return slice(start, start + d)

    def head_out(self, block: Any, z: Tensor, head: int) -> Tensor:
        """What one head adds to the stream."""
        alone = torch.zeros_like(z)
        columns = slice(head * self.d_head, (head + 1) * self.d_head)
        alone[..., columns] = z[..., columns]
        output = self.output(block)
        return output.forward(alone) - output.forward(torch.zeros_like(z))

    def readers(self, layer: int) -> list[str]:
        heads = {"q": self.n_heads, "k": self.n_kv, "v": self.n_kv}
        return [f"{part}.{layer}.{head}" for part, n in heads.items() for head in range(n)]


@torch.no_grad()
def writers_of(raw: Any, tokens: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """What every writer writes in a plain run."""
    return hooked_run(raw, tokens, {}, (), mask)[1]


@torch.no_grad()
def hooked_run(
    raw: Any,
    tokens: Tensor,
    reference: dict[str, Tensor],
    ablated: Iterable[Edge],
    mask: Tensor | None = None,
    fixed: dict[str, Tensor] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and writers of a run in which these edges carry the reference's values.

    `fixed`: changes [items pos d_model] of what a reader reads in its *clean* run, in place of all
    else (for path patching); needs `reference["stream.READER"]`, the clean stream there.
    """
    parts = Parts(raw)
    ablated = list(ablated)
    fixed = fixed or {}
    written: dict[str, Tensor] = {}
    streams: dict[int, Tensor] = {}

    def read(stream: Tensor, reader: str) -> Tensor:
        written.setdefault(f"stream.{reader}", stream)
        if reader in fixed:
            return reference[f"stream.{reader}"] + fixed[reader]
        for writer, of in ablated:
            if of == reader:
                stream = stream - written[writer] + reference[writer]
        return stream

    with ExitStack() as stack:

        def on(module: Any, hook: Any, *, before: bool = False) -> None:
            register = module.register_forward_pre_hook if before else module.register_forward_hook
            stack.callback(register(hook).remove)

        for layer, block in enumerate(parts.blocks):

            def enter(module: Any, args: Any, layer: int = layer) -> None:
                if layer == 0:
                    written["embed"] = args[0]
                streams[layer] = args[0]

            on(block, enter, before=True)
            norm = parts.attention_norm(block)
            by_module: dict[Any, list[str]] = {}
            for part, module in parts.projections(block).items():
                by_module.setdefault(module, []).append(part)
            for module, names in by_module.items():

                def project(
                    module: Any, args: Any, output: Tensor, names=names, layer=layer, norm=norm
                ) -> Tensor:
                    output = output.clone()
                    for reader in parts.readers(layer):
                        part, _, head = reader.split(".")
                        if part in names:
                            columns = parts.columns(part, int(head))
                            value = module.forward(norm(read(streams[layer], reader)))
                            output[..., columns] = value[..., columns]
                    return output

                on(module, project)

            def heads(module: Any, args: Any, layer: int = layer, block: Any = block) -> None:
                for head in range(parts.n_heads):
                    written[f"head.{layer}.{head}"] = parts.head_out(block, args[0], head)

            def whole(module: Any, args: Any, output: Tensor, layer: int = layer) -> None:
                written[f"attn.{layer}"] = output

            if parts.post_norms:
                on(block.post_attention_layernorm, whole)
            else:
                on(parts.output(block), heads, before=True)
            mids: dict[int, Tensor] = {}
            mlp_norm = parts.mlp_norm(block)

            def mid(module: Any, args: Any, layer: int = layer, mids=mids) -> None:
                mids[layer] = args[0]

            on(mlp_norm or block.mlp, mid, before=True)

            def mlp(
                module: Any, args: Any, output: Tensor, layer=layer, mids=mids, norm=mlp_norm
            ) -> Tensor:
                stream = streams[layer] if parts.parallel else mids[layer]
                x = read(stream, f"mlp.{layer}")
                out = module.forward(x if norm is None else norm.forward(x))
                if not parts.post_norms:
                    written[f"mlp.{layer}"] = out
                return out

            on(block.mlp, mlp)

            def after(module: Any, args: Any, output: Tensor, layer: int = layer) -> None:
                written[f"mlp.{layer}"] = output

            if parts.post_norms:
                on(block.post_feedforward_layernorm, after)

        def final(module: Any, args: Any) -> tuple[Tensor]:
            return (read(args[0], "logits"),)

        on(parts.final_norm, final, before=True)
        arguments = {}
        if mask is not None:
            arguments["attention_mask"] = mask
            arguments["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = raw(input_ids=tokens, use_cache=False, **arguments).logits
    return logits, written
