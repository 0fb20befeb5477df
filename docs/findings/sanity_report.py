"""What the sanity runs say: claims, tables and figure from their saved table.

usage: python docs/findings/sanity_report.py [DIRECTORY]

Reads DIRECTORY/sanity_runs.csv, which `sanity_runs.py` writes, draws sanity_runs.png beside it and
prints the tables of sanity_runs.md. DIRECTORY is docs/findings/utility_weighted unless given.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from figures import style
from figures.arm_styles import arm_styles
from figures.axes import percent_axis, step_axis
from figures.tables import where

if TYPE_CHECKING:
    from matplotlib.figure import Figure

EARLY, LATE = 6, 40
CONTRAST = "weighted - ex_post"
# Of the learning rates in turn; the chosen one is in its arm's colour.
MARKERS, SHADES = ("o", "s", "^", "D"), ("black", "#BDBDBD", "#8C8C8C", "#4D4D4D")
# papers.md, section 1: weighted less ex-post weighted loss by signal, epochs and weights, with the
# standard error over 6 seeds. One toy design, of which no more is known than its table says.
REFERENCE = {
    (1.0, 6, 1.8): (0.0095, 0.0023),
    (1.0, 6, 1.98): (0.0068, 0.0003),
    (1.0, 40, 1.8): (0.0071, 0.0043),
    (1.0, 40, 1.98): (-0.0028, 0.0008),
    (3.0, 6, 1.8): (0.0156, 0.0061),
    (3.0, 6, 1.98): (0.0111, 0.0003),
    (3.0, 40, 1.8): (0.0104, 0.0035),
    (3.0, 40, 1.98): (-0.0011, 0.0016),
}
Row = Mapping[Any, Any]  # of the table


def only(table: pd.DataFrame, **conditions: Any) -> Row:
    """The one row that meets the conditions."""
    (row,) = where(table, **conditions).to_dict("records")
    return row


def direction(row: Row) -> str:
    """Of a contrast: higher or lower than ex post, or undecided where the interval holds 0."""
    if row["low"] > 0:
        return "higher"
    return "lower" if row["high"] < 0 else "undecided"


def claims_of(table: pd.DataFrame) -> pd.DataFrame:
    """claim, its condition, measure, mean, low, high, direction: what each claim rests on."""
    contrasts = where(table, arm=CONTRAST)
    mlp = where(contrasts, model="mlp", learning_rate=chosen_rate(table))
    faster = contrasts[contrasts["learning_rate"] > chosen_rate(table)]
    logistic = where(contrasts, model="logistic")
    parts = {
        "early: weighted learns less": where(mlp, epochs=EARLY, measure="learning_share"),
        "early: weighted has the higher loss": where(mlp, epochs=EARLY, measure="weighted_loss"),
        "late: weighted learns less": where(mlp, epochs=LATE, measure="learning_share"),
        "late: weighted has the higher loss": where(mlp, epochs=LATE, measure="weighted_loss"),
        "late, larger learning rates: weighted learns less": where(
            faster, epochs=LATE, measure="learning_share"
        ),
        "late, larger learning rates: weighted has the higher loss": where(
            faster, epochs=LATE, measure="weighted_loss"
        ),
    }
    for truth, name in (("linear", "well specified"), ("interaction", "misspecified")):
        rows = where(logistic, truth=truth)
        parts[f"{name}: weighted has the higher loss"] = where(rows, measure="weighted_loss")
        parts[f"{name}: weighted has the higher utility"] = where(rows, measure="utility")
    claims = pd.concat([part.assign(claim=claim) for claim, part in parts.items()])
    return claims.assign(direction=[direction(row) for row in claims.to_dict("records")])


def chosen_rate(table: pd.DataFrame) -> float:
    """The learning rate that has all arms."""
    return float(where(table, arm="logit_adjusted")["learning_rate"].iloc[0])


def agreement(row: Row, reference: float) -> str:
    """Is the direction of a contrast that of the reference's mean?"""
    if direction(row) == "undecided":
        return "undecided"
    return "same" if (row["mean"] > 0) == (reference > 0) else "opposite"


