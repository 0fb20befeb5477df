"""TransformerLens's `TransformerBridge`, built on demand over the raw model's weights, with guards.

Wrapping changes a model in place and breaks its `save_pretrained`, so the bridge wraps a twin: the
same modules again, around the same weights in memory. The bridge is for looking; training, sampling
and saving belong to the raw model. What TransformerLens 4.3 would get wrong in silence is refused:

* names that match no hook;
* hooks at `hook_resid_mid`, which there is the MLP branch alone: a write does not reach the skip
  connection, and the gradient lacks it;
* saving and loading weights, compatibility mode and weight processing;
* runs after the raw weights moved on, where the bridge holds copies of them (GPT-NeoX);
* text without a decision about BOS, left-padded tokens without a mask, `hf_generate` (top-k 50).
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechinterp.errors import ModelError, SiteError
from mechinterp.model_checks import refuse_left_padding

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from mechinterp.hooked import HookedModel


def build_bridge(hooked: HookedModel) -> TransformerBridge:
    """A guarded bridge over `hooked.model`'s weights; use `HookedModel.bridge`, which keeps it.

    The tokenizer is the checkpoint's; without one there is none, rather than a made-up one.

    Raises:
        ModelError: TransformerLens does not support the architecture, or computes other logits.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    twin = sharing_twin(hooked.model)
    twin.set_attn_implementation("eager")
    checkpoint = hooked.checkpoint
    tokenizer = checkpoint.load_tokenizer() if checkpoint and checkpoint.has_tokenizer else None
    try:
        bridge = build_bridge_from_module(
            twin,
            hooked.architecture.name,
            hf_config=twin.config,
            tokenizer=tokenizer,
            model_name=str(checkpoint.path) if checkpoint else hooked.architecture.name,
        )
    except (ValueError, KeyError, AttributeError) as error:
        raise ModelError(
            f"TransformerLens has no bridge for {hooked.architecture.name}: {error}"
        ) from error
    twin.save_pretrained = _refuse_saving
    bridge.__class__ = _guarded_class()  # build_bridge_from_module makes the plain class only
    bridge.__dict__["_hooked"] = hooked
    bridge.__dict__["_fingerprint"] = fingerprint(hooked)
    _check_logits(bridge, hooked)
    return bridge


def sharing_twin(model: PreTrainedModel) -> PreTrainedModel:
    """A second copy of the model's modules and config around the same storage of every weight.

    In-place changes (an optimiser's step) show in both; gradients are the twin's own.
    """
    shared: dict[int, Any] = {
        id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()
    }
    shared |= {id(buffer): buffer for buffer in model.buffers()}
    return copy.deepcopy(model, shared)


def fingerprint(hooked: HookedModel) -> tuple[int, ...]:
    """Changes whenever a bridge built earlier would no longer compute what the raw model computes.

    A bridge reads weights in place, but a fused q/k/v projection laid out by head (GPT-NeoX) it
    copies: those are fingerprinted by content, the others by their place in memory.
    """
    places = [parameter.data_ptr() for parameter in hooked.model.parameters()]
    copied = [
        parameter
        for block in hooked.architecture.blocks
        if block.qkv_by_head
        for projection in block.qkv
        for parameter in projection.parameters()
    ]
    return (*places, *(_checksum(parameter) for parameter in copied))


def _checksum(tensor: Tensor) -> int:
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return int(tensor.detach().contiguous().view(bits).sum(dtype=torch.int64))


def _check_logits(bridge: TransformerBridge, hooked: HookedModel) -> None:
    tokens = torch.randint(hooked.d_vocab, (2, 5), generator=torch.Generator().manual_seed(0))
    tokens = tokens.to(hooked.device)
    mask = torch.ones_like(tokens)
    expected = hooked.forward(tokens, attention_mask=mask)
    with torch.no_grad():
        error = float((bridge(tokens, attention_mask=mask) - expected).abs().max())
    allowed = 1e-4 if hooked.dtype in (torch.float32, torch.float64) else 2e-2
    if not error <= allowed * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"TransformerLens's bridge for {hooked.architecture.name} gives logits that differ "
            f"from Hugging Face's by {error:.2g}; do not use it with this configuration"
        )


def _refuse_saving(*_: Any, **__: Any) -> Any:
    raise ModelError(
        "a bridge's weights cannot be saved or loaded: use `save_checkpoint(hooked.model, path)` "
        "and `HookedModel.from_checkpoint`"
    )


def _refuse_processing(*_: Any, **__: Any) -> Any:
    raise ModelError(
        "compatibility mode and weight processing change the weights and the logits; "
        "the bridge runs on raw weights only"
    )


