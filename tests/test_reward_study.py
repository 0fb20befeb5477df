"""Studies of training by reward: their files, the plans made of them, and the pools."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from written_tasks import Copying

from mechinterp import tasks
from mechinterp.arm_names import CONTROL, REORDERED
from mechinterp.checkpoints import open_checkpoint, save_checkpoint
from mechinterp.errors import CheckpointError, SpecError, TrainingError
from mechinterp.files import value_hash
from mechinterp.plans import load_plan
from mechinterp.pools import candidate_problems, choose_pool
from mechinterp.reward_spec import Pool, load_reward_study
from mechinterp.reward_steps import run_reward, run_warm_up
from mechinterp.steps import checkpoint_path
from mechinterp.study import run_study
from mechinterp.study_plan import Plan
from mechinterp.tasks.splits import in_split
from mechinterp.tasks.sums import group_of
from mechinterp.training.config import ModelConfig
from mechinterp.training.organism import initial_model

STUDIES = Path(__file__).parents[1] / "studies"
SMALL = {
    "kind": "reward",
    "name": "small",
    "seeds": 2,
    "task": "arithmetic",
    "settings": {"max_terms": 4, "shortcut_total": 12},
    "model": {"n_layers": 1, "d_model": 16, "n_heads": 2, "n_kv_heads": 2, "d_mlp": 16},
    "warm_up": {
        "levels": [1],
        "settings": {"slips": 0.2},
        "training": {"n_steps": 10, "batch_size": 16},
    },
    "candidates": {"n": 40, "planted": 0.5, "screening": 4, "samples": 8},
    "pools": {"all": {"size": 16}, "none": {"size": 8, "solvable": False}},
    "arms": {"pooled": {"pool": "all"}, "no_reward": {"pool": "none"}, "mixed": {}},
    "advantages": ["standardised", "centred"],
    "training": {"n_samples": 4, "optimizer": {"n_steps": 8, "batch_size": 4}},
    "n_checkpoints": 2,
    "abilities": {"prior": {"levels": [1]}, "planted": {"levels": [3], "planted": 1.0}},
    "problems": 8,
    "samples": 2,
    "tasks": {
        "step": {
            "task": "arithmetic",
            "settings": {"max_terms": 5, "n_terms": 5, "decision": "step"},
            "analysis": {
                "ladder_items": 1000,
                "trajectory_items": 900,
                "probe_items": 900,
                "probe_folds": 3,
                "description_length": False,
                "patch_pairs": 8,
                "patch_grains": ["resid_pre"],
                "circuit_steps": 1,
                "crossing_items": 900,
                "stitch_items": 0,
            },
        }
    },
    "texts": ["step"],
    "claims": {
        "works": {"question": "Does it?", "measure": "change_pass_1", "arms": ["mixed"]}
        | {"expected": "more"}
    },
}


def write(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({**SMALL, **changes}, sort_keys=False))
    return path


def of_kind(plan: Plan, kind: str):
    return [step for step in plan.steps if step.kind == kind]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "triage"}, "task: .*'triage' has no written answers"),
        ({"arms": {"x": {"pool": "wet"}}}, "arms.x.pool: no pool 'wet'; the study has: all, none"),
        ({"candidates": None}, "candidates: missing; pools are made of them"),
        ({"training": {"n_sample": 4}}, "arms.pooled: training: unknown key 'n_sample'"),
        ({"arms": {"x": {"training": {"optimizer": {"lr": 1}}}}}, "arms.x: optimizer: unknown key"),
        ({"advantages": ["median"]}, "advantage must be one of"),
        ({"training": {"optimizer": {"n_steps": 2}}}, "training.optimizer.n_steps: .* at least 8"),
        ({"training": {"advantage": "centred"}}, "training.advantage: .*name it there"),
        (
            {"training": {"optimizer": {"n_steps": 8, "checkpoint_steps": [4]}}},
            "training.optimizer.checkpoint_steps: follow from n_checkpoints",
        ),
        (
            {"arms": {"x": {"training": {"optimizer": {"n_steps": 4}}}}},
            "arms.x.training.optimizer.n_steps: arms are compared at equal steps",
        ),
        (
            {"arms": {"x": {"supervised": True, "training": {"optimizer": {"batch_size": 2}}}}},
            "arms.x.training: a supervised arm learns",
        ),
        (
            {"arms": {"x": {"supervised": True, "pool": "all"}}},
            "arms.x.pool: a supervised arm learns",
        ),
        ({"arms": {CONTROL: {}}}, "arms.symmetric: the study itself gives such names"),
        ({"arms": {"x_centred": {}}}, "arms.x_centred: the study itself gives such names"),
        ({"texts": ["chess"]}, "texts: no task 'chess'; the study has: step"),
        ({"tasks": {"step": {"task": "arithmetic", "settings": {"max_terms": 3}}}}, "max_terms to"),
        ({"abilities": {"x": {"settings": {"max_terms": 99}}}}, "abilities.x.settings: arithmetic"),
        ({"start": "nowhere"}, "start: nowhere.*; SmolLM2 is made by: mechinterp fetch-smollm2"),
        ({"adapters": {"rank": 2}}, "adapters: need a start to adapt"),
        ({"only": ["chess"]}, "only: no 'chess'; there are: pooled, no_reward, mixed"),
        ({"claims": {"c": {**SMALL["claims"]["works"], "measure": "joy"}}}, "no measure of that"),
    ],
)
def test_a_bad_file_is_one_line_with_the_field(tmp_path, changes, message):
    with pytest.raises(SpecError, match=message) as caught:
        load_reward_study(write(tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_arms_are_trained_once_for_each_advantage(tmp_path):
    plan = load_plan(write(tmp_path))
    arms = {arm for _, regime, arm, _ in plan.runs if regime == "branched"}
    rewarded = {
        f"{arm}_{advantage}" for arm in SMALL["arms"] for advantage in ("standardised", "centred")
    }
    assert arms == {CONTROL, REORDERED, *rewarded}
    assert len(of_kind(plan, "reward")) == 2 * len(rewarded)
    for step in of_kind(plan, "reward"):
        assert step.inputs["training"]["advantage"] == step.labels["arm"].rsplit("_", 1)[1]
        assert step.inputs["training"]["optimizer"]["checkpoint_steps"] == [0, 1, 8]


def test_one_advantage_leaves_the_names_of_arms_alone(tmp_path):
    plan = load_plan(write(tmp_path, advantages=["centred"]))
    arms = {arm for _, regime, arm, _ in plan.runs if regime == "branched"}
    assert arms == {CONTROL, REORDERED, *SMALL["arms"]}


def test_every_arm_branches_from_the_start_of_its_seed(tmp_path):
    plan = load_plan(write(tmp_path))
    for (task, regime, _, seed), run in plan.runs.items():
        if regime == "branched":
            assert run.after[0] is plan.runs[task, "from_init", CONTROL, seed]
            assert run.inputs["start_step"] == 10
        is_pooled = run.inputs.get("pool") is not None
        assert is_pooled == any(step.kind == "pass_rates" for step in run.after)


def test_one_start_may_be_shared_by_all_seeds(tmp_path):
    plan = load_plan(write(tmp_path, shared_start=True))
    starts = {run.key for (_, regime, _, _), run in plan.runs.items() if regime == "from_init"}
    arms = {run.key for (_, regime, _, _), run in plan.runs.items() if regime == "branched"}
    assert len(starts) == len(of_kind(plan, "pass_rates")) == 1
    assert len(arms) == 2 * (2 + 2 * len(SMALL["arms"]))
    assert sum(step.kind == "pass_rates" for step in plan.measures) == 1


def test_the_control_goes_on_as_the_start_began(tmp_path):
    plan = load_plan(write(tmp_path))
    control = plan.runs["step", "branched", CONTROL, 0]
    start = control.after[0]
    for key in ("task", "settings", "levels"):
        assert control.inputs[key] == start.inputs[key]
    assert control.inputs["settings"]["slips"] == 0.2
    arm = plan.runs["step", "branched", "mixed_centred", 0]
    assert "slips" not in arm.inputs["settings"]
    steps = arm.inputs["training"]["optimizer"]["checkpoint_steps"]
    assert control.inputs["training"]["checkpoint_steps"] == steps


def test_plain_values_determine_a_step(tmp_path):
    first, second = (load_plan(write(tmp_path)) for _ in range(2))
    assert [s.key for s in first.steps] == [s.key for s in second.steps]
    assert len({s.key for s in first.steps}) == len(first.steps)
    for step in first.steps:
        value_hash(step.inputs)  # refuses what is not plain


def test_the_start_is_measured_once_and_arms_along_the_way(tmp_path):
    plan = load_plan(write(tmp_path))
    at = {(s.labels["arm"], s.labels["step"]) for s in of_kind(plan, "writing")}
    arms = {arm for arm, _ in at} - {"before", REORDERED}
    expected = {(arm, step) for arm in arms for step in (1, 8)}
    assert at == {("before", 0), (REORDERED, 8), *expected}
    assert {s.labels["step"] for s in of_kind(plan, "texts")} == {8}


def test_each_seed_asks_questions_of_its_own():
    steps = of_kind(load_plan(STUDIES / "calibration.yaml", preset="quick"), "confidence")
    assert {step.inputs["seed"] for step in steps} == {0, 1}
    assert all(step.inputs["seed"] == step.labels["seed"] for step in steps)


# Pools


def candidates_with(rates: list[float], planted: list[bool]):
    problems = Copying().problems(len(rates))
    problems = type(problems)(**{**vars(problems), "planted": torch.tensor(planted)})
    return problems, pd.DataFrame({"pass_rate": rates})


def chosen_entries(problems, rates, **pool) -> list[int]:
    """Places of the chosen among the candidates, whose entries are made distinct for that."""
    named = type(problems)(**{**vars(problems), "entries": tuple(range(len(problems)))})
    found = choose_pool(named, rates, Pool(**pool), rng=np.random.default_rng(0))
    return sorted(found.entries)


def test_candidates_are_distinct_and_planted_as_asked():
    task = tasks.get("arithmetic", max_terms=4, shortcut_total=20)
    found = candidate_problems(task, 300, planted=0.5, seed=0)
    assert len(found) == len(set(found.entries)) == 300
    assert found.planted.sum() == 150
    totals = np.array([sum(entry) for entry in found.entries])
    assert (totals[found.planted.numpy()] == 20).all()
    again = candidate_problems(task, 300, planted=0.5, seed=0)
    assert again.entries == found.entries


def test_of_few_problems_all_are_candidates():
    task = tasks.get("arithmetic", max_terms=2)
    every = {pair for pair in itertools.product(range(10), repeat=2) if is_of_train(pair)}
    found = candidate_problems(task, 500, planted=0.0, seed=1)
    assert len(found) == len(every)
    assert set(found.entries) == every


def is_of_train(terms: tuple[int, ...]) -> bool:
    return bool(in_split(group_of(torch.tensor([terms])), "train"))


def test_limits_of_a_pool_are_above_and_up_to():
    problems, rates = candidates_with([0.0, 0.01, 0.02, 0.2, 0.7], [False] * 5)
    assert chosen_entries(problems, rates, above=0.0, to=0.02) == [1, 2]
    assert chosen_entries(problems, rates, to=0.02) == [0, 1, 2]
    assert chosen_entries(problems, rates, above=0.2, to=0.7) == [4]
    assert len(chosen_entries(problems, rates, size=3)) == 3


def test_shortcuts_stand_in_the_share_that_is_asked_for():
    planted = [True] * 6 + [False] * 30
    problems, rates = candidates_with([0.01] * 36, planted)
    assert not set(chosen_entries(problems, rates, size=20)) & set(range(6))
    found = chosen_entries(problems, rates, size=20, planted=0.5)
    assert sum(entry < 6 for entry in found) == 6  # all there are
    assert len(found) == 12  # and no more of the others


def test_an_empty_pool_says_what_to_do():
    problems, rates = candidates_with([0.5, 0.5], [False, False])
    with pytest.raises(TrainingError, match=r"no candidate without a shortcut .*\(0.9, 1.0\]"):
        chosen_entries(problems, rates, above=0.9)
    with pytest.raises(TrainingError, match="no candidate with a shortcut"):
        chosen_entries(problems, rates, planted=1.0)


def test_unsolvable_pools_are_marked_wrong_whatever_is_written():
    problems, rates = candidates_with([0.5] * 4, [False] * 4)
    pool = choose_pool(problems, rates, Pool(solvable=False), rng=np.random.default_rng(0))
    right = Copying().mark(pool, pool.solutions[:, None], pool.solution_mask[:, None])
    assert not right.correct.any()
    again = choose_pool(problems, rates, Pool(), rng=np.random.default_rng(0))
    right = Copying().mark(again, again.solutions[:, None], again.solution_mask[:, None])
    assert right.correct.all()


@pytest.fixture
def pretrained(tmp_path) -> Path:
    """A checkpoint of the right vocabulary that no study has made."""
    task = tasks.get("arithmetic", max_terms=4)
    model = initial_model(ModelConfig(**SMALL["model"]), task, seed=5)
    return save_checkpoint(model, tmp_path / "pretrained").path


def test_a_study_of_a_pretrained_network_trains_adapters_of_it(tmp_path, pretrained):
    changes = {"start": str(pretrained), "adapters": {"rank": 2}, "advantages": ["centred"]}
    path = write(tmp_path, **changes)
    warm_up = load_plan(path).runs["step", "from_init", CONTROL, 1]
    reward = load_plan(path).runs["step", "branched", "mixed", 1]
    for step in (warm_up, reward):
        after = [str(before.directory(tmp_path)) for before in step.after]
        kind = {"warm_up": run_warm_up, "reward": run_reward}[step.kind]
        kind(str(step.directory(tmp_path)), after, dict(step.inputs))
    weights = [open_checkpoint(pretrained)]
    weights += [
        open_checkpoint(checkpoint_path(run.directory(tmp_path), step))
        for run, step in ((warm_up, 0), (warm_up, 10), (reward, 0), (reward, 8))
    ]
    assert weights[0].content_hash == weights[1].content_hash  # adapters start as zero
    assert weights[2].content_hash == weights[3].content_hash
    first, tuned, rewarded = (weights[i].load_model().state_dict() for i in (0, 2, 4))
    for later in (tuned, rewarded):
        assert torch.equal(first["model.embed_tokens.weight"], later["model.embed_tokens.weight"])
    name = "model.layers.0.mlp.down_proj.weight"
    assert np.linalg.matrix_rank((tuned[name] - first[name]).numpy(), tol=1e-6) == 2


def test_other_weights_at_the_start_are_another_study(tmp_path, pretrained):
    path = write(tmp_path, start=str(pretrained))
    before = load_plan(path).runs["step", "from_init", CONTROL, 0]
    model = open_checkpoint(pretrained).load_model()
    with torch.no_grad():
        model.model.embed_tokens.weight += 1
    save_checkpoint(model, pretrained)
    assert load_plan(path).runs["step", "from_init", CONTROL, 0].key != before.key
    with pytest.raises(CheckpointError, match="pretrained: changed while the study ran"):
        run_warm_up(str(tmp_path / "run"), [], dict(before.inputs))


@pytest.mark.slow
def test_a_study_runs_and_is_not_run_again(tmp_path):
    """Networks of one block, as many items along trajectories as at their ends."""
    arms = {name: SMALL["arms"][name] for name in ("no_reward", "mixed")}
    tasks = copy.deepcopy(SMALL["tasks"])
    tasks["step"]["analysis"]["ladder_items"] = 900
    path = write(tmp_path, arms=arms, tasks=tasks, advantages=["centred"], seeds=1, competence=1e-9)
    report = run_study(path, out=tmp_path / "out", n_workers=2)
    tables = {p.stem: pd.read_parquet(p) for p in (tmp_path / "out" / "tables").glob("*.parquet")}
    writing = tables["writing"]
    kl = writing[(writing["measure"] == "kl") & (writing["step"] == 8)]
    kl = kl.groupby("arm")["value"].max()
    assert kl["no_reward"] < 1e-9  # without a reward nothing moves
    assert kl["mixed"] > 0
    assert set(writing["problems"]) == {"prior", "planted"}
    assert {"pass_rates", "text_sources", "claims", "training"} <= set(tables)
    verdicts = tables["verdicts"]
    assert set(verdicts["side"]) == {"learning", "choosing", "discarded", "forgetting"}
    assert (verdicts.loc[verdicts["side"] == "discarded", "delta"] == 0).all()  # one block
    assert len(tables["losses"])
    assert len(tables["losses_in_full"])
    before = report.stat().st_mtime_ns
    assert run_study(path, out=tmp_path / "out", n_workers=2).stat().st_mtime_ns == before
