"""Specs: a mistake gives one line that names the file, the field and what would be right."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from mechinterp import smollm2
from mechinterp.arm_names import kind_and_weights
from mechinterp.checkpoints import save_checkpoint
from mechinterp.errors import CheckpointError, SpecError
from mechinterp.plans import load_plan
from mechinterp.spec import load_study, load_task
from mechinterp.study_plan import arms_of, make_plan
from mechinterp.validation import load_validation, make_validation_plan

MAIN = Path(__file__).parents[1] / "studies" / "main.yaml"
UTILITY = MAIN.with_name("utility_weighted.yaml")


def set_in(value, path, new):
    *parents, last = path
    for key in parents:
        value = value[key]
    if new is None:
        del value[last]
    else:
        value[last] = new


@pytest.mark.parametrize("preset", [None, "quick", "full"])
def test_the_shipped_study_is_valid(preset):
    spec = load_study(MAIN, preset=preset)
    assert set(spec.tasks) == {"triage", "digits"}
    assert spec.seeds == (4 if preset == "quick" else 8)
    for task in spec.tasks.values():
        for regime in spec.regimes:
            steps = task.training_of(regime).checkpoint_steps
            assert steps is not None
            assert len(steps) >= 7  # 6 log-spaced ones and step 0


def test_a_preset_lies_over_the_spec():
    quick, full = (load_study(MAIN, preset=p).tasks["triage"] for p in ("quick", "full"))
    assert quick.settings == full.settings
    assert quick.init_steps < full.init_steps


@pytest.mark.parametrize(
    ("path", "new", "message"),
    [
        (["nose"], 1, "nose: unknown key; known here: arms"),
        (["seeds"], "many", "seeds: .*integer.*'many'"),
        (["seeds"], 0, "seeds: .*greater than or equal to 1"),
        (["tasks", "triage", "task"], None, "tasks.triage.task: missing"),
        (["tasks", "triage", "task"], "tirage", "'tirage' does not exist"),
        (["tasks", "triage", "nose"], 1, "tasks.triage.nose: unknown key; known here: analysis"),
        (["tasks", "triage", "settings", "nose"], 1, "tasks.triage.settings: .*'nose'"),
        (["tasks", "triage", "analysis"], {"ladder_itms": 1}, "ladder_itms: unknown key"),
        (["tasks", "triage", "model"], {"width": 1}, "unknown key 'width'"),
        (["tasks", "triage", "model"], {"d_model": 50}, "d_model .50. must be a multiple"),
        (["tasks", "triage", "training"], {"learning_rate": "fast"}, "learning_rate"),
        (["regimes"], ["sideways"], "regimes.0: "),
        (["weights"], {"w": "heavy"}, "weights.w"),
        (["tasks"], None, "tasks: missing"),
    ],
)
def test_bad_study(tmp_path, path, new, message):
    raw = copy.deepcopy(yaml.safe_load(MAIN.read_text()))
    set_in(raw, path, new)
    spec = tmp_path / "bad.yaml"
    spec.write_text(yaml.safe_dump(raw))
    with pytest.raises(SpecError, match=message) as caught:
        load_study(spec)
    assert "\n" not in str(caught.value)
    assert str(spec) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1, 2", "not YAML"),
        ("- a\n- b", "expected keys and values"),
        ("", "expected keys and values"),
    ],
)
def test_files_that_are_no_spec(tmp_path, text, message):
    (tmp_path / "x.yaml").write_text(text)
    with pytest.raises(SpecError, match=message):
        load_study(tmp_path / "x.yaml")
    with pytest.raises(SpecError, match="no such file"):
        load_study(tmp_path / "absent.yaml")


def test_an_unknown_preset_names_those_there_are():
    with pytest.raises(SpecError, match="no preset 'slow'; it has: quick, full"):
        load_study(MAIN, preset="slow")


def test_task_by_name_or_file(tmp_path):
    assert load_task("triage").make().name == "triage"
    path = tmp_path / "task.yaml"
    path.write_text("task: triage\nsettings: {n_decoys: 2}\ncosts: {w: [0.2, 1.8]}\n")
    assert load_task(path).make().n_decoys == 2  # type: ignore[attr-defined]
    with pytest.raises(SpecError, match="neither a task"):
        load_task("tirage")


def test_a_preset_may_leave_tasks_out(tmp_path):
    raw = yaml.safe_load(MAIN.read_text())
    raw["presets"]["one"] = {"only": ["digits"]}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert list(load_study(path, preset="one").tasks) == ["digits"]
    assert len(load_study(path).tasks) == len(raw["tasks"])
    path.write_text(yaml.safe_dump({**raw, "only": ["chess"]}))
    with pytest.raises(SpecError, match="only: no 'chess'; there are: digits, triage"):
        load_study(path)


@pytest.fixture(scope="module")
def like_smollm2(tmp_path_factory) -> Path:
    """A folder with a small network that has SmolLM2's tokenizer, named as studies name it."""
    try:
        tokenizer = smollm2._load_tokenizer(smollm2.find_gguf())
    except CheckpointError as error:
        pytest.skip(str(error))
    folder = tmp_path_factory.mktemp("start")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_attention_heads=1, **sizes)
    save_checkpoint(LlamaForCausalLM(config), folder / "smollm2", tokenizer=tokenizer)
    return folder


