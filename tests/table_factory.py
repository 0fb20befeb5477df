"""Synthetic tables with the columns, sizes and quirks of real ones, for figures and reports.

Their story: strong weights slow learning down, ex-post adjustment moves the threshold alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from mechinterp.files import write_table
from mechinterp.randomness import derive_rng

STUDY_ARMS = (
    "symmetric",
    "symmetric_reordered",
    "weighted_1.8",
    "weighted_1.98",
    "ex_post_1.8",
    "ex_post_1.98",
)
STEPS = (0, 50, 100, 200, 400, 800, 1600)
COMPONENTS = ("threshold", "readout", "discarded", "not_combined", "not_encoded")
RUNGS = ("constant", "raw", "bias", "head", "depth", "latents", "oracle")


def study_tables(
    *,
    tasks: tuple[str, ...] = ("triage", "digits"),
    regimes: tuple[str, ...] = ("branched", "from_init"),
    arms: tuple[str, ...] = STUDY_ARMS,
    seeds: int = 4,
    steps: tuple[int, ...] = STEPS,
    n_layers: int = 3,
    n_heads: int = 4,
    latents: tuple[str, ...] = ("a", "b", "c", "d"),
    unneeded: tuple[str, ...] = ("e",),
    roles: tuple[str, ...] | None = None,
) -> dict[str, pd.DataFrame]:
    """Every table of a study, by name."""
    keys = list(itertools.product(tasks, regimes, arms, range(seeds), steps))
    losses = pd.DataFrame(
        [row for key in keys for row in _loss_rows(*key, costs=("symmetric", "w1.8", "w1.98"))]
    )
    trained = [key for key in keys if not key[2].startswith("ex_post")]
    final = [key for key in trained if key[4] == steps[-1]]
    moved = [key for key in final if key[2] != "symmetric"]
    findings = itertools.product((*latents, *unneeded), ("marker", "value"))
    roles = roles or (*(f"{kind} {latent}" for latent, kind in findings), "filler", "decision")
    return {
        "losses": losses,
        "ladder": _ladder(losses),
        "contrasts": _contrasts(losses, steps),
        "probes": pd.DataFrame(
            [row for key in trained for row in _probe_rows(*key, n_layers, latents, unneeded)]
        ),
        "patching": pd.DataFrame(
            [
                row
                for key in final
                for row in _patching_rows(*key, n_layers, n_heads, latents, roles)
            ]
        ),
        "cross_checkpoint": pd.DataFrame(
            [row for key in moved for row in _cross_rows(*key, n_layers, roles)]
        ),
        "crossing": pd.DataFrame([row for key in moved for row in _crossing_rows(*key, n_layers)]),
        "calibration": pd.DataFrame(
            [row for key in keys if key[4] == steps[-1] for row in _calibration_rows(*key)]
        ),
        "calibration_summary": pd.DataFrame(
            [row for key in keys if key[4] == steps[-1] for row in _calibration_summary(*key)]
        ),
        "training": pd.DataFrame(
            [
                {**_key(*key), "loss": 0.5, "learning_rate": 1e-3, "tokens_per_second": 9000.0}
                for key in trained
            ]
        ),
        "competence": pd.DataFrame(
            {
                "task": task,
                "regime": regime,
                "seed": seed,
                "value": 0.93 + 0.01 * seed,
                "threshold": 0.9,
                "reference": "oracle" if task == "triage" else "logistic_regression",
                "competent": True,
            }
            for task, regime, seed in itertools.product(tasks, regimes, range(seeds))
        ),
    }


def pair_tables(
    *, control: bool = True, intervals: bool = True, **shape
) -> dict[str, pd.DataFrame]:
    """Every table of `compare`: one seed, arms before, after, control; item intervals or none."""
    stand_ins = {"symmetric": "before", "weighted_1.98": "after", "symmetric_reordered": "control"}
    if not control:
        del stand_ins["symmetric_reordered"]
    study = study_tables(
        tasks=shape.pop("tasks", ("triage",)),
        regimes=("branched",),
        arms=tuple(stand_ins),
        seeds=1,
        steps=(800,),
        **shape,
    )
    tables = {}
    for name, table in study.items():
        table = table.assign(regime="pair")
        if "arm" in table:
            table["arm"] = table["arm"].map(stand_ins)
        if "costs" in table:
            table = table[table["costs"].isin(["w1.98", "symmetric"])]
            table["costs"] = table["costs"].replace({"w1.98": "task"})
        if intervals and name == "losses":
            table = table.assign(low=table["value"] - 0.02, high=table["value"] + 0.02)
        tables[name] = table.reset_index(drop=True)
    losses = tables["losses"]
    before = losses[losses["arm"] == "before"]
    keys = ["task", "regime", "costs", "currency", "loss"]
    contrasts = losses[losses["arm"] != "before"].merge(before, on=keys, suffixes=("", "_0"))
    contrasts["mean"] = contrasts["value"] - contrasts["value_0"]
    half = 0.03 if intervals else np.nan
    contrasts = contrasts.assign(
        low=contrasts["mean"] - half,
        high=contrasts["mean"] + half,
        n_seeds=1,
        p=np.nan,
        reference="before",
        control="before",
    )
    columns = [*keys, "arm", "control", "step", "mean", "low", "high", "n_seeds", "p", "reference"]
    tables["contrasts"] = contrasts[columns]
    return tables


def write_tables(tables: dict[str, pd.DataFrame], folder: Path) -> Path:
    for name, table in tables.items():
        write_table(folder / f"{name}.parquet", table)
    return folder


def _key(task, regime, arm, seed, step):
    return {"task": task, "regime": regime, "arm": arm, "seed": seed, "step": step}


def _noise(*labels, scale=0.01, size=None):
    return derive_rng(0, *labels).normal(0, scale, size)


def _strength(arm):
    return {"weighted_1.8": 0.4, "weighted_1.98": 1.0}.get(arm, 0.0)


def _learning(task, regime, arm, seed, step):
    """Learning loss: falls with training, and less so under strong weights."""
    noise = _noise("learning", task, regime, arm, seed, step) if step else 0.0
    if regime == "branched":
        start, floor = (0.16, 0.05) if task == "triage" else (0.12, 0.06)
        gained = (start - floor) * (1 - np.exp(-step / 400))
        harm = 0.22 * (1 - np.exp(-step / 300)) * (1.0 if task == "triage" else 0.15)
        return start - gained + _strength(arm) * harm + noise
    rate = 250 * (1 + 3 * _strength(arm))
    return 0.08 + 0.9 * np.exp(-step / rate) + noise


def _threshold(regime, arm, costs, currency, step):
    """Threshold loss: what the shift is worth, unless the arm's weight and the costs agree."""
    if currency == "log_score":
        wrong = {"symmetric": 1.4, "w1.8": 1.5, "w1.98": 9.0}
    else:
        wrong = {"symmetric": 0.3, "w1.8": 0.12, "w1.98": 0.35}
    weight = arm.rsplit("_", 1)[-1]
    agrees = costs == f"w{weight}" or (costs == "symmetric" and not weight[0].isdigit())
    if agrees and arm.startswith("weighted"):
        return 0.01 + wrong[costs] * np.exp(-step / 60)
    return 0.008 if agrees else wrong[costs]


