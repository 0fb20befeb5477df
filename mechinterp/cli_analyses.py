"""Commands that ask one question of one, two or three checkpoints; heavy libraries load inside."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mechinterp.cli_options import After, Checkpoint, Control, Out, Task, Threads

app = typer.Typer()


class Positions(enum.StrEnum):
    """Where along the prompt to probe."""

    decision = "decision"
    all = "all"


@app.command()
def probe(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    positions: Annotated[
        Positions, typer.Option(help="The decision's alone, or all: a map by layer and position.")
    ] = Positions.decision,
    threads: Threads = 1,
) -> None:
    """Linear probes for every latent at every layer, beside a control task and a random network."""
    analysis = "probes" if positions is Positions.decision else "probe_positions"
    _analyse(analysis, analysis, before, after, control, task, out, threads)


@app.command()
def represent(
    before: Checkpoint,
    after: Annotated[Path, typer.Argument(help="Checkpoint directory to compare with.")],
    task: Task,
    out: Out,
    control: Control = None,
    threads: Threads = 1,
) -> None:
    """What training did to the representation: information lost, directions moved, geometry."""
    _analyse("representation", "representation", before, after, control, task, out, threads)


@app.command()
def erase(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    threads: Threads = 1,
) -> None:
    """What the decision loses when a latent is erased at a layer, beside two controls."""
    _analyse("erasure", "erasure", before, after, control, task, out, threads)


@app.command()
def separate(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    threads: Threads = 1,
) -> None:
    """Prune what carries the decision, and what carries the latents: what does the other lose?"""
    _analyse("separability", "separability", before, after, control, task, out, threads)


@app.command()
def steer(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    positions: Annotated[str, typer.Option(help="decision or all: where to add.")] = "decision",
    threads: Threads = 1,
) -> None:
    """Steer along each latent's direction: is what is decodable at a layer used there?"""
    options = {"positions": positions}
    _analyse("use", "use", before, after, control, task, out, threads, options=options)


@app.command()
def repair(
    before: Checkpoint,
    after: Annotated[Path, typer.Argument(help="Checkpoint directory to repair.")],
    task: Task,
    out: Out,
    control: Control = None,
    threads: Threads = 1,
) -> None:
    """Train adapters on few items: where, how fast, by what rank is what was lost regained?"""
    _analyse("repair", "repair", before, after, control, task, out, threads)


@app.command()
def patch(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    grain: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            help="resid_pre, resid_mid, resid_post, attn_out, mlp_out, head, q, k, v, pattern or "
            "neuron; repeatable. Default: the task file's patch_grains."
        ),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Exact recovery maps on counterfactual pairs: layer by position, and layer by head."""
    changes = {"patch_grains": grain} if grain else None
    _analyse("patching", "recovery", before, after, control, task, out, threads, changes)


@app.command()
def grafts(
    before: Checkpoint,
    after: Checkpoint,
    task: Task,
    out: Out,
    parts: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            help="component (heads, MLPs, norms, embeddings), sublayer or block. Default: the task "
            "file's graft_parts."
        ),
    ] = None,
    threads: Threads = 1,
) -> None:
    """Exchange the weights of one part at a time, both ways: which part carries the change?"""
    changes = {"graft_parts": parts} if parts else None
    _analyse("grafts", "grafts", before, after, None, task, out, threads, changes)


@app.command()
def circuits(
    before: Checkpoint,
    task: Task,
    out: Out,
    after: After = None,
    control: Control = None,
    threads: Threads = 1,
) -> None:
    """The edges that carry the decision, how much of it they keep, and whether they are the same
    after."""
    _analyse("circuits", "circuits", before, after, control, task, out, threads)


@app.command()
def capture(
    checkpoint: Checkpoint,
    task: Task,
    out: Annotated[Path, typer.Option("--out", help="Directory of the store.")],
    sites: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A grain (resid_post) or site (head.2.5); repeatable, or with commas."),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Of the grains: 3, 0-5 or 0-5,11. Default: all."),
    ] = None,
    positions: Annotated[
        str, typer.Option(help="decision, last, all, or indexes such as 0,-1.")
    ] = "decision",
    items: Annotated[int, typer.Option(help="How many of the task's items.", min=1)] = 1000,
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "test",
    seed: Annotated[int, typer.Option(help="Of the items.")] = 0,
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float32",
    batch_size: Annotated[int, typer.Option(help="Items run at once.", min=1)] = 32,
    attention: Annotated[str, typer.Option(help="eager or sdpa.")] = "eager",
    threads: Threads = 1,
) -> None:
    """Stream activations to disk in one forward pass; after an interruption, go on from there."""
    from mechinterp.threads import limit_threads

    limit_threads(threads)
    from mechinterp.store.command import capture_task

    store = capture_task(
        checkpoint,
        task=task,
        out=out,
        sites=sites or ["resid_post"],
        layers=layers,
        positions=positions,
        n_items=items,
        split=split,
        seed=seed,
        dtype=dtype,
        batch_size=batch_size,
        attn_implementation=attention,
    )
    print(store.describe())


def _analyse(
    analysis: str,
    figure: str,
    before: Path,
    after: Path | None,
    control: Path | None,
    task: str,
    out: Path,
    threads: int,
    changes: dict[str, Any] | None = None,
    options: dict[str, Any] | None = None,
) -> None:
    from functools import partial
    from importlib import import_module

    from mechinterp.threads import limit_threads

    limit_threads(threads)
    from analyses.pair import write_analysis

    write_analysis(
        partial(import_module(f"analyses.{analysis}").pair_tables, **(options or {})),
        figure=figure,
        out=out,
        before=before,
        after=after,
        control=control,
        task=task,
        changes=changes,
    )
