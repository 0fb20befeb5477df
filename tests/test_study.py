"""The study end to end, at a size for tests: complete, resumable, and compare agrees."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from tiny_study import write_spec

from mechinterp.files import read_json, read_table, write_table
from mechinterp.spec import load_study, load_task
from mechinterp.study import run_study
from mechinterp.study_plan import make_plan

TABLES = {
    *("calibration", "calibration_summary", "competence", "contrasts", "cross_checkpoint"),
    *("crossing", "ladder", "ladder_in_full", "losses", "losses_in_full", "patching", "probes"),
    *("gradients", "gradients_latents", "gradients_posterior", "incentives", "measures"),
    *("training", "verdicts"),
}
QUIET = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("study")
    spec = write_spec(directory)
    out = directory / "out"
    run_study(spec, out=out, n_workers=2, command="test")
    return spec, out


def test_everything_is_left(finished):
    _, out = finished
    assert {path.stem for path in (out / "tables").glob("*.parquet")} == TABLES
    assert (out / "report.html").stat().st_size > 10_000
    manifest = read_json(out / "manifest.json")
    assert manifest["seeds"] == [0, 1]
    assert manifest["not_powered"]
    assert set(manifest["tables"]) == TABLES
    for name in ("dissociation", "ladder", "crossing_triage"):
        for suffix in ("pdf", "svg", "png"):
            assert (out / "figures" / f"{name}.{suffix}").is_file()
    checkpoints = out / "checkpoints" / "triage" / "branched"
    arms = {path.name for path in checkpoints.iterdir()}
    assert arms == {"symmetric", "symmetric_reordered", "weighted_1.8", "ex_post_1.8"}


def test_rungs_add_up(finished):
    _, out = finished
    losses = read_table(out / "tables" / "losses_in_full.parquet")
    keys = ["task", "regime", "arm", "seed", "step", "costs", "currency"]
    wide = losses.pivot(index=keys, columns="loss", values="value")
    np.testing.assert_allclose(wide["choosing"], wide["threshold"] + wide["readout"])
    np.testing.assert_allclose(
        wide["total"], wide["choosing"] + wide["discarded"] + wide["learning"]
    )
    np.testing.assert_allclose(wide["learning"], wide["not_encoded"] + wide["not_combined"])


def test_a_second_run_does_nothing(finished):
    spec, out = finished
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    begun = time.monotonic()
    run_study(spec, out=out, n_workers=2)
    assert time.monotonic() - begun < 5
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == before


def test_what_is_claimed_is_judged_again_when_it_changes(finished, tmp_path):
    """Steps are done; tables, report and checkpoints that rest on the spec are made anew."""
    spec, out = finished
    again = tmp_path / "again"
    shutil.copytree(out, again, symlinks=True)
    write_table(again / "tables" / "claims.parquet", pd.DataFrame({"claim": ["gone"]}))
    (again / "figures" / "crossing_chess.svg").write_text("<svg/>")
    (again / "figures" / "own.svg").write_text("<svg/>")
    raw = yaml.safe_load(spec.read_text())
    changed = tmp_path / "tiny.yaml"
    changed.write_text(yaml.safe_dump({**raw, "question": "And now?", "seeds_for_claims": 2}))
    steps = set((again / "steps").rglob("step.json"))
    run_study(changed, out=again, n_workers=2)
    assert set((again / "steps").rglob("step.json")) == steps
    assert "And now?" in (again / "report.html").read_text()
    words = set(read_table(again / "tables" / "verdicts.parquet")["verdict"])
    assert "not powered" not in words
    assert {path.stem for path in (again / "tables").glob("*.parquet")} == TABLES
    assert not (again / "figures" / "crossing_chess.svg").exists()
    assert (again / "figures" / "own.svg").exists()


def test_presets_share_what_is_equal(finished):
    spec, out = finished
    one = make_plan(load_study(spec, preset="one"))
    assert all(step.is_done(out) for step in one.steps)


def test_compare_reproduces_the_studys_numbers(finished, tmp_path):
    """Ladder, probes and crossing of a pair, from its checkpoints and the study's task file."""
    from analyses import crossing, ladder, probes
    from analyses.pair import Pair

    _, out = finished
    task = load_task(out / "tasks" / "triage.yaml")
    runs = out / "checkpoints" / "triage"
    pair = Pair.open(
        runs / "from_init/symmetric/seed-1/step-000012",
        runs / "branched/weighted_1.8/seed-1/step-000008",
        task=task,
    )
    ours = ladder.pair_tables(pair)["ladder"]
    theirs = read_table(out / "tables" / "ladder_in_full.parquet")
    theirs = theirs[
        (theirs["regime"] == "branched") & (theirs["arm"] == "weighted_1.8") & (theirs["seed"] == 1)
    ]
    keys = ["costs", "currency", "rung"]
    joined = theirs[theirs["step"] == 8].merge(ours[ours["arm"] == "after"], on=keys)
    assert len(joined) == len(theirs[theirs["step"] == 8])
    np.testing.assert_allclose(joined["value_x"], joined["value_y"], rtol=1e-9)

    ours = probes.pair_tables(pair)["probes"]
    theirs = read_table(out / "tables" / "probes.parquet")
    theirs = theirs[
        (theirs["regime"] == "branched")
        & (theirs["arm"] == "weighted_1.8")
        & (theirs["seed"] == 1)
        & (theirs["step"] == 8)
        & (theirs["kind"] == "latent")
    ]
    joined = theirs.merge(ours[ours["arm"] == "after"], on=["layer", "latent", "kind", "measure"])
    assert len(joined) == len(theirs) > 0
    np.testing.assert_allclose(joined["value_x"], joined["value_y"], rtol=1e-9)

    ours = crossing.pair_tables(pair)["crossing"]
    theirs = read_table(out / "tables" / "crossing.parquet")
    theirs = theirs[(theirs["arm"] == "weighted_1.8") & (theirs["seed"] == 1)]
    joined = theirs.merge(ours, on=["cut", "stitch", "costs", "currency", "readout"])
    assert len(joined) == len(theirs)
    np.testing.assert_allclose(joined["phi_front_x"], joined["phi_front_y"], atol=1e-9)