def _loss_rows(task, regime, arm, seed, step, *, costs):
    twin = "symmetric" if arm.startswith("ex_post") else arm
    for cost, currency in itertools.product(costs, ("utility", "log_score")):
        learning = _learning(task, regime, twin, seed, step)
        label = (task, regime, twin, seed, step, cost, currency)
        parts = {
            "threshold": _threshold(regime, arm, cost, currency, step)
            + _noise("threshold", *label, scale=0.004),
            "readout": 0.02 + _noise("readout", *label),
            "discarded": 0.004 + _noise("discarded", *label, scale=0.006),
            "not_combined": 0.6 * learning if task == "triage" else np.nan,
            "not_encoded": 0.4 * learning if task == "triage" else np.nan,
        }
        if currency == "utility":
            parts = {name: value * 0.6 for name, value in parts.items()}
            learning *= 0.6
        values = {
            **parts,
            "choosing": parts["threshold"] + parts["readout"],
            "learning": learning,
        }
        for loss, value in values.items():
            yield {
                **_key(task, regime, arm, seed, step),
                "costs": cost,
                "currency": currency,
                "loss": loss,
                "value": value,
                "oracle_known": task == "triage",
            }


def _ladder(losses):
    keys = ["task", "regime", "arm", "seed", "step", "costs", "currency"]
    wide = losses.pivot_table(
        index=keys, columns="loss", values="value", dropna=False
    ).reset_index()
    wide["oracle"], wide["constant"] = 1.0, 0.0
    wide["depth"] = 1 - wide["learning"]
    wide["latents"] = 1 - wide["not_encoded"]
    wide["head"] = wide["depth"] - wide["discarded"]
    wide["bias"] = wide["head"] - wide["readout"]
    wide["raw"] = wide["bias"] - wide["threshold"]
    table = wide.melt(id_vars=keys, value_vars=list(RUNGS), var_name="rung")
    return table.assign(
        scale=0.4, oracle_known=table["task"] == "triage", n_items=4000, n_fit=10000
    )


