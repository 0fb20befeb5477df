"""Where in the network does a change sit? Hybrids of two checkpoints, by the layer of the cut."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from figures import style
from figures.arm_styles import ArmStyle, arm_label, arm_styles, costs_label
from figures.axes import layer_axis
from figures.tables import (
    Tables,
    arm_groups,
    arms_in,
    at_own_costs,
    costs_in,
    costs_of,
    final_steps,
    over_seeds,
    read_tables,
    settings_in,
    where,
)

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Where the change sits. Front of one checkpoint, back of the other, joined at a layer "
    "boundary, as they are or (in the figure headed stitched) through a ridge map between their "
    "activations there, fitted on other items and without labels; A: before, B: after. Above: "
    "expected log score of the hybrids less that of A, at the arm's costs, with the network's own "
    "logits, after a bias refit and after a head refit, as % of oracle − best constant action. "
    "Below: the change from A to B divided between front and back, and their interaction. Hollow "
    "markers: shares that are not valid, since the interaction exceeds half of the change or the "
    "margin, in at least half of the seeds. Vertical line: the cut that counts for the verdict, "
    "which takes hybrids as they are. Grey band: range of both shares, over seeds, between two "
    "data orders of one arm."
)
NEEDS = {
    "crossing": (
        *("task", "regime", "arm", "seed", "step"),
        *("cut", "stitch", "costs", "currency", "readout"),
        *("u_aa", "u_ab", "u_ba", "u_bb", "phi_front", "phi_back", "interaction"),
        *("scale", "shares_valid", "null", "verdict_cut"),
    )
}
MAX_ARMS = 3  # two rows of panels each
PAGE = 8.5  # inches of panels
READOUTS = {"raw": "own logits", "bias": "bias refit", "head": "head refit"}
# quantity -> (marker, line style, label); the colour is the arm's, that of the interaction grey.
HYBRIDS = {
    "u_bb": ("", "-", "B"),
    "u_ab": ("<", "--", "front A, back B"),
    "u_ba": (">", ":", "front B, back A"),
}
SHARES = {
    "phi_front": ("^", "-", "due to front"),
    "phi_back": ("v", "--", "due to back"),
    "interaction": ("x", ":", "interaction"),
}
INTERACTION_COLOR = "#4D4D4D"


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """Per task, in the first regime at hand, a file for every few arms, and as many more where
    hybrids were stitched."""
    crossing = read_tables(source, NEEDS)["crossing"]
    files: dict[str, dict[str, Any]] = {}
    for task, regime in settings_in(crossing[~crossing["null"]]):
        for stitch, ending in (("identity", ""), ("ridge", "_stitched")):
            rows = where(crossing, task=task, regime=regime, stitch=stitch)
            for group, arms in arm_groups(rows, MAX_ARMS).items() if len(rows) else ():
                options = {"task": task, "regime": regime, "stitch": stitch, "arms": arms}
                files.setdefault(f"crossing_{task}{group}{ending}", options)
    return files


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    regime: str | None = None,
    stitch: str = "identity",
    arms: Sequence[str] | None = None,
) -> Figure:
    """Rows: hybrids and shares of each arm. Columns: readouts. Defaults: the first variant's."""
    crossing = read_tables(source, NEEDS, arms=arms)["crossing"]
    first = next(iter(variants({"crossing": crossing}).values()))
    task, regime = str(task or first["task"]), str(regime or first["regime"])
    rows = final_steps(
        where(crossing, task=task, regime=regime, stitch=stitch, currency="log_score")
    )
    rows = _in_percent(at_own_costs(rows))
    changed = rows[~rows["null"]]
    pairs = [
        (arm, costs) for costs in costs_in(changed) for arm in arms_in(where(changed, costs=costs))
    ]
    # The control stands at every costs; where arms were made for them, those are shown.
    pairs = [(arm, costs) for arm, costs in pairs if costs_of(arm)] or pairs
    readouts = [readout for readout in READOUTS if readout in set(changed["readout"])]
    n_rows = 2 * len(pairs)
    row_height = min(1.25, max(PAGE / n_rows, 1.0))
    figure, axes = style.grid(n_rows, len(readouts), row_height=row_height, sharex=True)
    looks = arm_styles([arm for arm, _ in pairs])
    summaries = []
    for index, (arm, costs) in enumerate(pairs):
        for column, readout in enumerate(readouts):
            cell = where(rows, costs=costs, readout=readout)
            own, null = where(cell, arm=arm, null=False), where(cell, null=True)
            pair = axes[2 * index : 2 * index + 2, column]
            summaries += _hybrids(pair[0], own, looks[arm])
            summaries += _shares(pair[1], own, null, looks[arm])
            for ax in pair:
                ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
                for cut in own.loc[own["verdict_cut"], "cut"].unique():
                    ax.axvline(cut, color="black", lw=0.6, ls=(0, (1, 2)), zorder=0)
        name = style.wrap(arm_label(arm), 20)
        if len({costs for _, costs in pairs}) > 1 and not costs_of(arm):
            name += f", {costs_label(costs)}"
        axes[2 * index, 0].set_ylabel(f"{name}\nlog score less A's (%)")
        axes[2 * index + 1, 0].set_ylabel(f"{name}\nchange (%)")
    for ax, readout in zip(axes[0], readouts, strict=True):
        ax.set_title(READOUTS[readout])
    for ax in axes[-1]:
        layer_axis(ax, int(rows["cut"].max()))
        ax.set_xlabel("Cut before layer")
    figure.align_ylabels(axes[:, 0])
    style.letter_panels(axes)
    handles = [
        style.handle(label, marker=marker, ls=dashes, color=_color(name, "black"))
        for name, (marker, dashes, label) in (HYBRIDS | SHARES).items()
    ]
    handles.append(style.handle("share not valid", marker="^", mfc="white", ls="none"))
    if rows["null"].any():
        handles.append(style.patch_handle("null: two data orders", facecolor=style.PALE))
    handles.append(style.handle("cut of the verdict", lw=0.6, ls=(0, (1, 2))))
    joined = "; stitched" if stitch == "ridge" else ""
    note = f"{style.setting_line(task, regime)}{joined}. {style.seeds_note(*summaries)}"
    note += " Scores in % of oracle − constant."
    style.legend(figure, handles, note)
    return figure


