"""One self-contained report.html from a run's tables, figures, manifest and verdict.

Nothing is fetched: figures are embedded, styles are inline, there are no scripts. Equal inputs give
equal bytes.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mechinterp.errors import AnalysisError
from mechinterp.files import read_json, read_table, write_table, write_text

if TYPE_CHECKING:
    import pandas as pd

MEDIA_TYPES = {".svg": "image/svg+xml", ".png": "image/png"}
# On a screen, figures made for paper are read from further away.
SCREEN_SCALE = 1.3
# What stands above the blocks of the manifest that are folded away.
HEADLINES = ("study", "preset", "command", "task", "seeds", "seconds_of_last_run")


@dataclass(frozen=True)
class ReportFigure:
    name: str
    source: str  # data URI
    width: str  # CSS length, "" for the image's own
    caption: str


def write_tables(out_dir: str | Path, tables: Mapping[str, pd.DataFrame]) -> None:
    """Write `out_dir/tables`, and take away tables and figures that an earlier run left there: a
    report shows one run."""
    from figures import FORMATS, caption

    out = Path(out_dir)
    for name, table in sorted(tables.items()):
        write_table(out / "tables" / f"{name}.parquet", table)
    for path in (out / "tables").glob("*.parquet"):
        if path.stem not in tables:
            path.unlink()
    for path in (out / "figures").glob("*"):
        if path.suffix.removeprefix(".") in FORMATS and caption(path.stem):
            path.unlink()


def write_report(
    out_dir: str | Path, *, title: str, summary: Sequence[Mapping[str, str]] | None = None
) -> Path:
    """Write `out_dir/report.html` and return its path.

    Reads tables/*.parquet, figures/*.svg (or .png), manifest.json and, where they exist,
    verdict.json and summary.json: paragraphs {"heading", "text"}, which `summary` overrides.
    Raises AnalysisError where there is no manifest.
    """
    from mechinterp import report_tables, report_verdicts

    out = Path(out_dir)
    if not (out / "manifest.json").is_file():
        raise AnalysisError(f"{out / 'manifest.json'}: no such file; a report needs a finished run")
    manifest = read_json(out / "manifest.json")
    tables = {path.stem: read_table(path) for path in sorted((out / "tables").glob("*.parquet"))}
    verdict = _read_json_if_there(out / "verdict.json")
    if summary is None:
        summary = _read_json_if_there(out / "summary.json")
    page = _template().render(
        title=title,
        summary=summary or [],
        verdict=report_verdicts.verdict_view(verdict) if verdict else None,
        competence=report_tables.competence_table(tables),
        figures=collect_figures(out / "figures"),
        tables=report_tables.detail_tables(tables),
        not_powered=manifest.get("not_powered", []),
        headlines={key: manifest[key] for key in HEADLINES if _is_scalar(manifest.get(key))},
        blocks={
            key: value
            for key, value in manifest.items()
            if key != "not_powered" and not (key in HEADLINES and _is_scalar(value))
        },
    )
    write_text(out / "report.html", page)
    return out / "report.html"


def collect_figures(folder: Path) -> list[ReportFigure]:
    """The figures of a run in the order of `figures.NAMES`, as SVG where there is one."""
    from figures import NAMES, caption

    paths: dict[str, Path] = {}
    for suffix in MEDIA_TYPES:
        for path in sorted(folder.glob(f"*{suffix}")):
            paths.setdefault(path.stem, path)

    def rank(stem: str) -> tuple[int, str]:
        names = [i for i, name in enumerate(NAMES) if stem == name or stem.startswith(f"{name}_")]
        return (names[0] if names else len(NAMES), stem)

    figures: list[ReportFigure] = []
    first: dict[str, int] = {}  # caption -> the number of the figure that has it in full
    for number, stem in enumerate(sorted(paths, key=rank), 1):
        data = paths[stem].read_bytes()
        media_type = MEDIA_TYPES[paths[stem].suffix]
        words = caption(stem)
        like = f"As Figure {first.get(words)}." if words else ""
        points = re.search(rb'<svg [^>]*?width="([\d.]+)pt"', data, re.DOTALL)
        figures.append(
            ReportFigure(
                name=stem,
                source=f"data:{media_type};base64,{base64.b64encode(data).decode()}",
                width=f"{SCREEN_SCALE * float(points.group(1)):.0f}pt" if points else "",
                caption=words if first.setdefault(words, number) == number else like,
            )
        )
    return figures


def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["words"] = lambda key: str(key).replace("_", " ")
    return environment.get_template("report.html.j2")


def _read_json_if_there(path: Path) -> Any:
    return read_json(path) if path.is_file() else None


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | int | float) or (
        isinstance(value, list) and all(isinstance(item, str | int | float) for item in value)
    )
