"""A circuit as a graph, before and after, and what circuits of each size keep of the decision."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import numpy as np

from figures import style
from figures.arm_styles import ArmStyle, arm_styles
from figures.tables import Tables, arms_in, read_tables, settings_in, where

if TYPE_CHECKING:
    from pathlib import Path

    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CAPTION = (
    "Circuits. Graphs: the edges with the largest estimated effects (EAP-IG, clean into corrupt) "
    "of the smallest circuit that keeps 80% of the decision, at most 60 of them, from the "
    "embedding (bottom) through attention heads (circles) and MLPs (squares) of each layer to the "
    "logits (top); width: size of the effect, colour: its sign. An edge into a key or value head "
    "ends at the query heads that share it. Right: faithfulness, the share of the metric's "
    "difference between the plain and the fully ablated run that a circuit keeps when every other "
    "edge carries the corrupt prompt's value, by the share of edges kept; bars: 95% bootstrap "
    "interval over items; grey: random circuits of equal size."
)
NEEDS = {
    "circuit_edges": (
        *("task", "regime", "arm", "seed", "step"),
        *("writer", "reader", "score", "in_circuit"),
    ),
    "faithfulness": (
        *("task", "regime", "arm", "seed", "step"),
        *("kind", "draw", "share", "faithfulness", "low", "high"),
    ),
}
MOST_EDGES = 60
SIGNS = {1: "#0072B2", -1: "#D55E00"}


@style.styled
def draw(source: str | Path | Tables) -> Figure:
    """Columns: the graph of each arm, then the curves of all. Rows: tasks."""
    tables = read_tables(source, NEEDS)
    edges, curves = tables["circuit_edges"], tables["faithfulness"]
    settings = settings_in(edges)
    arms = arms_in(edges)
    figure, axes = style.grid(
        len(settings), len(arms) + 1, row_height=2.9, width_ratios=[1.0] * len(arms) + [0.9]
    )
    looks = arm_styles(arms)
    for panels, (task, regime) in zip(axes, settings, strict=True):
        here = where(edges, task=task, regime=regime)
        n_layers = 1 + max(_place(node)[0] for node in here["writer"])
        for ax, arm in zip(panels, arms, strict=False):
            _graph(ax, where(here, arm=arm), int(n_layers))
            ax.set_title(looks[arm].label)
        _curves(panels[-1], where(curves, task=task, regime=regime), looks)
        panels[0].set_ylabel(f"{style.setting_label(task, regime)}\nlayer")
    style.letter_panels(axes)
    handles = [
        style.handle("towards the clean answer", color=SIGNS[1]),
        style.handle("against it", color=SIGNS[-1]),
        style.handle("random circuits", color=style.GREY, lw=0.7),
        *style.arm_handles(arms),
    ]
    style.legend(figure, handles)
    return figure


def _graph(ax: Axes, rows: pd.DataFrame, n_layers: int) -> None:
    rows = rows[rows["in_circuit"]]
    rows = rows.reindex(rows["score"].abs().sort_values(ascending=False).index)[:MOST_EDGES]
    writers = set(rows["writer"])
    n_heads = 1 + max((_head(node) for node in writers), default=0)
    largest = rows["score"].abs().max()
    drawn = set()
    for row in rows.to_dict("records"):
        start = _at(row["writer"], n_heads, n_layers)
        for node in _ends(row["reader"], writers):
            end = _at(node, n_heads, n_layers)
            width = 0.2 + 2.2 * abs(row["score"]) / largest
            ax.plot(
                *zip(start, end, strict=True),
                color=SIGNS[int(np.sign(row["score"])) or 1],
                lw=width,
                alpha=0.75,
                solid_capstyle="round",
                zorder=1,
            )
            drawn |= {row["writer"], node}
    for node in sorted(drawn):
        x, y = _at(node, n_heads, n_layers)
        shape = "s" if node.startswith("mlp") else "o"
        ends = node in ("embed", "logits")
        ax.plot(x, y, shape, color="black" if ends else "white", mec="black", mew=0.6, ms=4)
        if ends:
            ax.annotate(node, (x, y), xytext=(5, 0), textcoords="offset points", va="center")
    stride = max(1, n_layers // 6)
    ax.set_yticks([layer + 1.0 for layer in range(0, n_layers, stride)])
    ax.set_yticklabels([str(layer) for layer in range(0, n_layers, stride)])
    heads = range(0, n_heads, max(1, n_heads // 8))
    ax.set_xticks([*(_at(f"head.0.{head}", n_heads, n_layers)[0] for head in heads), 1.0])
    ax.set_xticklabels([*(str(head) for head in heads), "MLP"])
    ax.set(xlim=(-0.08, 1.12), ylim=(-0.4, n_layers + 1.4), xlabel="Head")


def _ends(reader: str, writers: set[str]) -> list[str]:
    """The nodes at which an edge into `reader` ends: of a key or value head, the heads that use it
    and write on in this circuit."""
    match = re.fullmatch(r"([qkv])\.(\d+)\.(\d+)", reader)
    if match is None:
        return [reader]
    kind, layer, head = match[1], int(match[2]), int(match[3])
    if kind == "q":
        return [f"head.{layer}.{head}"]
    here = [
        node for node in sorted(writers) if re.fullmatch(rf"(head|attn)\.{layer}(\.\d+)?", node)
    ]
    exact = f"head.{layer}.{head}"
    return [exact] if exact in here else here


def _place(node: str) -> tuple[float, float]:
    """(layer, offset within it) of a node."""
    parts = node.split(".")
    layer = float(parts[1]) if len(parts) > 1 else -1.0
    return layer, 0.35 if parts[0] == "mlp" else 0.0


def _head(node: str) -> int:
    parts = node.split(".")
    return int(parts[2]) if len(parts) > 2 else 0


def _at(node: str, n_heads: int, n_layers: int) -> tuple[float, float]:
    if node == "embed":
        return 0.5, 0.0
    if node == "logits":
        return 0.5, n_layers + 1.0
    layer, offset = _place(node)
    x = 1.0 if node.startswith("mlp") else 0.85 * (_head(node) + 0.5) / n_heads
    return x, layer + 1 + offset


def _curves(ax: Axes, rows: pd.DataFrame, looks: dict[str, ArmStyle]) -> None:
    for level in (0, 1):
        ax.axhline(level, color=style.GREY, lw=0.5, zorder=0)
    for arm, look in looks.items():
        own = where(rows, arm=arm)
        for _, random in where(own, kind="random").groupby("draw"):
            random = random.sort_values("share")
            ax.plot(random["share"], random["faithfulness"], color=style.GREY, lw=0.7, zorder=1)
        scored = where(own, kind="scored").rename(columns={"faithfulness": "mean"})
        style.curve(ax, scored, "share", look)
    ax.set_xscale("log")
    low, high = np.nanmin([*rows["low"], -0.05]), np.nanmax([*rows["high"], 1.05])
    ax.set(xlabel="Share of edges kept", ylabel="Faithfulness")
    ax.set_ylim(max(low - 0.05, -1), min(high + 0.05, 2))


if __name__ == "__main__":
    from figures import run_script

    run_script("circuits")
