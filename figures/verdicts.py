"""Which side did each arm damage, and from when on? States of both sides and the word, by step."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.arm_styles import arm_label
from figures.tables import Tables, arms_in, costs_of, read_tables, settings_in, where
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Verdicts by arm and training length, of one task and regime. Above: arms that serve a "
    "weighting, at its costs, against symmetric training adjusted ex post to the same costs; "
    "below: all arms at symmetric costs, against symmetric training, both at the same step. "
    "Numbers: by how much more is lost, in % of (oracle − best constant action) of expected log "
    "score, mean over seeds; positive is worse. Colour: the state of the side. Damaged or "
    "improved: beyond the margin, with a p value below 0.05 after Holm's adjustment for the "
    "study's verdicts; intact: within it, likewise. The word names the damaged sides: L, learning; "
    "C, choosing; B, both; 0, none, both sides intact or improved; ?, inconclusive. Refits exist "
    "where the control ends only. At most six checkpoints are shown. Colour is the state here, not "
    "the arm."
)
NEEDS = {
    "verdicts": (
        *("task", "regime", "arm", "costs", "step", "reference", "side"),
        *("delta", "n_seeds", "state", "verdict"),
    )
}
SIDES = ("learning", "choosing")
MAX_STEPS = 6
ROW = 0.15  # inches


class _Look(NamedTuple):
    face: str
    ink: str
    letter: str = ""


STATES = {
    "damaged": _Look("#D55E00", "white"),
    "improved": _Look("#9CCBEA", "black"),
    "intact": _Look("#CFE8D8", "black"),
    "inconclusive": _Look("#EBEBEB", "black"),
    "not powered": _Look("#FFFFFF", "#8C8C8C"),
    "void": _Look("#FFFFFF", "#8C8C8C"),
}
WORDS = {
    "learning": _Look("#7B3A94", "white", "L"),
    "choosing": _Look("#B07D00", "white", "C"),
    "both": _Look("#1A1A1A", "white", "B"),
    "none": _Look("#CFE8D8", "black", "0"),
    "inconclusive": _Look("#EBEBEB", "black", "?"),
    "not powered": _Look("#FFFFFF", "#8C8C8C", "–"),
    "void": _Look("#FFFFFF", "#8C8C8C", "×"),
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """A file per task and regime."""
    table = read_tables(source, NEEDS)["verdicts"]
    return {
        f"verdicts_{task}_{regime}": {"task": task, "regime": regime}
        for task, regime in settings_in(table)
    }


@style.styled
def draw(source: str | Path | Tables, *, task: str, regime: str) -> Figure:
    """Rows: arms. Columns of panels: learning, choosing, the word; within each, steps."""
    import pandas as pd

    table = where(read_tables(source, NEEDS, task=task)["verdicts"], regime=regime)
    table = table[table["side"].isin(SIDES)]
    blocks = {name: rows for name, rows in _blocks(table).items() if not rows.empty}
    if not blocks:
        raise AnalysisError("table 'verdicts' has no arm beside the control at the same step")
    heights = [len(arms_in(rows)) for rows in blocks.values()]
    figure, axes = style.grid(
        len(blocks),
        3,
        row_height=(sum(heights) * ROW + 0.35 * len(blocks)) / len(blocks),
        margin=1.0,
        height_ratios=heights,
        width_ratios=[2, 2, 0.9],
    )
    steps = _shown_steps(table)
    for row, (name, rows) in zip(axes, blocks.items(), strict=True):
        arms = arms_in(rows)
        for ax, side in zip(row, (*SIDES, "verdict"), strict=True):
            _map(ax, rows, arms, steps, side)
        row[0].set_yticks(range(len(arms)), [arm_label(arm) for arm in arms])
        row[0].set_ylabel(name)
    for ax, title in zip(axes[0], ("Learning", "Choosing", "Verdict"), strict=True):
        ax.set_title(title)
    for ax in axes[-1]:
        ax.set_xlabel("Steps")
    shown = pd.concat(blocks.values())
    style.legend(
        figure,
        [*_handles(shown["state"], STATES), *_handles(shown["verdict"], WORDS)],
        f"{style.setting_line(task, regime).capitalize()}. {style.seeds(shown)}; numbers: % of "
        "oracle − constant, positive is worse.",
    )
    return figure


def _blocks(table: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Arms at the costs that they serve, and at symmetric costs, each against its control."""
    own = table["costs"] == table["arm"].map(costs_of)
    serving = table[own & (table["reference"] == "ex_post")]
    symmetric = where(table, reference="control", costs="symmetric")
    return {"At the costs\nthat it serves": serving, "At symmetric costs": symmetric}


def _shown_steps(table: pd.DataFrame) -> list[int]:
    """All steps, or MAX_STEPS of them, evenly chosen, with the last."""
    steps = sorted(int(step) for step in table["step"].unique())
    if len(steps) <= MAX_STEPS:
        return steps
    chosen = np.linspace(len(steps) - 1, 0, MAX_STEPS).round().astype(int)
    return [steps[index] for index in sorted(set(chosen.tolist()))]


def _map(ax: Axes, rows: pd.DataFrame, arms: list[str], steps: list[int], side: str) -> None:
    """A coloured cell per arm and step, with its number or, of the verdict, its letter."""
    from matplotlib.colors import to_rgb

    is_word = side == "verdict"
    cells = where(rows, side="learning" if is_word else side)
    image = np.ones((len(arms), len(steps), 3))
    for row in cells[cells["step"].isin(steps)].to_dict("records"):
        y, x = arms.index(row["arm"]), steps.index(row["step"])
        look = WORDS[row["verdict"]] if is_word else STATES[row["state"]]
        image[y, x] = to_rgb(look.face)
        text = look.letter if is_word else _number(100 * row["delta"])
        ax.text(x, y, text, ha="center", va="center_baseline", color=look.ink)
    ax.imshow(image, aspect="auto", interpolation="nearest")
    ax.set_xticks(range(len(steps)), [_short(step) for step in steps])
    ax.set_yticks([])
    ax.set_xticks(np.arange(len(steps) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(arms) - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=0.8)
    ax.tick_params(which="both", length=0)
    ax.spines[:].set_visible(False)
    if is_word:  # less room than numbers have
        ax.set_xticks([0, len(steps) - 1], [_short(steps[0]), _short(steps[-1])])


def _number(points: float) -> str:
    text = f"{points:+z.1f}" if abs(points) < 9.95 else f"{points:+.0f}"
    return text.replace("-", "−")


def _short(step: int) -> str:
    return f"{step / 1000:g}k" if step >= 1000 else str(step)


def _handles(present: pd.Series, looks: dict[str, _Look]) -> list[Any]:
    """Legend entries of what occurs; of words with their letters."""
    return [
        style.patch_handle(
            f"{look.letter}: {name}" if look.letter else name,
            facecolor=look.face,
            edgecolor=style.GREY,
            linewidth=0.4,
        )
        for name, look in looks.items()
        if name in set(present)
    ]


if __name__ == "__main__":
    from figures import run_script

    run_script("verdicts")
