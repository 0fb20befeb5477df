"""Faithfulness curves: how much of the metric circuits of growing size keep (MIB)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.circuits.prompts import Prompts
from mechinterp.patching.circuits.reference import Ablation
from mechinterp.patching.circuits.runs import Circuit, run_circuits
from mechinterp.patching.circuits.selection import (
    Selection,
    edges_of_nodes,
    random_scores,
    select_nested,
)
from mechinterp.patching.graph import Graph
from mechinterp.patching.maps import MIN_GAP
from mechinterp.patching.metrics import Metric
from mechinterp.randomness import derive_generator, derive_rng

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # MIB's


@dataclass(frozen=True, eq=False)
class FaithfulnessCurve:
    """The metric of circuits of growing size, per item. Made by `faithfulness_curve`.

    With m the mean of the metric over items (Mueller et al. 2025, MIB, section 3; Hanna et al.
    2024): f(C) = (m(C) - m(empty)) / (m(full) - m(empty)), the ratio of means over items. CPR is
    the area under f, CMD the area under |1 - f|, both by the trapezoidal rule over `shares` as they
    are (linear, not logarithmic), from the smallest share to the largest: what lies below the
    smallest does not count, so with MIB's shares a perfect circuit has CPR 0.999 and CMD 0. These
    are MIB's own sums. |1 - f| is taken at the points, not between them.

    Attributes:
        shares: of all edges (or nodes), asked for, ascending; `n_edges` is how many edges stayed
            after pruning.
        random_values: random circuits of the same sizes, chosen by the same rule.
        full, empty: the metric of the plain model and of the reference.
    """

    shares: tuple[float, ...]
    n_edges: tuple[int, ...]
    values: Float[Tensor, "points items"]
    random_values: Float[Tensor, "draws points items"]
    full: Float[Tensor, " items"]
    empty: Float[Tensor, " items"]
    ablation: str

    @property
    def faithfulness(self) -> Float[Tensor, " points"]:
        """f at every share; NaN where |m(full) - m(empty)| is below MIN_GAP."""
        return self._faithfulness(self.values)

    @property
    def random_faithfulness(self) -> Float[Tensor, "draws points"]:
        """f of the random circuits."""
        return self._faithfulness(self.random_values)

    @property
    def cpr(self) -> float:
        """Circuit performance ratio: the area under f."""
        return float(self._areas(self.faithfulness)[0])

    @property
    def cmd(self) -> float:
        """Circuit-model distance: the area under |1 - f|; 0 is best."""
        return float(self._areas(self.faithfulness)[1])

    @property
    def random_cpr(self) -> Float[Tensor, " draws"]:
        return self._areas(self.random_faithfulness)[0]

    @property
    def random_cmd(self) -> Float[Tensor, " draws"]:
        return self._areas(self.random_faithfulness)[1]

    def to_table(
        self, *, level: float = 0.95, n_resamples: int = 2_000, seed: int = 0
    ) -> pd.DataFrame:
        """One row per circuit: kind ("scored" or "random"), draw, share, n_edges, faithfulness,
        low and high (percentile bootstrap over items), metric (its mean), full, empty, n_items."""
        low, high = self._bounds(self._resampled(n_resamples, seed), level)
        n_points, n_items = self.values.shape
        rows = [self._rows("scored", 0, self.values, low[:n_points], high[:n_points])]
        for draw, values in enumerate(self.random_values):
            part = slice((draw + 1) * n_points, (draw + 2) * n_points)
            rows.append(self._rows("random", draw, values, low[part], high[part]))
        table = pd.concat(rows, ignore_index=True)
        means = {"full": float(self.full.mean()), "empty": float(self.empty.mean())}
        return table.assign(**means, ablation=self.ablation, n_items=n_items)

    def summary(
        self, *, level: float = 0.95, n_resamples: int = 2_000, seed: int = 0
    ) -> pd.DataFrame:
        """CPR and CMD with intervals: kind, draw, cpr, cpr_low, cpr_high, cmd, cmd_low, ..."""
        resampled = self._resampled(n_resamples, seed)
        n_points = len(self.shares)
        rows = []
        for draw in range(1 + len(self.random_values)):
            f = self.faithfulness if draw == 0 else self.random_faithfulness[draw - 1]
            drawn = resampled[:, draw * n_points : (draw + 1) * n_points]
            row: dict[str, Any] = {"kind": "random" if draw else "scored", "draw": max(draw - 1, 0)}
            for name, area, areas in zip(
                ("cpr", "cmd"), self._areas(f), self._areas(drawn), strict=True
            ):
                low, high = self._bounds(areas[:, None], level)
                row |= {name: float(area), f"{name}_low": low[0], f"{name}_high": high[0]}
            rows.append(row)
        return pd.DataFrame(rows)

    def _rows(
        self, kind: str, draw: int, values: Tensor, low: np.ndarray, high: np.ndarray
    ) -> pd.DataFrame:
        return pd.DataFrame(
            {
                "kind": kind,
                "draw": draw,
                "share": self.shares,
                "n_edges": self.n_edges if kind == "scored" else [pd.NA] * len(self.shares),
                "faithfulness": self._faithfulness(values).double().cpu().numpy(),
                "low": low,
                "high": high,
                "metric": values.double().mean(-1).cpu().numpy(),
            }
        )

    def _faithfulness(self, values: Float[Tensor, "*circuits items"]) -> Tensor:
        empty = self.empty.double().mean()
        gap = self.full.double().mean() - empty
        gap = torch.where(gap.abs() < MIN_GAP, torch.nan, gap)
        return (values.double().mean(-1) - empty) / gap

    def _areas(self, f: Float[Tensor, "*curves points"]) -> tuple[Tensor, Tensor]:
        shares = torch.tensor(self.shares, dtype=f.dtype, device=f.device)
        return torch.trapezoid(f, shares), torch.trapezoid((1 - f).abs(), shares)

    def _resampled(self, n: int, seed: int) -> Float[Tensor, "resamples circuits"]:
        """f of every circuit (scored points, then random draws) when items are drawn anew."""
        every = torch.cat([self.values[None], self.random_values]).flatten(0, 1).double().cpu()
        n_items = every.shape[1]
        drawn = derive_rng(seed, "faithfulness").multinomial(n_items, [1 / n_items] * n_items, n)
        weights = torch.as_tensor(drawn / n_items, dtype=torch.float64)
        empty = weights @ self.empty.double().cpu()
        gap = weights @ self.full.double().cpu() - empty
        gap = torch.where(gap.abs() < MIN_GAP, torch.nan, gap)
        return (weights @ every.T - empty[:, None]) / gap[:, None]

    @staticmethod
    def _bounds(
        resampled: Float[Tensor, "resamples n"], level: float
    ) -> tuple[np.ndarray, np.ndarray]:
        tail = 0.5 - level / 2
        low, high = np.nanquantile(resampled.numpy(), [tail, 1 - tail], axis=0)
        return low, high


def faithfulness_curve(
    model: HookedModel,
    clean: Int[Tensor, "items pos"],
    corrupt: Int[Tensor, "items pos"],
    metric: Metric,
    scores: Float[Tensor, " writers *readers"],
    *,
    sizes: Sequence[float] = SHARES,
    ablation: Ablation = "resample",
    reference_tokens: Int[Tensor, "reference pos"] | None = None,
    method: Selection = "top",
    absolute: bool = True,
    prune: bool = True,
    n_random: int = 1,
    seed: int = 0,
    attention_mask: Int[Tensor, "items pos"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    memory_mb: int = 256,
) -> FaithfulnessCurve:
    """Circuits of growing size by `scores`, and random ones: about a forward pass per point.

    Args:
        scores: of edges [writers readers], or of nodes [writers] (all edges out of a kept node are
            kept). NaN: no edge.
        sizes: shares of all edges (or nodes), ascending in (0, 1].
        method, absolute, prune: how edges are selected, see `select_edges`.
        n_random: random circuits per size, selected alike from random scores; those of one draw
            are nested. Each costs a pass.
        seed: names the stream of the random scores.

    Other arguments and errors as of `run_circuits`.
    """
    graph = Graph.of(model)
    shares = tuple(float(share) for share in sizes)
    if not shares or shares[0] <= 0 or shares[-1] > 1 or list(shares) != sorted(set(shares)):
        raise AnalysisError(f"sizes: expected ascending shares in (0, 1], got {list(sizes)}")
    draws = [random_scores(graph, derive_generator(seed, "circuit", i)) for i in range(n_random)]
    if scores.ndim == 1:
        draws = [draw[:, -1] for draw in draws]
    options: dict[str, Any] = {"method": method, "absolute": absolute, "prune": prune}
    circuits = [circuits_of_size(graph, s, shares, **options) for s in (scores, *draws)]
    nothing = torch.zeros_like(graph.mask)
    values = run_circuits(
        model,
        clean,
        corrupt,
        [nothing, *(circuit for kind in circuits for circuit in kind)],
        metric,
        ablation=ablation,
        reference_tokens=reference_tokens,
        attention_mask=attention_mask,
        decision=decision,
        memory_mb=memory_mb,
    )
    prompts = Prompts.of(
        model, clean, corrupt, metric, attention_mask=attention_mask, decision=decision
    )
    kept = values[1:].unflatten(0, (1 + n_random, len(shares)))
    return FaithfulnessCurve(
        shares=shares,
        n_edges=tuple(int(circuit.sum()) for circuit in circuits[0]),
        values=kept[0],
        random_values=kept[1:],
        full=prompts.plain(memory_mb),
        empty=values[0],
        ablation=ablation,
    )


def circuits_of_size(
    graph: Graph,
    scores: Float[Tensor, " writers *readers"],
    shares: Sequence[float],
    **options: Any,
) -> list[Circuit]:
    """A circuit for each share of all edges (of the scored nodes, for scores [writers])."""
    if scores.ndim == 2:
        sizes = [max(1, round(share * graph.n_edges)) for share in shares]
        return select_nested(graph, scores, sizes, **options)
    if scores.shape != (len(graph.writers),):
        raise AnalysisError(
            f"scores: expected [writers readers] {tuple(graph.mask.shape)} or [writers] "
            f"({len(graph.writers)},), got {tuple(scores.shape)}"
        )
    size = scores.detach().cpu().double()
    size = size.abs() if options.get("absolute", True) else size
    unscored = size.isnan()
    order = size.nan_to_num(nan=-torch.inf).argsort(descending=True, stable=True)
    n = int((~unscored).sum())
    circuits = []
    for share in shares:
        kept = unscored.clone()  # a node without a score stays, as in EAP-IG
        kept[order[: max(1, round(share * n))]] = True
        circuits.append(edges_of_nodes(graph, kept))
    return circuits
