"""What the command line shows while it works and when it is done: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn
from rich.table import Table
from rich.text import Text

from fastcompat.errors import Interrupted
from fastcompat.wording import counted_noun, duration, printable

if TYPE_CHECKING:
    from fastcompat.benchmark.doctor import Finding
    from fastcompat.corpus import CorpusSummary, PreparationProgress
    from fastcompat.scoring.engine import Progress as EngineProgress
    from fastcompat.scoring.passes import Pass
    from fastcompat.store import Run
    from fastcompat.store.verification import ScorerProgress

# Off a terminal nothing is cut to eighty columns: names that differ at their ends must stay apart.
console = Console(width=None if sys.stdout.isatty() else 200)
errors = Console(stderr=True)

# Off a terminal, a line this often.
PLAIN_SECONDS = 15.0


class LiveDisplay:
    """Shows how far something is while it runs: a bar on a terminal, else a line every `PLAIN_SECONDS`."""

    def __init__(self, title: str) -> None:
        self.began = time.monotonic()
        self._title = title
        self._last_line = self.began
        self._bar: Progress | None = None

    @contextmanager
    def showing(self) -> Iterator[LiveDisplay]:
        """Show the bar while the block runs."""
        if not console.is_terminal:
            yield self
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None))
        figures = TextColumn("{task.fields[figures]}", style="cyan")
        with Progress(*columns, figures, console=console, expand=True, transient=True) as self._bar:
            self._task = self._bar.add_task(self._title, total=None, figures="")
            yield self

    def show(self, done: int, total: int, figures: str) -> None:
        """`done` of `total`, and a line of figures."""
        if self._bar is not None:
            self._bar.update(self._task, total=total, completed=done, figures=figures)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            say(f"{self._title}: {figures}")

    def scoring(self, progress: EngineProgress) -> None:
        """Called by the engine after every pack."""
        figures = figures_of(progress)
        self.show(progress.n_rows_skipped + progress.n_rows, progress.n_rows_total, figures)

    def preparing(self, progress: PreparationProgress) -> None:
        """Called while a corpus is prepared."""
        seconds = max(time.monotonic() - self.began, 1e-9)
        figures = f"{progress.phase} · {progress.rows:,} rows · {progress.rows / seconds:,.0f} rows/s"
        self.show(progress.done, progress.total, figures)


def figures_of(progress: EngineProgress) -> str:
    """One line: 1,024/4,000 responses · 2,310 tokens/s · 31% saved by sharing · 0:01:20 left."""
    done = progress.n_rows_skipped + progress.n_rows
    seconds = max(progress.seconds, 1e-9)
    parts = [f"{done:,}/{progress.n_rows_total:,} responses", f"{progress.n_tokens / seconds:,.0f} tokens/s"]
    if progress.n_unshared_tokens:
        parts.append(f"{saved_share(progress):.0%} saved by sharing")
    left = progress.n_rows_total - done
    if progress.n_rows and left:
        parts.append(f"{duration(left * seconds / progress.n_rows)} left")
    return " · ".join(parts)


def show_pass(served: Pass) -> None:
    """Which models a pass over the corpus serves, and how they read it."""
    from fastcompat.tokens.loading import THE_FILES

    say("")
    for scorer in served.scorers:
        say(
            f"[bold]{escape(scorer.name)}[/] · {scorer.what} · {scorer.identity['dtype']} on {scorer.device} · "
            f"template: {escape(scorer.tokenizer.description)}"
        )
        if scorer.tokenizer.token_ids != THE_FILES:
            say(f"  token ids: {escape(scorer.tokenizer.token_ids)}")
    if len(served.scorers) > 1:
        say("one body with two heads: one pass serves both")


def interrupted(run: Run, to_what: str = "") -> Interrupted:
    """What somebody who has stopped the scoring of a run is told."""
    return Interrupted(
        f"interrupted; every response scored so far is kept: fastcompat rank {run.location} ranks them. "
        f"Give the same command again to go on{to_what}."
    )


def saved_share(progress: EngineProgress) -> float:
    """The share of tokens that were not computed because another sequence begins alike."""
    return 1 - progress.n_tokens / progress.n_unshared_tokens if progress.n_unshared_tokens else 0.0


def statuses_line(statuses: Mapping[str, int]) -> str:
    """ok 3,990 · truncated 7 · empty 3."""
    order = sorted(statuses.items(), key=lambda item: (item[0] != "ok", -item[1], item[0]))
    return " · ".join(f"{name} {count:,}" for name, count in order) or "no rows"


# Parts of a scorer in which statuses are counted unless all of them are asked for: some two million rows, in a second.
PARTS = 500


def show_statuses(progress: ScorerProgress) -> None:
    """What became of the rows, and for everything that is not `ok` one row with its reason."""
    if progress.n_parts_read < progress.n_parts:
        n_parts = counted_noun(progress.n_parts, "part")
        say(f"  in {progress.n_parts_read:,} of {n_parts} (fastcompat status --all counts in all):")
    say(statuses_line(progress.statuses))
    if progress.n_rows and not {"ok", "truncated"} & set(progress.statuses):
        say("[bold red]no response could be scored[/]")
    for status, example in progress.examples.items():
        say(f"  [yellow]{status}[/], for example {escape(printable(example))}")


# Files with something to tell are shown up to this many.
SHOWN_FILES = 5


def show_corpus(summary: CorpusSummary, seconds: float) -> None:
    """What was read, how it was understood, and what was not."""
    mappings: dict[str, list[str]] = {}
    for file in summary.files:
        if file.mapping:
            mappings.setdefault(file.mapping, []).append(file.label)
    for mapping, labels in mappings.items():
        more = f" and {len(labels) - 1:,} more" if len(labels) > 1 else ""
        say(f"{escape(printable(labels[0]))}{more}: {escape(printable(mapping))}")
    # First those that give nothing: who named them expects rows.
    problems = sorted((file for file in summary.files if file.problem), key=lambda file: file.n_scorable > 0)
    for file in problems[:SHOWN_FILES]:
        told = f"{file.label}: {file.problem}" if file.n_scorable else f"{file.label} gives nothing: {file.problem}"
        say(f"[yellow]{escape(printable(told))}[/]")
    if len(problems) > SHOWN_FILES:
        say(f"[yellow]and {len(problems) - SHOWN_FILES:,} more files with a problem[/]")
    if summary.left_out:
        names = ", ".join(map(printable, summary.left_out[:SHOWN_FILES]))
        more = f" and {len(summary.left_out) - SHOWN_FILES:,} more" if len(summary.left_out) > SHOWN_FILES else ""
        say(f"[yellow]left out: {escape(names)}{more} (endings that are not known)[/]")
    for counted in (*_reasons(summary), *_oddities(summary)):
        say(f"[yellow]{escape(printable(counted))}[/]")
    nothing = sum(not file.n_scorable for file in summary.files)
    files = counted_noun(len(summary.files), "file") + (f" ({nothing:,} of which give nothing)" if nothing else "")
    say(
        f"{counted_noun(sum(summary.statuses.values()), 'response')} of "
        f"{counted_noun(len(summary.generators), 'generator')} from {files}, "
        f"prepared in {duration(seconds)} · {statuses_line(summary.statuses)}"
    )
    show_reward_columns(summary.rewards)


def show_reward_columns(counts: Mapping[str, int]) -> None:
    """Rewards that came with a corpus."""
    if counts:
        columns = ", ".join(f"{name} ({counted_noun(count, 'response')})" for name, count in counts.items())
        say(f"rewards of its own: {escape(printable(columns))}")


def _reasons(summary: CorpusSummary) -> Iterator[str]:
    """Why some rows of files that have no problem as a whole cannot be scored."""
    reasons: Counter[str] = Counter()
    for file in summary.files:
        if not file.problem:
            reasons.update(file.reasons)
    shown = "; ".join(f"{reason} ({counted_noun(count, 'row')})" for reason, count in reasons.most_common(3))
    if shown:
        more = f"; and {len(reasons) - 3:,} other reasons" if len(reasons) > 3 else ""
        yield f"not scored: {shown}{more}"


def _oddities(summary: CorpusSummary) -> Iterator[str]:
    """What was counted on the way: unknown roles, turns after the last answer, records of another shape."""
    roles: Counter[str] = Counter()
    for file in summary.files:
        roles.update(file.unknown_roles)
    if roles:
        yield f"unknown roles, kept: {', '.join(f'{role} {count:,}' for role, count in roles.most_common(8))}"
    dropped = sum(file.dropped_turns for file in summary.files)
    if dropped:
        yield f"{counted_noun(dropped, 'turn')} after the last assistant's left out"
    others = sum(sum(file.other_shapes.values()) for file in summary.files)
    if others:
        yield f"{counted_noun(others, 'record')} of another shape than the rest of the file, read by that shape"
    late = list(dict.fromkeys(name for file in summary.files for name in file.late_columns))
    if late:
        more = f" and {len(late) - 16:,} more" if len(late) > 16 else ""
        yield f"columns that first records did not have, not used: {', '.join(late[:16])}{more}"


def write_findings(findings: Sequence[Finding], *, as_json: bool) -> None:
    """What `doctor` found: section by section, then what to do."""
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
        return
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True)
    section = ""
    for finding in findings:
        if finding.section != section:
            if section:
                table.add_row()
            section = finding.section
            table.add_row(Text(section.capitalize(), style="bold"))
        mark = Text("!", style="yellow") if finding.advice else Text(" ")
        found = Text(printable(finding.found), style="yellow" if finding.advice else "green")
        table.add_row(Text.assemble(mark, " ", finding.subject), found, Text(printable(finding.why or ""), style="dim"))
    console.print(table)
    advice = list(dict.fromkeys(finding.advice for finding in findings if finding.advice))
    say("\n[bold]To do[/]" if advice else "\nNothing stands in the way of a faster back end.")
    for line in advice:
        say(f"[yellow]![/] {escape(printable(line))}")


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> Table:
    """Cells of text as a table for the terminal; the first `left` columns begin at the left, the others end right."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for k, name in enumerate(header):
        table.add_column(name, justify="left" if k < left else "right", overflow="fold")
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    return table


def say(text: str) -> None:
    """One message, never cut at the terminal's width."""
    console.print(text, highlight=False, soft_wrap=True)
