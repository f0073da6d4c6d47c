"""`fastcompat rank`, `select`, `report` and `reproduce`: what one decides with a run. They load no torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer
from rich.markup import escape

from fastcompat.cli.display import console, errors, say
from fastcompat.cli.options import Average, Beta, By, LeaveOut, RewardShift, RunDirectory, SortBy, TableFormat
from fastcompat.errors import UsageError

if TYPE_CHECKING:
    from fastcompat.store.run import Run


def rank(
    directory: RunDirectory,
    by: By = "generator",
    beta: Beta = None,
    base_model: Annotated[str | None, typer.Option(help="Only its figures, as the ranking names it.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="Only its figures, as the ranking names it.")] = None,
    average: Annotated[Average, typer.Option(help="Loss: mean over responses or over tokens.")] = Average.response,
    sort: Annotated[SortBy, typer.Option(help="What decides; auto: CAR, without rewards the loss.")] = SortBy.auto,
    leave_out: Annotated[
        LeaveOut, typer.Option(help="Of what lacks a figure, leave out the response, or all responses to its prompt.")
    ] = LeaveOut.response,
    reward_shift: RewardShift = 0.0,
    draws: Annotated[int, typer.Option(min=10, help="Bootstrap draws.")] = 1000,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|STUDY|paper:BASE_MODEL",
            help="Outcomes of training on each generator: how well does every metric predict them?",
        ),
    ] = None,
    outcome: Annotated[
        str | None, typer.Option(help="With --against: the column of the file, or the study's evaluation.")
    ] = None,
    format: Annotated[TableFormat, typer.Option("--format", help="How the ranking is written.")] = TableFormat.table,
) -> None:
    """Rank the generators of a run: by CAR where it has rewards and losses, the best teacher first.

    With --against, every metric's rank correlation with outcomes that you know, or with the paper's.
    """
    from fastcompat.cli.racing import tell_races
    from fastcompat.cli.tables import show_ranking, write_table
    from fastcompat.decisions.ranking.ranking import Figure, sensitivity
    from fastcompat.decisions.ranking.ranking import rank as rank_scores
    from fastcompat.decisions.ranking.reading import readings, what_the_figures_are

    run = _opened(directory)
    if against is not None:
        if (average, sort, leave_out) != (Average.response, SortBy.auto, LeaveOut.response):
            raise UsageError("--against takes every metric as it is defined: leave --average, --sort, --leave-out away")
        _validate(run, against, outcome, by, base_model, reward_model, beta or [3.0], reward_shift, format)
        return
    if outcome is not None:
        raise UsageError("--outcome is what --against compares with: give both")
    figure = None if sort is SortBy.auto else cast(Figure, sort.value)
    ranking = rank_scores(
        run,
        by=by,
        base_model=base_model,
        reward_model=reward_model,
        beta=beta or [3.0],
        average=average.value,
        reward_shift=reward_shift,
        leave_out=leave_out.value,
        sort_by=figure,
        draws=draws,
    )
    if format is not TableFormat.table:
        write_table(ranking, format)
    else:
        show_ranking(ranking, by, what_the_figures_are(ranking, average.value, draws))
        for title, lines in readings(ranking, sensitivity(ranking), figure):
            say(f"\n[bold]{escape(title)}[/]: {escape(lines[0])}")
            for line in lines[1:]:
                say(escape(line))
        if ranking["stopped_after"].null_count < ranking.num_rows:
            tell_races(run)
    _note_pending(run)


def _validate(
    run: Run,
    against: str,
    outcome: str | None,
    by: str,
    base_model: str | None,
    reward_model: str | None,
    betas: list[float],
    reward_shift: float,
    format: TableFormat,
) -> None:
    """What `rank --against` prints."""
    from fastcompat.cli.display import plain_table
    from fastcompat.cli.tables import write_table
    from fastcompat.decisions.validation.outcomes import outcomes
    from fastcompat.decisions.validation.study import partners_in
    from fastcompat.decisions.validation.study_outcomes import study_file
    from fastcompat.decisions.validation.validation import formatted, notes, validate
    from fastcompat.wording import markdown

    scores = run.scores()
    trained = None
    if study_file(against) is not None:
        base_model, trained = partners_in(scores, against, base_model)
    table = validate(
        scores,
        outcomes(against, column=outcome, base_model=trained),
        betas=betas,
        reward_shift=reward_shift,
        by=by,
        base_model=base_model,
        reward_model=reward_model,
    )
    header, rows = formatted(table)
    if format is TableFormat.table:
        console.print(plain_table(header, rows))
    elif format is TableFormat.md:
        print(markdown(header, rows))
    else:
        write_table(table, format)
    for note in notes(table):
        if format is TableFormat.table:
            say(f"[dim]{escape(note)}[/]")
        else:  # who reads the table alone gets it without a foreign line
            errors.print(escape(note), highlight=False, soft_wrap=True)
    _note_pending(run)


def select(
    directory: RunDirectory,
    output: Annotated[
        str,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Ends in .jsonl, .jsonl.gz or .parquet; s3://..., or hf://datasets/USER/NAME for the hub.",
        ),
    ],
    by: Annotated[
        str, typer.Option(help="A metric (car, loss, reward, ifd_ppl ...) or a mixture: car=0.7,ifd_ppl=0.3.")
    ] = "car",
    beta: Annotated[float, typer.Option(help="Of CAR.")] = 3.0,
    reward_shift: RewardShift = 0.0,
    top: Annotated[
        int | None,
        typer.Option(min=1, help="Responses to each prompt.", show_default="1; all with --threshold"),
    ] = None,
    threshold: Annotated[float | None, typer.Option(help="Only responses at least as good as this.")] = None,
    budget: Annotated[
        int | None, typer.Option(min=1, help="Only so many prompts, those with the best responses.")
    ] = None,
    min_tokens: Annotated[int | None, typer.Option(min=1, help="Only responses of at least so many tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Only responses of at most so many tokens.")] = None,
    drop_duplicates: Annotated[bool, typer.Option(help="Equal responses to a prompt count once.")] = True,
    generator: Annotated[
        list[str] | None, typer.Option("--generator", metavar="NAME", help="Only its responses. Repeatable.")
    ] = None,
    base_model: Annotated[str | None, typer.Option(help="Whose losses, where the run has several.")] = None,
    reward_model: Annotated[str | None, typer.Option(help="Whose rewards, where the run has several.")] = None,
) -> None:
    """Choose the best response to every prompt and write them as training data, with a card that says how."""
    from fastcompat.decisions.selection.selection import select as select_rows
    from fastcompat.decisions.selection.settings import parse_by
    from fastcompat.decisions.selection.training_file import write_selection
    from fastcompat.wording import counted_noun

    run = _opened(directory)
    chosen = select_rows(
        run,
        by=parse_by(by),
        beta=beta,
        reward_shift=reward_shift,
        top=top,
        threshold=threshold,
        budget=budget,
        min_tokens=min_tokens,
        max_tokens=max_tokens,
        drop_duplicates=drop_duplicates,
        generators=generator,
        base_model=base_model,
        reward_model=reward_model,
    )
    card = write_selection(run, chosen, output)
    counts = chosen["generator"].value_counts().to_pylist()
    for count in sorted(counts, key=lambda count: -count["counts"]):
        say(f"{count['counts']:>9,}  {escape(str(count['values']))}")
    n_chosen = counted_noun(chosen.num_rows, "response")
    say(f"{n_chosen} in [bold]{escape(output)}[/], described in {escape(str(card))}")
    _note_pending(run)


def report(
    directory: RunDirectory,
    output: Annotated[str, typer.Option("--output", "-o", metavar="FILE.html")] = "report.html",
    by: By = "generator",
    beta: Beta = None,
    average: Annotated[Average, typer.Option(help="Loss: mean over responses or over tokens.")] = Average.response,
    leave_out: Annotated[LeaveOut, typer.Option(help="As of rank.")] = LeaveOut.response,
    reward_shift: RewardShift = 0.0,
    draws: Annotated[int, typer.Option(min=10, help="Bootstrap draws.")] = 1000,
    examples: Annotated[int, typer.Option(min=0, help="Responses shown of each end; 0: no text of the corpus.")] = 5,
) -> None:
    """Write one self-contained HTML page: the ranking, what it rests on, and examples."""
    from fastcompat.report import write_report
    from fastcompat.store import is_remote

    run = _opened(directory)
    if not is_remote(output) and not Path(output).absolute().parent.is_dir():
        raise UsageError(f"{output}: there is no directory {Path(output).parent}; make it first")
    betas = beta or [3.0]
    path = write_report(
        run,
        output,
        by=by,
        beta=betas[0],
        betas=tuple(dict.fromkeys([*betas, 0.0, 1.0, 3.0, 10.0])),
        average=average.value,
        reward_shift=reward_shift,
        leave_out=leave_out.value,
        draws=draws,
        examples=examples,
    )
    size = f" ({path.stat().st_size / 1e6:.1f} MB)" if isinstance(path, Path) else ""
    say(f"[bold]{escape(str(path))}[/]{size}")
    _note_pending(run)


def reproduce(
    context: typer.Context,
    base_model: Annotated[
        list[str] | None,
        typer.Option("--base-model", metavar="NAME", help="One of the paper's five. Repeatable.", show_default="all"),
    ] = None,
    output: Annotated[str, typer.Option("--output", "-o", metavar="RUN")] = "zoo",
    corpus: Annotated[
        str | None, typer.Option(metavar="INPUT", help="A copy of the corpus.", show_default="the hub's")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print the commands.")] = False,
) -> None:
    """Score Magpie-100K-Generator-Zoo under the paper's base models and print Table 4 beside the published one.

    Resumes like any run. It needs the hub, and days on a CPU; --dry-run prints what it would do.
    """
    from fastcompat.cli.display import plain_table
    from fastcompat.decisions.validation.reproduction import CORPUS, formatted_table4, plan, table4, table4_notes
    from fastcompat.store.run import open_run

    for step in plan(base_model or (), corpus=corpus or CORPUS, output=output):
        say(f"\n{escape(step.title)}: {escape(step.reason)}\n[bold]$ {escape(step.command)}[/]")
        if not dry_run:
            context.find_root().command.main(list(step.arguments), standalone_mode=False)
    if dry_run:
        return
    table = table4(open_run(output))
    header, rows = formatted_table4(table)
    console.print(plain_table(header, rows))
    for note in table4_notes(table):
        say(f"[dim]{escape(note)}[/]")


def _opened(directory: str) -> Run:
    """The run, which has something to decide with."""
    from fastcompat.store.run import open_run

    run = open_run(directory)
    run.refuse_unscored()
    return run


def _note_pending(run: Run) -> None:
    from fastcompat.store.verification import pending_rows
    from fastcompat.wording import counted_noun

    stores = run.current_scorers()
    labels = run.labels(stores)
    for store in stores:
        pending = pending_rows(run, store)
        if pending.n_rows:
            note = f"{counted_noun(pending.n_rows, 'response')} not scored yet under {labels[store.name]}"
            if pending.n_split_prompts:
                note += f"; {counted_noun(pending.n_split_prompts, 'prompt')} with only some responses scored"
            errors.print(f"[yellow]note:[/] {escape(note)}", highlight=False, soft_wrap=True)
