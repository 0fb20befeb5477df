"""One look for all figures: sizes, fonts, colours, legends, saving. Fit for a two-column paper.

Colour always means the arm, and marker and line style repeat it. Figures are made without pyplot,
hence without global state, and saved reproducibly: fixed font, no dates, salted ids.
"""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import numpy as np

from figures.arm_styles import ArmStyle, arm_styles
from mechinterp.files import atomic_file

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SINGLE_COLUMN, FULL_WIDTH = 3.35, 7.0  # inches
FORMATS = ("pdf", "svg", "png")
LEGEND_HEIGHT = 0.6  # inches that the margin of a grid has room for
MAX_OVERLAID = 4  # arms that can share a place and still be seen
METADATA = {
    "pdf": {"CreationDate": None, "Creator": "mechinterp"},
    "svg": {"Date": None, "Creator": "mechinterp"},
    "png": {"Software": "mechinterp"},
}
RC = {
    "figure.dpi": 300,
    "savefig.dpi": 300,
    "font.family": "DejaVu Sans",
    "font.size": 7,
    "axes.titlesize": 7.5,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.title_fontsize": 7,
    "legend.frameon": False,
    "mathtext.fontset": "dejavusans",
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.minor.width": 0.4,
    "ytick.minor.width": 0.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "xtick.minor.size": 1.5,
    "ytick.minor.size": 1.5,
    "lines.linewidth": 1.0,
    "lines.markersize": 3.5,
    "hatch.linewidth": 0.5,
    "pdf.fonttype": 42,
    "svg.hashsalt": "mechinterp",
}
GREY = "#8C8C8C"
PALE = "#EBEBEB"


def regime_label(regime: str) -> str:
    return {"from_init": "from init", "pair": "one pair"}.get(regime, regime.replace("_", " "))


def wrap(name: str, width: int = 22) -> str:
    """A long name (of a task, a latent, a role) over several lines."""
    return textwrap.fill(name.replace("_", " "), width)


def setting_label(task: str, regime: str) -> str:
    """Task and regime on lines of their own, for the left edge of a row of panels."""
    return f"{wrap(task)}\n{regime_label(regime)}"


def setting_line(task: str, regime: str) -> str:
    """Task and regime on one line, for a title or a note."""
    return f"{task.replace('_', ' ')}, {regime_label(regime)}"


P = ParamSpec("P")
R = TypeVar("R")


@contextmanager
def look() -> Iterator[None]:
    """matplotlib's defaults with our settings on top, whatever the user's own settings are."""
    import matplotlib.style

    with matplotlib.style.context(RC, after_reset=True):
        yield


def styled(draw: Callable[P, R]) -> Callable[P, R]:
    """Run a drawing function in our look."""

    @functools.wraps(draw)
    def drawing(*args: P.args, **kwargs: P.kwargs) -> R:
        with look():
            return draw(*args, **kwargs)

    return drawing


def grid(
    n_rows: int,
    n_columns: int,
    *,
    width: float = FULL_WIDTH,
    row_height: float = 1.35,
    margin: float = 0.75,
    **subplots: Any,
) -> tuple[Figure, np.ndarray]:
    """`n_rows` x `n_columns` panels in constrained layout, `margin` inches high for the legend."""
    from matplotlib.figure import Figure

    size = (width, n_rows * row_height + margin)
    figure = Figure(figsize=size, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.03, h_pad=0.03)  # type: ignore[union-attr]
    return figure, figure.subplots(n_rows, n_columns, squeeze=False, **subplots)


