"""`fastcompat study plan|run|show`: was the ranking right? `show` loads no torch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.markup import escape

from fastcompat.cli.display import console, say
from fastcompat.cli.options import Beta, By, RewardShift, TableFormat
from fastcompat.errors import FastcompatError, Interrupted, UsageError

if TYPE_CHECKING:
    from fastcompat.study import Study

app = typer.Typer(
    name="study",
    no_args_is_help=True,
    help="Was the ranking right? Train on each generator's responses, measure what came of it.",
)
# Workers that may die before their parent gives up: a cell that kills takes three, then it is set aside.
MOST_DEATHS = 30
POLL_SECONDS = 0.5

StudyDirectory = Annotated[str, typer.Argument(metavar="DIR", help="The study: made, or gone on with.")]
SettingsFile = Annotated[
    Path | None,
    typer.Option("--settings", metavar="FILE.toml", help="What to plan; a study that is there has its own."),
]
Measure = Annotated[bool, typer.Option(help="Train and generate a little, to say how many hours it will take.")]


@app.command()
def plan(directory: StudyDirectory, settings: SettingsFile = None, measure: Measure = True) -> None:
    """Choose prompts, make the grid of base models, generators and seeds, and say what it will cost."""
    _show_plan(_planned(directory, settings, measure))


@app.command()
def run(
    directory: StudyDirectory,
    settings: SettingsFile = None,
    measure: Measure = True,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="Leave every tuned model in its cell.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try again what has failed.")] = False,
    processes: Annotated[
        int | None, typer.Option(min=1, help="So many on the CPU of this machine. Others may run on the same DIR.")
    ] = None,
    gpus: Annotated[
        str | None,
        typer.Option(metavar="all|0,1", help="One process each.", show_default="all, where there are several"),
    ] = None,
    worker: Annotated[bool, typer.Option("--worker", hidden=True)] = False,
) -> None:
    """Train and evaluate every cell that is not finished; outcomes.parquet has a row for each and evaluation."""
    from fastcompat.cli.processes import environments
    from fastcompat.cli.working import stopping
    from fastcompat.study import run as run_study
    from fastcompat.wording import counted_noun

    study = _planned(directory, settings, measure)
    children = [] if worker else environments(processes, gpus, study.settings.training.device, "1/1")
    if not worker:
        _show_plan(study)
    with stopping() as stop:
        if children:
            arguments = ["study", "run", directory, *(["--keep-models"] if keep_models else [])]
            _in_processes(study, children, arguments, retry=retry, stop=stop)
        table = run_study(
            directory,
            keep_models=keep_models,
            retry=retry and not children,
            worker=worker or bool(children),
            notify=lambda done, total, cell: say(
                f"{done}/{total} · {escape(cell.base_model)} on {escape(cell.generator)}, seed {cell.seed}"
            ),
            stop=stop,
        )
    failed = sum(status != "ok" for status in table["status"].to_pylist())
    say(
        f"{counted_noun(len(study.cells), 'cell')} finished, {counted_noun(table.num_rows, 'outcome')}, {failed} failed"
    )
    say(f"\nNext: [bold]fastcompat study show {escape(directory)}[/]")


@app.command()
def show(
    directory: StudyDirectory,
    run: Annotated[
        str | None,
        typer.Option(metavar="RUN", help="Whose metrics, where the study was planned from files, or scored since."),
    ] = None,
    by: By = "generator",
    beta: Beta = None,
    reward_shift: RewardShift = 0.0,
    outcome: Annotated[list[str] | None, typer.Option(help="Only this evaluation. Repeatable.")] = None,
    format: Annotated[TableFormat, typer.Option("--format", help="How the tables are written.")] = TableFormat.table,
    html: Annotated[
        str | None, typer.Option(metavar="FILE.html", help="A page too: outcomes against metrics, and these tables.")
    ] = None,
) -> None:
    """How well every metric predicted each outcome, per base model and over all, and how well anything could."""
    import pyarrow.compute as pc

    from fastcompat.cli.display import plain_table
    from fastcompat.cli.tables import write_table
    from fastcompat.decisions.validation.study import BETAS, outcome_table, points, study_tables
    from fastcompat.decisions.validation.study_outcomes import failures, read_outcomes, run_of
    from fastcompat.decisions.validation.study_reading import closing_notes, outcome_section, sections
    from fastcompat.decisions.validation.validation import generator_metrics
    from fastcompat.store import open_run
    from fastcompat.wording import markdown

    rows = read_outcomes(directory)
    if outcome:
        there = pc.unique(rows["evaluation"]).to_pylist()
        if unknown := [name for name in outcome if name not in there]:
            raise UsageError(f"no outcome {unknown[0]}; there are {', '.join(there)}")
        rows = rows.filter(pc.is_in(rows["evaluation"], value_set=_strings(outcome)))
    run = run or run_of(directory)
    opened = open_run(run) if run else None
    scored = opened is not None and bool(opened.scorers())
    shown = [outcome_section(outcome_table(rows))]
    if scored and opened is not None:
        betas = tuple(dict.fromkeys([*BETAS, *(beta or ())]))
        figures = generator_metrics(opened.scores(), betas=betas, reward_shift=reward_shift, by=by)
        table, own, best = study_tables(figures, rows)
        if format in (TableFormat.csv, TableFormat.json):
            write_table(table, format)
            return
        shown = [outcome_section(own), *sections(table, best, of_car=beta or ())]
        if html is not None:
            from fastcompat.report.study_page import write_study_page

            say(f"[bold]{escape(str(write_study_page(html, shown, points(figures, rows), closing_notes())))}[/]")
    elif format in (TableFormat.csv, TableFormat.json):
        write_table(outcome_table(rows), format)
        return
    for section in shown:
        if format is TableFormat.md:
            print(f"\n**{section.title}**\n\n{markdown(section.header, section.rows)}\n")
        else:
            say(f"\n[bold]{escape(section.title)}[/]")
            console.print(plain_table(section.header, section.rows))
        for note in section.notes:
            _note(note, format)
    if scored:
        for note in closing_notes():
            _note(note, format)
    else:
        _note("No scored run: name one with --run, and every metric is compared with these outcomes.", format)
    for row in failures(rows)[:10]:
        _note(
            f"{row['base_model']} on {row['generator']}, seed {row['seed']}, {row['evaluation']}: {row['status']}, "
            f"{row['detail']}",
            format,
        )


def _note(text: str, format: TableFormat) -> None:
    if format is TableFormat.md:
        print(f"{text}\n")
    else:
        say(f"[dim]{escape(text)}[/]")


def _strings(values: Sequence[str]) -> object:
    import pyarrow as pa

    return pa.array(values, pa.string())


def _planned(directory: str, settings: Path | None, measure: bool) -> Study:
    from fastcompat.study import open_study
    from fastcompat.study import plan as plan_study

    return open_study(directory) if settings is None else plan_study(directory, settings, measure=measure)


def _show_plan(study: Study) -> None:
    """The grid and its cost."""
    from fastcompat.decisions.validation.several_base_models import smallest_rho
    from fastcompat.wording import counted_noun

    cost, settings = study.cost, study.settings
    say(
        f"{counted_noun(len(study.record['base_models']), 'base model')} x "
        f"{counted_noun(len(study.generators), 'generator')} x {counted_noun(len(settings.seeds), 'seed')}: "
        f"[bold]{counted_noun(cost.cells, 'cell')}[/], each trained on {settings.examples:,} responses, "
        f"{settings.held_out:,} prompts held out"
    )
    hours = "not measured" if cost.hours is None else f"about {cost.hours:.2g} hours of one process here"
    say(
        f"{cost.trained_tokens:,} tokens trained, at most {cost.generated_tokens:,} generated, {cost.flops:.2g} FLOPs: "
        f"{hours}"
    )
    say(
        f"with {len(study.generators)} generators a rho of {smallest_rho(len(study.generators)):.2f} is told from 0 in "
        "four of five such studies"
    )
    for one in study.evaluations:
        judge = study.record["judges"].get(one.reward_model)
        circular = " (circular: the run's metrics read it)" if judge and judge["circular"] else ""
        say(f"  {escape(one.label)}{': ' + escape(str(judge['name'])) if judge else ''}{circular}")


def _in_processes(
    study: Study,
    environments: Sequence[Mapping[str, str]],
    arguments: Sequence[str],
    *,
    retry: bool,
    stop: Callable[[], bool],
) -> None:
    """Have children work on the study until they have nothing left to do. Raises what a child said, and Interrupted."""
    from fastcompat.store import forget_dead
    from fastcompat.study.work import CLAIMS, forget_failures

    forget_dead(study.place / CLAIMS)
    if retry:
        forget_failures(study)
    command = [sys.executable, "-m", "fastcompat", *arguments, "--worker"]
    logs = study.directory / "log"
    logs.mkdir(exist_ok=True)
    outputs = [logs / f"process-{k}.txt" for k in range(len(environments))]

    def start(k: int) -> subprocess.Popen[bytes]:
        with outputs[k].open("wb") as output:
            return subprocess.Popen(
                command, env=os.environ | environments[k], stdout=output, stderr=output, stdin=subprocess.DEVNULL
            )

    say(f"{len(environments)} processes share the cells; what each says is in {escape(str(logs))}")
    children = {k: start(k) for k in range(len(environments))}
    deaths = 0
    try:
        while children:
            time.sleep(POLL_SECONDS)
            if stop():
                raise Interrupted("interrupted; fastcompat study run goes on where it was")
            for k, child in list(children.items()):
                code = child.poll()
                if code is None:
                    continue
                del children[k]
                if code < 0 or code > 128:
                    deaths += 1
                    if deaths > MOST_DEATHS:
                        raise FastcompatError(f"{deaths} processes have died; the last one said: {_last(outputs[k])}")
                    children[k] = start(k)
                elif code:
                    raise FastcompatError(f"a process ended with exit code {code}: {_last(outputs[k])}")
    finally:
        for child in children.values():
            child.send_signal(signal.SIGTERM)
        for child in children.values():
            child.wait()


def _last(output: Path) -> str:
    lines = output.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "nothing").removeprefix("error: ")
