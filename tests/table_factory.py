"""Synthetic tables with the columns, sizes and quirks of real ones, for figures and reports.

Their story: strong weights slow learning down, ex-post adjustment moves the threshold alone.
"""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pandas as pd

from mechinterp.arm_verdicts import arm_verdicts
from mechinterp.files import write_table
from mechinterp.randomness import derive_rng
from mechinterp.seed_measures import seed_measures
from mechinterp.validation import ValidationSpec
from mechinterp.validity import validity_tables

STUDY_ARMS = (
    "symmetric",
    "symmetric_reordered",
    "weighted_1.8",
    "weighted_1.98",
    "ex_post_1.8",
    "ex_post_1.98",
)
STEPS = (0, 50, 100, 200, 400, 800, 1600)
SHAPES = {"effective_rank": 5, "intrinsic_dimension": 7, "anisotropy": 0.5, "norm": 12}
CURRENCIES = ("utility", "log_score")
CELL = ["task", "regime", "costs", "currency", "loss"]


_REPAIRED = list(itertools.product(("log_score", "utility"), ("raw", "bias")))


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
    roles: tuple[str, ...] = ("start", "marker a", "value a", "filler", "decision"),
    patched_roles: tuple[str, ...] = (
        *("changed marker", "changed value", "decision", "filler"),
        *("other marker", "other value", "start"),
    ),
) -> dict[str, pd.DataFrame]:
    """Every table of a study, by name. Arms that end in a number are valued at their own costs."""
    last = steps[-1]
    keys = [
        key
        for key in itertools.product(tasks, regimes, (*arms, "before"), range(seeds), steps)
        if (key[2] != "before" or key[4] == 0)
        and (key[2] != "symmetric_reordered" or key[4] in (0, last))
    ]
    losses = pd.DataFrame([row for key in keys for row in _losses(*key, last)])
    trained = [key for key in keys if not key[2].startswith("ex_post")]
    ends = [key for key in trained if key[4] == last]
    moved = [key for key in ends if key[2] != "symmetric" and key[1] != "from_init"]
    shown = [key for key in ends if key[2] in ("symmetric", "weighted_1.98") and key[3] == 0]
    with_gradients = [
        key for key in trained if key[2] == "symmetric" or (key[2] in arms and key[4] > 0)
    ]
    audited = tuple(arm for arm in arms if not arm.startswith(("ex_post", "symmetric_")))
    rows = {
        "gradients": (with_gradients, _gradients, (n_layers, audited)),
        "gradients_latents": (with_gradients, _gradients_latents, (n_layers, latents, audited)),
        "gradients_posterior": (with_gradients, _gradients_posterior, (audited,)),
        "probes": (trained, _probes, (n_layers, latents, unneeded)),
        "probe_positions": (shown, _probe_positions, (n_layers, latents, unneeded, roles)),
        "erasure": (shown, _erasure, (n_layers, latents, unneeded)),
        "separability": (shown, _separability, ()),
        "separability_index": (shown, _separability_index, ()),
        "use": (shown, _use, (n_layers, latents, unneeded)),
        "use_slopes": (shown, _use_slopes, (n_layers, latents, unneeded)),
        "repair": (shown, _repair, (n_layers,)),
        "reverse": (shown, _reverse, ()),
        "patching": (ends, _patching, (n_layers, n_heads, latents, patched_roles)),
        "cross_checkpoint": (moved, _cross_checkpoint, (n_layers, roles)),
        "crossing": (moved, _crossing, (n_layers,)),
        "representation": (moved, _representation, (n_layers, latents, unneeded)),
        "latent_shifts": (moved, _latent_shifts, (latents, unneeded)),
        "grafts": (shown, _grafts, (n_layers, n_heads)),
        "calibration": ([key for key in keys if key[4] == last], _calibration, ()),
        "calibration_summary": ([key for key in keys if key[4] == last], _calibration_summary, ()),
        "incentives": ([key for key in keys if key[4] == last], _incentives, ()),
        "circuit_edges": (shown, _circuit_edges, (n_layers, n_heads)),
        "faithfulness": (shown, _faithfulness, ()),
        "training": (trained, _training, ()),
    }
    tables = {
        name: pd.DataFrame([row for key in some for row in function(*key, *arguments)])
        for name, (some, function, arguments) in rows.items()
    }
    full = losses[losses["step"].isin([0, last])]
    judged = {**tables, "losses": losses, "losses_in_full": full}
    judged["competence"] = pd.DataFrame([_competence(*key) for key in keys if key[2] == "before"])
    return {
        **tables,
        "losses": losses,
        "losses_in_full": full,
        "ladder": _ladder(losses),
        "contrasts": _contrasts(full),
        "competence": judged["competence"],
        "verdicts": arm_verdicts(judged, margin=0.05, seeds_for_claims=2),
        "claims": pd.DataFrame(_claims(tasks, regimes, arms)),
        "measures": seed_measures({"losses": losses, "losses_in_full": full}),
        **_validity(),
    }


