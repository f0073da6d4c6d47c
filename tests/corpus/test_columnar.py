"""Parquet and Arrow files: every type beside the texts, memory by what rows unfold to, and what breaks costs itself."""

from __future__ import annotations

import ast
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from columnar_files import BESIDE, RECORDS, TABLE, N, arrow, parquet

from fastcompat.corpus import iter_responses, parquetfiles, prepare
from fastcompat.corpus.arrowvalues import row_bytes
from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.records import BATCH_CHARS, BATCH_RECORDS
from fastcompat.corpus.sources import find_sources
from fastcompat.errors import CorpusError, SchemaError
from fastcompat.rows.status import Status


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str) -> list[Any]:
    (source,) = find_sources(path)
    return [record for batch in SourceReader(source) for record in batch.records]


def pairs_of(path: str) -> list[tuple[str, str]]:
    """The prompt and response of every row, all of which can be scored."""
    rows = list(iter_responses(path))
    assert {(row.status, row.detail) for row in rows} == {(Status.OK, "")}
    return [(row.messages[0].content, row.messages[-1].content) for row in rows]


PAIRS = [(record["prompt"], record["response"]) for record in RECORDS]


# --- every writer and every type


PARQUET = {
    **{f"{codec}": {"compression": codec} for codec in ("none", "snappy", "gzip", "brotli", "zstd", "lz4")},
    "version 1, pages 2": {"version": "1.0", "data_page_version": "2.0"},
    "version 2, pages 2, plain": {"version": "2.6", "data_page_version": "2.0", "use_dictionary": False},
    "delta": {
        "use_dictionary": False,
        "column_encoding": {"prompt": "DELTA_BYTE_ARRAY", "response": "DELTA_LENGTH_BYTE_ARRAY"},
    },
    "rows apart": {"row_group_size": 1},
    "no Arrow schema": {"store_schema": False},
}
WRITERS: dict[str, Callable[[str], object]] = {
    "polars.parquet": lambda path: pl.DataFrame(RECORDS).write_parquet(path),
    "polars.arrow": lambda path: pl.DataFrame(RECORDS).write_ipc(path),
    "zstd.arrow": lambda path: pl.DataFrame(RECORDS).write_ipc(path, compression="zstd"),
    "stream.arrow": lambda path: pl.DataFrame(RECORDS).write_ipc_stream(path),
    "categories.arrow": lambda path: pl.DataFrame(RECORDS).cast(pl.Categorical).write_ipc(path),
    "categories.parquet": lambda path: pl.DataFrame(RECORDS).cast(pl.Categorical).write_parquet(path),
    "pandas.parquet": lambda path: pd.DataFrame(RECORDS).to_parquet(path),
    "pandas_categories.parquet": lambda path: pd.DataFrame(RECORDS).astype("category").to_parquet(path),
    "pandas.feather": lambda path: pd.DataFrame(RECORDS).to_feather(path),
}


@pytest.mark.parametrize("settings", PARQUET.values(), ids=PARQUET)
def test_parquet_in_every_form(settings: dict[str, Any]) -> None:
    assert pairs_of(parquet("a.parquet", TABLE, **settings)) == PAIRS


@pytest.mark.parametrize("name", WRITERS)
def test_files_of_other_writers(name: str) -> None:
    WRITERS[name](name)
    assert pairs_of(name) == PAIRS


@pytest.mark.parametrize("kind", BESIDE)
def test_columns_that_nobody_reads_cost_nothing(kind: str) -> None:
    table = TABLE.append_column("beside", BESIDE[kind])
    for new in (pa.ipc.new_file, pa.ipc.new_stream):
        assert pairs_of(arrow("a.arrow", table, new)) == PAIRS
    try:
        parquet("a.parquet", table)
    except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
        return  # no such type in Parquet
    assert pairs_of("a.parquet") == PAIRS


@pytest.mark.parametrize(
    "form",
    [
        lambda column: column.cast(pa.string_view()),
        lambda column: column.cast(pa.large_string()),
        lambda column: column.cast(pa.binary()),
        lambda column: column.dictionary_encode(),
        lambda column: pa.RunEndEncodedArray.from_arrays(pa.array(range(1, N + 1), pa.int32()), column),
    ],
)
def test_texts_of_every_type(form: Callable[[pa.Array], pa.Array]) -> None:
    columns = [form(TABLE[name].combine_chunks()) for name in ("prompt", "response")]
    assert pairs_of(arrow("a.arrow", pa.table(columns, names=["prompt", "response"]))) == PAIRS


