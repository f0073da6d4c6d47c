"""Runs that `FakeModel` scores: small units of a few packs each."""

from __future__ import annotations

from pathlib import Path

from corpora import prepare_small_units
from fake_model import FakeModel, fake_tokenizer

from fastcompat.rows.response import Response, from_table
from fastcompat.scoring.engine import Progress, score_run
from fastcompat.scoring.losses import ResponseScores
from fastcompat.scoring.packs import pack_sequences
from fastcompat.store.parts import ScorerStore, Unit, part_name
from fastcompat.store.run import Run

BUDGET = 48


def new_run(directory: Path, corpus: Path, *, target_unit_chars: int = 1200) -> tuple[Run, ScorerStore]:
    """Units of some eight rows, in some three packs each."""
    run = prepare_small_units(directory, corpus, target_unit_chars=target_unit_chars)
    assert len(run.units) * target_unit_chars > 10_000
    store = run.scorer("fake", {"kind": "base_model"}, lambda: {"model": "fake", "token_budget": BUDGET})
    return run, store


def score(run: Run, store: ScorerStore, model: object, tokenizer=fake_tokenizer, **options) -> Progress:
    progress = Progress()
    options = {"units": run.pending(store), "progress": progress} | options
    score_run(run, [store], model, lambda rows: ResponseScores(tokenizer(rows)), token_budget=BUDGET, **options)
    return progress


def parts(store: ScorerStore) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in store.place.directory.glob("part-*.parquet")}


def rows_of_unit(run: Run, unit: Unit) -> list[Response]:
    return from_table(run.unit_rows(unit))


def packs_of(run: Run, unit: Unit) -> int:
    sequences = fake_tokenizer(rows_of_unit(run, unit))
    return len(pack_sequences(FakeModel(), ResponseScores(sequences), token_budget=BUDGET))


def part_path(store: ScorerStore, unit: Unit) -> Path:
    """Where a unit's part lies."""
    return store.place.directory / part_name(unit)
