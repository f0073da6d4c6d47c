"""What a study found: a row a trained model and evaluation, and what of it one figure a generator is. No torch."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.errors import RunError, UsageError
from fastcompat.rows import FloatArray

OUTCOMES = "outcomes.parquet"
# The status of a figure that is there; any other says why there is none.
DONE = "ok"
# One figure of one trained model. `length_bias`: of a win rate, how often the longer of two answers won. `circular`:
# the reward model that judged is one whose rewards the run has.
STUDY_SCHEMA = pa.schema(
    [
        ("base_model", pa.string()),
        ("generator", pa.string()),
        ("seed", pa.int64()),
        ("evaluation", pa.string()),
        ("value", pa.float64()),
        ("n", pa.int64()),
        ("standard_error", pa.float64()),
        ("lower_is_better", pa.bool_()),
        ("reward_model", pa.string()),
        ("circular", pa.bool_()),
        ("length_bias", pa.float64()),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("seconds", pa.float64()),
    ]
)


class Measured(NamedTuple):
    """One evaluation under one base model: `values` [G, S] of generators and seeds, NaN where a cell has none."""

    generators: tuple[str, ...]
    seeds: tuple[int, ...]
    values: FloatArray

    def complete(self, generators: Sequence[str]) -> Measured:
        """Of these generators only, in this order."""
        place = {name: k for k, name in enumerate(self.generators)}
        return Measured(tuple(generators), self.seeds, self.values[[place[name] for name in generators]])

    def means(self) -> dict[str, float]:
        """Generator -> mean over the seeds that have a figure; who has none is not there."""
        rows = zip(self.generators, self.values, strict=True)
        return {name: float(np.nanmean(row)) for name, row in rows if np.isfinite(row).any()}


def study_file(source: str | os.PathLike[str]) -> Path | None:
    """The file of outcomes that a study's directory, or its path, names; None where it is no study's."""
    path = Path(source)
    if path.is_dir():
        if not (path / OUTCOMES).exists():
            raise UsageError(f"{path}: no {OUTCOMES} there; fastcompat study run {path} writes it")
        path = path / OUTCOMES
    if path.suffix != ".parquet" or not path.exists():
        return None
    try:
        names = set(pq.read_schema(path).names)
    except (OSError, pa.ArrowException):
        return None  # whoever reads it says what is wrong
    return path if {"base_model", "generator", "seed", "evaluation", "value", "status"} <= names else None


def read_outcomes(source: str | os.PathLike[str]) -> pa.Table:
    """A study's rows, `STUDY_SCHEMA`. Raises UsageError where it is no study, RunError for a damaged file."""
    path = study_file(source)
    if path is None:
        raise UsageError(f"{source} has no outcomes of a study; fastcompat study run DIR writes them")
    try:
        return pq.read_table(path).select(STUDY_SCHEMA.names).cast(STUDY_SCHEMA)
    except (OSError, KeyError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged ({error}); fastcompat study run writes it again") from error


def run_of(directory: str | os.PathLike[str]) -> str | None:
    """The run that a study was planned with; None where it was planned from files, or only its outcomes are there.
    Raises RunError for a damaged plan."""
    path = Path(directory) / "plan.json"
    if not path.is_file():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))["run"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); name the run with --run") from error
    return None if run is None else str(run)


def measured(rows: pa.Table) -> dict[str, dict[str, Measured]]:
    """evaluation -> base model -> its figures, in the order of the rows."""
    found: dict[str, dict[str, dict[tuple[str, int], float]]] = defaultdict(lambda: defaultdict(dict))
    for row in rows.to_pylist():
        known = row["status"] == DONE and row["value"] is not None
        figure = row["value"] if known else np.nan
        found[row["evaluation"]][row["base_model"]][row["generator"], row["seed"]] = figure
    return {
        evaluation: {base: _as_measured(figures) for base, figures in by_base.items()}
        for evaluation, by_base in found.items()
    }


def one_figure_each(
    source: str | os.PathLike[str], rows: pa.Table, *, evaluation: str | None, base_model: str | None
) -> tuple[str, str, dict[str, float]]:
    """(evaluation, base model, generator -> mean over seeds). UsageError where one must be named, or is not there."""
    every = measured(rows)
    if evaluation is None and len(every) == 1:
        (evaluation,) = every
    if evaluation not in every:
        what = "several evaluations" if evaluation is None else f"no evaluation {evaluation}"
        raise UsageError(f"{source}: {what}; name one with --outcome: {', '.join(every)}")
    by_base = every[evaluation]
    if base_model is None and len(by_base) == 1:
        (base_model,) = by_base
    if base_model not in by_base:
        what = "several base models" if base_model is None else f"no base model {base_model}"
        raise UsageError(f"{source}: {what}; name one with --base-model: {', '.join(by_base)}")
    means = by_base[base_model].means()
    if not means:
        raise UsageError(f"{source}: {evaluation} under {base_model} has no figure; its rows say why (status, detail)")
    return evaluation, base_model, means


def _as_measured(figures: dict[tuple[str, int], float]) -> Measured:
    generators = tuple(dict.fromkeys(generator for generator, _ in figures))
    seeds = tuple(sorted({seed for _, seed in figures}))
    values = np.full((len(generators), len(seeds)), np.nan)
    for (generator, seed), figure in figures.items():
        values[generators.index(generator), seeds.index(seed)] = figure
    return Measured(generators, seeds, values)


def failures(rows: pa.Table) -> list[dict[str, Any]]:
    """The rows without a figure."""
    return [row for row in rows.to_pylist() if row["status"] != DONE]
