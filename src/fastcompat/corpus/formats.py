"""Records -> Response rows, through the mapping that fits their file.

A record that the file's mapping does not fit is tried alone against the known shapes; one that fits none becomes an
`invalid` row that says what is missing. No record ever goes without a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Mapping as AbstractMapping

from fastcompat.corpus.detection import detect
from fastcompat.corpus.mapping import Mapping, Overrides, parse_overrides
from fastcompat.corpus.records import Broken, Record, Unreadable
from fastcompat.corpus.sample import form_of
from fastcompat.corpus.shapes import MissingColumnError, Read
from fastcompat.corpus.turns import Reading, Tally, invalid
from fastcompat.corpus.values import kind_of, storable
from fastcompat.errors import SchemaError
from fastcompat.rows import Response, Status

__all__ = [
    "SAMPLE_RECORDS",
    "Mapping",
    "Overrides",
    "RecordReader",
    "Tally",
    "detect",
    "parse_overrides",
    "rows_from_records",
]

# How many valid records of a file decide its mapping.
SAMPLE_RECORDS = 64
# Broken records may come first; past this many the mapping is chosen from what there is.
_SAMPLE_SEARCH = 16384
# As many forms of records that the mapping does not fit are known at a time.
REMEMBERED_FORMS = 1024


class RecordReader:
    """Reads the records of one file. `mapping` is None where no known shape fits; `error` and, in short, `problem`
    then say why. `more_columns` is False where later records cannot have columns that the sample lacks.
    """

    def __init__(
        self,
        sample: Sequence[Record],
        *,
        overrides: Overrides | None = None,
        label: str = "the records",
        more_columns: bool = True,
    ) -> None:
        self.tally = Tally(null_is_absent=not more_columns)
        self.mapping: Mapping | None = None
        self.error: SchemaError | None = None
        self.problem = ""
        self._overrides = overrides
        # Of records that the mapping does not fit, by their form: what fits, as the first of that form told.
        self._alone: dict[object, tuple[Mapping, Read] | None] = {}
        self._has_forgotten = False
        self._read: Read = self._read_unmapped
        try:
            self.mapping = detect(sample, overrides=overrides, label=label, more_columns=more_columns)
            self._read = self.mapping.reader()
        except SchemaError as error:
            self.error = error
            # The closest shape's lack stands on the line after "Shapes tried".
            first, *rest = str(error).splitlines()
            self.problem = f"no known schema; closest: {rest[1].strip()}" if len(rest) > 1 else first

    def read(self, record: object) -> list[Reading]:
        """One reading for each response of the record, at least one."""
        if type(record) is dict:
            try:
                readings = self._read(record, self.tally)
            except MissingColumnError as missing:
                readings = self._read_alone(record, missing.reading)
        elif type(record) is Broken:
            return [invalid(record.reason)]
        elif type(record) is Unreadable:
            return [Reading((), None, Status.UNREADABLE, storable(record.reason))]
        elif isinstance(record, AbstractMapping):
            return self.read(dict(record))
        else:
            return [invalid(f"a record is {kind_of(record)}, not an object")]
        for reading in readings:
            if reading.generator is not None and not reading.generator.isascii():
                return [_with_storable_generator(each) for each in readings]
        return readings

    def _read_unmapped(self, record: Record, tally: Tally) -> list[Reading]:
        found = ", ".join(map(str, list(record)[:12])) or "none"
        raise MissingColumnError("", invalid(f"{self.problem}; this record has: {found}"))

    def _read_alone(self, record: Record, otherwise: Reading) -> list[Reading]:
        filled = {name: value for name, value in record.items() if value is not None}
        key = tuple((name, form_of(value)) for name, value in filled.items())
        if key not in self._alone:
            if len(self._alone) >= REMEMBERED_FORMS:
                self._alone.clear()
                self._has_forgotten = True
            self._alone[key] = self._mapping_of(filled)
        fitting = self._alone[key]
        if fitting is None:
            return [otherwise]
        try:
            readings = fitting[1](filled, self.tally)
        except MissingColumnError:
            return [otherwise]
        self.tally.other_shapes[", ".join(sorted(map(str, filled)))] += 1
        return readings

    def read_alone(self) -> dict[str, str] | None:
        """How records that the mapping does not fit were read, by their form; None where some of it is forgotten.

        Who has read a part of a file, and of whose forms the rest knows the same, has read it as in one go.
        """
        if self._has_forgotten:
            return None
        return {repr(form): "" if fitting is None else _reading(fitting[0]) for form, fitting in self._alone.items()}

    def _mapping_of(self, record: Record) -> tuple[Mapping, Read] | None:
        try:
            mapping = detect([record], overrides=self._overrides)
        except SchemaError:
            return None
        # A response that an override names may stand without a prompt, but not where the prompt is only null.
        if self.mapping and self.mapping.shape == mapping.shape == "prompt + response":
            lost = self.mapping.columns.keys() - mapping.columns.keys()
            return None if "prompt" in lost else (mapping, mapping.reader())
        return mapping, mapping.reader()


def _reading(mapping: Mapping) -> str:
    """Equal for mappings that read alike."""
    rewards = [(column.name, column.path, column.where, column.late) for column in mapping.rewards]
    return repr((mapping.shape, mapping.columns, mapping.structs, rewards))


def take_sample(records: Iterable[object]) -> tuple[list[Record], Iterator[object]]:
    """The first valid records, and all the records from the start."""
    source = iter(records)
    seen: list[object] = []
    sample: list[Record] = []
    for record in source:
        seen.append(record)
        if isinstance(record, AbstractMapping):
            sample.append(dict(record))
        if len(sample) >= SAMPLE_RECORDS or len(seen) >= _SAMPLE_SEARCH:
            break
    return sample, itertools.chain(seen, source)


def rows_from_records(
    records: Iterable[AbstractMapping[str, object]],
    *,
    overrides: Overrides | None = None,
    source: str = "rows",
    generator: str = "unknown",
    columnar: bool = False,
) -> list[Response]:
    """The responses of in-memory records, in input order; a record with several responses gives several rows.

    `generator` names those that name none themselves. columnar: they are a table's rows, and have all its columns.
    Raises SchemaError where not one record has a known shape.
    """
    sample, every = take_sample(records)
    reader = RecordReader(sample, overrides=overrides, label=source, more_columns=not columnar)
    rows = [
        reading.response(generator=generator, source=source, row_index=row_index, response_index=response_index)
        for row_index, record in enumerate(every)
        for response_index, reading in enumerate(reader.read(record))
    ]
    if reader.error is not None and sample and all(row.status is Status.INVALID for row in rows):
        raise reader.error
    return rows


def _with_storable_generator(reading: Reading) -> Reading:
    name = reading.generator
    if name is None:
        return reading
    try:
        name.encode()
    except UnicodeEncodeError:
        detail = "an unpaired surrogate in the generator's name"
        return reading._replace(generator=storable(name), status=Status.INVALID, detail=detail)
    return reading
