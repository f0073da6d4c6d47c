"""What the command line shows while it works and when it is done: rich on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    import pyarrow as pa

    from fastcompat.engine import Progress as EngineProgress

# Off a terminal, a line this often.
PLAIN_SECONDS = 15.0


class _Figures(ProgressColumn):
    """responses done, tokens a second, share of tokens saved by sharing, time left."""

    def render(self, task: Task) -> Text:
        return Text(str(task.fields.get("figures", "")), style="cyan")


class ScoringDisplay:
    """Follows an engine's `Progress`: a live bar on a terminal, else a line every `PLAIN_SECONDS`."""

    def __init__(self, console: Console, title: str) -> None:
        self._console = console
        self._title = title
        self._began = time.monotonic()
        self._last_line = self._began
        self._bar: Progress | None = None

    @contextmanager
    def showing(self) -> Iterator[ScoringDisplay]:
        """Show the bar while the block runs."""
        if not self._console.is_terminal:
            yield self
            return
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(bar_width=None), _Figures())
        with Progress(*columns, console=self._console, expand=True) as self._bar:
            self._task = self._bar.add_task(self._title, total=None)
            yield self

    def update(self, progress: EngineProgress) -> None:
        """Called by the engine after every pack and every unit."""
        figures = figures_of(progress, time.monotonic() - self._began)
        if self._bar is not None:
            done = progress.n_rows_skipped + progress.n_rows
            self._bar.update(self._task, total=progress.n_rows_total, completed=done, figures=figures)
        elif time.monotonic() - self._last_line >= PLAIN_SECONDS:
            self._last_line = time.monotonic()
            self._console.print(f"{self._title}: {figures}", highlight=False, soft_wrap=True)


def figures_of(progress: EngineProgress, seconds: float) -> str:
    """One line: 1,024/4,000 responses · 2,310 tokens/s · 31% saved by sharing · 0:01:20 left."""
    done = progress.n_rows_skipped + progress.n_rows
    parts = [f"{done:,}/{progress.n_rows_total:,} responses", f"{progress.n_tokens / max(seconds, 1e-9):,.0f} tokens/s"]
    if progress.n_unshared_tokens:
        parts.append(f"{saved_share(progress):.0%} saved by sharing")
    left = progress.n_rows_total - done
    if progress.n_rows and left:
        parts.append(f"{duration(left * seconds / progress.n_rows)} left")
    return " · ".join(parts)


def saved_share(progress: EngineProgress) -> float:
    """The share of tokens that were not computed because another sequence begins alike."""
    return 1 - progress.n_tokens / progress.n_unshared_tokens if progress.n_unshared_tokens else 0.0


def duration(seconds: float) -> str:
    """Hours:minutes:seconds."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"


def statuses_line(statuses: Mapping[str, int]) -> str:
    """ok 3,990 · truncated 7 · empty 3."""
    order = sorted(statuses.items(), key=lambda item: (item[0] != "ok", -item[1], item[0]))
    return " · ".join(f"{name} {count:,}" for name, count in order) or "no rows"


def ranking_table(ranking: pa.Table, *, by: str) -> Table:
    """A ranking for the terminal."""
    table = Table(title=None, header_style="bold", row_styles=["", "dim"], pad_edge=False)
    several = len(set(ranking["base_model"].to_pylist())) > 1
    if several:
        table.add_column("base model")
    for name, right in [("rank", True), (by, False), ("responses", True), ("tokens", True), ("loss", True)]:
        table.add_column(name, justify="right" if right else "left")
    table.add_column("95% interval", justify="right")
    left_out = any(ranking["n_left_out"].to_pylist())
    if left_out:
        table.add_column("left out", justify="right")
    for row in ranking.to_pylist():
        cells = [
            f"{row['rank']}",
            str(row[by]),
            f"{row['n']:,}",
            "" if row["mean_tokens"] is None else f"{row['mean_tokens']:,.0f}",
            "none" if row["loss"] is None else f"{row['loss']:.4f}",
            "" if row["loss_low"] is None else f"{row['loss_low']:.4f} to {row['loss_high']:.4f}",
        ]
        if left_out:
            cells.append(f"{row['n_left_out']:,}" if row["n_left_out"] else "")
        table.add_row(*([row["base_model"]] if several else []), *cells)
    return table