def interval(row: Row, scale: float = 1, digits: int = 4) -> str:
    mean, low, high = (f"{scale * row[key]:+.{digits}f}" for key in ("mean", "low", "high"))
    return f"{mean} ({low} to {high})"


def markdown(header: str, rows: list[list[str]]) -> str:
    """A table; `header` has its columns separated by bars."""
    rule = "|".join("---" for _ in header.split("|"))
    return "\n".join([header, rule, *(" | ".join(row) for row in rows)])


def network_table(table: pd.DataFrame) -> str:
    """Beside the reference's table, at the chosen learning rate."""
    mlp = where(table, model="mlp", learning_rate=chosen_rate(table))
    rows = []
    for (signal, epochs, weights), (mean, error) in REFERENCE.items():
        cell = where(mlp, signal=signal, epochs=epochs, weights=weights)
        contrast = where(cell, arm=CONTRAST)
        loss = only(contrast, measure="weighted_loss")
        arms = ("weighted", "symmetric")
        aurocs = (only(cell, arm=arm, measure="auroc")["mean"] for arm in arms)
        rows.append(
            [
                f"{signal:g} | {epochs} | {weights}",
                interval(loss),
                f"{mean:+.4f} ± {error:.4f}",
                agreement(loss, mean),
                interval(only(contrast, measure="after_bias_refit")),
                interval(only(contrast, measure="learning_share"), 100, 1),
                " / ".join(f"{value:.3f}" for value in aurocs),
            ]
        )
    header = (
        "signal | epochs | weights | loss | reference ± s.e. | direction | after bias refit | "
        "learning loss, % | AUROC, weighted / symmetric"
    )
    return markdown(header, rows)


def rates_table(table: pd.DataFrame) -> str:
    """Learning loss at all learning rates, beside how far the symmetric network has come."""
    mlp = where(table, model="mlp")
    share = where(mlp, arm=CONTRAST, measure="learning_share")
    validation = where(mlp, measure="validation_loss")
    conditions = [(signal, weights) for signal, epochs, weights in REFERENCE if epochs == EARLY]
    rows = []
    for rate in sorted(share["learning_rate"].unique()):
        for epochs in (EARLY, LATE):
            at = {"learning_rate": rate, "epochs": epochs}
            losses = where(validation, **at).sort_values("signal")["mean"]
            cells = (only(share, signal=s, weights=w, **at) for s, w in conditions)
            rows.append(
                [
                    f"{rate:g} | {epochs}",
                    " / ".join(f"{loss:.3f}" for loss in losses),
                    *(in_short(cell) for cell in cells),
                ]
            )
    names = " | ".join(f"signal {signal:g}, {weights}" for signal, weights in conditions)
    return markdown(f"learning rate | epochs | validation loss, symmetric | {names}", rows)


def in_short(row: Row) -> str:
    """A contrast in percent, in brackets where it is undecided."""
    text = f"{100 * row['mean']:+.1f}"
    return f"({text})" if direction(row) == "undecided" else text


def arms_table(table: pd.DataFrame) -> str:
    """The arms other than weighted training, at the chosen learning rate."""
    mlp = where(table, model="mlp", learning_rate=chosen_rate(table))
    rows = []
    for signal, epochs, weights in REFERENCE:
        cell = where(mlp, signal=signal, epochs=epochs, weights=weights)
        row = [f"{signal:g} | {epochs} | {weights}"]
        for arm in ("logit_adjusted - ex_post", "subsampled_ex_post - ex_post"):
            row.append(interval(only(cell, arm=arm, measure="weighted_loss")))
            row.append(interval(only(cell, arm=arm, measure="learning_share"), 100, 1))
        rows.append(row)
    header = (
        "signal | epochs | weights | logit-adjusted: loss | learning loss, % | "
        "subsampled, ex post: loss | learning loss, %"
    )
    return markdown(header, rows)


