"""A study's verdicts on tables whose truth is known, against plain sums and scipy."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mechinterp.arm_verdicts import COLUMNS, arm_verdicts
from mechinterp.randomness import derive_rng

SEEDS = 8
STEPS = (0, 10, 100)
# learning, choosing and discarded of each arm where it ends, at the costs named
ENDS = {
    ("symmetric", "symmetric"): (0.10, 0.02, 0.0),
    ("symmetric", "w1.98"): (0.10, 9.00, 0.0),
    ("ex_post_1.98", "w1.98"): (0.10, 0.02, 0.0),
    ("weighted_1.98", "symmetric"): (0.30, 2.00, 0.0),
    ("weighted_1.98", "w1.98"): (0.30, 0.02, 0.0),
    ("focal", "symmetric"): (0.10, 0.02, 0.3),
}


def losses(items: float, spread: float = 0.004) -> pd.DataFrame:
    """Every arm falls from 1 at step 0 to its end; `items` only marks which table it is."""
    rows = []
    cells = itertools.product(ENDS.items(), range(SEEDS), STEPS)
    for ((arm, costs), levels), seed, step in cells:
        rng = derive_rng(0, arm, costs, seed, step, items)
        for loss, level in zip(("learning", "choosing", "discarded"), levels, strict=True):
            at = 1.0 if step == 0 else level + 0.5 * (step == 10)
            value = at + rng.normal(0, spread)
            name = "before" if step == 0 else arm
            if step == 0 and arm != "symmetric":
                continue
            run = {"task": "t", "regime": "branched", "arm": name, "seed": seed, "step": step}
            for currency, factor in (("log_score", 1), ("utility", -1)):
                cell = {"costs": costs, "currency": currency, "loss": loss}
                rows.append({**run, **cell, "value": factor * value})
    return pd.DataFrame(rows)


def tables(**options) -> dict[str, pd.DataFrame]:
    whole = losses(1, **options)
    full = losses(2, **options)
    probes = [
        {
            **{"task": "t", "regime": "branched", "arm": arm if step else "before", "seed": seed},
            **{"step": step, "kind": "latent", "measure": "information", "layer": layer},
            **{"latent": latent, "needed": latent == "a"},
            "value": bits / layer + 0.0001 * seed,
        }
        for arm, bits in (("symmetric", 0.5), ("weighted_1.98", 0.4), ("focal", 0.5))
        for seed, step, layer, latent in itertools.product(range(SEEDS), STEPS, (1, 2), "aef")
        if step or arm == "symmetric"
    ]
    return {
        "losses": whole,
        "losses_in_full": full[full["step"].isin([0, 100])],
        "probes": pd.DataFrame(probes),
        "competence": pd.DataFrame({"task": ["t"] * SEEDS, "competent": True}),
    }


def judged(source=None, **options):
    return arm_verdicts(source or tables(), **{"margin": 0.05, "seeds_for_claims": 8, **options})


def holm_by_loop(p):
    """The step-down procedure: the smallest of n times n, the next times n - 1, never falling."""
    adjusted, worst = [0.0] * len(p), 0.0
    for rank, index in enumerate(sorted(range(len(p)), key=lambda i: p[i])):
        worst = max(worst, min(1.0, (len(p) - rank) * p[index]))
        adjusted[index] = worst
    return adjusted


def pick(table, **values):
    for column, value in values.items():
        table = table[table[column] == value]
    return table


def test_words_by_costs_reference_and_step():
    table = judged()
    assert list(table.columns) == COLUMNS
    at_end = pick(table, step=100, side="learning")
    words = at_end.set_index(["arm", "costs", "reference"])["verdict"].to_dict()
    assert words["weighted_1.98", "w1.98", "ex_post"] == "learning"
    assert words["weighted_1.98", "w1.98", "control"] == "learning"
    assert words["weighted_1.98", "symmetric", "control"] == "both"
    assert words["focal", "symmetric", "control"] == "none"  # what it discards is another state
    assert words["symmetric", "symmetric", "before"] == "none"
    assert ("symmetric", "symmetric", "control") not in words
    assert ("ex_post_1.98", "w1.98", "ex_post") not in words
    (discarded,) = pick(table, arm="focal", step=100, reference="control", side="discarded")[
        "state"
    ]
    assert discarded == "damaged"
    on_the_way = pick(table, step=10, side="learning", arm="weighted_1.98", reference="ex_post")
    assert on_the_way["verdict"].tolist() == ["learning"]
    assert not (table["step"] == 0).any()


def test_forgetting_is_the_best_layers_mean_over_unneeded_latents_at_no_costs():
    lost = pick(judged(), side="forgetting", step=100, reference="control")
    by_arm = lost.set_index("arm")
    assert set(by_arm["costs"]) == {""}
    assert by_arm.loc["weighted_1.98", "delta"] == pytest.approx(0.1)
    assert by_arm.loc["weighted_1.98", "state"] == "damaged"
    assert by_arm.loc["focal", "state"] == "intact"
    assert set(by_arm["verdict"]) == {""}
    assert set(by_arm["margin"]) == {0.02}


def changes(source, name, step, arm, costs, loss):
    values = pick(source[name], step=step, costs=costs, currency="log_score", loss=loss)
    own, control = (
        pick(values, arm=each).sort_values("seed")["value"].to_numpy()
        for each in (arm, "symmetric")
    )
    return own - control


def test_ends_are_those_in_full_and_steps_on_the_way_are_not():
    source = tables()
    table = judged(source)
    for step, name in ((10, "losses"), (100, "losses_in_full")):
        row = pick(table, step=step, arm="focal", reference="control", side="learning")
        low, high = stats.ttest_1samp(
            changes(source, name, step, "focal", "symmetric", "learning"), 0
        ).confidence_interval(0.95)
        assert row[["low", "high"]].to_numpy()[0] == pytest.approx((low, high))


def test_p_values_are_one_sided_t_tests_at_the_margin():
    source = tables()
    table = judged(source)
    for side, nearer in (("learning", "greater"), ("choosing", "less")):
        change = changes(source, "losses_in_full", 100, "weighted_1.98", "w1.98", side)
        row = pick(table, step=100, arm="weighted_1.98", costs="w1.98", reference="control")
        row = pick(row, side=side)
        at = 0.05 if nearer == "greater" else -0.05
        p = 2 * stats.ttest_1samp(change, at, alternative=nearer).pvalue
        assert row["p"].item() == pytest.approx(p)
        assert row["p_intact"].item() == pytest.approx(1 - p / 2)
    change = changes(source, "losses_in_full", 100, "focal", "symmetric", "learning")
    row = pick(table, step=100, arm="focal", reference="control", side="learning")
    bounds = (("less", 0.05), ("greater", -0.05))
    p = max(stats.ttest_1samp(change, at, alternative=side).pvalue for side, at in bounds)
    assert row["p_intact"].item() == pytest.approx(p)
    assert row["p"].item() == 1.0


def test_each_family_is_adjusted_by_itself():
    table = judged(tables(spread=0.08))
    kinds = table["side"].replace({"learning": "word", "choosing": "word"})
    for _, family in table.groupby(["reference", kinds, table["step"] == 100]):
        for p in ("p", "p_intact"):
            adjusted = holm_by_loop(family[p].to_numpy())
            np.testing.assert_allclose(family[f"{p}_holm"], adjusted)
    claimed = table[table["state"].isin(["damaged", "improved"])]
    assert (claimed["p_holm"] < 0.05).all()
    assert (table.loc[table["state"] == "intact", "p_intact_holm"] < 0.05).all()
    # Somewhere the interval alone would have claimed what the family does not allow.
    alone = (table["p"] < 0.05) & (table["state"] == "inconclusive")
    assert alone.any()


def test_few_seeds_and_void_tasks_claim_nothing():
    few = judged(seeds_for_claims=9)
    assert set(few["state"]) == {"not powered"}
    assert set(few["verdict"]) == {"not powered", ""}
    source = tables()
    source["competence"].loc[3, "competent"] = False
    void = judged(source)
    assert set(void["state"]) == {"void"}
    assert set(void["verdict"]) == {"void", ""}
    assert void["p_holm"].isna().all()


def test_tasks_that_need_all_latents_forget_none():
    source = tables()
    source["probes"] = source["probes"].assign(needed=True)
    assert "forgetting" not in set(judged(source)["side"])
