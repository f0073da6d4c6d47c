"""Rows, in any number -> hash buckets of prompts on disk -> the rows of one bucket in order. In bounded memory.

Rows are staged in memory; a full stage is sorted by bucket and written as one *run*: an Arrow file whose batch b
holds the rows of bucket b. A bucket is read back as the batches b of all runs, memory-mapped: only its keys are
loaded to be sorted, and rows are gathered some units at a time, so that one prompt with millions of rows works too.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.corpus.records import with_lines_before
from fastcompat.corpus.units import Indices, UnitSize, unit_bounds
from fastcompat.errors import RunError
from fastcompat.rows import MESSAGE_TYPE, REWARDS_TYPE, ROW_SCHEMA, Message

# A row while it is being partitioned; `source` is the number of the file or of the stretch that it came from, `chars`
# what the unit's size is counted in. at_line: its detail begins with the number of a line of the stretch.
_STAGED_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("source", pa.int32()),
        ("row_index", pa.int64()),
        ("response_index", pa.int32()),
        ("generator", pa.string()),
        ("messages", pa.list_(MESSAGE_TYPE)),
        ("status", pa.string()),
        ("detail", pa.string()),
        ("rewards", REWARDS_TYPE),
        ("tools", pa.string()),
        ("chars", pa.int64()),
        ("at_line", pa.bool_()),
    ]
)
# Python objects become Arrow batches this often: they take several times the memory of the text itself.
_BATCH_ROWS = 8192
_BATCH_CHARS = 4 << 20
# So many characters of a bucket are gathered at a time: each time from all runs, a few rows from each.
_GATHERED_CHARS = 24 << 20


class Origins(NamedTuple):
    """Of each source by its number: its label, and the records and lines of its file before it, if it is a stretch."""

    labels: Sequence[str]
    n_records: Indices | None = None
    n_lines: Indices | None = None


def run_name(number: int) -> str:
    """A run's file name."""
    return f"run-{number:05d}.arrow"


@contextmanager
def writing(directory: Path) -> Iterator[None]:
    """What the disk refuses becomes a sentence; nothing that was there before is lost."""
    try:
        yield
    except OSError as error:
        full = error.errno == errno.ENOSPC
        room = " Preparing needs about twice the size of the corpus's text." if full else ""
        raise RunError(
            f"{directory} cannot be written: {error.strerror or error}.{room} Mend that and repeat the command."
        ) from error


