"""A small corpus as Parquet and Arrow files, with a column of every type beside its texts."""

from __future__ import annotations

import datetime
import decimal
import uuid
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

N = 300
RECORDS = [{"prompt": f"p{i}", "response": f"r{i} é"} for i in range(N)]
TABLE = pa.Table.from_pylist(RECORDS)


def arrow(path: str, table: pa.Table, new: Any = pa.ipc.new_file, rows: int = 70, **settings: Any) -> str:
    with pa.OSFile(path, "wb") as file, new(file, table.schema, **settings) as writer:
        writer.write_table(table, max_chunksize=rows)
    return path


def parquet(path: str, table: pa.Table, **settings: Any) -> str:
    pq.write_table(table, path, **settings)
    return path


def _extension(kind: pa.DataType, value: Any, storage: pa.DataType) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array([value] * N, storage))


BESIDE = {
    "unsigned": pa.array([2**64 - 1] * N, pa.uint64()),
    "duration": pa.array([datetime.timedelta(1)] * N),
    "null": pa.nulls(N),
    "decimal": pa.array([decimal.Decimal("1.5")] * N, pa.decimal256(50, 3)),
    "map": pa.array([[("a", "1"), ("b", "2")]] * N, pa.map_(pa.string(), pa.string())),
    "map with a key twice": pa.array([[("a", "1"), ("a", "2")]] * N, pa.map_(pa.string(), pa.string())),
    "fixed bytes": pa.array([b"ab\xff\xff"] * N, pa.binary(4)),
    "uuid": _extension(pa.uuid(), uuid.UUID(int=1).bytes, pa.binary(16)),
    "bool8": _extension(pa.bool8(), 1, pa.int8()),
    "json": _extension(pa.json_(), '{"a": 1}', pa.string()),
    "opaque": _extension(pa.opaque(pa.binary(), "t", "v"), b"\xff", pa.binary()),
    "view": pa.array(["x" * 20] * N, pa.string_view()),
    "list view": pa.array([["x"]] * N, pa.list_view(pa.string())),
    "runs": pa.RunEndEncodedArray.from_arrays([N], ["x"]),
    "interval": pa.array([(1, 2, 3)] * N, pa.month_day_nano_interval()),
    "half": pa.array([np.float16(1.5)] * N),
    "union": pa.UnionArray.from_sparse(pa.array([0] * N, pa.int8()), [pa.array(["a"] * N), pa.array([1] * N)]),
    "fields twice": pa.StructArray.from_arrays([pa.array(["a"] * N), pa.array(["b"] * N)], names=["x", "x"]),
    "embedding": pa.array([[0.5] * 8] * N, pa.list_(pa.float32(), 8)),
    "times": pa.array([[1]] * N, pa.list_(pa.int64())).cast(pa.list_(pa.timestamp("ns", "Mars/Base"))),
    "bad text": pa.array([b"\xff"] * N).view(pa.string()),
}
