"""What happened in training by reward? The log of each step's samples, over training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

from figures import style
from figures.arm_styles import ArmStyle, arm_label, arm_styles
from figures.axes import hide_unused
from figures.tables import Tables, arms_in, files_by_task, over_seeds, read_tables, where
from mechinterp.arm_names import ADVANTAGES, kind_and_advantage
from mechinterp.errors import AnalysisError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "The log of training by reward, measured on the samples that each step trains on: those of an "
    "arm's own problems, so that levels of different arms do not compare. Each seed's curve is a "
    "running mean, over a fifteenth of the training to both sides together (shorter at the ends); "
    "lines are means over seeds, bands their 95% t intervals, cut where they leave the range of "
    "single seeds. Solved: problems with a right answer among their samples. Groups without "
    "signal: all samples of a problem got the same reward. Lone successes: one sample of a "
    "problem is right. Commonest answer: the share, of the answers given in a step, that it has. "
    "Divergence from the start: of the texts sampled, measured now and then. Gradient norm: "
    "before clipping."
)


class _Measure(NamedTuple):
    title: str
    unit: str
    scale: float = 1.0


MEASURES = {
    "reward": _Measure("Reward", ""),
    "correct": _Measure("Right answers", "%", 100),
    "solved": _Measure("Problems solved", "%", 100),
    "degenerate": _Measure("Groups without signal", "%", 100),
    "lone": _Measure("Lone successes", "%", 100),
    "repetition": _Measure("Commonest answer", "%", 100),
    "steps_missing": _Measure("Steps not written", "%", 100),
    "steps_wrong": _Measure("Steps written wrong", "%", 100),
    "length": _Measure("Response length", "tokens"),
    "entropy": _Measure("Entropy", "nats per token"),
    "kl": _Measure("Divergence from start", "nats"),
    "gradient_norm": _Measure("Gradient norm", ""),
}
NEEDS = {"training": ("task", "regime", "arm", "seed", "step", "reward", "correct")}
N_COLUMNS = 4
SMOOTHED = 15  # running means over this part of the steps
FEW = 20  # points that are marked


def variants(source: str | Path | Tables) -> dict[str, dict[str, Any]]:
    """A file per task, or one per way in which rewards become advantages."""
    table = _by_reward(read_tables(source, NEEDS)["training"])
    files: dict[str, dict[str, Any]] = {}
    for stem, setting in files_by_task("rollouts", table).items():
        arms = arms_in(where(table, **setting))
        advantages = {arm: kind_and_advantage(arm)[1] for arm in arms}
        for advantage in (None, *ADVANTAGES):
            chosen = tuple(arm for arm in arms if advantages[arm] == advantage)
            ending = f"_{advantage}" if advantage else ""
            if chosen:
                files[f"{stem}{ending}"] = {**setting, "arms": chosen}
    return files


@style.styled
def draw(source: str | Path | Tables, *, task: str, regime: str, arms: Sequence[str]) -> Figure:
    """A panel per measure that the log has; `arms` share the way from rewards to advantages."""
    table = read_tables(source, NEEDS, task=task, arms=arms)["training"]
    log = where(_by_reward(table), regime=regime)
    measures = [name for name in MEASURES if name in log and log[name].notna().any()]
    n_rows = -(-len(measures) // N_COLUMNS)
    figure, axes = style.grid(n_rows, N_COLUMNS, row_height=1.3)
    looks, summaries = arm_styles(arms_in(log)), []
    for ax, name in zip(axes.flat, measures, strict=False):
        measure = MEASURES[name]
        summaries.append(_panel(ax, _smoothed(log, name), looks, measure))
        ax.set_title(measure.title)
        ax.set_ylabel(measure.unit)
    hide_unused(axes, len(measures))
    figure.supxlabel("Training step", fontsize=7)
    style.letter_panels(axes)
    kinds = {arm: kind_and_advantage(arm) for arm in looks}
    handles = [
        style.handle(arm_label(kinds[arm][0]), color=look.color, linestyle=look.linestyle)
        for arm, look in looks.items()
    ]
    (advantage,) = {each or "" for _, each in kinds.values()}
    rewards = f", {advantage.replace('_', ' ')} rewards" if advantage else ""
    note = style.seeds_note(*summaries).replace("bars", "bands")
    heading = f"{style.setting_line(task, regime).capitalize()}{rewards}. {note}"
    style.legend(figure, handles, heading)
    return figure


def _by_reward(table: pd.DataFrame) -> pd.DataFrame:
    """Without the log of supervised training, which samples nothing."""
    rows = table[table["reward"].notna()]
    if rows.empty:
        raise AnalysisError("table 'training' has no arm that was trained by reward")
    return rows


def _smoothed(log: pd.DataFrame, name: str) -> pd.DataFrame:
    """Column `value`: running means of each seed's course, where it was measured at all."""
    import pandas as pd

    window = max(1, log["step"].nunique() // SMOOTHED // 2 * 2 + 1)
    parts = []
    for _, run in log.sort_values("step").groupby(["arm", "seed"], sort=False, observed=True):
        course = run[name].rolling(window, center=True, min_periods=1).mean()
        parts.append(run[["arm", "seed", "step"]].assign(value=course.where(run[name].notna())))
    return pd.concat(parts, ignore_index=True)


def _panel(
    ax: Axes, courses: pd.DataFrame, looks: dict[str, ArmStyle], measure: _Measure
) -> pd.DataFrame:
    """Means and their bands, on an axis that holds every seed's course."""
    from matplotlib.ticker import MaxNLocator

    summary = over_seeds(courses, ["arm", "step"], scale=measure.scale)
    for arm, look in looks.items():
        rows = where(summary, arm=arm).sort_values("step")
        x, mean, low, high = (rows[c].to_numpy(float) for c in ("step", "mean", "low", "high"))
        marker = "o" if len(rows) <= FEW else None
        ax.plot(x, mean, color=look.color, linestyle=look.linestyle, lw=1, marker=marker, ms=1.5)
        ax.fill_between(x, low, high, color=look.color, alpha=0.15, lw=0)
    values = measure.scale * courses["value"].dropna()
    pad = max(0.08 * (values.max() - values.min()), 1e-3)
    low, high = values.min() - pad, values.max() + pad
    ticks = MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]).tick_values(low, high)
    room = high - 0.08 * (high - low)  # for the panel's letter above
    ax.set_yticks([tick for tick in ticks if low <= tick <= room])
    ax.set_ylim(low, high)
    ax.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10], integer=True))
    ax.set_xlim(courses["step"].min(), courses["step"].max())
    return summary


if __name__ == "__main__":
    from figures import run_script

    run_script("rollouts")
