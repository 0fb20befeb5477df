"""From the results of a study's steps to its tables: cells labelled, arms contrasted over seeds."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mechinterp.arm_names import kind_and_weights
from mechinterp.arm_verdicts import arm_verdicts
from mechinterp.claims import judge_claims
from mechinterp.files import read_table
from mechinterp.seed_measures import seed_measures
from mechinterp.statistics import sign_flip_test, t_interval

if TYPE_CHECKING:
    from mechinterp.study_plan import Plan

KEYS = ["task", "regime", "arm", "seed", "step"]
IN_FULL_ONLY = ("calibration", "incentives")
CELL = ["task", "regime", "arm", "costs", "currency", "loss"]


def study_tables(plan: Plan, out: Path) -> dict[str, pd.DataFrame]:
    """Every table of the study by name, in the form that `figures` reads.

    `ladder` and `losses` hold all checkpoints, measured on `trajectory_items`; `ladder_in_full` and
    `losses_in_full` the ends of the arms, measured on `ladder_items`: beside each other they show
    what estimation costs, and `contrasts` are made from the latter, `verdicts` from both.
    """
    parts: dict[str, list[pd.DataFrame]] = {}
    for step in plan.measures:
        for name, table in step.tables(out).items():
            if step.labels.get("in_full") and name in ("ladder", "losses"):
                name = f"{name}_in_full"
            elif step.labels.get("in_full") is False and name.startswith(IN_FULL_ONLY):
                continue  # the same, on fewer items
            parts.setdefault(name, []).append(table.drop(columns="in_full", errors="ignore"))
    tables = {name: pd.concat(tables, ignore_index=True) for name, tables in parts.items()}
    for name in ("ladder", "losses", "ladder_in_full", "losses_in_full"):
        tables[name] = _before_as_step_zero(tables[name])
    for name in ("losses", "losses_in_full"):  # no shares where there is nothing to lose
        tables[name] = tables[name][np.isfinite(tables[name]["value"])]
    tables["probes"] = _before_as_step_zero(_with_random_init(tables["probes"]))
    tables["patching"] = _before_and_after(tables["patching"])
    tables["contrasts"] = contrast_arms(tables["losses_in_full"])
    tables["verdicts"] = arm_verdicts(
        tables, margin=plan.spec.margin, seeds_for_claims=plan.spec.seeds_for_claims
    )
    tables["training"] = _training_logs(plan, out)
    tables["measures"] = seed_measures(tables)
    for name in tables:
        if name.startswith(IN_FULL_ONLY):
            tables[name] = tables[name][tables[name]["arm"] != "before"]
    tables = {name: in_order(table) for name, table in sorted(tables.items())}
    if plan.spec.claims:  # in the order of the spec
        tables["claims"] = judge_claims(plan.spec, tables["measures"], tables["competence"])
    return tables


def contrast_arms(losses: pd.DataFrame) -> pd.DataFrame:
    """Where each arm ends, against before, the control and the ex-post arm of the same costs.

    mean, low, high: increase of the loss over the reference with its 95% t interval over seeds; p:
    exact sign-flip test. Nothing is adjusted here: states are those of `arm_verdicts`.
    """
    last = losses.groupby(["task", "regime", "arm"])["step"].transform("max")
    final = losses[(losses["step"] == last) & (losses["arm"] != "before")]
    columns = [*(c for c in CELL if c != "arm"), "seed", "value"]
    before = losses.loc[losses["arm"] == "before", columns]
    control = final.loc[final["arm"] == "symmetric", columns]
    ex_post = final.loc[final["arm"].str.startswith("ex_post"), [*columns, "arm"]]
    served = ex_post["arm"].str.removeprefix("ex_post_")
    ex_post = ex_post.drop(columns="arm").assign(served=served)
    others = final[final["arm"] != "symmetric"]
    serving = others[~others["arm"].str.startswith("ex_post")]
    weights = [kind_and_weights(arm)[1] for arm in serving["arm"]]
    serving = serving.assign(served=pd.Series(weights, index=serving.index))
    changes = [
        _changes(final, before, "before"),
        _changes(others, control, "control"),
        _changes(serving, ex_post, "ex_post").drop(columns="served"),
    ]
    rows = []
    for cell, table in pd.concat(changes).groupby([*CELL, "reference"], sort=False):
        change = table["change"].to_numpy()
        interval = t_interval(change)
        rows.append(
            {
                **dict(zip([*CELL, "reference"], cell, strict=True)),
                "step": table["step"].to_numpy()[0],
                "mean": interval.mean,
                "low": interval.low,
                "high": interval.high,
                "n_seeds": len(change),
                "p": sign_flip_test(change),
            }
        )
    return pd.DataFrame(rows)


def _changes(arms: pd.DataFrame, reference: pd.DataFrame, name: str) -> pd.DataFrame:
    """Per seed, how much more each arm loses than the reference in the same cell."""
    keys = [column for column in reference if column != "value"]
    joined = arms.merge(reference, on=keys, suffixes=("", "_reference"))
    return joined.assign(change=joined["value"] - joined["value_reference"], reference=name)


def _before_as_step_zero(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of a regime's "before" network, also as step 0 of each arm."""
    before = table[table["arm"] == "before"]
    copies = [table]
    for task, regime, arm in _arms(table):
        start = before[(before["task"] == task) & (before["regime"] == regime)]
        if "costs" in table:
            own = table.loc[table["arm"] == arm, "costs"].unique()
            start = start[start["costs"].isin(own)]
        copies.append(start.assign(arm=arm))
    return pd.concat(copies, ignore_index=True)