def _contrasts(losses, steps):
    rows = []
    final = losses[losses["step"] == steps[-1]]
    keys = ["task", "regime", "costs", "currency", "loss"]
    for (*key, arm), group in final.groupby([*keys, "arm"], dropna=False):
        if arm == "symmetric":
            continue
        own = final[(final["arm"] == "symmetric")]
        for name, value in zip(keys, key, strict=True):
            own = own[own[name] == value]
        if own.empty:
            continue
        change = group["value"].to_numpy() - own["value"].to_numpy()
        half = 3.18 * change.std(ddof=1) / np.sqrt(len(change)) if len(change) > 1 else np.nan
        rows.append(
            dict(zip(keys, key, strict=True))
            | {
                "arm": arm,
                "control": "symmetric",
                "step": steps[-1],
                "mean": change.mean(),
                "low": change.mean() - half,
                "high": change.mean() + half,
                "n_seeds": len(change),
                "p": 0.125,
                "reference": "control",
            }
        )
    return pd.DataFrame(rows)


def _probe_rows(task, regime, arm, seed, step, n_layers, latents, unneeded):
    key = _key(task, regime, arm, seed, step)
    learning = _learning(task, regime, arm, seed, step)
    for layer, latent in itertools.product(range(n_layers + 1), (*latents, *unneeded)):
        label = (task, regime, arm, seed, step, layer, latent)
        needed = latent in latents
        depth = min(layer / max(1, 0.6 * n_layers), 1)
        height = 0.5 * (1 - learning) if needed else 0.35 * np.exp(-step / 3000)
        auroc = float(np.clip(0.5 + height * depth**1.5 + _noise("auroc", *label), 0, 1))
        control = 0.5 + 0.03 * depth + _noise("control", *label, scale=0.005)
        rows = [
            ("latent", "auroc", auroc),
            ("latent", "accuracy", auroc - 0.05),
            ("latent", "log_loss", 0.69 * (1 - auroc) * 2),
            ("latent", "selectivity", auroc - control),
            ("control", "auroc", control),
            ("control", "accuracy", control),
        ]
        if step == 0:
            rows.append(("random_init", "auroc", 0.52 + _noise("floor", *label)))
        for kind, measure, value in rows:
            yield {
                **key,
                "layer": layer,
                "latent": latent,
                "needed": needed,
                "kind": kind,
                "measure": measure,
                "value": value,
            }


def _patching_rows(task, regime, arm, seed, step, n_layers, n_heads, latents, roles):
    for checkpoint, grain in itertools.product(
        ("before", "after"), ("resid_pre", "attn_out", "mlp_out", "head")
    ):
        units = [f"head {h}" for h in range(n_heads)] if grain == "head" else roles
        for layer, (index, unit), latent in itertools.product(
            range(n_layers), enumerate(units), latents
        ):
            moved = (
                (layer + 1) / n_layers * (0.7 if checkpoint == "after" else 1.0) ** _strength(arm)
            )
            if grain == "resid_pre":
                own = unit == f"value {latent}" or (
                    not unit.endswith(tuple(latents)) and index % 7 == 3
                )
                recovery = (1 - moved) * own + moved * (unit == roles[-1])
            elif grain == "head":
                recovery = 0.5 * ((layer + index) % n_heads == 0) * moved
            else:
                recovery = 0.25 * moved * (unit == roles[-1]) - 0.04 * (index == 2)
            label = ("patching", task, regime, arm, seed, checkpoint, grain, layer, unit, latent)
            yield {
                **_key(task, regime, arm, seed, step),
                "checkpoint": checkpoint,
                "grain": grain,
                "layer": layer,
                "unit": unit,
                "latent": latent,
                "recovery": recovery + _noise(*label, scale=0.02),
                "stderr": 0.02,
                "n_items": 200,
            }


