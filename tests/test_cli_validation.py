"""The commands lesion and lesions, as a user types them."""

from __future__ import annotations

import pytest

from mechinterp.checkpoints import open_checkpoint, save_checkpoint
from mechinterp.cli import main
from mechinterp.tasks import get
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.fixture
def checkpoint(tmp_path):
    return save_checkpoint(initial_model(ModelConfig(), get("triage"), seed=0), tmp_path / "sound")


def test_a_lesion_is_saved_with_its_origin(checkpoint, tmp_path, capsys):
    out = tmp_path / "lesioned"
    arguments = (str(checkpoint.path), "erase=0.5+shift=2", "--task", "triage", "--out", str(out))
    assert run("lesion", *arguments) == 0
    assert "damages: both" in capsys.readouterr().out
    saved = open_checkpoint(out)
    assert saved.provenance is not None
    assert saved.provenance.parent_hash == checkpoint.content_hash
    assert saved.provenance.extra == {"lesion": "erase=0.5+shift=2"}
    first = saved.content_hash
    assert run("lesion", *arguments) == 0
    assert open_checkpoint(out).content_hash == first


@pytest.mark.parametrize("dose", ["bad=1", "shift=x", "shift=1+erase=1"])
def test_a_bad_dose_leaves_nothing(checkpoint, tmp_path, capsys, dose):
    out = tmp_path / "lesioned"
    assert run("lesion", str(checkpoint.path), dose, "--task", "triage", "--out", str(out)) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not out.exists()


def test_the_kinds_are_listed(capsys):
    assert run("lesions") == 0
    assert "rotate         choosing   degrees of the readout direction" in capsys.readouterr().out