def logistic_table(table: pd.DataFrame) -> str:
    """Thousandths of a nat, and of the utility of a unit weight."""
    contrast = where(table, model="logistic", arm=CONTRAST)
    sizes = sorted(contrast["n"].unique())
    rows = []
    for measure in ("weighted_loss", "utility"):
        cells = where(contrast, measure=measure).groupby(["truth", "signal", "weights"], sort=False)
        for (truth, signal, weights), cell in cells:
            values = [interval(only(cell, n=n), 1_000, 2) for n in sizes]
            rows.append([measure.split("_")[-1], f"{truth} | {signal:g} | {weights}", *values])
    names = " | ".join(f"n = {n:,}" for n in sizes)
    return markdown(f"measure | truth | signal | weights | {names}", rows)


def report(table: pd.DataFrame) -> str:
    """The tables of the page: contrasts are weighted - ex post, with 95% t intervals over seeds."""
    claims = claims_of(table)
    directions = ["higher", "lower", "undecided"]
    counts = []
    for claim, rows in claims.groupby("claim", sort=False):
        counts.append([str(claim), *(str((rows["direction"] == d).sum()) for d in directions)])
    summary = markdown(" | ".join(["weighted − ex post", *directions]), counts)
    parts = {
        "In how many conditions": summary,
        "The network beside the reference": network_table(table),
        "Learning loss (%) by learning rate": rates_table(table),
        "The other arms": arms_table(table),
        "Logistic regression (thousandths)": logistic_table(table),
    }
    return "\n\n".join(f"**{title}**\n\n{text}" for title, text in parts.items())


@style.styled
def draw(table: pd.DataFrame) -> Figure:
    """Learning loss, weighted less ex post, over training. Rows: weights; columns: signals."""
    share = where(table, model="mlp", arm=CONTRAST, measure="learning_share")
    weights, signals = (sorted(share[key].unique()) for key in ("weights", "signal"))
    rates, chosen = sorted(share["learning_rate"].unique()), chosen_rate(table)
    figure, axes = style.grid(
        len(weights), len(signals), width=5.0, row_height=1.6, sharex=True, sharey="row"
    )
    for panels, value in zip(axes, weights, strict=True):
        arm = arm_styles([f"weighted_{value}"])[f"weighted_{value}"]
        limits = 100 * where(share, weights=value)[["low", "high"]].to_numpy()
        for ax, signal in zip(panels, signals, strict=True):
            ax.axhline(0, color="black", lw=0.5, zorder=0)
            for rate, marker, shade in zip(rates, MARKERS, SHADES, strict=True):
                curve = where(share, weights=value, signal=signal, learning_rate=rate)
                curve = curve.sort_values("epochs")
                x, mean, low, high = curve[["epochs", "mean", "low", "high"]].to_numpy(float).T
                color = arm.color if rate == chosen else shade
                ax.fill_between(x, 100 * low, 100 * high, color=color, alpha=0.25, lw=0)
                ax.plot(x, 100 * mean, color=color, marker=marker)
            step_axis(ax, share["epochs"].tolist())
            percent_axis(ax, "y", limits, signed=True)
            ax.set_title(f"signal {signal:g}, weights {value}")
    figure.supylabel("Learning loss, weighted − ex post\n(% of best constant − oracle)", fontsize=7)
    figure.supxlabel("Epoch (logarithmic)", fontsize=7)
    style.letter_panels(axes)
    handles = []
    for rate, marker, shade in zip(rates, MARKERS, SHADES, strict=True):
        label = f"learning rate {rate:g}" + (" (chosen, in colour)" if rate == chosen else "")
        handles.append(style.handle(label, marker=marker, color=shade))
    n = int(share["n_seeds"].max())
    style.legend(
        figure,
        handles,
        f"Above 0 the weighted network learns less. Mean of {n} seeds; bands: 95% t interval.",
    )
    return figure


def main(directory: str | Path = Path(__file__).parent / "utility_weighted") -> None:
    table = pd.read_csv(Path(directory) / "sanity_runs.csv")
    style.save(draw(table), "sanity_runs", directory, ["png"])
    print(report(table))


if __name__ == "__main__":
    main(*sys.argv[1:])
