"""Rates against hand-counted pairs, the validation spec, and a small run from end to end."""

from __future__ import annotations

import shutil

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import beta

from mechinterp import validity
from mechinterp.cli import main
from mechinterp.errors import SpecError
from mechinterp.files import read_table
from mechinterp.statistics import proportion_interval
from mechinterp.validation import ValidationSpec, load_validation, make_validation_plan

SPEC = {
    "name": "small",
    "seeds": 1,
    "items": 600,
    "competence": 0.01,
    "further_steps": 8,
    "networks": {
        "tiny": {
            "task": "triage",
            "settings": {"linear": [2.0], "xor": [], "n_unneeded": 1, "n_fillers": 0},
            "model": {"n_layers": 2, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 16},
            "n_steps": 120,
        }
    },
    "development": {"shift": ["shift=3"], "basis": ["basis"]},
    "held_out": {"erase": ["erase=1"], "reseed": ["reseed"], "reorder": ["reorder"]},
}


def pair(side: str, verdict: str, cost: float = 0.3, **more) -> dict:
    return {
        "half": "held_out",
        "kind": side,
        "network": "n",
        "seed": 0,
        "side": side,
        "verdict": verdict,
        "cost_utility": cost,
        "cost_utility_choosing": cost / 2,
        "competent": True,
        "discarded_state": "intact",
        **more,
    }


def tables(*pairs: dict) -> dict[str, pd.DataFrame]:
    return validity.validity_tables(pd.DataFrame(pairs), ValidationSpec.model_validate(SPEC))


def rate(found, of: str, name: str) -> tuple[int, int]:
    rates = found["rates"]
    row = rates[(rates["group"] == "all") & (rates["of"] == of) & (rates["rate"] == name)]
    return int(row["n"].item()), int(row["of_n"].item())


def test_rates_count_what_they_say():
    found = tables(
        pair("choosing", "choosing"),
        pair("choosing", "learning"),
        pair("choosing", "none"),
        pair("choosing", "none", cost=0.05),  # too small to be judged
        pair("learning", "choosing", competent=False),  # was no sound network
        pair("learning", "both"),
        pair("both", "learning"),
        pair("both", "learning", cost_utility_choosing=0.05),  # choosing too little damaged
        pair("discarded", "none", discarded_state="damaged"),
        pair("discarded", "none"),
        pair("none", "none", cost=0.0),
        pair("none", "inconclusive", cost=0.0),
        pair("none", "learning", cost=0.0),
    )
    outcomes = found["pairs"]["outcome"].tolist()
    assert outcomes == [
        *("right", "opposite", "missed", "missed", "opposite", "other", "other", "other"),
        *("right", "missed", "right", "inconclusive", "alarm"),
    ]
    assert rate(found, "damaged", "right") == (2, 7)
    assert rate(found, "damaged", "opposite") == (1, 7)
    assert rate(found, "undamaged", "right") == rate(found, "undamaged", "alarm") == (1, 3)
    confusion = found["confusion"].set_index(["side", "verdict"])["n"]
    assert confusion["choosing", "learning"] == 1
    assert confusion.sum() == 10
    small = found["sensitivity"].query(
        "kind == 'choosing' and low_cost == 0.05 and rate == 'right'"
    )
    assert (small["n"].item(), small["of_n"].item()) == (0, 1)
    text = validity.rates_text(found["rates"])
    assert "| held out | damaged | right | 2 of 7 | 28.6% | 3.7% to 71.0% |" in text
    assert "| choosing | 1 | 1 |  | 1 |  |" in validity.confusion_text(found["confusion"])


def test_doses_that_leave_a_network_the_same_are_one_pair():
    found = tables(
        pair("discarded", "none", dose="discard=0.5"),
        pair("discarded", "none", dose="discard=1"),
        pair("discarded", "none", dose="discard=1", seed=1),
        pair("discarded", "none", dose="discard=0.2", cost_log_score=0.1),
    )
    assert found["pairs"]["dose"].tolist() == ["discard=0.5", "discard=1", "discard=0.2"]
    assert rate(found, "damaged", "right") == (0, 3)


def test_exact_intervals_are_clopper_and_pearsons():
    for k, n in ((0, 10), (3, 17), (149, 150), (10, 10)):
        low = beta.ppf(0.025, k, n - k + 1) if k else 0.0
        high = beta.ppf(0.975, k + 1, n - k) if k < n else 1.0
        assert np.allclose(proportion_interval(k, n), (low, high))
    assert proportion_interval(0, 0) == (0.0, 1.0)


def write(tmp_path, **changes):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SPEC, **changes}))
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"held_out": {"odd": ["bad=1"]}}, "held_out.odd: lesion 'bad': not known; known: shift"),
        ({"held_out": {"odd": ["shift=x"]}}, "held_out.odd: .*expected KIND=DOSE"),
        ({"only": ["other"]}, "only: no 'other'; there are: tiny"),
        ({"seeds": 0}, "seeds: .*greater than or equal to 1"),
        ({"nets": {}}, "nets: unknown key"),
    ],
)
def test_a_bad_spec_is_one_line(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message):
        load_validation(write(tmp_path, **changes))


def test_the_committed_spec_is_large_enough():
    """What the issue of the verdict asks for: at least 150 held-out pairs, kinds never shared."""
    spec = load_validation("studies/validation.yaml")
    plan = make_validation_plan(spec)
    held_out = [step for step in plan.pairs if step.labels["half"] == "held_out"]
    assert sum(step.labels["side"] != "none" for step in held_out) > 150
    alone = [
        {name for _, kind, dose in spec.kinds() if _ == half for name in [dose.partition("=")[0]]}
        for half in ("development", "held_out")
    ]
    assert not alone[0] & alone[1]


def test_from_spec_to_page(tmp_path, capsys):
    spec, out, page = write(tmp_path), tmp_path / "out", tmp_path / "page.md"
    page.write_text(
        "<!-- validity: rates -->\n<!-- end -->\n<!-- validity: kinds -->\n<!-- end -->\n"
    )
    arguments = ["validate", str(spec), "--out", str(out), "--workers", "2", "--page", str(page)]
    for _ in range(2):  # the second time nothing is left to do
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        shutil.rmtree(out / "steps" / "nothing", ignore_errors=True)
    printed = capsys.readouterr()
    assert printed.err.count("steps to do") == 1
    pairs = read_table(out / "tables" / "pairs.parquet").set_index("kind")
    assert pairs.loc["shift", "verdict"] == "choosing"
    assert pairs.loc["basis", "verdict"] == "none"
    assert pairs.loc["erase", "learning"] > 0.5
    assert abs(pairs.loc["basis", "cost_log_score"]) < 1e-3
    # What the network's own decision loses on other items is what the ladder finds by parts.
    for kind in ("shift", "erase"):
        parts = pairs.loc[kind, ["learning", "choosing", "discarded"]].sum()
        assert abs(parts - pairs.loc[kind, "cost_log_score"]) < 0.1
    assert "| development | damaged | right |" in page.read_text()
    assert (out / "figures" / "validity.png").is_file()
