"""Looks: figures are fit for print in all shapes."""

from __future__ import annotations

import pytest
from figure_checks import OF_REWARD, assert_fit_for_print, draw, layout_problems
from table_factory import pair_tables, study_tables

import figures
from figures import style

NAMES = [name for name in figures.NAMES if name not in OF_REWARD]  # those: test_reward_figures.py


@pytest.mark.parametrize("name", [name for name in NAMES if name != "speed"])
def test_fit_for_print(name, study):
    one_task = {table: t[t["task"] == "digits"] if "task" in t else t for table, t in study.items()}
    assert_fit_for_print(draw(name, one_task))


OF_STUDIES = ("claims", "verdicts", "speed", "validity")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_STUDIES])
def test_pair_fit_for_print(name, pair):
    assert_fit_for_print(draw(name, pair))


SHAPES = {
    "all": lambda: study_tables(),
    "three tasks": lambda: study_tables(
        tasks=("triage", "digits", "arithmetic"), regimes=("branched",), seeds=8, n_layers=6
    ),
    "deep": lambda: study_tables(
        tasks=("triage",),
        regimes=("branched",),
        seeds=8,
        n_layers=30,
        n_heads=9,
        latents=("a_rather_long_latent_name", "another_latent_of_length", "short"),
        patched_roles=(*(f"kind of token {i}" for i in range(23)), "decision"),
    ),
    "odd arms": lambda: study_tables(
        tasks=("a_task_with_a_rather_long_name",),
        arms=("symmetric", "weighted_1.98", "logit_adjusted"),
        seeds=3,
        steps=(0, 100, 1000),
    ),
    "from init": lambda: study_tables(tasks=("digits",), regimes=("from_init",)),
    "bare pair": lambda: pair_tables(control=False, intervals=False),
}


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
def test_other_shapes_fit_for_print(shape):
    source = SHAPES[shape]()
    for name in NAMES:
        if name in OF_STUDIES and shape == "bare pair":
            continue
        if name == "speed" and "from_init" not in set(source["losses"]["regime"]):
            continue
        if shape == "from init" and name in ("cross_checkpoint", "crossing", "representation"):
            continue  # a random network has no front to keep
        assert_fit_for_print(draw(name, source))


def test_the_check_sees_problems(study):
    figure = draw("trajectories", study)
    figure.axes[0].set_title("far too long a title for a panel of this width, again " * 3)
    assert any("cut off" in problem for problem in layout_problems(figure))
    figure = draw("trajectories", study)
    figure.axes[0].legend(handles=style.arm_handles(["symmetric"]))
    assert "legend over a panel" in layout_problems(figure)


def test_seeds_and_intervals_are_stated(study, pair):
    heading = draw("trajectories", study).legends[0].get_title().get_text()
    assert heading.startswith("Mean of 3 seeds; bars: 95% t interval over seeds")
    heading = draw("trajectories", pair).legends[0].get_title().get_text()
    assert heading == "One seed; bars: 95% interval over items."
    heading = draw("trajectories", pair_tables(intervals=False)).legends[0].get_title().get_text()
    assert heading == "One seed, no interval."
