"""The command line: it reads options, calls the library, shows what came back.

`score`, `demo`, `bench` and `doctor` load torch, the last two are in `commands/machine.py`.

Exit codes: 0 done; 1 an error; 2 usage; 3 the corpus; 4 the model or its template; 5 the run directory;
130 interrupted, everything finished kept.
"""

from __future__ import annotations

import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fastcompat import __version__
from fastcompat.commands.machine import bench, doctor
from fastcompat.commands.options import (
    Average,
    Bos,
    Device,
    Dtype,
    Map,
    MaxLength,
    RunDirectory,
    Template,
    TokenBudget,
    Turns,
)
from fastcompat.display import TableFormat, console, errors, say
from fastcompat.errors import FastcompatError, Interrupted, UsageError

if TYPE_CHECKING:
    from fastcompat.corpus import PreparationProgress
    from fastcompat.scorer import Scorer
    from fastcompat.session import Worker
    from fastcompat.store import Run

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


@app.command()
def score(
    output: Annotated[Path, typer.Option("--output", "-o", metavar="RUN", help="The run directory: made, or resumed.")],
    base_model: Annotated[list[str], typer.Option("--base-model", metavar="ID_OR_DIR", help="Repeatable.")],
    inputs: Annotated[
        list[str] | None,
        typer.Argument(metavar="INPUT...", help="Files, directories, globs or hf:// ids. None: resume RUN."),
    ] = None,
    mapping: Map = None,
    template: Template = "auto",
    turns: Annotated[Turns, typer.Option(help="The assistant turns that are scored.")] = Turns.last,
    score_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = True,
    bos: Annotated[Bos, typer.Option(help="auto: as the tokenizer does; one: exactly one; none.")] = Bos.auto,
    max_length: MaxLength = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    token_budget: TokenBudget = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the models on the hub.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at the first row that cannot be read.")] = False,
    extend: Annotated[bool, typer.Option("--extend", help="Add INPUTs that RUN does not have yet.")] = False,
    worker: Annotated[
        str, typer.Option(metavar="I/N", help="This process's share, when N processes work on one RUN.")
    ] = "1/1",
) -> None:
    """Score a corpus: the base model's loss on every response, into a run directory.

    The same command resumes a run that was interrupted, and adds another model, template or setting beside what is
    finished. Rows that cannot be scored stay in the output with the reason.
    """
    from transformers.utils import logging as transformers_logging

    from fastcompat.corpus.formats import parse_overrides
    from fastcompat.display import LiveDisplay, show_corpus
    from fastcompat.scorer import Scorer
    from fastcompat.session import CorpusSettings, prepare_run

    transformers_logging.disable_progress_bar()
    share = parse_worker(worker)
    settings = CorpusSettings(overrides=parse_overrides(mapping or []), strict=strict)
    # A missing model, an unsupported architecture or a wrong template shows here, not after hours of reading.
    scorers = [
        Scorer(
            model,
            device=device,
            dtype=dtype,
            token_budget=token_budget,
            template=template,
            turns=turns.value,
            score_eos=score_eos,
            bos=bos.value,
            max_length=max_length,
            revision=revision,
        )
        for model in base_model
    ]
    with stopping() as stop:
        if extend or not (output / "manifest.json").exists():
            _ = scorers[0].model  # a checkpoint that lacks weights, or cannot be packed, shows before hours of reading
        display = LiveDisplay("corpus")

        def preparing(progress: PreparationProgress) -> None:
            display.preparing(progress)
            if stop():
                raise Interrupted("interrupted while the corpus was prepared; give the same command again")

        with display.showing():
            run, summary = prepare_run(output, inputs or [], settings, extend=extend, on_progress=preparing)
        if summary is not None:
            show_corpus(summary, time.monotonic() - display.began)
        for scorer in scorers:
            score_model(run, scorer, token_budget=token_budget, worker=share, stop=stop)
            scorer.unload()  # the next model needs the room
    say(f"\nNext: [bold]fastcompat rank {escape(str(output))}[/]")


