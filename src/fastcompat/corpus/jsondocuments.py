"""One JSON document -> records: an array of them, records one after another, or an object that holds them inside.

Read in bounded memory: an array and an object of any length go by record by record. A broken document costs its rest,
since nothing says where the next record begins.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator, Set
from typing import NamedTuple

from fastcompat.corpus.bytestream import ByteStream
from fastcompat.corpus.documents import row_of_viewer
from fastcompat.corpus.jsonvalues import JsonReader, what_is_broken
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, MAX_RECORD_BYTES, Broken, Record, Records, Unreadable
from fastcompat.corpus.turns import looks_like_turns
from fastcompat.corpus.values import kind_of

# No record is so long: an object beyond it (in characters) is looked into before it is read.
_LARGE_OBJECT = 16 << 20
# Records whose names are looked at twice, as in a file's beginning.
_THOROUGH_RECORDS = 1024
_BLANKS = re.compile("[ \t\r\n\ufeff]*")
_BLANKS_AND_COMMAS = re.compile("[ \t\r\n\ufeff,]*")


class _LargeObjectError(Exception):
    """An object is longer than what is read at a time."""


class _Place(NamedTuple):
    """Where in an object its records are: by the names that lead there, in a list or each under a key of its own."""

    names: tuple[str, ...]
    in_list: bool

    def describe(self) -> str:
        if self.in_list:
            return f"the list `{'.'.join(self.names)}`"
        return f"the objects in `{'.'.join(self.names)}`" if self.names else "the objects under each key"


class DocumentRecords:
    """Iterates once over batches of records. `inside` says where in a large object they were found, else it is ""."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._text = _Window(stream)
        self._names: Set[str] = frozenset()
        self.inside = ""

    def __iter__(self) -> Iterator[Records]:
        records: Records = []
        before = self._text.taken
        reason = ""
        try:
            for record in self._records():
                records.append(record)
                if len(records) >= BATCH_RECORDS or self._text.taken - before >= BATCH_CHARS:
                    yield records
                    records, before = [], self._text.taken
        except ValueError as error:
            reason = str(error)
        if self._stream.broken or reason:
            records.append(Unreadable(self._stream.broken or reason))
        if records:
            yield records

    def _records(self) -> Iterator[Record | Broken]:
        """Raises ValueError with the reason why there are no more."""
        text = self._text
        after_array = False
        while character := text.next_character(_BLANKS_AND_COMMAS):
            if character == "[":
                # Arrays may be joined, or stand one to a line.
                yield from self._elements()
                after_array = True
                continue
            if after_array and character != "{":
                raise ValueError("there is more text after the array's end")
            try:
                yield _record(self._next_record(large=character == "{" and text.count == 0))
            except _LargeObjectError:
                place = _place_of_records(text.reader, text.held)
                if place is None:
                    yield _record(self._next_record())
                    continue
                self.inside = place.describe()
                yield from self._inside(place)

    def _elements(self) -> Iterator[Record | Broken]:
        text = self._text
        text.take("[")
        while (character := text.next_character(_BLANKS_AND_COMMAS)) != "]":
            if not character:
                raise ValueError("the array ends early: the file is truncated")
            yield _record(self._next_record())
        text.take("]")

    def _inside(self, place: _Place) -> Iterator[Record | Broken]:
        """The records at the place in the object that begins here."""
        text = self._text
        others: dict[str, Set[str]] = {}
        text.take("{")
        while (character := text.next_character(_BLANKS_AND_COMMAS)) != "}":
            if not character:
                raise ValueError("the object ends early: the file is truncated")
            name = text.next_value()
            text.take(":")
            if not place.names:
                yield _record(self._next_record())
            elif name != place.names[0]:
                value = text.next_value()
                if isinstance(value, list) and value and isinstance(value[0], dict):
                    others[str(name)] = value[0].keys()
            elif len(place.names) == 1 and place.in_list:
                yield from self._elements()
            else:
                yield from self._inside(place._replace(names=place.names[1:]))
        text.take("}")
        # Lists of other objects describe the records; nothing says that those with the same names are not meant too.
        if alike := [f"`{name}`" for name, keys in others.items() if 2 * len(keys & self._names) > len(self._names)]:
            raise ValueError(f"the document holds records in {', '.join(alike)} too, which were not read")

    def _next_record(self, *, large: bool = False) -> object:
        text = self._text
        try:
            value = text.next_value(_LARGE_OBJECT if large else None)
        except ValueError as error:
            raise ValueError(f"broken JSON in record {text.count}: {error}") from error
        if text.count == 0 and isinstance(value, dict):
            self._names = value.keys()
        text.count += 1
        text.reader.thorough = text.count < _THOROUGH_RECORDS
        return row_of_viewer(value)


