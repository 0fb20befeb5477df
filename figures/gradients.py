"""What do objectives teach? Signal-to-noise, direction and posterior of their gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.axes import step_axis
from figures.tables import (
    Tables,
    arms_in,
    costs_of,
    final_steps,
    over_seeds,
    parts,
    read_tables,
    settings_in,
    strength,
    where,
)
from mechinterp.arm_names import CONTROL

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Gradients of objectives, on fresh items. Left: norm of the mean gradient in all weights, "
    "over the noise of a batch of 64. Solid: along the run that trains on the objective; thin: the "
    "same objective at the checkpoints of the symmetric run, where all share their weights; its "
    "logits are shifted ex post to the costs that the objective serves, or most of the signal "
    "would be that the threshold is yet to move. "
    "Middle: in the last layer's residual stream at the decision, the share of the gradient that "
    "lies in the space of the differences of means of all latents that the decision needs, along "
    "the objective's own run; dotted: a random direction. Right: where in the posterior the "
    "gradient at the end of the run comes from; grey: the items. Of the objectives that serve "
    "weights only those of the strongest are shown. Of a pair: the loss at the task's costs, at "
    "each network."
)
NEEDS = {
    "gradients": (
        *("task", "regime", "arm", "seed", "step"),
        *("objective", "part", "measure", "value"),
    ),
    "gradients_latents": (
        *("task", "regime", "arm", "seed", "step"),
        *("objective", "layer", "latent", "needed", "measure", "value"),
    ),
}
OPTIONAL = {
    "gradients_posterior": (
        *("task", "regime", "arm", "seed", "step"),
        *("objective", "log_odds", "measure", "value"),
    ),
}
TITLES = ("signal-to-noise", "along needed latents (%)", "share by posterior (%)")


class _Rows(NamedTuple):
    """Rows of one table: `own`, of each run's own objective, and `shared`, of all objectives at the
    control's checkpoints. In both `arm` is the one that the curve is drawn as."""

    own: pd.DataFrame
    shared: pd.DataFrame


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """One file, or parts of it."""
    gradients = _shown(read_tables(source, NEEDS)["gradients"])
    return parts("gradients", gradients.assign(arm=gradients["objective"]))


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Rows: task and regime. Columns: over training twice, then by posterior at its end."""
    tables = read_tables(source, NEEDS, OPTIONAL, task=task, arms=arms)
    gradients = _rows(where(tables["gradients"], part="all", measure="snr"))
    latents = _rows(where(tables["gradients_latents"], latent="all needed"))
    known = tables.get("gradients_posterior")
    posterior = None if known is None else _rows(known).own
    settings = settings_in(tables["gradients"])
    n_columns = 2 if posterior is None else 3
    figure, axes = style.grid(
        len(settings), n_columns, row_height=1.35 if len(settings) > 1 else 1.8
    )
    summaries = []
    for panels, (task, regime) in zip(axes, settings, strict=True):
        setting = {"task": task, "regime": regime}
        summaries += _over_steps(panels[0], _Rows(*(where(t, **setting) for t in gradients)))
        summaries += _along_latents(panels[1], _Rows(*(where(t, **setting) for t in latents)))
        panels[0].set_ylabel(style.setting_label(task, regime))
        if posterior is None:
            continue
        rows = where(posterior, **setting)
        if rows.empty:
            panels[2].set_visible(False)
        else:
            summaries += _by_posterior(panels[2], rows)
    for ax, title in zip(axes[0], TITLES, strict=False):
        ax.set_title(title)
    for column, label in enumerate(("Training step", "Training step", "Posterior log-odds")):
        shown = [ax for ax in axes[:, column : column + 1].flat if ax.get_visible()]
        if shown and (column == 2 or {regime for _, regime in settings} != {"pair"}):
            shown[-1].set_xlabel(label)
    style.letter_panels(axes)
    own, shared = (arms_in(rows) for rows in gradients)
    handles = style.arm_handles(list(dict.fromkeys((*own, *shared))))
    if len(shared):
        handles.append(style.handle("at the symmetric run's weights", color=style.GREY, lw=0.7))
    handles.append(style.handle("random direction", color=style.GREY, ls=":"))
    if posterior is not None:
        handles.append(style.handle("share of the items", color=style.GREY, lw=2.5, alpha=0.5))
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _rows(table: pd.DataFrame) -> _Rows:
    """What is drawn of a table."""
    import pandas as pd

    pair = table[table["regime"] == "pair"]
    judged = "task" if "task" in set(pair["objective"]) else CONTROL
    study = _shown(table[table["regime"] != "pair"])
    shared = study[study["arm"] == CONTROL]
    shared = shared.assign(arm=shared["objective"])
    own = pd.concat([study[study["arm"] == study["objective"]], where(pair, objective=judged)])
    return _Rows(own, shared[shared["arm"] != CONTROL])


def _shown(table: pd.DataFrame) -> pd.DataFrame:
    """Without the objectives that serve weights other than the strongest."""
    strengths = {arm: strength(costs_of(arm)) for arm in table["objective"].unique()}
    strongest = max(strengths.values(), default=0.0)
    return table[table["objective"].map(strengths).isin([0, strongest])]


def _over_steps(ax: Axes, rows: _Rows) -> list[pd.DataFrame]:
    looks = arm_styles(arms_in(rows.own) + arms_in(rows.shared))
    for arm in arms_in(rows.shared):
        thin = over_seeds(where(rows.shared, arm=arm), ["step"]).sort_values("step")
        ax.plot(thin["step"], thin["mean"], color=looks[arm].color, lw=0.7, alpha=0.7)
    summary = _curves(ax, rows.own, looks, 1.0)
    _from_zero(ax)
    return [summary]


def _along_latents(ax: Axes, rows: _Rows) -> list[pd.DataFrame]:
    own = where(rows.own, layer=rows.own["layer"].max())
    summary = _curves(ax, where(own, measure="share"), arm_styles(arms_in(own)), 100.0)
    chance = 100 * where(own, measure="chance")["value"].mean()
    ax.axhline(chance, color=style.GREY, ls=":", lw=0.9, zorder=0)
    ax.set_ylim(0, 103)
    return [summary]


def _curves(ax: Axes, rows: pd.DataFrame, looks: dict[str, ArmStyle], scale: float) -> pd.DataFrame:
    """Each arm over training steps; of a pair, the networks side by side."""
    summary = over_seeds(rows, ["regime", "arm", "step"], scale=scale)
    arms = arms_in(summary)
    if (summary["regime"] == "pair").all():
        summary = summary.assign(step=[arms.index(arm) for arm in summary["arm"]])
        ax.set_xticks(range(len(arms)), arms)
        ax.set_xlim(-0.5, len(arms) - 0.5)
    else:
        step_axis(ax, summary["step"].unique().tolist())
    for arm in arms:
        style.curve(ax, where(summary, arm=arm), "step", looks[arm], markersize=3)
    return summary


def _by_posterior(ax: Axes, rows: pd.DataFrame) -> list[pd.DataFrame]:
    from matplotlib.ticker import MaxNLocator

    rows = final_steps(rows[np.isfinite(rows["log_odds"])])
    items = 100 * where(rows, measure="items").groupby("log_odds")["value"].mean()
    ax.plot(items.index, items, color=style.GREY, lw=2.5, alpha=0.5, zorder=0)
    looks = arm_styles(arms_in(rows))
    summary = over_seeds(where(rows, measure="share"), ["arm", "log_odds"], scale=100)
    for arm, look in looks.items():
        style.curve(ax, where(summary, arm=arm), "log_odds", look, markersize=3)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _from_zero(ax)
    return [summary]


def _from_zero(ax: Axes) -> None:
    """Room from zero to a little above what is drawn."""
    ax.set_ylim(0, 1.07 * ax.dataLim.ymax)


if __name__ == "__main__":
    from figures import run_script

    run_script("gradients")
