"""What a container yields: records, and the two markers for what could not be read."""

from __future__ import annotations

import json
from typing import Any, NamedTuple, TypeAlias

import pyarrow as pa

Record: TypeAlias = dict[str, Any]

# A batch ends at whichever comes first; what a batch holds bounds the memory of reading.
BATCH_RECORDS = 1024
BATCH_CHARS = 4 << 20


class Broken(NamedTuple):
    """One record that cannot be read; those after it can."""

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


class Unreadable(NamedTuple):
    """The rest of a file: nothing after this point can be read."""

    reason: str
