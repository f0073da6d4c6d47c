"""One source file -> its records, in batches and in bounded memory, whatever container it is.

The container is told by content first and by the name's ending second. Nothing that is wrong with a file raises:
a record that cannot be read comes as `Broken` in its place, and where the rest of a file is lost one `Unreadable`
stands for it after everything before the break.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import PurePath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.corpus.bytestream import BLOCK_BYTES, ByteStream
from fastcompat.corpus.filenames import has_known_suffix
from fastcompat.corpus.jsonrecords import document_records, is_document, line_records
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, Broken, NumberList, Record, Unreadable
from fastcompat.corpus.sources import Source

# What pyarrow raises for damaged files: ArrowInvalid is a ValueError, ArrowIOError an OSError.
_DAMAGE = (pa.ArrowException, OSError, ValueError, EOFError)


class Batch(NamedTuple):
    """Some records in file order; `position` is how many of the source's bytes they and those before them took."""

    records: list[Record | Broken | Unreadable]
    position: int


class Opaque:
    """Stands for a value that cannot be converted to one of Python's."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __repr__(self) -> str:
        return self._kind


class SourceReader:
    """Iterates over a source's `Batch`es once; `container` is known from the start, `sha256()` is asked at the end.

    `container` is "jsonl", "json", either with ".gz" or ".zst", "parquet", "arrow", "arrow stream" or "unknown".
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.container = "unknown"
        self._sha256: Callable[[], str] = str
        self._close: Callable[[], None] = lambda: None
        self._batches = self._start()

    def __iter__(self) -> Iterator[Batch]:
        return self._batches

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
        if stream.compression == "" and (columnar := _columnar_container(head, name)):
            stream.close()
            self.container = columnar
            self._sha256 = self._hash_apart
            return _parquet_batches(self.source) if columnar == "parquet" else _arrow_batches(self.source, columnar)
        self._sha256 = stream.sha256
        self._close = stream.close
        if reason := _not_json(head, name, stream.compression):
            return iter([Batch([Unreadable(reason)], self.source.size)])
        document = is_document(head, name)
        self.container = ("json" if document else "jsonl") + (f".{stream.compression}" if stream.compression else "")
        records = document_records(stream) if document else line_records(stream)
        return (Batch(batch, stream.position) for batch in records)

    def _hash_apart(self) -> str:
        # Columnar files are read out of order, so their hash is a reading of its own; the hub knows it already.
        if self.source.oid:
            return self.source.oid
        return file_sha256(self.source)


def file_sha256(source: Source) -> str:
    """SHA-256 of a source's bytes, in hexadecimal; "" where it cannot be read."""
    try:
        with source.open() as file:
            digest = hashlib.sha256()
            while block := file.read(BLOCK_BYTES):
                digest.update(block)
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


def _not_json(head: bytes, name: str, compression: str) -> str:
    """Why these bytes are no JSON in any layout; "" where they may be."""
    if not head:
        return ""
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return "the text is UTF-16; save it as UTF-8"
    if head.startswith(b"PK\x03\x04"):
        return "this is a zip archive; unpack it and name the files in it"
    if compression and head.startswith((b"PAR1", b"ARROW1", b"\xff\xff\xff\xff")):
        return f"a compressed Parquet or Arrow file cannot be read in pieces; unpack it from .{compression} first"
    if head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] in (b"{", b"["):
        return ""
    if b"\0" in head[:1024]:
        return "binary data of no known container"
    # JSON lines may begin with a broken one.
    if has_known_suffix(PurePath(name).name) or (compression and PurePath(name).suffixes in ([".gz"], [".zst"])):
        return ""
    return "neither JSON lines, JSON, Parquet nor Arrow; convert it to JSON lines"


# --- Parquet and Arrow