def _record(value: object) -> Record | Broken:
    return value if isinstance(value, dict) else Broken(f"not a JSON object but {kind_of(value)}")


def _place_of_records(reader: JsonReader, text: str, begin: int = 0) -> _Place | None:
    """Where the object that begins here, and ends beyond the text, has its records; None where that is not clear."""
    position = begin + 1
    objects = others = 0
    while True:
        position = _end(_BLANKS_AND_COMMAS, text, position)
        try:
            name, position = reader.decode(text, position)
            position = _end(_BLANKS, text, _end(_BLANKS, text, position) + 1)
            value, after = reader.decode(text, position)
        except (ValueError, RecursionError):
            break
        objects, others = (objects + 1, others) if isinstance(value, dict) else (objects, others + 1)
        position = after
    # The member that the text ends in: what holds the records is most of it, a record among others is not.
    longest = position < begin + (len(text) - begin) // 2
    if longest and text.startswith("[", position):
        return _Place((str(name),), in_list=True) if _holds_records(reader, text, position) else None
    if longest and text.startswith("{", position):
        place = _place_of_records(reader, text, position)
        return place and place._replace(names=(str(name), *place.names))
    return _Place((), in_list=False) if objects > 1 and not others else None


def _holds_records(reader: JsonReader, text: str, position: int) -> bool:
    """Whether the list that begins here is one of objects, and not a conversation of any length."""
    try:
        first, _ = reader.decode(text, _end(_BLANKS, text, position + 1))
    except (ValueError, RecursionError):
        return False
    return isinstance(first, dict) and not looks_like_turns([first])


def _end(pattern: re.Pattern[str], text: str, position: int) -> int:
    match = pattern.match(text, position)
    return match.end() if match else position


class _Window:
    """The part of a document that is being parsed: grows until a value is whole, forgets what was taken.

    `count` is how many records were taken, `taken` how many characters.
    """

    def __init__(self, stream: ByteStream) -> None:
        self._blocks = iter(stream)
        # Bytes that are no UTF-8 become unpaired surrogates, for which the one row is marked later on.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._position = 0
        self._ended = False
        self._forgotten = 0
        self.reader = JsonReader()
        self.count = 0

    @property
    def taken(self) -> int:
        return self._forgotten + self._position

    @property
    def held(self) -> str:
        """The text that was read and not taken."""
        return self._text[self._position :]

    def next_character(self, blanks: re.Pattern[str] = _BLANKS) -> str:
        """The next one that is not blank, without taking it; "" at the end."""
        while True:
            self._position = _end(blanks, self._text, self._position)
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._grow():
                return ""

    def take(self, character: str) -> None:
        """Take the next one that is not blank. Raises ValueError where it is another."""
        if self.next_character() != character:
            raise ValueError(f"broken JSON: no `{character}` where one has to be")
        self._position += 1

    def next_value(self, large: int | None = None) -> object:
        """Take the value that starts here. Raises ValueError where it is broken, too long or cut off, and
        _LargeObjectError, having taken nothing, where it is longer than `large` characters.
        """
        self.next_character()
        while True:
            try:
                value, end = self.reader.decode(self._text, self._position)
            except json.JSONDecodeError as error:
                # An error within a token's length of the end, or in a string without end, may heal with more text.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if cut and large is not None and len(self._text) - self._position > large:
                    raise _LargeObjectError from error
                if cut and self._grow():
                    continue
                raise ValueError("the file ends within it" if cut else what_is_broken(error)) from error
            except RecursionError as error:
                raise ValueError("nested too deeply") from error
            # The digits of a number may go on in the next block.
            if end == len(self._text) and type(value) is not dict and self._grow():
                continue
            self._position = end
            return value

    def _grow(self) -> bool:
        """Read as much again as is held, so that a long value is parsed only a few times over."""
        if self._ended:
            return False
        kept = self.held
        if len(kept) > MAX_RECORD_BYTES:
            raise ValueError(f"it is longer than {MAX_RECORD_BYTES >> 20} MiB")
        parts = [kept]
        wanted = len(kept)
        while wanted >= 0 and not self._ended:
            block = next(self._blocks, b"")
            self._ended = not block
            part = self._decoder.decode(block, final=self._ended)
            parts.append(part)
            wanted -= max(1, len(part))
        self._forgotten += self._position
        self._text = "".join(parts)
        self._position = 0
        return True
