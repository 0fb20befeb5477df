"""Synthetic tables of a study of training by reward, with the columns of real ones, for figures.

Their story: mixed and medium problems help, shortcuts harm; a binary reward saturates what is said.
"""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd

from mechinterp.randomness import derive_rng

CONTROLS = ("symmetric", "symmetric_reordered")
POOLS = (
    *("easy", "medium", "hard", "near_impossible", "near_impossible_shortcut"),
    *("impossible", "mixed"),
)
REWARDS = ("binary", "brier", "brier_routed", "log_score", "sft")
SETS = ("prior", "edge", "beyond", "shortcut")
STEPS = (50, 100, 150)
GAINS = {
    **{"easy": 4, "medium": 15, "hard": 9, "near_impossible": 2, "near_impossible_shortcut": -20},
    **{"mixed": 26, "symmetric": 1},
}  # points
READINGS = ("said", "said_recalibrated", "answer", "answer_temperature", "probe")


def writing_tables(
    *,
    pools: tuple[str, ...] = POOLS,
    advantages: tuple[str, ...] = ("standardised", "centred"),
    seeds: int = 8,
    steps: tuple[int, ...] = STEPS,
    sets: tuple[str, ...] = SETS,
    n_steps: int = 150,
) -> dict[str, pd.DataFrame]:
    """Tables `writing`, `training` and `text_sources` of a study of hard samples."""
    by_reward = [_arm(pool, advantage, advantages) for pool in pools for advantage in advantages]
    arms, last = [*CONTROLS, *by_reward], steps[-1]
    runs = list(itertools.product(arms, range(seeds)))
    measured = [(arm, seed, step) for arm, seed in runs for step in steps]
    measured = [run for run in measured if run[0] != CONTROLS[1] or run[2] == last]
    measured += [("before", seed, 0) for seed in range(seeds)]
    return {
        "writing": pd.DataFrame([row for run in measured for row in _writing(*run, last, sets)]),
        "training": pd.DataFrame(
            [row for run in runs for row in _training(*run, n_steps, run[0] in by_reward)]
        ),
        "text_sources": pd.DataFrame([row for run in runs for row in _text_sources(*run, last)]),
    }


def confidence_tables(
    *,
    arms: tuple[str, ...] = (*CONTROLS, *REWARDS),
    seeds: int = 8,
    steps: tuple[int, ...] = (75, 300),
    questions: tuple[str, ...] = ("as_learned", "fewer", "unreliable"),
) -> dict[str, pd.DataFrame]:
    """Tables `stated_confidence` and `stated_reliability` of a study of calibration."""
    runs = list(itertools.product(arms, range(seeds), steps))
    runs += [("before", seed, 0) for seed in range(seeds)]
    cells = list(itertools.product(runs, questions, READINGS))
    return {
        "stated_confidence": pd.DataFrame([row for cell in cells for row in _confidence(*cell)]),
        "stated_reliability": pd.DataFrame([row for cell in cells for row in _reliability(*cell)]),
    }


def _arm(pool, advantage, advantages):
    return f"{pool}_{advantage}" if len(advantages) > 1 else pool


def _pool(arm):
    return arm.removesuffix("_standardised").removesuffix("_centred")


def _key(task, arm, seed, step):
    return {"task": task, "regime": "branched", "arm": arm, "seed": seed, "step": step}


def _noise(*labels, scale=0.02, size=None):
    return derive_rng(0, *labels).normal(0, scale, size)


def _writing(arm, seed, step, last, sets):
    gain = GAINS.get(_pool(arm), 0) / 100 * (0.7 if arm.endswith("centred") else 1.0)
    for index, problems in enumerate(sets):
        start = {
            **{"pass_1": 0.7 - 0.2 * index, "pass_k": 0.8 - 0.2 * index, "repetition": 0.03},
            **{"steps_missing": 0.1 * index, "steps_wrong": 0.25, "response_length": 6.0 + index},
            **{"entropy": 0.5, "unended": 0.01, "kl": 0.0},
        }
        moved = gain * step / last
        change = {"pass_1": moved, "pass_k": moved, "steps_wrong": -moved / 2}
        if gain < 0:
            change |= {"repetition": -2 * moved, "response_length": 12 * moved}
        for measure, value in start.items():
            label = ("writing", arm, seed, step, problems, measure)
            value += change.get(measure, 0) + _noise("start", seed, problems, measure)
            value = max(value + _noise(*label) * (step > 0), 0)
            yield {
                **_key("arithmetic", arm, seed, step),
                **{"measure": measure, "value": value, "low": value - 0.04, "high": value + 0.04},
                **{"n_problems": 128, "n_samples": 4, "problems": problems},
            }