def _validity() -> dict[str, pd.DataFrame]:
    """A validation study's: sensitivity grows with the cost, and one pair in ten is missed."""
    pairs = []
    for side, cost, seed in itertools.product(
        ("choosing", "learning", "both", "discarded", "none"), (0.01, 0.04, 0.15, 0.5), range(4)
    ):
        lost = 0.0 if side == "none" else cost * (1 + 0.1 * seed)
        choosing = {"choosing": 1.0, "both": 0.5}.get(side, 0.0) * lost
        said = side if lost > 0.05 and side != "discarded" else "none"
        pairs.append(
            {
                "half": "held_out",
                "kind": side,
                "network": "triage",
                "seed": seed,
                "side": side,
                "verdict": "inconclusive" if seed == 3 and cost == 0.15 else said,
                "competent": True,
                "cost_utility": lost,
                "cost_utility_choosing": choosing,
                "cost_log_score": 1.5 * lost,
                "cost_log_score_choosing": 1.5 * choosing,
                "choosing": 1.4 * choosing,
                "learning": 0.0 if side == "discarded" else 1.4 * (lost - choosing),
                "discarded": 1.4 * lost if side == "discarded" else 0.0,
                "discarded_state": "damaged" if side == "discarded" and cost > 0.05 else "intact",
            }
        )
    spec = ValidationSpec(name="v", seeds=1, networks={}, development={}, held_out={})
    return validity_tables(pd.DataFrame(pairs), spec)


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
        steps=(0, 800),
        **shape,
    )
    for name in ("losses_in_full", "competence", "training", "claims", "measures", "verdicts"):
        del study[name]
    tables = {}
    for name, table in study.items():
        if "arm" not in table:  # a validation study's
            continue
        table = table[(table["arm"] != "before") & (table["step"] > 0)].assign(regime="pair")
        table["arm"] = table["arm"].map(stand_ins)
        if name in ("crossing", "cross_checkpoint", "patching"):
            table = table[table["arm"] == "after"]
        if "costs" in table:
            table = table[table["costs"].isin(["w1.98"])]
            table["costs"] = "task"
        if "objective" in table:  # named by costs, and all at every network
            one = table[table["objective"] == "symmetric"]
            table = pd.concat([one, one.assign(objective="task", value=0.8 * one["value"])])
        tables[name] = table.reset_index(drop=True)
    tables["crossing"]["null"] = False
    tables["patching"] = _with_change(tables["patching"])
    losses = tables["losses"]
    # What `compare` meets most: a threshold that serves the costs before and after.
    cell = [*CELL[:-1], "arm"]
    threshold = (
        losses["value"].where(losses["loss"] == "threshold").groupby([losses[c] for c in cell])
    )
    excess = (threshold.transform("max") - 0.01).where(losses["arm"] != "after", 0.0)
    losses["value"] -= excess.where(losses["loss"].isin(["threshold", "choosing", "total"]), 0.0)
    if intervals:
        losses["low"], losses["high"] = losses["value"] - 0.02, losses["value"] + 0.02
    changes = [
        losses[losses["arm"] == arm]
        .merge(losses[losses["arm"] == reference], on=CELL, suffixes=("", "_0"))
        .assign(reference=reference)
        for arm, reference in (("after", "before"), ("after", "control"), ("control", "before"))
    ]
    contrasts = pd.concat(changes, ignore_index=True)
    contrasts["mean"] = contrasts["value"] - contrasts["value_0"]
    half = 0.03 if intervals else np.nan
    contrasts["low"], contrasts["high"] = contrasts["mean"] - half, contrasts["mean"] + half
    contrasts = contrasts.assign(n_seeds=1, p=0.01, state="inconclusive")
    columns = ["arm", "step", "reference", "mean", "low", "high", "n_seeds", "p", "state"]
    tables["contrasts"] = contrasts[[*CELL, *columns]]
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


def _costs(arm):
    weight = arm.rsplit("_", 1)[-1]
    return [f"w{weight}"] if weight[0].isdigit() else ["symmetric", "w1.8", "w1.98"]


def _learning(task, regime, arm, seed, step):
    """Learning loss: falls with training, and less so under strong weights."""
    arm = "symmetric" if arm.startswith("ex_post") or step == 0 else arm
    noise = _noise("learning", task, regime, arm, seed, step)
    if regime == "branched":
        start, floor = (0.16, 0.05) if task == "triage" else (0.12, 0.06)
        gained = (start - floor) * (1 - np.exp(-step / 400))
        harm = 0.22 * (1 - np.exp(-step / 300)) * (1.0 if task == "triage" else 0.15)
        return start - gained + _strength(arm) * harm + noise
    rate = 250 * (1 + 3 * _strength(arm))
    return 0.08 + 0.9 * np.exp(-step / rate) + noise


