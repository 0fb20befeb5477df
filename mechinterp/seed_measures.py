"""One number per run for everything that a claim may rest on, from a study's tables.

Columns task, regime, arm, costs, seed, measure, value; costs are "" where a measure knows none.

    learning, choosing, ...  the ladder's losses where an arm ends, in log score, as shares of
                             (oracle - best constant)
    regret                   all that is lost in utility: what the task's user feels
    steps_to_learn           log2 of the steps after which half of the learning is done that the
                             control of the same seed does in all, from initialisation
    needed_information       bits about the latents that the decision depends on, and about the
    unneeded_information     others: the best layer's probe (V-information), mean over latents
    calibration_error        debiased, at the costs
    recovery_overlap         weighted Jaccard of the recovery maps of before and after, all grains
    circuit_mismatch         CMD of the circuit of before, run in the network after
    crossing_front           share of the change that the layers before the cut carry, where valid
    gradient_snr             log2 of signal to noise of a batch gradient by the arm's objective,
                             mean over the *control's* checkpoints, shifted to its costs ex post:
                             objectives at the same weights and decisions
    gradient_needed          share of these gradients along the needed latents, mean over the layers
                             before the last, where all objectives push along the readout
    incentive_slope          see `analyses.incentives`: below zero if knowledge suffers most where
                             the incentive to learn falls most

Of training by reward, where `task` is a set of problems or a shift of the questions:

    written_pass_1 ...       what is written where an arm ends, see `analyses.writing`
    change_pass_1 ...        the same less that of the start of the same seed
    said_ece, probe_auroc    of confidences that are stated or read, by reading and measure, see
                             `analyses.stated_confidence`
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import numpy as np

from mechinterp.arm_names import CONTROL

if TYPE_CHECKING:
    import pandas as pd

WRITTEN = (
    *("pass_1", "pass_k", "repetition", "steps_missing", "steps_wrong", "response_length"),
    *("entropy", "unended", "kl"),
)
READINGS = ("said", "said_recalibrated", "answer", "answer_temperature", "probe")
CONFIDENCE = (
    *("accuracy", "ece", "ece_debiased", "brier", "reliability", "resolution", "auroc"),
    *("saturated", "mean", "truth_gap"),
)
MEASURES = (
    *("learning", "choosing", "threshold", "readout", "discarded", "not_encoded", "not_combined"),
    *("total", "regret", "steps_to_learn", "needed_information", "unneeded_information"),
    *("calibration_error", "recovery_overlap", "circuit_mismatch", "crossing_front"),
    *("gradient_snr", "gradient_needed", "incentive_slope"),
    *(f"written_{measure}" for measure in WRITTEN),
    *(f"change_{measure}" for measure in WRITTEN),
    *(f"{reading}_{measure}" for reading in READINGS for measure in CONFIDENCE),
)
RUN = ["task", "regime", "arm", "seed"]
COLUMNS = ["task", "regime", "arm", "costs", "seed", "measure", "value"]
HALF = 0.5  # of the control's learning: what steps_to_learn waits for
Tables = Mapping[str, "pd.DataFrame"]


def seed_measures(tables: Tables) -> pd.DataFrame:
    """Every measure that `tables` allow, in the order of the docstring."""
    import pandas as pd

    parts = [
        measure(tables) for needed, measure in _MEASURES if all(name in tables for name in needed)
    ]
    table = pd.concat(parts, ignore_index=True)[COLUMNS]
    return table.dropna(subset=["value"]).sort_values(COLUMNS[:-1], ignore_index=True)


def _losses(tables: Tables) -> pd.DataFrame:
    """Where each arm ends, on all items."""
    import pandas as pd

    final = _at_the_end(tables["losses_in_full"])
    scores = final[final["currency"] == "log_score"].assign(measure=lambda t: t["loss"])
    total = final[(final["currency"] == "utility") & (final["loss"] == "total")]
    return pd.concat([scores, total.assign(measure="regret")])


def _steps_to_learn(tables: Tables) -> pd.DataFrame:
    """A run that never gets there counts with its last step, the least that it can have taken."""
    losses = tables["losses"]
    losses = losses[
        (losses["regime"] == "from_init")
        & (losses["currency"] == "log_score")
        & (losses["loss"] == "learning")
    ]
    curves = losses.pivot_table(index=[*RUN, "costs"], columns="step", values="value")
    rows = []
    for (task, regime, arm, seed, costs), curve in curves.iterrows():  # type: ignore[misc]
        reference = (task, regime, CONTROL, seed, costs)
        if reference not in curves.index:
            continue
        control = curves.xs(reference).dropna()
        if not curve.dropna().index.equals(control.index):  # refits are read where the control ends
            continue
        goal = control.iloc[0] + HALF * (control.iloc[-1] - control.iloc[0])
        known = curve.dropna()
        steps = crossing_step(known.index.to_numpy(float), known.to_numpy(float), goal)
        rows.append((task, regime, arm, costs, seed, "steps_to_learn", np.log2(steps)))
    import pandas as pd

    return pd.DataFrame(rows, columns=COLUMNS)


def crossing_step(steps: np.ndarray, losses: np.ndarray, goal: float) -> float:
    """Where a curve first falls to `goal`; its last step if it never does.

    Linear between checkpoints in log2(1 + step), on which checkpoints are evenly spaced.
    """
    below = np.flatnonzero(losses <= goal)
    if not len(below):
        return float(steps[-1])
    last = int(below[0])
    if last == 0:
        return float(max(steps[0], 1))
    x = np.log2(1 + steps[last - 1 : last + 1])
    y = losses[last - 1 : last + 1]
    share = (y[0] - goal) / (y[0] - y[1])
    return float(max(2 ** (x[0] + share * (x[1] - x[0])) - 1, 1))


def _information(tables: Tables) -> pd.DataFrame:
    probes = _at_the_end(tables["probes"])
    probes = probes[(probes["kind"] == "latent") & (probes["measure"] == "information")]
    probes = probes[probes["layer"] > 0]
    best = probes.groupby([*RUN, "needed", "latent"], as_index=False)["value"].max()
    mean = best.groupby([*RUN, "needed"], as_index=False)["value"].mean()
    names = mean["needed"].map({True: "needed_information", False: "unneeded_information"})
    return mean.assign(costs="", measure=names)


def _calibration(tables: Tables) -> pd.DataFrame:
    summary = _at_the_end(tables["calibration_summary"])
    return summary.assign(measure="calibration_error", value=summary["ece_debiased"])


def _recovery_overlap(tables: Tables) -> pd.DataFrame:
    maps = tables["patching"]
    maps = maps[(maps["regime"] == "branched") & (maps["latent"] == "all")]
    cells = maps.pivot_table(
        index=[*RUN, "grain", "layer", "unit"], columns="checkpoint", values="recovery"
    )
    if not {"before", "after"} <= set(cells.columns):
        return _nothing()
    size = cells[["before", "after"]].dropna().abs()
    both = size.assign(smaller=size.min(axis=1), larger=size.max(axis=1)).groupby(RUN).sum()
    overlap = (both["smaller"] / both["larger"]).rename("value").reset_index()
    return overlap.assign(costs="", measure="recovery_overlap")


def _circuit_mismatch(tables: Tables) -> pd.DataFrame:
    runs = tables["crosswise_faithfulness"]
    crossed = runs[
        (runs["circuit"] == "before") & (runs["model"] == "after") & (runs["kind"] == "scored")
    ]
    return crossed.assign(costs="", measure="circuit_mismatch", value=crossed["cmd"])


def _crossing_front(tables: Tables) -> pd.DataFrame:
    crossing = tables["crossing"]
    cut = crossing[
        crossing["verdict_cut"]
        & crossing["shares_valid"]
        & (crossing["stitch"] == "identity")
        & (crossing["currency"] == "log_score")
        & (crossing["readout"] == "raw")
        & ~crossing["null"]
    ]
    share = cut["phi_front"] / (cut["phi_front"] + cut["phi_back"])
    return cut.assign(measure="crossing_front", value=share)


def _gradients(tables: Tables) -> pd.DataFrame:
    """Objectives side by side at the control's checkpoints, under the names of their arms."""
    import pandas as pd

    snr = tables["gradients"]
    snr = snr[(snr["part"] == "all") & (snr["measure"] == "snr") & (snr["arm"] == CONTROL)]
    snr = snr.assign(value=np.log2(snr["value"].clip(lower=1e-3)), measure="gradient_snr")
    latents = tables["gradients_latents"]
    needed = latents[
        (latents["latent"] == "all needed")
        & (latents["measure"] == "share")
        & (latents["arm"] == CONTROL)
        & (latents["layer"] < latents.groupby("task")["layer"].transform("max"))
    ]
    both = pd.concat([snr, needed.assign(measure="gradient_needed")])
    keys = ["task", "regime", "seed", "objective", "measure"]
    mean = both.groupby(keys)["value"].mean().reset_index()
    return mean.assign(arm=mean["objective"], costs="")