def _training(arm, seed, n_steps, by_reward):
    gain = GAINS.get(_pool(arm), 0) / 100
    for step in range(n_steps):
        key = _key("arithmetic", arm, seed, step)
        row = {**key, "loss": 0.1, "learning_rate": 3e-4, "gradient_norm": 0.8}
        if by_reward:
            at = step / n_steps
            noise = _noise("training", arm, seed, step, scale=0.04, size=8)
            correct = np.clip(0.3 + gain * at + noise[0], 0, 1)
            row |= {
                **{"reward": correct, "correct": correct, "solved": min(1, correct + 0.2)},
                **{"degenerate": np.clip(1 - 2 * correct, 0, 1), "lone": 0.1 + abs(noise[1])},
                **{"length": 9 + 4 * gain * at + noise[2], "entropy": 0.5 - gain * at + noise[3]},
                **{"repetition": 0.2 + noise[4], "steps_missing": abs(noise[5])},
                **{"steps_wrong": 0.25 + noise[6], "gradient_norm": 0.8 + noise[7]},
                **{"kl": gain**2 * at if step % 10 == 0 else np.nan, "correct_level_1": 0.5},
            }
        yield row


def _text_sources(arm, seed, step):
    gain = GAINS.get(_pool(arm), 0) / 100
    for reader, source in itertools.product(("before", "after"), ("right", "before", "after")):
        value = {"right": 0.9, "before": 0.6, "after": 0.6 + gain}[source]
        value += gain / 2 * (reader == "after") + _noise("texts", arm, seed, reader, source)
        value = float(np.clip(value, 0, 1))
        for measure, found in (
            *(("accuracy", value), ("log_score", value - 1)),
            ("probability", 0.9 * value),
        ):
            yield _read(arm, seed, step, reader, source, measure, found)
    for reader in ("before", "after"):
        skips = max(-3 * gain, 0.05) * (reader == "after") + abs(_noise("skips", arm, seed, reader))
        yield _read(arm, seed, step, reader, "contradicting", "follows_scratchpad", 1 - skips)
        yield _read(arm, seed, step, reader, "contradicting", "follows_prompt", skips / 2)


def _read(arm, seed, step, reader, source, measure, value):
    return {
        **_key("step", arm, seed, step),
        **{"reader": reader, "source": source, "measure": measure, "value": value},
        **{"low": value - 0.02, "high": value + 0.02, "n_texts": 1000},
    }


def _bend(arm, questions, reading):
    """By how much a reading is off."""
    said = {"before": 0.5, "binary": 0.45, "log_score": 0.2, "brier": 0.06, "brier_routed": 0.04}
    off = said.get(arm, 0.1) if reading == "said" else 0.03
    return off + {"as_learned": 0.0}.get(questions, 0.08)


def _confidence(run, questions, reading):
    arm, seed, step = run
    off = _bend(arm, questions, reading)
    missing = arm == "sft" and reading == "said" and questions == "unreliable"
    measures = {
        **{"accuracy": 0.7, "ece": off, "ece_debiased": off - 0.01, "brier": 0.2 + off**2},
        **{"reliability": off**2, "resolution": 0.08 - 0.1 * off, "auroc": 0.85 - 0.5 * off},
        **{"saturated": 0.9 if arm == "binary" and reading == "said" else 0.1, "mean": 0.6},
        **{"truth_gap": 0.05 + off},
    }
    for measure, value in measures.items():
        value += _noise("confidence", *run, questions, reading, measure, scale=0.01)
        yield {
            **_key("questions", arm, seed, step),
            **{"questions": questions, "reading": reading, "measure": measure},
            **{"value": np.nan if missing and measure != "accuracy" else value},
            "n_questions": 3000,
        }


def _reliability(run, questions, reading):
    arm, seed, step = run
    off = _bend(arm, questions, reading)
    saturated = arm == "binary" and reading == "said"
    for index in (0, 8, 9) if saturated else range(10):
        predicted = (index + 0.5) / 10
        observed = (
            (1 - off) * predicted + off * 0.7 + _noise("bins", *run, questions, reading, index)
        )
        yield {
            **_key("questions", arm, seed, step),
            **{"questions": questions, "reading": reading, "bin": index, "predicted": predicted},
            "observed": float(np.clip(observed, 0, 1)),
            "n_items": int(40 + 900 * ((index - 4.5) / 4.5) ** 2),
        }
