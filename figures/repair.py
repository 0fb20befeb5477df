"""How cheaply is what was lost regained? By steps, rank and place, and against training anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.axes import percent_axis, step_axis
from figures.tables import (
    Tables,
    files_by_task,
    over_seeds,
    read_tables,
    strongest_arm,
    where,
)
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Repair by the symmetric loss, as share of what after lost against before (or the control), "
    "at symmetric costs. A row per currency, and for the decision as it is or at its best bias, to "
    "which a threshold is no loss; rows in which nothing was lost are left out. From the left: "
    "low-rank adapters in attention and MLP, trained on few items, against steps at the middle "
    "rank, and against rank at the last step; the same by place, with all weights on the same "
    "items and with refits of the last layer on as few items (filled) and on many (hollow). Right: "
    "all weights on fresh items, from after and from a fresh initialisation; value above the best "
    "constant report, in % of what before has; horizontal line: 90%. Bars: 95% intervals over "
    "draws of the training items and over the test items."
)
NEEDS = {
    "repair": (
        *("task", "regime", "arm", "seed", "boundary", "kind", "layers", "part", "rank"),
        *("n_items", "steps", "currency", "readout", "share", "low", "high", "n_draws"),
    )
}
OPTIONAL = {
    "reverse": (
        *("task", "regime", "arm", "seed", "start", "steps"),
        *("currency", "readout", "level", "low", "high"),
    )
}
MEASURES = {
    ("log_score", "raw"): "Log score",
    ("log_score", "bias"): "Log score,\nbest bias",
    ("utility", "raw"): "Utility",
    ("utility", "bias"): "Utility,\nbest bias",
}
# The colours of the ladder's pieces: purple where learning stands, brown where choosing does.
PLACES = {
    "early": ArmStyle("#5E4694", "o", "-", "layers < {}"),
    "late": ArmStyle("#A67C52", "s", "--", "layers ≥ {}"),
    "all": ArmStyle("#000000", "D", ":", "all layers"),
}
WEIGHTS = ArmStyle(style.GREY, "P", "-.", "all weights")
REFITS = {"crt": "cRT", "lws": "LWS", "tau_norm": "τ-norm", "dfr": "DFR"}
PARTS = {"attention": "attention", "mlp": "MLP", "both": "both"}
LINES = (*PARTS.values(), "all weights", *REFITS.values())
RECOVERED = 90


def variants(source: str | Path | Tables) -> dict[str, dict[str, str]]:
    """One file per task, in the first regime at hand."""
    return files_by_task("repair", read_tables(source, NEEDS)["repair"])


@style.styled
def draw(
    source: str | Path | Tables, *, task: str | None = None, regime: str | None = None
) -> Figure:
    """Rows: what was lost. Columns: steps, rank, place; all weights against a fresh start."""
    tables = read_tables(source, NEEDS, OPTIONAL)
    first = next(iter(variants({"repair": tables["repair"]}).values()))
    setting = {"task": task or first["task"], "regime": regime or first["regime"]}
    repair = where(tables["repair"], **setting)
    setting["arm"] = strongest_arm(repair)
    repair = where(repair, arm=setting["arm"])
    reverse = where(tables["reverse"], **setting) if "reverse" in tables else None
    lost = [
        measure
        for measure in MEASURES
        if where(repair, currency=measure[0], readout=measure[1])["share"].notna().any()
    ]
    if not lost:
        raise AnalysisError("table 'repair': after lost nothing that could be regained")
    figure, axes = style.grid(len(lost), 3 if reverse is None else 4, row_height=1.45, sharex="col")
    summaries = []
    for panels, (currency, readout) in zip(axes, lost, strict=True):
        rows = where(repair, currency=currency, readout=readout)
        summaries += _shares(panels[:3], rows)
        panels[0].set_ylabel(f"{MEASURES[currency, readout]}\nregained (%)")
        if reverse is not None:
            own = where(reverse, currency=currency, readout=readout)
            summaries += _reverse(panels[3], own, setting["arm"])
            panels[3].set_ylabel("Value (%)")
    titles = ("by steps", "by rank", "by place", "on fresh items")
    for ax, title in zip(axes[0], titles, strict=False):
        ax.set_title(title)
    names = ("Steps", "Rank", "Regained (%)", "Steps")
    for ax, name in zip(axes[-1], names, strict=False):
        ax.set_xlabel(name)
    style.letter_panels(axes)
    style.legend(figure, _handles(repair, reverse, setting["arm"]), _note(repair, summaries))
    return figure


def _shares(panels: np.ndarray, rows: pd.DataFrame) -> list[pd.DataFrame]:
    by_steps, by_rank, by_place = panels
    adapters, weights = where(rows, kind="adapters"), where(rows, kind="weights")
    ranks, last = sorted(adapters["rank"].unique()), rows["steps"].max()
    middle = ranks[len(ranks) // 2]
    summaries = []
    for place, look in PLACES.items():
        own = where(adapters, layers=place)
        both = where(own, part="both")
        along = over_seeds(where(both, rank=middle), ["steps"], "share", scale=100)
        style.curve(by_steps, along, "steps", look, markersize=3)
        ranked = over_seeds(where(both, steps=last), ["rank"], "share", scale=100)
        style.curve(by_rank, ranked, "rank", look, markersize=3)
        ends = over_seeds(where(own, rank=middle, steps=last), ["part"], "share", scale=100)
        offset = 0.24 * (list(PLACES).index(place) - 1)
        _points(by_place, ends, PARTS, look, offset=offset)
        summaries += [along, ranked, ends]
    along = over_seeds(weights, ["steps"], "share", scale=100)
    style.curve(by_steps, along, "steps", WEIGHTS, markersize=3)
    ends = over_seeds(where(weights, steps=last), ["part"], "share", scale=100)
    _points(by_place, ends, {"all": "all weights"}, WEIGHTS)
    refits = where(rows, kind="refit")
    few = refits["n_items"] == refits["n_items"].min()
    # A split that holds too few items gives one refit fewer than the others have.
    most = refits["n_items"] == refits.groupby("part")["n_items"].transform("max")
    for chosen, offset in ((few, -0.12), (most & ~few, 0.12)):
        if chosen.any():
            own = over_seeds(refits[chosen], ["part"], "share", scale=100)
            look = ArmStyle(PLACES["late"].color, "^", "", "")
            _points(by_place, own, REFITS, look, offset=offset, filled=chosen is few)
            summaries.append(own)
    for ax, axis in ((by_steps, "y"), (by_rank, "y"), (by_place, "x")):
        values = [s["mean"] for s in summaries]
        percent_axis(ax, axis, np.append(np.concatenate(values), [0, 100]), log_above=300)
        for level in (0, 100):
            (ax.axhline if axis == "y" else ax.axvline)(level, color=style.GREY, lw=0.5, zorder=0)
    step_axis(by_steps, list(weights["steps"].unique()))
    by_rank.set_xscale("log", base=2)
    by_rank.set_xticks(ranks, [f"{rank:g}" for rank in ranks])
    by_rank.minorticks_off()
    by_place.set_yticks(range(len(LINES)), LINES)
    by_place.set_ylim(len(LINES) - 0.5, -0.5)
    by_place.tick_params(axis="y", length=0)
    return [*summaries, along]


def _points(
    ax: Axes,
    summary: pd.DataFrame,
    names: dict[str, str],
    look: ArmStyle,
    *,
    offset: float = 0,
    filled: bool = True,
) -> None:
    shown = summary[summary["part"].isin(list(names))]
    lines = [LINES.index(names[part]) + offset for part in shown["part"]]
    ax.errorbar(
        shown["mean"].to_numpy(float),
        lines,
        xerr=style.errors(shown),
        fmt=look.marker,
        color=look.color,
        mfc=look.color if filled else "white",
        ms=2.6,
        mew=0.6,
        elinewidth=0.6,
    )


def _reverse(ax: Axes, rows: pd.DataFrame, arm: str) -> list[pd.DataFrame]:
    summaries = []
    for start, look in _starts(arm).items():
        own = over_seeds(where(rows, start=start), ["steps"], "level", scale=100)
        style.curve(ax, own, "steps", look, markersize=3)
        summaries.append(own)
    shown = [s["mean"] for s in summaries]
    percent_axis(ax, "y", np.append(np.concatenate(shown), [0, 100]), log_above=300)
    ax.axhline(RECOVERED, color=style.GREY, lw=0.5, zorder=0)
    step_axis(ax, list(rows["steps"].unique()))
    return summaries


def _starts(arm: str) -> dict[str, ArmStyle]:
    after = arm_styles([arm])[arm]
    return {
        "after": after._replace(label=f"from {after.label}"),
        "scratch": ArmStyle("#0072B2", "x", "--", "from a fresh initialisation"),
    }


def _handles(repair: pd.DataFrame, reverse: pd.DataFrame | None, arm: str) -> list[object]:
    boundary = int(repair["boundary"].iloc[0])
    looks = [
        *(look._replace(label=look.label.format(boundary)) for look in PLACES.values()),
        WEIGHTS,
        *(_starts(arm).values() if reverse is not None else ()),
    ]
    lines = [
        style.handle(look.label, color=look.color, marker=look.marker, ls=look.linestyle)
        for look in looks
    ]
    refits = where(repair, kind="refit")["n_items"]
    color = PLACES["late"].color
    sizes = {refits.max(): ("up to ", "white"), refits.min(): ("", color)}
    points = [
        style.handle(
            f"refit, {most}{n:,.0f} items", color=color, marker="^", ls="", mfc=fill, ms=3, mew=0.6
        )
        for n, (most, fill) in reversed(sizes.items())
    ]
    return [*lines, *points]


def _note(repair: pd.DataFrame, summaries: list[pd.DataFrame]) -> str:
    adapters = where(repair, kind="adapters")
    draws, items = int(adapters["n_draws"].max()), int(adapters["n_items"].max())
    over = f"{draws} draws of {items:,} items" if draws > 1 else f"one draw of {items:,} items"
    bars = "bars: 95% interval over draws and test items"
    if adapters["seed"].nunique() > 1:
        bars = "bars: 95% t interval over seeds"
    return f"{style.seeds(*summaries)}; {over}; {bars}."


if __name__ == "__main__":
    from figures import run_script

    run_script("repair")