@cache
def _guarded_class() -> type[TransformerBridge]:
    from transformer_lens.model_bridge import TransformerBridge

    class GuardedBridge(TransformerBridge):
        """A `TransformerBridge` that refuses what it would get wrong in silence."""

        state_dict = load_state_dict = _refuse_saving
        enable_compatibility_mode = process_weights = _refuse_processing

        def forward(self, input: Any, *args: Any, **kwargs: Any) -> Any:
            hooked: HookedModel = self.__dict__["_hooked"]
            if fingerprint(hooked) != self.__dict__["_fingerprint"]:
                raise ModelError(
                    "the model's weights changed after this bridge was built, and it holds copies "
                    "of some: call `hooked.bridge()` again"
                )
            is_tokens = isinstance(input, Tensor) and not input.is_floating_point()
            if is_tokens and kwargs.get("attention_mask") is None:
                refuse_left_padding(hooked.model, torch.atleast_2d(input))
            return super().forward(input, *args, **kwargs)

        def to_tokens(self, input: Any, prepend_bos: bool | None = None, **kwargs: Any) -> Tensor:
            if self.tokenizer is None:
                raise ModelError("this checkpoint has no tokenizer: pass token ids, not text")
            if prepend_bos is None:
                raise ModelError(
                    "TransformerLens puts BOS before text and Hugging Face may not: pass token "
                    "ids, or say prepend_bos=True or False"
                )
            return super().to_tokens(input, prepend_bos, **kwargs)

        def hf_generate(self, *_: Any, **__: Any) -> Any:
            raise ModelError(
                "hf_generate samples from the 50 likeliest tokens only: use HookedModel.generate"
            )

        def run_with_cache(self, *args: Any, names_filter: Any = None, **kwargs: Any) -> Any:
            self._check_names([] if names_filter is None else names_filter)
            if kwargs.get("incl_bwd"):
                self._refuse_resid_mid(names_filter)
            return super().run_with_cache(*args, names_filter=names_filter, **kwargs)

        def run_with_hooks(
            self, input: Any, fwd_hooks: Any = (), bwd_hooks: Any = (), **kwargs: Any
        ) -> Any:
            forwards, backwards = list(fwd_hooks), list(bwd_hooks)
            self._check_names(name for name, _ in forwards + backwards)
            return super().run_with_hooks(input, forwards, backwards, **kwargs)

        def hooks(self, fwd_hooks: Any = (), bwd_hooks: Any = (), **kwargs: Any) -> Any:
            forwards, backwards = list(fwd_hooks), list(bwd_hooks)
            self._check_names(name for name, _ in forwards + backwards)
            return super().hooks(forwards, backwards, **kwargs)

        def check_hooks_to_add(
            self, hook_point: Any, hook_point_name: str, hook: Any, *args: Any, **kwargs: Any
        ) -> None:
            if hook_point in self._resid_mid_points():
                raise SiteError(
                    f"{hook_point_name}: TransformerLens's hook_resid_mid is only the MLP's input, "
                    "so writes and gradients there are wrong: use HookedModel.run with "
                    "interventions or grad=True; for the MLP's input alone hook mlp.hook_in"
                )
            super().check_hooks_to_add(hook_point, hook_point_name, hook, *args, **kwargs)

        def _resid_mid_points(self) -> list[Any]:
            return [p for name, p in self.hook_dict.items() if name.endswith(".hook_resid_mid")]

        def _refuse_resid_mid(self, names_filter: Any) -> None:
            names = [name for name in self.hook_dict if _matches(name, names_filter)]
            if any(name.endswith(".hook_resid_mid") for name in names):
                raise SiteError(
                    "incl_bwd: TransformerLens's gradient at hook_resid_mid lacks the skip "
                    "connection: leave it out of names_filter, or use HookedModel.run(grad=True)"
                )

        def _check_names(self, names_filter: Any) -> None:
            known = self.hook_dict
            if isinstance(names_filter, str) or callable(names_filter):
                names_filter = [names_filter]
            for name in names_filter:
                if any(_matches(candidate, name) for candidate in known):
                    continue
                if callable(name):
                    raise SiteError("a names filter matches none of the bridge's hooks")
                near = difflib.get_close_matches(name, known, n=3)
                raise SiteError(
                    f"no hook {name!r} on this bridge"
                    + (f": did you mean {' or '.join(near)}?" if near else "")
                )

    return GuardedBridge


def _matches(name: str, names_filter: Any) -> bool:
    if names_filter is None:
        return True
    if callable(names_filter):
        return bool(names_filter(name))
    if isinstance(names_filter, str):
        return name == names_filter
    return isinstance(names_filter, Iterable) and name in names_filter
