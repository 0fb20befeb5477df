"""Claims against answers that are known, their text, and the command."""

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from mechinterp import claims, claims_text
from mechinterp.cli import main
from mechinterp.errors import SpecError
from mechinterp.seed_measures import COLUMNS, crossing_step, seed_measures
from mechinterp.spec import StudySpec

SEEDS = 8
COMPETENT = pd.DataFrame({"task": ["triage"], "seed": [0], "competent": [True]})


def study(**claim) -> StudySpec:
    settings = {
        "question": "Is it so?",
        "measure": "learning",
        "arms": ["weighted"],
        "against": "symmetric",
        "expected": "more",
        **claim,
    }
    return StudySpec(
        name="s",
        weights={"1.8": (0.2, 1.8), "1.98": (0.02, 1.98)},
        tasks={"triage": {"task": "triage"}},
        claims={"so": settings},
    )


def runs(**values: list[float]) -> pd.DataFrame:
    """Learning losses per seed of each arm, at the costs w1.8."""
    rows = [
        ("triage", "branched", arm, "w1.8", seed, "learning", value)
        for arm, losses in values.items()
        for seed, value in enumerate(losses)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def around(mean: float, spread: float = 0.01) -> list[float]:
    return [mean + spread * (-1) ** seed for seed in range(SEEDS)]


@pytest.mark.parametrize(
    ("mean", "spread", "expected", "outcome"),
    [
        (0.2, 0.01, "more", "replicated"),
        (0.2, 0.01, "less", "reversed"),
        (-0.2, 0.01, "less", "replicated"),
        (-0.2, 0.01, "more", "reversed"),
        (0.0, 0.01, "more", "null"),
        (0.04, 0.005, "more", "null"),  # real, but within the margin
        (0.05, 0.01, "more", "inconclusive"),
        (0.2, 0.5, "more", "inconclusive"),
    ],
)
def test_outcomes(mean, spread, expected, outcome):
    table = runs(symmetric=[0.1] * SEEDS, **{"weighted_1.8": around(0.1 + mean, spread)})
    (row,) = claims.judge_claims(study(expected=expected), table, COMPETENT).to_dict("records")
    assert row["outcome"] == outcome
    assert row["mean"] == pytest.approx(mean)
    assert row["p"] == pytest.approx(
        stats.ttest_1samp(around(mean, spread), 0).pvalue  # type: ignore[union-attr]
    )


def test_seeds_are_paired():
    """The spread between seeds that both arms share does not count."""
    shared = np.linspace(0, 5, SEEDS)
    table = runs(symmetric=list(shared), **{"weighted_1.8": list(shared + around(0.2))})
    (row,) = claims.judge_claims(study(), table, COMPETENT).to_dict("records")
    assert row["outcome"] == "replicated"


def test_the_reference_serves_the_same_weights():
    table = runs(
        **{
            "weighted_1.8": around(0.3),
            "ex_post_1.8": around(0.1, 0.0),
            "ex_post_1.98": around(9.0),
            "symmetric": around(5.0),
        }
    )
    (row,) = claims.judge_claims(study(against="ex_post"), table, COMPETENT).to_dict("records")
    assert (row["against"], row["mean"]) == ("ex_post_1.8", pytest.approx(0.2))


def test_few_seeds_and_incompetent_networks_prove_nothing():
    few = runs(symmetric=[0.1] * 3, **{"weighted_1.8": around(0.5)[:3]})
    assert claims.judge_claims(study(), few, COMPETENT)["outcome"].tolist() == ["not powered"]
    void = runs(symmetric=[0.1] * SEEDS, **{"weighted_1.8": around(0.5)})
    incompetent = COMPETENT.assign(competent=False)
    assert claims.judge_claims(study(), void, incompetent)["outcome"].tolist() == ["void"]


def test_holm_counts_all_cells_of_a_claim():
    """A cell that stands alone does not beside nineteen others that are nothing."""
    rng = np.random.default_rng(0)
    alone = runs(symmetric=[0.0] * SEEDS, **{"weighted_1.8": around(0.18, 0.14)})
    noise = [
        runs(symmetric=[0.0] * SEEDS, **{"weighted_1.8": list(rng.normal(0, 0.3, SEEDS))}).assign(
            task=f"t{k}"
        )
        for k in range(19)
    ]
    first = claims.judge_claims(study(), alone, COMPETENT).iloc[0]
    crowded = claims.judge_claims(study(), pd.concat([alone, *noise]), COMPETENT).iloc[0]
    assert first["outcome"] == "replicated"
    assert crowded["outcome"] == "inconclusive"
    assert first["p_holm"] == first["p"] < 0.05 < crowded["p_holm"]


@pytest.mark.parametrize(
    ("losses", "goal", "step"),
    [
        ([1.0, 0.5, 0.0], 0.5, 1.0),
        ([1.0, 0.5, 0.0], 0.25, 2**1.5 - 1),  # halfway from log2(1 + 1) to log2(1 + 3)
        ([1.0, 0.9, 0.8], 0.5, 3.0),  # never: its last step
        ([0.4, 0.9, 0.8], 0.5, 1.0),  # from the start: one step, the least there is
    ],
)
def test_where_a_curve_crosses(losses, goal, step):
    assert crossing_step(np.array([0.0, 1.0, 3.0]), np.array(losses), goal) == pytest.approx(step)


def test_steps_to_learn_counts_from_the_controls_learning():
    """The control goes half of its way in 10 steps, the arm in 40: two doublings apart."""
    rows = [
        ("triage", "from_init", arm, 0, step, "w1.8", "log_score", "learning", value)
        for arm, curve in {
            "symmetric": {0: 1.0, 10: 0.6, 40: 0.3, 100: 0.2},
            "weighted_1.8": {0: 1.0, 10: 0.9, 40: 0.6, 100: 0.5},
        }.items()
        for step, value in curve.items()
    ]
    columns = ["task", "regime", "arm", "seed", "step", "costs", "currency", "loss", "value"]
    measures = seed_measures({"losses": pd.DataFrame(rows, columns=columns)})
    by_arm = measures.set_index("arm")["value"]
    assert by_arm["weighted_1.8"] == pytest.approx(np.log2(40))
    assert by_arm["symmetric"] == pytest.approx(np.log2(10))


def test_a_page_is_filled_and_filled_again(tmp_path):
    spec = study()
    table = runs(symmetric=[0.1] * SEEDS, **{"weighted_1.8": around(0.3)})
    judged = claims.judge_claims(spec, table, COMPETENT)
    page = tmp_path / "page.md"
    page.write_text(
        "# Mine\n<!-- claims: all -->\n<!-- end -->\ntext\n<!-- claim: so -->\nold\n<!-- end -->\n"
    )
    claims_text.fill_page(page, spec, judged)
    filled = page.read_text()
    assert "| `so` | Is it so? | 1 | 1 |" in filled
    assert "| weighted_1.8 | +0.200 | +0.191 to +0.209 | 8 |" in filled
    assert "old" not in filled
    assert filled.startswith("# Mine\n")
    assert "\ntext\n" in filled
    claims_text.fill_page(page, spec, judged)
    assert page.read_text() == filled
    page.write_text("<!-- claim: other -->\n<!-- end -->\n")
    with pytest.raises(SpecError, match="claim 'other' is not in the spec; it has: so"):
        claims_text.fill_page(page, spec, judged)


def test_the_command_names_an_absent_table(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["claims", "studies/utility_weighted.yaml", str(tmp_path)])
    assert stop.value.code == 2
    assert "measures.parquet: no such table; give OUT/tables of a study" in capsys.readouterr().err


def test_the_findings_page_is_what_its_tables_say(tmp_path):
    """Judged again from the committed tables, the page does not change."""
    root = Path(__file__).parents[1]
    tables = root / "docs/findings/utility_weighted/tables"
    if not tables.is_dir():
        pytest.skip("the finding has no tables yet")
    copy = tmp_path / "tables"
    copy.mkdir()
    for name in ("measures", "competence"):
        shutil.copy(tables / f"{name}.parquet", copy)
    spec, judged = claims.judge_saved(root / "studies/utility_weighted.yaml", copy)
    page = tmp_path / "page.md"
    shutil.copy(root / "docs/findings/utility_weighted.md", page)
    claims_text.fill_page(page, spec, judged)
    assert page.read_text() == (root / "docs/findings/utility_weighted.md").read_text()
    # Not by the letter: the last digits of a p-value depend on the libraries' versions.
    read = partial(pd.read_csv, keep_default_na=False)
    pd.testing.assert_frame_equal(read(copy / "claims.csv"), read(tables / "claims.csv"), rtol=1e-4)