@pytest.mark.parametrize("path", sorted(MAIN.parent.glob("*.yaml")), ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", [None, "quick", "full"])
def test_every_study_that_is_shipped_can_be_planned(path, preset, monkeypatch, request):
    if path.stem == "smollm2":
        monkeypatch.chdir(request.getfixturevalue("like_smollm2"))
    if path.stem == "validation":
        assert make_validation_plan(load_validation(path, preset=preset)).steps
    else:
        assert load_plan(path, preset=preset).steps


def test_every_claim_of_the_shipped_finding_names_arms_that_it_trains():
    spec = load_study(UTILITY, preset="full")
    regimes = spec.regimes
    arms = {
        kind_and_weights(arm)[0]
        for name in spec.tasks
        for regime in regimes
        for arm in arms_of(spec, name, regime)
    } | {"ex_post", *spec.refits}
    for name, claim in spec.claims.items():
        assert {*claim.arms, claim.against or "ex_post"} <= arms, name
        assert set(claim.tasks) <= set(spec.tasks), name
    assert spec.seeds >= spec.seeds_for_claims
    for task in spec.tasks.values():
        assert task.n_checkpoints >= 6


CLAIM = {"question": "?", "measure": "learning", "arms": ["weighted"], "expected": "more"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"arms": ["weigthed"]}, "claims.harm.arms: no 'weigthed'; there are: crt, "),
        ({"arms": ["weighted_1.8"], "against": "expost"}, "claims.harm.against: no 'expost'"),
        ({"tasks": ["chess"]}, "claims.harm.tasks: no 'chess'; there are: digits, triage"),
    ],
)
def test_a_claim_about_nothing_is_refused(tmp_path, change, message):
    raw = yaml.safe_load(MAIN.read_text())
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**raw, "claims": {"harm": CLAIM | change}}))
    with pytest.raises(SpecError, match=message):
        load_study(path)


def test_weights_are_named_by_numbers(tmp_path):
    raw = yaml.safe_load(MAIN.read_text())
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump({**raw, "weights": {"skewed": [0.2, 1.8]}}))
    with pytest.raises(SpecError, match=r"weights.skewed.*name weights by a number"):
        load_study(path)


def test_an_optional_task_is_left_out_without_its_file(tmp_path, capsys):
    raw = yaml.safe_load(MAIN.read_text())
    raw["tasks"]["xrays"] = {
        "task": "pneumonia",
        "settings": {"path": str(tmp_path / "absent.npz")},
        "optional": True,
    }
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))
    assert set(load_study(path).tasks) == {"triage", "digits"}
    assert "tasks.xrays: left out: no file" in capsys.readouterr().err


def test_a_step_knows_its_tasks_data_by_content_and_version(tmp_path, monkeypatch):
    data = tmp_path / "images.npz"
    raw = yaml.safe_load(MAIN.read_text())
    raw["tasks"] = {"xrays": {"task": "pneumonia", "settings": {"path": str(data)}}}
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw))

    def keys(content=b"once"):
        data.write_bytes(content)
        return [step.key for step in make_plan(load_study(path)).steps]

    first = keys()
    assert keys() == first
    assert not set(keys(b"repaired")) & set(first)
    monkeypatch.setattr("mechinterp.tasks.pneumonia.Pneumonia.version", 2)
    assert not set(keys()) & set(first)


def test_a_study_goes_task_by_task():
    plan = make_plan(load_study(MAIN))
    tasks = [step.labels["task"] for step in plan.steps]
    assert tasks == sorted(tasks, key=["triage", "digits"].index)
    assert len({step.key for step in plan.steps}) == len(plan.steps)


def test_steps_do_not_depend_on_options_left_at_their_defaults(tmp_path):
    raw = yaml.safe_load(MAIN.read_text())
    raw["tasks"]["triage"]["analysis"]["ladder_items"] = 15_000  # what it is anyway
    path = tmp_path / "study.yaml"
    path.write_text(yaml.safe_dump(raw, sort_keys=False))
    ours, theirs = (make_plan(load_study(p)).steps for p in (MAIN, path))
    assert [step.key for step in ours] == [step.key for step in theirs]
