from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import TypeAdapter
from table_factory import pair_tables, study_tables, write_tables

from figures import caption, draw_all
from figures.tables import where
from mechinterp import report_tables, report_verdicts
from mechinterp.errors import AnalysisError
from mechinterp.files import write_json
from mechinterp.report import collect_figures, write_report
from mechinterp.verdict import Verdict

MANIFEST = {
    "study": "main",
    "preset": None,
    "command": "mechinterp study studies/main.yaml --preset quick",
    "seeds": [0, 1],
    "versions": {"torch": "2.13.0"},
    "checkpoints": {"triage/branched/symmetric/seed-0": "0f" * 32},
    "spec": {"tasks": {"triage": {"settings": {"linear": [1.5, 1.5]}}}},
    "not_powered": ["triage, weights 1.8: 2 seeds; a claim takes 8"],
}
DAMAGED = {"delta": 0.193, "ci": [0.16, 0.22], "p": 1e-5, "state": "damaged"}
INTACT = {"delta": -0.0004, "ci": [-0.025, 0.03], "p": 0.6, "state": "intact"}
CHANGE = {"delta": -0.191, "ci": [-0.23, -0.15], "p": 1e-5}
VERDICT = {
    "verdict": "learning",
    "learning": DAMAGED,
    "choosing": INTACT,
    "discarded": INTACT,
    "forgetting": {"e": {"delta": 0.304, "ci": [0.28, 0.33], "p": 1e-5, "state": "damaged"}},
    "components": {
        "rungs": {"raw": CHANGE, "oracle": {"delta": 0.0, "ci": [0.0, 0.0], "p": 1.0}},
        "losses": {"threshold": INTACT, "not_encoded": DAMAGED},
        "crossing": {
            "raw": {
                **{"cut": 2, "change": CHANGE, "interaction": CHANGE},
                **{"phi_front": CHANGE, "phi_back": None},
            }
        },
    },
    "minimum_detectable": {"learning": 0.083, "choosing": 0.07},
    "evidence": {"ladder": "tables/losses.parquet"},
    "disagreements": ["Learning is damaged, yet."],
    "reference": "before",
    "costs": "task",
    "currency": "log_score",
    "margin": 0.05,
    "information_margin": 0.02,
    "n_items": 15000,
}
SUMMARY = [{"heading": "Weights < 2", "text": "Learning & choosing: 3 < 4."}]


class Page(HTMLParser):
    """Tags in balance, sources of anything loaded, cells of tables."""

    void = frozenset({"meta", "img", "br", "hr", "link", "input"})

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.sources: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href", "srcset")]
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


@pytest.fixture(scope="module")
def study():
    return study_tables(regimes=("branched",), seeds=2, steps=(0, 50, 400))


@pytest.fixture(scope="module")
def study_run(tmp_path_factory, study) -> Path:
    out = tmp_path_factory.mktemp("study")
    write_tables(study, out / "tables")
    draw_all(out / "tables", out / "figures", ["ladder", "calibration"], formats=["svg", "png"])
    write_json(out / "manifest.json", MANIFEST)
    write_json(out / "summary.json", SUMMARY)
    return out


