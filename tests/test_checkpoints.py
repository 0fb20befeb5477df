"""Opening checkpoints: each bad one gives its one line, and good ones round-trip."""

from __future__ import annotations

import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from checkpoint_factory import (
    INDEX,
    UP,
    WEIGHTS,
    Bomb,
    edit_bytes,
    edit_index,
    edit_json,
    edit_tensors,
    put,
    remove,
    same_weights,
    set_config,
    tiny_checkpoint,
    tiny_tokenizer,
    write,
)
from safetensors.torch import load_file
from tiny_models import FAMILIES, random_tokens, tiny_model

from mechinterp.checkpoints import open_checkpoint, save_checkpoint
from mechinterp.errors import CheckpointError

VERSION = transformers.__version__


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("good") / "llama").path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory, good) -> Path:
    path = tmp_path_factory.mktemp("good") / "sharded"
    open_checkpoint(good).load_model().save_pretrained(path, max_shard_size="16KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def refusal(path: str | Path, **options) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def to_pickle(path: Path) -> None:
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(path)))
    (path / WEIGHTS).unlink()


ONE_FILE = {
    "no config": (
        remove("config.json"),
        "{d}: has no config.json; give a directory saved with `model.save_pretrained`",
    ),
    "config not JSON": (
        write("config.json", '{"model_type": "llama",'),
        "{d}/config.json: is not JSON; restore the one saved with the weights",
    ),
    "config not an object": (
        write("config.json", "[]"),
        "{d}/config.json: is not a JSON object; restore the one saved with the weights",
    ),
    "no architectures": (
        set_config(architectures=None),
        '{d}/config.json: has no "architectures"; add them, for example "architectures": '
        '["LlamaForCausalLM"]',
    ),
    "unknown model type": (
        set_config(model_type="lama"),
        f"{{d}}/config.json: model_type 'lama' is unknown to transformers {VERSION}; correct it or "
        "install a version that knows it",
    ),
    "no model type": (
        set_config(model_type=None),
        f"{{d}}/config.json: model_type None is unknown to transformers {VERSION}; correct it or "
        "install a version that knows it",
    ),
    "not a language model": (
        set_config(architectures=["LlamaForSequenceClassification"]),
        "{d}/config.json: LlamaForSequenceClassification is not the causal language model of "
        "model_type 'llama' (LlamaForCausalLM); use a checkpoint with that head",
    ),
    "remote code": (
        set_config(
            model_type="mine",
            architectures=["MyModel"],
            auto_map={"AutoModelForCausalLM": "mine.MyModel"},
        ),
        "{d}/config.json: MyModel brings its own code (auto_map), which is never run; use one of "
        f"an architecture that transformers {VERSION} ships",
    ),
    "quantised": (
        set_config(quantization_config={"quant_method": "gptq", "bits": 4}),
        "{d}/config.json: the weights are quantised (quantization_config); de-quantise them, for "
        "example with `model.dequantize()`, and save the result",
    ),
    "config of another size": (
        set_config(intermediate_size=40),
        "{d}: tensor 'model.layers.0.mlp.down_proj.weight' has shape (32, 48) but config.json asks "
        "for (32, 40) (and 8 more); {remedy}",
    ),
    "config with fewer layers": (
        set_config(num_hidden_layers=2),
        "{d}: has a tensor 'model.layers.2.input_layernorm.weight' (and 8 more), which the "
        "LlamaForCausalLM that config.json describes does not know; {remedy}",
    ),
    "tensor missing": (
        edit_tensors(lambda tensors: tensors.pop(UP)),
        f"{{d}}: has no tensor '{UP}', which the LlamaForCausalLM that config.json describes "
        "needs; {remedy}",
    ),
    "tensor too many": (
        edit_tensors(lambda tensors: tensors.update(extra=torch.zeros(2))),
        "{d}: has a tensor 'extra', which the LlamaForCausalLM that config.json describes does not "
        "know; {remedy}",
    ),
    "ties what differs": (
        set_config(tie_word_embeddings=True),
        "{d}: 'lm_head.weight' and 'model.embed_tokens.weight' differ although config.json ties "
        'them; set "tie_word_embeddings": false there',
    ),
    "NaN": (
        put(float("nan")),
        f"{{d}}/{WEIGHTS}: tensor '{UP}' holds NaN or infinity; training diverged or the file is "
        "damaged, use an earlier checkpoint",
    ),
    "infinity": (
        put(float("-inf")),
        f"{{d}}/{WEIGHTS}: tensor '{UP}' holds NaN or infinity; training diverged or the file is "
        "damaged, use an earlier checkpoint",
    ),
    "no weights": (
        remove(WEIGHTS),
        f"{{d}}: has no {WEIGHTS}; copy or download it, or save the model again",
    ),
    "pickled weights": (
        to_pickle,
        f"{{d}}: has no {WEIGHTS}, only pickled weights (pytorch_model.bin), which can run code "
        "and are never read; convert them where you trust them: "
        "AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
    ),
    "another file of weights": (
        lambda path: (path / WEIGHTS).rename(path / "weights.safetensors"),
        f"{{d}}: has weights.safetensors but neither {WEIGHTS} nor {INDEX}; copy or download the "
        "missing file",
    ),
    "truncated data": (
        edit_bytes(lambda content: content[:-1]),
        f"{{d}}/{WEIGHTS}: is truncated (@-1 of @ bytes); copy, download or save it again",
    ),
    "truncated header": (
        edit_bytes(lambda content: content[:100]),
        f"{{d}}/{WEIGHTS}: is truncated (100 bytes); copy, download or save it again",
    ),
    "empty": (
        write(WEIGHTS, b""),
        f"{{d}}/{WEIGHTS}: is truncated (0 bytes); copy, download or save it again",
    ),
    "bytes too many": (
        edit_bytes(lambda content: content + b"\0\0"),
        f"{{d}}/{WEIGHTS}: has 2 bytes after its last tensor; copy, download or save it again",
    ),
    "git lfs pointer": (
        write(WEIGHTS, "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n"),
        f"{{d}}/{WEIGHTS}: is a Git LFS pointer, not the weights; run `git lfs pull`",
    ),
    "not safetensors": (
        write(WEIGHTS, b"PK\3\4 this is a zip archive"),
        f"{{d}}/{WEIGHTS}: is not a safetensors file; copy, download or save it again",
    ),
    "header not JSON": (
        write(WEIGHTS, struct.pack("<Q", 8) + b"no json!"),
        f"{{d}}/{WEIGHTS}: has no valid safetensors header; copy, download or save it again",
    ),
    "stored type unknown": (
        write(
            WEIGHTS,
            struct.pack("<Q", 58) + b'{"a": {"dtype": "F4", "shape": [2], "data_offsets":[0,1]}}',
        ),
        f"{{d}}/{WEIGHTS}: tensor 'a' is stored as F4, which is not supported; save the model in "
        "float32, bfloat16 or float16",
    ),
    "adapter": (
        lambda path: (path / "config.json").rename(path / "adapter_config.json"),
        "{d}: is an adapter, not a model; merge it with PEFT's `merge_and_unload()` and save the "
        "merged model",
    ),
    "trajectory": (
        lambda path: (remove("config.json")(path), (path / "step-000000").mkdir()),
        "{d}: is a trajectory; give one of its checkpoints",
    ),
    "provenance not JSON": (
        write("provenance.json", "{"),
        "{d}/provenance.json: is not JSON; restore it or delete it",
    ),
    "provenance with a misspelt field": (
        lambda path: edit_json(path / "provenance.json", sead=1),
        "{d}/provenance.json: unknown field 'sead' (known: action_shift, extra, objective, "
        "parent_hash, seed, step, task, versions); move it into `extra`",
    ),
    "provenance with a bad value": (
        lambda path: edit_json(path / "provenance.json", action_shift=[0.5, "x"]),
        "{d}/provenance.json: field 'action_shift' cannot be [0.5, 'x']; restore the file or "
        "delete it",
    ),
    "no tokenizer": (
        remove("tokenizer.json"),
        "{d}: has no tokenizer files; save them there with `tokenizer.save_pretrained(DIR)`, or "
        "use a task that brings its own token ids",
    ),
}