def score_model(
    run: Run, scorer: Scorer, *, token_budget: int | None, worker: Worker, stop: Callable[[], bool]
) -> None:
    """Work off one base model, with its progress on the screen."""
    from fastcompat.display import LiveDisplay, duration, figures_of, saved_share, show_statuses
    from fastcompat.engine import Progress
    from fastcompat.session import open_scorer, score_corpus
    from fastcompat.verification import scorer_progress

    say(
        f"\n[bold]{escape(scorer.name)}[/] · {scorer.identity['dtype']} on {scorer.device} · "
        f"template: {escape(scorer.tokenizer.description)}"
    )
    store, budget = open_scorer(run, scorer, token_budget=token_budget)
    display = LiveDisplay(scorer.name)
    progress = Progress(notify=display.scoring)
    try:
        with display.showing():
            score_corpus(run, scorer, store, token_budget=budget, worker=worker, progress=progress, stop=stop)
    except Interrupted:
        say(figures_of(progress))
        raise Interrupted(
            f"interrupted; everything finished is in {run.directory}. Give the same command again to go on."
        ) from None
    if not progress.n_rows:
        say(
            f"all {progress.n_rows_total:,} responses were scored before"
            if progress.n_rows_total
            else "nothing to score: this worker's share is empty"
        )
        return
    say(
        f"{progress.n_rows:,} responses in {duration(progress.seconds)} · "
        f"{progress.n_tokens / progress.seconds:,.0f} tokens/s · "
        f"{saved_share(progress):.0%} of {progress.n_unshared_tokens:,} tokens saved by sharing"
        + (f" · {progress.n_rows_skipped:,} were scored before" if progress.n_rows_skipped else "")
    )
    show_statuses(scorer_progress(run, store))


@app.command()
def rank(
    directory: RunDirectory,
    by: Annotated[str, typer.Option(help="The column whose values are ranked.")] = "generator",
    average: Annotated[Average, typer.Option(help="Mean over responses or over tokens.")] = Average.response,
    draws: Annotated[int, typer.Option(min=10, help="Bootstrap draws.")] = 1000,
    format: Annotated[TableFormat, typer.Option("--format", help="How the ranking is written.")] = TableFormat.table,
) -> None:
    """Rank the generators of a run by mean loss, the most compatible first."""
    from fastcompat.display import write_ranking
    from fastcompat.ranking import rank as rank_scores
    from fastcompat.store import open_run

    run = open_run(directory)
    scores = run.scores()
    if not scores.num_rows:
        raise UsageError(f"{directory} has no scores yet: fastcompat score -o {directory} --base-model ID_OR_DIR")
    ranking = rank_scores(scores, by=by, average=average.value, draws=draws)
    write_ranking(ranking, by, average.value, draws, format)
    n_pending = sum(run.n_rows - sum(u.n_rows for u in run.units if u.name in s.finished()) for s in run.scorers())
    if n_pending:
        errors.print(f"[yellow]note:[/] {n_pending:,} responses are not scored yet", highlight=False)


@app.command()
def status(directory: RunDirectory) -> None:
    """What a run holds, how far each scorer is, and what could not be scored."""
    from fastcompat.display import show_statuses
    from fastcompat.store import open_run
    from fastcompat.verification import scorer_progress

    run = open_run(directory)
    n_files = sum(len(generation.files) for generation in run.generations)
    say(f"{run.n_rows:,} rows from {n_files:,} files in {len(run.units):,} units of work")
    for scorer in run.scorers():
        entry = scorer_progress(run, scorer)
        state = "finished" if entry.n_rows == run.n_rows else f"{entry.n_rows / max(run.n_rows, 1):.1%}"
        say(f"[bold]{escape(entry.name)}[/]: {state} · {entry.n_rows:,}/{run.n_rows:,} responses")
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
    say(f"whole: {run.n_rows:,} rows in {len(run.units):,} units, {n_parts:,} parts of {len(run.scorers())} scorers")


