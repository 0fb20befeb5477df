"""The content hash follows config and weights alone; files are read as safetensors reads them."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from checkpoint_factory import (
    UP,
    WEIGHTS,
    edit_bytes,
    edit_json,
    edit_tensors,
    put,
    remove,
    same_weights,
    set_config,
    tiny_checkpoint,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model
from transformers import LlamaConfig

from mechinterp.checkpoints import open_checkpoint
from mechinterp.checkpoints.pretrained import essential_config
from mechinterp.checkpoints.weights import _has_non_finite, digest_tensor, read_tensors
from mechinterp.errors import CheckpointError


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good") / "llama").path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, good) -> Path:
    path = tmp_path_factory.mktemp("good") / "sharded"
    open_checkpoint(good).load_model().save_pretrained(path, max_shard_size="16KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def as_gpt2_of_old(path: Path) -> None:
    """As the first GPT-2 was saved: names without the head's prefix, and a mask among them."""
    tensors = {
        name.removeprefix("transformer."): tensor.clone()
        for name, tensor in load_file(path / WEIGHTS).items()
    }
    tensors["h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
    save_file(tensors, path / WEIGHTS)


def store_tied_twice(path: Path) -> None:
    def change(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    edit_tensors(change)(path)


def store_tied_under_other_name(path: Path) -> None:
    def change(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    edit_tensors(change)(path)


def reverse_files(path: Path) -> None:
    values = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(dict(reversed(values.items()))))
    tensors = load_file(path / WEIGHTS)
    save_file(dict(reversed(tensors.items())), path / WEIGHTS)


SAME = {
    "volatile fields": (
        "llama",
        set_config(
            transformers_version="4.40.0",
            _name_or_path="/somewhere",
            dtype=None,
            torch_dtype="bfloat16",
            use_cache=False,
            architectures=["LlamaModel", "LlamaForCausalLM"],
        ),
    ),
    "provenance": ("llama", lambda path: edit_json(path / "provenance.json", step=9, seed=3)),
    "no provenance, no tokenizer": ("llama", remove("provenance.json", "tokenizer.json")),
    "order of fields and tensors": ("llama", reverse_files),
    "tied weights stored twice": ("llama_tied_bias", store_tied_twice),
    "tied weights under their other name": ("llama_tied_bias", store_tied_under_other_name),
    "names and masks of old": ("gpt2", as_gpt2_of_old),
}


@pytest.mark.parametrize("case", SAME)
def test_hash_stays(case, tmp_path):
    family, change = SAME[case]
    before = tiny_checkpoint(tmp_path / "checkpoint", family)
    change(before.path)
    after = open_checkpoint(before.path)
    assert after.content_hash == before.content_hash
    assert same_weights(after.load_model(), tiny_model(family))


def test_hash_stays_when_transformers_adds_a_field(tmp_path):
    """A config of today, read by a class that has one field more."""
    path = tiny_checkpoint(tmp_path / "checkpoint").path
    values = json.loads((path / "config.json").read_text())

    class LaterConfig(LlamaConfig):
        sparkle: float = 0.5

    today, later = LlamaConfig.from_dict(values), LaterConfig.from_dict(values)
    assert later.to_dict()["sparkle"] == 0.5
    assert essential_config(later) == essential_config(today)
    values["sparkle"] = 0.6
    assert essential_config(LaterConfig.from_dict(values)) != essential_config(today)


def test_hash_stays_when_defaults_are_left_out(tmp_path):
    path = tiny_checkpoint(tmp_path / "checkpoint").path
    edit_json(path / "config.json", max_position_embeddings=2048)
    before = open_checkpoint(path)
    edit_json(path / "config.json", max_position_embeddings=None, rms_norm_eps=None, mlp_bias=None)
    assert open_checkpoint(path).content_hash == before.content_hash


def test_hash_stays_when_resharded(good, sharded):
    one, many = open_checkpoint(good), open_checkpoint(sharded)
    assert one.content_hash == many.content_hash
    assert one.shapes == many.shapes
    assert same_weights(one.load_model(), many.load_model())


def flip_lowest_bit(content: bytes) -> bytes:
    return content[:-4] + bytes([content[-4] ^ 1]) + content[-3:]


def swap_two_tensors(tensors) -> None:
    other = UP.replace("layers.1", "layers.2")
    tensors[UP], tensors[other] = tensors[other], tensors[UP]


CHANGED = {
    "one bit of one weight": edit_bytes(flip_lowest_bit),
    "two tensors swapped": edit_tensors(swap_two_tensors),
    "zero to minus zero": put(-0.0),
    "an activation function": set_config(hidden_act="gelu"),
    "a constant": set_config(rms_norm_eps=1e-5),
    "rotary base": set_config(rope_parameters={"rope_type": "default", "rope_theta": 5e4}),
    "stored type": edit_tensors(
        lambda tensors: tensors.update({name: value.half() for name, value in tensors.items()})
    ),
}


@pytest.mark.parametrize("case", CHANGED)
def test_hash_changes(case, good, tmp_path):
    path = Path(shutil.copytree(good, tmp_path / "changed"))
    put(0.0)(path)
    before = open_checkpoint(path)
    CHANGED[case](path)
    assert open_checkpoint(path).content_hash != before.content_hash


def test_reader_agrees_with_safetensors(good, sharded):
    for directory in (good, sharded):
        expected = {}
        for file in directory.glob("*.safetensors"):
            expected.update(load_file(file))
        tensors = read_tensors(directory)
        assert tensors.keys() == expected.keys()
        for name, tensor in tensors.items():
            assert tensor.shape == tuple(expected[name].shape)
            content = expected[name].numpy().tobytes()
            assert digest_tensor(tensor) == hashlib.sha256(content).hexdigest()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_cut_is_noticed(good, data):
    content = (good / WEIGHTS).read_bytes()
    length = data.draw(st.integers(0, len(content) - 1))
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, WEIGHTS).write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="is truncated"):
            read_tensors(Path(directory))


TORCH_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
@given(content=st.binary(min_size=8, max_size=64))
def test_non_finite_agrees_with_torch(dtype, content):
    content = content[: len(content) // 8 * 8]
    tensor = torch.frombuffer(bytearray(content), dtype=TORCH_DTYPES[dtype])
    expected = not torch.isfinite(tensor.double()).all()
    assert _has_non_finite(memoryview(content), dtype) == expected


@pytest.mark.parametrize("dtype", TORCH_DTYPES)
def test_every_kind_of_non_finite_is_found(dtype):
    for value in (float("nan"), float("inf"), float("-inf")):
        tensor = torch.tensor([1.0, value] * 4, dtype=torch.float32).to(TORCH_DTYPES[dtype])
        content = memoryview(tensor.view(torch.uint8).numpy().tobytes())
        assert _has_non_finite(content, dtype) == (not torch.isfinite(tensor.double()).all())