def test_report_is_one_file_that_needs_nothing_else(study_run):
    path = write_report(study_run, title="What did training change?")
    text = path.read_text()
    page = Page(text)
    assert path == study_run / "report.html"
    assert page.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in page.sources)
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", re.sub(r'src="data:[^"]*"', "", text))


def test_a_caption_of_several_figures_stands_once(tmp_path):
    for name in ("probes_digits", "probes_triage", "ladder"):
        (tmp_path / f"{name}.svg").write_text("<svg></svg>")
    ladder, first, second = collect_figures(tmp_path)
    assert [first.name, second.name] == ["probes_digits", "probes_triage"]
    assert first.caption == caption("probes")
    assert second.caption == "As Figure 2."
    assert ladder.caption == caption("ladder")


def test_report_says_what_is_in_the_run(study_run):
    page = Page(write_report(study_run, title="T & T").read_text())
    assert "T & T" in page.text
    assert "Weights < 2" in page.text
    assert "Learning & choosing: 3 < 4." in page.text
    assert "triage, weights 1.8: 2 seeds; a claim takes 8" in page.text
    assert "Figure 1: ladder. Where value is lost" in page.text
    assert "Figure 2: calibration." in page.text
    assert "mechinterp study studies/main.yaml --preset quick" in page.text
    assert "0f" * 32 in page.text
    assert "What was damaged".lower() not in page.text.lower()  # no verdict in this run
    assert page.tags.count("img") == 2
    for title in ("Competence gate", "Calibration", "The crossing at the verdict's cut"):
        assert title in page.text


def test_report_repeats_itself_byte_for_byte(study_run, tmp_path):
    first = write_report(study_run, title="T").read_bytes()
    shutil.copytree(study_run, tmp_path / "elsewhere")
    assert write_report(tmp_path / "elsewhere", title="T").read_bytes() == first


def test_summary_can_be_passed(study_run):
    page = Page(
        write_report(study_run, title="T", summary=[{"heading": "H", "text": "Mine."}]).read_text()
    )
    assert "Mine." in page.text
    assert "Weights < 2" not in page.text


def test_report_of_a_pair(tmp_path):
    write_tables(pair_tables(), tmp_path / "tables")
    write_json(tmp_path / "manifest.json", {"command": "mechinterp compare a b", "not_powered": []})
    write_json(tmp_path / "verdict.json", VERDICT)
    page = Page(write_report(tmp_path, title="T").read_text())
    assert "Verdict: what was damaged learning" in page.text
    assert "not powered for" not in page.text
    row = "Learning damaged +19.3 [+16.0, +22.0] < 0.001 8.3"
    assert row in page.text.replace("\u00a0", " ")
    assert "Choosing intact +0.0 [−2.5, +3.0] 0.600 7.0" in page.text
    assert "n items 15000" in page.text
    text = page.text.replace("\u00a0", " ")
    assert "Raw −19.1 [−23.0, −15.0] < 0.001" in text
    assert "e forgotten +0.304 [+0.280, +0.330] < 0.001" in text
    assert "Raw 2 −19.1 [−23.0, −15.0] −19.1 [−23.0, −15.0] – −19.1 [−23.0, −15.0]" in text
    assert "Figures" not in page.text


def test_the_report_of_a_pair_is_of_a_verdict_that_there_can_be():
    text = json.dumps(VERDICT)
    assert TypeAdapter(Verdict).validate_json(text, strict=True).to_json()["verdict"] == "learning"


def test_report_of_the_least_run(tmp_path):
    write_json(tmp_path / "manifest.json", {})
    assert "The answer" in Page(write_report(tmp_path, title="T").read_text()).text


def test_report_needs_a_manifest(tmp_path):
    with pytest.raises(AnalysisError, match=r"manifest\.json: no such file"):
        write_report(tmp_path, title="T")


def test_png_stands_in_where_there_is_no_svg(tmp_path, study_run):
    (tmp_path / "figures").mkdir()
    shutil.copy(study_run / "figures" / "ladder.png", tmp_path / "figures")
    write_json(tmp_path / "manifest.json", {})
    (source,) = Page(write_report(tmp_path, title="T").read_text()).sources
    assert source.startswith("data:image/png;base64,")


def test_contrasts_are_those_of_the_table(study):
    against_control, against_ex_post, against_before = report_tables.contrast_tables(study)
    assert "the control" in against_control.title
    assert len(against_ex_post.rows) == 4  # two tasks, two weights
    assert len(against_before.rows) > len(against_control.rows)
    cell = {
        "task": "triage",
        "arm": "weighted_1.98",
        "loss": "learning",
        "currency": "log_score",
        "reference": "control",
    }
    row = study["contrasts"]
    for column, value in cell.items():
        row = row[row[column] == value]
    mean, low, high = 100 * row[["mean", "low", "high"]].to_numpy()[0]
    (line,) = [r for r in against_control.rows if (r[0], r[3]) == ("triage", "weighted 1.98")]
    text = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]".replace("-", "−")
    assert line[against_control.columns.index("Learning")].replace("\u00a0", " ") == text


def test_verdicts_of_a_study_are_those_of_the_table(study):
    against_control, against_ex_post, _, along, _ = report_verdicts.verdict_tables(study)
    assert "adjusted ex post" in against_ex_post.title
    cell = {"task": "triage", "arm": "weighted_1.98", "step": 400, "reference": "ex_post"}
    rows = where(study["verdicts"], **cell).set_index("side")
    (line,) = [r for r in against_ex_post.rows if (r[0], r[3]) == ("triage", "weighted 1.98")]
    learning = rows.loc["learning"]
    assert line[4] == learning["verdict"]
    numbers = [f"{100 * learning[name]:+.1f}" for name in ("delta", "low", "high")]
    text = f"{numbers[0]} [{numbers[1]}, {numbers[2]}] {learning['state']}".replace("-", "−")
    assert line[5].replace("\u00a0", " ") == text
    (line,) = [r for r in against_control.rows if r[3].startswith("symmetric, second")][:1]
    assert line[8].endswith(("kept", "forgotten", "inconclusive", "more is known"))
    (line,) = [r for r in along.rows if r[2] == "weighted 1.98"]
    words = where(study["verdicts"], **{**cell, "step": 50, "side": "learning"})["verdict"]
    assert line[3].startswith(f"50: {words.item()}; 400: ")


def test_losses_are_means_over_seeds_at_the_last_step(study):
    table = report_tables.losses_table(study, "utility")
    assert table is not None
    rows = study["losses_in_full"].query(
        "currency == 'utility' and loss == 'total' and step == 400"
    )
    rows = rows[(rows["task"] == "digits") & (rows["arm"] == "ex_post_1.8")]
    (line,) = [r for r in table.rows if (r[0], r[3]) == ("digits", "ex post 1.8")]
    assert line[table.columns.index("Total")].startswith(f"{100 * rows['value'].mean():.1f} [")
    assert line[table.columns.index("Not encoded")] == "–"


def test_tables_have_equal_columns_everywhere(study):
    for source in (study, pair_tables(), pair_tables(control=False, intervals=False)):
        tables = report_tables.detail_tables(source)
        assert tables
        for table in tables:
            assert {len(row) for row in table.rows} == {len(table.columns)}
            assert "nan" not in str(table.rows)
            assert not re.search(r"−0\.0+\b", str(table.rows))


def test_void_studies_are_called_void(study):
    competence = study["competence"].copy()
    competence.loc[(competence["task"] == "triage") & (competence["seed"] == 0), "competent"] = (
        False
    )
    table = report_tables.competence_table({"competence": competence})
    assert table is not None
    assert [row[-1] for row in table.rows] == ["1 of 2: void", "2 of 2"]