class Partition:
    """Writes runs of rows under `directory`; `runs`, and the `rows` and `chars` of each bucket, are there when
    `finish()` was called. home: the directory that is named where the disk refuses.
    """

    def __init__(self, directory: Path, *, n_buckets: int, stage_bytes: int, home: Path) -> None:
        self.n_buckets = n_buckets
        self.n_rows = 0
        self.rows: Indices = np.zeros(n_buckets, np.int64)
        self.chars: Indices = np.zeros(n_buckets, np.int64)
        self.runs: list[Path] = []
        self._directory = directory
        self._home = home
        self._stage_bytes = stage_bytes
        self._staged: list[pa.RecordBatch] = []
        self._staged_bytes = 0
        self._new_columns()

    def _new_columns(self) -> None:
        self._prompt_ids: list[str] = []
        self._sources: list[int] = []
        self._row_indices: list[int] = []
        self._response_indices: list[int] = []
        self._generators: list[str] = []
        self._statuses: list[str] = []
        self._details: list[str] = []
        self._chars: list[int] = []
        self._at_lines: list[bool] = []
        self._ends = [0]
        self._roles: list[str] = []
        self._contents: list[str] = []
        self._turn_extras: list[str] = []
        self._tools: list[str] = []
        self._reward_ends = [0]
        self._reward_names: list[str] = []
        self._reward_values: list[float] = []
        self._pending_chars = 0

    def add(
        self,
        prompt_id: str,
        source: int,
        row_index: int,
        response_index: int,
        generator: str,
        messages: Sequence[Message],
        status: str,
        detail: str,
        rewards: Sequence[tuple[str, float]] = (),
        tools: str = "",
        at_line: bool = False,
    ) -> None:
        """Stage one row. Rows of one source must come in order: equal prompts keep the order of arrival."""
        chars = len(tools)
        for role, content, extra in messages:
            self._roles.append(role)
            self._contents.append(content)
            self._turn_extras.append(extra)
            chars += len(content) + len(extra)
        for name, value in rewards:
            self._reward_names.append(name)
            self._reward_values.append(value)
        self._prompt_ids.append(prompt_id)
        self._sources.append(source)
        self._row_indices.append(row_index)
        self._response_indices.append(response_index)
        self._generators.append(generator)
        self._statuses.append(status)
        self._details.append(detail)
        self._chars.append(chars)
        self._tools.append(tools)
        self._at_lines.append(at_line)
        self.n_rows += 1
        self._ends.append(len(self._roles))
        self._reward_ends.append(len(self._reward_values))
        self._pending_chars += chars
        if len(self._chars) >= _BATCH_ROWS or self._pending_chars >= _BATCH_CHARS:
            self._to_batch()

    def finish(self) -> None:
        """Write what is still staged."""
        self._to_batch()
        self._spill()

    def _to_batch(self) -> None:
        if not self._chars:
            return
        turns = pa.StructArray.from_arrays(
            [pa.array(texts, pa.string()) for texts in (self._roles, self._contents, self._turn_extras)],
            fields=list(MESSAGE_TYPE),
        )
        rewards = pa.MapArray.from_arrays(
            pa.array(self._reward_ends, pa.int32()),
            pa.array(self._reward_names, pa.string()),
            pa.array(self._reward_values, pa.float64()),
        )
        batch = pa.record_batch(
            [
                pa.array(self._prompt_ids, pa.string()),
                pa.array(self._sources, pa.int32()),
                pa.array(self._row_indices, pa.int64()),
                pa.array(self._response_indices, pa.int32()),
                pa.array(self._generators, pa.string()),
                pa.ListArray.from_arrays(pa.array(self._ends, pa.int32()), turns),
                pa.array(self._statuses, pa.string()),
                pa.array(self._details, pa.string()),
                rewards,
                pa.array(self._tools, pa.string()),
                pa.array(self._chars, pa.int64()),
                pa.array(self._at_lines, pa.bool_()),
            ],
            schema=_STAGED_SCHEMA,
        )
        self._staged.append(batch)
        self._staged_bytes += batch.nbytes
        self._new_columns()
        if self._staged_bytes >= self._stage_bytes:
            self._spill()

    def _spill(self) -> None:
        if not self._staged:
            return
        # Out of many batches Arrow would gather each bucket by copying all of them.
        staged = _one_batch(pa.Table.from_batches(self._staged))
        self._staged, self._staged_bytes = [], 0
        buckets = bucket_of(staged["prompt_id"], self.n_buckets)
        order = np.argsort(buckets, kind="stable")
        ends = np.searchsorted(buckets[order], np.arange(self.n_buckets + 1))
        np.add.at(self.chars, buckets, staged["chars"].to_numpy())
        self.rows += np.diff(ends)
        path = self._directory / run_name(len(self.runs))
        with (
            writing(self._home),
            pa.OSFile(str(path), "wb") as file,
            pa.ipc.new_file(file, _STAGED_SCHEMA) as writer,
        ):
            for bucket in range(self.n_buckets):
                writer.write_batch(staged.take(pa.array(order[ends[bucket] : ends[bucket + 1]])))
        self.runs.append(path)


