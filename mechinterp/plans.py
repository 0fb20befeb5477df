"""A study's file, of any kind, as a plan."""

from __future__ import annotations

from pathlib import Path

from mechinterp.reward_plan import make_reward_plan
from mechinterp.reward_spec import load_reward_study
from mechinterp.spec import load_study, read_yaml
from mechinterp.study_plan import Plan, make_plan


def load_plan(path: str | Path, *, preset: str | None = None) -> Plan:
    """What the file asks for: training by reward if it says `kind: reward`, else by a loss.

    Raises SpecError; runs nothing.
    """
    if read_yaml(path).get("kind") == "reward":
        return make_reward_plan(load_reward_study(path, preset=preset))
    return make_plan(load_study(path, preset=preset))