def test_turns_that_are_maps() -> None:
    turns = [[("role", "user"), ("content", "p")], [("role", "assistant"), ("content", "r")]]
    column = pa.array([turns] * 5, pa.list_(pa.map_(pa.string(), pa.string())))
    assert pairs_of(parquet("a.parquet", pa.table({"messages": column}))) == [("p", "r")] * 5


@pytest.mark.parametrize("table", [TABLE.slice(0, 0), pa.table({})])
def test_no_rows_and_no_columns(table: pa.Table) -> None:
    assert read(parquet("a.parquet", table)) == read(arrow("a.arrow", table)) == []


# --- two columns of one name


def _named(**columns: str) -> pa.Table:
    """Columns `prompt`, `response` and others, by the column of TABLE that each repeats; `_` ends a second name."""
    names = [name.rstrip("_") for name in columns]
    return pa.Table.from_arrays([TABLE[column] for column in columns.values()], names=names)


@pytest.mark.parametrize("write", [parquet, arrow])
def test_two_columns_of_one_name(write: Callable[[str, pa.Table], str]) -> None:
    """They matter where they differ and are read."""
    same = _named(prompt="prompt", response="response", response_="response")
    assert pairs_of(write("same", same)) == PAIRS
    unread = _named(prompt="prompt", response="response", x="prompt", x_="response")
    assert pairs_of(write("unread", unread)) == PAIRS
    with pytest.raises(CorpusError, match=r"response is two values under one name, not text \(300 rows\)"):
        prepare(write("read", _named(prompt="prompt", response="response", response_="prompt")), "out")


def test_two_columns_of_one_name_are_named_where_no_shape_fits() -> None:
    turns = [[[{"role": "user", "content": "a"}, {"role": "assistant", "content": text}]] * 3 for text in "bc"]
    table = pa.Table.from_arrays([pa.array(column) for column in turns], names=["messages", "messages"])
    with pytest.raises(SchemaError, match="two columns with different values are named `messages`; rename one"):
        prepare(parquet("a.parquet", table), "out")


# --- what rows unfold to

_NESTED = pa.array([[{"a": "x" * i, "b": ["é", None, "yy"][: i % 4]}] * (i % 3) for i in range(20)])
SIZES: list[tuple[pa.Array, Callable[[Any], int]]] = [
    (pa.array(["a", None, "bcd"]), lambda text: len(text or "")),
    (pa.array(["a", None, "bcd" * 9], pa.string_view()), lambda text: len(text or "")),
    (pa.array([b"a", None, b"bcd"], pa.large_binary()), lambda text: len(text or "")),
    (pa.array(["a", "bcd", "a"]).dictionary_encode(), len),
    (pa.RunEndEncodedArray.from_arrays([2, 5, 6], ["a", "bcd", None]), lambda text: len(text or "")),
    (pa.array([1, 2, 3], pa.int32()), lambda number: 4),
    (pa.array([["a", "bc"], None, [], ["d"]]), lambda texts: len("".join(texts or ()))),
    (pa.array([["a", "bc"], ["", ""]], pa.list_(pa.string(), 2)), lambda texts: len("".join(texts))),
    (pa.array([["a", "bc"], None, ["d"]], pa.list_view(pa.string())), lambda texts: len("".join(texts or ()))),
    (pa.array([[("k", "vv")], []], pa.map_(pa.string(), pa.string())), lambda pairs: len("".join(map("".join, pairs)))),
    (
        _NESTED,
        lambda turns: sum(len(t["a"]) + sum(len((text or "").encode()) for text in t["b"]) for t in turns),
    ),
]


@pytest.mark.parametrize(("array", "size"), SIZES)
def test_bytes_of_rows(array: pa.Array, size: Callable[[Any], int]) -> None:
    for start in range(len(array) + 1):
        part = array.slice(start)
        assert row_bytes(part).tolist() == [size(value) for value in part.to_pylist()]


SYSTEM = "s" * 810_000


def _turns(rows: list[list[tuple[str, str]]]) -> pa.Table:
    """A column of turns in which equal texts are one, as a writer that streams them keeps them."""
    flat = [turn for row in rows for turn in row]
    places: dict[str, int] = {}
    indices = [places.setdefault(text, len(places)) for _, text in flat]
    texts = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), pa.array(list(places)))
    turns = pa.StructArray.from_arrays([pa.array([role for role, _ in flat]), texts], names=["role", "content"])
    ends = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    return pa.table({"messages": pa.ListArray.from_arrays(pa.array(ends), turns)})


