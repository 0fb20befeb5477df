"""A study's verdicts: every arm at every checkpoint, over seeds, by the rule of
`mechinterp.verdict`.

The unit is the seed: a side's delta is the mean over seeds of how much more the arm loses than its
reference of the same seed, with Student's interval. References, at the same costs:

    control   the symmetric arm at the same step, as it is
    ex_post   the same, its logits shifted to the costs that the arm serves
    before    the network before training, or that the arm branched from

An arm that serves a weighting is judged at its own costs and at symmetric ones, other arms at all.

Sides are learning and choosing, whose states make the word; *discarded*; and *forgetting*, in bits
that probes of the best layer read less about latents that the decision does not need (mean over
latents), at no costs. With two claims that a side can make, each has its p-value:

    p          of an increase within the margin: damaged or improved where p_holm < 0.05
    p_intact   of an increase beyond it (two one-sided tests): intact where p_intact_holm < 0.05

For a single row these are the intervals of `mechinterp.verdict`. A study has hundreds of rows, so
that both are adjusted (Holm 1979, valid for rows that depend on each other, as steps of one run do)
within families that were fixed before any study was judged: one for each reference, each of the
three kinds of side (the word's two are one kind) and for the ends of the arms, which a study is
for, apart from the steps on the way there. In such a family a false alarm anywhere has a chance of
at most 5%, and so has a false "intact".

"not powered" is said with too few seeds, and "void" of a task that a symmetric network does not
know.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mechinterp.arm_names import CONTROL, kind_and_weights
from mechinterp.statistics import holm
from mechinterp.verdict import INFORMATION_MARGIN, SIDES, Side, word

if TYPE_CHECKING:
    import pandas as pd

LEVEL = 0.05
CELL = ["task", "regime", "arm", "costs", "step", "reference", "side"]
COLUMNS = [
    *(*CELL, "delta", "low", "high", "n_seeds"),
    *("p", "p_holm", "p_intact", "p_intact_holm", "margin", "state", "verdict"),
]
KINDS = {**dict.fromkeys(SIDES, "word"), "discarded": "discarded", "forgetting": "forgetting"}
NOT_JUDGED = ("not powered", "void")
SETTING = ["task", "regime"]
RUN = ["task", "regime", "costs", "seed", "step", "side"]


def arm_verdicts(
    tables: Mapping[str, pd.DataFrame], *, margin: float, seeds_for_claims: int
) -> pd.DataFrame:
    """One row per cell and side; `state` is the side's, `verdict` the word of the cell.

    From tables `losses` (all checkpoints), `losses_in_full` (the ends), `probes` and `competence`.
    """
    import pandas as pd

    last = tables["losses_in_full"].groupby(SETTING)["step"].max().rename("last")
    on_the_way, ends = (_sides_of_losses(tables[name]) for name in ("losses", "losses_in_full"))
    is_end = on_the_way.join(last, on=SETTING)["last"] == on_the_way["step"]
    changes = [*_changes(on_the_way[~is_end]), *_changes(ends), *_changes(_forgetting(tables))]
    table = _summarise(pd.concat(changes), margin)
    incompetent = tables["competence"].loc[~tables["competence"]["competent"].astype(bool), "task"]
    table["state"] = ""
    table.loc[table["n_seeds"] < seeds_for_claims, "state"] = "not powered"
    table.loc[table["task"].isin(incompetent), "state"] = "void"
    return adjust_verdicts(table)


def adjust_verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The verdicts of cells that are judged together, from each cell's own tests.

    Adjusted p-values, states and words are made anew, so that the verdicts of a study's parts can
    be joined; what is void or not powered stays so.
    """
    table = table.drop(columns="verdict", errors="ignore").reset_index(drop=True)
    table["p_holm"], table["p_intact_holm"] = np.nan, np.nan
    is_end = table["step"] == table.groupby(SETTING)["step"].transform("max")
    judged = table[~table["state"].isin(NOT_JUDGED)]
    kinds = judged["side"].map(KINDS)
    for _, family in judged.groupby(["reference", kinds, is_end[judged.index]]):
        for p in ("p", "p_intact"):
            table.loc[family.index, f"{p}_holm"] = holm(family[p])
    decided = table.loc[judged.index, ["delta", "p_holm", "p_intact_holm"]].to_numpy(float)
    table.loc[judged.index, "state"] = [_state(*row) for row in decided]
    return _with_words(table)[COLUMNS]