def _incentive_slope(tables: Tables) -> pd.DataFrame:
    from analyses.incentives import incentive_slope

    slopes = incentive_slope(_at_the_end(tables["incentives"]))
    return slopes.assign(measure="incentive_slope", value=slopes["slope"])


def _written(tables: Tables) -> pd.DataFrame:
    """Where each arm ends, and how far that is from the start of the same seed."""
    import pandas as pd

    written = tables["writing"].assign(task=tables["writing"]["problems"], costs="")
    keys = ["task", "regime", "seed", "measure"]
    before = written.loc[written["arm"] == "before", [*keys, "value"]]
    final = _at_the_end(written)
    change = final.merge(before, on=keys, suffixes=("", "_before"))
    change["value"] -= change["value_before"]
    return pd.concat(
        [
            final.assign(measure="written_" + final["measure"]),
            change.assign(measure="change_" + change["measure"]),
        ]
    )


def _confidence(tables: Tables) -> pd.DataFrame:
    table = _at_the_end(tables["stated_confidence"])
    measure = table["reading"] + "_" + table["measure"]
    return table.assign(task=table["questions"], costs="", measure=measure)


def _at_the_end(table: pd.DataFrame) -> pd.DataFrame:
    table = table[table["arm"] != "before"]
    last = table.groupby(["task", "regime", "arm"])["step"].transform("max")
    return table[table["step"] == last]


def _nothing() -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(columns=COLUMNS)


_MEASURES: tuple[tuple[tuple[str, ...], Callable[[Tables], pd.DataFrame]], ...] = (
    (("losses_in_full",), _losses),
    (("losses",), _steps_to_learn),
    (("probes",), _information),
    (("calibration_summary",), _calibration),
    (("patching",), _recovery_overlap),
    (("crosswise_faithfulness",), _circuit_mismatch),
    (("crossing",), _crossing_front),
    (("gradients", "gradients_latents"), _gradients),
    (("incentives",), _incentive_slope),
    (("writing",), _written),
    (("stated_confidence",), _confidence),
)
