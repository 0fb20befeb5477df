"""Pairs and trajectories: what belongs together is accepted, what does not gives its one line."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoint_factory import (
    edit_json,
    edit_tensors,
    remove,
    set_config,
    tiny_checkpoint,
    tiny_tokenizer,
)
from tiny_models import tiny_model

from mechinterp.checkpoints import (
    CheckpointPair,
    Provenance,
    Trajectory,
    open_checkpoint,
    save_checkpoint,
    step_directory,
)
from mechinterp.errors import CheckpointError


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    return tiny_checkpoint(tmp_path_factory.mktemp("pair") / "before")


@pytest.fixture
def copy(before, tmp_path) -> Path:
    return Path(shutil.copytree(before.path, tmp_path / "after"))


def test_pairs_of_one_model_are_accepted(before, tmp_path):
    after = save_checkpoint(tiny_model("llama", seed=1), tmp_path / "after", tokenizer=before)
    half = save_checkpoint(
        tiny_model("llama", seed=2, dtype="bfloat16"), tmp_path / "half", tokenizer=before
    )
    pair = CheckpointPair.open(before.path, after.path, half.path, require_tokenizer=True)
    assert pair == CheckpointPair(before, after, half)
    assert CheckpointPair.open(before.path, after.path).control is None


def test_tokenizers_are_compared_by_what_they_do(before, copy):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(5)
    tokenizer.backend_tokenizer.enable_padding()
    tokenizer.save_pretrained(copy)
    assert (copy / "tokenizer.json").read_bytes() != (before.path / "tokenizer.json").read_bytes()
    CheckpointPair(before, open_checkpoint(copy))


def give_other_tokenizer(path: Path) -> None:
    tiny_tokenizer(first="other").save_pretrained(path)


def halve_heads(path: Path) -> None:
    """The same tensors, read as half as many heads."""
    set_config(num_attention_heads=2, num_key_value_heads=1, head_dim=16)(path)


def tie(path: Path) -> None:
    set_config(tie_word_embeddings=True)(path)
    edit_tensors(lambda tensors: tensors.pop("lm_head.weight"))(path)


def other_model(family: str, **config):
    def change(path: Path) -> None:
        shutil.rmtree(path)
        model = tiny_model(family)
        if config:
            model = type(model)(type(model.config).from_dict({**model.config.to_dict(), **config}))
        save_checkpoint(model, path, tokenizer=tiny_tokenizer())

    return change


SAME = "choose checkpoints of one architecture and size"
INCOMPARABLE = {
    "architecture": (
        other_model("mistral"),
        f"it is a MistralForCausalLM, the other a LlamaForCausalLM; {SAME}",
    ),
    "layers": (
        other_model("llama", num_hidden_layers=2),
        f"num_hidden_layers is 2, the other's 3; {SAME}",
    ),
    "vocabulary": (
        other_model("llama", vocab_size=70),
        f"vocab_size is 70, the other's 64; {SAME}",
    ),
    "heads": (halve_heads, f"num_attention_heads is 2, the other's 4; {SAME}"),
    "tensors": (
        other_model("llama", attention_bias=True),
        "tensor 'model.layers.0.self_attn.k_proj.bias' is (16,), the other's absent; " + SAME,
    ),
    "tokenizer missing": (
        remove("tokenizer.json"),
        "{after} has no tokenizer; copy the other's tokenizer files into it",
    ),
    "tokenizer": (
        give_other_tokenizer,
        "their tokenizers differ in model; choose checkpoints that share one",
    ),
}


def test_an_unembedding_of_its_own_compares_with_a_tied_one(before, copy):
    """A lesion or a training run may untie what was tied; the networks stay comparable."""
    tie(copy)
    tied = open_checkpoint(copy)
    assert "lm_head.weight" not in tied.shapes
    CheckpointPair(before, tied)
    CheckpointPair(tied, before)


@pytest.mark.parametrize("case", INCOMPARABLE)
@pytest.mark.parametrize("as_control", [False, True])
def test_incomparable_pairs_give_their_line(case, as_control, before, copy):
    change, reason = INCOMPARABLE[case]
    change(copy)
    other = open_checkpoint(copy)
    arguments = (before, before, other) if as_control else (before, other)
    with pytest.raises(CheckpointError) as caught:
        CheckpointPair(*arguments)
    assert str(caught.value) == (
        f"{copy}: cannot be compared with {before.path}: {reason.replace('{after}', str(copy))}"
    )


@pytest.fixture
def run(tmp_path) -> Path:
    """Steps 0, 40 and 400, saved out of order, with what else a run may leave."""
    path = tmp_path / "run"
    for step in (40, 400, 0):
        save_checkpoint(
            tiny_model("llama", seed=step),
            step_directory(path, step),
            provenance=Provenance(step=step),
            extra_files={"training_state/optimizer.bin": b"not read"},
        )
    (path / "training_state").mkdir()
    (path / ".step-000500.tmp-1").mkdir()
    (path / "step-000600").write_text("a file")
    return path


def test_trajectory_is_in_step_order(run):
    trajectory = Trajectory.open(run)
    assert trajectory.steps == (0, 40, 400)
    assert len(trajectory) == 3
    assert [checkpoint.path.name for checkpoint in trajectory] == [
        "step-000000",
        "step-000040",
        "step-000400",
    ]
    assert trajectory[-1] == trajectory[2] == open_checkpoint(run / "step-000400")
    assert trajectory[-1] is trajectory[2]
    with pytest.raises(IndexError):
        trajectory[3]


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        list(Trajectory.open(path))
    return str(caught.value)


def test_bad_trajectories_give_their_line(run, tmp_path):
    missing, empty, single = run / "missing", tmp_path / "empty", run / "step-000040"
    empty.mkdir()
    remedy = "so it is no trajectory; give a directory that has step-000000, step-000400 and so on"
    assert refusal(missing) == f"{missing}: there is no such directory; correct the path"
    assert refusal(empty) == f"{empty}: has no checkpoints, {remedy}"
    assert refusal(single) == f"{single}: is a single checkpoint, {remedy}"

    shutil.copytree(single, run / "step-40")
    assert refusal(run) == f"{run}: step-000040 and step-40 are the same step; delete one"
    shutil.rmtree(run / "step-40")

    edit_json(single / "provenance.json", step=41)
    assert refusal(run) == (
        f"{single}/provenance.json: says step 41, its directory says step 40; rename the directory"
    )
    shutil.rmtree(single)
    tiny_checkpoint(single, "mistral")
    assert refusal(run) == (
        f"{single}: does not belong with step-000000: it is a MistralForCausalLM, the other a "
        "LlamaForCausalLM; keep one run in a trajectory"
    )
    (single / "config.json").unlink()
    assert refusal(run) == (
        f"{single}: has no config.json; give a directory saved with `model.save_pretrained`"
    )


def test_opening_a_trajectory_reads_no_weights(run):
    (run / "step-000040" / "model.safetensors").write_bytes(b"")
    trajectory = Trajectory.open(run)
    assert trajectory[0].provenance.step == 0
    with pytest.raises(CheckpointError, match="is truncated"):
        trajectory[1]
