"""`HookedModel`: a Hugging Face causal language model, read and written at named sites.

The raw model stays the single source of truth: it trains, samples and saves, and nothing here
changes it. Blocks run one by one with the arguments that the model itself would give them, so a run
may start at any layer and stop at any other, and the blocks outside are not run.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from mechinterp.architectures import Architecture
from mechinterp.contexts import Context, KeyValues, padding_arguments
from mechinterp.errors import SiteError
from mechinterp.generation import generate
from mechinterp.interventions import (
    Activations,
    Intervention,
    Positions,
    capturing,
    intervening,
    position_index,
)
from mechinterp.model_checks import (
    check_eval_mode,
    check_inputs,
    check_mask,
    check_sites,
    self_test,
)
from mechinterp.sites import Site

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from mechinterp.checkpoints import Checkpoint

Tokens = Int[Tensor, "batch pos"]
Mask = Int[Tensor, "batch pos"]
Resid = Float[Tensor, "batch pos d_model"]


def load(path: str | Path | Checkpoint, **options: Any) -> HookedModel:
    """Open a checkpoint as a `HookedModel`; options as in `HookedModel.from_checkpoint`."""
    return HookedModel.from_checkpoint(path, **options)


class HookedModel:
    """A causal language model with named sites.

    Methods that run the network build no gradient graph unless they are given `grad=True`; the
    pieces (`block`, `final_norm`, `unembed`) follow torch's ambient mode. `positions` selects where
    something is read or unembedded: None (all, output [batch pos ...]), an int or one position per
    item as a LongTensor [batch] (output [batch ...]), or a list (output [batch n ...]). An
    `attention_mask` [batch pos] of ones and zeros marks padding; each row's position ids then
    count from its first real token, so padded rows give what they give alone.

    Attributes:
        model: the raw Hugging Face model, in eval mode.
        architecture: its parts by role, see `mechinterp.architectures`.
        checkpoint: where it was loaded from, or None.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        checkpoint: Checkpoint | None = None,
        self_test: bool = True,
    ) -> None:
        self.model = model
        self.checkpoint = checkpoint
        self._bridge: TransformerBridge | None = None
        check_eval_mode(model)
        self.architecture = Architecture(model)
        if self_test or not self.architecture.listed:
            self.self_test()

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path | Checkpoint,
        *,
        dtype: str = "float32",
        attn_implementation: str = "eager",
        device: str = "cpu",
        self_test: bool = True,
    ) -> HookedModel:
        """Open a checkpoint directory.

        Args:
            dtype: anything but float32 costs accuracy (in bfloat16 logits are off by whole units).
            attn_implementation: `sdpa` is faster on long inputs, agrees with eager to about 1e-4 on
                logits, and has no attention patterns.
            self_test: check the hooks against the model (see `self_test`); always done for a family
                that is not listed in `architectures.LAYOUTS`.

        Raises:
            CheckpointError: the checkpoint cannot be opened.
            ModelError: its architecture is not supported, or the self-test failed.
        """
        from mechinterp.checkpoints import Checkpoint, open_checkpoint

        checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
        model = checkpoint.load_model(
            dtype=dtype, attn_implementation=attn_implementation, device=device
        )
        return cls(model, checkpoint=checkpoint, self_test=self_test)

    @classmethod
    def from_model(cls, model: PreTrainedModel, *, self_test: bool = True) -> HookedModel:
        """Hook a live model, which goes on belonging to the caller.

        Raises:
            ModelError: it is in training mode or not supported, or the self-test failed.
        """
        return cls(model, self_test=self_test)

    @property
    def n_layers(self) -> int:
        return len(self.architecture.blocks)

    @property
    def n_heads(self) -> int:
        return self.architecture.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.architecture.n_kv_heads

    @property
    def d_model(self) -> int:
        return self.architecture.d_model

    @property
    def d_head(self) -> int:
        return self.architecture.d_head

    @property
    def d_mlp(self) -> int:
        return self.architecture.d_mlp

    @property
    def d_vocab(self) -> int:
        return self.architecture.d_vocab

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    # ---- whole runs ------------------------------------------------------------------------------

    def forward(
        self,
        tokens: Tokens,
        *,
        attention_mask: Mask | None = None,
        positions: Positions = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch *pos vocab"]:
        """Logits of the Hugging Face model itself; with `positions` only those are unembedded."""
        tokens, attention_mask = self._check(tokens, attention_mask)
        arguments = {**padding_arguments(attention_mask), "use_cache": False}
        with torch.set_grad_enabled(grad):
            if positions is None:
                return self.model(input_ids=tokens, **arguments).logits
            hidden = self.architecture.base(input_ids=tokens, **arguments).last_hidden_state
            return self.unembed(hidden[position_index(positions, hidden)])

    __call__ = forward

    def capture(
        self,
        tokens: Tokens,
        sites: Site | str | Iterable[Site | str],
        *,
        positions: Positions = None,
        attention_mask: Mask | None = None,
        key_values: bool = False,
    ) -> Activations:
        """Activations at `sites`, without gradients. Blocks after the last one needed are not run.

        Args:
            key_values: also keep each block's attention keys and values, for all blocks.

        Raises:
            SiteError: a site is misspelt or not in this network.
        """
        sites = check_sites(self, sites)
        stop = self.n_layers if key_values else 1 + max((s.layer for s in sites), default=-1)
        caches = tuple(KeyValues() for _ in self.architecture.blocks) if key_values else ()
        tokens, attention_mask = self._check(tokens, attention_mask)
        with torch.no_grad():
            resid, context = self.architecture.embed(tokens, attention_mask)
            with capturing(self.architecture.blocks, sites, positions, grad=False) as captured:
                self._run_blocks(resid, context, 0, stop, caches)
        return Activations({site: captured[site] for site in sites}, caches)

    def run(
        self,
        tokens: Tokens,
        *,
        sites: Site | str | Iterable[Site | str] = (),
        interventions: Sequence[Intervention] = (),
        capture_positions: Positions = None,
        attention_mask: Mask | None = None,
        positions: Positions = None,
        grad: bool = False,
    ) -> tuple[Float[Tensor, "batch *pos vocab"], Activations]:
        """Logits at `positions` and activations at `sites` of one run, after any interventions.

        With `grad=True` the activations are live: `torch.autograd.grad(f(logits), list(
        activations.values()))` gives the gradients at the sites, resid_mid included.

        Raises:
            SiteError: a site is misspelt, not in this network, or cannot be written.
            ModelError: an intervention did not fire exactly once.
        """
        sites = check_sites(self, sites)
        check_sites(self, [intervention.site for intervention in interventions])
        tokens, attention_mask = self._check(tokens, attention_mask)
        blocks = self.architecture.blocks
        with torch.set_grad_enabled(grad):
            resid, context = self.architecture.embed(tokens, attention_mask)
            with (
                intervening(blocks, interventions),
                capturing(blocks, sites, capture_positions, grad=grad) as captured,
            ):
                resid = self._run_blocks(resid, context, 0, self.n_layers)
            return self._logits(resid, positions), Activations(captured)

    def run_with_interventions(
        self,
        tokens: Tokens,
        interventions: Sequence[Intervention],
        *,
        attention_mask: Mask | None = None,
        positions: Positions = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch *pos vocab"]:
        """Logits of a run with `interventions`, applied in order; see `run`."""
        return self.run(
            tokens,
            interventions=interventions,
            attention_mask=attention_mask,
            positions=positions,
            grad=grad,
        )[0]

    def run_from_layer(
        self,
        layer: int,
        resid: Resid,
        *,
        attention_mask: Mask | None = None,
        positions: Positions = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch *pos vocab"]:
        """Logits from the residuals that enter block `layer`; blocks below it are not run.

        `layer == n_layers` is the final norm and unembedding alone.
        """
        with torch.set_grad_enabled(grad):
            resid = self._resid_from_layer(layer, resid, attention_mask)
            return self._logits(resid, positions)

    def resid_from_layer(
        self,
        layer: int,
        resid: Resid,
        *,
        attention_mask: Mask | None = None,
        positions: Positions = None,
        grad: bool = False,
    ) -> Float[Tensor, "batch *pos d_model"]:
        """What leaves the last block (before the final norm), from what enters block `layer`."""
        with torch.set_grad_enabled(grad):
            resid = self._resid_from_layer(layer, resid, attention_mask)
            return resid[position_index(positions, resid)]

    def generate(
        self,
        tokens: Tokens,
        *,
        max_new_tokens: int,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        attention_mask: Mask | None = None,
        eos_token_id: int | None = None,
    ) -> Tokens:
        """Continue `tokens`, with a KV cache; returns prompt and continuation.

        Samples from the full distribution: there is no top-k and no top-p. Rows that have produced
        `eos_token_id` are filled up with it.

        Args:
            temperature: 0 is greedy.
            generator: makes the sample reproducible; on the CPU, whatever the model's device.
            attention_mask: needed for padded prompts, which must be padded on the left.
        """
        tokens, attention_mask = self._check(tokens, attention_mask)
        return generate(
            self.model,
            tokens,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=generator,
            attention_mask=attention_mask,
            eos_token_id=eos_token_id,
        )

    # ---- pieces ----------------------------------------------------------------------------------

    def embed(self, tokens: Tokens, *, attention_mask: Mask | None = None) -> tuple[Resid, Context]:
        """What enters block 0, and the context (masks, rotary embeddings) for `block`."""
        return self.architecture.embed(*self._check(tokens, attention_mask))

    def block(
        self,
        layer: int,
        resid: Float[Tensor, "rows pos d_model"],
        context: Context,
        *,
        cache: KeyValues | None = None,
    ) -> Float[Tensor, "rows pos d_model"]:
        """Run one block. For a suffix of the positions: `context.suffix(start)`, and a `cache` that
        holds the keys and values of the positions before."""
        return self.architecture.blocks[layer].run(resid, context.arguments[layer], cache)

    def final_norm(self, resid: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The norm before the unembedding."""
        return self.architecture.final_norm(resid)

    def unembed(
        self,
        normed: Float[Tensor, "*batch d_model"],
        token_ids: Int[Tensor, " tokens"] | None = None,
    ) -> Float[Tensor, "*batch vocab"]:
        """Logits from the final norm's output, final soft cap included; all of them or some."""
        return self.architecture.unembed(normed, token_ids)

    def sites(self, grain: str) -> list[Site]:
        """The sites of one grain at every layer."""
        return [Site(grain, layer) for layer in range(self.n_layers)]

    def bridge(self) -> TransformerBridge:
        """TransformerLens's view of the same weights, for its hook names and tools.

        Built when first asked for and again after the weights moved on; see `mechinterp.bridge` for
        what it refuses. The raw model is neither wrapped nor changed.
        """
        from mechinterp.bridge import build_bridge, fingerprint

        if self._bridge is None or self._bridge.__dict__["_fingerprint"] != fingerprint(self):
            self._bridge = build_bridge(self)
        return self._bridge

    # ---- checks ----------------------------------------------------------------------------------

    def self_test(self) -> None:
        """Check on a few tokens that the hooks tell the truth; see `mechinterp.model_checks`.

        Raises:
            ModelError: they do not.
        """
        self_test(self)

    def _check(self, tokens: Tokens, attention_mask: Mask | None) -> tuple[Tokens, Mask | None]:
        check_inputs(self.model, tokens, attention_mask)
        tokens = tokens.to(self.device)
        return tokens, None if attention_mask is None else attention_mask.to(self.device)

    # ---- inside ----------------------------------------------------------------------------------

    def _resid_from_layer(self, layer: int, resid: Resid, attention_mask: Mask | None) -> Resid:
        check_eval_mode(self.model)
        if not 0 <= layer <= self.n_layers:
            raise SiteError(f"layer {layer}: this network has layers 0 to {self.n_layers}")
        if attention_mask is not None:
            check_mask(attention_mask, resid)
            attention_mask = attention_mask.to(self.device)
        context = self.architecture.context(resid, attention_mask)
        return self._run_blocks(resid, context, layer, self.n_layers)

    def _run_blocks(
        self,
        resid: Resid,
        context: Context,
        start: int,
        stop: int,
        caches: Sequence[KeyValues] = (),
    ) -> Resid:
        for layer in range(start, stop):
            cache = caches[layer] if caches else None
            resid = self.block(layer, resid, context, cache=cache)
        return resid

    def _logits(self, resid: Resid, positions: Positions) -> Float[Tensor, "batch *pos vocab"]:
        return self.unembed(self.final_norm(resid[position_index(positions, resid)]))