@pytest.mark.parametrize("case", ONE_FILE)
def test_bad_checkpoint_gives_its_line(case, good, tmp_path):
    spoil, expected = ONE_FILE[case]
    path = Path(shutil.copytree(good, tmp_path / "bad"))
    size = (path / WEIGHTS).stat().st_size
    spoil(path)
    remedy = "use the config.json that was saved with these weights, or save the model again"
    expected = expected.replace("{d}", str(path)).replace("{remedy}", remedy)
    expected = expected.replace("@-1", f"{size - 1:,}").replace("@", f"{size:,}")
    assert refusal(path, require_tokenizer=True) == expected
    assert not (path / "exploded").exists()


SHARDED = {
    "shards missing": (
        lambda path: [shard.unlink() for shard in sorted(path.glob("model-*"))[:2]],
        f"{{d}}/{INDEX}: shards missing from the directory: {{0}}, {{1}}; copy or download them "
        "again",
    ),
    "index names a tensor that no shard has": (
        lambda path: edit_index(ghost=sorted(path.glob("model-*"))[0].name)(path),
        f"{{d}}/{INDEX}: names tensors that are not in their shard: ghost; copy or download index "
        "and shards again",
    ),
    "index points outside": (
        edit_index(ghost="../model.safetensors"),
        f"{{d}}/{INDEX}: '../model.safetensors' is not the name of a .safetensors file beside it; "
        "copy, download or save it again",
    ),
    "index points to a pickle": (
        edit_index(ghost="pytorch_model.bin"),
        f"{{d}}/{INDEX}: 'pytorch_model.bin' is not the name of a .safetensors file beside it; "
        "copy, download or save it again",
    ),
    "index not JSON": (
        write(INDEX, "weight_map"),
        f"{{d}}/{INDEX}: is not a safetensors index; copy, download or save it again",
    ),
    "index of nothing": (
        write(INDEX, '{"weight_map": {}}'),
        f"{{d}}/{INDEX}: names no tensors; copy, download or save it again",
    ),
    "tensor in two shards": (
        lambda path: edit_tensors(
            lambda tensors: tensors.update(load_file(sorted(path.glob("model-*"))[0])),
            file=sorted(path.glob("model-*"))[1].name,
        )(path),
        "{d}/{1}: tensor 'lm_head.weight' is also in {0}; save the model again",
    ),
    "index missing": (
        remove(INDEX),
        f"{{d}}: has {{0}}, {{1}}, {{2}} and {{more}} more but neither {WEIGHTS} nor {INDEX}; copy "
        "or download the missing file",
    ),
}