@app.command()
def inspect(
    input: Annotated[str, typer.Argument(metavar="INPUT", help="A file, directory, glob or hf:// id.")],
    base_model: Annotated[str, typer.Option("--base-model", metavar="ID_OR_DIR")],
    row: Annotated[int, typer.Option(min=0, help="Which response, counted from 0 over all files.")] = 0,
    mapping: Map = None,
    template: Template = "auto",
    turns: Annotated[Turns, typer.Option(help="The assistant turns that are scored.")] = Turns.last,
    score_eos: Annotated[bool, typer.Option(help="Score the end-of-turn token too.")] = True,
    bos: Annotated[Bos, typer.Option(help="auto, one or none.")] = Bos.auto,
    max_length: MaxLength = None,
    ids: Annotated[bool, typer.Option("--ids", help="Also list the token ids.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")] = None,
) -> None:
    """Show one row, its tokens, and which of them are scored."""
    from itertools import islice

    from fastcompat.checkpoint import load_config, model_lengths
    from fastcompat.corpus import iter_responses
    from fastcompat.corpus.formats import parse_overrides
    from fastcompat.inspection import render_inspection
    from fastcompat.tokenization import ConversationTokenizer, TokenizationSettings

    response = next(islice(iter_responses([input], overrides=parse_overrides(mapping or [])), row, None), None)
    if response is None:
        raise UsageError(f"{input} has no row {row}: rows are counted from 0")
    context_length, _ = model_lengths(load_config(base_model, revision))
    tokenizer = ConversationTokenizer.from_pretrained(
        base_model,
        TokenizationSettings(
            template=template, turns=turns.value, score_eos=score_eos, bos=bos.value, max_length=max_length
        ),
        revision=revision,
        context_length=context_length,
    )
    (sequence,) = tokenizer([response])
    console.print(render_inspection(response, sequence, tokenizer, ids=ids))


@app.command()
def demo(
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="RUN", help="Keep the run here.", show_default="a temporary one"),
    ] = None,
    prompts: Annotated[int, typer.Option(min=1, help="How many prompts; each is answered by every generator.")] = 500,
) -> None:
    """Score the embedded corpus with the embedded model: offline, in about a minute."""
    from fastcompat.demo import model_directory
    from fastcompat.demo.corpus import write_corpus

    directory = output or Path(tempfile.mkdtemp(prefix="fastcompat-demo-")) / "run"
    corpus = directory.parent / f"{directory.name}-corpus"
    if not (directory / "manifest.json").exists():
        write_corpus(corpus, n_prompts=prompts)
    path = model_directory()
    model = os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)
    say(
        "What Python's standard library says about itself, answered by several response generators;\n"
        "which of them does the small base model find most compatible?\n"
    )
    say(f"[bold]$ fastcompat score {escape(str(corpus))} --base-model {escape(model)} -o {escape(str(directory))}[/]")
    score(directory, [model], inputs=[str(corpus)])
    say(f"\n[bold]$ fastcompat rank {escape(str(directory))}[/]")
    rank(directory)
    say(
        "\nLoss alone asks what is easy to predict, not what is right: repeated text is easy, and so is fluent text\n"
        "about something else. It is half of the answer; quality is the other.\n"
    )
    say(
        "On your own data: [bold]fastcompat score YOUR_FILES --base-model Qwen/Qwen2.5-0.5B -o RUN[/], "
        "then [bold]fastcompat rank RUN[/].\n"
        "One row and its scored tokens: "
        f"[bold]fastcompat inspect {escape(str(corpus))} --base-model {escape(model)}[/]"
    )


app.command()(bench)
app.command()(doctor)


@contextmanager
def stopping() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a question that the engine asks after every pack; a second SIGINT ends at once."""
    received: list[int] = []

    def handle(number: int, _: object) -> None:
        if received and number == signal.SIGINT:
            raise KeyboardInterrupt
        received.append(number)
        errors.print("finishing the pack at hand, then stopping (Ctrl-C again: at once)", highlight=False)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def parse_worker(text: str) -> Worker:
    """--worker I/N."""
    from fastcompat.session import Worker

    first, _, second = text.partition("/")
    if not (first.isdecimal() and second.isdecimal()):
        raise UsageError(f"--worker {text}: write I/N, for example 1/4")
    return Worker(index=int(first) - 1, count=int(second))
