"""Many arms and settings in files of their own, and how arms look."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_checks import assert_fit_for_print, draw
from matplotlib.colors import to_rgb
from table_factory import STEPS, study_tables, write_tables

import figures
from figures import FIGURES, draw_all, style, tables
from figures.arm_styles import arm_styles
from figures.axes import hide_unused
from figures.colormaps import diverging_map, sequential_map

MANY_ARMS = (
    *("symmetric", "symmetric_reordered", "focal", "hard_batch", "hard_data"),
    *(
        f"{kind}_{weights}"
        for kind in ("ex_post", *tables.FAMILIES["weighting"], *tables.FAMILIES["refits"])
        for weights in ("1.8", "1.98")
    ),
)


def settings_table(*rows: tuple[str, str, tuple[str, ...]]) -> pd.DataFrame:
    return pd.DataFrame(
        [(task, regime, arm) for task, regime, arms in rows for arm in arms],
        columns=["task", "regime", "arm"],
    )


def test_few_arms_and_settings_share_a_file():
    few = ("before", *MANY_ARMS[:5], "ex_post_1.8", "weighted_1.8", "weighted_1.98")
    table = settings_table(*((t, r, few) for t in "ab" for r in ("branched", "from_init")))
    assert tables.parts("x", table) == {"x": {}}
    more = pd.concat([table, settings_table(("c", "branched", few))])
    expected = {f"x_{task}": {"task": task, "arms": None} for task in "abc"}
    assert tables.parts("x", more) == expected


def test_many_arms_are_drawn_by_family_at_the_strongest_weights():
    table = settings_table(("a", "branched", MANY_ARMS), ("b", "branched", MANY_ARMS[:3]))
    files = tables.parts("x", table)
    assert list(files) == ["x_a_weighting", "x_a_hard_examples", "x_a_refits", "x_b"]
    controls = ("symmetric", "symmetric_reordered")
    weighting = [f"{kind}_1.98" for kind in tables.FAMILIES["weighting"]]
    assert files["x_a_weighting"]["arms"] == (*controls, "ex_post_1.98", *weighting)
    assert files["x_a_hard_examples"]["arms"] == (*controls, "focal", "hard_batch", "hard_data")
    assert files["x_b"] == {"task": "b", "arms": None}
    shown = {arm for options in files.values() for arm in options["arms"] or ()}
    assert {arm for arm in MANY_ARMS if not arm.endswith("_1.8")} == shown
    smaller = tables.parts("x", table, max_arms=4)
    assert smaller["x_a_weighting_2"]["arms"][-2:] == tuple(weighting[4:])


def test_arms_without_weights_are_valued_at_symmetric_costs():
    rows = itertools.product(["branched"], ["focal", "symmetric"], ["symmetric", "w1.8"])
    table = pd.DataFrame(rows, columns=["regime", "arm", "costs"])
    assert tables.costs_in(table) == ["symmetric"]
    assert tables.costs_in(table.assign(regime="pair")) == ["symmetric", "w1.8"]
    weighted = pd.DataFrame([("branched", "weighted_1.8", "w1.8")], columns=table.columns)
    assert tables.costs_in(pd.concat([table, weighted])) == ["w1.8"]


def test_a_part_has_the_rows_of_its_task_and_arms_alone(study):
    needed = {"losses": ("task",), "gradients": ("objective",)}
    arms = ("symmetric", "weighted_1.98")
    cut = tables.read_tables(study, needed, task="digits", arms=arms)
    for name, table in cut.items():
        rows = study[name].query("task == 'digits' and arm in @arms")
        rows = rows[rows["objective"].isin(arms)] if "objective" in rows else rows
        assert 0 < len(rows) < len(study[name])
        pd.testing.assert_frame_equal(table, rows)


def test_a_caption_says_what_a_part_leaves_out():
    assert figures.caption("ladder_triage_refits").endswith(tables.PART)
    assert tables.PART not in figures.caption("ladder")


def test_one_file_that_cannot_be_drawn_spoils_no_other(study, tmp_path):
    patches = study["cross_checkpoint"]
    tasks = [patches.assign(task=task) for task in "abcde"]
    tasks[1] = tasks[1].assign(effect=np.nan)
    write_tables({"cross_checkpoint": pd.concat(tasks)}, tmp_path)
    drawn = draw_all(tmp_path, tmp_path, ["cross_checkpoint"], formats=["svg"])
    assert list(drawn.written) == [f"cross_checkpoint_{task}" for task in "acde"]
    assert "no gap" in drawn.skipped["cross_checkpoint_b"]


def test_many_arms_stand_side_by_side():
    """Moved on paper, and not in the data that set the axes."""
    arms = [f"{kind}_1.98" for kind in tables.FAMILIES["weighting"]]
    shifts = list(style.beside(arms).values())
    assert sum(shifts) == pytest.approx(0)
    assert (np.diff(shifts) > 1).all()
    assert set(style.beside(arms[:4]).values()) == {0}
    figure, axes = style.grid(1, 2)
    summary = pd.DataFrame({"x": [1, 2], "mean": [0.0, 1.0], "low": [-1.0, 0.0], "high": 3.0})
    (look,) = arm_styles(["focal"]).values()
    for ax, shift in zip(axes[0], (0, 6), strict=True):
        style.curve(ax, summary, "x", look, shift=shift)
    plain, moved = axes[0]
    assert moved.dataLim.bounds == plain.dataLim.bounds
    figure.draw_without_rendering()
    for ax, shift in ((plain, 0), (moved, 6)):
        marker, bars = ax.containers[0].lines[0], ax.containers[0].lines[2][0]
        for artist in (marker, bars):
            x = artist.get_transform().transform([1, 0])[0] - ax.transData.transform([1, 0])[0]
            assert x == pytest.approx(shift * figure.dpi / 72)


PARTED = ("dissociation", "ladder", "trajectories", "gradients", "probes", "cross_checkpoint")


@pytest.fixture(scope="module")
def many_arms() -> dict[str, pd.DataFrame]:
    return study_tables(tasks=("triage",), arms=MANY_ARMS, seeds=3, steps=(0, 50, 200, 800))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*PARTED, "crossing", "calibration", "incentives"])
def test_many_arms_fit_for_print(many_arms, name):
    for options in FIGURES[name].variants(many_arms).values():
        figure = FIGURES[name].draw(many_arms, **options)
        assert_fit_for_print(figure)
        assert figure.get_figheight() < 10


# Style


def test_an_arm_looks_the_same_everywhere(study):
    arms = [*study["losses"]["arm"].unique(), "after", "control"]
    looks = arm_styles(arms)
    distinct = [arm for arm in arms if arm != "before"]  # never beside the symmetric arm
    assert len({looks[arm].color for arm in distinct}) == len(distinct)
    assert len({looks[arm].marker for arm in distinct}) == len(distinct)
    for subset in itertools.combinations(arms, 2):
        assert all(look == looks[arm] for arm, look in arm_styles(subset).items())


def test_unknown_arms_get_looks_of_their_own():
    looks = arm_styles(["symmetric", "logit_adjusted", "peculiar", "weighted_1.5"])
    assert len({look.color for look in looks.values()}) == 4
    assert looks["logit_adjusted"].label == "logit adjusted"


def test_arms_of_a_family_look_different():
    for kinds in tables.FAMILIES.values():
        serving = [f"{kind}_1.98" for kind in (*kinds, "ex_post")]
        looks = arm_styles(["symmetric", "symmetric_reordered", *serving]).values()
        assert len({look.color for look in looks}) == len(looks)
        assert len({look.marker for look in looks}) == len(looks)


def test_milder_weights_are_paler():
    strong, mild, mildest = arm_styles([f"dfr_{w}" for w in ("1.98", "1.8", "1.5")]).values()
    light = [lightness(np.array(to_rgb(look.color))) for look in (strong, mild, mildest)]
    assert (np.diff(light) > 5).all()
    assert strong.label == "DFR 1.98"


def lightness(rgb: np.ndarray) -> np.ndarray:
    """CIE L*, written out from its definition."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    y = linear @ np.array([0.2126, 0.7152, 0.0722])
    return np.where(y > 0.008856, 116 * np.cbrt(y) - 16, 903.3 * y)