def test_another_task_than_the_trained_one_is_refused(finished):
    from analyses.pair import Pair
    from mechinterp.errors import SpecError

    _, out = finished
    path = out / "checkpoints/triage/branched/symmetric/seed-0/step-000008"
    with pytest.raises(SpecError, match="was trained on task 'triage', --task is 'digits'"):
        Pair.open(path, task=load_task("digits"))


def test_an_ex_post_checkpoint_reproduces_its_arm(finished):
    from analyses import ladder
    from analyses.pair import Pair

    _, out = finished
    path = out / "checkpoints/triage/branched/ex_post_1.8/seed-0/step-000008"
    pair = Pair.open(path, task=load_task(out / "tasks" / "triage.yaml"))
    ours = ladder.pair_tables(pair)["ladder"]
    theirs = read_table(out / "tables" / "ladder_in_full.parquet")
    theirs = theirs[
        (theirs["regime"] == "branched")
        & (theirs["arm"] == "ex_post_1.8")
        & (theirs["seed"] == 0)
        & (theirs["step"] == 8)
    ]
    joined = theirs.merge(ours, on=["costs", "currency", "rung"])
    assert len(joined) == len(theirs) > 0
    np.testing.assert_allclose(joined["value_x"], joined["value_y"], rtol=1e-9)


@pytest.mark.slow
def test_killed_anywhere_it_ends_with_the_same_tables(finished, tmp_path):
    """SIGKILL after ever longer whiles, until the study is through."""
    spec, out = finished
    again = tmp_path / "again"
    command = Path(sys.executable).parent / "mechinterp"
    arguments = [str(a) for a in (command, "study", spec, "--out", again, "--workers", 2)]
    for attempt in range(20):
        process = subprocess.Popen(
            arguments,
            env=QUIET,
            start_new_session=True,
            stderr=subprocess.DEVNULL,
        )
        try:
            process.wait(timeout=6 + 4 * attempt)
            break
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert process.returncode == 0
    assert attempt > 0, "it was never killed"
    expected, actual = (read_json(o / "manifest.json") for o in (out, again))
    assert actual["tables"] == expected["tables"]
    assert actual["checkpoints"] == expected["checkpoints"]
