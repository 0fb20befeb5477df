"""Hugging Face modules run with plain forward hooks: an oracle for reads, writes and gradients."""

from __future__ import annotations

from contextlib import ExitStack


def logits_by_hooks(hooked, tokens, hooks=()):
    """Logits of the raw model's own forward; hooks are (module, side, change of the tensor), where
    side is "input" or the index into the output."""
    with ExitStack() as stack:
        for module, side, change in hooks:

            def before(_, args, change=change):
                return (change(args[0]), *args[1:])

            def after(_, args, output, change=change, side=side):
                if not isinstance(output, tuple):
                    return change(output)
                output = list(output)
                output[side] = change(output[side])
                return tuple(output)

            if side == "input":
                stack.callback(module.register_forward_pre_hook(before).remove)
            else:
                stack.callback(module.register_forward_hook(after).remove)
        return hooked.model(input_ids=tokens, use_cache=False).logits


def site_by_hand(hooked, grain, layer):
    """(module, side, columns of every head or None) of a site, each family written out."""
    block = hooked.architecture.blocks[layer]
    if grain in ("q", "k", "v"):
        part, d = "qkv".index(grain), hooked.d_head
        heads = hooked.n_heads if grain == "q" else hooked.n_kv_heads
        if len(block.qkv) == 3:
            start, step = 0, d
        elif hooked.architecture.family == "gpt_neox":  # q, k and v of head 0, then of head 1, ...
            start, step = part * d, 3 * d
        else:
            start, step = [0, hooked.n_heads * d, (hooked.n_heads + hooked.n_kv_heads) * d][part], d
        columns = [list(range(start + h * step, start + h * step + d)) for h in range(heads)]
        return block.qkv[part % len(block.qkv)], 0, columns
    attention = block.attention_post_norm or block.attention
    return {
        "resid_pre": (block.module, "input", None),
        "resid_post": (block.module, 0, None),
        "attn_out": (attention, 0, None),
        "resid_mid": (attention, 0, None),  # as a step: what is added to attn_out is added to it
        "mlp_out": (block.mlp_post_norm or block.mlp, 0, None),
        "head": (block.output_projection, "input", None),
        "neuron": (block.mlp_projection, "input", None),
    }[grain]