def test_colour_maps_are_perceptually_even():
    rgb = diverging_map()(np.linspace(0, 1, 255))[:, :3]
    light = lightness(rgb)
    assert light.argmax() == 127
    assert np.ptp(rgb[127]) < 0.01  # white in the middle
    assert np.abs(light - light[::-1]).max() < 5  # equal weight on both sides
    for branch in (light[:128], light[127:][::-1]):
        steps = np.diff(branch)
        assert steps.min() > 0
        assert steps.max() < 2.5 * steps.min()
    assert (np.diff(lightness(sequential_map()(np.linspace(0, 1, 64))[:, :3])) > 0).all()


def test_the_users_own_settings_do_not_show(study, tmp_path):
    import matplotlib

    plain = style.save(draw("calibration", study), "a", tmp_path, ["svg"])[0].read_bytes()
    with matplotlib.rc_context({"font.size": 20, "axes.facecolor": "red", "svg.hashsalt": None}):
        other = style.save(draw("calibration", study), "b", tmp_path, ["svg"])[0].read_bytes()
    assert plain == other


def test_step_zero_has_a_place_on_the_axis():
    figure = draw("trajectories", study_tables(tasks=("triage",), regimes=("branched",), seeds=2))
    ax = figure.axes[0]
    assert ax.get_xlim()[0] < 0 < ax.get_xlim()[1]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["0", "50", "400", "1.6k"]
    assert ax.get_xticks(minor=True).tolist() == [s for s in STEPS if s not in ax.get_xticks()]


def test_the_lowest_panel_of_each_column_has_tick_labels():
    _, axes = plt.subplots(2, 3, sharex=True)
    hide_unused(axes, 4)
    assert [ax.get_visible() for ax in axes.flat] == [True] * 4 + [False] * 2
    labelled = [ax.xaxis.get_tick_params()["labelbottom"] for ax in axes.flat[:4]]
    assert labelled == [False, True, True, True]
