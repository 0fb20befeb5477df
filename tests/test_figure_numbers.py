"""Numbers: what is drawn is what the tables say."""

from __future__ import annotations

import itertools

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from figure_checks import FEW_STEPS, assert_fit_for_print, draw, layout_problems
from matplotlib.colors import to_rgb
from matplotlib.container import BarContainer, ErrorbarContainer
from scipy import stats
from table_factory import CLAIMS, study_tables

from figures import FIGURES, tables
from figures.axes import percent_axis
from figures.claims import OUTCOMES, UNITS
from figures.verdicts import STATES, WORDS
from mechinterp import claims_text
from mechinterp.errors import AnalysisError
from mechinterp.seed_measures import MEASURES


def test_over_seeds_is_the_t_interval(study):
    losses = study["losses"]
    cell = ["task", "arm", "step", "costs", "currency", "loss"]
    summary = tables.over_seeds(losses, cell, scale=100).set_index(cell)
    for key, rows in losses.groupby(cell):
        values = 100 * rows["value"].to_numpy()
        low, high = stats.t.interval(0.95, 2, loc=values.mean(), scale=stats.sem(values))
        drawn = summary.loc[key]
        assert drawn[["mean", "low", "high"]].tolist() == pytest.approx([values.mean(), low, high])
        assert drawn["n_seeds"] == 3


def test_over_seeds_averages_within_a_seed_first():
    table = pd.DataFrame({"arm": "x", "seed": [0, 0, 0, 1], "value": [1.0, 2.0, 3.0, 6.0]})
    summary = tables.over_seeds(table, ["arm"])
    assert summary["mean"].tolist() == [4.0]  # not 3
    assert summary["n_seeds"].tolist() == [2]


def test_one_seed_takes_the_interval_over_items():
    table = pd.DataFrame({"arm": ["x"], "seed": [0], "value": [0.5], "low": [0.4], "high": [0.7]})
    assert tables.over_seeds(table, ["arm"], scale=100)[["low", "high"]].to_numpy().tolist() == [
        pytest.approx([40.0, 70.0])
    ]
    summary = tables.over_seeds(table.drop(columns=["low", "high"]), ["arm"])
    assert summary[["low", "high"]].isna().all(axis=None)


def test_dissociation_against_a_plain_loop(study):
    """The end of each path, by hand: the arm less the control that serves the same costs."""
    figure = draw("dissociation", study)
    losses = study["losses_in_full"]

    def value(arm, loss, seed, costs, task):
        row = losses[
            (losses["arm"] == arm)
            & (losses["loss"] == loss)
            & (losses["seed"] == seed)
            & (losses["costs"] == costs)
            & (losses["task"] == task)
            & (losses["currency"] == "log_score")
            & (losses["step"] == FEW_STEPS[-1])
        ]
        return row["value"].item()

    def costs_of(arm, weight):
        return "symmetric" if arm == "symmetric_reordered" else f"w{weight}"

    panels = itertools.product(("triage", "digits"), ("1.8", "1.98"))
    for ax, (task, weight) in zip(figure.axes, panels, strict=True):
        pairs = {
            "symmetric": f"ex_post_{weight}",
            "symmetric_reordered": "symmetric",
            f"weighted_{weight}": f"ex_post_{weight}",
        }
        drawn = [
            (float(c.lines[0].get_xdata()[0]), float(c.lines[0].get_ydata()[0]))
            for c in ax.containers
            if isinstance(c, ErrorbarContainer)
        ]
        expected = [
            tuple(
                100
                * np.mean(
                    [
                        value(arm, loss, seed, costs_of(arm, weight), task)
                        - value(origin, loss, seed, costs_of(arm, weight), task)
                        for seed in range(3)
                    ]
                )
                for loss in ("choosing", "learning")
            )
            for arm, origin in pairs.items()
        ]
        assert np.allclose(drawn, expected)


def test_dissociation_of_a_pair_takes_the_intervals_of_the_contrasts(pair):
    figure = draw("dissociation", pair)
    ends = [c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)]
    contrasts = pair["contrasts"]
    for end, arm in [(ends[-1], "after")]:
        bars = {
            loss: contrasts[
                (contrasts["arm"] == arm)
                & (contrasts["loss"] == loss)
                & (contrasts["reference"] == "control")
                & (contrasts["currency"] == "log_score")
            ][["mean", "low", "high"]]
            .to_numpy()
            .ravel()
            * 100
            for loss in ("choosing", "learning")
        }
        horizontal, vertical = (bar.get_segments()[0] for bar in end.lines[2])
        assert horizontal[:, 0].tolist() == pytest.approx(bars["choosing"][1:].tolist())
        assert vertical[:, 1].tolist() == pytest.approx(bars["learning"][1:].tolist())
        assert horizontal[0, 1] == pytest.approx(bars["learning"][0])


