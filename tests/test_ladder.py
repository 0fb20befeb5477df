"""The value ladder's tables; its rungs are held to their answers in test_known_answers.py."""

from __future__ import annotations

import pytest
import torch

from analyses.ladder import LOSSES, RUNGS, Ladder, losses_table


def test_where_no_decision_is_worth_more_than_the_best_constant_there_are_no_shares():
    """Such as where every posterior lies on one side of the threshold."""
    worth = {rung: torch.full((4,), float(i)) for i, rung in enumerate(RUNGS)}
    values = {"utility": worth, "log_score": worth}
    ladder = Ladder("w1.98", values, {"utility": 0.0, "log_score": 7.0}, True, {})
    table = losses_table({"w1.98": ladder})
    assert set(table["currency"]) == {"log_score"}
    assert set(table["loss"]) == set(LOSSES)
    assert table.set_index("loss").loc["total", "value"] == pytest.approx(5 / 7)
