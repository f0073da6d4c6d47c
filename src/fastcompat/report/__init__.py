"""`fastcompat report`: a run as one self-contained page of HTML. No torch, no network, no raw rows in the page.

    write_report(open_run("RUN"), "report.html", beta=3.0)

`reading.py` says what each scorer has done and could not do; `data.py` reduces the rows to what is drawn: rankings,
histograms, correlations; `examples.py` reads the few responses that are shown; `headline.py` says in two lines what
came out; `race.py` says what a race asked and found; `charts.py` and `race_chart.py` draw, `labels.py` finds room for
names; `page.py` puts it together with `page.html.jinja`, `page.css` and `page.js`; `shown.py` is the path that a
notebook shows as the page. `study_page.py` is another page: a study's outcomes against the metrics.

The room is called as well: `fc.report(run)` is `report(run)`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

from fastcompat.metrics import BETA
from fastcompat.report.data import BETAS, Options, report_data
from fastcompat.report.page import render
from fastcompat.report.shown import ReportPath
from fastcompat.store import Run, is_remote, new_file


def write_report(
    run: Run,
    path: str | os.PathLike[str],
    *,
    by: str = "generator",
    betas: Sequence[float] = BETAS,
    beta: float = BETA,
    average: Literal["response", "token"] = "response",
    reward_shift: float = 0.0,
    leave_out: Literal["response", "prompt"] = "response",
    draws: int = 1000,
    seed: int = 0,
    examples: int = 5,
) -> Path | str:
    """Write the page of a run, finished or not, to `path` (or s3://bucket/report.html), and return that, as a path that
    a notebook shows as the page. Under 2 MB, whatever the run's size.

    by, average, reward_shift, leave_out, draws, seed: as of `ranking.rank`. beta: the weight of the loss in CAR that
    the page is about; betas: those that the rankings are compared under, `beta` joins them. examples: responses shown
    of the highest and of the lowest of each figure; 0 for none, so that the page has no text of the corpus.

    The same run and options give the same bytes. Where a mean reward is negative the page says so and ranks by
    loss. Raises UsageError for a run without scores and options out of range, RunError where the run is damaged or
    `path` cannot be written.
    """
    options = Options(
        by=by,
        betas=tuple(betas),
        beta=beta,
        average=average,
        reward_shift=reward_shift,
        leave_out=leave_out,
        draws=draws,
        seed=seed,
        examples=examples,
    )
    page = render(report_data(run, options), options)
    with new_file(path) as temporary:
        temporary.write_text(page, encoding="utf-8", newline="\n")
    return os.fspath(path) if is_remote(path) else ReportPath(path)


def report(run: Run, path: str | os.PathLike[str] = "report.html", **options: Any) -> Path | str:
    """`write_report`: in a notebook, `fc.report(run)` shows the page that it has written."""
    return write_report(run, path, **options)


class _Room(ModuleType):
    """`fastcompat.report` is this room for whoever imports from it, and the function for whoever calls it."""

    def __call__(self, run: Run, path: str | os.PathLike[str] = "report.html", **options: Any) -> Path | str:
        return report(run, path, **options)


sys.modules[__name__].__class__ = _Room

__all__ = ["Options", "ReportPath", "report", "report_data", "write_report"]