def _threshold(arm, costs, currency, step):
    """Threshold loss: what the shift is worth, unless the arm's weight and the costs agree."""
    if currency == "log_score":
        wrong = {"symmetric": 1.4, "w1.8": 1.5, "w1.98": 9.0}
    else:
        wrong = {"symmetric": 0.3, "w1.8": 0.12, "w1.98": 0.35}
    weight = arm.rsplit("_", 1)[-1]
    if costs == f"w{weight}" and arm.startswith("weighted"):
        return 0.01 + wrong[costs] * np.exp(-step / 60)
    agrees = costs == (f"w{weight}" if weight[0].isdigit() else "symmetric")
    return 0.008 if agrees and step > 0 else wrong[costs]


def _losses(task, regime, arm, seed, step, last):
    for cost, currency in itertools.product(_costs(arm), CURRENCIES):
        twin = "symmetric" if arm.startswith("ex_post") or step == 0 else arm
        label = (task, regime, twin, seed, step, cost, currency)
        unit = 0.6 if currency == "utility" else 1.0
        learning = unit * _learning(task, regime, arm, seed, step)
        threshold = _threshold(arm, cost, currency, step) + _noise("t", *label, scale=0.004)
        readout = unit * (0.02 + _noise("readout", *label))
        discarded = unit * (0.004 + _noise("discarded", *label, scale=0.006))
        parts = {
            "threshold": threshold,
            "readout": readout,
            "choosing": threshold + readout,
            "discarded": discarded,
            "learning": learning,
            "total": threshold + readout + discarded + learning,
        }
        if task == "triage" and step in (0, last):
            parts |= {"not_combined": 0.6 * learning, "not_encoded": 0.4 * learning}
        for loss, value in parts.items():
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
    wide = losses.pivot_table(index=keys, columns="loss", values="value", dropna=False)
    wide = wide.reset_index()
    wide["oracle"], wide["constant"] = 1.0, 0.0
    wide["depth"] = 1 - wide["learning"]
    wide["head"] = wide["depth"] - wide["discarded"]
    wide["bias"] = wide["head"] - wide["readout"]
    wide["raw"] = wide["bias"] - wide["threshold"]
    rungs = ["constant", "raw", "bias", "head", "depth", "oracle"]
    table = wide.melt(id_vars=keys, value_vars=rungs, var_name="rung")
    return table.assign(scale=0.4, oracle_known=table["task"] == "triage", n_items=4000)


def _contrasts(losses):
    """Ends of the arms against before, the control and the ex-post arm of the same costs."""
    last = losses["step"].max()
    ends = losses[losses["step"] == last]
    ex_post = ends[ends["arm"].str.startswith("ex_post")]
    ex_post = ex_post.assign(arm=ex_post["arm"].str.replace("ex_post", "weighted"))
    references = {
        "before": (losses[losses["arm"] == "before"], [*CELL, "seed"]),
        "control": (ends[ends["arm"] == "symmetric"], [*CELL, "seed"]),
        "ex_post": (ex_post, [*CELL, "seed", "arm"]),
    }
    rows = []
    for reference, (other, on) in references.items():
        both = ends.merge(other, on=on, suffixes=("", "_0"))
        both = both if reference == "before" else both[both["arm"] != "symmetric"]
        both["change"] = both["value"] - both["value_0"]
        for cell, group in both.groupby([*CELL, "arm"]):
            change = group["change"].to_numpy()
            half = 3.18 * change.std(ddof=1) / len(change) ** 0.5 if len(change) > 1 else np.nan
            rows.append(
                {
                    **dict(zip([*CELL, "arm"], cell, strict=True)),
                    "reference": reference,
                    "step": last,
                    "mean": change.mean(),
                    "low": change.mean() - half,
                    "high": change.mean() + half,
                    "n_seeds": len(change),
                    "p": 0.125,
                    "state": "not powered",
                }
            )
    return pd.DataFrame(rows)


def _probes(task, regime, arm, seed, step, n_layers, latents, unneeded):
    learning = _learning(task, regime, arm, seed, step)
    for layer, latent in itertools.product(range(1, n_layers + 1), (*latents, *unneeded)):
        label = (task, regime, arm, seed, step, layer, latent)
        needed = latent in latents
        depth = min(layer / max(1, 0.6 * n_layers), 1)
        height = 0.5 * (1 - learning) if needed else 0.35 * np.exp(-step / 3000)
        auroc = float(np.clip(0.5 + height * depth**1.5 + _noise("auroc", *label), 0, 1))
        control = 0.5 + 0.03 * depth + _noise("control", *label, scale=0.005)
        rows = [
            ("latent", "information", 2 * (auroc - 0.5)),
            ("latent", "auroc", auroc),
            ("latent", "accuracy", auroc - 0.05),
            ("latent", "selectivity", auroc - control),
            ("control", "auroc", control),
        ]
        if step == 0:
            rows.append(("random_init", "auroc", 0.52 + _noise("floor", *label)))
        if layer == 1:
            rows += [("surface_bag", "auroc", 0.6), ("surface_token", "auroc", 0.5)]
        for kind, measure, value in rows:
            yield {
                **_key(task, regime, arm, seed, step),
                "layer": -1 if kind.startswith("surface") else layer,
                "latent": latent,
                "needed": needed,
                "kind": kind,
                "measure": measure,
                "value": value,
            }


