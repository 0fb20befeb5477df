"""Figures from saved tables, one file each, in one style. Nothing here computes a result.

`draw_all(tables_dir, out_dir)` draws what the tables allow; each file also runs as a script:
`python figures/dissociation.py OUT/tables --out OUT/figures`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    FIGURES: Mapping[str, FigureEntry]

# In the order in which a reader wants them.
NAMES = (
    "claims",
    "verdicts",
    "dissociation",
    "ladder",
    "trajectories",
    "speed",
    "gradients",
    "probes",
    "probe_positions",
    "erasure",
    "use",
    "separability",
    "repair",
    "representation",
    "recovery",
    "cross_checkpoint",
    "crossing",
    "grafts",
    "circuits",
    "calibration",
    "incentives",
    "writing",
    "rollouts",
    "text_sources",
    "stated_reliability",
    "stated_confidence",
    "validity",
)
FORMATS = ("pdf", "svg", "png")


class FigureEntry(NamedTuple):
    """One figure: the tables it needs, how it is drawn, its caption, and one file per what."""

    tables: tuple[str, ...]
    draw: Callable[..., Figure]
    caption: str
    variants: Callable[..., dict[str, dict[str, Any]]]


@dataclass(frozen=True)
class Drawn:
    """What `draw_all` wrote, by file name without extension, and what it skipped, and why."""

    written: dict[str, list[Path]]
    skipped: dict[str, str]


def draw_all(
    tables_dir: str | Path,
    out_dir: str | Path,
    names: Iterable[str] | None = None,
    *,
    formats: Sequence[str] = FORMATS,
) -> Drawn:
    """Draw all figures (or `names`) whose tables are in `tables_dir` into `out_dir`.

    Figures whose tables are absent, empty or incomplete are skipped. Raises AnalysisError for an
    unknown name or format.
    """
    from figures.style import save
    from mechinterp.errors import AnalysisError

    names = list(NAMES if names is None else names)
    for kind, given, known in (("figure", names, NAMES), ("format", formats, FORMATS)):
        for name in given:
            if name not in known:
                raise AnalysisError(f"no {kind} named {name!r}; there are {', '.join(known)}")
    written: dict[str, list[Path]] = {}
    skipped: dict[str, str] = {}
    for name in names:
        entry = _entry(name)
        try:
            files = entry.variants(tables_dir)
        except AnalysisError as error:
            skipped[name] = str(error)
            continue
        for stem, options in files.items():
            try:
                figure = entry.draw(tables_dir, **options)
            except AnalysisError as error:
                skipped[stem] = str(error)
            else:
                written[stem] = save(figure, stem, out_dir, formats)
    return Drawn(written, skipped)


def caption(stem: str) -> str:
    """The caption of the figure file `stem`, e.g. "ladder" or "recovery_triage"; "" for others."""
    from figures.tables import FAMILIES, PART

    name = next((name for name in NAMES if stem == name or stem.startswith(f"{name}_")), None)
    if name is None:
        return ""
    is_part = any(f"_{family}" in stem.removeprefix(name) for family in FAMILIES)
    return _entry(name).caption + (PART if is_part else "")


def run_script(name: str) -> None:
    """The command line that every figure file has."""
    import argparse
    import sys

    from mechinterp.errors import MechinterpError

    parser = argparse.ArgumentParser(description=f"Draw figure {name!r} from saved tables.")
    parser.add_argument("tables_dir", type=Path, help="folder of parquet tables, e.g. OUT/tables")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the figure to")
    parser.add_argument(
        "--formats", default=",".join(FORMATS), help="comma-separated, default %(default)s"
    )
    options = parser.parse_args()
    try:
        drawn = draw_all(
            options.tables_dir, options.out, [name], formats=options.formats.split(",")
        )
    except MechinterpError as error:
        sys.exit(_complain(error))
    for paths in drawn.written.values():
        print(*paths, sep="\n")
    for reason in drawn.skipped.values():
        _complain(reason)
    if not drawn.written:
        sys.exit(2)


def _complain(reason: object) -> int:
    import sys

    print(f"error: {reason}", file=sys.stderr)
    return 2


def _entry(name: str) -> FigureEntry:
    module = import_module(f"figures.{name}")
    one_file = lambda source: {name: {}}  # noqa: E731
    return FigureEntry(
        tuple(module.NEEDS), module.draw, module.CAPTION, getattr(module, "variants", one_file)
    )


def __getattr__(attribute: str) -> Any:
    # Built when asked for, so that `import figures` does not import numpy and pandas.
    if attribute == "FIGURES":
        return {name: _entry(name) for name in NAMES}
    raise AttributeError(f"module 'figures' has no attribute {attribute!r}")
