"""Arrow files and streams -> their records, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator

import pyarrow as pa

from fastcompat.corpus.arrowvalues import records_of
from fastcompat.corpus.records import Batch, Unreadable
from fastcompat.corpus.sources import Source

# What pyarrow raises for damaged files: ArrowInvalid is a ValueError, ArrowIOError an OSError.
DAMAGE = (pa.ArrowException, OSError, ValueError, EOFError, MemoryError)

_STREAM_MARK = b"\xff\xff\xff\xff"
_STREAM_END = _STREAM_MARK + bytes(4)
# "ARROW1" and two bytes of padding, behind which a file's messages lie as in a stream.
_FILE_HEAD_BYTES = 8


def arrow_batches(source: Source, container: str) -> Iterator[Batch]:
    """Batches of the records of an "arrow" file (with a footer) or an "arrow stream"."""
    try:
        # Mapped: a batch of any size costs address space, not memory.
        with open_file(source, mapped=True) as file:
            if container == "arrow":
                yield from _file_batches(file, source.size)
            else:
                yield from _stream_batches(file, source.size)
    except DAMAGE as error:
        yield Batch([Unreadable(f"the Arrow data is truncated or damaged: {first_line(error)}")], source.size)


def open_file(source: Source, *, mapped: bool) -> pa.NativeFile:
    """The source as pyarrow reads it, at any place. Raises OSError (local) or CorpusError (remote)."""
    if source.remote:
        return pa.PythonFile(source.open(), mode="r")
    return pa.memory_map(source.path) if mapped else pa.OSFile(source.path)


def first_line(error: BaseException) -> str:
    """The error's message as a part of a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def _file_batches(file: pa.NativeFile, size: int) -> Iterator[Batch]:
    try:
        reader = pa.ipc.open_file(file)
        n_batches = reader.num_record_batches
    except DAMAGE as error:
        # The footer is gone, but the messages are there.
        file.seek(_FILE_HEAD_BYTES)
        for batch in pa.ipc.open_stream(file):
            yield from _records(batch, file.tell())
        yield Batch([Unreadable(f"the Arrow file is truncated or damaged: {first_line(error)}")], size)
        return
    for index in range(n_batches):
        # Batches are found by the footer, so that the place in the file has to be estimated.
        yield from _records(reader.get_batch(index), size * (index + 1) // n_batches)


def _stream_batches(file: pa.NativeFile, size: int) -> Iterator[Batch]:
    marked = file.read(len(_STREAM_MARK)) == _STREAM_MARK
    file.seek(0)
    # Streams may be joined with cat.
    while True:
        for batch in pa.ipc.open_stream(file):
            yield from _records(batch, file.tell())
        end = file.tell()
        # Arrow before 0.15 had no mark, and ended a stream with zeros that may as well be part of a batch.
        if marked:
            file.seek(max(0, end - len(_STREAM_END)))
            if file.read(len(_STREAM_END)) != _STREAM_END:
                yield Batch([Unreadable("the Arrow stream ends without its end mark: the file may be truncated")], size)
                return
        if file.read(len(_STREAM_MARK)) != _STREAM_MARK:
            return
        file.seek(end)


def _records(batch: pa.RecordBatch, position: int) -> Iterator[Batch]:
    return (Batch(records, position) for records in records_of(batch))
