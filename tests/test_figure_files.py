"""Files: which are drawn, what they hold, and what is refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from figure_checks import FEW_STEPS, OF_REWARD, draw
from table_factory import CLAIMS, study_tables, write_tables

import figures
from figures import FIGURES, Drawn, draw_all, style
from mechinterp.errors import AnalysisError

ROOT = Path(__file__).parents[1]
KINDS = ["ladder", "recovery"]  # between them: lines, hatches, images, colour bars, words


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    source = study_tables(
        tasks=("triage",),
        regimes=("branched",),
        arms=("symmetric", "symmetric_reordered", "weighted_1.98", "ex_post_1.98"),
        seeds=2,
        steps=FEW_STEPS,
    )
    return write_tables(source, tmp_path_factory.mktemp("small") / "tables")


@pytest.fixture(scope="module")
def drawn(small) -> Drawn:
    return draw_all(small, small.parent / "figures", formats=["svg"])


@pytest.fixture(scope="module")
def drawn_in_full(small) -> Drawn:
    return draw_all(small, small.parent / "full", KINDS)


def python(*arguments: str | Path, cwd: Path = ROOT, **environment: str):
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_another_process_draws_the_same_bytes(small, drawn, drawn_in_full, tmp_path):
    code = (
        "import figures; "
        f"figures.draw_all({str(small)!r}, {str(tmp_path / 'figures')!r}, formats=['svg']); "
        f"figures.draw_all({str(small)!r}, {str(tmp_path / 'full')!r}, {KINDS})"
    )
    assert python("-c", code, PYTHONHASHSEED="1", TZ="Asia/Tokyo").returncode == 0
    written = [*drawn.written.values(), *drawn_in_full.written.values()]
    paths = [path for paths in written for path in paths]
    assert len(paths) == len(drawn.written) + 3 * len(KINDS)
    for path in paths:
        assert path.read_bytes() == (tmp_path / path.parent.name / path.name).read_bytes(), path


def test_formats_do_not_depend_on_each_other(drawn, drawn_in_full):
    for stem, paths in drawn_in_full.written.items():
        (alone,) = drawn.written[stem]
        (among_others,) = [path for path in paths if path.suffix == ".svg"]
        assert alone.read_bytes() == among_others.read_bytes()


def test_files_are_named_after_figure_and_task(drawn):
    assert list(drawn.written) == [
        *("claims", *(f"claims_{name}" for name in CLAIMS)),
        "verdicts_triage_branched",
        *("dissociation", "ladder", "trajectories", "gradients"),
        *("probes", "probes_triage", "probe_positions_triage", "erasure_triage", "use_triage"),
        "separability_triage",
        "repair_triage",
        *("representation_triage", "recovery_triage"),
        *("cross_checkpoint", "crossing_triage", "crossing_triage_stitched"),
        *("grafts", "circuits", "calibration", "incentives", "validity"),
    ]
    assert list(drawn.skipped) == ["speed", *OF_REWARD]  # nothing from init, nothing by reward
    assert all(figures.caption(stem) for stem in drawn.written)


def test_pdf_embeds_truetype_and_no_date(drawn_in_full):
    (path,) = [path for path in drawn_in_full.written["ladder"] if path.suffix == ".pdf"]
    data = path.read_bytes()
    assert b"/FontFile2" in data
    assert b"CreationDate" not in data


def test_absent_tables_are_skipped_with_the_reason(tmp_path, study):
    write_tables({"crossing": study["crossing"].head(0)}, tmp_path)
    drawn = draw_all(tmp_path, tmp_path / "figures", ["ladder", "crossing"], formats=["svg"])
    assert drawn.written == {}
    assert "table 'losses' is absent" in drawn.skipped["ladder"]
    assert "table 'crossing' is empty" in drawn.skipped["crossing"]


def test_missing_columns_are_named(study):
    with pytest.raises(AnalysisError, match=r"'losses' lacks the column\(s\) costs, value"):
        draw("ladder", {"losses": study["losses"].drop(columns=["costs", "value"])})


def test_unknown_names_are_refused(small, tmp_path):
    with pytest.raises(AnalysisError, match="no figure named 'pie'"):
        draw_all(small, tmp_path, ["pie"])
    with pytest.raises(AnalysisError, match="no format named 'gif'"):
        draw_all(small, tmp_path, formats=["gif"])


def test_registry_names_tables_and_functions():
    assert list(FIGURES) == list(figures.NAMES)
    for entry in FIGURES.values():
        needed, function = entry[:2]
        assert needed
        assert callable(function)


def test_scripts(small, tmp_path):
    result = python(
        ROOT / "figures" / "cross_checkpoint.py", small, "--out", tmp_path, cwd=tmp_path
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(tmp_path / f"cross_checkpoint.{f}") for f in style.FORMATS]
    result = python(ROOT / "figures" / "probes.py", tmp_path, "--out", tmp_path, "--formats", "svg")
    assert result.returncode == 2
    assert result.stderr == (
        "error: table 'probes' is absent; run the analysis that writes it first\n"
    )


def test_import_is_light():
    heavy = ("matplotlib", "pandas", "numpy", "torch")
    code = f"import sys, figures; print([m for m in {heavy} if m in sys.modules])"
    assert python("-c", code).stdout == "[]\n"
