"""Arrow batches -> records, cut by what their values take in memory once they are unfolded.

A dictionary or a run stands for a value in many rows, so the bytes of a batch do not say what its rows unfold to;
`row_bytes` does. A value that Python has no equivalent for costs only those rows that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.corpus.records import (
    AMBIGUOUS,
    BATCH_CHARS,
    BATCH_RECORDS,
    MAX_RECORD_BYTES,
    Broken,
    NumberList,
    Opaque,
    Records,
    from_json,
)

Sizes = npt.NDArray[np.int64]


def records_of(batch: pa.RecordBatch) -> Iterator[Records]:
    """The batch's rows in order, in lists of at most `BATCH_RECORDS` and of about `BATCH_CHARS` bytes.

    Raises ArrowInvalid where the batch, as files may have it, has values outside of its buffers or dictionaries.
    """
    # As a whole: a slice's lists would be checked with all that is in the batch.
    _check(batch)
    shares = any(_has(field.type, _shares_values) for field in batch.schema)
    for start in range(0, batch.num_rows, BATCH_RECORDS):
        part = batch.slice(start, BATCH_RECORDS)
        if not shares and part.nbytes <= BATCH_CHARS:
            yield _to_records(part)
            continue
        ends = np.cumsum(sum((row_bytes(column) for column in part.columns), np.zeros(part.num_rows, np.int64)))
        begin, taken = 0, 0
        while begin < part.num_rows:
            end = max(begin + 1, int(np.searchsorted(ends, taken + BATCH_CHARS, side="right")))
            n_bytes, taken = int(ends[end - 1]) - taken, int(ends[end - 1])
            if n_bytes > MAX_RECORD_BYTES:
                yield [Broken(f"the record is longer than {MAX_RECORD_BYTES >> 20} MiB")]
            else:
                yield _to_records(part.slice(begin, end - begin))
            begin = end


def _check(batch: pa.RecordBatch) -> None:
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pa.ArrowInvalid as error:
            # Texts of other writers need not be UTF-8, but their bytes must be there.
            if "UTF8" not in str(error):
                raise
            _cast(column, _replaced(column.type, _bytes_of_text)).validate(full=True)


def row_bytes(array: pa.Array) -> Sizes:
    """About how many bytes each of the array's values takes, what a dictionary or a run repeats counted in full."""
    kind = array.type
    n = len(array)
    sizes: Sizes = np.zeros(n, np.int64)
    if isinstance(kind, pa.BaseExtensionType):
        return row_bytes(array.storage)
    if pa.types.is_struct(kind):
        return sum((row_bytes(array.field(i)) for i in range(kind.num_fields)), sizes)
    if pa.types.is_dictionary(kind):
        own = row_bytes(array.dictionary)
        return own[array.indices.fill_null(0).to_numpy(zero_copy_only=False)] if len(own) else sizes
    if n == 0:
        return sizes
    if pa.types.is_run_end_encoded(kind):
        runs = np.searchsorted(array.run_ends.to_numpy(), array.offset + np.arange(n), side="right")
        sizes = row_bytes(array.values)[runs]
    elif pa.types.is_string_view(kind) or pa.types.is_binary_view(kind):
        views = np.frombuffer(array.buffers()[1], np.int32).reshape(-1, 4)[array.offset : array.offset + n]
        sizes = np.where(array.is_valid().to_numpy(zero_copy_only=False), views[:, 0], 0).astype(np.int64)
    elif is_text(kind) or is_bytes(kind):
        sizes = pc.binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
    elif pa.types.is_fixed_size_list(kind):
        inside = row_bytes(array.values.slice(array.offset * kind.list_size, n * kind.list_size))
        sizes = inside.reshape(n, kind.list_size).sum(axis=1)
    elif _is_list(kind) or pa.types.is_map(kind):
        begins = array.offsets.to_numpy()
        if pa.types.is_list_view(kind) or pa.types.is_large_list_view(kind):
            ends = begins + array.sizes.to_numpy()
        else:
            begins, ends = begins[:-1], begins[1:]
        first, last = int(begins.min()), int(ends.max())
        running = np.concatenate([[0], np.cumsum(row_bytes(array.values.slice(first, last - first)))])
        sizes = running[ends - first] - running[begins - first]
    else:
        sizes += array.nbytes // n
    return sizes


def is_text(kind: pa.DataType) -> bool:
    """Whether values of the type are strings that lie one behind the other."""
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def is_bytes(kind: pa.DataType) -> bool:
    """Whether values of the type are bytes that lie one behind the other."""
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind))


def _is_list(kind: pa.DataType) -> bool:
    tests = ("is_list", "is_large_list", "is_fixed_size_list", "is_list_view", "is_large_list_view")
    return any(getattr(pa.types, test)(kind) for test in tests)


def _inner(kind: pa.DataType) -> list[pa.DataType]:
    if isinstance(kind, pa.BaseExtensionType):
        return [kind.storage_type]
    return [kind.field(i).type for i in range(kind.num_fields)]


