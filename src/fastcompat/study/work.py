"""Cell after cell, beside any number of other processes on the same study, until every one is finished."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import suppress

import pyarrow as pa

from fastcompat.decisions import OUTCOMES, STUDY_SCHEMA
from fastcompat.errors import Interrupted
from fastcompat.store import TRIES, Claims, forget_dead
from fastcompat.study.cells import OUTCOME, is_finished, outcome_row, remove_left_model, work_off
from fastcompat.study.evaluations import Judges
from fastcompat.study.plan import Cell, Study, open_study, plan
from fastcompat.study.settings import Settings

CLAIMS = "claims"
_DIED = f"{TRIES} processes died over it, perhaps for lack of memory; study run tries again"


def run(
    directory: str | os.PathLike[str],
    settings: str | os.PathLike[str] | Settings | None = None,
    *,
    keep_models: bool = False,
    retry: bool = False,
    worker: bool = False,
    notify: Callable[[int, int, Cell], None] = lambda done, total, cell: None,
    stop: Callable[[], bool] = lambda: False,
) -> pa.Table:
    """Train and evaluate whatever of a study is not finished, and return its outcomes, `STUDY_SCHEMA`.

        table = fastcompat.study.run("study", "settings.toml")

    settings: those to plan it with, where it is not planned yet. keep_models: leave every tuned model in its cell;
    retry: try again what has failed. worker: one of several that were started together, which do not forget whom a cell
    has killed. notify: told before every cell how many are finished. Several processes may work on one directory.
    stop: asked after every step of a training and between answers: what is finished is kept and Interrupted raised.
    Raises what `plan` raises; what goes wrong in a cell is a row with the reason.
    """
    study = open_study(directory) if settings is None else plan(directory, settings)
    cells = study.cells
    judges = Judges(study)
    if retry:
        forget_failures(study)
    claims_place = study.place / CLAIMS
    if not worker:
        forget_dead(claims_place)  # whoever starts it by hand has seen to what killed it
    for cell in cells:
        if is_finished(study, cell):
            remove_left_model(study, cell)
    by_name = {cell.name: cell for cell in cells}
    with Claims(claims_place, is_done=lambda name: is_finished(study, by_name[name])) as claims:
        while True:
            aside = set(claims.set_aside())
            pending = [cell for cell in cells if not is_finished(study, cell) and cell.name not in aside]
            if not pending:
                break
            taken = False
            for cell in pending:
                if stop():
                    raise Interrupted("interrupted; fastcompat study run goes on where it was")
                if is_finished(study, cell) or not claims.take(cell.name):
                    continue
                taken = True
                try:
                    if not is_finished(study, cell):
                        notify(sum(is_finished(study, one) for one in cells), len(cells), cell)
                        work_off(study, cell, judges, keep_model=keep_models, stop=stop)
                finally:
                    claims.release(cell.name)
                write_outcomes(study)
            if not taken:
                time.sleep(claims.patience)
    return write_outcomes(study)


def write_outcomes(study: Study) -> pa.Table:
    """Put the rows of all finished cells together in outcomes.parquet, in the order of the grid."""
    while True:
        finished = [cell for cell in study.cells if is_finished(study, cell)]
        rows = []
        for cell in study.cells:
            if cell in finished:
                rows += study.cell_place(cell).read_json(OUTCOME)["rows"]
            elif (study.place / CLAIMS).has(f"{cell.name}.aside.json"):
                rows += [outcome_row(study, cell, one, status="died", detail=_DIED) for one in study.evaluations]
        table = pa.Table.from_pylist(rows, STUDY_SCHEMA)
        study.place.put_table(OUTCOMES, table)
        # Another process may have finished a cell and written before: whoever writes last looks again.
        if len(finished) == sum(is_finished(study, cell) for cell in study.cells):
            return table


def forget_failures(study: Study) -> None:
    """Have cells of which something failed be worked off again."""
    for cell in study.cells:
        place = study.cell_place(cell)
        with suppress(FileNotFoundError):
            if place.has(OUTCOME) and any(row["status"] != "ok" for row in place.read_json(OUTCOME)["rows"]):
                place.delete(OUTCOME)
