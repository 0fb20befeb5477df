"""What can be read out where? Decodability of the latents by layer and by training step, by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING

from figures import style
from figures.axes import layer_axis, step_axis
from figures.tables import (
    Tables,
    arms_in,
    final_steps,
    over_seeds,
    read_tables,
    settings_in,
    where,
)

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "What linear probes read out at the decision position: AUROC by layer (0: embedding) at each "
    "arm's last step, for latents that the decision needs and for those that it does not (losing "
    "the latter is forgetting, not damage); selectivity (AUROC or accuracy above that of a "
    "control task with random labels) by layer; and AUROC of the needed latents over training, at "
    "the layer where the control reads best (printed in the panel). Means over latents. Dotted: "
    "the same probes on the control task, all arms together; dashed: on the network as "
    "initialised."
)
NEEDS = {
    "probes": (
        *("task", "regime", "arm", "seed", "step"),
        *("layer", "latent", "needed", "kind", "measure", "value"),
    )
}
REFERENCES = ("symmetric", "before")  # whose best layer the panels over steps show
FLOORS = {"control": (":", "control task"), "random_init": ("-.", "network as initialised")}
FLOOR_COLOR = "#4D4D4D"
TITLES = {
    "needed": "needed latents\nby layer",
    "not_needed": "latents not needed\nby layer",
    "selectivity": "needed latents\nby layer",
    "steps": "needed latents\nover training",
}


@style.styled
def draw(source: str | Path | Tables) -> Figure:
    """Rows: task and regime. Columns: AUROC and selectivity by layer, AUROC by step."""
    probes = read_tables(source, NEEDS)["probes"]
    settings = settings_in(probes)
    columns = _columns(probes)
    figure, axes = style.grid(
        len(settings), len(columns), row_height=1.35 if len(settings) > 1 else 1.7
    )
    arms = arms_in(where(probes, kind="latent"))
    auroc = where(probes, measure="auroc")
    needed = {"needed": True, "steps": True, "not_needed": False}
    summaries = []
    for panels, (task, regime) in zip(axes, settings, strict=True):
        for ax, column in zip(panels, columns, strict=True):
            table = auroc if column in needed else where(probes, measure="selectivity")
            rows = where(table, task=task, regime=regime, needed=needed.get(column, True))
            if column == "steps":
                rows = _at_best_layer(ax, rows)
            else:
                rows = rows[
                    (rows["kind"] == "random_init") | rows.index.isin(final_steps(rows).index)
                ]
                layer_axis(ax, int(probes["layer"].max()))
            summaries.append(_panel(ax, rows, arms, "step" if column == "steps" else "layer"))
            ax.set_ylabel("Selectivity" if column == "selectivity" else "AUROC")
        panels[0].set_ylabel(f"{style.setting_label(task, regime)}\nAUROC")
    for column, panels in zip(columns, axes.T, strict=True):
        panels[0].set_title(TITLES[column])
        panels[-1].set_xlabel("Training step (log)" if column == "steps" else "Layer")
        for ax in panels:
            _limits(ax, column, probes)
    style.letter_panels(axes)
    handles = style.arm_handles(arms) + [
        style.handle(label, color=FLOOR_COLOR, ls=dashes)
        for kind, (dashes, label) in FLOORS.items()
        if kind in set(auroc["kind"])
    ]
    style.legend(figure, handles, style.seeds_note(*summaries))
    return figure


def _columns(probes: pd.DataFrame) -> list[str]:
    columns = ["needed"]
    if not probes["needed"].all():
        columns.append("not_needed")
    if "selectivity" in set(probes["measure"]):
        columns.append("selectivity")
    if set(probes["regime"]) != {"pair"} and probes["step"].nunique() > 1:
        columns.append("steps")
    return columns


def _at_best_layer(ax: Axes, rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of the layer that the control's probes read best at its last step."""
    latents = final_steps(where(rows, kind="latent"))
    reference = next((arm for arm in REFERENCES if arm in set(latents["arm"])), arms_in(latents)[0])
    means = where(latents, arm=reference).groupby("layer")["value"].mean()
    layer = int(means.index.to_numpy()[means.to_numpy().argmax()])
    step_axis(ax, where(rows, kind="latent")["step"].unique().tolist())
    ax.set_title(f"layer {layer}", loc="right", fontsize=7)
    return where(rows, layer=layer)


def _panel(ax: Axes, rows: pd.DataFrame, arms: list[str], x: str) -> pd.DataFrame:
    for kind, (dashes, _) in FLOORS.items():
        floor = where(rows, kind=kind)
        if floor.empty:
            continue
        if x == "step":
            ax.axhline(floor["value"].mean(), color=FLOOR_COLOR, ls=dashes, lw=0.8, zorder=1)
        else:
            means = floor.groupby(x)["value"].mean()
            ax.plot(means.index, means, color=FLOOR_COLOR, ls=dashes, lw=0.8, zorder=1)
    summary = over_seeds(rows[~rows["kind"].isin(list(FLOORS))], ["arm", x])
    for arm in arms:
        style.curve(ax, where(summary, arm=arm), x, style.arm_styles(arms)[arm], markersize=3)
    return summary


def _limits(ax: Axes, column: str, probes: pd.DataFrame) -> None:
    """AUROC on one scale in all panels, from a little below chance to 1."""
    if column == "selectivity":
        ax.axhline(0, color=style.GREY, lw=0.5, zorder=0)
        return
    lowest = float(final_steps(where(probes, measure="auroc"))["value"].quantile(0.01))
    ax.set_ylim(min(0.45, lowest - 0.03), 1.02)
    ax.set_yticks([0.5, 0.75, 1.0])


if __name__ == "__main__":
    from figures import run_script

    run_script("probes")
