"""Saving is all or nothing, records where a checkpoint comes from, and can shift actions."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from checkpoint_factory import same_weights, tiny_checkpoint, tiny_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load
from tiny_models import tiny_model

from mechinterp.checkpoints import Provenance, open_checkpoint, save_checkpoint, with_action_shift
from mechinterp.checkpoints.provenance import library_versions
from mechinterp.errors import CheckpointError

PROVENANCE = Provenance(
    objective={"name": "utility_weighted", "weights": [1.8, 0.2]},
    step=400,
    seed=3,
    parent_hash="ab" * 32,
    task={"name": "triage", "settings": {"length": 12}},
    extra={"arm": "weighted_1.8"},
)


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_provenance_comes_back_with_versions(tmp_path):
    saved = tiny_checkpoint(tmp_path / "saved", provenance=PROVENANCE)
    opened = open_checkpoint(tmp_path / "saved")
    assert opened.provenance == replace(PROVENANCE, versions=library_versions())
    assert opened == saved
    assert opened.provenance.versions["torch"] == torch.__version__


def test_what_is_given_is_kept(tmp_path):
    model = tiny_model("llama")
    model.generation_config.max_new_tokens = 7
    checkpoint = save_checkpoint(
        model,
        tmp_path / "saved",
        tokenizer=tiny_tokenizer(),
        extra_files={"training_state/note.txt": b"state"},
    )
    assert checkpoint.load_model().generation_config.max_new_tokens == 7
    assert checkpoint.load_tokenizer()("word3 word5 nothing").input_ids == [3, 5, 63]
    assert (checkpoint.path / "training_state/note.txt").read_bytes() == b"state"
    copied = save_checkpoint(model, tmp_path / "copied", tokenizer=checkpoint)
    assert copied.tokenizer_parts == checkpoint.tokenizer_parts
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (copied.path / name).read_bytes() == (checkpoint.path / name).read_bytes()
    without = save_checkpoint(model, tmp_path / "without")
    assert not without.has_tokenizer
    with pytest.raises(CheckpointError, match="copied: has no tokenizer files"):
        save_checkpoint(model, tmp_path / "copied", tokenizer=without)
    assert open_checkpoint(copied.path) == copied


def test_saving_twice_gives_the_same_bytes(tmp_path):
    first = tiny_checkpoint(tmp_path / "first", provenance=PROVENANCE)
    second = tiny_checkpoint(tmp_path / "second", provenance=PROVENANCE)
    assert files(first.path) == files(second.path)


def test_weights_can_be_read_by_whoever_reads_the_config(tmp_path):
    path = tiny_checkpoint(tmp_path / "saved").path
    assert (path / "model.safetensors").stat().st_mode == (path / "config.json").stat().st_mode


@pytest.mark.parametrize("replacing", [False, True])
def test_a_failure_leaves_nothing(replacing, tmp_path, monkeypatch):
    path = tmp_path / "saved"
    if replacing:
        tiny_checkpoint(path)
    before = files(tmp_path)

    def fail(self, directory):
        assert list(directory.glob("*.safetensors"))  # the weights were on disk already
        raise OSError("no space left on device")

    monkeypatch.setattr(Provenance, "write", fail)
    with pytest.raises(OSError, match="no space left"):
        save_checkpoint(tiny_model("llama", seed=1), path)
    assert files(tmp_path) == before
    assert path.exists() == replacing
    assert len(list(tmp_path.iterdir())) == replacing


def test_a_model_with_nan_is_not_saved(tmp_path):
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(CheckpointError) as caught:
        save_checkpoint(model, tmp_path / "saved")
    assert str(caught.value) == (
        f"{tmp_path}/saved/model.safetensors: tensor 'model.norm.weight' holds NaN or infinity; "
        "training diverged or the file is damaged, use an earlier checkpoint"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_wrapped_model_is_not_saved(tmp_path):
    model = tiny_model("llama")
    model.model.layers[0].mlp = torch.nn.Sequential(model.model.layers[0].mlp)
    with pytest.raises(
        CheckpointError, match=r"saved: has no tensor 'model.layers.0.mlp.down_proj"
    ):
        save_checkpoint(model, tmp_path / "saved")
    model.lm_head.weight = torch.nn.Parameter(model.model.embed_tokens.weight.data[:, :8])
    with pytest.raises(CheckpointError, match=r"the model cannot be saved .* save the raw Hugging"):
        save_checkpoint(model, tmp_path / "saved")
    assert list(tmp_path.iterdir()) == []


def test_only_checkpoints_are_replaced(tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("years of work")
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    expected = "thesis: exists and is not a checkpoint; choose another path, or empty it"
    with pytest.raises(CheckpointError, match=expected):
        save_checkpoint(tiny_model("llama"), tmp_path / "thesis")
    with pytest.raises(CheckpointError, match="file: is a file; choose another path"):
        save_checkpoint(tiny_model("llama"), tmp_path / "file")
    assert files(tmp_path) == before
    first = tiny_checkpoint(tmp_path / "run")
    second = save_checkpoint(tiny_model("llama", seed=1), tmp_path / "run")
    assert first.content_hash != second.content_hash
    assert open_checkpoint(tmp_path / "run").content_hash == second.content_hash


@pytest.mark.parametrize("name", ["../outside", "/absolute", "config.json"])
def test_extra_files_stay_inside_and_replace_nothing(name, tmp_path):
    with pytest.raises(CheckpointError, match="must be a new name inside the checkpoint"):
        save_checkpoint(tiny_model("llama"), tmp_path / "saved", extra_files={name: b""})
    assert list(tmp_path.iterdir()) == []


shifts = st.integers(2, 4).flatmap(
    lambda n_actions: st.lists(
        st.lists(st.floats(-10, 10), min_size=n_actions, max_size=n_actions),
        min_size=1,
        max_size=3,
    )
)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("plain") / "plain", provenance=PROVENANCE)


@settings(max_examples=20, deadline=None)
@given(shifts)
def test_action_shifts_add_up_and_touch_nothing_else(plain, shifts):
    with tempfile.TemporaryDirectory() as directory:
        shifted = plain
        for index, shift in enumerate(shifts):
            shifted = with_action_shift(shifted, Path(directory, str(index)), shift)
        assert shifted == open_checkpoint(shifted.path, require_tokenizer=True)
        expected = torch.tensor(shifts, dtype=torch.float64).cumsum(0)[-1].tolist()
        assert shifted.provenance.action_shift == tuple(expected)
        assert shifted.provenance.parent_hash == plain.content_hash
        assert replace(
            shifted.provenance, action_shift=None, parent_hash=plain.provenance.parent_hash
        ) == (plain.provenance)
        assert shifted.content_hash == plain.content_hash
        assert shifted.behaviour_hash != plain.behaviour_hash == plain.content_hash
        assert shifted.tokenizer_parts == plain.tokenizer_parts
        content = (shifted.path / "model.safetensors").read_bytes()
        assert content == (plain.path / "model.safetensors").read_bytes()
        assert load(content).keys() == plain.shapes.keys()
    assert open_checkpoint(plain.path) == plain


def test_shifts_survive_without_hard_links_and_with_shards(plain, tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError("cross-device link")

    monkeypatch.setattr("os.link", refuse)
    plain.load_model().save_pretrained(tmp_path / "sharded", max_shard_size="16KB")
    shifted = with_action_shift(open_checkpoint(tmp_path / "sharded"), tmp_path / "shifted", [1, 2])
    assert open_checkpoint(tmp_path / "shifted") == shifted
    assert shifted.provenance.action_shift == (1.0, 2.0)
    assert same_weights(shifted.load_model(), plain.load_model())


@pytest.mark.parametrize("shift", [[], [float("nan"), 0.0], [float("inf")], ["a"], [True, False]])
def test_bad_shifts_are_refused(shift, plain, tmp_path):
    with pytest.raises(CheckpointError, match="must be finite numbers, one for each action"):
        with_action_shift(plain, tmp_path / "shifted", shift)
    assert list(tmp_path.iterdir()) == []


def test_shifts_for_different_numbers_of_actions_are_refused(plain, tmp_path):
    shifted = with_action_shift(plain, tmp_path / "two", [0.0, 1.0])
    expected = "action_shift has 2 numbers, but the shift to add has 3; give one number"
    with pytest.raises(CheckpointError, match=expected):
        with_action_shift(shifted, tmp_path / "three", [0.0, 1.0, 2.0])
