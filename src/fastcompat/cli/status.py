"""`status` and `verify`: how far a run is, and whether its files are whole."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.markup import escape

from fastcompat.cli.display import PARTS, errors, say
from fastcompat.cli.options import RunDirectory


def status(
    directory: RunDirectory,
    all_parts: Annotated[
        bool, typer.Option("--all", help=f"Count what became of the rows in all parts, not in some {PARTS} a scorer.")
    ] = False,
) -> None:
    """What a run holds, how far each scorer is, and what could not be scored."""
    from fastcompat.cli.display import show_reward_columns, show_statuses
    from fastcompat.cli.racing import tell_races
    from fastcompat.store.run import open_run
    from fastcompat.store.verification import scorer_progress
    from fastcompat.wording import counted_noun

    run = open_run(directory)
    n_files = sum(len(generation.files) for generation in run.generations)
    say(f"{run.n_rows:,} rows from {n_files:,} files in {len(run.units):,} units of work")
    show_reward_columns(run.reward_columns)
    tell_races(run)
    for scorer in run.scorers():
        entry = scorer_progress(run, scorer, most_parts=None if all_parts else PARTS)
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


def verify(directory: RunDirectory) -> None:
    """Check every file of a run against its manifest: exit code 0 when all is whole, 5 with a list when not."""
    from fastcompat.errors import RunError
    from fastcompat.store.run import open_run
    from fastcompat.store.verification import find_damage

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
