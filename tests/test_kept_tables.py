"""Tables of a study's parts, joined: as those of the whole study, judged at once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from mechinterp import claims
from mechinterp.arm_verdicts import CELL
from mechinterp.cli import main
from mechinterp.kept_tables import keep_tables

ROOT = Path(__file__).parents[1]
STUDY = ROOT / "studies/utility_weighted.yaml"
WHOLE = ROOT / "docs/findings/utility_weighted/tables"
TASKS = {"one": ["triage", "triage_wide"], "other": ["triage_long", "triage_likely"]}

pytestmark = pytest.mark.skipif(not WHOLE.is_dir(), reason="the finding has no tables yet")


def part(tmp_path, name, tasks) -> Path:
    """What a run of some of the tasks leaves: its verdicts adjusted for these alone."""
    path = tmp_path / name
    path.mkdir()
    for file in WHOLE.glob("*.parquet"):
        if file.stem != "claims":
            table = pd.read_parquet(file)
            table[table["task"].isin(tasks)].to_parquet(path / file.name)
    keep_tables([path, path], path)  # twice the same part: adjusted anew
    return path


@pytest.fixture
def parts(tmp_path) -> list[Path]:
    return [part(tmp_path, name, tasks) for name, tasks in TASKS.items()]


def verdicts(path: Path) -> pd.DataFrame:
    return pd.read_parquet(path / "verdicts.parquet").set_index(CELL).sort_index()


def test_joined_parts_are_judged_as_the_whole_is(parts, tmp_path):
    """One part alone is adjusted for fewer cells; both together as all their cells at once."""
    whole = part(tmp_path, "whole", [*TASKS["one"], *TASKS["other"]])
    keep_tables(parts, tmp_path / "joined")
    pd.testing.assert_frame_equal(verdicts(tmp_path / "joined"), verdicts(whole))
    ours, theirs = (claims.judge_saved(STUDY, path)[1] for path in (tmp_path / "joined", whole))
    pd.testing.assert_frame_equal(ours, theirs)
    alone, joined = verdicts(parts[0]), verdicts(tmp_path / "joined")
    assert set(TASKS["one"]) < set(joined.index.get_level_values("task"))
    assert not alone["p_holm"].equals(joined.loc[alone.index, "p_holm"])
    judged = alone["p_holm"].notna()
    assert (joined.loc[alone.index, "p_holm"] >= alone["p_holm"])[judged].all()


def test_all_tasks_together_give_the_tables_that_are_committed(tmp_path):
    """Adjusting anew changes nothing where all cells are there, in single precision."""
    shutil.copytree(WHOLE, tmp_path / "copy")
    keep_tables([WHOLE, tmp_path / "copy"], tmp_path / "joined")
    ours, theirs = verdicts(tmp_path / "joined"), verdicts(WHOLE)
    words = ["state", "verdict"]
    pd.testing.assert_frame_equal(ours[words], theirs[words])
    pd.testing.assert_frame_equal(ours.drop(columns=words), theirs.drop(columns=words), rtol=1e-5)


def test_a_task_is_taken_from_the_last_part_that_has_it(parts, tmp_path):
    path = parts[1] / "measures.parquet"
    old = pd.read_parquet(path)
    new = old.assign(value=old["value"] + 1)
    (tmp_path / "again").mkdir()
    new.to_parquet(tmp_path / "again/measures.parquet")
    keep_tables([*parts, tmp_path / "again"], tmp_path / "joined")
    joined = pd.read_parquet(tmp_path / "joined/measures.parquet")
    kept = joined[joined["task"].isin(TASKS["other"])]
    assert kept["value"].tolist() == new["value"].tolist()
    assert len(joined) == len(new) + len(pd.read_parquet(parts[0] / "measures.parquet"))


def test_a_part_may_be_the_destination(parts, tmp_path):
    keep_tables(parts, tmp_path / "joined")
    keep_tables(parts, parts[0])
    pd.testing.assert_frame_equal(verdicts(parts[0]), verdicts(tmp_path / "joined"))


def test_the_command_joins_and_says_what_it_lacks(parts, tmp_path, capsys):
    command = ["claims", str(STUDY), *map(str, parts)]
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2
    assert "--keep DIR" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*command, "--keep", str(tmp_path / "joined")])
    assert stop.value.code == 0
    assert "`chooses_better`" in capsys.readouterr().out
    assert (tmp_path / "joined/claims.csv").is_file()
    (tmp_path / "empty").mkdir()
    with pytest.raises(SystemExit) as stop:
        main([*command, str(tmp_path / "empty"), "--keep", str(tmp_path / "next")])
    assert stop.value.code == 2
    assert "empty: no tables of a study" in capsys.readouterr().err
    assert not (tmp_path / "next").exists()