def _in_percent(rows: pd.DataFrame) -> pd.DataFrame:
    """Hybrids less A's own score, and shares, in % of (oracle - best constant action)."""
    rows = rows.copy()
    for name in HYBRIDS:
        rows[name] = 100 * (rows[name] - rows["u_aa"]) / rows["scale"]
    for name in SHARES:
        rows[name] = 100 * rows[name] / rows["scale"]
    return rows


def _color(name: str, color: str) -> str:
    return INTERACTION_COLOR if name == "interaction" else color


def _hybrids(ax: Axes, rows: pd.DataFrame, look: ArmStyle) -> list[pd.DataFrame]:
    summaries = []
    for name, (marker, dashes, _) in HYBRIDS.items():
        summary = over_seeds(rows, ["cut"], name)
        style.curve(ax, summary, "cut", look, marker=marker or None, linestyle=dashes)
        summaries.append(summary)
    return summaries


def _shares(ax: Axes, rows: pd.DataFrame, null: pd.DataFrame, look: ArmStyle) -> list[pd.DataFrame]:
    if len(null):
        both = null.groupby("cut")[["phi_front", "phi_back"]]
        low, high = both.min().min(axis=1), both.max().max(axis=1)
        ax.fill_between(low.index, low, high, color=style.PALE, lw=0, zorder=0)
    valid = rows.groupby("cut")["shares_valid"].mean() > 0.5
    summaries = []
    for name, (marker, dashes, _) in SHARES.items():
        summary = over_seeds(rows, ["cut"], name)
        look_here = look._replace(color=_color(name, look.color), marker=marker, linestyle=dashes)
        style.curve(ax, summary, "cut", look_here, zorder=2)
        marked = summary.sort_values("cut").iloc[:: style.marker_stride(len(summary))]
        hollow = marked[~marked["cut"].map(valid)]
        if name != "interaction":
            style.curve(
                ax, hollow, "cut", look_here, linestyle="none", markerfacecolor="white", zorder=3
            )
        summaries.append(summary)
    return summaries


if __name__ == "__main__":
    from figures import run_script

    run_script("crossing")
