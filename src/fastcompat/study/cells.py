"""A cell of the grid: trained, then evaluated, each step once.

    cells/<cell>/model/             the tuned model, while the cell is not finished, or for good where it is kept
                 answers-*.parquet  what it said, so that another judge can read it
                 outcome.json       its rows, and how the training went; its presence is its commit

A process that is killed loses the step that it was at: a model that is there is whole, and is not trained again.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastcompat.errors import FastcompatError, Interrupted, RunError, UsageError
from fastcompat.scoring import out_of_memory
from fastcompat.store import Place
from fastcompat.study.evaluations import EvaluationError, Judges, Tuned, lower_is_better, measure
from fastcompat.study.plan import Cell, Study
from fastcompat.study.settings import Evaluation
from fastcompat.study.training import RECORD, TrainingError, sequences_of, tokenizer_of, train
from fastcompat.wording import first_sentence

OUTCOME = "outcome.json"
MODEL = "model"
OK = "ok"


def is_finished(study: Study, cell: Cell) -> bool:
    """Whether all is known of it that will be."""
    return study.cell_place(cell).has(OUTCOME)


def work_off(
    study: Study, cell: Cell, judges: Judges, *, keep_model: bool = False, stop: Callable[[], bool] = lambda: False
) -> None:
    """Train and evaluate what of a cell is not there yet, and commit its rows.

    What goes wrong with the model or with an evaluation is a row with the reason; Interrupted, and errors of the disk
    or of what the study rests on, are raised.
    """
    place = study.cell_place(cell)
    place.make()
    directory = Path(str(place))
    began = time.perf_counter()
    source = study.source(cell.base_model)
    tokenizer = tokenizer_of(source, study.settings.training)
    record: dict[str, Any] = {}
    try:
        if not (directory / MODEL).is_dir():
            judges.unload()
            _train(study, cell, directory, source, tokenizer, stop)
        record = json.loads((directory / MODEL / RECORD).read_text(encoding="utf-8"))
    except Exception as error:
        status, detail = _reason(error)
        rows = [outcome_row(study, cell, one, status=status, detail=f"training: {detail}") for one in study.evaluations]
        _commit(place, rows, record, time.perf_counter() - began)
        return
    tuned = Tuned(study, cell, directory / MODEL, place, tokenizer, judges, stop)
    rows = []
    for one in study.evaluations:
        if stop():
            raise Interrupted("interrupted between two evaluations; what was finished is kept")
        started = time.perf_counter()
        try:
            found = measure(tuned, one)
            figures = {"value": found.value, "n": found.n, "standard_error": _number(found.standard_error)}
            figures |= {"length_bias": found.length_bias}
            row = outcome_row(study, cell, one, status=OK, detail=found.detail, **figures)
        except Exception as error:
            status, detail = _reason(error)
            row = outcome_row(study, cell, one, status=status, detail=detail)
        rows.append(row | {"seconds": round(time.perf_counter() - started, 3)})
    _commit(place, rows, record, time.perf_counter() - began, model_kept=keep_model)
    if not keep_model:
        shutil.rmtree(directory / MODEL, ignore_errors=True)


def _train(study: Study, cell: Cell, directory: Path, source: str, tokenizer: Any, stop: Callable[[], bool]) -> None:
    """Into a directory of another name, renamed once it is whole."""
    for abandoned in directory.glob(f".{MODEL}-*"):  # the claim is this process's: nobody works in it
        shutil.rmtree(abandoned, ignore_errors=True)
    temporary = directory / f".{MODEL}-{time.time_ns()}"
    temporary.mkdir()
    try:
        sequences = sequences_of(tokenizer, study.rows.trained[cell.generator])
        train(source, sequences, study.settings.training, cell.seed, temporary, tokenizer=tokenizer, stop=stop)
        temporary.rename(directory / MODEL)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _reason(error: Exception) -> tuple[str, str]:
    """(status, detail) of what a cell's rows may say; raises what is no matter of the cell."""
    if isinstance(error, TrainingError):
        return error.status, str(error)
    if isinstance(error, EvaluationError):
        return "failed", str(error)
    if out_of_memory(error):
        return "out_of_memory", f"{first_sentence(error)}; try fewer batch_tokens, or lora_rank"
    if isinstance(error, Interrupted | RunError | UsageError) or (
        isinstance(error, OSError) and not isinstance(error, FastcompatError)
    ):
        raise error
    return "failed", f"{type(error).__name__}: {first_sentence(error)}"


def outcome_row(
    study: Study, cell: Cell, evaluation: Evaluation, *, status: str, detail: str, **figures: Any
) -> dict[str, Any]:
    """Of `STUDY_SCHEMA`; a figure that is not given is null."""
    judge = study.record["judges"].get(evaluation.reward_model, {"name": None, "circular": False})
    return {
        "base_model": cell.base_model,
        "generator": cell.generator,
        "seed": cell.seed,
        "evaluation": evaluation.label,
        "lower_is_better": lower_is_better(evaluation.name),
        "reward_model": judge["name"],
        "circular": judge["circular"],
        "status": status,
        "detail": detail,
        **figures,
    }


def remove_left_model(study: Study, cell: Cell) -> None:
    """Of a finished cell whose model was not to be kept, and whose process was killed before it was removed."""
    model = Path(str(study.cell_place(cell))) / MODEL
    if model.is_dir() and not study.cell_place(cell).read_json(OUTCOME).get("model_kept", True):
        shutil.rmtree(model, ignore_errors=True)


def _commit(
    place: Place, rows: list[dict[str, Any]], training: dict[str, Any], seconds: float, *, model_kept: bool = False
) -> None:
    told = {"rows": rows, "training": training, "seconds": round(seconds, 3), "model_kept": model_kept}
    place.put_new_json(OUTCOME, told)


def _number(value: float) -> float | None:
    return value if value == value else None
