"""JSON text with one record to a line -> records, and what tells such text from one JSON document.

Lines are read in bounded memory, and a broken one costs only itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from fastcompat.corpus.bytestream import HEAD_BYTES, ByteRange, ByteStream
from fastcompat.corpus.filenames import split_suffixes
from fastcompat.corpus.jsonvalues import JsonReader, what_is_broken
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, MAX_RECORD_BYTES, Broken, Records, Unreadable
from fastcompat.corpus.values import kind_of

_BOM = b"\xef\xbb\xbf"
_BLANK = " \t\r\n"
# What may stand between the records of a line: marks are there where files that have one were joined, and in JSON
# text sequences.
_BETWEEN = re.compile("[ \t\r\n,\ufeff\x1e]*")
_ZEROS = re.compile("\0+")


def is_document(head: bytes, name: str) -> bool:
    """Whether a file that begins with `head` holds one JSON document rather than JSON lines."""
    text = head.removeprefix(_BOM).lstrip()
    suffix = split_suffixes(PurePosixPath(name).name)[1]
    named = suffix.startswith(".json") and not suffix.startswith(".jsonl")
    if text.startswith(b"["):
        # A line of a log may begin with a bracket too; an array of records has a brace or its end next.
        after = text[1:].lstrip()[:1]
        return after in (b"{", b"]") or len(text) == 1 or named
    if not text.startswith(b"{"):
        return False
    lines = text.split(b"\n", 16)
    if len(lines) == 1:
        # One line is a record; one longer than the head may as well be an object with records inside.
        return named and len(head) >= HEAD_BYTES
    if lines[0].strip() == b"{":
        return True
    # A pretty-printed document has no line of its own that is a record at the margin; lines have one soon.
    whole = any(line.startswith(b"{") and _is_json(line) for line in lines[:-1])
    return not whole and named


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


class LineRecords:
    """Iterates once over batches of records; blank lines are skipped, reasons name the line (from 1).

    `n_lines` are those read so far. has_twice_at_first: whether `reader` had found names twice when it stopped being
    thorough, after the first lines; None before.
    """

    def __init__(self, stream: ByteStream | ByteRange, reader: JsonReader | None = None) -> None:
        self._stream = stream
        self.reader = reader or JsonReader()
        self.has_twice_at_first: bool | None = None
        self.n_lines = 0

    def __iter__(self) -> Iterator[Records]:
        stream, reader = self._stream, self.reader
        decode = reader.decode
        records: Records = []
        for chunk in whole_lines(stream):
            if chunk is None:
                self.n_lines += 1
                records.append(Broken(f"line {self.n_lines}: longer than {MAX_RECORD_BYTES >> 20} MiB"))
                continue
            # Bytes that are no UTF-8 become unpaired surrogates, for which a row is marked where it needs the text.
            lines = chunk.decode("utf-8", "surrogateescape").split("\n")
            if not lines[-1]:
                lines.pop()
            # A line that was cut by the break is part of what `Unreadable` stands for, unless it happens to be whole.
            cut_off = bool(stream.broken) and not chunk.endswith(b"\n")
            for number, line in enumerate(lines, self.n_lines + 1):
                line = line.strip(_BLANK)
                if not line:
                    continue
                try:
                    value, end = decode(line)
                except (json.JSONDecodeError, RecursionError):
                    end = -1
                if end == len(line) and type(value) is dict:
                    records.append(value)
                else:
                    found = _records_of_line(line, number, reader)
                    records += [record for record in found if type(record) is not Broken] if cut_off else found
                if len(records) >= BATCH_RECORDS:
                    yield records
                    records = []
            self.n_lines += len(lines)
            if len(chunk) >= BATCH_CHARS and records:
                yield records
                records = []
            if reader.thorough:
                reader.thorough, self.has_twice_at_first = False, reader.has_twice
        if stream.broken:
            records.append(Unreadable(stream.broken))
        if records:
            yield records


def _records_of_line(line: str, number: int, reader: JsonReader) -> Records:
    """What a line holds that is not just one record: several, one with a comma behind it, or something broken."""
    records: Records = []
    end = 0
    while (begin := _BETWEEN.match(line, end).end()) < len(line):  # type: ignore[union-attr]
        why = ""
        if zeros := _ZEROS.match(line, begin):
            end = zeros.end()
            records.append(Broken(f"line {number}: bytes of zero, as a crash leaves them"))
            continue
        try:
            value, end = reader.decode(line, begin)
        except json.JSONDecodeError as error:
            why = f"broken JSON ({what_is_broken(error)} at character {error.pos + 1})"
            if line.startswith("{'", begin):
                why = "Python's notation and not JSON; write it with json.dumps"
        except RecursionError:
            why = "JSON that is nested too deeply"
        else:
            rest = _BETWEEN.match(line, end).end()  # type: ignore[union-attr]
            if type(value) is not dict:
                why = f"not a JSON object but {kind_of(value)}"
            elif line[rest : rest + 1] not in ("", "{", "\0"):
                why = f"broken JSON (more text after the record, at character {rest + 1})"
        if why:
            return [*records, Broken(f"line {number}: {why}")]
        records.append(value)
    return records


def whole_lines(stream: ByteStream | ByteRange) -> Iterator[bytes | None]:
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
