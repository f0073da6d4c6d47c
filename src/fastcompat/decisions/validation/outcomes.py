"""What training on each generator's responses brought, from a file or the paper, and whose scores it belongs to."""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcompat.corpus import GENERATORS, number_of
from fastcompat.decisions.validation import paper
from fastcompat.decisions.validation.study_outcomes import one_figure_each, read_outcomes, study_file
from fastcompat.errors import UsageError

PAPER = "paper:"
OUTCOMES_SCHEMA = pa.schema([("generator", pa.string()), ("outcome", pa.float64())])
# Schema metadata: what the outcomes are (of `outcomes`), and whom they were matched with (of `validate`), as JSON.
METADATA_KEY = b"fastcompat.validation"


def outcomes(source: str | os.PathLike[str], *, column: str | None = None, base_model: str | None = None) -> pa.Table:
    """What training on each generator's responses brought: `OUTCOMES_SCHEMA`, one row per generator, in file order.

    source: a CSV, TSV, JSON (a list of records, or an object generator -> number), JSONL or Parquet file with a column
    that names the generator and a numeric one; or "paper:BASE_MODEL", the average performance in the paper's Table 6
    for one of its five base models, named freely (`paper.find_base_model`). column: the outcome, where a file has
    several numeric columns; without it, one called `outcome` is taken. Or a study, its directory or its
    outcomes.parquet: then column is one of its evaluations, base_model one of its base models (each may be left away
    where there is one only), and a generator's outcome is the mean over its training seeds.

    Raises UsageError: no such file or base model, no generator column, no or several numeric columns, an outcome that
    is no finite number, a generator twice.
    """
    text = os.fspath(source)
    if text.startswith(PAPER):
        base_model = paper.base_model_named(text.removeprefix(PAPER).strip())
        table = paper.average_performance().filter(pc.equal(paper.average_performance()["base_model"], base_model))
        told = {"source": text, "outcome": "average_performance", "base_model": base_model}
        return _outcome_table(table["generator"].to_pylist(), table["average_performance"].to_pylist(), told)
    if study_file(source) is not None:
        evaluation, trained, means = one_figure_each(
            text, read_outcomes(source), evaluation=column, base_model=base_model
        )
        told = {"source": text, "outcome": evaluation, "trained": trained}
        return _outcome_table(list(means), list(means.values()), told)
    return outcomes_in(_records(Path(text)), text, column=column)


def outcomes_in(records: Sequence[Mapping[str, Any]], text: str, *, column: str | None = None) -> pa.Table:
    """`outcomes` of rows that are there already; `text` is what messages call them."""
    if not records:
        raise UsageError(f"{text}: no rows; outcomes have a row for each generator")
    names = list(dict.fromkeys(str(name) for record in records for name in record))
    named = next((name for name in GENERATORS if name in names), None)
    if named is None:
        raise UsageError(f"{text}: no column generator (or {GENERATORS[1]}); its columns are {', '.join(names)}")
    column = _outcome_column(text, records, [name for name in names if name != named], column)
    found: dict[str, float] = {}
    for place, record in enumerate(records, 1):
        generator = record.get(named)
        if generator is None or not str(generator).strip():
            raise UsageError(f"{text}: row {place} names no {named}")
        name, number = str(generator).strip(), number_of(record.get(column))
        if number is None:
            raise UsageError(
                f"{text}: {column} of {name} is {record.get(column)!r}, not a finite number; "
                "leave a generator without an outcome out of the file"
            )
        if name in found:
            raise UsageError(f"{text}: {name} is there twice; keep one outcome a generator, of one base model")
        found[name] = number
    return _outcome_table(list(found), list(found.values()), {"source": text, "outcome": column})


def match_generators(ours: Sequence[str], theirs: Sequence[str]) -> dict[str, str]:
    """Ours -> theirs, for all who have exactly one partner: first by the same name, then by names that mean the same.

    They do where case, "-", "_" and spaces are all that differs, where only one says its organisation
    (`Qwen/Qwen2.5-72B-Instruct`), or one says Meta-Llama. Names of two organisations are two generators. Raises
    UsageError where a name could mean several.
    """
    matched = {name: name for name in ours if name in set(theirs)}
    rest = [name for name in theirs if name not in matched]
    candidates = {name: [other for other in rest if _same(name, other)] for name in ours if name not in matched}
    found = {name: others[0] for name, others in candidates.items() if len(others) == 1}
    for name, others in candidates.items():
        if len(others) > 1:
            raise UsageError(f"{name} could be {' or '.join(others)} in the outcomes; write its full name there")
    for other in set(found.values()):
        if len(claims := [name for name in found if found[name] == other]) > 1:
            raise UsageError(f"{other} in the outcomes could be {' or '.join(claims)}; write its full name there")
    return {name: matched.get(name) or found[name] for name in ours if name in matched or name in found}


def _same(name: str, other: str) -> bool:
    (organisation, own), (other_organisation, its) = _folded(name), _folded(other)
    return own == its and (not organisation or not other_organisation or organisation == other_organisation)


def _folded(name: str) -> tuple[str, str]:
    organisation, _, own = name.strip().rstrip("/").casefold().rpartition("/")
    own = "-".join(own.replace("_", " ").replace("-", " ").split())
    return organisation, own.removeprefix("meta-") if own.startswith("meta-llama") else own


def _records(path: Path) -> list[dict[str, Any]]:
    """A file's rows. Raises UsageError where it cannot be read."""
    try:
        if path.suffix == ".parquet":
            return list(pq.read_table(path).to_pylist())
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix in (".jsonl", ".ndjson"):
            found = [json.loads(line) for line in text.splitlines() if line.strip()]
        elif path.suffix == ".json":
            found = json.loads(text)
            if isinstance(found, dict):
                found = [{"generator": name, "outcome": value} for name, value in found.items()]
        elif path.suffix in (".csv", ".tsv"):
            found = list(csv.DictReader(io.StringIO(text), delimiter="\t" if path.suffix == ".tsv" else ","))
        else:
            raise UsageError(
                f"{path}: outcomes are read from .csv, .tsv, .json, .jsonl or .parquet, or paper:BASE_MODEL"
            )
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; give a file of outcomes, or paper:BASE_MODEL") from None
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UsageError(f"{path} cannot be read: {error}") from error
    if not isinstance(found, list) or not all(isinstance(record, dict) for record in found):
        raise UsageError(f"{path}: not a list of objects with generator and outcome")
    if (place := next((place for place, record in enumerate(found, 1) if None in record), None)) is not None:
        raise UsageError(f"{path}: row {place} has more cells than the header has columns")
    return found


def _outcome_column(text: str, records: Sequence[Mapping[str, Any]], names: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in names:
            raise UsageError(f"{text}: no column {asked}; there are {', '.join(names) or 'none'}")
        return asked
    if "outcome" in names:
        return "outcome"
    # One bad cell makes no column of text.
    numeric = [name for name in names if any(number_of(record.get(name)) is not None for record in records)]
    if len(numeric) != 1:
        which = f"several numeric columns, {', '.join(numeric)}: call one outcome" if numeric else "no numeric column"
        raise UsageError(f"{text}: {which}; it needs one beside the generator")
    return numeric[0]


def _outcome_table(generators: list[str], values: list[float], told: Mapping[str, str]) -> pa.Table:
    schema = OUTCOMES_SCHEMA.with_metadata({METADATA_KEY: json.dumps(told).encode()})
    return pa.table({"generator": generators, "outcome": values}, schema)