def _sides_of_losses(losses: pd.DataFrame) -> pd.DataFrame:
    chosen = losses["loss"].isin([*SIDES, "discarded"]) & (losses["currency"] == "log_score")
    return losses.loc[chosen].rename(columns={"loss": "side"})[[*RUN, "arm", "value"]]


def _forgetting(tables: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Bits of every run at every checkpoint, negative, so that an increase is a loss."""
    probes = tables["probes"]
    read = probes[
        (probes["kind"] == "latent")
        & (probes["measure"] == "information")
        & (probes["layer"] > 0)
        & ~probes["needed"].astype(bool)
    ]
    run = ["task", "regime", "arm", "seed", "step"]
    best = read.groupby([*run, "latent"])["value"].max().groupby(run).mean()
    return (-best).reset_index().assign(costs="", side="forgetting")


def _changes(values: pd.DataFrame) -> Iterator[pd.DataFrame]:
    """Per reference: how much more each arm has than it, by seed."""
    arms = values[(values["step"] > 0) & (values["arm"] != "before")]
    if arms.empty:  # such as of a task that needs all its latents
        return
    before = values.loc[values["arm"] == "before"].drop(columns=["arm", "step"])
    yield _less(arms, before, "before")
    others = arms[arms["arm"] != CONTROL]
    yield _less(others, arms[arms["arm"] == CONTROL].drop(columns="arm"), "control")
    kinds, weights = zip(*(kind_and_weights(arm) for arm in arms["arm"]), strict=True)
    serving = arms.assign(kind=kinds, weights=weights).dropna(subset=["weights"])
    is_ex_post = serving["kind"] == "ex_post"
    ex_post = serving[is_ex_post].drop(columns=["arm", "kind"])
    yield _less(serving[~is_ex_post], ex_post, "ex_post")


def _less(arms: pd.DataFrame, reference: pd.DataFrame, name: str) -> pd.DataFrame:
    keys = [column for column in reference if column != "value"]
    joined = arms.merge(reference, on=keys, suffixes=("", "_reference"))
    change = joined["value"] - joined["value_reference"]
    return joined.assign(change=change, reference=name)[[*CELL, "seed", "change"]]


def _summarise(changes: pd.DataFrame, margin: float) -> pd.DataFrame:
    """Per cell the t interval over seeds and both tests; those of `mechinterp.statistics` for all
    cells at once, since a study has thousands."""
    from scipy.special import stdtr, stdtrit

    table = changes.groupby(CELL, sort=False)["change"].agg(["mean", "std", "count"]).reset_index()
    table = table.rename(columns={"mean": "delta", "count": "n_seeds"})
    error = table.pop("std").to_numpy() / np.sqrt(table["n_seeds"].to_numpy())
    freedom = table["n_seeds"].to_numpy() - 1
    half = np.where(freedom > 0, stdtrit(np.maximum(freedom, 1), 0.975) * error, np.nan)
    table["low"], table["high"] = table["delta"] - half, table["delta"] + half
    table["margin"] = np.where(table["side"] == "forgetting", INFORMATION_MARGIN, margin)
    beyond = (table["delta"].abs() - table["margin"]).to_numpy()
    with np.errstate(divide="ignore"):  # seeds that all agree are certain
        statistic = np.where(beyond == 0, 0.0, beyond / error)
    table["p"] = np.minimum(2 * stdtr(freedom, -statistic), 1)
    table["p_intact"] = stdtr(freedom, statistic)
    return table


def _state(delta: float, p_beyond: float, p_intact: float) -> str:
    if p_beyond < LEVEL:
        return "damaged" if delta > 0 else "improved"
    return "intact" if p_intact < LEVEL else "inconclusive"


def _with_words(table: pd.DataFrame) -> pd.DataFrame:
    """The word of each cell beside all its sides; "" where a cell has no learning and choosing."""
    cell = [column for column in CELL if column != "side"]
    words = {}
    for key, rows in table[table["side"].isin(SIDES)].groupby(cell, sort=False):
        states = rows.set_index("side")["state"]
        if states["learning"] in NOT_JUDGED:
            words[key] = states["learning"]
        else:
            none = (0.0, 0.0)
            words[key] = word(*(Side(0.0, none, 1.0, states[side]) for side in SIDES))
    keys = table[cell].itertuples(index=False, name=None)
    return table.assign(verdict=[words.get(key, "") for key in keys])