def _uneven_turns() -> pa.Table:
    """Short conversations, then long ones whose system prompts are one text, and among them one of 2.3 GB."""
    short = [[("user", f"q{i}"), ("assistant", f"a{i}")] for i in range(3000)]
    long = [[("system", SYSTEM), ("user", SYSTEM), *turns] for turns in short[:600]]
    bomb = [("user", SYSTEM), ("assistant", SYSTEM)] * 1400
    return _turns([*short, *long, bomb, *short[:10]])


_MEMORY_SCRIPT = """
import sys
from collections import Counter
from fastcompat.corpus import iter_responses
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
before = peak()
statuses = Counter((str(row.status), row.detail) for row in iter_responses(sys.argv[1]))
print(peak() - before, dict(statuses), sep="|")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "write",
    [
        lambda path: parquet(
            path, _uneven_turns(), compression="zstd", dictionary_pagesize_limit=64 << 20, store_schema=False
        ),
        lambda path: arrow(path, _uneven_turns(), rows=5000),
        lambda path: arrow(path, _uneven_turns(), pa.ipc.new_stream, rows=1000),
    ],
    ids=["parquet", "arrow", "arrow stream"],
)
def test_memory_follows_what_rows_unfold_to(write: Callable[[str], str]) -> None:
    path = write("a")
    assert Path(path).stat().st_size < 3 << 20
    result = subprocess.run(
        [sys.executable, "-c", _MEMORY_SCRIPT, path], capture_output=True, text=True, check=True, timeout=300
    )
    kilobytes, statuses = result.stdout.split("|")
    assert ast.literal_eval(statuses) == {("ok", ""): 3610, ("invalid", "the record is longer than 512 MiB"): 1}
    # 1 GB of conversations passes through beside the one that is too long.
    assert int(kilobytes) < 400 << 10


def test_batches_of_ordinary_rows_grow_and_those_of_long_ones_stay_small() -> None:
    small = [{"prompt": f"p{i}", "response": "r"} for i in range(6000)]
    long = [{"prompt": f"p{i}", "response": random.Random(i).randbytes(150_000).hex()} for i in range(40)]
    (source,) = find_sources(parquet("a.parquet", pa.Table.from_pylist([*small, *long, *small]), use_dictionary=False))
    batches = [batch.records for batch in SourceReader(source)]
    assert [record for batch in batches for record in batch] == [*small, *long, *small]
    sizes = [len(batch) for batch in batches]
    assert max(sizes) == BATCH_RECORDS
    assert sizes.count(BATCH_RECORDS) >= 8
    chars = [sum(len(record["response"]) for record in batch) for batch in batches]
    assert max(chars) <= BATCH_CHARS + 300_000


class _Reluctant:
    """A Parquet file that cannot convert more than a few rows at once, nor some row at all, as pyarrow where a batch's
    texts are beyond 2 GiB.
    """

    def __init__(self, file: pq.ParquetFile, most: int, never: int) -> None:
        self._file = file
        self._most = most
        self._never = never
        self._rows = 0
        self.metadata = file.metadata
        self.reader = self

    def set_batch_size(self, rows: int) -> None:
        self._rows = rows

    def iter_batches(self, batch_size: int, *, row_groups: list[int]) -> Iterator[pa.RecordBatch]:
        (group,) = row_groups
        (batch,) = self._file.read_row_group(group).combine_chunks().to_batches()
        self._rows = batch_size
        start = 0
        while start < batch.num_rows:
            rows = self._rows
            if rows > self._most or start <= self._never < start + rows:
                raise pa.ArrowNotImplementedError("Nested data conversions not implemented for chunked array outputs")
            yield batch.slice(start, rows)
            start += rows


@pytest.mark.parametrize(("most", "never"), [(1024, -1), (100, -1), (3, -1), (1, -1), (64, 57), (1024, 0), (1024, 99)])
def test_what_cannot_be_converted_is_read_in_smaller_batches(
    most: int, never: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = parquetfiles._File._opened

    def reluctant(self: Any, **settings: Any) -> Any:
        file = opened(self, **settings)
        # A row that can never be converted can where its texts are in dictionaries.
        return file if settings and never >= 0 else _Reluctant(file, most, never)

    monkeypatch.setattr(parquetfiles._File, "_opened", reluctant)
    assert read(parquet("a.parquet", TABLE, row_group_size=100)) == RECORDS
