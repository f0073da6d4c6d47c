"""What a container yields: records in batches, and the markers for what could not be read."""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

Record: TypeAlias = dict[str, Any]

# A batch ends at whichever comes first; what a batch holds bounds the memory of reading.
BATCH_RECORDS = 1024
BATCH_CHARS = 4 << 20
# A single record beyond this (in bytes) is not read into memory; no response is that long.
MAX_RECORD_BYTES = 1 << 29


class Broken(NamedTuple):
    """One record that cannot be read; those after it can."""

    reason: str


_LINE = re.compile(r"line (\d+):")


def with_lines_before(reason: str, n_lines: int) -> str:
    """A `Broken`'s reason that begins with a line's number, where so many lines come before that were not counted."""
    return _LINE.sub(lambda match: f"line {int(match[1]) + n_lines}:", reason, count=1)


class Unreadable(NamedTuple):
    """The rest of a file, or of one of its row groups: rows that cannot be read, in an unknown or a large number."""

    reason: str


class FromJson(dict[str, Any]):
    """An object that a JSON text in a record says: its nulls are its own, even in a columnar file."""


def from_json(text: str) -> Any:
    """What a JSON text says. Raises ValueError, or RecursionError where it is nested too deeply."""
    return json.loads(text, object_hook=FromJson)


class NumberList:
    """A list of numbers in a columnar file: unfolded only when asked for, since most are embeddings or token ids."""

    __slots__ = ("_column", "_index")

    def __init__(self, column: pa.Array, index: int) -> None:
        self._column = column
        self._index = index

    def __repr__(self) -> str:
        return "a list of numbers"

    def unfolded(self) -> list[Any]:
        """The numbers, None for those that are null."""
        numbers: list[Any] = self._column[self._index].as_py()
        return numbers


class Opaque:
    """Stands for a value that cannot be told: it costs only those rows that need it. Its repr says what it is."""

    __slots__ = ("_kind",)

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return self._kind


# What a name stands for that a record has twice, with values that differ.
AMBIGUOUS = Opaque("two values under one name")

Records: TypeAlias = list[Record | Broken | Unreadable]


class Batch(NamedTuple):
    """Some records in file order; `position` is how many of the source's bytes they and those before them took."""

    records: Records
    position: int