def _has(kind: pa.DataType, is_one: Callable[[pa.DataType], bool]) -> bool:
    """Whether the type or one inside of it, at any depth, is of a kind."""
    return is_one(kind) or any(_has(inner, is_one) for inner in _inner(kind))


def _shares_values(kind: pa.DataType) -> bool:
    """Whether one value may stand for many rows."""
    return bool(pa.types.is_dictionary(kind) or pa.types.is_run_end_encoded(kind))


def _is_map(kind: pa.DataType) -> bool:
    return bool(pa.types.is_map(kind))


def _is_json(kind: pa.DataType) -> bool:
    return isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.json"


def _to_records(batch: pa.RecordBatch) -> Records:
    names = batch.schema.names
    columns = [_to_values(column) for column in batch.columns]
    if not columns:
        return [{} for _ in range(batch.num_rows)]
    if len(set(names)) < len(names):
        names, columns = _by_name(names, columns)
    return [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]


def _by_name(names: list[str], columns: list[list[Any]]) -> tuple[list[str], list[list[Any]]]:
    """Each name once: of two columns with one name only what they agree on is known."""
    merged: dict[str, list[Any]] = {}
    for name, values in zip(names, columns, strict=True):
        if name in merged:
            both = zip(merged[name], values, strict=True)
            values = [one if one == other else AMBIGUOUS for one, other in both]
        merged[name] = values
    return list(merged), list(merged.values())


def _to_values(column: pa.Array) -> list[Any]:
    kind = column.type
    if _is_list(kind) and (pa.types.is_integer(kind.value_type) or pa.types.is_floating(kind.value_type)):
        filled = column.is_valid().to_pylist()
        return [NumberList(column, index) if there else None for index, there in enumerate(filled)]
    try:
        # Times may have no equivalent in Python (nanoseconds, unknown zones): their numbers do as well here.
        timeless = _replaced(kind, _number_of_time)
        values: list[Any] = _to_python(_cast(column, timeless))
    except (ValueError, ArithmeticError, KeyError, pa.ArrowException):
        return [_to_value(column.slice(index, 1)) for index in range(len(column))]
    return values


def _to_value(column: pa.Array) -> Any:
    """The only value of the column, where some value in it has no equivalent."""
    kind = column.type
    for form in (_number_of_time, _bytes_of_text):
        try:
            (value,) = _to_python(_cast(column, _replaced(kind, form)))
        except (ValueError, ArithmeticError, KeyError, pa.ArrowException):
            continue
        # Bytes that are no UTF-8 become unpaired surrogates, for which the row is marked where it needs the text.
        return value if form is _number_of_time else _decoded(value)
    return Opaque(f"a value of the Arrow type {kind}")


def _to_python(column: pa.Array) -> list[Any]:
    # Asked for everywhere, it would take six times as long.
    values: list[Any] = column.to_pylist(maps_as_pydicts="strict") if _has(column.type, _is_map) else column.to_pylist()
    return [_said(value, column.type) for value in values] if _has(column.type, _is_json) else values


def _said(value: Any, kind: pa.DataType) -> Any:
    """A value with what JSON texts in it say, which is how `datasets` keeps turns and tools of many shapes."""
    if value is None:
        return None
    if _is_json(kind):
        try:
            return from_json(value)
        except (ValueError, RecursionError):
            return value
    if pa.types.is_struct(kind):
        return {name: _said(item, kind.field(name).type) for name, item in value.items()}
    if pa.types.is_map(kind):
        return {key: _said(item, kind.item_type) for key, item in value.items()}
    return [_said(item, kind.value_type) for item in value] if _is_list(kind) else value


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    return column if kind == column.type else column.cast(kind)


def _replaced(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.DataType:
    """The type with `leaf` of it at any depth."""
    if pa.types.is_struct(kind):
        return pa.struct([field.with_type(_replaced(field.type, leaf)) for field in kind])
    if pa.types.is_map(kind):
        item = kind.item_field
        return pa.map_(_replaced(kind.key_type, leaf), item.with_type(_replaced(item.type, leaf)))
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_value_field(kind, leaf), kind.list_size)
    for is_one, make in _LISTS:
        if is_one(kind):
            return make(_value_field(kind, leaf))
    return leaf(kind)


def _value_field(kind: pa.DataType, leaf: Callable[[pa.DataType], pa.DataType]) -> pa.Field:
    return kind.value_field.with_type(_replaced(kind.value_type, leaf))


_LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


def _number_of_time(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind) and pa.types.is_temporal(kind.value_type):
        return _number_of_time(kind.value_type)
    if pa.types.is_temporal(kind):
        return pa.int32() if kind.bit_width == 32 else pa.int64()
    return kind


def _bytes_of_text(kind: pa.DataType) -> pa.DataType:
    if pa.types.is_dictionary(kind):
        return _bytes_of_text(kind.value_type)
    return pa.large_binary() if is_text(kind) or pa.types.is_string_view(kind) else _number_of_time(kind)


def _decoded(value: Any) -> Any:
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, dict):
        return {_decoded(key): _decoded(item) for key, item in value.items()}
    return [_decoded(item) for item in value] if isinstance(value, list) else value
