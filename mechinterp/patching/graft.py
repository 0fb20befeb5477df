"""The crossing by component: one component's weights of one checkpoint in the other, run exactly.

What a decision is worth when a single attention head, MLP, norm or embedding comes from the other
checkpoint (weight grafting: Panigrahi et al. 2023, arXiv:2302.06600), for every component and both
ways. Blocks before the grafted one are not run again, the model is never copied, and a component
that is the same in both checkpoints costs nothing. Like the shares of the crossing, the changes
locate and never classify; they need not add up, and `component_shares` says by how much.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp import decisions
from mechinterp.errors import AnalysisError
from mechinterp.hooked import HookedModel
from mechinterp.patching.components import (
    Component,
    check_graftable,
    components_of,
    differs,
    grafted,
    is_tied,
    merge_components,
    n_weights,
)
from mechinterp.patching.crossing import shapley_shares
from mechinterp.patching.inference import MapInference, infer_map
from mechinterp.progress import progress_bar

DIRECTIONS = ("before_into_after", "after_into_before")
CURRENCIES = ("utility", "log_score")

Logits = Float[Tensor, "items actions"]
# (action logits, final-norm'ed residual [items d_model], utility) -> logits by readout's name
Refit = Callable[[Logits, Tensor, decisions.Utility], Mapping[str, Logits]]
Key = tuple[str, str, str, str]  # direction, costs, currency, readout


@dataclass(frozen=True)
class Grafts:
    """What grafts do to the value of the decision. Made by `graft_components`.

    `table` has one row per component, direction, costs, currency and readout, with columns
    component, kind, layer, head, direction, costs, currency, readout, n_weights, differs (whether
    any weight does), u_target and u_donor (the two networks' own values), u_graft, change (u_graft
    - u_target) and stderr (of the change, items taken as independent). `changes` has the change
    per item, if it was asked for, and `totals` what exchanging the whole network does.
    """

    components: tuple[Component, ...]
    table: pd.DataFrame
    changes: Mapping[Key, Float[Tensor, "items components"]]
    totals: Mapping[Key, Float[Tensor, " items"]]

    def infer(
        self,
        *,
        direction: str,
        costs: str,
        currency: str = "log_score",
        readout: str = "raw",
        **options: Any,
    ) -> MapInference:
        """Intervals, p-values and error control over all components; options of `infer_map`.

        Raises:
            AnalysisError: per-item values were not kept, or there are none of that name.
        """
        key = (direction, costs, currency, readout)
        if key not in self.changes:
            kept = [" ".join(k) for k in self.changes]
            raise AnalysisError(
                f"grafts: no per-item values for {' '.join(key)}; "
                + (f"there are {', '.join(kept)}" if kept else "measure with per_item=True")
            )
        return infer_map(self.changes[key], **options)


@torch.no_grad()
def graft_components(
    before: HookedModel,
    after: HookedModel,
    tokens: Int[Tensor, "items positions"],
    labels: decisions.Target,
    *,
    actions: Sequence[int],
    costs: Mapping[str, decisions.Utility],
    by: str = "component",
    kinds: Sequence[str] | None = None,
    directions: Sequence[str] = DIRECTIONS,
    attention_mask: Int[Tensor, "items positions"] | None = None,
    decision: int | Int[Tensor, " items"] = -1,
    action_shifts: tuple[Float[Tensor, " actions"] | None, Float[Tensor, " actions"] | None] = (
        None,
        None,
    ),
    refit: Refit | None = None,
    per_item: bool = False,
    batch_size: int = 256,
) -> Grafts:
    """Graft every component of one checkpoint into the other, one at a time, and value the result.

    Args:
        labels: the label of each item, or its posterior (see `mechinterp.decisions`).
        actions: token ids whose logits decide, in order.
        costs: utilities by name.
        by: "component", or larger parts, which are fewer: "sublayer" (attention or MLP with its
            norms) or "block" (see `mechinterp.patching.components.merge_components`).
        kinds: which kinds of components (see `mechinterp.patching.components`); None is all.
        directions: "before_into_after" grafts weights of before into after.
        action_shifts: what each network's action logits are shifted by (before's, after's), as its
            provenance records; a graft keeps its target's.
        refit: readouts of the grafted network by name, beside "raw", such as `cross_fitted`; it is
            called for every component and costs, which can take longer than the runs.
        per_item: keep every item's change.
        batch_size: rows that go through the network at a time; few items are packed, several
            components to a batch.

    Raises:
        AnalysisError: the networks differ in more than their weights, or an argument is unknown.
    """
    check_graftable(before, after)
    if unknown := set(directions) - set(DIRECTIONS):
        raise AnalysisError(f"directions: expected {' or '.join(DIRECTIONS)}, got {unknown}")
    components = components_of(before, tied=is_tied(before) and is_tied(after))
    components = merge_components(components, by)
    known = {component.kind for component in components}
    if kinds is not None:
        if unknown := set(kinds) - known:
            raise AnalysisError(
                f"kinds: this network has {', '.join(sorted(known))}, no {', '.join(unknown)}"
            )
        components = tuple(c for c in components if c.kind in kinds)
    shifts: dict[str, Tensor | None] = {"before": action_shifts[0], "after": action_shifts[1]}
    models = {"before": before, "after": after}
    token_ids = torch.as_tensor(actions, dtype=torch.long)
    labels = labels.cpu()

    def values(name: str, final: Tensor, logits: Tensor) -> dict[tuple[str, str, str], Tensor]:
        logits, shift = logits.double().cpu(), shifts[name]
        if shift is not None:
            logits = logits + shift
        return _values(logits, final.float().cpu(), labels, costs, refit)

    walks = {
        name: _Walk(model, tokens, token_ids, attention_mask, decision, batch_size)
        for name, model in models.items()
    }
    own = {name: values(name, *walk.own()) for name, walk in walks.items()}
    rows, changes, totals = [], {}, {}
    for direction in directions:
        donor, target = direction.split("_into_")
        differing = [c for c in components if differs(c, models[donor], models[target])]
        found = {str(component): own[target] for component in components}
        with progress_bar(f"grafts {direction}", len(differing), unit="components") as advance:
            for component, final, logits in walks[target].grafts(models[donor], differing):
                found[str(component)] = values(target, final, logits)
                advance(1)
        changed = {str(component) for component in differing}
        for key in own[target]:
            per_component = []
            for component in components:
                change = found[str(component)][key] - own[target][key]
                per_component.append(change)
                rows.append(
                    {
                        "component": str(component),
                        "kind": component.kind,
                        "layer": component.layer,
                        "head": component.head,
                        "direction": direction,
                        **dict(zip(("costs", "currency", "readout"), key, strict=True)),
                        "n_weights": n_weights(component, before),
                        "differs": str(component) in changed,
                        "u_target": float(own[target][key].mean()),
                        "u_donor": float(own[donor][key].mean()),
                        "u_graft": float(found[str(component)][key].mean()),
                        "change": float(change.mean()),
                        "stderr": float(change.std() / len(change) ** 0.5),
                    }
                )
            if per_item:
                changes[direction, *key] = torch.stack(per_component, dim=1)
                totals[direction, *key] = own[donor][key] - own[target][key]
    table = pd.DataFrame(rows).astype({"layer": "Int64", "head": "Int64"})
    return Grafts(components, table, changes, totals)


def cross_fitted(labels: Int[Tensor, " items"], folds: Int[Tensor, " items"]) -> Refit:
    """The bias-refit and head-refit readouts of the crossing, "bias" and "head", for `refit`.

    Args:
        folds: the fold of each item (see `probes.folds`), which is read by what never saw it.
    """
    from probes.readout import fit_readouts

    def refit(logits: Logits, final: Tensor, utility: decisions.Utility) -> dict[str, Logits]:
        weights = decisions.action_weights(labels, utility)
        fitted = fit_readouts(logits, {1: final}, weights, folds)
        return {name: fitted.logits[name] for name in ("bias", "head")}

    return refit


def component_shares(
    table: pd.DataFrame, *, scale: Mapping[str, float], margin: float = 0.05
) -> pd.DataFrame:
    """Each component against the rest of the network, from grafts in both directions.

    `mechinterp.patching.crossing.shapley_shares` with the component as front: columns share (of
    U(after) - U(before), the mean of what putting it in and taking it out change), interaction
    (with the rest) and valid.

    Args:
        scale: by currency, (oracle - best constant action), which the margin is a part of.
    """
    names = ["component", "kind", "layer", "head", "costs", "currency", "readout"]
    wide = table.set_index([*names, "direction"])[["u_target", "u_graft"]].unstack("direction")
    rows = []
    for index, row in wide.iterrows():
        assert isinstance(index, tuple)
        labels = dict(zip(names, index, strict=True))
        shares = shapley_shares(
            u_aa=row["u_target", "after_into_before"],
            u_ab=row["u_graft", "before_into_after"],  # before's component, after's rest
            u_ba=row["u_graft", "after_into_before"],
            u_bb=row["u_target", "before_into_after"],
            scale=scale[labels["currency"]],
            margin=margin,
        )
        rows.append(
            {
                **labels,
                "share": shares.phi_front,
                "interaction": shares.interaction,
                "valid": shares.valid,
            }
        )
    return pd.DataFrame(rows)


@dataclass(frozen=True)
class _Walk:
    """One network on some prompts, resumed from wherever a graft changes it."""

    model: HookedModel
    tokens: Int[Tensor, "items positions"]
    token_ids: Int[Tensor, " actions"]
    attention_mask: Int[Tensor, "items positions"] | None
    decision: int | Int[Tensor, " items"]
    batch_size: int

    def own(self) -> tuple[Float[Tensor, "items d_model"], Logits]:
        """What leaves the final norm at the decision, and the action logits, without a graft."""
        resid = [self._embed(rows) for rows in self._batches()]
        return self._read(self._finish(0, resid))

    def grafts(
        self, donor: HookedModel, components: Sequence[Component]
    ) -> Iterator[tuple[Component, Float[Tensor, "items d_model"], Logits]]:
        """As `own`, for each component of the donor grafted in, in the order of computation."""
        model, n_layers = self.model, self.model.n_layers
        ends = ("final_norm", "unembed")
        for component in components:
            if component.layer is None and component.kind not in ends:
                with grafted(model, donor, component):
                    resid = [self._embed(rows) for rows in self._batches()]
                    yielded = self._read(self._finish(0, resid))
                yield (component, *yielded)
        resid = [self._embed(rows) for rows in self._batches()]
        contexts = [
            model.embed(self.tokens[rows], attention_mask=self._mask(rows))[1]
            for rows in self._batches()
        ]
        for layer in range(n_layers):
            inside = [component for component in components if component.layer == layer]
            size = max(1, self.batch_size // len(self.tokens))
            for start in range(0, len(inside), size):
                pack = inside[start : start + size]
                packed = []
                for x, context in zip(resid, contexts, strict=True):
                    outputs = []
                    for component in pack:
                        with grafted(model, donor, component):
                            outputs.append(model.block(layer, x, context))
                    packed.append(torch.cat(outputs))
                lasts = self._finish(layer + 1, packed, len(pack))
                final, logits = self._read(lasts)
                n = len(self.tokens)
                for i, component in enumerate(pack):
                    own = slice(i * n, (i + 1) * n)
                    yield component, final[own], logits[own]
            resid = [model.block(layer, x, c) for x, c in zip(resid, contexts, strict=True)]
        last = self._finish(n_layers, resid)
        for component in components:
            if component.kind in ends:
                with grafted(model, donor, component):
                    read = self._read(last)
                yield (component, *read)

    def _batches(self) -> list[slice]:
        n = len(self.tokens)
        return [slice(i, min(i + self.batch_size, n)) for i in range(0, n, self.batch_size)]

    def _mask(self, rows: slice) -> Int[Tensor, "rows positions"] | None:
        return None if self.attention_mask is None else self.attention_mask[rows]

    def _embed(self, rows: slice) -> Float[Tensor, "rows positions d_model"]:
        return self.model.embed(self.tokens[rows], attention_mask=self._mask(rows))[0]

    def _finish(
        self, layer: int, resid: Sequence[Float[Tensor, "rows positions d_model"]], copies: int = 1
    ) -> Float[Tensor, "items d_model"]:
        """From what enters block `layer` to what enters the final norm at the decision.

        With `copies`, each batch holds its items several times over, which needs one batch.
        """
        lasts = []
        for rows, x in zip(self._batches(), resid, strict=True):
            mask, at = self._mask(rows), self.decision
            if isinstance(at, Tensor):
                at = at[rows].repeat(copies)
            if mask is not None:
                mask = mask.repeat(copies, 1)
            lasts.append(self.model.resid_from_layer(layer, x, attention_mask=mask, positions=at))
        return torch.cat(lasts)

    def _read(
        self, last: Float[Tensor, "items d_model"]
    ) -> tuple[Float[Tensor, "items d_model"], Logits]:
        final = self.model.final_norm(last)
        return final, self.model.unembed(final, self.token_ids)


def _values(
    logits: Logits,
    final: Float[Tensor, "items d_model"],
    labels: decisions.Target,
    costs: Mapping[str, decisions.Utility],
    refit: Refit | None,
) -> dict[tuple[str, str, str], Float[Tensor, " items"]]:
    """(costs, currency, readout) -> value of each item."""
    values = {}
    for cost, utility in costs.items():
        readouts = {"raw": logits}
        if refit is not None:
            readouts |= refit(logits, final, utility)
        for readout, report in readouts.items():
            report = report.double()
            chosen = decisions.expected_utility(report, labels, utility)
            values[cost, "utility", readout] = chosen.double()
            values[cost, "log_score", readout] = decisions.log_score(report, labels, utility)
    return values
