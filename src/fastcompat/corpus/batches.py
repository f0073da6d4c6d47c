"""Batches of somebody's pipeline -> responses, one a row: what a file's first records decide, here a batch does.

A batch may say nothing of a column: all that one generator answered may be null, and a reference beside it not. What
a column is, an earlier batch has then decided.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

from fastcompat.corpus.arrowvalues import records_of
from fastcompat.corpus.formats import SAMPLE_RECORDS, RecordReader
from fastcompat.corpus.mapping import Mapping, Overrides
from fastcompat.corpus.records import Record, Records
from fastcompat.corpus.sample import Sample
from fastcompat.errors import SchemaError
from fastcompat.rows import Batch, Response


class BatchReader:
    """Reads the batches of one corpus. overrides: as `--map`: {"response": "answer"}."""

    def __init__(self, overrides: Overrides | None = None) -> None:
        self._overrides = overrides
        self._kept: RecordReader | None = None
        self._filled: set[str] = set()  # columns that said something when `_kept` was decided

    def read(self, batch: Batch) -> list[Response]:
        """The responses, one for each row, in order. Raises SchemaError where none is found, or rows hold several."""
        if not batch.n_rows:
            return []
        records = _records(batch)
        reader = self._decided(records)
        rows = []
        for row_index, record in enumerate(records):
            readings = reader.read(record)
            if len(readings) != 1:
                raise _several(reader.mapping, records)
            rows.append(readings[0].response(generator="unknown", source="rows", row_index=row_index, response_index=0))
        return rows

    def _decided(self, records: Records) -> RecordReader:
        filled: dict[str, Record] = {}
        for record in records:
            if type(record) is dict:
                for name, value in record.items():
                    if value is not None:
                        filled.setdefault(name, record)
        first = [record for record in records[:SAMPLE_RECORDS] if type(record) is dict]
        known = {id(record) for record in first}
        sample = [*first, *{id(record): record for record in filled.values() if id(record) not in known}.values()]
        reader = RecordReader(sample, overrides=self._overrides, label="the batch", more_columns=False)
        if reader.mapping is None:
            assert reader.error is not None
            raise reader.error
        if reader.mapping.shape in SEVERAL:
            raise _several(reader.mapping, records)
        if self._kept is not None and self._kept.mapping is not None:
            used, used_before = _columns(reader.mapping), _columns(self._kept.mapping)
            is_mute = not (used_before - used) & set(filled)
            if used != used_before and is_mute and used - used_before <= self._filled:
                return self._kept
            if used == used_before and set(filled) <= self._filled:
                return self._kept
        else:
            logging.getLogger("fastcompat").info("batches are read as %s", reader.mapping.describe())
        self._kept, self._filled = reader, set(filled)
        return reader


# Shapes of records that hold several responses.
SEVERAL = ("completions", "generations", "chosen/rejected", "struct per generator")


def _columns(mapping: Mapping) -> set[str]:
    """What the responses and their prompts are read from."""
    parts = ("prompt", "input", "response", "messages", "conversations", "history")
    return {path for part in parts for path in mapping.told.get(part) or mapping.columns.get(part, ())[:1]}


def _records(batch: Batch) -> Records:
    records: Records = [{} for _ in range(batch.n_rows)]
    if batch.table.num_columns:
        records = [record for some in batch.table.to_batches() for part in records_of(some) for record in part]
    for name, values in batch.others.items():
        for record, value in zip(records, values, strict=True):
            if type(record) is dict:
                record[name] = value
    return records


def _several(mapping: Mapping | None, records: Records) -> SchemaError:
    """Why it could not be said whose a row's figure is, and how each response gets its own."""
    columns = {} if mapping is None else mapping.columns
    shape = "" if mapping is None else mapping.shape
    prompt = columns.get("prompt", ("prompt",))[0]
    sample = Sample([record for record in records if type(record) is dict][:SAMPLE_RECORDS])
    if shape == "chosen/rejected":
        sides = [columns["chosen"][0], columns["rejected"][0]]
        turns = "turns" in sample.forms(sides[0])
        kept = {"messages": sides[0]} if turns else {"prompt": prompt, "response": sides[0]}
        one = f"scorer(batch, mapping={kept}, prefix='{sides[0]}_'), and likewise {sides[1]}; or "
        how = one + _melted(sides, "" if turns else prompt, "messages" if turns else "response")
    elif shape == "struct per generator" and mapping is not None:
        how = _melted(list(mapping.structs), prompt, "response") + ", then mapping={'response': 'response.content'}"
    else:
        column = columns.get(shape, (shape or "completions",))[0]
        text = f"{column}.response" if shape == "completions" else column
        how = f"frame.explode('{column}') in pandas and in polars, then mapping={{'response': '{text}'}}"
    return SchemaError(
        f"a row of the batch holds several responses ({shape or 'in part'}), and gets one figure. Make a row of each "
        f"response first: {how}. docs/integrations.md has it for datasets and Ray Data; scorer.score(rows) takes rows "
        "as they are, and gives one for each response"
    )


def _melted(names: Sequence[str], prompt: str, value: str) -> str:
    kept = [prompt] if prompt else []
    return (
        f"frame.melt({kept}, {list(names)}, 'generator', '{value}') in pandas, "
        f"frame.unpivot({list(names)}, index={kept}, variable_name='generator', value_name='{value}') in polars"
    )