def test_dissociation_needs_a_control():
    with pytest.raises(AnalysisError, match="no arm beside a control"):
        draw("dissociation", study_tables(arms=("weighted_1.98",), seeds=2, steps=FEW_STEPS))


def test_ladder_bars_add_up_to_the_total(study):
    figure = draw("ladder", study)
    full = study["losses_in_full"]
    for ax in figure.axes:
        ends: dict[float, float] = {}
        for bar in (bar for c in ax.containers if isinstance(c, BarContainer) for bar in c):
            y = bar.get_y() + bar.get_height() / 2
            ends[y] = ends.get(y, 0.0) + bar.get_width()
        diamonds = {
            float(c.lines[0].get_ydata()[0]): float(c.lines[0].get_xdata()[0])
            for c in ax.containers
            if isinstance(c, ErrorbarContainer)
        }
        assert diamonds
        for y, total in diamonds.items():
            assert ends[y] == pytest.approx(total)
    utility = full[(full["currency"] == "utility") & (full["loss"] == "total")]
    expected = utility.query("task == 'triage' and arm == 'weighted_1.98' and step > 0")["value"]
    panel = figure.axes[1]
    diamonds = [
        float(c.lines[0].get_xdata()[0])
        for c in panel.containers
        if isinstance(c, ErrorbarContainer)
    ]
    assert diamonds[-1] == pytest.approx(100 * expected.mean())


def test_ladder_stacks_negative_pieces_to_the_left():
    source = study_tables(tasks=("triage",), regimes=("branched",), seeds=2, steps=FEW_STEPS)
    full = source["losses_in_full"].copy()
    discarded = full["loss"] == "discarded"
    total = full["loss"] == "total"
    cell = ["arm", "seed", "step", "costs", "currency"]
    shift = full[discarded].set_index(cell)["value"] + 0.07
    full.loc[discarded, "value"] = -0.07
    at = pd.MultiIndex.from_frame(full.loc[total, cell])
    full.loc[total, "value"] -= shift.reindex(at).to_numpy()
    figure = draw("ladder", {**source, "losses_in_full": full})
    bars = [b for c in figure.axes[0].containers if isinstance(c, BarContainer) for b in c]
    negative = [bar for bar in bars if bar.get_width() < 0]
    assert len(negative) == 8  # one per arm and costs
    assert all(bar.get_x() == 0 and bar.get_width() == pytest.approx(-7) for bar in negative)
    assert figure.axes[0].get_xlim()[0] < -7
    assert layout_problems(figure) == []


def test_recovery_maps_share_a_scale_and_centre_the_difference(study):
    figure = draw("recovery", study)
    rows = study["patching"].query(
        "task == 'triage' and arm == 'weighted_1.98' and latent == 'all'"
    )
    grains = ("resid_pre", "attn_out", "mlp_out", "head")
    for grain, panels in zip(grains, np.reshape(figure.axes[:12], (4, 3)), strict=True):
        before, after, change = (ax.images[0] for ax in panels)
        assert before.get_clim() == after.get_clim()
        assert before.get_clim()[0] <= 0
        assert change.get_clim()[0] == -change.get_clim()[1]
        cells = rows[rows["grain"] == grain].groupby(["checkpoint", "unit", "layer"])
        mean = cells["recovery"].mean().unstack()
        units = [label.get_text() for label in panels[0].get_yticklabels()]
        assert np.allclose(before.get_array(), mean.loc["before"].loc[units])
        expected = mean.loc["after"].loc[units] - mean.loc["before"].loc[units]
        assert np.allclose(change.get_array(), expected)


def crosses(ax) -> set[tuple[int, int]]:
    """(layer, row) of the marked cells."""
    marked = [line for line in ax.lines if line.get_marker() == "x"]
    return {(x, y) for line in marked for x, y in zip(*line.get_data(), strict=True)}