def _objectives(arm, audited):
    """The control is measured with every objective, other runs with their own and its."""
    return audited if arm == "symmetric" else tuple({"symmetric", arm} & set(audited))


def _gradients(task, regime, arm, seed, step, n_layers, audited):
    parts = [f"{kind} {layer}" for layer in range(n_layers) for kind in ("attn", "mlp")]
    for objective, part in itertools.product(
        _objectives(arm, audited), ("embed", *parts, "norm", "unembed", "all")
    ):
        snr = (2.0 - 0.8 * _strength(objective)) * np.exp(-step / 500)
        snr += 0.3 * (arm != objective) * step / (step + 100)  # not yet served
        snr *= np.exp(_noise("gradients", task, regime, arm, seed, step, objective, part))
        for measure, value in {"snr": snr, "noise": 0.5, "norm": 0.5 * snr}.items():
            cell = {"objective": objective, "part": part, "measure": measure, "value": value}
            yield {**_key(task, regime, arm, seed, step), **cell}


def _gradients_latents(task, regime, arm, seed, step, n_layers, latents, audited):
    for objective, layer, latent in itertools.product(
        _objectives(arm, audited), range(1, n_layers + 1), (*latents, "all needed")
    ):
        share = (0.3 + 0.4 * (1 - np.exp(-step / 300))) * (1 - 0.3 * _strength(objective))
        share *= layer / n_layers * (1.0 if latent == "all needed" else 0.3)
        share += _noise("along", task, regime, arm, seed, step, objective, layer, latent)
        cell = {"objective": objective, "layer": layer, "latent": latent, "needed": True}
        for measure, value in {"share": share, "chance": 0.08}.items():
            yield {
                **_key(task, regime, arm, seed, step),
                **cell,
                "measure": measure,
                "value": value,
            }


def _gradients_posterior(task, regime, arm, seed, step, audited):
    if task == "digits":  # knows no posterior
        return
    for objective in _objectives(arm, audited):
        bins = np.arange(-6, 7, 2)
        at = bins + 2.0 * _strength(objective)
        share = np.exp(-(at**2) / 10) * (1 + _noise("where", arm, seed, objective, size=len(bins)))
        for log_odds, value in zip(bins, share / share.sum(), strict=True):
            cell = {"objective": objective, "log_odds": float(log_odds), "n_items": 290}
            for measure, number in {"share": value, "items": 1 / len(bins), "norm": value}.items():
                row = {**cell, "measure": measure, "value": number}
                yield {**_key(task, regime, arm, seed, step), **row}


def _probe_positions(task, regime, arm, seed, step, n_layers, latents, unneeded, roles):
    surface = [(-1, f"surface_{design}") for design in ("token", "bag", "ordered")]
    cells = [(layer, kind) for layer in range(n_layers + 1) for kind in ("latent", "control")]
    changes = [(layer, "change") for layer in range(n_layers + 1) if arm == "weighted_1.98"]
    for (layer, kind), (position, unit), latent in itertools.product(
        (*cells, *surface, *changes), enumerate(roles), (*latents, *unneeded)
    ):
        if unit == "start" or (unit == "decision" and layer == 0):
            continue  # all items are the same there
        base = 0.0 if kind == "change" else 0.5
        share = layer / n_layers * position / len(roles)
        value = base + (0.0 if kind == "control" else -0.2 if kind == "change" else 0.45) * share
        value += _noise("positions", arm, layer, kind, unit, latent)
        yield {
            **_key(task, regime, arm, seed, step),
            "layer": layer,
            "unit": unit,
            "position": float(position),
            "latent": latent,
            "needed": latent in latents,
            "kind": kind,
            "measure": "auroc",
            "value": value,
            "low": value - 0.05,
            "high": value + 0.05,
            "p_map": 0.01 if abs(value - base) > 0.05 else 0.5,
        }


