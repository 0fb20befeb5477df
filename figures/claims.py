"""What of the claims holds? Every cell of every claim against its margin; a forest per claim."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.arm_styles import arm_label
from figures.tables import Tables, read_tables, where
from mechinterp.arm_names import kind_and_weights

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Claims, judged cell by cell: a cell is a task, a regime and an arm, less its reference at "
    "equal seeds; bars: 95% t interval over seeds. Grey band: the margin, within which nothing is "
    "claimed. Replicated: the interval lies beyond the margin in the claimed direction and the p "
    "value of no difference is below 0.05 after Holm's adjustment for the claim's cells; reversed: "
    "beyond it in the other; null: the 90% interval lies within the margin; void: a symmetric "
    "network of the task is not competent; not powered: too few seeds. Of all claims together: "
    "in margins, signed so that the claimed direction is to the right, the cells of a claim from "
    "the smallest to the largest; numbers: cells by outcome. In a claim's own file: in units of "
    "what is measured. Axes that go far past the margin are linear within twice the margin, "
    "logarithmic beyond. Colour is the outcome here, not the arm."
)
NEEDS = {
    "claims": (
        *("claim", "task", "regime", "arm", "against", "measure", "expected"),
        *("mean", "low", "high", "n_seeds", "p_holm", "margin", "outcome", "question"),
    )
}
MAX_ROWS = 40  # of a forest: what fits on a page
PAGE, ROW, CELL = 8.0, 0.2, 0.045  # inches: all claims together, the least of a claim, a cell's
LINEAR = 15  # margins: an axis that reaches further becomes logarithmic
OF_SCALE = "% of oracle − constant"


class _Look(NamedTuple):
    color: str
    marker: str
    face: str


OUTCOMES = {
    "replicated": _Look("#0072B2", ">", "#0072B2"),
    "reversed": _Look("#D55E00", "<", "#D55E00"),
    "null": _Look("#009E73", "s", "#009E73"),
    "inconclusive": _Look("#666666", "o", "white"),
    "void": _Look("#A6A6A6", "x", "#A6A6A6"),
    "not powered": _Look("#A6A6A6", "d", "white"),
}
# Triangles point where the claim, or its reverse, points: to the left where less is claimed.
LEFTWARD = {
    **OUTCOMES,
    "replicated": OUTCOMES["replicated"]._replace(marker="<"),
    "reversed": OUTCOMES["reversed"]._replace(marker=">"),
}


class _Unit(NamedTuple):
    name: str
    unit: str
    scale: float = 1.0


UNITS = {
    "learning": _Unit("learning loss", OF_SCALE, 100),
    "choosing": _Unit("choosing loss", OF_SCALE, 100),
    "threshold": _Unit("threshold loss", OF_SCALE, 100),
    "readout": _Unit("readout loss", OF_SCALE, 100),
    "discarded": _Unit("loss by discarding", OF_SCALE, 100),
    "not_encoded": _Unit("loss by not encoding", OF_SCALE, 100),
    "not_combined": _Unit("loss by not combining", OF_SCALE, 100),
    "total": _Unit("loss in expected log score", OF_SCALE, 100),
    "regret": _Unit("loss in utility", OF_SCALE, 100),
    "steps_to_learn": _Unit("steps to half of the learning", "log2 ratio: doublings"),
    "needed_information": _Unit("information about needed latents", "bits"),
    "unneeded_information": _Unit("information about latents not needed", "bits"),
    "calibration_error": _Unit("calibration error", "probability"),
    "recovery_overlap": _Unit("overlap of recovery maps", "weighted Jaccard"),
    "circuit_mismatch": _Unit("mismatch of the circuit of before", "CMD"),
    "crossing_front": _Unit("share of the change due to the front", "%", 100),
    "gradient_snr": _Unit("signal-to-noise of gradients", "log2 ratio: doublings"),
    "gradient_needed": _Unit("share of gradients along needed latents", "%", 100),
    "incentive_slope": _Unit("slope of excess divergence on incentive", "nats per log unit"),
}
_WRITTEN = {
    "pass_1": _Unit("share of right answers", "%", 100),
    "pass_k": _Unit("share of problems solved once", "%", 100),
    "repetition": _Unit("excess of the favourite answer", "%", 100),
    "steps_missing": _Unit("steps not written", "%", 100),
    "steps_wrong": _Unit("steps written wrong", "%", 100),
    "response_length": _Unit("response length", "tokens"),
    "entropy": _Unit("entropy of sampling", "nats per token"),
    "unended": _Unit("answers without an end", "%", 100),
    "kl": _Unit("divergence from the start", "nats per answer"),
}
_CONFIDENCE = {
    "accuracy": _Unit("share of right answers", "%", 100),
    "ece": _Unit("calibration error", "%", 100),
    "ece_debiased": _Unit("calibration error, debiased", "%", 100),
    "brier": _Unit("Brier score", "mean squared error"),
    "reliability": _Unit("Brier score's reliability", "mean squared error"),
    "resolution": _Unit("Brier score's resolution", "mean squared error"),
    "auroc": _Unit("AUROC of being right", "%", 100),
    "saturated": _Unit("saturated confidences", "%", 100),
    "mean": _Unit("mean confidence", "%", 100),
    "truth_gap": _Unit("distance from the right confidence", "%", 100),
}
_READINGS = {
    "said": "as said",
    "said_recalibrated": "as said, recalibrated",
    "answer": "by the answer's probability",
    "answer_temperature": "by the answer's probability at a fitted temperature",
    "probe": "by probe",
}
UNITS |= {f"written_{measure}": unit for measure, unit in _WRITTEN.items()}
UNITS |= {
    f"change_{measure}": unit._replace(name=f"change in {unit.name} since the start")
    for measure, unit in _WRITTEN.items()
}
UNITS |= {
    f"{reading}_{measure}": unit._replace(name=f"{unit.name}, {words}")
    for reading, words in _READINGS.items()
    for measure, unit in _CONFIDENCE.items()
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """All claims together, and a file per claim, or several where it has more cells than fit."""
    table = read_tables(source, NEEDS)["claims"]
    files: dict[str, dict[str, Any]] = {"claims": {}}
    for claim, rows in table.groupby("claim", sort=False):
        for page in range(-(-len(rows) // MAX_ROWS)):
            ending = f"_{page + 1}" if page else ""
            files[f"claims_{claim}{ending}"] = {"claim": claim, "page": page}
    return files


@style.styled
def draw(source: str | Path | Tables, *, claim: str | None = None, page: int = 0) -> Figure:
    """All claims in margins, or one `claim` in its own units, `MAX_ROWS` cells to a page."""
    table = read_tables(source, NEEDS)["claims"]
    if claim is None:
        return _draw_overview(table)
    return _draw_forest(where(table, claim=claim), page)


def _draw_overview(table: pd.DataFrame) -> Figure:
    """Rows: claims, their cells below each other; beside them how many came out which way."""
    claims = list(dict.fromkeys(table["claim"]))
    groups = [_in_margins(where(table, claim=claim)) for claim in claims]
    heights = _heights([len(rows) for rows in groups])
    bottoms = np.cumsum(heights)
    figure, axes = style.grid(
        1, 2, row_height=float(bottoms[-1]) + 0.1, margin=1.0, width_ratios=[4.5, 1], sharey=True
    )
    ax, counts = axes[0]
    outcomes = [outcome for outcome in OUTCOMES if outcome in set(table["outcome"])]
    for index, (rows, height, bottom) in enumerate(zip(groups, heights, bottoms, strict=True)):
        if index % 2:
            for each in (ax, counts):
                each.axhspan(bottom - height, bottom, color="#F7F7F7", lw=0, zorder=-2)
        at = bottom - height + height * (np.arange(len(rows)) + 0.5) / len(rows)
        _cells(ax, rows, at, OUTCOMES, size=2.5)
        for x, outcome in enumerate(outcomes):
            if number := int((rows["outcome"] == outcome).sum()):
                words = {"ha": "center", "va": "center", "color": OUTCOMES[outcome].color}
                counts.text(x, bottom - height / 2, f"{number}", **words)
    reach = np.concatenate([rows[["mean", "low", "high"]].to_numpy().ravel() for rows in groups])
    _effect_axis(ax, reach, 1.0, logarithmic=True)
    ax.set_yticks(bottoms - heights / 2, [claim.replace("_", " ") for claim in claims])
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(bottoms[-1] + 0.03, -0.03)
    ax.set_xlabel("Difference in margins (right: as claimed)")
    for x, outcome in enumerate(outcomes):
        look = OUTCOMES[outcome]
        line = {"marker": look.marker, "color": look.color, "mfc": look.face, "ms": 4, "mew": 0.8}
        counts.plot(x, -0.1, clip_on=False, **line)
    counts.set(xlim=(-0.6, len(outcomes) - 0.4), xticks=[], xlabel="Cells")
    counts.tick_params(left=False, labelleft=False)
    counts.spines[:].set_visible(False)
    style.legend(figure, _handles(table, OUTCOMES), style.seeds_note(table))
    return figure


def _draw_forest(rows: pd.DataFrame, page: int) -> Figure:
    """Rows: cells. At the right: seeds and adjusted p."""
    n_pages = -(-len(rows) // MAX_ROWS)
    unit = UNITS[rows["measure"].iloc[0]]
    margin = unit.scale * float(rows["margin"].iloc[0])
    rows = rows.assign(**{side: unit.scale * rows[side] for side in ("mean", "low", "high")})
    reach = rows[["mean", "low", "high"]].to_numpy().ravel()
    question, kind = rows["question"].iloc[0], kind_and_weights(str(rows["against"].iloc[0]))[0]
    more = rows["expected"].iloc[0] == "more"
    rows = rows.iloc[page * MAX_ROWS : (page + 1) * MAX_ROWS]
    figure, axes = style.grid(1, 1, row_height=0.145 * len(rows) + 0.3, margin=1.05)
    ax, at, looks = axes[0, 0], np.arange(len(rows)), OUTCOMES if more else LEFTWARD
    _cells(ax, rows, at, looks, size=4)
    _effect_axis(ax, reach, margin, logarithmic=np.nanmax(np.abs(reach)) > LINEAR * margin)
    labels = [
        " · ".join((str(task).replace("_", " "), style.regime_label(regime), arm_label(arm)))
        for task, regime, arm in rows[["task", "regime", "arm"]].itertuples(index=False)
    ]
    ax.set_yticks(at, labels)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(len(rows) - 0.4, -0.6)
    above = {"xycoords": "axes fraction", "textcoords": "offset points", "va": "bottom"}
    beside = {**above, "xycoords": ax.get_yaxis_transform(), "va": "center_baseline"}
    for points, column, heading in ((32, "n_seeds", "seeds"), (74, "p_holm", "p (Holm)")):
        for y, value in zip(at, rows[column], strict=True):
            text = f"{value}" if column == "n_seeds" else _p(value)
            ax.annotate(text, xy=(1, y), xytext=(points, 0), ha="right", **beside)
        ax.annotate(heading, xy=(1, 1), xytext=(points, 3), ha="right", **above)
    words, x, side = ("claimed →", 1, "right") if more else ("← claimed", 0, "left")
    ax.annotate(words, xy=(x, 1), xytext=(0, 3), ha=side, fontweight="bold", **above)
    against = f" against {arm_label(kind)}" if kind and kind != "nan" else ""
    what = f"Change in {unit.name}" if against else unit.name.capitalize()
    ax.set_xlabel(f"{what}{against}\n({unit.unit})")
    pages = f" ({page + 1} of {n_pages})" if n_pages > 1 else ""
    style.legend(figure, _handles(rows, looks), f"{question}{pages}\n{style.seeds_note(rows)}")
    return figure


def _heights(n_cells: list[int]) -> np.ndarray:
    """Inches for each claim: more for more cells, as far as all fit on a page."""
    beyond = np.clip(CELL * np.array(n_cells) - ROW, 0, 2 * ROW)
    room = max(PAGE - ROW * len(beyond), 0)
    return ROW + beyond * min(1, room / max(beyond.sum(), 1e-9))


def _in_margins(rows: pd.DataFrame) -> pd.DataFrame:
    """Cells in units of the margin, with the claimed direction upwards, the smallest first."""
    factor = np.where(rows["expected"] == "more", 1, -1) / rows["margin"].to_numpy()
    ends = np.sort(factor[:, None] * rows[["low", "high"]].to_numpy(), axis=1)
    mean = factor * rows["mean"]
    return rows.assign(mean=mean, low=ends[:, 0], high=ends[:, 1]).sort_values(
        "mean", kind="stable"
    )


def _cells(
    ax: Axes, rows: pd.DataFrame, at: np.ndarray, looks: dict[str, _Look], *, size: float
) -> None:
    for outcome, look in looks.items():
        chosen = (rows["outcome"] == outcome).to_numpy()
        if not chosen.any():
            continue
        ax.errorbar(
            rows.loc[chosen, "mean"],
            at[chosen],
            xerr=style.errors(rows[chosen]),
            fmt=look.marker,
            color=look.color,
            mfc=look.face,
            ms=size,
            mew=0.6,
            elinewidth=0.25 * size**0.8,
            zorder=2 if outcome in ("void", "not powered") else 3,
        )


def _effect_axis(ax: Axes, values: np.ndarray, margin: float, *, logarithmic: bool) -> None:
    """Zero, the margin's band, and an axis that holds `values`, where asked logarithmic outside of
    twice the margin."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

    ax.axvspan(-margin, margin, color=style.PALE, lw=0, zorder=-1)
    ax.axvline(0, color=style.GREY, lw=0.6, zorder=0)
    values = np.append(values[np.isfinite(values)], [-1.5 * margin, 1.5 * margin])
    if logarithmic:
        ax.set_xscale("symlog", linthresh=2 * margin, linscale=1)
        largest = np.log10(np.abs(values).max())
        decades = 10.0 ** np.arange(np.ceil(np.log10(2 * margin) - 1e-9), np.ceil(largest))
        decades = decades[:: max(1, -(-len(decades) // 3))]
        ax.xaxis.set_major_locator(FixedLocator([*-decades, 0, *decades]))
    else:
        ax.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    ax.xaxis.set_minor_locator(NullLocator())
    transform = ax.xaxis.get_transform()
    low, high = transform.transform([values.min(), values.max()])
    pad = 0.04 * (high - low)
    ax.set_xlim(*transform.inverted().transform([low - pad, high + pad]))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: _signed(value)))


def _signed(value: float) -> str:
    return f"{'+' if value > 0 else ''}{value:,.10g}".replace("-", "−")


def _p(value: float) -> str:
    if not np.isfinite(value):
        return "–"
    return "<0.001" if value < 0.001 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def _handles(table: pd.DataFrame, looks: dict[str, _Look]) -> list[Any]:
    handles = [
        style.handle(name, color=look.color, marker=look.marker, mfc=look.face, lw=0.8)
        for name, look in looks.items()
        if name in set(table["outcome"])
    ]
    return [*handles, style.patch_handle("margin", facecolor=style.PALE)]


if __name__ == "__main__":
    from figures import run_script

    run_script("claims")