def test_recovery_marks_what_is_not_distinguishable_from_zero(pair, study):
    rows = pair["patching"].query("latent == 'all' and grain == 'resid_pre'")
    panels = draw("recovery", pair).axes[:3]
    units = [label.get_text() for label in panels[0].get_yticklabels()]
    for ax, name in zip(panels, ("before", "after", "change"), strict=True):
        unsure = rows[(rows["checkpoint"] == name) & (rows["q"] > 0.05)]
        expected = {
            (layer, units.index(unit))
            for layer, unit in zip(unsure["layer"], unsure["unit"], strict=True)
        }
        assert crosses(ax) == expected
        assert 0 < len(expected) < rows["layer"].nunique() * len(units)
    # Over seeds: scipy's t test and its false-discovery control.
    cells = study["patching"].query(
        "task == 'triage' and arm == 'weighted_1.98' and latent == 'all' and grain == 'resid_pre'"
        " and checkpoint == 'after' and regime == 'branched'"
    )
    recoveries = cells.pivot(index="seed", columns=["unit", "layer"], values="recovery")
    q = stats.false_discovery_control(stats.ttest_1samp(recoveries, 0).pvalue)
    unsure = [cell for cell, value in zip(recoveries.columns, q, strict=True) if value > 0.05]
    ax = draw("recovery", study).axes[1]
    assert crosses(ax) == {(layer, units.index(unit)) for unit, layer in unsure}


def test_probes_of_one_task_have_a_column_per_latent_and_every_baseline(pair):
    """The baselines that do not depend on the layer lie flat; layers start at 1."""
    figure = draw("probes", pair, task="triage", regime="pair")
    rows = pair["probes"].query("measure == 'auroc' and latent == 'b'")
    assert [ax.get_title(loc="left") for ax in figure.axes if ax.get_title(loc="left")] == [
        *(f"latent {name}" for name in "abcd"),
        "latent e, not\nneeded",
    ]
    ax = figure.axes[1]
    assert ax.get_xlim()[0] > 0
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in ax.lines]
    for kind in ("surface_bag", "surface_token"):
        value = float(rows.query("kind == @kind")["value"].mean())
        assert [value, value] in [pytest.approx(line) for line in drawn], kind
    control = rows.query("kind == 'control'").groupby("layer")["value"].mean()
    assert any(line == pytest.approx(control.tolist()) for line in drawn)


def test_erasure_draws_the_loss_of_each_arm_beside_its_controls(pair):
    figure = draw("erasure", pair)
    rows = pair["erasure"].query("measure == 'log_score' and latent == 'c'")
    below = figure.axes[5 + 2]
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in below.lines]
    for _, cell in rows.groupby(["arm", "kind"]):
        expected = cell.groupby("layer")["loss"].mean().tolist()
        assert any(line == pytest.approx(expected) for line in drawn if len(line) == len(expected))


def test_repair_draws_shares_by_steps_rank_and_place(pair):
    rows = pair["repair"].query("arm == 'after' and currency == 'utility' and readout == 'raw'")
    figure = draw("repair", pair)
    by_steps, by_rank, by_place, _ = figure.axes[8:12]
    adapters = rows.query("kind == 'adapters' and layers == 'late'")
    for ax, chosen, by in (
        (by_steps, adapters.query("rank == 4 and part == 'both'"), "steps"),
        (by_rank, adapters.query("steps == 32 and part == 'both'"), "rank"),
    ):
        expected = 100 * chosen.sort_values(by)["share"].to_numpy()
        drawn = [np.asarray(line.get_ydata(), float) for line in ax.lines]
        assert any(len(line) == len(expected) and np.allclose(line, expected) for line in drawn)
    names = [label.get_text() for label in by_place.get_yticklabels()]
    many = rows.query("part == 'dfr' and n_items == 6000")["share"].item()
    at = [
        round(float(y))
        for line in by_place.lines
        for x, y in zip(*line.get_data(), strict=True)
        if x == pytest.approx(100 * many)
    ]
    assert names[at[0]] == "DFR"


def test_repair_of_what_lost_nothing_is_not_drawn(pair):
    nothing = pair["repair"].assign(share=np.nan, low=np.nan, high=np.nan)
    with pytest.raises(AnalysisError, match="lost nothing"):
        draw("repair", {"repair": nothing})