def _erasure(task, regime, arm, seed, step, n_layers, latents, unneeded):
    for layer, latent, (kind, draw), measure in itertools.product(
        range(1, n_layers + 1),
        (*latents, *unneeded),
        (("latent", 0), ("control", 0), ("random", 0), ("random", 1)),
        ("log_score", "auroc"),
    ):
        base = 0.9 if measure == "auroc" else -0.4
        lost = 0.2 * layer * (latent in latents) * (kind == "latent")
        lost = 0.35 * (kind == "latent") if measure == "auroc" else lost
        lost += _noise("erasure", arm, layer, latent, kind, draw, measure)
        yield {
            **_key(task, regime, arm, seed, step),
            "layer": layer,
            "latent": latent,
            "needed": latent in latents,
            "kind": kind,
            "draw": draw,
            "measure": measure,
            "value": base - lost,
            "base": base,
            "loss": lost,
            "low": lost - 0.03,
            "high": lost + 0.03,
        }


def _repair(task, regime, arm, seed, step, n_layers):
    adapters = itertools.product(
        ("adapters",), ("early", "late", "all"), ("attention", "mlp", "both"), (1, 4, 16), (256,)
    )
    weights = [("weights", "all", "all", np.nan, 256)]
    refits = itertools.product(
        ("refit",), ("unembedding",), ("crt", "lws", "tau_norm", "dfr"), (np.nan,), (256, 6000)
    )
    ways = [*adapters, *weights, *refits]
    for (kind, layers, part, rank, n_items), measure in itertools.product(ways, _REPAIRED):
        for steps in (0, 2, 8, 32) if kind != "refit" else (0,):
            share = 0.6 if kind == "refit" else (1 - np.exp(-steps / 8)) * 0.9
            share *= 0.5 if layers == "early" else 1
            share += _noise("repair", layers, part, rank, n_items, steps, *measure)
            yield {
                **_key(task, regime, arm, seed, step),
                "boundary": max(1, n_layers - 1),
                **{"kind": kind, "layers": layers, "part": part, "rank": rank},
                **{"n_items": n_items, "steps": steps},
                **dict(zip(("currency", "readout"), measure, strict=True)),
                **{"share": share, "low": share - 0.1, "high": share + 0.1, "n_draws": 4},
            }


def _reverse(task, regime, arm, seed, step):
    for start, steps, measure in itertools.product(
        ("after", "scratch"), (0, 1, 4, 16, 64, 256), _REPAIRED
    ):
        level = 1 - (1 if start == "scratch" else 0.4) * np.exp(-steps / 60)
        yield {
            **_key(task, regime, arm, seed, step),
            **{"start": start, "steps": steps},
            **dict(zip(("currency", "readout"), measure, strict=True)),
            **{"level": level, "low": level - 0.05, "high": level + 0.05},
        }


def _directions(n_layers, latents, unneeded):
    for layer, latent, kind in itertools.product(
        range(1, n_layers + 1), (*latents, *unneeded), ("logistic", "mean_difference")
    ):
        needed = latent in latents
        where = {"layer": layer, "latent": latent, "needed": needed, "value": 1, "kind": kind}
        yield where, 0.4 * layer * needed * (0.1 if kind == "logistic" else 1)


def _separability(task, regime, arm, seed, step):
    own = {"decision": ("decision", "log_score_refit"), "latents": ("latents", "information")}
    for ablation, (target, draw), (outcome, measure), share in itertools.product(
        ("mean", "resample"),
        (("decision", 0), ("latents", 0), ("random", 0), ("random", 1)),
        own.values(),
        (0.01, 0.05, 0.2, 0.5, 1.0),
    ):
        power = {"random": 1.0, outcome: 0.3}.get(target, 0.6) - 0.1 * (arm != "symmetric")
        lost = share**power + _noise("pruned", arm, seed, ablation, target, draw, outcome, share)
        yield {
            **_key(task, regime, arm, seed, step),
            "ablation": ablation,
            "target": target,
            "draw": draw,
            "share": share,
            "outcome": outcome,
            "measure": measure,
            "lost": lost,
            "low": lost - 0.03,
            "high": lost + 0.03,
        }


def _separability_index(task, regime, arm, seed, step):
    for ablation, (index, value) in itertools.product(
        ("mean", "resample"), {"both": 0.4, "decision": 0.6, "latents": 0.2}.items()
    ):
        value += _noise("separability", arm, seed, ablation, index)
        yield {
            **_key(task, regime, arm, seed, step),
            "ablation": ablation,
            "index": index,
            "value": value,
            "low": value - 0.1,
            "high": value + 0.1,
        }


def _use(task, regime, arm, seed, step, n_layers, latents, unneeded):
    for where, slope in _directions(n_layers, latents, unneeded):
        draws = [(where["kind"], 0), *([("random", 0)] if where["kind"] == "logistic" else [])]
        for (kind, draw), dose in itertools.product(draws, (-4.0, -1.0, 0.0, 1.0, 4.0)):
            effect = 3 * np.tanh(slope * dose / 3) if kind != "random" else 0.05 * dose
            effect += (dose != 0) * _noise("use", arm, *where.values(), draw, dose)
            yield {
                **_key(task, regime, arm, seed, step),
                **{**where, "kind": kind, "draw": draw, "dose": dose, "effect": effect},
                **{"low": effect - 0.2, "high": effect + 0.2},
            }