def letter_panels(axes: np.ndarray) -> None:
    """Letters a, b, c, ... at the upper left of the visible panels, row by row."""
    panels = [ax for ax in axes.flat if ax.get_visible()]
    if len(panels) < 2:
        return
    for index, ax in enumerate(panels):
        name = chr(ord("a") + index % 26) * (1 + index // 26)
        ax.annotate(
            name,
            xy=(0, 1),
            xycoords="axes fraction",
            xytext=(-3, 2),
            textcoords="offset points",
            ha="right",
            va="bottom",
            fontweight="bold",
            fontsize=8,
        )


def arm_handles(arms: Sequence[str], labels: Mapping[str, str] | None = None) -> list[Any]:
    """Legend entries of the arms, under other names where `labels` has them."""
    from matplotlib.lines import Line2D

    return [
        Line2D(
            [],
            [],
            color=look.color,
            marker=look.marker,
            linestyle=look.linestyle,
            label=(labels or {}).get(arm, look.label),
        )
        for arm, look in arm_styles(arms).items()
    ]


def handle(label: str, **options: Any) -> Any:
    """A legend entry of its own, black unless told otherwise."""
    from matplotlib.lines import Line2D

    return Line2D([], [], label=label, **{"color": "black", **options})


def patch_handle(label: str, **options: Any) -> Any:
    """A legend entry for a filled area."""
    from matplotlib.patches import Patch

    return Patch(label=label, **options)


def legend(figure: Figure, handles: Sequence[Any], note: str = "") -> None:
    """One legend above all panels, read row by row, in as few rows as fit, headed by `note`.

    One that is higher than usual makes the figure higher, so that the panels keep their size.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    renderer = FigureCanvasAgg(figure).get_renderer()
    wide = figure.get_figwidth()
    note = "\n".join(textwrap.fill(line, int(wide * 19)) for line in note.split("\n"))
    for n_rows in range(1, max(len(handles), 1) + 1):
        n_columns = max(-(-len(handles) // n_rows), 1)
        # matplotlib fills columns first.
        by_row = [handle for column in range(n_columns) for handle in handles[column::n_columns]]
        box = figure.legend(
            handles=by_row,
            loc="outside upper left",
            ncols=n_columns,
            title=note or None,
            alignment="left",
            columnspacing=1.4,
            handlelength=2.4,
            handletextpad=0.5,
            borderaxespad=0.2,
        )
        extent = box.get_window_extent(renderer)
        if n_columns == 1 or extent.width < (wide - 0.05) * figure.dpi:
            extra = extent.height / figure.dpi - LEGEND_HEIGHT
            figure.set_figheight(figure.get_figheight() + max(extra, 0.0))
            return
        box.remove()


def seeds_note(*summaries: pd.DataFrame) -> str:
    """How many seeds the means are over and what the bars are, in one sentence."""
    finite = any(np.isfinite(summary["low"]).any() for summary in summaries)
    if max(summary["n_seeds"].max() for summary in summaries) == 1:
        return "One seed; bars: 95% interval over items." if finite else "One seed, no interval."
    return f"{seeds(*summaries)}; bars: 95% t interval over seeds."


def seeds(*summaries: pd.DataFrame) -> str:
    """ "Mean of 4 seeds", or of "3 to 4" where cells differ; "One seed"."""
    counts = np.concatenate([summary["n_seeds"].to_numpy() for summary in summaries])
    if counts.max() == 1:
        return "One seed"
    n = f"{counts.max()}" if counts.min() == counts.max() else f"{counts.min()} to {counts.max()}"
    return f"Mean of {n} seeds"


def errors(summary: pd.DataFrame) -> np.ndarray | None:
    """Distances from mean to interval, [2, n], as error bars take them; None without intervals."""
    below = (summary["mean"] - summary["low"]).to_numpy(float)
    above = (summary["high"] - summary["mean"]).to_numpy(float)
    if not np.isfinite(below).any():
        return None
    return np.clip([below, above], 0, None)


def marker_stride(n: int) -> int:
    """One marker per so many points, so that markers on a long curve stay apart."""
    return max(1, n // 8)


def beside(arms: Sequence[str]) -> dict[str, float]:
    """Points by which each arm is moved sideways, so that none of many hides the others."""
    if len(arms) <= MAX_OVERLAID:
        return dict.fromkeys(arms, 0.0)
    return {arm: 1.5 * (index - (len(arms) - 1) / 2) for index, arm in enumerate(arms)}


def curve(
    ax: Axes, summary: pd.DataFrame, x: str, style: ArmStyle, *, shift: float = 0, **options: Any
) -> None:
    """An arm's means along column `x`, with markers and thin interval bars, `shift` points to the
    right."""
    if summary.empty:
        return
    summary = summary.sort_values(x)
    drawn = ax.errorbar(
        summary[x].to_numpy(float),
        summary["mean"].to_numpy(float),
        yerr=errors(summary),
        **{
            "color": style.color,
            "marker": style.marker,
            "linestyle": style.linestyle,
            "elinewidth": 0.6,
            "markeredgewidth": 0.6,
            "markevery": marker_stride(len(summary)),
            **options,
        },
    )
    if shift:
        from matplotlib.transforms import ScaledTranslation

        # Only now, so that the axes are made to hold the data and not their places on paper.
        moved = ax.transData + ScaledTranslation(shift / 72, 0, ax.figure.dpi_scale_trans)
        for artist in drawn.get_children():
            artist.set_transform(moved)
        ax.margins(x=0.1)


def save(
    figure: Figure, name: str, out_dir: str | Path, formats: Sequence[str] = FORMATS
) -> list[Path]:
    """Write `out_dir/name.<format>`: the same bytes for the same figure, now and later."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    paths = []
    with look():
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # every format gets the layout that was just computed
        for extension in formats:
            path = Path(out_dir) / f"{name}.{extension}"
            with atomic_file(path) as temporary:
                figure.savefig(temporary, format=extension, metadata=METADATA[extension])
            paths.append(path)
    return paths