def test_separability_draws_what_either_target_costs(pair):
    figure = draw("separability", pair)
    lost = pair["separability"].query("ablation == 'resample'")
    panels = figure.axes[5:10]
    pruned = [("decision", "decision"), ("decision", "latents"), ("latents", "latents")]
    for ax, (target, outcome) in zip(panels, pruned, strict=False):
        drawn = [np.asarray(line.get_ydata(), float).tolist() for line in ax.lines]
        for _, own in tables.where(lost, outcome=outcome).groupby("arm"):
            expected = tables.where(own, target=target)["lost"].tolist()
            random = tables.where(own, target="random").groupby("share")["lost"].mean().tolist()
            assert any(line == pytest.approx(expected) for line in drawn)
            assert any(line == pytest.approx(random) for line in drawn)
    index = pair["separability_index"].query("ablation == 'resample' and index == 'both'")
    points = [c.lines[0].get_ydata()[-1] for c in panels[-1].containers]
    assert sorted(points) == pytest.approx(sorted(index["value"]))


def test_use_puts_decodability_beside_slopes_and_responses(pair):
    figure = draw("use", pair)
    left, middle, right = figure.axes[3 * 2 : 3 * 3]  # latent c
    rows = pair["use_slopes"].query("latent == 'c'")
    for ax, column in ((left, "auroc"), (middle, "slope")):
        drawn = [np.asarray(line.get_ydata(), float).tolist() for line in ax.lines]
        for _, cell in rows.groupby(["arm", "kind"]):
            expected = cell.sort_values("layer")[column].tolist()
            assert any(line == pytest.approx(expected) for line in drawn)
    assert len(middle.collections) >= rows["arm"].nunique()  # the null's bands
    best = rows.query("arm == 'before' and kind == 'mean_difference'")
    best = int(best.loc[best["slope"].abs().idxmax(), "layer"])
    assert right.get_title(loc="right") == f"layer {best}"
    curves = pair["use"].query("latent == 'c' and layer == @best and kind != 'random'")
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in right.lines]
    for _, cell in curves.groupby(["arm", "kind"]):
        assert any(line == pytest.approx(cell["effect"].tolist()) for line in drawn)


def test_recovery_puts_roles_in_reading_order():
    units = ["decision", "head 10", "head 2", "row 0 col 10", "row 0 col 9", "start"]
    ordered = sorted(units, key=tables.natural_order)
    assert ordered == ["start", "head 2", "head 10", "row 0 col 9", "row 0 col 10", "decision"]


def test_recovery_of_one_network_has_one_column(pair):
    alone = pair["patching"].query("checkpoint == 'after'").assign(arm="before")
    figure = draw("recovery", {"patching": alone})
    assert len([ax for ax in figure.axes if ax.images]) == 4
    assert layout_problems(figure) == []


def test_crossing_draws_one_kind_of_hybrid_at_a_time(study):
    """A line per hybrid and arm, in each of the two files."""
    crossing = study["crossing"]
    drawn = {}
    for stitch in ("identity", "ridge"):
        alone = crossing[crossing["stitch"] == stitch]
        both, one = (draw("crossing", {"crossing": t}, stitch=stitch) for t in (crossing, alone))
        lines = [[list(line.get_ydata()) for line in f.axes[0].lines] for f in (both, one)]
        assert lines[0] == lines[1]
        assert layout_problems(both) == []
        drawn[stitch] = lines[0]
    assert drawn["identity"] != drawn["ridge"]


def test_crossing_marks_shares_that_are_not_valid(study):
    crossing = study["crossing"].assign(shares_valid=False)
    all_hollow = draw("crossing", {"crossing": crossing}).axes[3]
    none_hollow = draw("crossing", {"crossing": crossing.assign(shares_valid=True)}).axes[3]

    def hollow(ax) -> int:
        lines = [line for line in ax.lines if line.get_markerfacecolor() == "white"]
        return sum(len(line.get_xdata()) for line in lines)

    assert hollow(all_hollow) == 2 * crossing["cut"].nunique()
    assert hollow(none_hollow) == 0