@pytest.mark.parametrize("case", SHARDED)
def test_bad_shards_give_their_line(case, sharded, tmp_path):
    spoil, expected = SHARDED[case]
    path = Path(shutil.copytree(sharded, tmp_path / "bad"))
    shards = sorted(shard.name for shard in path.glob("model-*"))
    spoil(path)
    expected = expected.replace("{d}", str(path)).replace("{more}", str(len(shards) - 3))
    for index in range(3):
        expected = expected.replace(f"{{{index}}}", shards[index])
    assert refusal(path) == expected


def test_bad_paths_give_their_line(good, tmp_path):
    missing = tmp_path / "missing"
    assert refusal(missing) == f"{missing}: there is no such directory; correct the path"
    hub = "EleutherAI/pythia-70m"
    assert refusal(hub) == (
        f"{hub}: there is no such directory; if it is a hub id, download it first: "
        f"`hf download {hub} --local-dir DIR`"
    )
    file = good / WEIGHTS
    assert refusal(file) == (
        f"{file}: is a file; give the directory that has config.json and the weights"
    )
    assert refusal(tmp_path) == (
        f"{tmp_path}: has no config.json; give a directory saved with `model.save_pretrained`"
    )


@pytest.mark.parametrize("change", [{"hidden_size": "wide"}, {"hidden_act": "no such function"}])
def test_config_that_describes_no_model_is_refused(change, good, tmp_path):
    path = Path(shutil.copytree(good, tmp_path / "bad"))
    edit_json(path / "config.json", **change)
    message = refusal(path)
    assert message.startswith(f"{path}/config.json: does not describe a LlamaForCausalLM (")
    assert message.endswith("); correct it, or restore the one saved with the weights")