def _arms(table: pd.DataFrame) -> list[tuple[str, str, str]]:
    """(task, regime, arm) of every arm but "before"."""
    cells = table.loc[table["arm"] != "before", ["task", "regime", "arm"]].drop_duplicates()
    return list(cells.itertuples(index=False, name=None))


def _with_random_init(probes: pd.DataFrame) -> pd.DataFrame:
    """Probes of the network as initialised, beside those of every arm: the floor."""
    init = probes[
        (probes["regime"] == "from_init")
        & (probes["arm"] == "before")
        & (probes["kind"] == "latent")
    ]
    floors = [
        init[init["task"] == task].assign(regime=regime, arm=arm, kind="random_init")
        for task, regime, arm in _arms(probes)
    ]
    return pd.concat([probes, *floors], ignore_index=True)


def _before_and_after(patching: pd.DataFrame) -> pd.DataFrame:
    """For each arm its own map ("after") and, if branched, that of its start ("before")."""
    is_before = patching["arm"] == "before"
    after = patching[~is_before].assign(checkpoint="after")
    copies = [after]
    for task, regime, arm in _arms(patching):
        same = (patching["task"] == task) & (patching["regime"] == regime)
        step = int(patching.loc[same & (patching["arm"] == arm), "step"].to_numpy()[0])
        start = patching[same & is_before]
        copies.append(start.assign(arm=arm, step=step, checkpoint="before"))
    return pd.concat(copies, ignore_index=True)


def _training_logs(plan: Plan, out: Path) -> pd.DataFrame:
    logs = []
    for step in {step.key: step for step in plan.runs.values()}.values():
        log = read_table(step.directory(out) / "trajectory" / "training.parquet")
        logs.append(log.drop(columns="seconds").assign(**step.labels))
    return pd.concat(logs, ignore_index=True)


def in_order(table: pd.DataFrame) -> pd.DataFrame:
    """Keys first, rows sorted by them: the order in which steps ended must not show."""
    keys = [key for key in KEYS if key in table]
    rest = [column for column in table if column not in keys]
    return table[[*keys, *rest]].sort_values(keys, kind="stable", ignore_index=True)
