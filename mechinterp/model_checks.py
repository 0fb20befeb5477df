"""What is checked before a model is run, and the self-test that a hooked model passes at load."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from mechinterp.errors import ModelError, SiteError
from mechinterp.sites import Site

if TYPE_CHECKING:
    from mechinterp.hooked import HookedModel


def check_eval_mode(model: PreTrainedModel) -> None:
    """Raise a ModelError in training mode, where dropout makes every run another."""
    if model.training:
        raise ModelError("the model is in training mode: call model.eval() first")


def check_inputs(
    model: PreTrainedModel,
    tokens: Int[Tensor, "batch pos"],
    attention_mask: Int[Tensor, "batch pos"] | None,
) -> None:
    """Raise a ModelError on inputs that a model would take and compute nonsense from."""
    check_eval_mode(model)
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    if tokens.ndim != 2 or tokens.is_floating_point() or tokens.numel() == 0:
        raise ModelError(
            f"tokens: expected integers [batch pos], got {tokens.dtype} {tuple(tokens.shape)}"
        )
    if not 0 <= int(tokens.min()) <= int(tokens.max()) < vocabulary:
        raise ModelError(
            f"tokens: ids must be 0 to {vocabulary - 1}, "
            f"got {int(tokens.min())} to {int(tokens.max())}"
        )
    if attention_mask is None:
        refuse_left_padding(model, tokens)
    else:
        check_mask(attention_mask, tokens)


def check_mask(attention_mask: Int[Tensor, "batch pos"], batch: Tensor) -> None:
    """Raise a ModelError unless the mask fits [batch pos ...] and leaves something of every row."""
    expected = batch.shape[:2]
    if attention_mask.shape != expected or not attention_mask.any(dim=1).all():
        raise ModelError(
            f"attention_mask: expected {tuple(expected)} with at least a 1 in every row, "
            f"got {tuple(attention_mask.shape)}"
        )


def refuse_left_padding(model: PreTrainedModel, tokens: Int[Tensor, "batch pos"]) -> None:
    """Raise a ModelError if `tokens`, to be run without a mask, start with padding."""
    config: Any = model.config.get_text_config()
    pad, bos = config.pad_token_id, config.bos_token_id
    if pad is None or tokens.shape[1] < 2:
        return
    # Where padding and BOS share an id, one of them at the start is BOS.
    padded = (tokens[:, : 2 if pad == bos else 1] == pad).all(dim=1)
    if padded.any():
        row = int(padded.nonzero()[0])
        raise ModelError(
            f"tokens: row {row} starts with the padding id {pad}; left-padded batches need an "
            "attention_mask (1 where tokens are real)"
        )


def check_sites(hooked: HookedModel, sites: Site | str | Iterable[Site | str]) -> list[Site]:
    """The sites, parsed; a SiteError for one that is misspelt or not in this network."""
    if isinstance(sites, Site | str):
        sites = [sites]
    checked = [Site.parse(site) for site in sites]
    for site in checked:
        if site.layer >= hooked.n_layers:
            raise SiteError(f"{site}: this network has layers 0 to {hooked.n_layers - 1}")
        if site.grain == "pattern" and hooked.model.config._attn_implementation != "eager":
            raise SiteError(f"{site}: load the model with attn_implementation='eager'")
        hooked.architecture.blocks[site.layer].location(site)
    return checked


def self_test(hooked: HookedModel) -> None:
    """Check on a few tokens that the sites are what they are called.

    Blocks run one by one give the model's own logits; in every block resid_pre + attn_out + mlp_out
    is resid_post, and attn_out and mlp_out follow from the heads and the residual before the MLP.
    The tolerance is 1e-5 (2e-2 in half precision) of the largest value.

    Raises:
        ModelError: one of these does not hold.
    """
    tokens = torch.randint(hooked.d_vocab, (2, 5), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    tolerance = 1e-5 if hooked.dtype in (torch.float32, torch.float64) else 2e-2
    grains = ("resid_pre", "head", "attn_out", "mlp_out", "resid_post")
    sites = [site for grain in grains for site in hooked.sites(grain)]
    expected = hooked.forward(tokens, attention_mask=mask)
    logits, captured = hooked.run(tokens, sites=sites, attention_mask=mask)
    name = hooked.architecture.name
    check_agreement(f"{name}: logits of its blocks run one by one", logits, expected, tolerance)
    for block in hooked.architecture.blocks:
        pre, z, attn_out, mlp_out, post = (captured[Site(g, block.layer)] for g in grains)
        with torch.no_grad():
            mid = pre if block.parallel else pre + attn_out
            for what, actual, claimed in (
                ("resid_pre + attn_out + mlp_out", pre + attn_out + mlp_out, post),
                ("the output projection of its heads", block.attn_out(z), attn_out),
                ("the MLP of the residual before it", block.mlp_out(mid), mlp_out),
            ):
                check_agreement(f"{name}, block {block.layer}: {what}", actual, claimed, tolerance)


def check_agreement(what: str, actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise a ModelError where the two differ by more than `tolerance` of the largest value."""
    error = float((actual - expected).abs().max())
    scale = max(1.0, float(expected.abs().max()))
    if not error <= tolerance * scale:
        raise ModelError(
            f"{what}: differs from the model's own by {error:.2g} (values up to {scale:.2g}), so "
            "this model is not laid out as its family is and cannot be hooked"
        )
