"""The rows of one file, in its order, with what is to be said about the file afterwards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.documents import Inside, records_inside
from fastcompat.corpus.formats import SAMPLE_RECORDS, Overrides, RecordReader
from fastcompat.corpus.records import AMBIGUOUS, Record, Records, Unreadable
from fastcompat.corpus.sources import Source
from fastcompat.corpus.summary import FileSummary
from fastcompat.corpus.turns import Reading
from fastcompat.corpus.values import storable
from fastcompat.errors import SchemaError
from fastcompat.rows import Status

# Where records are large or broken, the mapping is chosen from what this many batches hold.
_SAMPLE_BATCHES = 4
_COUNTED_REASONS = 8
_OTHER_REASONS = "other"
_COUNTED_COLUMNS = 64
_NUMBER = re.compile(r"\d+")


class SourceRows:
    """Iterates once over (record's index, its readings, bytes of the file that were read)."""

    def __init__(self, source: Source, overrides: Overrides | None) -> None:
        self._source = source
        self._overrides = overrides
        self._container = SourceReader(source)
        self.reader: RecordReader | None = None
        self.n_records = 0
        self.n_valid = 0
        self._statuses: Counter[Status] = Counter()
        self._index = 0
        # Of the columns that records have had so far; those that nobody reads and that came after the first records.
        self._names: set[str] = set()
        self._late: dict[str, None] = {}
        self._unreadable: list[str] = []
        # By the detail with its numbers left out; the first detail of each stands for all.
        self._reasons: Counter[str] = Counter()
        self._examples: dict[str, str] = {}

    def __iter__(self) -> Iterator[tuple[int, list[Reading], int]]:
        held: list[tuple[Records, int]] = []
        sample: list[Record] = []
        for records, position in self._container:
            if self.reader is None:
                held.append((records, position))
                sample.extend(record for record in records if type(record) is dict)
                if len(sample) < SAMPLE_RECORDS and len(held) < _SAMPLE_BATCHES:
                    continue
                self.reader = self._reader_for(sample, self._container.inside)
                for each in held:
                    yield from self._readings(*each)
                held = []
            else:
                yield from self._readings(records, position)
        if self.reader is None:
            self.reader = self._reader_for(sample, self._container.inside)
            if self.reader.mapping is None and self._container.container.startswith("json"):
                held = self._unwrapped(held)
            for each in held:
                yield from self._readings(*each)

    def summary(self) -> FileSummary:
        """What the file was; asked at the end."""
        reader = self.reader
        assert reader is not None
        reasons = {self._examples.get(reason, reason): count for reason, count in self._reasons.most_common()}
        return FileSummary(
            label=self._source.label,
            size=self._source.size,
            mtime_ns=self._source.mtime_ns,
            sha256=self._container.sha256(),
            oid=self._source.oid,
            container=self._container.container,
            mapping=reader.mapping.describe() if reader.mapping else "",
            n_records=self.n_records,
            n_rows=self._statuses.total(),
            statuses={str(status): count for status, count in sorted(self._statuses.items())},
            dropped_turns=reader.tally.dropped_turns,
            unknown_roles=dict(sorted(reader.tally.unknown_roles.items())),
            other_shapes={storable(names): count for names, count in sorted(reader.tally.other_shapes.items())},
            late_columns=tuple(self._late),
            problem=self._problem(reader, reasons),
            reasons=reasons,
        )

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _problem(self, reader: RecordReader, reasons: Mapping[str, int]) -> str:
        if self._unreadable:
            more = len(self._unreadable) - 1
            return self._unreadable[0] + (f" (and {more:,} more such places)" if more else "")
        if not self.n_records:
            return "the file holds no record"
        if reader.mapping is None:
            return reader.problem if self.n_valid else "not one of its records can be read"
        if Status.OK not in self._statuses and reasons:
            reason, count = next(iter(reasons.items()))
            return f"not one of its rows can be scored: {reason} ({count:,} of {self._statuses.total():,})"
        return ""

    def _new_reader(self, sample: Sequence[Record], inside: str = "") -> RecordReader:
        return RecordReader(
            sample[:SAMPLE_RECORDS],
            overrides=self._overrides,
            label=f"{self._source.label}, {inside}," if inside else self._source.label,
            more_columns=self._container.container.startswith("json"),
        )

    def _reader_for(self, sample: Sequence[Record], inside: str = "") -> RecordReader:
        self.n_valid = len(sample)
        reader = self._new_reader(sample, inside)
        self._names = {name for record in sample[:SAMPLE_RECORDS] for name in record}
        if reader.mapping:
            reader.mapping = replace(reader.mapping, inside=inside)
            self._names |= {path for paths in reader.mapping.columns.values() for path in paths}
        elif twice := [f"`{name}`" for name, value in (sample[0] if sample else {}).items() if value is AMBIGUOUS]:
            why = storable(f"two columns with different values are named {', two '.join(twice)}")
            reader.problem = f"no known schema: {why}"
            reader.error = SchemaError(f"{reader.error}\nIn {self._source.label} {why}; rename one.")
        return reader

    def _unwrapped(self, held: list[tuple[Records, int]]) -> list[tuple[Records, int]]:
        """What a file has whose only record is none: perhaps the document that holds the records."""
        only = [record for records, _ in held for record in records]
        if len(only) != 1 or type(only[0]) is not dict:
            return held
        found = records_inside(only[0], lambda records: self._new_reader(records).mapping is not None)
        if len(found) == 1:
            sample = [record for record in found[0].records if type(record) is dict]
            self.reader = self._reader_for(sample, found[0].where)
            return [([*found[0].records], self._source.size)]
        if found and self.reader is not None:
            self.reader.problem = _which_is_meant(found)
            self.reader.error = SchemaError(f"{self._source.label}: {self.reader.problem}.")
        return held

    def _readings(self, records: Records, position: int) -> Iterator[tuple[int, list[Reading], int]]:
        assert self.reader is not None
        read = self.reader.read
        for record in records:
            if type(record) is dict and not record.keys() <= self._names:
                self._note_new(record)
            readings = read(record)
            for reading in readings:
                self._statuses[reading.status] += 1
                if reading.detail:
                    self._count(reading.detail)
            yield self._index, readings, position
            self._index += 1
            if type(record) is Unreadable:
                self._unreadable.append(record.reason)
            else:
                self.n_records += 1

    def _note_new(self, record: Record) -> None:
        mapping = self.reader.mapping if self.reader else None
        for name, value in record.items():
            if name in self._names or value is None:
                continue
            # A struct per generator may come late, and is read.
            is_struct = mapping is not None and bool(mapping.structs) and isinstance(value, dict) and "content" in value
            if not is_struct and len(self._late) < _COUNTED_COLUMNS:
                self._late[storable(str(name))] = None
            self._names.add(name)

    def _count(self, detail: str) -> None:
        reason = _NUMBER.sub("#", detail)
        if reason not in self._examples:
            if len(self._examples) >= _COUNTED_REASONS:
                self._reasons[_OTHER_REASONS] += 1
                return
            self._examples[reason] = detail
        self._reasons[reason] += 1


def _which_is_meant(found: Sequence[Inside]) -> str:
    places = ", ".join(
        f"{inside.where} ({len(inside.records):,} record{'s' * (len(inside.records) > 1)})" for inside in found
    )
    return f"the document holds records in several places: {places}; write what is meant to files of its own"