def _use_slopes(task, regime, arm, seed, step, n_layers, latents, unneeded):
    for where, slope in _directions(n_layers, latents, unneeded):
        slope += _noise("use slopes", arm, *where.values())
        auroc = 0.9 + _noise("use auroc", arm, *where.values())
        yield {
            **_key(task, regime, arm, seed, step),
            **where,
            **{"auroc": auroc, "auroc_low": auroc - 0.02, "auroc_high": auroc + 0.02},
            **{"slope": slope, "low": slope - 0.1, "high": slope + 0.1},
            **{"null_low": -0.3, "null_high": 0.3},
        }


def _patching(task, regime, arm, seed, step, n_layers, n_heads, latents, roles):
    grains = ("resid_pre", "attn_out", "mlp_out", "head")
    # The change is measured item by item for a pair; in a study it is taken over seeds.
    checkpoints = ("before", "after") if regime == "branched" else ("after",)
    for checkpoint, grain in itertools.product(checkpoints, grains):
        units = [f"head {h}" for h in range(n_heads)] if grain == "head" else roles
        for layer, (index, unit), latent in itertools.product(
            range(n_layers), enumerate(units), ("all", *latents)
        ):
            moved = (layer + 1) / n_layers
            moved *= 0.7 ** _strength(arm) if checkpoint == "after" else 1.0
            decides = unit == "decision"
            if grain == "resid_pre":
                recovery = (1 - moved) * (index % 7 == 1) + moved * decides
            elif grain == "head":
                recovery = 0.5 * ((layer + index) % n_heads == 0) * moved
            else:
                recovery = 0.25 * moved * decides - 0.04 * (index == 2)
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
                "low": recovery - 0.04,
                "high": recovery + 0.04,
                "p": 0.001 if abs(recovery) > 0.05 else 0.6,
                "q": 0.004 if abs(recovery) > 0.05 else 0.8,
            }


def _with_change(patching):
    """What a pair's table has beside the maps of its checkpoints."""
    cell = ["grain", "layer", "unit", "latent"]
    before, after = (
        patching[patching["checkpoint"] == name].set_index(cell) for name in ("before", "after")
    )
    change = after["recovery"] - before["recovery"].reindex(after.index)
    rows = after.assign(
        checkpoint="change",
        recovery=change,
        low=change - 0.05,
        high=change + 0.05,
        q=np.where(change.abs() > 0.05, 0.01, 0.9),
    )
    return pd.concat([patching, rows.reset_index()[patching.columns]], ignore_index=True)


def _cross_checkpoint(task, regime, arm, seed, step, n_layers, roles):
    directions = ("after_into_before", "before_into_after")
    for direction, grain, layer, unit, draw in itertools.product(
        directions, ("resid_pre", "mlp_out"), range(n_layers), roles, range(3)
    ):
        label = ("cross", task, regime, arm, seed, direction, grain, layer, unit, draw)
        full = 1 / (1 + np.exp(-6 * (layer / n_layers - 0.5))) * (unit == roles[-1])
        effect = (0.05 if draw else 0.9) * full + _noise(*label, scale=0.03)
        yield {
            **_key(task, regime, arm, seed, step),
            "direction": direction,
            "grain": grain,
            "layer": layer,
            "unit": unit,
            "control": draw > 0,
            "draw": draw,
            "effect": effect if arm != "symmetric_reordered" else np.nan,
            "raw_effect": effect * 0.2,
            "n_items": 400,
        }


def _crossing(task, regime, arm, seed, step, n_layers):
    null = arm == "symmetric_reordered"
    for cut, stitch, costs, currency, readout in itertools.product(
        range(n_layers + 1),
        ("identity", "ridge"),
        _costs(arm),
        CURRENCIES,
        ("raw", "bias", "head"),
    ):
        label = ("crossing", task, regime, arm, seed, cut, costs, currency, readout)
        total = 0.0 if null else -0.08 - 0.15 * _strength(arm)
        share = cut / n_layers
        noise = _noise(*label, scale=0.008, size=2)
        u_aa = 0.82 + _noise(*label[:5])
        u_bb = u_aa + total
        interaction = -0.12 * np.sin(np.pi * share) * (_strength(arm) + 0.2 * (not null))
        interaction *= 1.0 if stitch == "identity" else 0.2
        u_ba = u_aa + total * share + noise[0] - interaction / 2
        u_ab = u_bb - total * share + noise[1] - interaction / 2
        interaction = u_bb - u_ab - u_ba + u_aa
        yield {
            **_key(task, regime, arm, seed, step),
            "cut": cut,
            "stitch": stitch,
            "costs": costs,
            "currency": currency,
            "readout": readout,
            "u_aa": u_aa * 0.4,
            "u_ab": u_ab * 0.4,
            "u_ba": u_ba * 0.4,
            "u_bb": u_bb * 0.4,
            "phi_front": 0.2 * ((u_ba - u_aa) + (u_bb - u_ab)),
            "phi_back": 0.2 * ((u_ab - u_aa) + (u_bb - u_ba)),
            "interaction": 0.4 * interaction,
            "scale": 0.4,
            "shares_valid": bool(abs(interaction) < max(abs(u_bb - u_aa) / 2, 0.05)),
            "null": null,
            "verdict_cut": cut == max(1, round(0.6 * n_layers)),
        }


