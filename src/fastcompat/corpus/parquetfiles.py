"""A Parquet file -> its records. How many rows are decoded at a time follows from what they decode to.

Encoded sizes do not tell: a text that stands once in a dictionary may be in every row. So reading begins with few
rows, goes by what the last ones took, and is bounded beforehand by the longest entries of the dictionaries. Where
pyarrow cannot convert so many rows (it cannot nest a text column of 2 GiB), fewer are tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcompat.corpus.arrowfiles import DAMAGE, first_line, open_file
from fastcompat.corpus.arrowvalues import is_bytes, is_text, records_of
from fastcompat.corpus.bytestream import BLOCK_BYTES
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, Batch, Unreadable
from fastcompat.corpus.sources import Source

_FIRST_ROWS = 16
_GROWTH = 4
# A batch may decode to this many bytes where a dictionary's long entries come all at once.
_DECODED_BYTES = 8 * BATCH_CHARS
# A row group whose encoded texts take at most this is read with them in their dictionaries, where those are long.
_HELD_DICTIONARIES = 4 * BATCH_CHARS


def parquet_batches(source: Source, groups: tuple[int, int] | None = None) -> Iterator[Batch]:
    """Batches of the file's records. Of a damaged row group the rest is lost; the groups after it are read.

    groups: the first row group that is read, and the end of them; None: all.
    """
    try:
        with open_file(source, mapped=False) as raw:
            file = _File(raw)
            total = max(1, file.metadata.num_rows)
            first, end = groups or (0, file.metadata.num_row_groups)
            before = sum(file.metadata.row_group(group).num_rows for group in range(first))
            for group in range(first, end):
                n_rows = file.metadata.row_group(group).num_rows
                n_read = 0
                try:
                    for batch in file.batches(group):
                        n_read += batch.num_rows
                        position = source.size * (before + n_read) // total
                        yield from (Batch(records, position) for records in records_of(batch))
                except DAMAGE as error:
                    lost = f"{n_rows - n_read:,} of the {n_rows:,} rows of row group {group} cannot be read"
                    yield Batch([Unreadable(f"{lost}: {first_line(error)}")], source.size * (before + n_rows) // total)
                before += n_rows
    except DAMAGE as error:
        encrypted = "ncrypt" in str(error)
        what = "encrypted; decrypt it first" if encrypted else f"truncated or damaged: {first_line(error)}"
        yield Batch([Unreadable(f"the Parquet file is {what}")], source.size)


def group_bytes(source: Source) -> list[int]:
    """Of each row group, the bytes that its columns take once they are decompressed; none where it cannot be told."""
    try:
        with open_file(source, mapped=False) as raw:
            metadata = pq.ParquetFile(raw).metadata
            return [metadata.row_group(group).total_byte_size for group in range(metadata.num_row_groups)]
    except DAMAGE:
        return []


class _File:
    """A Parquet file whose row groups are read in batches of a bounded decoded size."""

    def __init__(self, raw: pa.NativeFile) -> None:
        self._raw = raw
        self._file = self._opened()
        self._sharing: pq.ParquetFile | None = None
        self._rows = _FIRST_ROWS
        self.metadata: pq.FileMetaData = self._file.metadata

    def batches(self, group: int) -> Iterator[pa.RecordBatch]:
        """All rows of a row group. Raises one of `DAMAGE` where not even one more row can be read."""
        n_rows = self.metadata.row_group(group).num_rows
        file, limit = self._plan(group)
        rows = min(self._rows, limit)
        asked: list[int] = []
        n_read = 0
        while True:
            iterator = file.iter_batches(batch_size=rows, row_groups=[group])
            try:
                _skip(file, iterator, asked, n_read)
                while True:
                    file.reader.set_batch_size(rows)
                    batch = next(iterator, None)
                    if batch is None and n_read < n_rows:
                        raise ValueError("the columns end early")
                    if batch is None:
                        return
                    asked.append(rows)
                    n_read += batch.num_rows
                    yield batch
                    per_row = max(1, batch.nbytes // max(1, batch.num_rows))
                    rows = self._rows = max(1, min(limit, rows * _GROWTH, BATCH_CHARS // per_row))
            except DAMAGE:
                # Nothing can be read behind an error: begin afresh and pass over what was given.
                if rows > 1:
                    rows = limit = max(1, rows // _GROWTH)
                elif file is self._file:
                    # Unfolded, one row may be more than pyarrow can convert: leave the texts in their dictionaries.
                    file, rows, limit = self._with_dictionaries(), _FIRST_ROWS, _FIRST_ROWS
                else:
                    raise

    def _opened(self, **settings: Any) -> pq.ParquetFile:
        # Without pre-buffering and with a small buffer, a column chunk is read page by page instead of whole.
        return pq.ParquetFile(
            self._raw, pre_buffer=False, buffer_size=BLOCK_BYTES, page_checksum_verification=True, **settings
        )

    def _with_dictionaries(self) -> pq.ParquetFile:
        """The file whose text columns come as Arrow's dictionaries: each text once, however many rows have it."""
        if self._sharing is None:
            columns = [self.metadata.schema.column(i) for i in range(self.metadata.num_columns)]
            texts = [column.path for column in columns if column.physical_type == "BYTE_ARRAY"]
            self._sharing = self._opened(metadata=self.metadata, read_dictionary=texts)
        return self._sharing

    def _plan(self, group: int) -> tuple[pq.ParquetFile, int]:
        """How a row group is read: with its texts unfolded or in their dictionaries, and by at most how many rows.

        So many rows decode to about `_DECODED_BYTES` at most, even where all have the longest texts of dictionaries.
        """
        try:
            # First of all: asked for the metadata of an encrypted column before it is read, pyarrow ends the process.
            first = next(self._with_dictionaries().iter_batches(_FIRST_ROWS, row_groups=[group]))
            leaves = [entries for column in first.columns for entries in _leaves(column)]
            described = self.metadata.row_group(group)
            n_rows, texts, whole = described.num_rows, 0, 0
            if len(leaves) != described.num_columns:
                return self._file, _FIRST_ROWS
            for index, entries in enumerate(leaves):
                if entries is not None:
                    chunk = described.column(index)
                    texts += chunk.total_uncompressed_size
                    whole += chunk.num_values * (_longest(entries) or self._longest_entry(group, chunk))
        except (*DAMAGE, StopIteration):
            return self._file, _FIRST_ROWS
        limit = max(1, min(BATCH_RECORDS, _DECODED_BYTES * n_rows // max(1, whole)))
        # Lists may be so uneven that one row has all of their texts.
        if limit < BATCH_RECORDS and texts <= _HELD_DICTIONARIES:
            return self._with_dictionaries(), BATCH_RECORDS
        return self._file, limit

    def _longest_entry(self, group: int, chunk: pq.ColumnChunkMetaData) -> int:
        """Bytes of the longest text in a column's dictionary, whose first rows have no value and come without it."""
        if not any("DICTIONARY" in name for name in chunk.encodings):
            return 0
        if chunk.is_stats_set and chunk.statistics.null_count == chunk.num_values:
            return 0
        columns = [chunk.path_in_schema]
        for batch in self._with_dictionaries().iter_batches(BATCH_RECORDS, row_groups=[group], columns=columns):
            for entries in _leaves(batch.column(0)):
                if longest := _longest(entries):
                    return longest
        return 0


def _skip(file: pq.ParquetFile, iterator: Iterator[pa.RecordBatch], asked: list[int], n_rows: int) -> None:
    """Pass over the rows that were read before, by as many at a time as could be read then."""
    passed = 0
    sizes = iter(asked)
    while passed < n_rows:
        file.reader.set_batch_size(min(next(sizes, 1), n_rows - passed))
        batch = next(iterator, None)
        passed += n_rows + 1 if batch is None else batch.num_rows
    if passed > n_rows:
        raise ValueError("the columns have fewer rows than before")


def _leaves(array: pa.Array) -> list[pa.Array | None]:
    """For each of Parquet's columns in the array, in their order: the dictionary, where it has one."""
    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _leaves(array.storage)
    if pa.types.is_struct(kind):
        return [leaf for i in range(kind.num_fields) for leaf in _leaves(array.field(i))]
    if pa.types.is_nested(kind):
        return _leaves(array.values)
    return [array.dictionary if pa.types.is_dictionary(kind) else None]


def _longest(entries: pa.Array | None) -> int:
    if entries is None or not (is_text(entries.type) or is_bytes(entries.type)):
        return 0
    return pc.max(pc.binary_length(entries)).as_py() or 0
