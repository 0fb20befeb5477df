"""Commands that test the instrument itself: damage put in on purpose, and verdicts on it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Optional

import typer

from mechinterp.cli_options import Checkpoint, Preset, Task, Workers, command_line

app = typer.Typer()


@app.command()
def lesion(
    checkpoint: Checkpoint,
    dose: Annotated[
        str, typer.Argument(help="KIND=DOSE such as shift=2, several joined by +; see `lesions`.")
    ],
    task: Task,
    out: Annotated[Path, typer.Option("--out", help="Directory of the new checkpoint.")],
    seed: Annotated[int, typer.Option(help="Of the lesion's random part.")] = 0,
) -> None:
    """Damage a checkpoint in a known way and by a set dose; the result is a checkpoint."""
    from mechinterp.checkpoints import Provenance, open_checkpoint, save_checkpoint
    from mechinterp.hooked import HookedModel
    from mechinterp.lesions import Subject, damage, parse_doses, side_of
    from mechinterp.randomness import derive_generator
    from mechinterp.spec import load_task

    doses = parse_doses(dose)
    opened = open_checkpoint(checkpoint)
    subject = Subject(HookedModel.from_checkpoint(opened), load_task(task).make_for(opened))
    model = damage(subject, doses, generator=derive_generator(seed, "lesion", dose))
    came_from = opened.provenance or Provenance()
    provenance = Provenance(
        task=came_from.task,
        seed=came_from.seed,
        step=came_from.step,
        parent_hash=opened.content_hash,
        extra={"lesion": dose},
    )
    tokenizer = opened if opened.has_tokenizer else None
    saved = save_checkpoint(model, out, provenance=provenance, tokenizer=tokenizer)
    print(f"{saved.path}\ndamages: {side_of(doses)}")


@app.command()
def lesions() -> None:
    """List the kinds of lesions: what each damages, and what its dose means."""
    from mechinterp.lesions import LESIONS

    for name, kind in LESIONS.items():
        print(f"{name:14} {kind.side:10} {kind.dose}")


@app.command()
def validate(
    spec: Annotated[Path, typer.Argument(help="Validation spec (.yaml).")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for tables and figures. Default: results/<spec>."),
    ] = None,
    preset: Preset = None,
    workers: Workers = None,
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for a copy of the tables, for a page."),
    ] = None,
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Page (.md) whose marked places are rewritten from the tables."),
    ] = None,
) -> None:
    """How often is the verdict right? On networks that are damaged in known ways, or not at all.

    Whatever is done is not done again: the same command goes on after an interruption.
    """
    from mechinterp.files import write_table
    from mechinterp.validation import run_validation
    from mechinterp.validity import fill_validity_page, rates_text

    tables = run_validation(
        spec,
        out=out or Path("results", spec.stem),
        preset=preset,
        n_workers=workers or os.cpu_count() or 1,
        command=command_line(),
    )
    if keep is not None:
        for name, table in tables.items():
            write_table(keep / f"{name}.parquet", table)
    if page is not None:
        fill_validity_page(page, tables)
    print(rates_text(tables["rates"]))
