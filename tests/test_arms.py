"""The arms of a study: what each is trained on, and that a study with all of them runs through."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch
import yaml
from tiny_study import SPEC

from mechinterp import objectives, tasks
from mechinterp.arms import CONTROL, REORDERED, TUNING_FACTORS, trained_arms
from mechinterp.cli import main
from mechinterp.errors import SpecError
from mechinterp.files import read_json, read_table
from mechinterp.spec import load_study
from mechinterp.study import run_study
from mechinterp.study_plan import make_plan
from mechinterp.training import sampling

KINDS = (
    "weighted",
    "weighted_tuned",
    "logit_adjusted",
    "resampled",
    "subsampled",
    "smoothed_regret",
    "focal",
    "hard_batch",
    "hard_data",
)
REFITS = ("crt", "lws", "tau_norm", "dfr")
WEIGHTS = {"1.8": (0.2, 1.8), "1.98": (0.02, 1.98)}


@pytest.mark.parametrize("regime", ["branched", "from_init"])
def test_every_arm_can_be_trained(regime):
    arms = trained_arms(KINDS, WEIGHTS, regime=regime, task=tasks.get("triage"))
    assert next(iter(arms)) == CONTROL
    assert (REORDERED in arms) == ("hard_data" in arms) == (regime == "branched")
    assert len(arms) == 1 + 6 * len(WEIGHTS) + 2 + 2 * (regime == "branched")
    for arm in arms.values():
        objectives.get(**arm.objective)
        if arm.sampling is not None:
            sampling.get(**arm.sampling)


def test_subsampled_has_the_effective_size_of_weighting():
    arm = trained_arms(["subsampled"], WEIGHTS, regime="from_init", task=tasks.get("triage"))[
        "subsampled_1.98"
    ]
    assert arm.sampling is not None
    assert arm.sampling["share"] == pytest.approx(1 / 1.9604, abs=0.01)  # labels are balanced
    assert arm.adjusted


def spec_with(tmp_path, **changes):
    task = {**SPEC["tasks"]["triage"], **changes.pop("task", {})}
    path = tmp_path / "arms.yaml"
    path.write_text(yaml.safe_dump({**SPEC, "tasks": {"triage": task}, **changes}))
    return path


def test_a_task_may_choose_its_arms_and_weights(tmp_path):
    weights = {name: list(values) for name, values in WEIGHTS.items()}
    path = spec_with(
        tmp_path,
        weights=weights,
        arms=["weighted", "focal"],
        task={"arms": ["resampled"], "weights": ["1.98"]},
    )
    plan = make_plan(load_study(path))
    assert {arm for _, _, arm, _ in plan.runs} == {CONTROL, REORDERED, "resampled_1.98"}
    with pytest.raises(SpecError, match=r"tasks.triage.weights: no weights '1.9'"):
        load_study(spec_with(tmp_path, task={"weights": ["1.9"]}))


def test_gradients_are_compared_at_equal_decisions(tmp_path):
    """At the control's checkpoints an objective that serves costs sees logits shifted to them."""
    path = spec_with(tmp_path, seeds=1, regimes=["branched"], arms=["weighted", "focal"])
    plan = make_plan(load_study(path))
    steps = [step for step in plan.measures if step.kind == "gradients"]
    control = next(s for s in steps if s.labels["arm"] == CONTROL).inputs["objectives"]
    assert set(control) == {CONTROL, "weighted_1.8", "focal"}
    assert control[CONTROL]["shift"] is control["focal"]["shift"] is None
    shift = control["weighted_1.8"]["shift"]
    assert shift[1] - shift[0] == pytest.approx(math.log(1.8 / 0.2))
    own = next(s for s in steps if s.labels["arm"] == "weighted_1.8").inputs["objectives"]
    assert own["weighted_1.8"]["shift"] is None
    assert {s.labels["arm"] for s in steps} == {CONTROL, "weighted_1.8"}


def test_a_shifted_objective_is_that_of_shifted_logits():
    objective = objectives.get("utility_weighted", utility=[[0.2, 0.0], [0.0, 1.8]])
    logits, labels = torch.tensor([[0.3, -0.2], [1.0, 2.0]]), torch.tensor([0, 1])
    shifted = objectives.Shifted(objective, [-1.0, 1.0])(logits, labels)
    torch.testing.assert_close(shifted, objective(logits + torch.tensor([-1.0, 1.0]), labels))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("arms")
    claim = {
        "question": "Does it learn less?",
        "measure": "learning",
        "arms": ["weighted", "crt"],
        "against": "symmetric",
        "expected": "more",
    }
    path = spec_with(
        directory,
        seeds=1,
        regimes=["branched"],
        arms=list(KINDS),
        refits=list(REFITS),
        claims={"learns_less": claim},
    )
    out = directory / "out"
    run_study(path, out=out, n_workers=2)
    return out


@pytest.mark.slow
def test_a_study_of_every_arm_runs_through(finished):
    contrasts = read_table(finished / "tables" / "contrasts.parquet")
    serving = {f"{kind}_1.8" for kind in (*KINDS[:6], *REFITS)}
    expected = {*serving, "ex_post_1.8", "focal", "hard_batch", "hard_data", REORDERED}
    assert set(contrasts.query("reference == 'control'")["arm"]) == expected
    assert set(contrasts.query("reference == 'ex_post'")["arm"]) == serving
    own = contrasts[contrasts["arm"].isin(serving)]
    assert set(own["costs"]) == {"w1.8", "symmetric"}


@pytest.mark.slow
def test_a_refit_of_the_last_layer_learns_nothing_new(finished):
    losses = read_table(finished / "tables" / "losses_in_full.parquet")
    learning = losses.query("loss == 'not_encoded' and currency == 'log_score' and step == 8")
    by_arm = learning.query("costs == 'w1.8'").set_index("arm")["value"]
    for refit in REFITS:  # estimated on few items, each rung from where the one below stands
        assert by_arm[f"{refit}_1.8"] == pytest.approx(by_arm[CONTROL], abs=0.04)


@pytest.mark.slow
def test_tuning_keeps_the_best_rate(finished):
    run = next((finished / "checkpoints/triage/branched/weighted_tuned_1.8").iterdir())
    rate = read_json(run / "run.json")["training"]["learning_rate"]
    default = 3e-3
    assert min(abs(rate / default - factor) for factor in TUNING_FACTORS) < 1e-9
    assert len(list(run.resolve().parent.glob("rate-*"))) == len(TUNING_FACTORS) - 1


@pytest.mark.slow
def test_claims_and_what_is_kept_of_a_study(finished, tmp_path, capsys):
    claims = read_table(finished / "tables" / "claims.parquet")
    assert set(claims["arm"]) == {"weighted_1.8", "crt_1.8"}
    assert set(claims["outcome"]) <= {"void", "not powered"}
    arguments = ["claims", finished.parent / "arms.yaml", finished / "tables", "--keep", tmp_path]
    with pytest.raises(SystemExit, match="0"):
        main([str(argument) for argument in arguments])
    assert "| `learns_less` | Does it learn less? | 2 |" in capsys.readouterr().out
    kept = read_table(tmp_path / "claims.parquet")
    pd.testing.assert_frame_equal(kept, claims, rtol=1e-5, atol=1e-6, check_dtype=False)