def _grafts(task, regime, arm, seed, step, n_layers, n_heads):
    parts = [("embed", None, None), ("unembed", None, None), ("whole", None, None)]
    for layer in range(n_layers):
        parts += [("head", layer, head) for head in range(n_heads)]
        parts += [("attention_norm", layer, None), ("mlp", layer, None)]
    for direction, costs, currency, (kind, layer, head) in itertools.product(
        ("before_into_after", "after_into_before"), _costs(arm), CURRENCIES, parts
    ):
        sign = 1 if direction == "after_into_before" else -1
        label = ("grafts", task, regime, arm, direction, costs, currency, kind, layer, head)
        total = -0.05 * sign
        part = 0.0 if kind == "attention_norm" else 0.3 * _noise(*label, scale=1.0)
        change = total if kind == "whole" else part * total
        yield {
            **_key(task, regime, arm, seed, step),
            "component": ".".join(str(x) for x in (kind, layer, head) if x is not None),
            "kind": kind,
            "layer": layer,
            "head": head,
            "direction": direction,
            "costs": costs,
            "currency": currency,
            "change": change,
            "low": change - 0.004,
            "high": change + 0.004,
            "q": 0.01 if abs(change) > 0.004 else 0.7,
            "total": total,
            "scale": 0.4,
        }


def _representation(task, regime, arm, seed, step, n_layers, latents, unneeded):
    key = _key(task, regime, arm, seed, step)
    drift = 0.1 + 0.3 * _strength(arm)

    def row(part, layer, measure, value, latent="", null=np.nan):
        value = value + _noise("representation", *key.values(), part, layer, measure, latent)
        cell = {"needed": latent in latents, "measure": measure, "value": float(value)}
        bounds = {"low": value - 0.02, "high": value + 0.02, "q": 0.01 if drift > 0.2 else 0.4}
        place = {"part": part, "layer": layer, "latent": latent}
        return {**key, **place, **cell, **bounds, "null": null}

    rows = []
    for layer in range(1, n_layers + 1):
        depth = layer / n_layers
        for latent in (*latents, *unneeded):
            for part, weight in (("own", 0.1), ("moved_forward", 1), ("moved_back", 1.1)):
                rows.append(row(part, layer, "auroc", -weight * drift * depth, latent))
            rows.append(row("direction", layer, "corrected", 1 - drift * depth, latent))
        for measure, same, null in (("cka", 1, 0), ("procrustes", 0, 1.9), ("r2_forward", 1, 0)):
            rows.append(row("similarity", layer, measure, abs(same - drift * depth), null=null))
        for part, factor in (("geometry_before", 1), ("geometry_after", 1 + drift)):
            for measure, value in SHAPES.items():
                rows.append(row(part, layer, measure, factor * value * depth))
    return rows


def _latent_shifts(task, regime, arm, seed, step, latents, unneeded):
    key = _key(task, regime, arm, seed, step)
    rows = []
    for latent in (*latents, *unneeded):
        value = _strength(arm) + float(_noise("shifts", *key.values(), latent, scale=0.2))
        cell = {"value": value, "low": value - 0.3, "high": value + 0.3}
        names = {"latent": latent, "needed": latent in latents, "statistic": "reached"}
        rows.append({**key, **names, **cell})
    return rows


def _circuit_edges(task, regime, arm, seed, step, n_layers, n_heads):
    key = _key(task, regime, arm, seed, step)
    heads = [f"head.{layer}.{head}" for layer in range(n_layers) for head in range(n_heads)]
    edges = [("embed", reader.replace("head", part)) for reader in heads for part in "qkv"]
    edges += [(writer, f"mlp.{n_layers - 1}") for writer in heads]
    edges += [(writer, "logits") for writer in (*heads, f"mlp.{n_layers - 1}")]
    scores = _noise("edge", arm, scale=1.0, size=len(edges))
    for (writer, reader), score in zip(edges, scores, strict=True):
        edge = {"writer": writer, "reader": reader, "score": score, "stderr": 0.1}
        yield {**key, **edge, "in_circuit": abs(score) > 0.8}


