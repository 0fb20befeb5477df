"""What can be read out where? Decodability of the latents by layer and by training step, by arm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from figures import style
from figures.arm_styles import arm_styles
from figures.axes import layer_axis, step_axis
from figures.tables import (
    Tables,
    arm_groups,
    arms_in,
    files_by_task,
    final_steps,
    over_seeds,
    parts,
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
    "What linear probes read out at the decision position: AUROC by layer at each arm's last step, "
    "for latents that the decision needs and for those that it does not (losing the latter is "
    "forgetting, not damage); selectivity (accuracy above that of a control task with random "
    "labels) by layer; and AUROC of the needed latents over training, at the layer where the "
    "control reads best (printed in the panel). Means over latents. Where the file is that of one "
    "task, each latent has a column, and information is what the probe tells about it beyond its "
    "base rates (V-information, bits per item). What a probe must beat, all arms together: the "
    "same probes on the control task, on the network as initialised, and on the tokens alone "
    "(their counts in the prompt, or the one at the decision position); shaded: 95% interval."
)
NEEDS = {
    "probes": (
        *("task", "regime", "arm", "seed", "step"),
        *("layer", "latent", "needed", "kind", "measure", "value"),
    )
}
SURFACE_LAYER = -1  # of what is read from the tokens
REFERENCES = ("symmetric", "before")  # whose best layer the panels over steps show
# kind -> (line style, colour, label): what a probe must beat
BASELINES = {
    "control": (":", "#4D4D4D", "control task"),
    "random_init": ("-.", "#4D4D4D", "network as initialised"),
    "surface_bag": ((0, (6, 2)), "#999933", "bag of tokens"),
    "surface_token": ((0, (1, 1)), "#999933", "token at the decision"),
}
ROWS = {"auroc": "AUROC", "information": "Information (bits)", "selectivity": "Selectivity"}
CHANCE = {"auroc": 0.5, "information": 0.0, "selectivity": 0.0}
TITLES = {
    "needed": "needed latents\nby layer",
    "not_needed": "latents not needed\nby layer",
    "selectivity": "needed latents\nby layer",
    "steps": "needed latents\nover training",
}


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """All settings together or in parts, and per task its first regime with a column per latent."""
    probes = read_tables(source, NEEDS)["probes"]
    means = parts("probes", probes)
    if list(means) != ["probes"]:
        means = parts("probes_means", probes)
    files: dict[str, dict[str, Any]] = {}
    for stem, setting in files_by_task("probes", probes).items():
        for ending, arms in arm_groups(where(probes, **setting)).items():
            files[f"{stem}{ending}"] = {**setting, "arms": arms}
    return {**means, **files}


@style.styled
def draw(
    source: str | Path | Tables,
    *,
    task: str | None = None,
    regime: str | None = None,
    arms: Sequence[str] | None = None,
) -> Figure:
    """Of all regimes, means over latents; of one `task` and `regime`, a column per latent."""
    probes = read_tables(source, NEEDS, task=task, arms=arms)["probes"]
    if regime is None:
        return _draw_settings(probes)
    return _draw_latents(where(probes, regime=regime))


def _draw_latents(probes: pd.DataFrame) -> Figure:
    """Rows: measures. Columns: latents, those that are needed first."""
    arms = arms_in(where(probes, kind="latent"))
    shown = _at_last_steps(probes)
    measures = [measure for measure in ROWS if measure in set(shown["measure"])]
    latents = shown[["latent", "needed"]].drop_duplicates()
    latents = latents.sort_values("needed", ascending=False, kind="stable").to_numpy().tolist()
    figure, axes = style.grid(
        len(measures), len(latents), row_height=1.3, sharex=True, sharey="row"
    )
    summaries = []
    for (latent, needed), panels in zip(latents, axes.T, strict=True):
        for ax, measure in zip(panels, measures, strict=True):
            rows = where(shown, latent=latent, measure=measure)
            ax.axhline(CHANCE[measure], color=style.GREY, lw=0.5, zorder=0)
            summaries.append(_panel(ax, rows, arms, "layer", shaded=True))
        panels[0].set_title(style.wrap(f"latent {latent}" + ("" if needed else ", not needed"), 14))
        panels[-1].set_xlabel("Layer")
        layer_axis(panels[-1], int(shown["layer"].max()))
    for ax, measure in zip(axes[:, 0], measures, strict=True):
        ax.set_ylabel(ROWS[measure])
    style.letter_panels(axes)
    style.legend(figure, _handles(arms, shown), style.seeds_note(*summaries))
    return figure


def _draw_settings(probes: pd.DataFrame) -> Figure:
    """Rows: task and regime. Columns: AUROC and selectivity by layer, AUROC by step."""
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
                rows = _at_last_steps(rows)
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
    style.legend(figure, _handles(arms, auroc), style.seeds_note(*summaries))
    return figure


def _handles(arms: list[str], shown: pd.DataFrame) -> list[Any]:
    kinds = set(shown["kind"])
    return style.arm_handles(arms) + [
        style.handle(label, color=color, ls=dashes, lw=0.9)
        for kind, (dashes, color, label) in BASELINES.items()
        if kind in kinds
    ]


def _at_last_steps(rows: pd.DataFrame) -> pd.DataFrame:
    """The network as initialised is a baseline at whatever step its rows bear."""
    return rows[(rows["kind"] == "random_init") | rows.index.isin(final_steps(rows).index)]


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
    return rows[(rows["layer"] == layer) | (rows["layer"] == SURFACE_LAYER)]


def _panel(
    ax: Axes, rows: pd.DataFrame, arms: list[str], x: str, *, shaded: bool = False
) -> pd.DataFrame:
    for kind, (dashes, color, _) in BASELINES.items():
        baseline = where(rows, kind=kind)
        if baseline.empty:
            continue
        look = {"color": color, "ls": dashes, "lw": 0.9, "zorder": 1}
        # Arms share a baseline: their rows are as good as more seeds of it.
        means = over_seeds(baseline, ["layer"])
        if x == "step" or kind.startswith("surface"):
            ax.axhline(means["mean"].mean(), **look)
            continue
        ax.plot(means["layer"], means["mean"], **look)
        if shaded and means["low"].notna().any():
            band = (means["layer"], means["low"], means["high"])
            ax.fill_between(*band, color=color, alpha=0.12, lw=0, zorder=0)
    summary = over_seeds(where(rows, kind="latent"), ["arm", x])
    looks, shifts = arm_styles(arms), style.beside(arms)
    for arm in arms:
        options = {"shift": shifts[arm], "markersize": 3}
        style.curve(ax, where(summary, arm=arm), x, looks[arm], **options)
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