def _cross_rows(task, regime, arm, seed, step, n_layers, roles):
    for direction, layer, unit, control in itertools.product(
        ("after_into_before", "before_into_after"), range(n_layers), roles, (False, True)
    ):
        label = ("cross", task, regime, arm, seed, direction, layer, unit, control)
        full = 1 / (1 + np.exp(-6 * (layer / n_layers - 0.5))) * (unit == roles[-1])
        effect = (0.05 if control else 0.9) * full + _noise(*label, scale=0.03)
        gap = arm != "symmetric_reordered"
        yield {
            **_key(task, regime, arm, seed, step),
            "direction": direction,
            "grain": "resid_pre",
            "layer": layer,
            "unit": unit,
            "control": control,
            "effect": effect if gap else np.nan,
            "raw_effect": effect * 0.2,
            "n_items": 400,
        }


def _crossing_rows(task, regime, arm, seed, step, n_layers):
    null = arm == "symmetric_reordered"
    for cut, costs, currency, readout in itertools.product(
        range(n_layers + 1), ("w1.8", "w1.98"), ("utility", "log_score"), ("raw", "bias", "head")
    ):
        label = ("crossing", task, regime, arm, seed, cut, costs, currency, readout)
        total = 0.0 if null else -0.08 - 0.15 * _strength(arm)
        share = cut / n_layers
        noise = _noise(*label, scale=0.008, size=3)
        u_aa, u_bb = 0.82 + _noise(*label[:5]), 0.82 + _noise(*label[:5]) + total
        interaction = -0.12 * np.sin(np.pi * share) * (_strength(arm) + 0.2 * (not null)) + noise[2]
        front = total * share + noise[0]
        u_ba = u_aa + front - interaction / 2
        u_ab = u_bb - front - interaction / 2
        yield {
            **_key(task, regime, arm, seed, step),
            "cut": cut,
            "costs": costs,
            "currency": currency,
            "readout": readout,
            "u_aa": u_aa * 0.4,
            "u_ab": u_ab * 0.4,
            "u_ba": u_ba * 0.4,
            "u_bb": u_bb * 0.4,
            "phi_front": 0.2 * ((u_ba - u_aa) + (u_bb - u_ab)),
            "phi_back": 0.2 * ((u_ab - u_aa) + (u_bb - u_ba)),
            "interaction": 0.4 * (u_bb - u_ab - u_ba + u_aa),
            "scale": 0.4,
            "shares_valid": bool(abs(u_bb - u_ab - u_ba + u_aa) < max(abs(u_bb - u_aa) / 2, 0.05)),
            "null": null,
            "verdict_cut": cut == max(1, round(0.6 * n_layers)),
        }


def _calibration_rows(task, regime, arm, seed, step):
    rng = derive_rng(0, "calibration", task, regime, arm, seed)
    for costs, index in itertools.product(("symmetric", "w1.8", "w1.98"), range(10)):
        n_items = int(40 + 900 * ((index - 4.5) / 4.5) ** 2)
        predicted = (index + 0.5) / 10
        bend = 0.25 * _strength(arm) * np.sin(np.pi * predicted)
        yield {
            **_key(task, regime, arm, seed, step),
            "costs": costs,
            "bin": index,
            "predicted": predicted,
            "observed": float(np.clip(predicted - bend + rng.normal(0, 0.02), 0, 1)),
            "n_items": n_items,
        }


def _calibration_summary(task, regime, arm, seed, step):
    for costs in ("symmetric", "w1.8", "w1.98"):
        ece = 0.02 + 0.12 * _strength(arm) + abs(_noise("ece", task, regime, arm, seed, costs))
        yield {
            **_key(task, regime, arm, seed, step),
            "costs": costs,
            "ece": float(ece),
            "brier": 0.12,
            "log_loss": 0.4,
        }
