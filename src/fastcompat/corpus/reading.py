"""The rows of one file, in its order, with what is to be said about the file afterwards."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.documents import records_inside
from fastcompat.corpus.formats import SAMPLE_RECORDS, Overrides, RecordReader
from fastcompat.corpus.records import Broken, Record, Unreadable
from fastcompat.corpus.sources import Source
from fastcompat.corpus.summary import FileSummary
from fastcompat.corpus.turns import Reading
from fastcompat.response import Status

# Where records are large or broken, the mapping is chosen from what this many batches hold.
_SAMPLE_BATCHES = 4
_COUNTED_REASONS = 8
_OTHER_REASONS = "other"
_NUMBER = re.compile(r"\d+")

Records = list[Record | Broken | Unreadable]


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
        self._unreadable = ""
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
                self.reader = self._reader_for(sample)
                for each in held:
                    yield from self._readings(*each)
                held = []
            else:
                yield from self._readings(records, position)
        if self.reader is None:
            self.reader = self._reader_for(sample)
            if self.reader.mapping is None and self._container.container.startswith("json"):
                held = self._unwrapped(held)
            for each in held:
                yield from self._readings(*each)

    def summary(self) -> FileSummary:
        """What the file was; asked at the end."""
        reader = self.reader
        assert reader is not None
        problem = self._unreadable
        if not problem and not self.n_records:
            problem = "the file holds no record"
        elif not problem and reader.mapping is None:
            problem = reader.problem if self.n_valid else "not one of its records can be read"
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
            other_shapes=dict(sorted(reader.tally.other_shapes.items())),
            problem=problem,
            reasons={self._examples.get(reason, reason): count for reason, count in self._reasons.most_common()},
        )

    def close(self) -> None:
        """Close the file."""
        self._container.close()

    def _reader_for(self, sample: Sequence[Record], label: str = "") -> RecordReader:
        self.n_valid = len(sample)
        return RecordReader(
            sample[:SAMPLE_RECORDS],
            overrides=self._overrides,
            label=label or self._source.label,
            more_columns=self._container.container.startswith("json"),
        )

    def _unwrapped(self, held: list[tuple[Records, int]]) -> list[tuple[Records, int]]:
        """What a file has whose only record is none: perhaps the document that holds the records."""
        only = [record for records, _ in held for record in records]
        if len(only) != 1 or type(only[0]) is not dict:
            return held
        inside = records_inside(only[0], lambda records: self._reader_for(records).mapping is not None)
        if inside is None:
            self.n_valid = 1
            return held
        sample = [record for record in inside.records if type(record) is dict]
        self.reader = self._reader_for(sample, f"{self._source.label}, {inside.where},")
        if self.reader.mapping:
            self.reader.mapping = replace(self.reader.mapping, inside=inside.where)
        return [([*inside.records], self._source.size)]

    def _readings(self, records: Records, position: int) -> Iterator[tuple[int, list[Reading], int]]:
        assert self.reader is not None
        read = self.reader.read
        for record in records:
            readings = read(record)
            for reading in readings:
                self._statuses[reading.status] += 1
                if reading.detail:
                    self._count(reading.detail)
            yield self.n_records, readings, position
            if type(record) is Unreadable:
                self._unreadable = record.reason
            else:
                self.n_records += 1

    def _count(self, detail: str) -> None:
        reason = _NUMBER.sub("#", detail)
        if reason not in self._examples:
            if len(self._examples) >= _COUNTED_REASONS:
                self._reasons[_OTHER_REASONS] += 1
                return
            self._examples[reason] = detail
        self._reasons[reason] += 1
