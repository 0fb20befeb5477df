"""What a verdict is put together from, and what verdict.json must look like."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import TypeAdapter, ValidationError
from scipy import stats

from analyses.crossing import valid_at
from analyses.ladder import LOSSES, Ladder
from analyses.patching import RecoveryMap, overlap_table
from mechinterp.compare import judge
from mechinterp.disagreements import disagreements
from mechinterp.errors import AnalysisError
from mechinterp.randomness import derive_rng
from mechinterp.verdict import Change, Components, CrossingShares, Side, Verdict, schema
from mechinterp.verdict_parts import crossing_shares, information_lost
from mechinterp.verdict_words import in_words, paragraphs
from probes.probe import ProbeResult

SCHEMA = Path(__file__).parents[1] / "docs" / "verdict.schema.json"
N = 3000
LEVELS = {"constant": -0.7, "raw": -0.45, "bias": -0.42, "head": -0.4, "depth": -0.38}
LEVELS |= {"latents": -0.36, "oracle": -0.3}


def ladder(**levels) -> Ladder:
    """Rungs at `levels`, the same in both currencies, with noise that all rungs share."""
    noise = torch.from_numpy(derive_rng(0, "ladder").normal(0, 0.3, N))
    own = torch.from_numpy(derive_rng(0, "own", *levels.items()).normal(0, 0.05, N))
    values = {
        rung: level + noise + own * (rung not in ("constant", "oracle"))
        for rung, level in (LEVELS | levels).items()
    }
    values = {"utility": values, "log_score": values}
    scale = LEVELS["oracle"] - LEVELS["constant"]
    return Ladder("symmetric", values, dict.fromkeys(values, scale), True, {})


def information(**lost) -> pd.DataFrame:
    """Bits per item about latents a (needed) and e (not), of which `after` has lost some."""
    rng = derive_rng(0, "information")
    rows = []
    for latent, needed in (("a", True), ("e", False)):
        before = rng.normal(0.5, 0.4, N)
        values = {"before": before, "after": before - lost.get(latent, 0) + rng.normal(0, 0.05, N)}
        for arm, value in values.items():
            cell = {"arm": arm, "latent": latent, "needed": needed, "information": value}
            rows.append(pd.DataFrame({**cell, "item": range(N), "group": range(N)}))
    return pd.concat(rows)


def crossing(**hybrids) -> pd.DataFrame:
    rng = derive_rng(0, "crossing")
    u = {"u_aa": 0.0, "u_ab": 0.0, "u_ba": 0.0, "u_bb": 0.0} | hybrids
    columns = {name: 0.4 * (value + rng.normal(0, 0.02, N)) for name, value in u.items()}
    cell = {"costs": "symmetric", "currency": "log_score", "readout": "raw", "cut": 2, "scale": 0.4}
    return pd.DataFrame({**cell, "item": range(N), "group": range(N), **columns})


def judged(after: Ladder, **tables) -> Verdict:
    pair = SimpleNamespace(costs={"symmetric": ((1, 0), (0, 1))}, items=Items(torch.arange(N)))
    ladders = {"before": {"symmetric": ladder()}, "after": {"symmetric": after}}
    return judge(pair, ladders, tables=tables)  # type: ignore[arg-type]


class Items:
    def __init__(self, groups):
        self.groups = groups

    def __len__(self):
        return len(self.groups)


LESS_LEARNT = {"raw": -0.55, "bias": -0.52, "head": -0.5, "depth": -0.48, "latents": -0.46}


def test_the_schema_is_in_step():
    assert json.loads(SCHEMA.read_text()) == schema(), (
        "python -m mechinterp.verdict > docs/verdict.schema.json"
    )


def test_verdict_json_is_what_the_schema_says():
    verdict = judged(
        ladder(**LESS_LEARNT),
        information_items=information(a=0.2, e=0.1),
        crossing_items=crossing(u_ba=-0.25, u_bb=-0.25),
    )
    text = json.dumps(verdict.to_json(), allow_nan=False)
    adapter = TypeAdapter(Verdict)
    assert adapter.validate_json(text, strict=True) == verdict
    for key, value in (("verdict", "learned"), ("n_items", "3000"), ("more", 1)):
        with pytest.raises(ValidationError, match=key):
            adapter.validate_json(json.dumps({**verdict.to_json(), key: value}), strict=True)


def test_a_verdict_has_every_rung_and_share():
    verdict = judged(
        ladder(**LESS_LEARNT),
        information_items=information(a=0.2, e=0.1),
        crossing_items=crossing(u_ba=-0.25, u_bb=-0.25),
    )
    assert (verdict.verdict, verdict.learning.state) == ("learning", "damaged")
    assert verdict.choosing.state == verdict.discarded.state == "intact"
    parts = verdict.components
    assert list(parts.rungs) == ["raw", "bias", "head", "depth", "latents", "oracle"]
    assert parts.rungs["depth"].delta == pytest.approx(-0.25, abs=0.02)
    assert parts.rungs["oracle"] == Change(0.0, (0.0, 0.0), 1.0)
    assert {*parts.losses, "learning", "choosing", "discarded"} == {*LOSSES}
    assert verdict.learning.delta == pytest.approx(
        parts.losses["not_encoded"].delta + parts.losses["not_combined"].delta
    )
    front = parts.crossing["raw"].phi_front
    assert front is not None
    assert front.delta == pytest.approx(-0.25, abs=0.01)
    assert verdict.forgetting["e"].state == "damaged"
    assert verdict.forgetting["e"].delta == pytest.approx(0.1, abs=0.01)
    assert "a" not in verdict.forgetting  # what the decision needs is no matter of forgetting
    assert verdict.disagreements == ()


def test_without_tables_the_verdict_is_the_ladders_alone():
    alone = judged(ladder(**LESS_LEARNT))
    assert (alone.verdict, alone.forgetting, alone.components.crossing) == ("learning", {}, {})


def test_a_verdict_stands_where_utility_has_nothing_to_lose_and_not_where_log_score_has_none():
    """At extreme costs the oracle may take one action throughout."""
    flat = {"scale": {"utility": 0.0, "log_score": 0.4}}
    before, after = (replace(ladder(**levels), **flat) for levels in ({}, LESS_LEARNT))
    ladders = {"before": {"w": before}, "after": {"w": after}}
    pair = SimpleNamespace(costs={"w": None}, items=Items(torch.arange(N)))
    assert judge(pair, ladders, costs="w").verdict == "learning"  # type: ignore[arg-type]
    nothing = replace(after, scale={"utility": 0.0, "log_score": 0.0})
    with pytest.raises(AnalysisError, match=r"costs 'w': no learning loss.*--costs"):
        judge(pair, {**ladders, "after": {"w": nothing}}, costs="w")  # type: ignore[arg-type]


def test_shares_are_judged_by_the_margin_that_was_asked_for():
    row = {"u_aa": 0.5, "u_ab": 0.4, "u_ba": 0.2, "u_bb": 0.1 + 0.03, "scale": 1.0}
    table = pd.DataFrame([row])
    assert list(valid_at(table, 0.05)["shares_valid"]) == [True]
    assert list(valid_at(table, 0.02)["shares_valid"]) == [False]


def test_shares_are_the_formulas_and_absent_where_they_mean_nothing():
    items = crossing(u_aa=0.8, u_ab=0.7, u_ba=0.5, u_bb=0.42)
    found = crossing_shares(items, costs="symmetric", margin=0.05)["raw"]
    u = {name: items[name] / 0.4 for name in ("u_aa", "u_ab", "u_ba", "u_bb")}
    by_item = 0.5 * ((u["u_ba"] - u["u_aa"]) + (u["u_bb"] - u["u_ab"]))
    low, high = stats.t.interval(0.95, N - 1, by_item.mean(), stats.sem(by_item))
    assert found.phi_front is not None
    assert found.phi_front.ci == pytest.approx((low, high))
    assert found.cut == 2
    large = crossing_shares(crossing(u_ab=-0.3, u_bb=-0.1), costs="symmetric", margin=0.05)["raw"]
    assert large.phi_front is large.phi_back is None
    assert large.interaction.delta == pytest.approx(0.2, abs=0.01)
    assert crossing_shares(items, costs="w1.8", margin=0.05) == {}


def test_information_lost_is_paired_by_item():
    table = information(a=0.2)
    shuffled = table.sample(frac=1, random_state=0)
    lost = information_lost(shuffled, reference="before", needed=True)
    assert lost == information_lost(table, reference="before", needed=True)
    by_arm = table[table["latent"] == "a"].set_index(["arm", "item"])["information"]
    difference = (by_arm["before"] - by_arm["after"]).to_numpy()
    assert lost["a"].delta == pytest.approx(difference.mean())
    assert lost["a"].p == pytest.approx(stats.ttest_1samp(difference, 0).pvalue)


def test_the_best_layer_is_chosen_on_other_folds():
    """Layer 0 is good on fold 0 and bad elsewhere, so only fold 0 must not be read there."""
    folds = torch.arange(6) % 3
    labels = torch.tensor([0, 1, 1, 0, 0, 1])
    chance = torch.tensor([0.5, 0.5]).log()
    log_p = torch.stack([chance.repeat(6, 1), torch.tensor([0.45, 0.55]).log().repeat(6, 1)])
    right = torch.nn.functional.one_hot(labels, 2).double()
    log_p = log_p.double()
    log_p[0, folds == 0] = (0.98 * right + 0.01)[folds == 0].log()
    log_p[1] = (0.2 * right + 0.4).log()
    result = ProbeResult(
        table=pd.DataFrame(),
        log_probabilities={"z": log_p},
        labels={"z": labels},
        values={"z": (0, 1)},
        layers=(1, 2),
        folds=folds,
    )
    gains = {layer: result.information("z", layer) for layer in (1, 2)}
    expected = torch.where(folds == 0, gains[2], gains[1])
    torch.testing.assert_close(result.best_information("z"), expected)


def side(state: str, delta=0.0, half=0.01) -> Side:
    return Side(delta, (delta - half, delta + half), 0.5, state)  # type: ignore[arg-type]


INTACT, WORSE, BETTER = side("intact"), side("damaged", 0.2), side("improved", -0.2)
UNCLEAR = side("inconclusive", 0.05, 0.1)


def told(verdict, learning=INTACT, choosing=INTACT, **evidence) -> tuple[str, ...]:
    sides = {"learning": learning, "choosing": choosing}
    components = Components(
        rungs={}, losses=evidence.pop("losses", {}), crossing=evidence.pop("crossing", {})
    )
    evidence = {"in_utility": sides, "needed_information": {}} | evidence
    return disagreements(verdict, sides, components, **evidence)


def test_evidence_that_agrees_or_cannot_tell_is_silent():
    assert told("none") == ()
    assert told("learning", WORSE, losses={"not_encoded": WORSE}) == ()
    lost = {"a": side("damaged", 0.3), "b": INTACT}
    assert told("learning", WORSE, losses={"not_encoded": WORSE}, needed_information=lost) == ()
    unclear = {"a": UNCLEAR}
    assert told("learning", WORSE, losses={"not_encoded": WORSE}, needed_information=unclear) == ()
    utility = {"learning": UNCLEAR, "choosing": INTACT}
    assert told("learning", WORSE, in_utility=utility) == ()


def test_utility_against_log_score():
    utility = {"learning": INTACT, "choosing": BETTER}
    (line,) = told("choosing", INTACT, WORSE, in_utility=utility)
    assert "Choosing is damaged in log score" in line
    assert "improved in utility (-20.0" in line
    (line,) = told("none", in_utility={"learning": WORSE, "choosing": INTACT})
    assert "Learning is intact in log score" in line


def test_probes_against_the_ladder():
    losses = {"not_encoded": WORSE}
    (line,) = told("learning", WORSE, losses=losses, needed_information={"a": INTACT, "b": BETTER})
    assert "no probe of such a latent lost more than 0.02 bits" in line
    (line,) = told("none", losses=losses)
    assert "Learning is intact, yet what probes read" in line
    assert told("learning", WORSE, losses={}, needed_information={"a": INTACT}) == ()


def test_parts_that_make_up_for_each_other():
    def shares(front, back):
        values = (front + back, front, back, 0.0)
        return {"raw": CrossingShares(2, *(Change(v, (v - 0.01, v + 0.01), 0.0) for v in values))}

    (line,) = told("none", choosing=BETTER, crossing=shares(-0.1, 0.4))
    assert "the layers before layer 2 cost value (-10.0" in line
    assert told("none", crossing=shares(-0.05, 0.05)) == ()
    assert told("none", crossing=shares(-0.1, 0.4), reference="control") == ()
    assert told("learning", WORSE, crossing=shares(-0.4, 0.1)) == ()


def test_circuits_that_changed_more_than_the_controls():
    def overlap(low):
        row = {"measure": "beyond_control", "value": 0.2, "low": low, "high": 0.3}
        return pd.DataFrame([{**row, "measure": "overlap", "low": 0.5}, row])

    (line,) = told("none", recovery_overlap=overlap(0.1), reference="control")
    assert "by 0.20 (0.10 to 0.30)" in line
    assert told("none", recovery_overlap=overlap(-0.1)) == ()
    assert told("none", recovery_overlap=overlap(0.1).iloc[:1]) == ()
    assert told("learning", WORSE, recovery_overlap=overlap(0.1)) == ()


def recovery_map(cells, *, noise=0.05, n=60, seed=0) -> dict[tuple[str, str], RecoveryMap]:
    rng = derive_rng(seed, "map")
    cells = np.asarray(cells, float)
    values = cells + rng.normal(0, noise, (n, *cells.shape))
    one = RecoveryMap(
        "head", "all", "suffix", np.arange(len(cells)), np.array(["x", "y"]),
        torch.arange(n) // 2, torch.from_numpy(values),
    )  # fmt: skip
    return {("head", "all"): one, ("head", "a"): recovery_other(one)}


def recovery_other(one: RecoveryMap) -> RecoveryMap:
    return RecoveryMap(**{**vars(one), "latent": "a", "contributions": 0 * one.contributions})


def test_overlap_is_the_weighted_jaccard_index_of_all_cells():
    before = recovery_map([[1.0, 0.1], [0.5, 0.0]])
    moved = recovery_map([[0.2, 0.9], [0.5, 0.0]], seed=1)
    control = recovery_map([[1.0, 0.1], [0.45, 0.0]], seed=2)
    table = overlap_table({"before": before, "after": moved, "control": control})
    found = table.set_index(["arm", "measure"])
    a, b = (m["head", "all"].contributions.mean(0).abs() for m in (before, moved))
    expected = float(torch.minimum(a, b).sum() / torch.maximum(a, b).sum())
    assert found.loc[("after", "overlap"), "value"] == pytest.approx(expected)
    assert 0.3 < expected < 0.5
    beyond = found.loc[("after", "beyond_control")]
    assert beyond["value"] == pytest.approx(found.loc[("control", "overlap"), "value"] - expected)
    assert beyond["low"] > 0.3
    same = overlap_table({"before": before, "after": before, "control": before})
    assert same["value"].tolist() == [1.0, 1.0, 0.0]
    # Pairs without such a unit say nothing about it.
    before["head", "all"].contributions[::2, 0, 0] = torch.nan
    holes = overlap_table({"before": before, "after": before})
    assert holes["value"].tolist() == [1.0]


def test_the_words_tell_what_was_lost_beside_the_verdict():
    verdict = judged(ladder(), information_items=information(e=0.1))
    text = in_words(verdict)
    assert text.startswith("Neither learning nor choosing was damaged.")
    assert "Forgotten, which is no damage" in text
    assert "e (0.10 bits, 0.10 to 0.10)" in text
    assert "No more is discarded" in text
    assert len(paragraphs(verdict)) == 1
    kept = judged(ladder(), information_items=information())
    assert "No latent that the decision does not need was forgotten." in in_words(kept)
    gone = judged(ladder(depth=-0.2, latents=-0.36))
    assert gone.discarded.state == "damaged"
    assert "More is discarded" in in_words(gone)


def test_disagreements_are_a_paragraph_of_their_own():
    verdict = judged(
        ladder(head=-0.5, bias=-0.52, raw=-0.55, depth=-0.48, latents=-0.46),
        information_items=information(),
    )
    (_, second) = paragraphs(verdict)
    assert second["heading"] == "Evidence that disagrees"
    assert "no probe of such a latent lost" in second["text"]
    assert second["text"] in in_words(verdict)
