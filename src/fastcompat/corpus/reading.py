"""The rows of one file, or of a stretch of it, in its order, with what is to be said about them afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from fastcompat.corpus.accounts import Account, HowRead
from fastcompat.corpus.bytestream import ByteStream
from fastcompat.corpus.containers import SourceReader, Stretch
from fastcompat.corpus.documents import Inside, records_inside
from fastcompat.corpus.formats import SAMPLE_RECORDS, Overrides, RecordReader
from fastcompat.corpus.jsonrecords import whole_lines
from fastcompat.corpus.jsonvalues import JsonReader
from fastcompat.corpus.records import AMBIGUOUS, Broken, Record, Records, Unreadable
from fastcompat.corpus.sources import Source
from fastcompat.corpus.summary import FileSummary
from fastcompat.corpus.turns import Reading
from fastcompat.corpus.values import storable
from fastcompat.errors import SchemaError

# Where records are large or broken, the mapping is chosen from what this many batches hold.
_SAMPLE_BATCHES = 4


class Opening(NamedTuple):
    """What a file's beginning decides for all of it.

    sample: the records that its mapping is chosen from; n_valid: how many could be read with them. thorough_until:
    bytes in which names twice are looked for; has_twice: whether there were any.
    """

    sample: list[Record]
    n_valid: int
    thorough_until: int = 0
    has_twice: bool = False


def opening_of(source: Source, overrides: Overrides | None) -> Opening | None:
    """None where more than the beginning of a file tells how it is read, so that it cannot be read in stretches."""
    return _opening_of(source, tuple((overrides or {}).items()))


# A process mostly reads one stretch of a file after another.
@lru_cache(maxsize=2)
def _opening_of(source: Source, items: tuple[tuple[str, str], ...]) -> Opening | None:
    overrides = dict(items)
    container = SourceReader(source)
    try:
        sample: list[Record] = []
        n_batches = 0
        lines = container.lines
        for records, _ in container:
            if not _is_enough(sample, n_batches):
                n_batches += 1
                sample.extend(record for record in records if type(record) is dict)
            if _is_enough(sample, n_batches) and (lines is None or lines.has_twice_at_first is not None):
                break
        else:
            # All of it. A file whose only record is none may be a document that holds the records.
            in_json = lines is not None
            if RecordReader(sample[:SAMPLE_RECORDS], overrides=overrides, more_columns=in_json).mapping is None:
                return None
    finally:
        container.close()
    if lines is None:
        return Opening(sample[:SAMPLE_RECORDS], len(sample))
    n_first = _first_lines_bytes(source)
    if n_first is None or lines.has_twice_at_first is None:
        return None
    return Opening(sample[:SAMPLE_RECORDS], len(sample), n_first, lines.has_twice_at_first)


def _first_lines_bytes(source: Source) -> int | None:
    """How many bytes the lines take in which names twice are looked for; None where one is too long to be read."""
    stream = ByteStream(source)
    try:
        chunk = next(whole_lines(stream), None)
    finally:
        stream.close()
    return None if chunk is None else len(chunk)


def _is_enough(sample: Sequence[Record], n_batches: int) -> bool:
    return len(sample) >= SAMPLE_RECORDS or n_batches >= _SAMPLE_BATCHES


class SourceRows:
    """Iterates once over (record's index, its readings, bytes of the file that were read).

    stretch: what is read of the file, when its `opening` has told how; its indices and numbers of lines begin anew.
    `at_line`: whether the readings given last are of a line of a stretch that is no record, and say its number.
    """

    def __init__(
        self,
        source: Source,
        overrides: Overrides | None,
        stretch: Stretch | None = None,
        opening: Opening | None = None,
    ) -> None:
        self._source = source
        self._overrides = overrides
        self._opening = opening
        json_reader = (
            JsonReader(thorough=stretch.begin < opening.thorough_until, has_twice=opening.has_twice)
            if stretch and opening
            else None
        )
        self._container = SourceReader(source, stretch, json_reader)
        self.reader: RecordReader | None = None
        self.n_valid = 0
        self.at_line = False
        self._account = Account(in_part=stretch is not None)
        self._index = 0
        # Of the columns that records have had so far.
        self._names: set[str] = set()
        if opening is not None:
            self.reader = self._reader_for(opening.sample)
            self.n_valid = opening.n_valid

    def __iter__(self) -> Iterator[tuple[int, list[Reading], int]]:
        held: list[tuple[Records, int]] = []
        sample: list[Record] = []
        for records, position in self._container:
            if self.reader is None:
                held.append((records, position))
                sample.extend(record for record in records if type(record) is dict)
                if not _is_enough(sample, len(held)):
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
        """What the file was; asked at the end, where all of it was read."""
        return self.how_read().summary(self._source, self._container.sha256())

    def how_read(self) -> HowRead:
        """What is to be said of the rows; asked at the end."""
        reader, lines = self.reader, self._container.lines
        assert reader is not None
        had_twice = self._opening is not None and self._opening.has_twice
        self._account.n_lines = lines.n_lines if lines else 0
        return HowRead(
            account=self._account,
            container=self._container.container,
            mapping=reader.mapping.describe() if reader.mapping else "",
            lacks=reader.problem,
            n_valid=self.n_valid,
            has_twice=lines is not None and lines.reader.has_twice and not had_twice,
            alone=reader.read_alone() if self._account.in_part else None,
        )

    def close(self) -> None:
        """Close the file."""
        self._container.close()

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
        self._account.tally = reader.tally
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
        read, account = self.reader.read, self._account
        statuses = account.statuses
        numbered = account.in_part and self._container.container == "jsonl"
        for record in records:
            if type(record) is dict and not record.keys() <= self._names:
                self._note_new(record)
            self.at_line = numbered and type(record) is Broken
            readings = read(record)
            for reading in readings:
                statuses[reading.status] += 1
                if reading.detail:
                    account.count(reading.detail, of_line=self.at_line)
            yield self._index, readings, position
            self._index += 1
            if type(record) is Unreadable:
                account.unreadable.append(record.reason)
            else:
                account.n_records += 1

    def _note_new(self, record: Record) -> None:
        mapping = self.reader.mapping if self.reader else None
        for name, value in record.items():
            if name in self._names or value is None:
                continue
            # A struct per generator may come late, and is read.
            is_struct = mapping is not None and bool(mapping.structs) and isinstance(value, dict) and "content" in value
            self._account.note_column(name, is_read=is_struct)
            self._names.add(name)


def _which_is_meant(found: Sequence[Inside]) -> str:
    places = ", ".join(
        f"{inside.where} ({len(inside.records):,} record{'s' * (len(inside.records) > 1)})" for inside in found
    )
    return f"the document holds records in several places: {places}; write what is meant to files of its own"
