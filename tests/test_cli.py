"""The command line: quick help, one clear line for bad input, and nothing half-written."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from pydantic import TypeAdapter
from tiny_study import ANALYSIS, write_spec

from mechinterp import tasks
from mechinterp.checkpoints import save_checkpoint
from mechinterp.cli import main
from mechinterp.files import read_json, read_table
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model
from mechinterp.verdict import Verdict

COMMAND = str(Path(sys.executable).parent / "mechinterp")
TASK = {"linear": [1.5], "xor": [2.0], "n_fillers": 1}


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two random networks and a task file."""
    directory = tmp_path_factory.mktemp("pair")
    config = ModelConfig(n_layers=2, d_model=16, n_heads=2, n_kv_heads=2, d_mlp=16)
    for seed, name in enumerate(("before", "after")):
        model = initial_model(config, tasks.get("triage", **TASK), seed=seed)
        save_checkpoint(model, directory / name)
    task = {"task": "triage", "settings": TASK, "analysis": ANALYSIS}
    (directory / "task.yaml").write_text(yaml.safe_dump(task))
    return directory


def run(capsys, *arguments):
    """Exit status, standard output and standard error of a command."""
    status = 0
    try:
        main([str(a) for a in arguments])
    except SystemExit as exit:
        status = exit.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def children_seconds():
    """Processor time, which a busy machine changes less than the clock's."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_help_and_import_are_quick():
    heavy = (
        "import sys, mechinterp.cli; print([m for m in ('torch', 'pandas') if m in sys.modules])"
    )
    loaded = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True)
    assert loaded.stdout.strip() == "[]"
    begun = children_seconds()
    shown = subprocess.run([COMMAND, "--help"], capture_output=True, text=True)
    assert children_seconds() - begun < 1
    for command in ("study", "compare", "probe", "patch", "figures", "report", "tasks", "inspect"):
        assert command in shown.stdout
    module = [sys.executable, "-m", "mechinterp", "--help"]
    assert "separate" in subprocess.run(module, capture_output=True, text=True).stdout


def test_tasks(capsys):
    _, out, _ = run(capsys, "tasks")
    assert {line.split()[0] for line in out.splitlines()} == set(tasks.names())
    _, out, _ = run(capsys, "tasks", "triage")
    assert tasks.get("triage", **yaml.safe_load(out)["settings"]) == tasks.get("triage")


def test_inspect(capsys, pair):
    status, out, _ = run(capsys, "inspect", pair / "before")
    assert status == 0
    assert "LlamaForCausalLM" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("inspect", "/absent"), "/absent"),
        (("inspect", "org/name"), "hf download"),
        (("tasks", "tirage"), "'tirage' does not exist"),
        (("study", "/absent.yaml", "--out", "OUT"), "/absent.yaml: no such file"),
        (("compare", "/absent", "/absent", "--task", "triage", "--out", "OUT"), "/absent"),
        (("compare", "BEFORE", "AFTER", "--task", "tirage", "--out", "OUT"), "neither a task"),
        (("compare", "BEFORE", "AFTER", "--task", "sentiment", "--out", "OUT"), "tokenizer"),
        (("figures", "/absent"), "has no tables/"),
        (("report", "/absent"), "has no tables/"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, pair, tmp_path, arguments, message):
    places = {"BEFORE": pair / "before", "AFTER": pair / "after", "OUT": tmp_path / "out"}
    status, _, err = run(capsys, *(places.get(a, a) for a in arguments))
    assert status == 2
    assert err.count("\n") == 1
    assert err.startswith("error: ")
    assert message in err
    assert not (tmp_path / "out").exists()


def test_a_bad_spec_is_one_line(capsys, tmp_path):
    spec = write_spec(tmp_path)
    spec.write_text(spec.read_text() + "nose: 1\n")
    status, _, err = run(capsys, "study", spec, "--out", tmp_path / "out")
    assert status == 2
    assert "nose: unknown key" in err
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_with_nan_is_refused(capsys, pair, tmp_path):
    model = initial_model(ModelConfig(n_layers=1, d_model=16), tasks.get("triage"), seed=0)
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    status, _, err = run(capsys, "inspect", tmp_path / "nan")
    assert status == 2
    assert "lm_head.weight" in err


def test_compare_leaves_verdict_tables_figures_and_report(capsys, pair, tmp_path):
    arguments = ("compare", pair / "before", pair / "after", "--control", pair / "before")
    out = tmp_path / "out"
    status, printed, _ = run(capsys, *arguments, "--task", pair / "task.yaml", "--out", out)
    assert status == 0
    TypeAdapter(Verdict).validate_json((out / "verdict.json").read_bytes(), strict=True)
    verdict = read_json(out / "verdict.json")
    assert verdict["verdict"] in ("none", "learning", "choosing", "both", "inconclusive")
    assert f"verdict: {verdict['verdict']}" in printed
    for side in ("learning", "choosing"):
        assert set(verdict[side]) == {"delta", "ci", "p", "state"}
    assert verdict["reference"] == "control"
    assert set(verdict["minimum_detectable"]) == {"learning", "choosing"}
    assert (out / "report.html").is_file()
    assert {path.stem for path in (out / "tables").glob("*.parquet")} >= {
        *("ladder", "ladder_half", "losses", "contrasts", "probes", "patching"),
        *("crossing", "cross_checkpoint", "calibration", "calibration_summary"),
    }
    assert (out / "figures" / "crossing_triage.svg").is_file()


def test_the_verdict_is_stated_at_the_costs_asked_for(capsys, pair, tmp_path):
    task = yaml.safe_load((pair / "task.yaml").read_text()) | {"costs": {"w1.8": [0.2, 1.8]}}
    (tmp_path / "task.yaml").write_text(yaml.safe_dump(task))
    arguments = ("compare", pair / "before", pair / "after", "--task", tmp_path / "task.yaml")
    status, _, err = run(capsys, *arguments, "--costs", "w2", "--out", tmp_path / "out")
    assert (status, err.count("\n")) == (2, 1)
    assert "it has: symmetric, w1.8" in err
    assert not (tmp_path / "out").exists()
    run(capsys, *arguments, "--costs", "w1.8", "--out", tmp_path / "out")
    assert read_json(tmp_path / "out" / "verdict.json")["costs"] == "w1.8"


def test_compare_goes_on_where_it_was_stopped(capsys, pair, tmp_path, monkeypatch):
    from analyses import crossing, ladder

    arguments = ("compare", pair / "before", pair / "after", "--task", pair / "task.yaml")
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run(capsys, *arguments, "--out", whole)
    with monkeypatch.context() as patch:
        patch.setattr(crossing, "pair_tables", interrupt)
        assert run(capsys, *arguments, "--out", stopped)[0] == 130
    assert not (stopped / "verdict.json").exists()
    monkeypatch.setattr(ladder, "pair_tables", interrupt)
    assert run(capsys, *arguments, "--out", stopped)[0] == 0
    for name in ("verdict.json", "tables/ladder.parquet", "tables/crossing.parquet"):
        assert (whole / name).read_bytes() == (stopped / name).read_bytes()


def interrupt(pair):
    raise KeyboardInterrupt


def test_a_network_and_itself_differ_in_nothing(capsys, pair, tmp_path):
    arguments = ("compare", pair / "before", pair / "before", "--task", pair / "task.yaml")
    run(capsys, *arguments, "--out", tmp_path / "out")
    verdict = read_json(tmp_path / "out" / "verdict.json")
    assert verdict["verdict"] == "none"
    assert verdict["learning"]["delta"] == verdict["choosing"]["delta"] == 0.0


def test_single_instruments(capsys, pair, tmp_path):
    for command, table in (
        ("probe", "probes"),
        ("patch", "patching"),
        ("circuits", "circuit_edges"),
    ):
        out = tmp_path / command
        status, printed, _ = run(
            capsys, command, pair / "before", "--task", pair / "task.yaml", "--out", out
        )
        assert status == 0
        assert f"{table}.parquet" in printed


def test_probes_along_the_prompt(capsys, pair, tmp_path):
    arguments = ("probe", pair / "before", pair / "after", "--task", pair / "task.yaml")
    status, printed, _ = run(capsys, *arguments, "--positions", "all", "--out", tmp_path)
    assert status == 0
    assert "probe_positions.parquet" in printed
    table = read_table(tmp_path / "tables" / "probe_positions.parquet")
    assert "change" in set(table["kind"])
    assert {"start", "decision"} & set(table["unit"]) == {"decision"}  # all start the same
    assert (tmp_path / "figures" / "probe_positions_triage.svg").is_file()


def test_grains_to_patch_can_be_chosen(capsys, pair, tmp_path):
    arguments = ("patch", pair / "before", "--task", pair / "task.yaml", "--out", tmp_path)
    assert run(capsys, *arguments, "--grain", "q", "--grain", "resid_mid")[0] == 0
    table = read_table(tmp_path / "tables" / "patching.parquet")
    assert set(table["grain"]) == {"q", "resid_mid"}
    assert {"head 0", "head 1"} <= set(table["unit"])
    status, _, err = run(capsys, *arguments, "--grain", "resid")
    assert (status, err.count("\n")) == (2, 1)
    assert "patch_grains" in err


def test_circuits_of_a_pair_are_compared(capsys, pair, tmp_path):
    arguments = ("circuits", pair / "before", pair / "after", "--task", pair / "task.yaml")
    assert run(capsys, *arguments, "--out", tmp_path)[0] == 0
    tables = {path.stem: read_table(path) for path in (tmp_path / "tables").glob("*.parquet")}
    assert set(tables) == {
        *("circuit_edges", "faithfulness", "faithfulness_summary"),
        *("circuit_overlap", "circuit_nodes", "crosswise_faithfulness"),
    }
    edges = tables["circuit_edges"]
    assert set(edges["arm"]) == {"before", "after"}
    for _, rows in edges.groupby("arm"):
        assert rows["in_circuit"].any()
    whole = tables["faithfulness"].query("share == 1 and kind == 'scored'")["faithfulness"]
    assert whole.tolist() == pytest.approx([1, 1], abs=1e-3)
    assert (tmp_path / "figures" / "circuits.svg").is_file()


@pytest.mark.parametrize(("name", "file"), [("ladder", "ladder"), ("crossing", "crossing_triage")])
def test_analyses_and_figures_run_as_scripts(pair, tmp_path, name, file):
    root, before, after = Path(__file__).parents[1], pair / "before", pair / "after"

    def script(path, *arguments):
        command = [sys.executable, root / path, *arguments]
        result = subprocess.run(command, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr

    task = ("--task", pair / "task.yaml")
    script(f"analyses/{name}.py", before, after, *task, "--out", tmp_path)
    assert (tmp_path / "figures" / f"{file}.pdf").is_file()
    script(f"figures/{name}.py", tmp_path / "tables", "--out", tmp_path / "again")
    first, second = (tmp_path / d / f"{file}.svg" for d in ("figures", "again"))
    assert first.read_bytes() == second.read_bytes()
