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
from fastcompat.corpus.arrowvalues import records_of
from fastcompat.corpus.bytestream import BLOCK_BYTES
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS, Batch, Unreadable
from fastcompat.corpus.sources import Source

_FIRST_ROWS = 16
_GROWTH = 4
# A batch may decode to this many bytes where a dictionary's long entries come all at once.
_DECODED_BYTES = 8 * BATCH_CHARS


def parquet_batches(source: Source) -> Iterator[Batch]:
    """Batches of the file's records. Of a damaged row group the rest is lost; the groups after it are read."""
    try:
        with open_file(source, mapped=False) as raw:
            file = _File(raw)
            total = max(1, file.metadata.num_rows)
            before = 0
            for group in range(file.metadata.num_row_groups):
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
        file, described = self._file, self.metadata.row_group(group)
        rows, limit = min(self._rows, _FIRST_ROWS), 0
        asked: list[int] = []
        n_read = 0
        while True:
            iterator = file.iter_batches(batch_size=rows, row_groups=[group])
            try:
                _skip(file, iterator, asked, n_read)
                while True:
                    file.reader.set_batch_size(rows)
                    batch = next(iterator, None)
                    if batch is None and n_read < described.num_rows:
                        raise ValueError("the columns end early")
                    if batch is None:
                        return
                    asked.append(rows)
                    n_read += batch.num_rows
                    yield batch
                    # Only now: the metadata of an encrypted column, which cannot be read, would end the process.
                    limit = limit or self._limit(group)
                    per_row = max(1, batch.nbytes // max(1, batch.num_rows))
                    most = max(rows * _GROWTH, self._rows)
                    rows = self._rows = max(1, min(limit, most, BATCH_CHARS // per_row))
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

    def _limit(self, group: int) -> int:
        """Rows that decode to at most about `_DECODED_BYTES`, even where all have the longest texts of dictionaries."""
        described = self.metadata.row_group(group)
        per_row = 0.0
        for index in range(described.num_columns):
            chunk = described.column(index)
            if chunk.physical_type != "BYTE_ARRAY" or not any("DICTIONARY" in name for name in chunk.encodings):
                continue
            values = chunk.num_values / max(1, described.num_rows)
            longest = chunk.total_uncompressed_size
            if longest * values * BATCH_RECORDS > _DECODED_BYTES:
                longest = self._longest_entry(group, chunk.path_in_schema)
            per_row += longest * values
        return max(1, min(BATCH_RECORDS, int(_DECODED_BYTES / max(1.0, per_row))))

    def _longest_entry(self, group: int, path: str) -> int:
        """Bytes of the longest text in the dictionary of a column; 0 where there is none or it cannot be read."""
        try:
            reader = self._with_dictionaries().iter_batches(_FIRST_ROWS, row_groups=[group], columns=[path])
            for batch in reader:
                entries = [entries for column in batch.columns for entries in _dictionaries(column)]
                # Rows without a value come without the dictionary.
                if any(map(len, entries)):
                    return max(pc.max(pc.binary_length(each)).as_py() or 0 for each in entries)
        except DAMAGE:
            pass
        return 0


def _skip(file: pq.ParquetFile, iterator: Iterator[pa.RecordBatch], asked: list[int], n_rows: int) -> None:
    """Pass over the rows that were read before, by as many at a time as could be read then."""
    passed = 0
    sizes = iter(asked)
    while passed < n_rows:
        file.reader.set_batch_size(min(next(sizes, 1), n_rows - passed))
        batch = next(iterator, None)
        if batch is None:
            raise ValueError("the columns end early")
        passed += batch.num_rows
    assert passed == n_rows


def _dictionaries(array: pa.Array) -> list[pa.Array]:
    kind = array.type
    if pa.types.is_dictionary(kind):
        return [array.dictionary]
    if pa.types.is_struct(kind):
        return [entries for i in range(kind.num_fields) for entries in _dictionaries(array.field(i))]
    return _dictionaries(array.values) if pa.types.is_nested(kind) else []
