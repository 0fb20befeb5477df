"""Is the verdict right? What was done against what was said, by cost, and how large it was."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.axes import percent_axis
from figures.tables import Tables, read_tables, where
from mechinterp.errors import AnalysisError
from mechinterp.statistics import proportion_interval
from mechinterp.validity import SIDES, VERDICTS

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Verdicts on damage of known kind, of kinds that were not seen while the rule was made. "
    "Left: what was done (rows) against what was said, for pairs that lost at least a tenth of "
    "the utility between the best constant action and the oracle, and for pairs without damage; "
    "shade: share of the row. Middle: share of right verdicts by the utility that the damage "
    "costs (on both sides: the smaller one); bars: 95% Clopper-Pearson intervals, which take "
    "pairs as independent although they share networks. Right: the increase of the loss on the "
    "damaged side (on each, where both were) against the true size, what the network's own "
    "decision loses in log score on other items, as % of oracle − constant; line: equal."
)
NEEDS = {
    "pairs": (
        *("half", "network", "seed", "side", "competent", "cost_utility", "cost_log_score"),
        *("cost_log_score_choosing", "learning", "choosing", "discarded", "outcome"),
    ),
    "confusion": ("half", "side", "verdict", "n"),
    "sensitivity": ("half", "side", "low_cost", "high_cost", "rate", "n", "of_n"),
}
HALF = "held_out"
JUDGED_FROM = 10.0  # % of utility


class _Look(NamedTuple):
    color: str
    marker: str


LOOKS = {
    "choosing": _Look("#0072B2", "o"),
    "learning": _Look("#D55E00", "s"),
    "both": _Look("#882255", "D"),
    "discarded": _Look("#009E73", "^"),
}


@style.styled
def draw(source: str | Path | Tables) -> Figure:
    """Confusion, sensitivity, agreement."""
    tables = {name: where(table, half=HALF) for name, table in read_tables(source, NEEDS).items()}
    if tables["pairs"].empty:
        raise AnalysisError("table 'pairs' has no held-out kinds")
    figure, axes = style.grid(1, 3, row_height=2.3, margin=0.6, width_ratios=[1.25, 1, 1])
    confusion, sensitivity, agreement = axes[0]
    _draw_confusion(confusion, tables["confusion"])
    _draw_sensitivity(sensitivity, tables["sensitivity"])
    _draw_agreement(agreement, tables["pairs"])
    style.letter_panels(axes)
    there = [side for side in LOOKS if side in set(tables["pairs"]["side"])]
    handles = [
        style.handle(side, color=LOOKS[side].color, marker=LOOKS[side].marker, linestyle="")
        for side in there
    ]
    n_networks = tables["pairs"].groupby(["network", "seed"]).ngroups
    note = f"{len(tables['pairs'])} pairs of held-out kinds, {n_networks} networks. Damaged side:"
    style.legend(figure, handles, note)
    return figure


def _draw_confusion(ax: Axes, confusion: pd.DataFrame) -> None:
    rows = [side for side in SIDES if side in set(confusion["side"])]
    counts = np.zeros((len(rows), len(VERDICTS)), int)
    for cell in confusion.to_dict("records"):
        counts[rows.index(cell["side"]), VERDICTS.index(cell["verdict"])] = cell["n"]
    share = counts / counts.sum(1, keepdims=True)
    ax.imshow(share, cmap="Greys", vmin=0, vmax=1.6, aspect="auto")
    for (i, j), n in np.ndenumerate(counts):
        if n:
            ax.text(j, i, str(n), ha="center", va="center")
    words = {"inconclusive": "incon-\nclusive"}
    ax.set_xticks(range(len(VERDICTS)), [words.get(v, v) for v in VERDICTS], rotation=30)
    ax.set_yticks(range(len(rows)), rows)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xlabel("Verdict")
    ax.set_ylabel("Damage put in")


def _draw_sensitivity(ax: Axes, sensitivity: pd.DataFrame) -> None:
    right = where(sensitivity, rate="right")
    bins = sorted(set(zip(right["low_cost"], right["high_cost"], strict=True)))
    sides = [side for side in LOOKS if side in set(right["side"])]
    for index, side in enumerate(sides):
        own = where(right, side=side).groupby("low_cost")[["n", "of_n"]].sum()
        at = [i for i, (low, _) in enumerate(bins) if low in own.index]
        found = [own.loc[bins[i][0]] for i in at]
        share = np.array([row["n"] / row["of_n"] for row in found])
        ends = np.array([proportion_interval(int(row["n"]), int(row["of_n"])) for row in found])
        look = LOOKS[side]
        ax.errorbar(
            np.array(at) + 0.12 * (index - (len(sides) - 1) / 2),
            100 * share,
            100 * np.clip([share - ends[:, 0], ends[:, 1] - share], 0, None),
            color=look.color,
            marker=look.marker,
            linewidth=0.8,
        )
    titles = [_range(low, high) for low, high in bins]
    ax.set_xticks(range(len(bins)), titles, rotation=90)
    from_here = [i for i, (low, _) in enumerate(bins) if 100 * low >= JUDGED_FROM - 1e-9]
    if from_here:
        ax.axvline(from_here[0] - 0.5, color=style.GREY, linewidth=0.6, linestyle=":")
    ax.set_ylim(-4, 104)
    ax.set_xlabel("Utility lost (% of oracle − constant)")
    ax.set_ylabel("Right verdicts (%)")


def _range(low: float, high: float) -> str:
    if low == -np.inf:
        return f"< {100 * high:.0f}"
    return f"> {100 * low:.0f}" if high == np.inf else f"{100 * low:.0f}–{100 * high:.0f}"


def _draw_agreement(ax: Axes, pairs: pd.DataFrame) -> None:
    sound = pairs[pairs["competent"]]
    choosing = sound["cost_log_score_choosing"]
    true = {"choosing": choosing, "learning": sound["cost_log_score"] - choosing}
    true["discarded"] = true["learning"]
    points: list[Any] = []
    for side, look in LOOKS.items():
        own = sound["side"] == side
        for loss in ("choosing", "learning") if side == "both" else (side,):
            x, y = 100 * true[loss][own].to_numpy(), 100 * sound.loc[own, loss].to_numpy()
            points += [x, y]
            ax.plot(x, y, look.marker, color=look.color, markersize=2.5, alpha=0.6, mew=0)
    held = np.concatenate(points)
    for which in ("x", "y"):
        percent_axis(ax, which, held, at_least=5)
    ends = [held.min(), held.max()]
    ax.plot(ends, ends, color=style.GREY, linewidth=0.6, zorder=0)
    ax.set_xlabel("True size (% in log score)")
    ax.set_ylabel("Measured (%)")


if __name__ == "__main__":
    from figures import run_script

    run_script("validity")
