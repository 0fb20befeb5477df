"""The same decision on identical texts of several sources, and on texts that contradict the prompt.

Two checkpoints write different texts, so that a difference in what they decide on their own texts
may be one of the texts. Here each reads, teacher-forced, right texts, its own and the other's. And
does a network use the scratchpad that it writes? In texts whose last sum was changed it follows the
scratchpad, or goes by the prompt (as one must that has learned to skip steps).
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from analyses.streams import action_shift
from mechinterp.errors import TaskError
from mechinterp.files import write_table
from mechinterp.hooked import HookedModel
from mechinterp.rollouts import sample_answers
from mechinterp.tasks.arithmetic import Arithmetic
from mechinterp.tasks.base import Items
from probes.measures import mean_estimate

N_TEXTS = 1_000
PROBLEMS_AT_ONCE = 512


def measure_text_sources(
    networks: Mapping[str, HookedModel],
    task: Arithmetic,
    *,
    n_texts: int = N_TEXTS,
    temperature: float = 1.0,
    generator: torch.Generator,
) -> pd.DataFrame:
    """One row per reader, source and measure: value, low, high (95% over groups of texts), n_texts.

    Sources are "right", the `networks` by name, and "contradicting". Of what a network writes the
    texts with all running sums and an answer count, `n_texts`; without any it is no source, as
    after a collapse to answers without a scratchpad. Measures:

    accuracy, log_score   of the prompt's true digit (nats); in a text with a slip that is not the
                          digit that goes on from it
    probability           of the true digit at sampling, mean
    follows_scratchpad    in contradicting texts, the likeliest digit is that of the scratchpad
    follows_prompt        or that of the prompt
    """
    rows = []
    with TemporaryDirectory() as folder:
        sources: dict[str, Items] = {"right": task.sample(n_texts)}
        for name, network in networks.items():
            written = _write(network, task, n_texts, temperature, generator)
            path = Path(folder) / f"{name}.parquet"
            write_table(path, written)
            of_network = replace(task, texts=str(path))
            with suppress(TaskError):  # not one text to read: there is no such source
                sources[name] = of_network.sample(n_texts)
    pairs = replace(task, pairs="scratchpad").counterfactual_pairs(n_texts)
    for reader, network in networks.items():
        for source, items in sources.items():
            log_p = _log_probabilities(network, items, task)
            own = log_p.gather(1, items.labels[:, None])[:, 0]
            found = {
                "accuracy": (log_p.argmax(1) == items.labels).double(),
                "log_score": own,
                "probability": own.exp(),
            }
            rows += _rows(reader, source, found, items)
        likeliest = _log_probabilities(network, pairs.corrupt, task).argmax(1)
        found = {
            "follows_scratchpad": (likeliest == pairs.corrupt.labels).double(),
            "follows_prompt": (likeliest == pairs.clean.labels).double(),
        }
        rows += _rows(reader, "contradicting", found, pairs.clean)
    return pd.DataFrame(rows)


@torch.no_grad()
def _write(
    network: HookedModel,
    task: Arithmetic,
    n_texts: int,
    temperature: float,
    generator: torch.Generator,
) -> pd.DataFrame:
    """One completion of each of `n_texts` prompts with the task's number of terms."""
    problems = task.problems(n_texts, split="test", levels=[task.n_terms - 1])
    tables = []
    for index in torch.arange(len(problems)).split(PROBLEMS_AT_ONCE):
        part = problems.select(index)
        rollouts = sample_answers(
            network.model, task, part, temperature=temperature, generator=generator
        )
        tables.append(task.written_texts(part, rollouts.completions, rollouts.mask))
    return pd.concat(tables, ignore_index=True)


def _log_probabilities(
    network: HookedModel, items: Items, task: Arithmetic
) -> Float[Tensor, "items actions"]:
    """Among the actions."""
    actions = list(task.actions)
    logits = [
        network.forward(tokens, positions=-1)[:, actions].double()
        for tokens in items.tokens.split(PROBLEMS_AT_ONCE)
    ]
    return (torch.cat(logits) + action_shift(network, len(actions))).log_softmax(1)


def _rows(
    reader: str, source: str, found: Mapping[str, Float[Tensor, " items"]], items: Items
) -> list[dict[str, object]]:
    groups: Int[Tensor, " items"] = items.groups
    rows = []
    for measure, values in found.items():
        estimate = mean_estimate(values)
        low, high = estimate.interval(groups)
        cell = {"reader": reader, "source": source, "measure": measure, "value": estimate.value}
        rows.append({**cell, "low": low, "high": high, "n_texts": len(items)})
    return rows
