"""Figures of studies of training by reward, against plain sums over their tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_fit_for_print
from matplotlib.container import ErrorbarContainer
from reward_tables import POOLS, REWARDS, confidence_tables, writing_tables
from scipy import stats
from table_factory import write_tables

from figures import FIGURES, rollouts, tables
from figures.arm_styles import arm_styles
from mechinterp.errors import AnalysisError
from mechinterp.kept_tables import LOGGED, keep_tables

SEEDS = 3
FEW_POOLS = ("near_impossible_shortcut", "mixed")


@pytest.fixture(scope="module")
def writing() -> dict[str, pd.DataFrame]:
    return writing_tables(pools=FEW_POOLS, seeds=SEEDS, sets=("prior", "beyond"), n_steps=30)


@pytest.fixture(scope="module")
def confidence() -> dict[str, pd.DataFrame]:
    return confidence_tables(arms=("symmetric", "binary", "sft"), seeds=SEEDS)


def files(name: str, source) -> dict[str, dict]:
    return FIGURES[name].variants(source)


def draw(name: str, source, stem: str):
    return FIGURES[name].draw(source, **files(name, source)[stem])


def bars(ax) -> list[ErrorbarContainer]:
    return [each for each in ax.containers if isinstance(each, ErrorbarContainer)]


def panels(figure) -> list:
    return [ax for ax in figure.axes if ax.get_visible()]


@pytest.mark.parametrize("name", ["writing", "rollouts", "text_sources"])
def test_hard_samples_fit_for_print(name, writing):
    for options in files(name, writing).values():
        assert_fit_for_print(FIGURES[name].draw(writing, **options))


@pytest.mark.parametrize("name", ["stated_reliability", "stated_confidence"])
def test_calibration_fits_for_print(name, confidence):
    for options in files(name, confidence).values():
        assert_fit_for_print(FIGURES[name].draw(confidence, **options))


@pytest.mark.slow
@pytest.mark.parametrize("advantages", [("standardised", "centred"), ("standardised",)])
def test_whole_studies_fit_for_print(advantages):
    source = {**writing_tables(advantages=advantages), **confidence_tables()}
    for name in (
        *("writing", "rollouts", "text_sources"),
        *("stated_reliability", "stated_confidence"),
    ):
        for options in files(name, source).values():
            figure = FIGURES[name].draw(source, **options)
            assert_fit_for_print(figure)
            assert figure.get_figheight() < 9.5


def test_files_hold_what_fits(writing):
    whole = writing_tables(seeds=1)
    shown = [options["measures"] for options in files("writing", whole).values()]
    assert shown[:-1] == [
        *[("pass_1", "repetition"), ("steps_missing", "steps_wrong")],
        ("response_length",),
    ]
    assert list(files("writing", writing))[-1] == "writing_arithmetic_steps"
    by_advantage = files("rollouts", whole)
    assert list(by_advantage) == [f"rollouts_arithmetic_{a}" for a in ("standardised", "centred")]
    assert by_advantage["rollouts_arithmetic_centred"]["arms"] == tuple(
        f"{pool}_centred" for pool in POOLS
    )


def test_changes_are_since_the_start_of_the_same_seed(writing):
    table = writing["writing"].query("problems == 'beyond' and measure == 'pass_1'")
    start = table.query("arm == 'before'").set_index("seed")["value"]
    first, panel = draw("writing", writing, "writing_arithmetic").axes[:2]
    arms = [label.get_text() for label in first.get_yticklabels()]
    assert arms == [
        *("symmetric", "symmetric, second data order"),
        *(
            f"{kind}, {advantage}"
            for kind in ("near-impossible with shortcuts", "mixed")
            for advantage in ("standardised", "centred")
        ),
    ]
    for label, arm in (("mixed, centred", "mixed_centred"), ("symmetric", "symmetric")):
        end = tables.where(table, arm=arm, step=150).set_index("seed")["value"]
        change = 100 * (end - start)
        interval = stats.t.interval(0.95, SEEDS - 1, loc=change.mean(), scale=stats.sem(change))
        (bar,) = [b for b in bars(panel) if b.lines[0].get_ydata()[0] == arms.index(label)]
        assert bar.lines[0].get_xdata()[0] == pytest.approx(change.mean())
        assert bar.lines[2][0].get_segments()[0][:, 0] == pytest.approx(interval)
        (seeds,) = [c for c in panel.collections if _at(c) == {arms.index(label)}]
        assert np.sort(np.asarray(seeds.get_offsets())[:, 0]) == pytest.approx(np.sort(change))


def _at(collection) -> set[float]:
    offsets = np.asarray(collection.get_offsets())
    return set(offsets[:, 1]) if len(offsets) == SEEDS else set()


def test_courses_begin_at_the_start(writing):
    figure = draw("writing", writing, "writing_arithmetic_steps")
    assert len(figure.axes) == 4  # two advantages, two sets of problems
    table = writing["writing"].query("problems == 'beyond' and measure == 'pass_1'")
    for panel, advantage in ((figure.axes[1], "standardised"), (figure.axes[3], "centred")):
        curves = {tuple(bar.lines[0].get_ydata()) for bar in bars(panel)}
        assert len(curves) == 3  # the control and two arms
        own = table[table["arm"].isin(["before", f"mixed_{advantage}"])]
        expected = 100 * own.groupby("step")["value"].mean()
        assert any(curve == pytest.approx(tuple(expected)) for curve in curves)


def test_what_is_written_needs_its_start(writing):
    alone = {"writing": writing["writing"].query("arm != 'before'")}
    with pytest.raises(AnalysisError, match="'before'"):
        draw("writing", alone, "writing_arithmetic")


def test_rollouts_are_running_means_over_seeds(writing):
    log = writing["training"].query("arm == 'mixed_centred'")
    figure = draw("rollouts", writing, "rollouts_arithmetic_centred")
    titles = [ax.get_title(loc="left") for ax in panels(figure)]
    right, apart = (
        panels(figure)[titles.index(t)] for t in ("Right answers", "Divergence from start")
    )
    steps = sorted(log["step"].unique())
    # A fifteenth of 30 steps, made odd: one step to either side.
    courses = []
    for seed in range(SEEDS):
        course = tables.where(log, seed=seed).sort_values("step")["correct"].to_list()
        courses.append(
            [np.mean(course[max(0, i - 1) : i + 2]) for i in range(len(course))]  # shorter at ends
        )
    drawn = [line.get_ydata() for line in right.lines]
    assert any(line == pytest.approx(100 * np.mean(courses, axis=0)) for line in drawn)
    band = stats.t.interval(
        0.95, SEEDS - 1, loc=np.mean(courses, axis=0), scale=stats.sem(np.array(courses))
    )
    corners = [
        tuple(np.round(v, 9)) for path in right.collections for v in path.get_paths()[0].vertices
    ]
    assert (round(float(steps[9]), 9), round(float(100 * band[1][9]), 9)) in corners
    assert all(set(line.get_xdata()) <= {0, 10, 20} for line in apart.lines)  # where measured


def test_rollouts_need_rewards(writing):
    supervised = {"training": writing["training"].query("arm == 'symmetric'")}
    with pytest.raises(AnalysisError, match="no arm that was trained by reward"):
        files("rollouts", supervised)


def test_text_sources_join_both_readers(writing):
    figure = draw("text_sources", writing, "text_sources_step")
    table = writing["text_sources"].query("arm == 'mixed_standardised'")
    y = [label.get_text() for label in figure.axes[0].get_yticklabels()].index(
        "mixed, standardised"
    )
    for index, (source, measure) in {
        2: ("after", "accuracy"),
        4: ("right", "probability"),
        3: ("contradicting", "follows_scratchpad"),
        7: ("contradicting", "follows_prompt"),
    }.items():
        panel = figure.axes[index]
        own = [bar.lines[0] for bar in bars(panel) if bar.lines[0].get_ydata()[0] == y]
        drawn = {line.get_markerfacecolor() == "white": line.get_xdata()[0] for line in own}
        rows = tables.where(table, source=source, measure=measure).groupby("reader")["value"]
        assert drawn == pytest.approx(
            {True: 100 * rows.mean()["before"], False: 100 * rows.mean()["after"]}
        )


def test_reliability_joins_neighbouring_bins_of_most_seeds(confidence):
    table = confidence["stated_reliability"]
    rare = (table["bin"] == 8) & (table["arm"] == "binary") & (table["seed"] > 0)
    figure = draw(
        "stated_reliability", {"stated_reliability": table[~rare]}, "stated_reliability_questions"
    )
    titles = [ax.get_title(loc="left") for ax in panels(figure)]
    assert titles == ["before", "symmetric", "binary", "supervised"]
    ends = table.query("step == 300 and questions == 'as_learned' and reading == 'said'")
    for arm, runs in (("binary", [(0,), (9,)]), ("symmetric", [tuple(range(10))])):
        panel = panels(figure)[titles.index(arm)]
        said = [bar.lines[0] for bar in bars(panel) if bar.lines[0].get_color() == "#000000"]
        cells = tables.where(ends, arm=arm).groupby("bin")
        for line, bins in zip(said, runs, strict=True):
            assert line.get_xdata() == pytest.approx(cells["predicted"].mean().loc[list(bins)])
            assert line.get_ydata() == pytest.approx(cells["observed"].mean().loc[list(bins)])
    sizes = panels(figure)[1].collections
    assert any(np.ptp(each.get_sizes()) > 5 for each in sizes if len(each.get_offsets()) == 10)


def test_confidence_measures_by_arm_and_reading(confidence):
    figure = draw("stated_confidence", confidence, "stated_confidence_questions")
    assert len(figure.axes) == 3 * 5
    table = confidence["stated_confidence"].query("step != 75")
    first, panel = figure.axes[5:7]  # fewer: auroc
    arms = [label.get_text() for label in first.get_yticklabels()]
    assert arms == ["before", "symmetric", "binary", "supervised"]
    rows = table.query("questions == 'fewer' and measure == 'auroc' and reading == 'probe'")
    (probe,) = [bar.lines[0] for bar in bars(panel) if bar.lines[0].get_color() == "#CC79A7"]
    drawn = dict(zip(np.floor(probe.get_ydata()), probe.get_xdata(), strict=True))
    expected = rows.groupby("arm")["value"].mean()
    for y, arm in enumerate(("before", "symmetric", "binary", "sft")):
        assert drawn[y] == pytest.approx(expected[arm])
    unsaid = figure.axes[10]
    (said,) = [bar.lines[0] for bar in bars(unsaid) if bar.lines[0].get_color() == "#000000"]
    assert len(said.get_ydata()) == 3  # supervised does not say it there


def test_advantages_keep_the_hue_and_turn_the_marker():
    for kind in POOLS:
        arms = [f"{kind}_standardised", f"{kind}_centred", kind]
        divided, centred, plain = arm_styles(arms).values()
        assert divided.color == centred.color == plain.color
        assert divided.marker == plain.marker != centred.marker
        assert divided.linestyle != centred.linestyle
        assert centred.label == f"{plain.label}, centred"
    every = arm_styles([f"{kind}_{way}" for kind in POOLS for way in ("standardised", "centred")])
    assert len({(look.marker, look.linestyle) for look in every.values()}) == 2 * len(POOLS)


def test_arms_by_reward_come_from_easy_to_mixed_and_by_family():
    arms = [f"{pool}_{way}" for pool in POOLS for way in ("standardised", "centred")]
    table = pd.DataFrame({"arm": sorted([*arms, *REWARDS, "symmetric"])})
    assert tables.arms_in(table) == ["symmetric", *arms, *REWARDS]
    pages = tables.arm_groups(table)
    assert list(pages) == ["_pools", "_pools_2", "_pools_3", "_rewards"]
    assert pages["_pools_2"] == ("symmetric", *arms[6:12])
    assert pages["_rewards"] == ("symmetric", *REWARDS)


def test_what_is_kept_of_the_tables_is_what_is_drawn(writing, confidence, tmp_path):
    """In single precision, and without what no figure of these reads."""
    assert set(rollouts.MEASURES) == set(LOGGED)
    whole = {**writing, **confidence}
    keep_tables([write_tables(whole, tmp_path / "whole")], tmp_path / "kept")
    kept = {path.stem: pd.read_parquet(path) for path in (tmp_path / "kept").iterdir()}
    assert set(kept) == set(whole)
    assert set(kept["training"]) == {"task", "regime", "arm", "seed", "step", *LOGGED}
    assert len(kept["stated_reliability"]) < len(whole["stated_reliability"])
    for name in ("stated_reliability", "rollouts"):
        stem = next(iter(files(name, whole)))
        one, other = (draw(name, source, stem) for source in (whole, tmp_path / "kept"))
        for a, b in zip(panels(one), panels(other), strict=True):
            for line, same in zip(a.lines, b.lines, strict=True):
                assert np.allclose(line.get_xydata(), same.get_xydata(), atol=1e-3)
    supervised = {"training": writing["training"].query("arm == 'symmetric'").dropna(axis=1)}
    keep_tables([write_tables(supervised, tmp_path / "supervised")], tmp_path / "none")
    assert not (tmp_path / "none").exists()
