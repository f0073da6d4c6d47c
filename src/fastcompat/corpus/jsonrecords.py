"""JSON text -> records: one to a line, or one document (an array of records, a record, records one after another).

Both layouts are read in bounded memory. A broken line costs that line; a broken document costs its rest, since
nothing says where the next record begins.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator

from fastcompat.corpus.bytestream import ByteStream
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, Broken, Record, Unreadable

# A single record beyond this (in bytes) is not read into memory; no response is that long.
MAX_RECORD_BYTES = 1 << 29

_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
_decode = json.JSONDecoder().raw_decode

Records = list[Record | Broken | Unreadable]


def is_document(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` holds one JSON document rather than JSON lines."""
    text = head.removeprefix(_BOM).lstrip()
    if text.startswith(b"["):
        # A line of a log may begin with a bracket too; an array of records has a brace or its end next.
        after = text[1:].lstrip()[:1]
        return after in (b"{", b"]") or len(text) == 1 or name.endswith((".json", ".json.gz", ".json.zst"))
    if not text.startswith(b"{"):
        return False
    lines = text.split(b"\n", 16)
    if len(lines) == 1:
        # One line, or a line longer than the head: a record either way.
        return False
    if lines[0].strip() == b"{":
        return True
    # A pretty-printed document has no line of its own that is a record at the margin; lines have one soon.
    whole = any(line.startswith(b"{") and _is_json(line) for line in lines[:-1])
    return not whole and ".json" in name and ".jsonl" not in name


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


# --- one record to a line


def line_records(stream: ByteStream) -> Iterator[Records]:
    """Batches of records; blank lines are skipped, reasons name the line (from 1)."""
    records: Records = []
    number = 0
    for chunk in _whole_lines(stream):
        if chunk is None:
            number += 1
            records.append(Broken(f"line {number}: longer than {MAX_RECORD_BYTES >> 20} MiB"))
            continue
        if number == 0:
            chunk = chunk.removeprefix(_BOM)
        try:
            lines: list[str] | list[bytes] = chunk.decode().split("\n")
        except UnicodeDecodeError:
            lines = chunk.split(b"\n")
        if not lines[-1]:
            lines.pop()
        # A line that was cut by the break is part of what `Unreadable` stands for, unless it happens to be whole.
        cut_off = bool(stream.broken) and not chunk.endswith(b"\n")
        for line in lines:
            number += 1
            if type(line) is bytes:
                try:
                    line = line.decode()
                except UnicodeDecodeError as error:
                    if cut_off:
                        continue
                    records.append(Broken(f"line {number}: not UTF-8 ({error.reason} at byte {error.start + 1})"))
                    continue
            line = line.strip(_BLANK)  # type: ignore[arg-type]
            if not line:
                continue
            record = _record_of_line(line, number)  # type: ignore[arg-type]
            if cut_off and type(record) is Broken:
                continue
            records.append(record)
            if len(records) >= BATCH_RECORDS:
                yield records
                records = []
        if len(chunk) >= BATCH_CHARS and records:
            yield records
            records = []
    if stream.broken:
        records.append(Unreadable(stream.broken))
    if records:
        yield records


def _record_of_line(line: str, number: int) -> Record | Broken:
    try:
        value, end = _decode(line)
    except json.JSONDecodeError as error:
        return Broken(f"line {number}: broken JSON ({_what(error)} at character {error.pos + 1})")
    except (ValueError, RecursionError) as error:
        return Broken(f"line {number}: JSON that Python cannot hold ({error})")
    if end != len(line):
        return Broken(f"line {number}: broken JSON (more text after the record, at character {end + 1})")
    if type(value) is not dict:
        return Broken(f"line {number}: not a JSON object but {_json_type(value)}")
    return value


def _what(error: json.JSONDecodeError) -> str:
    # Some of the messages end with the word that the place should follow.
    return error.msg.removesuffix(" at")


def _json_type(value: object) -> str:
    if value is None:
        return "null"
    names = {str: "a string", list: "an array", bool: "a boolean", int: "a number", float: "a number"}
    return names.get(type(value), type(value).__name__)


def _whole_lines(stream: ByteStream) -> Iterator[bytes | None]:
    """Pieces of the stream that end with a line's end (the last one need not); None for a line that is too long."""
    held: list[bytes] = []
    held_bytes = 0
    skipping = False
    for block in stream:
        cut = block.rfind(b"\n") + 1
        if cut == 0:
            if not skipping:
                held.append(block)
                held_bytes += len(block)
                if held_bytes > MAX_RECORD_BYTES:
                    held, held_bytes, skipping = [], 0, True
            continue
        start = 0
        if skipping:
            start = block.find(b"\n") + 1
            skipping = False
            yield None
        if held or cut > start:
            yield b"".join([*held, block[start:cut]])
        held = [block[cut:]] if cut < len(block) else []
        held_bytes = len(block) - cut
    if skipping:
        yield None
    elif held:
        yield b"".join(held)


# --- one document


def document_records(stream: ByteStream) -> Iterator[Records]:
    """Batches of the records in an array, or of the records that stand one after another."""
    text = _Window(stream)
    records: Records = []
    chars = 0
    in_array = False
    if text.next_character() == "[":
        in_array = True
        text.position += 1
    reason = ""
    while True:
        character = text.next_character()
        if character == ",":
            text.position += 1
            continue
        if character == "]" and in_array:
            text.position += 1
            if text.next_character():
                reason = "there is more text after the array's end"
            break
        if not character:
            reason = "the array ends early: the file is truncated" if in_array else ""
            break
        before = text.position
        try:
            value = text.next_value()
        except ValueError as error:
            reason = f"broken JSON in record {text.count}: {error}"
            break
        chars += max(0, text.position - before)
        records.append(value if type(value) is dict else Broken(f"not a JSON object but {_json_type(value)}"))
        if len(records) >= BATCH_RECORDS or chars >= BATCH_CHARS:
            yield records
            records, chars = [], 0
    if stream.broken or reason:
        records.append(Unreadable(stream.broken or reason))
    if records:
        yield records


class _Window:
    """The part of a document that is being parsed: grows until a value is whole, forgets what was taken."""

    def __init__(self, stream: ByteStream) -> None:
        self._blocks = iter(stream)
        # Bytes that are no UTF-8 become unpaired surrogates, for which the one row is marked later on.
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._text = ""
        self._ended = False
        self.position = 0
        self.count = 0

    def next_character(self) -> str:
        """The next one that is not blank, without taking it; "" at the end."""
        while True:
            while self.position < len(self._text):
                character = self._text[self.position]
                if character not in _BLANK:
                    return character
                self.position += 1
            if not self._grow():
                return ""

    def next_value(self) -> object:
        """Take the value that starts here. Raises ValueError where it is broken, too long or cut off."""
        while True:
            try:
                value, end = _decode(self._text, self.position)
            except json.JSONDecodeError as error:
                # An error within a token's length of the end, or in a string without end, may heal with more text.
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - 16
                if cut and self._grow():
                    continue
                raise ValueError("the file ends within it" if cut else _what(error)) from error
            except RecursionError as error:
                raise ValueError("nested too deeply") from error
            # The digits of a number may go on in the next block.
            if end == len(self._text) and type(value) is not dict and self._grow():
                continue
            self.position = end
            self.count += 1
            return value

    def _grow(self) -> bool:
        """Read as much again as is held, so that a long value is parsed only a few times over."""
        if self._ended:
            return False
        kept = self._text[self.position :]
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
        self._text = "".join(parts)
        self.position = 0
        return True