def test_gradients_draw_each_objective_along_its_run_and_at_the_weights_of_the_control(study):
    figure = draw("gradients", study)
    snr = study["gradients"].query("part == 'all' and measure == 'snr' and task == 'triage'")
    at_control = snr.query("arm == 'symmetric'").groupby(["objective", "step"])["value"].mean()
    own = snr.query("arm == objective").groupby(["objective", "step"])["value"].mean()
    own = {arm: own[arm].to_dict() for arm in ("symmetric", "weighted_1.98")}
    panel, along, where = figure.axes[:3]
    curves = [c.lines[0] for c in panel.containers if isinstance(c, ErrorbarContainer)]
    assert len(curves) == 2  # the mildest weights have no place here
    for curve, expected in zip(curves, own.values(), strict=True):
        drawn = dict(zip(curve.get_xdata(), curve.get_ydata(), strict=True))
        assert drawn == pytest.approx(expected)
    assert panel.lines[0].get_ydata() == pytest.approx(at_control["weighted_1.98"].tolist())
    latents = study["gradients_latents"].query(
        "task == 'triage' and arm == 'symmetric' and objective == arm and layer == 3"
        " and latent == 'all needed'"
    )
    curve = next(c.lines[0] for c in along.containers if isinstance(c, ErrorbarContainer))
    expected = latents.query("measure == 'share'").groupby("step")["value"].mean()
    assert curve.get_ydata() == pytest.approx(100 * expected.to_numpy())
    posterior = study["gradients_posterior"].query(
        "arm == 'weighted_1.98' and objective == arm and step == 400 and measure == 'share'"
    )
    curve = [c.lines[0] for c in where.containers if isinstance(c, ErrorbarContainer)][1]
    expected = posterior.groupby("log_odds")["value"].mean()
    assert curve.get_ydata() == pytest.approx(100 * expected.to_numpy())
    assert not figure.axes[5].get_visible()  # digits knows no posterior


def test_incentives_draw_each_arm_below_what_its_costs_predict(study):
    rows = study["incentives"].query("task == 'digits'")
    figure = draw("incentives", {"incentives": rows})
    strip, panel = figure.axes
    drawn = [np.asarray(line.get_ydata(), float).tolist() for line in strip.lines]
    for _, cell in rows.query("costs != 'symmetric'").groupby("costs"):
        expected = cell.groupby("log_odds")["predicted"].mean().tolist()
        assert any(line == pytest.approx(expected) for line in drawn)
    curves = [c for c in panel.containers if isinstance(c, ErrorbarContainer)]
    arms = ("symmetric", "weighted_1.8", "weighted_1.98")
    for curve, arm in zip(curves, arms, strict=True):
        cells = rows[rows["arm"] == arm].groupby("log_odds")
        q = cells["posterior"].mean()
        assert np.allclose(curve.lines[0].get_xdata(), np.log(q / (1 - q)), atol=0.2)
        assert np.allclose(curve.lines[0].get_ydata(), cells["divergence"].mean())
    assert strip.get_xlim() == panel.get_xlim()


def test_probes_floor_is_the_network_as_initialised(study):
    probes = study["probes"]
    figure = draw("probes", study)
    floor = probes.query(
        "kind == 'random_init' and needed and task == 'triage' and arm != 'before'"
    )
    expected = floor.groupby("layer")["value"].mean()
    drawn = [line for line in figure.axes[0].lines if line.get_linestyle() == "-."]
    assert np.allclose(drawn[0].get_ydata(), expected)


def drawn_cells(figure) -> dict[float, tuple[float, float, float]]:
    """y -> (mean, low, high) of the first panel's points."""
    cells = {}
    for bars in (c for c in figure.axes[0].containers if isinstance(c, ErrorbarContainer)):
        marks = zip(bars.lines[0].get_xdata(), bars.lines[0].get_ydata(), strict=True)
        for (x, y), segment in zip(marks, bars.lines[2][0].get_segments(), strict=True):
            cells[float(y)] = (float(x), *map(float, segment[:, 0]))
    return {y: cells[y] for y in sorted(cells)}


def test_verdicts_show_each_cells_number_state_and_word(study):
    figure = draw("verdicts", study, task="triage", regime="branched")
    learning, choosing, words = figure.axes[:3]
    arms = [label.get_text() for label in learning.get_yticklabels()]
    own = tables.where(study["verdicts"], task="triage", reference="ex_post")
    assert arms == ["weighted 1.8", "weighted 1.98"]
    for ax, side in ((learning, "learning"), (choosing, "choosing"), (words, "learning")):
        rows = tables.where(own, side=side).set_index(["arm", "step"])
        for text in ax.texts:
            x, y = text.get_position()
            row = rows.loc[("weighted_" + arms[y].split()[-1], FEW_STEPS[1:][x])]
            face = ax.images[0].get_array()[y, x]
            if ax is words:
                assert text.get_text() == WORDS[row["verdict"]].letter
                assert tuple(face) == pytest.approx(to_rgb(WORDS[row["verdict"]].face))
            else:
                shown = float(text.get_text().replace("−", "-"))
                assert shown == pytest.approx(100 * row["delta"], abs=0.5)
                assert tuple(face) == pytest.approx(to_rgb(STATES[row["state"]].face))
        assert len(ax.texts) == 4
    assert {"damaged", "inconclusive"} == set(tables.where(own, side="learning")["state"])