def test_hub_ids_are_downloaded_only_when_allowed(good, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda hub_id, **options: asked.append((hub_id, options)) or str(good),
    )
    assert "hf download" in refusal("org/name")
    assert asked == []
    assert open_checkpoint("org/name", allow_hub=True).path == good
    assert asked[0][0] == "org/name"
    assert not any(pattern.endswith("bin") for pattern in asked[0][1]["allow_patterns"])


def test_remote_code_of_a_shipped_architecture_is_ignored_aloud(good, tmp_path):
    path = Path(shutil.copytree(good, tmp_path / "with_code"))
    (path / "mine.py").write_text(f"open({str(path / 'exploded')!r}, 'w')")
    (path / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb(path)))
    auto_map = {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}
    edit_json(path / "config.json", auto_map=auto_map)
    with pytest.warns(UserWarning, match=r"auto_map \(remote code\) is ignored; LlamaForCausalLM"):
        checkpoint = open_checkpoint(path)
    assert checkpoint.content_hash == open_checkpoint(good).content_hash
    assert same_weights(checkpoint.load_model(), open_checkpoint(good).load_model())
    checkpoint.load_tokenizer()
    assert not (path / "exploded").exists()


def test_tokenizers_that_cannot_be_right_are_refused(good, tmp_path):
    path = Path(shutil.copytree(good, tmp_path / "bad"))
    tiny_tokenizer(n_words=70).save_pretrained(path)
    with pytest.raises(CheckpointError, match=r"makes ids up to 69 but .* vocab_size 64; restore"):
        open_checkpoint(path).load_tokenizer()
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="its tokenizer cannot be loaded"):
        open_checkpoint(path).load_tokenizer()
    remove("tokenizer.json")(path)
    with pytest.raises(CheckpointError, match="has no tokenizer files"):
        open_checkpoint(path).load_tokenizer()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_round_trips(family, tmp_path):
    model = tiny_model(family)
    saved = save_checkpoint(model, tmp_path / "saved")
    opened = open_checkpoint(tmp_path / "saved")
    assert opened == saved
    assert opened.architecture == type(model).__name__
    assert opened.n_parameters == sum(parameter.numel() for parameter in model.parameters())
    tokens = random_tokens(2, 7)
    loaded = opened.load_model()
    assert not loaded.training
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=0, atol=0)
    again = save_checkpoint(loaded, tmp_path / "again")
    assert again.content_hash == saved.content_hash


def test_load_options(good):
    model = open_checkpoint(good).load_model(dtype="bfloat16", attn_implementation="sdpa")
    assert model.dtype == torch.bfloat16
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(CheckpointError, match="dtype 'fp32' is unknown; use one of float32"):
        open_checkpoint(good).load_model(dtype="fp32")
    with pytest.raises(CheckpointError, match=r"attn_implementation='fast' .*; use 'eager' or"):
        open_checkpoint(good).load_model(attn_implementation="fast")


def test_import_is_light():
    code = (
        "import sys, mechinterp.checkpoints, mechinterp.smollm2\n"
        "heavy = {'torch', 'transformers', 'numpy', 'safetensors'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
