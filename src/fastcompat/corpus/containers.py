"""One source file -> its records, in batches and in bounded memory, whatever container it is.

The container is told by content first and by the name's ending second. Nothing that is wrong with a file raises:
a record that cannot be read comes as `Broken` in its place, and where the rest of a file (or of a Parquet file's row
group) is lost one `Unreadable` stands for it after everything before the break.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import NamedTuple

from fastcompat.corpus.arrowfiles import arrow_batches
from fastcompat.corpus.bytestream import BLOCK_BYTES, ByteRange, ByteStream
from fastcompat.corpus.content import foreign_format, stand_in
from fastcompat.corpus.filenames import COMPRESSION_SUFFIXES, has_known_suffix
from fastcompat.corpus.jsondocuments import DocumentRecords
from fastcompat.corpus.jsonrecords import LineRecords, is_document
from fastcompat.corpus.jsonvalues import JsonReader
from fastcompat.corpus.parquetfiles import parquet_batches
from fastcompat.corpus.records import Batch, Unreadable
from fastcompat.corpus.sources import Source


class Stretch(NamedTuple):
    """A part of a file: of a "jsonl" one bytes `begin` to `end`, cut at line ends; of a "parquet" one row groups."""

    container: str
    begin: int
    end: int


class SourceReader:
    """Iterates over a source's `Batch`es once; `container` is known from the start, `sha256()` is asked at the end.

    `container` is "jsonl" or "json" (with ".gz", ".zst", ".bz2", ".xz"), "parquet", "arrow", "arrow stream", "unknown".
    stretch: what is read of the file, all of it where it is None. reader: of a stretch's JSON.
    """

    def __init__(self, source: Source, stretch: Stretch | None = None, reader: JsonReader | None = None) -> None:
        self.source = source
        self.container = "unknown"
        self.lines: LineRecords | None = None
        self._sha256: Callable[[], str] = str
        self._close: Callable[[], None] = lambda: None
        self._document: DocumentRecords | None = None
        self._batches = self._start() if stretch is None else self._start_in(stretch, reader)

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

    @property
    def inside(self) -> str:
        """Where in a JSON document the records were found that came so far; "" where they are not inside of one."""
        return self._document.inside if self._document else ""

    def sha256(self) -> str:
        """Of the file's bytes, in hexadecimal; "" where the file could not be opened."""
        return self._sha256()

    def close(self) -> None:
        """Close the file. Neither batches nor the hash can be had afterwards."""
        self._close()

    def _start(self) -> Iterator[Batch]:
        try:
            stream = ByteStream(self.source)
        except OSError as error:
            return iter([Batch([Unreadable(f"the file cannot be opened: {error.strerror or error}")], 0)])
        name = self.source.label.lower()
        head = stream.head
        foreign = _foreign(head, stream.compression)
        if not (foreign or stream.compression) and (columnar := _columnar_container(head, name)):
            stream.close()
            self.container = columnar
            self._sha256 = self._hash_apart
            if columnar == "parquet":
                return parquet_batches(self.source)
            return arrow_batches(self.source, columnar)
        self._sha256 = stream.sha256
        self._close = stream.close
        if reason := foreign or _not_json(head, name, stream.compression):
            return iter([Batch([Unreadable(reason)], self.source.size)])
        document = is_document(head, name)
        self.container = ("json" if document else "jsonl") + (f".{stream.compression}" if stream.compression else "")
        if document:
            self._document = DocumentRecords(stream)
            return (Batch(batch, stream.position) for batch in self._document)
        self.lines = LineRecords(stream)
        return (Batch(batch, stream.position) for batch in self.lines)

    def _start_in(self, stretch: Stretch, reader: JsonReader | None) -> Iterator[Batch]:
        self.container = stretch.container
        if stretch.container == "parquet":
            return parquet_batches(self.source, (stretch.begin, stretch.end))
        try:
            stream = ByteRange(self.source, stretch.begin, stretch.end)
        except OSError as error:
            return iter([Batch([Unreadable(f"the file cannot be opened: {error.strerror or error}")], 0)])
        self._close = stream.close
        self.lines = LineRecords(stream, reader)
        return (Batch(batch, stream.position) for batch in self.lines)

    def _hash_apart(self) -> str:
        # Columnar files are read out of order, so their hash is a reading of its own; the hub knows it already.
        if self.source.oid:
            return self.source.oid
        return file_sha256(self.source)


def file_sha256(source: Source, note: Callable[[], None] = lambda: None) -> str:
    """SHA-256 of a source's bytes, in hexadecimal; "" where it cannot be read. note: is called from time to time."""
    try:
        with source.open() as file:
            digest = hashlib.sha256()
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
                note()
            return digest.hexdigest()
    except OSError:
        return ""


def _columnar_container(head: bytes, name: str) -> str:
    if head.startswith((b"PAR1", b"PARE")):
        return "parquet"
    if head.startswith(b"ARROW1"):
        return "arrow"
    if head.startswith(b"\xff\xff\xff\xff"):
        return "arrow stream"
    if not head or head.lstrip()[:1] in (b"{", b"["):
        return ""
    if name.endswith((".parquet", ".pq")):
        return "parquet"
    # Arrow before 0.15 began a stream without the marker.
    return "arrow stream" if name.endswith((".arrow", ".ipc")) else ""


def _foreign(head: bytes, compression: str) -> str:
    """What these bytes are instead of records, and what to do; "" where they may be records."""
    if instead := stand_in(head):
        return f"this is {instead.what}; {instead.remedy}"
    if compression and head.startswith((b"PAR1", b"PARE", b"ARROW1", b"\xff\xff\xff\xff")):
        return f"a compressed Parquet or Arrow file cannot be read in pieces; unpack it from .{compression} first"
    return foreign_format(head)


def _not_json(head: bytes, name: str, compression: str) -> str:
    """Why these bytes are no JSON in any layout; "" where they may be."""
    if not head or head.removeprefix(b"\xef\xbb\xbf").lstrip(b"\0 \t\r\n")[:1] in (b"{", b"["):
        return ""
    if b"\0" in head[:1024]:
        return "binary data of no known container"
    # JSON lines may begin with a broken one.
    suffixes = PurePath(name).suffixes
    if has_known_suffix(PurePath(name).name) or (compression and suffixes in [[end] for end in COMPRESSION_SUFFIXES]):
        return ""
    return "neither JSON lines, JSON, Parquet nor Arrow; convert it to JSON lines"