def test_claims_together_are_in_margins_with_what_is_claimed_to_the_right(study):
    claims = study["claims"]
    figure = draw("claims", study)
    expected = []
    for _, rows in claims.groupby("claim", sort=False):
        cells = []
        for row in rows.itertuples():
            ends = [row.mean, row.low, row.high]
            if row.expected == "less":
                ends = [-row.mean, -row.high, -row.low]
            cells.append([end / row.margin for end in ends])
        expected += sorted(cells)
    assert np.allclose(list(drawn_cells(figure).values()), expected)
    counts = [int(text.get_text()) for text in figure.axes[1].texts]
    by_outcome = claims.groupby(["claim", "outcome"]).size()
    assert sorted(counts) == sorted(by_outcome)
    assert figure.axes[0].get_xscale() == "symlog"


def test_a_table_of_claims_may_be_comma_separated(study, tmp_path):
    study["claims"].to_csv(tmp_path / "claims.csv", index=False)
    drawn = (drawn_cells(draw("claims", source)) for source in (tmp_path, study))
    one, other = (list(cells.values()) for cells in drawn)
    assert np.allclose(one, other)


@pytest.mark.parametrize("claim", CLAIMS)
def test_a_claim_is_drawn_in_its_own_units_in_the_order_of_its_cells(study, claim):
    rows = study["claims"].query("claim == @claim")
    figure = draw("claims", study, claim=claim)
    scale = 100 if rows["measure"].iloc[0] in ("learning", "choosing") else 1
    expected = scale * rows[["mean", "low", "high"]].to_numpy()
    assert np.allclose(list(drawn_cells(figure).values()), expected)
    texts = [text.get_text() for text in figure.axes[0].texts]
    arrow = "claimed →" if rows["expected"].iloc[0] == "more" else "← claimed"
    assert arrow in texts
    assert layout_problems(figure) == []


@pytest.mark.parametrize("n_cells", [1, 40, 90])
def test_claims_of_any_number_of_cells_fit_for_print(study, n_cells):
    claims = study["claims"].query("claim == 'chooses_better'")
    claims = pd.concat([claims] * 90, ignore_index=True).head(n_cells)
    claims["task"] = [f"triage_with_setting_{i}" for i in range(n_cells)]
    files = FIGURES["claims"].variants({"claims": claims})
    assert len(files) == 1 + -(-n_cells // 40)
    shown = []
    for options in files.values():
        figure = draw("claims", {"claims": claims}, **options)
        assert_fit_for_print(figure)
        assert figure.get_figheight() < 9.5
        if options:
            shown += [label.get_text().split(" ·")[0] for label in figure.axes[0].get_yticklabels()]
    assert shown == [task.replace("_", " ") for task in claims["task"]]


def test_every_measure_of_a_claim_has_a_unit():
    assert set(UNITS) == set(MEASURES)
    assert set(OUTCOMES) == set(claims_text.OUTCOMES)


def test_speed_draws_means_of_paired_differences(from_init):
    """Steps as ratios and learning in percent, each against the control of the same seed."""
    measures = from_init["measures"].query("costs == 'w1.98'")
    wide = measures.pivot_table(index=["arm", "seed"], columns="measure", values="value")
    figure = draw("speed", from_init)
    assert_fit_for_print(figure)
    panel = figure.axes[0]
    change = wide.loc["weighted_1.98"] - wide.loc["symmetric"]
    points = [c.lines[0] for c in panel.containers if isinstance(c, ErrorbarContainer)]
    drawn = [(p.get_xdata()[0], p.get_ydata()[0]) for p in points]
    expected = (change["steps_to_learn"].mean(), 100 * change["learning"].mean())
    assert any(point == pytest.approx(expected) for point in drawn)


def test_values_that_are_all_the_same_have_an_axis():
    _, ax = plt.subplots()
    percent_axis(ax, "y", [0.0, 0.0])
    low, high = ax.get_ylim()
    assert low < 0 < high
