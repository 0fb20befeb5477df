"""Do learning and choosing degrade separately? Each arm's path in the plane of the two losses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from figures import style
from figures.arm_styles import ArmStyle, arm_styles, costs_label
from figures.axes import percent_axis
from figures.tables import (
    Tables,
    arms_in,
    at_own_costs,
    costs_in,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    where,
    with_full_ends,
)
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Do learning and choosing degrade separately? Change in learning loss (up: the decision's "
    "grounds can no longer be read out) against change in choosing loss (right: they can, and are "
    "not acted on), in expected log score at the stated costs, as % of oracle − best constant "
    "action. The origin (+) is continued symmetric training at the same step, adjusted ex post to "
    "these costs where that arm exists; for a pair it is the control where one was given, else the "
    "checkpoint before. The second data "
    "order, a null, is compared with the control at symmetric costs, for which both were trained. "
    "Paths run over training steps, from small to large markers; the last marker bears the "
    "intervals, thin lines, where arms are few, are single seeds. Grey bands: the margin of ±5%, "
    "within which no damage is claimed. An axis that goes past ±50% is linear within ±10%, "
    "logarithmic beyond."
)
MARGIN = 5.0  # % of (oracle - constant): the smallest change that a verdict claims
MAX_WITH_SEEDS = 5  # arms beside which single seeds can be told apart
PLANE = ["choosing", "learning"]
NEEDS = {"losses": ("task", "regime", "arm", "seed", "step", "costs", "currency", "loss", "value")}
OPTIONAL = {
    "losses_in_full": NEEDS["losses"],
    "contrasts": ("task", "regime", "arm", "reference", "costs", "currency", "loss", "low", "high"),
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    return parts("dissociation", read_tables(source, NEEDS)["losses"])


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """One panel per task (rows) and regime x costs (columns)."""
    tables = read_tables(source, NEEDS, OPTIONAL, task=task, arms=arms)
    losses = with_full_ends(tables)
    losses = losses[(losses["currency"] == "log_score") & losses["loss"].isin(PLANE)]
    # At step 0 the arms of a regime are one network; ex-post arms are not adjusted there yet.
    losses = losses[(losses["step"] > 0) | (losses["regime"] == "pair")]
    tasks = list(dict.fromkeys(losses["task"]))
    columns = [
        (regime, costs)
        for regime in dict.fromkeys(regime for _, regime in settings_in(losses))
        for costs in costs_in(where(losses, regime=regime))
    ]
    panels = [
        _panel_changes(where(losses, task=task, regime=regime), costs)
        for task in tasks
        for regime, costs in columns
    ]
    seen = pd.concat(panels)
    if seen.empty:
        raise AnalysisError("table 'losses' has no arm beside a control ('symmetric' or 'before')")
    figure, axes = style.grid(
        len(tasks),
        len(columns),
        width=style.FULL_WIDTH if len(panels) > 1 else style.SINGLE_COLUMN,
        row_height=2.4 if len(tasks) == 1 else 1.7,
        sharex=True,
        sharey=True,
    )
    looks = arm_styles(arms_in(seen))
    ends = []
    for ax, panel in zip(axes.flat, panels, strict=True):
        _background(ax)
        for arm in arms_in(panel):
            path = where(panel, arm=arm)
            end = _end(path, tables.get("contrasts"))
            _draw_path(ax, path, end, looks[arm], each_seed=len(looks) <= MAX_WITH_SEEDS)
            ends.append(end)
    for which, loss in zip("xy", PLANE, strict=True):
        held = [seen[loss], *(end[loss][side] for end in ends for side in ("low", "high"))]
        room = {"at_least": 2.5 * MARGIN, "headroom": 0.1 if which == "y" else 0, "log_above": 50}
        for ax in axes.flat:
            percent_axis(ax, which, np.concatenate(held), signed=True, **room)
    for ax, (regime, costs) in zip(axes[0], columns, strict=True):
        ax.set_title(f"{style.regime_label(regime)}\n{costs_label(costs)}")
    for ax, name in zip(axes[:, 0], tasks, strict=True):
        ax.set_ylabel(style.wrap(name))
    pair = set(seen["regime"]) == {"pair"}
    controlled = not pair or "control" in set(losses["arm"])
    versus = "against the control" if controlled else "from the checkpoint before"
    label = f"Change in {{}} loss {versus}\n(% of oracle − constant)"
    figure.supxlabel(label.format("choosing"), fontsize=7)
    short = label if len(tasks) > 1 else label.replace(" loss ", " loss\n")
    figure.supylabel(short.format("learning"), fontsize=7)
    style.letter_panels(axes)
    names = {
        "symmetric": "symmetric, not adjusted",
        "symmetric_reordered": "second data order (null)",
    }
    adjusted = ", adjusted ex post" if losses["arm"].str.startswith("ex_post").any() else ""
    origin = f"symmetric{adjusted}"
    if pair:
        origin = "control" if controlled else "checkpoint before"
    handles = style.arm_handles(arms_in(seen), names)
    handles.append(style.handle(f"origin: {origin}", marker="+", ms=6, ls="none"))
    note = style.seeds_note(*(summary for end in ends for summary in end.values()))
    if not pair:
        note += f" Paths: steps {losses['step'].min():,} to {losses['step'].max():,}."
    style.legend(figure, handles, note)
    return figure


def _panel_changes(losses: pd.DataFrame, costs: str) -> pd.DataFrame:
    """The arms that serve the costs, and the null at the costs for which it was trained."""
    own = at_own_costs(losses)
    null = losses[losses["arm"].isin(["symmetric", "symmetric_reordered"])]
    return pd.concat(
        [
            _changes(own[(own["costs"] == costs) & (own["arm"] != "symmetric_reordered")], costs),
            _changes(where(null, costs="symmetric"), "symmetric"),
        ]
    )


def _changes(rows: pd.DataFrame, costs: str) -> pd.DataFrame:
    """Both losses (%) of every arm, less those of the arm at the origin, by seed and step."""
    keys = ["task", "regime", "costs", "arm", "seed", "step"]
    wide = rows.pivot_table(index=keys, columns="loss", values="value", observed=True)
    wide = (100 * wide.reindex(columns=PLANE)).reset_index()
    arms = arms_in(wide)
    candidates = ("control", "before", f"ex_post_{costs.removeprefix('w')}", "symmetric")
    origin = next((arm for arm in candidates if arm in arms), None)
    # A pair's origin is one for all steps; a study's control is compared at equal steps.
    on = ["seed"] if origin in ("before", "control") else ["seed", "step"]
    merged = wide[wide["arm"] != origin].merge(
        wide.loc[wide["arm"] == origin, [*on, *PLANE]], on=on, suffixes=("", "_origin")
    )
    for loss in PLANE:
        merged[loss] -= merged.pop(f"{loss}_origin")
    return merged


def _end(path: pd.DataFrame, contrasts: pd.DataFrame | None) -> dict[str, pd.DataFrame]:
    """Mean and interval of both changes at the last step.

    One seed has no interval of its own; the one over items in `contrasts` stands in.
    """
    last = path[path["step"] == path["step"].max()]
    end = {loss: over_seeds(last, ["task", "regime", "costs", "arm"], loss) for loss in PLANE}
    for loss, summary in end.items():
        if contrasts is not None and (summary["regime"] == "pair").all():
            keys = {key: summary[key].iat[0] for key in ("task", "regime", "costs", "arm")}
            match = where(contrasts, **keys, currency="log_score", loss=loss)
            if (match["reference"] == "control").any():
                match = where(match, reference="control")
            if len(match) == 1:
                summary[["low", "high"]] = 100 * match[["low", "high"]].to_numpy(float)
    return end


def _draw_path(
    ax: Axes,
    path: pd.DataFrame,
    end: dict[str, pd.DataFrame],
    look: ArmStyle,
    *,
    each_seed: bool,
) -> None:
    means = path.groupby("step")[PLANE].mean().sort_index()
    x, y = means["choosing"].to_numpy(), means["learning"].to_numpy()
    if (path["regime"] == "pair").all():
        ax.annotate(
            "",
            xy=(x[0], y[0]),
            xytext=(0, 0),
            arrowprops={
                "arrowstyle": "-|>",
                "color": look.color,
                "lw": 1,
                "shrinkA": 4,
                "shrinkB": 3,
            },
        )
    else:
        for _, seed in path.sort_values("step").groupby("seed") if each_seed else ():
            ax.plot(seed["choosing"], seed["learning"], color=look.color, lw=0.4, alpha=0.35)
        ax.plot(x, y, color=look.color, ls=look.linestyle)
        sizes = np.linspace(2, 10, len(means))[:-1]
        ax.scatter(x[:-1], y[:-1], s=sizes, c=look.color, marker=look.marker, lw=0, zorder=3)
    ax.errorbar(
        x[-1],
        y[-1],
        xerr=style.errors(end["choosing"]),
        yerr=style.errors(end["learning"]),
        color=look.color,
        marker=look.marker,
        ms=5.5,
        mec="white",
        mew=0.4,
        elinewidth=0.8,
        zorder=5,
    )


def _background(ax: Axes) -> None:
    """The margin, the origin, and which way damage lies, in corners that paths seldom reach."""
    ax.axvspan(-MARGIN, MARGIN, color=style.PALE, lw=0, zorder=0)
    ax.axhspan(-MARGIN, MARGIN, color=style.PALE, lw=0, zorder=0)
    ax.plot(0, 0, "+", color="black", ms=7, mew=0.8, zorder=6)
    words = {"color": "#8A8A8A", "transform": ax.transAxes, "zorder": 1, "ha": "right"}
    ax.text(0.99, 0.99, "learning damaged ↑", va="top", **words)
    ax.text(0.99, 0.01, "choosing damaged →", va="bottom", **words)


if __name__ == "__main__":
    from figures import run_script

    run_script("dissociation")