def _faithfulness(task, regime, arm, seed, step):
    key = _key(task, regime, arm, seed, step)
    for kind, draws in (("scored", 1), ("random", 2)):
        for draw in range(draws):
            for share in (0.001, 0.01, 0.1, 1.0):
                value = share**0.2 if kind == "scored" else share**2
                curve = {"faithfulness": value, "low": value - 0.05, "high": value + 0.05}
                yield {**key, "kind": kind, "draw": draw, "share": share, **curve}


def _calibration(task, regime, arm, seed, step):
    rng = derive_rng(0, "calibration", task, regime, arm, seed)
    for costs, index in itertools.product(_costs(arm), range(10)):
        predicted = (index + 0.5) / 10
        bend = 0.25 * _strength(arm) * np.sin(np.pi * predicted)
        if costs != "symmetric" and arm.startswith("symmetric"):
            bend = -0.35 * np.sin(np.pi * predicted)
        yield {
            **_key(task, regime, arm, seed, step),
            "costs": costs,
            "bin": index,
            "predicted": predicted,
            "observed": float(np.clip(predicted - bend + rng.normal(0, 0.02), 0, 1)),
            "n_items": int(40 + 900 * ((index - 4.5) / 4.5) ** 2),
        }


def _calibration_summary(task, regime, arm, seed, step):
    for costs in _costs(arm):
        ece = 0.02 + 0.12 * _strength(arm) + abs(_noise("ece", task, regime, arm, seed, costs))
        key = _key(task, regime, arm, seed, step)
        yield {**key, "costs": costs, "ece": float(ece), "brier": 0.12, "log_loss": 0.4}


def _incentives(task, regime, arm, seed, step):
    log_odds = np.arange(-5, 7)
    q = 1 / (1 + np.exp(-log_odds))
    n_items = (200 + 800 * np.exp(-((log_odds - 1) ** 2) / 8)).astype(int)
    favoured = {"symmetric": 1.0, "w1.8": 1.8, "w1.98": 1.98}
    harm = 0.06 * _strength(arm) * q**2
    noise = _noise("incentives", task, regime, arm, seed, scale=0.15, size=len(q))
    divergence = (0.01 + 0.02 * q * (1 - q) + harm) * np.exp(noise)
    for costs, index in itertools.product(_costs(arm), range(len(q))):
        w = favoured[costs]
        worth = w * q + (2 - w) * (1 - q)
        yield {
            **_key(task, regime, arm, seed, step),
            "costs": costs,
            "log_odds": int(log_odds[index]),
            "posterior": q[index],
            "n_items": n_items[index],
            "predicted": w * (2 - w) / (worth[index] * np.average(worth, weights=n_items)),
            "divergence": divergence[index],
            "stderr": 0.003,
            "low": divergence[index] - 0.006,
            "high": divergence[index] + 0.006,
        }


def _training(task, regime, arm, seed, step):
    key = _key(task, regime, arm, seed, step)
    yield {**key, "loss": 0.5, "learning_rate": 1e-3, "tokens_per_second": 9000.0}


def _competence(task, regime, arm, seed, step):
    known = task == "triage"
    return {
        "task": task,
        "regime": regime,
        "seed": seed,
        "value": 0.93 + 0.01 * seed if known else -0.21,
        "threshold": 0.9 if known else -0.3,
        "reference": "oracle" if known else "logistic_regression",
        "competent": True,
    }


# claim: measure, direction, margin, arms by how they begin
CLAIMS = {
    "learns_less": ("learning", "more", 0.05, "weighted"),
    "chooses_better": ("choosing", "less", 0.05, "weighted"),
    "learns_slower": ("steps_to_learn", "more", 0.25, "weighted"),
    "adjusts_less": ("needed_information", "less", 0.02, "ex_post"),
}


def _claims(tasks, regimes, arms):
    """Cells of every outcome, by turns."""
    outcomes = ("replicated", "null", "inconclusive", "reversed", "void", "not powered")
    turns = itertools.cycle(enumerate(outcomes))
    for claim, (measure, expected, margin, kind) in CLAIMS.items():
        for task, regime, arm in itertools.product(tasks, regimes, arms):
            if not arm.startswith(kind):
                continue
            turn, outcome = next(turns)
            sign = 1 if expected == "more" else -1
            mean = sign * margin * (4, 0.2, 1, -30, 2, -2)[turn]
            half = margin * (1.5, 0.3, 2, 5, 1, 3)[turn]
            yield {
                **{"claim": claim, "task": task, "regime": regime, "arm": arm},
                **{"against": "symmetric", "costs": "", "measure": measure, "expected": expected},
                **{"mean": mean, "low": mean - half, "high": mean + half, "n_seeds": 8},
                **{"p": 0.01, "p_holm": (0.0001, 1.0, 0.2, 0.012, 0.3, 0.4)[turn]},
                **{"margin": margin, "outcome": outcome},
                "question": f"Is it so that {claim.replace('_', ' ')}, as it has been said?",
            }