class Bucket:
    """The rows of one bucket, on disk. Orders are indices into all its rows, as they arrived."""

    def __init__(self, batches: Sequence[pa.RecordBatch]) -> None:
        self._batches = batches
        self._starts = np.cumsum([0, *(batch.num_rows for batch in batches)])
        self.n_rows = int(self._starts[-1])

    @classmethod
    def read(cls, runs: Iterable[Path], number: int) -> Self:
        """Bucket `number` of these runs; valid for as long as they are there."""
        batches = (pa.ipc.open_file(pa.memory_map(str(path))).get_batch(number) for path in runs)
        return cls([batch for batch in batches if batch.num_rows])

    def tables(
        self, largest: UnitSize, origins: Origins, *, n_chars_before: int = 0, n_rows_before: int = 0
    ) -> Iterator[pa.Table]:
        """The units, as `units` cuts them, with `ROW_SCHEMA`."""
        chars = self._chars()
        held: list[Indices] = []
        n_chars = 0
        for rows in self.units(largest, n_chars_before=n_chars_before, n_rows_before=n_rows_before):
            held.append(rows)
            n_chars += int(chars[rows].sum())
            if n_chars >= _GATHERED_CHARS:
                yield from self._gathered(held, origins)
                held, n_chars = [], 0
        yield from self._gathered(held, origins)

    def _gathered(self, units: Sequence[Indices], origins: Origins) -> Iterator[pa.Table]:
        if not units:
            return
        table = self.gather(np.concatenate(units), origins)
        begin = 0
        for rows in units:
            yield table.slice(begin, len(rows))
            begin += len(rows)

    def units(self, largest: UnitSize, *, n_chars_before: int = 0, n_rows_before: int = 0) -> Iterator[Indices]:
        """The bucket's rows by prompt, then as they arrived, cut into units as `unit_bounds` says.

        n_chars_before, n_rows_before: of the corpus's earlier buckets.
        """
        if self.n_rows == 0:
            return
        ids = pa.chunked_array([batch["prompt_id"] for batch in self._batches]).combine_chunks()
        # A stable sort: within a prompt the rows stay as they arrived, by source, record and response.
        order = pc.array_sort_indices(ids).to_numpy().astype(np.int64)
        ids = ids.take(pa.array(order))
        new_prompt = np.ones(self.n_rows, dtype=bool)
        new_prompt[1:] = pc.not_equal(ids[1:], ids[:-1]).to_numpy(zero_copy_only=False)
        bounds = np.append(np.flatnonzero(new_prompt), self.n_rows)
        running = n_chars_before + np.concatenate([[0], np.cumsum(self._chars()[order])])
        for start, stop in unit_bounds(bounds, running, largest, n_rows_before=n_rows_before):
            yield order[start:stop]

    def _chars(self) -> Indices:
        return np.concatenate([np.empty(0, np.int64), *(batch["chars"].to_numpy() for batch in self._batches)])

    def gather(self, rows: Indices, origins: Origins) -> pa.Table:
        """Rows by index, in that order, with `ROW_SCHEMA`."""
        where = np.searchsorted(self._starts, rows, side="right") - 1
        # Batch by batch, then back in the order asked for.
        arrived = np.argsort(where, kind="stable")
        numbers, begins = np.unique(where[arrived], return_index=True)
        parts = []
        for number, local in zip(numbers, np.split(rows[arrived], begins[1:]), strict=True):
            parts.append(self._batches[number].take(pa.array(local - self._starts[number])))
        batch = _one_batch(pa.Table.from_batches(parts)).take(pa.array(np.argsort(arrived)))
        return _normalised(pa.Table.from_batches([batch]), origins)


def bucket_of(prompt_ids: pa.Array | pa.ChunkedArray, n_buckets: int) -> Indices:
    """Each prompt's bucket: a range of the first 32 bits of its id, so that ids ascend from bucket to bucket."""
    text = np.asarray(pc.utf8_slice_codeunits(prompt_ids, 0, 8).to_numpy(zero_copy_only=False), dtype="S8")
    digits = text.view(np.uint8).reshape(-1, 8).astype(np.int64)
    values = np.where(digits >= ord("a"), digits - ord("a") + 10, digits - ord("0"))
    number: Indices = (values << np.arange(28, -1, -4)).sum(axis=1)
    return (number * n_buckets) >> 32


def _normalised(table: pa.Table, origins: Origins) -> pa.Table:
    stretch = table["source"].combine_chunks()
    source = pa.array(origins.labels, pa.string()).take(stretch)
    row_index, detail = table["row_index"].combine_chunks(), table["detail"].combine_chunks()
    if origins.n_records is not None:
        row_index = pc.add(row_index, pa.array(origins.n_records).take(stretch))
    if origins.n_lines is not None and (at_line := np.flatnonzero(table["at_line"].to_numpy())).size:
        details = detail.to_pylist()
        for index, n_lines in zip(at_line, origins.n_lines[stretch.to_numpy()[at_line]], strict=True):
            details[index] = with_lines_before(details[index], int(n_lines))
        detail = pa.array(details, pa.string())
    row_key = pc.binary_join_element_wise(source, pc.cast(row_index, pa.string()), "#")
    response = table["response_index"].combine_chunks()
    suffixed = pc.binary_join_element_wise(row_key, pc.cast(response, pa.string()), "/")
    columns = {name: table[name] for name in ("response_index", "prompt_id", "generator", "messages")}
    columns |= {name: table[name] for name in ("status", "rewards", "tools")}
    columns |= {"row_index": row_index, "detail": detail, "source": source}
    columns["row_key"] = pc.if_else(pc.equal(response, 0), row_key, suffixed)
    return pa.table({name: columns[name] for name in ROW_SCHEMA.names}, schema=ROW_SCHEMA).combine_chunks()


def _one_batch(table: pa.Table) -> pa.RecordBatch:
    (batch,) = table.combine_chunks().to_batches()
    return batch