def _parquet_batches(source: Source) -> Iterator[Batch]:
    # Without pre-buffering and with a small buffer, a column chunk is read page by page instead of whole.
    try:
        with _random_access(source, mapped=False) as raw:
            file = pq.ParquetFile(raw, pre_buffer=False, buffer_size=BLOCK_BYTES, page_checksum_verification=True)
            metadata = file.metadata
            done = 0
            for group in range(metadata.num_row_groups):
                described = metadata.row_group(group)
                rows = _rows_per_batch(described.total_byte_size, described.num_rows)
                for batch in file.iter_batches(batch_size=rows, row_groups=[group]):
                    done += batch.num_rows
                    yield Batch(_to_records(batch), source.size * done // max(1, metadata.num_rows))
    except _DAMAGE as error:
        yield Batch([Unreadable(f"the Parquet file is truncated or damaged: {_first_line(error)}")], source.size)


def _arrow_batches(source: Source, container: str) -> Iterator[Batch]:
    try:
        # Mapped: a batch of any size costs address space, not memory.
        with _random_access(source, mapped=True) as file:
            reason = ""
            n_batches = 0
            if container == "arrow":
                try:
                    reader = pa.ipc.open_file(file)
                    n_batches = reader.num_record_batches
                    batches = (reader.get_batch(index) for index in range(n_batches))
                except _DAMAGE as error:
                    # The footer is gone, but behind the magic the messages lie as in a stream.
                    reason = f"the Arrow file is truncated or damaged: {_first_line(error)}"
                    file.seek(8)
                    batches = iter(pa.ipc.open_stream(file))
            else:
                batches = iter(pa.ipc.open_stream(file))
            for index, batch in enumerate(batches):
                # A file with a footer is read by its index, so that the place in it has to be estimated.
                position = source.size * (index + 1) // n_batches if n_batches else file.tell()
                rows = _rows_per_batch(batch.nbytes, batch.num_rows)
                for start in range(0, batch.num_rows, rows):
                    yield Batch(_to_records(batch.slice(start, rows)), position)
            if reason:
                yield Batch([Unreadable(reason)], source.size)
    except _DAMAGE as error:
        yield Batch([Unreadable(f"the Arrow data is truncated or damaged: {_first_line(error)}")], source.size)


def _random_access(source: Source, *, mapped: bool) -> pa.NativeFile:
    if source.remote:
        return pa.PythonFile(source.open(), mode="r")
    return pa.memory_map(source.path) if mapped else pa.OSFile(source.path)


def _rows_per_batch(n_bytes: int, n_rows: int) -> int:
    return max(1, min(BATCH_RECORDS, BATCH_CHARS * n_rows // max(1, n_bytes)))


def _to_records(batch: pa.RecordBatch) -> list[Record | Broken | Unreadable]:
    names = batch.schema.names
    try:
        columns = [_to_values(column) for column in batch.columns]
    except UnicodeDecodeError:
        return _to_records_singly(batch)
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _to_records_singly(batch: pa.RecordBatch) -> list[Record | Broken | Unreadable]:
    # Text columns of other writers need not hold UTF-8: find the rows that do not.
    records: list[Record | Broken | Unreadable] = []
    for index in range(batch.num_rows):
        try:
            row = batch.slice(index, 1)
            records.append({name: _to_values(row.column(i))[0] for i, name in enumerate(batch.schema.names)})
        except UnicodeDecodeError as error:
            records.append(Broken(f"a text is not UTF-8: {error.reason} at byte {error.start}"))
    return records


def _to_values(column: pa.Array) -> list[Any]:
    kind = column.type
    if _is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        filled = column.is_valid().to_pylist()
        return [NumberList(column, index) if there else None for index, there in enumerate(filled)]
    try:
        # Times may have no equivalent in Python (nanoseconds, unknown zones): their numbers do as well here.
        timeless = _without_times(kind)
        values: list[Any] = (column if timeless == kind else column.cast(timeless)).to_pylist()
    except UnicodeDecodeError:
        raise
    except (ValueError, OverflowError, pa.ArrowException):
        return [Opaque(f"a value of the Arrow type {kind}")] * len(column)
    return values


def _is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def _without_times(kind: pa.DataType) -> pa.DataType:
    """The type with integers for times, at any depth."""
    if pa.types.is_temporal(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pa.types.is_list(kind):
        return pa.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pa.types.is_large_list(kind):
        return pa.large_list(kind.value_field.with_type(_without_times(kind.value_type)))
    return kind


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
