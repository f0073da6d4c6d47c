"""A batch of somebody's pipeline, in and out: its columns to read, and the same kind of thing with columns added.

A batch is a pyarrow table or record batch, a pandas or polars frame, a dict of columns, or another mapping of columns
(a batch of `datasets`). No torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from fastcompat.errors import UsageError

_KINDS = "a pyarrow table, a pandas or polars frame, or a dict of columns"


class Batch(NamedTuple):
    """What is read of a batch: `table` has the columns that Arrow holds, `others` those that are values of Python.

    `names` are all of its columns, those that cannot be read included.
    """

    n_rows: int
    names: tuple[str, ...]
    table: pa.Table
    others: dict[str, list[Any]]


class Column(list[Any]):
    """A column as a list, None for null, that Arrow takes with the type it had: also where all of it is null."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        super().__init__(column.to_pylist())
        self._type = column.type

    def __arrow_array__(self, type: pa.DataType | None = None) -> pa.Array:
        return pa.array(list(self), type or self._type)

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)


def batch_of(value: Any) -> Batch:
    """The columns of a batch. Raises UsageError for what is none, and says what to do."""
    if isinstance(value, pa.RecordBatch):
        value = pa.Table.from_batches([value])
    # A batch of `datasets`: its formats may have made arrays or tensors of the columns, beneath lies Arrow.
    beneath = getattr(value, "pa_table", None) if isinstance(value, Mapping) else None
    if type(value).__name__ == "LazyRow":
        raise _single_row("this")
    if isinstance(beneath, pa.Table):
        # What was asked for or set may have been changed by whoever hands the batch on: it stands in the mapping alone.
        untouched = getattr(value, "keys_to_format", ())
        return _of_columns({name: beneath[name] if name in untouched else value[name] for name in value})
    if _is_polars(value):
        value = value.to_arrow()
    if _is_pandas(value):
        return _of_pandas(value)
    if isinstance(value, pa.Table):
        _refuse_repeated(value.column_names)
        return Batch(value.num_rows, tuple(value.column_names), value, {})
    if isinstance(value, Mapping):
        return _of_columns(value)
    if hasattr(value, "collect"):
        raise UsageError(f"a {type(value).__name__} has no rows yet: collect() it first")
    if hasattr(value, "map") and hasattr(value, "features"):
        raise UsageError("this is a whole dataset: dataset.map(scorer, batched=True, batch_size=8192)")
    if hasattr(value, "map_batches"):
        raise UsageError("this is a whole dataset: dataset.map_batches(fc.Scorer, fn_constructor_args=[MODEL], ...)")
    raise UsageError(f"a batch is {_KINDS}, not {type(value).__name__}")


def with_columns(value: Any, new: pa.Table) -> Any:
    """The batch with the columns of `new` behind its own, as what it is; of a mapping that is no dict only the new
    ones, since its owner adds them itself. What was given is not changed, and nulls stay nulls."""
    if isinstance(value, pa.Table | pa.RecordBatch):
        for name, column in zip(new.column_names, new.columns, strict=True):
            array = column if isinstance(value, pa.Table) else _one_array(column)
            value = value.append_column(new.schema.field(name), array)
        return value
    if _is_polars(value):
        import polars

        return value.hstack(polars.from_arrow(new).get_columns())  # type: ignore[union-attr]
    if _is_pandas(value):
        import pandas

        added = {
            name: pandas.Series(pandas.arrays.ArrowExtensionArray(column), index=value.index)
            for name, column in zip(new.column_names, new.columns, strict=True)
        }
        return pandas.concat([value, pandas.DataFrame(added, index=value.index)], axis=1)
    added = {name: Column(column) for name, column in zip(new.column_names, new.columns, strict=True)}
    return {**value, **added} if isinstance(value, dict) else added


def _single_row(what: str) -> UsageError:
    return UsageError(
        f"{what} is a single row. With datasets: dataset.map(scorer, batched=True, batch_size=8192); else put the rows "
        "into a list: scorer([row, ...])"
    )


def _one_array(column: pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks()
    return pa.concat_arrays(array.chunks) if isinstance(array, pa.ChunkedArray) else array


def _is_polars(value: Any) -> bool:
    return hasattr(value, "to_dicts") and hasattr(value, "hstack")


def _is_pandas(value: Any) -> bool:
    return hasattr(value, "to_dict") and hasattr(value, "iloc") and hasattr(value, "columns")


def _refuse_repeated(names: list[str]) -> None:
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise UsageError(f"the batch has several columns named {', '.join(sorted(repeated))}")


def _of_columns(columns: Mapping[str, Any]) -> Batch:
    arrays: dict[str, Any] = {}
    others: dict[str, list[Any]] = {}
    lengths: dict[str, int] = {}
    for name in columns:
        values = columns[name]
        if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
            raise _single_row(f"column {name} is one value, not a list of them: this")
        lengths[str(name)] = len(values)
        if isinstance(values, pa.Array | pa.ChunkedArray):
            arrays[str(name)] = values
        elif isinstance(values, np.ndarray):
            # What has more dimensions is an embedding or an image.
            if values.ndim == 1:
                others[str(name)] = [plain(value) for value in values.tolist()]
        elif isinstance(values, list | tuple):
            others[str(name)] = [plain(value) for value in values]
        elif hasattr(values, "to_list"):  # a series of pandas or polars
            others[str(name)] = [plain(value) for value in values.to_list()]
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{name} {length}" for name, length in lengths.items())
        raise UsageError(f"the batch's columns differ in length: {told}")
    n_rows = next(iter(lengths.values()), 0)
    return Batch(n_rows, tuple(lengths), pa.table(arrays), others)


def _of_pandas(frame: Any) -> Batch:
    names = [str(name) for name in frame.columns]
    _refuse_repeated(names)
    arrays: dict[str, Any] = {}
    others: dict[str, list[Any]] = {}
    for position, name in enumerate(names):
        series = frame.iloc[:, position]
        try:
            arrays[name] = pa.array(series, from_pandas=True)
        except (pa.ArrowException, TypeError, ValueError):  # values that have no type together
            others[name] = [plain(value) for value in series.tolist()]
    return Batch(len(frame), tuple(names), pa.table(arrays), others)


def plain(value: Any) -> Any:
    """A value without the arrays that numpy makes of lists, and with None for the NaN that pandas makes of null."""
    if isinstance(value, float):
        return None if value != value else value
    if isinstance(value, np.ndarray):
        return [plain(item) for item in value.tolist()]
    if isinstance(value, list):
        return [plain(item) for item in value]
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return None if type(value).__name__ == "NAType" else value
