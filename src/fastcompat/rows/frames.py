"""Anybody's frame, as a table or as rows: pyarrow, pandas, polars, a list of dictionaries. No torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa

from fastcompat.errors import UsageError
from fastcompat.rows.batches import plain


def as_table(frame: Any) -> pa.Table:
    """A pyarrow table of any frame: pyarrow's own, pandas, polars, whatever exports Arrow or `__dataframe__`.

    Strings of every kind (large, views, dictionaries) become `string`; an index of pandas is dropped. Raises UsageError
    for what is no frame.
    """
    try:
        if isinstance(frame, pa.Table):
            table = frame
        elif isinstance(frame, pa.RecordBatchReader):
            table = frame.read_all()
        elif isinstance(frame, pa.RecordBatch) or hasattr(frame, "__arrow_c_stream__"):
            table = pa.table(frame)
        elif hasattr(frame, "__dataframe__"):
            from pyarrow.interchange import from_dataframe

            table = from_dataframe(frame)
        else:
            raise TypeError("it exports neither Arrow (__arrow_c_stream__) nor __dataframe__")
        return _plain_strings(table)
    except (pa.ArrowException, TypeError, NotImplementedError, RuntimeError) as error:
        raise UsageError(
            f"{type(frame).__name__} is no table of scores ({error}); pass a pyarrow table, a pandas or a polars frame"
        ) from error


def _plain_strings(table: pa.Table) -> pa.Table:
    for index, field in reversed(list(enumerate(table.schema))):
        plain = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
        if pa.types.is_large_string(plain) or pa.types.is_string_view(plain):
            plain = pa.string()
        if field.name.startswith("__index_level_"):
            table = table.remove_column(index)
        elif plain != field.type:
            table = table.set_column(index, field.name, table.column(index).cast(plain))
    repeated = {name for name in table.column_names if table.column_names.count(name) > 1}
    if repeated:
        raise TypeError(f"it has several columns named {', '.join(sorted(repeated))}")
    return table


def is_table(rows: Any) -> bool:
    """Whether rows come from columns, so that each of them has all keys."""
    return any(hasattr(rows, name) for name in ("read_all", "to_pylist", "to_dicts", "to_dict"))


def records(rows: Any) -> Iterable[Mapping[str, Any]]:
    """The rows of a table, or of a list, as dictionaries. Raises UsageError for what would be taken apart wrongly."""
    if isinstance(rows, Mapping | str | bytes):
        raise UsageError(f"rows must be a list of dictionaries or a table, got one {type(rows).__name__}")
    if hasattr(rows, "read_all"):  # pyarrow's readers
        rows = rows.read_all()
    if hasattr(rows, "to_pylist"):  # pyarrow
        return rows.to_pylist()  # type: ignore[no-any-return]
    if hasattr(rows, "to_dicts"):  # polars
        return rows.to_dicts()  # type: ignore[no-any-return]
    if hasattr(rows, "to_dict"):  # pandas
        return [plain(row) for row in rows.to_dict("records")]
    if not isinstance(rows, Iterable):
        raise UsageError(f"rows must be a list of dictionaries or a table, got {type(rows).__name__}")
    return rows
