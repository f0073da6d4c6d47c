"""The command line: it reads options, calls the library, shows what came back.

`score`, `demo`, `bench` and `doctor` load torch, the last two are in `commands/machine.py`.

Exit codes: 0 done; 1 an error; 2 usage; 3 the corpus; 4 the model or its template; 5 the run directory;
130 interrupted, everything finished kept.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from fastcompat import __version__
from fastcompat.commands.inspect import inspect
from fastcompat.commands.machine import bench, doctor
from fastcompat.commands.options import RunDirectory
from fastcompat.commands.results import rank, report, reproduce, select
from fastcompat.commands.score import score
from fastcompat.display import errors, say
from fastcompat.errors import FastcompatError, Interrupted

app = typer.Typer(
    name="fastcompat",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """The entry point: a user's mistake is one message and an exit code, never a traceback."""
    # A model's weights load with a bar of their own, and warnings that a scorer's user can do nothing about.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        app()
    except FastcompatError as error:
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        errors.print("interrupted; give the same command again to go on", highlight=False)
        sys.exit(Interrupted.exit_code)
    except OSError as error:  # standard output on a full disk, an input that vanished
        errors.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(1)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fastcompat {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it and exit.")
    ] = False,
) -> None:
    """Which response generator will teach a base model best, told before any training."""


app.command()(score)


app.command()(rank)
app.command()(select)
app.command()(report)
app.command()(reproduce)


@app.command()
def status(directory: RunDirectory) -> None:
    """What a run holds, how far each scorer is, and what could not be scored."""
    from fastcompat.display import counted_noun, show_reward_columns, show_statuses
    from fastcompat.store import open_run
    from fastcompat.verification import scorer_progress

    run = open_run(directory)
    n_files = sum(len(generation.files) for generation in run.generations)
    say(f"{run.n_rows:,} rows from {n_files:,} files in {len(run.units):,} units of work")
    show_reward_columns(run.reward_columns)
    for scorer in run.scorers():
        entry = scorer_progress(run, scorer)
        done = entry.n_rows == run.n_rows and not entry.n_begun_units
        state = "finished" if done else f"{entry.n_rows / max(run.n_rows, 1):.1%}"
        kind = scorer.kind.replace("_", " ")
        begun = f", {entry.n_begun_rows:,} of them in {counted_noun(entry.n_begun_units, 'unfinished unit')}"
        say(
            f"[bold]{escape(entry.name)}[/], {kind}: {state} · {entry.n_rows:,}/{run.n_rows:,} responses"
            + (begun if entry.n_begun_units else "")
        )
        told = {
            key: scorer.record["settings"].get(key)
            for key in ("dtype", "template", "token_ids", "head", "output", "read_out")
        }
        say(f"  [dim]{escape(' · '.join(f'{key} {value}' for key, value in told.items() if value is not None))}[/]")
        show_statuses(entry)
    if not run.scorers():
        say("no scorer yet")


@app.command()
def verify(directory: RunDirectory) -> None:
    """Check every file of a run against its manifest: exit code 0 when all is whole, 5 with a list when not."""
    from fastcompat.errors import RunError
    from fastcompat.store import open_run
    from fastcompat.verification import find_damage

    run = open_run(directory)
    damage = find_damage(run)
    for line in damage:
        errors.print(f"[red]damaged:[/] {escape(line)}", highlight=False, soft_wrap=True)
    if damage:
        raise RunError(f"{len(damage)} of the files of {directory} are damaged")
    n_parts = sum(len(scorer.finished()) for scorer in run.scorers())
    n_begun = sum(len(scorer.begun() - scorer.finished()) for scorer in run.scorers())
    say(
        f"whole: {run.n_rows:,} rows in {len(run.units):,} units, {n_parts:,} parts of {len(run.scorers())} scorers"
        + (f", {n_begun:,} unfinished" if n_begun else "")
    )


app.command()(inspect)


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="Keep the run here.", show_default="a temporary one"),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts; each is answered by every generator.")] = 500,
) -> None:
    """The whole job on the embedded corpus and models: offline, in about a minute."""
    from fastcompat.demo import model_directory, reward_model_directory
    from fastcompat.demo.corpus import write_corpus

    directory = output or Path(tempfile.mkdtemp(prefix="fastcompat-demo-")) / "run"
    corpus = directory.parent / f"{directory.name}-corpus"
    page = directory.parent / f"{directory.name}-report.html"
    if not (directory / "manifest.json").exists():
        write_corpus(corpus, n_prompts=prompts)
    base, judge = (
        os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
        for path in (model_directory(), reward_model_directory())
    )

    def command(text: str) -> None:
        say(f"\n[bold]$ fastcompat {escape(text)}[/]")

    say(
        "What Python's standard library says about itself, answered by several response generators;\n"
        "which of them would teach the small base model best?"
    )
    command(f"score {corpus} --base-model {base} --reward-model {judge} --keep-tokens -o {directory}")
    score(directory, [str(corpus)], [base], [judge], keep_tokens=True)
    command(f"rank {directory}")
    rank(directory)
    say(
        "\nThe judge is as small as the base model and often wrong (its MODEL_CARD.md says how often): look where\n"
        "other-function stands, whose answers are all about something else."
    )
    command(f"report {directory} -o {page}")
    report(directory, page)
    say(
        "\nOn your own data: [bold]fastcompat score YOUR_FILES --base-model Qwen/Qwen2.5-0.5B "
        "--reward-model Skywork/Skywork-Reward-V2-Qwen3-0.6B -o RUN[/],\n"
        "then [bold]fastcompat rank RUN[/], [bold]fastcompat report RUN[/], "
        "[bold]fastcompat select RUN -o best.jsonl[/]."
    )


app.command()(bench)
app.command()(doctor)
