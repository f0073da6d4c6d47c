"""One process at work on a run: a pass with its progress on the screen, and what a signal does to it."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.markup import escape

from fastcompat.cli.display import (
    PARTS,
    LiveDisplay,
    errors,
    figures_of,
    interrupted,
    saved_share,
    say,
    show_pass,
    show_statuses,
)
from fastcompat.errors import Interrupted

if TYPE_CHECKING:
    from fastcompat.scoring.passes import Pass, Worker
    from fastcompat.store import LeaveOut, Run


def work_off(
    run: Run,
    served: Pass,
    *,
    token_budget: int | None,
    worker: Worker,
    stop: Callable[[], bool],
    leave_out: LeaveOut,
) -> None:
    """One pass over the corpus, with its progress on the screen."""
    from fastcompat.scoring.engine import Progress
    from fastcompat.scoring.passes import refuse_set_aside, score_corpus
    from fastcompat.store.verification import scorer_progress
    from fastcompat.wording import duration

    show_pass(served)
    display = LiveDisplay(served.name)
    memory_told = False

    def notify(progress: Progress) -> None:
        nonlocal memory_told
        if not memory_told:  # the model is loaded only where there is something to do
            memory_told = True
            if (memory := served.told_memory) is not None:
                say(f"memory: {escape(memory)}")
        display.scoring(progress)

    progress = Progress(notify=notify)
    try:
        with display.showing():
            stores = score_corpus(
                run,
                served,
                token_budget=token_budget,
                worker=worker,
                progress=progress,
                leave_out=leave_out,
                stop=stop,
            )
    except Interrupted:
        say(figures_of(progress))
        raise interrupted(run) from None
    refuse_set_aside(run, progress)
    if not progress.n_rows:
        say(
            f"all {progress.n_rows_total:,} responses were scored before"
            if progress.n_rows_total
            else "nothing to score: this worker's share is empty"
        )
        return
    before = progress.n_rows_skipped - progress.n_rows_left_out
    say(
        f"{progress.n_rows:,} responses in {duration(progress.seconds)} · "
        f"{progress.n_tokens / progress.seconds:,.0f} tokens/s · "
        f"{saved_share(progress):.0%} of {progress.n_unshared_tokens:,} tokens saved by sharing"
        + (f" · {before:,} were scored before" if before else "")
    )
    if (waited := served.waited) is not None:
        say(waited)
    for store in stores:
        show_statuses(scorer_progress(run, store, most_parts=PARTS))


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
