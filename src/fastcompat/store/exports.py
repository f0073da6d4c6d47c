"""A run's scores in the frames of other packages, which are asked for only here; no copies where Arrow allows."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pyarrow as pa

from fastcompat.errors import UsageError


def to_pandas(table: pa.Table) -> Any:
    """A pandas frame of columns of Arrow, whose nulls stay nulls. Raises UsageError without pandas."""
    pandas = _late("pandas")
    return table.to_pandas(types_mapper=pandas.ArrowDtype)


def to_polars(table: pa.Table) -> Any:
    """A polars frame. Raises UsageError without polars."""
    return _late("polars").from_arrow(table)


def to_dataset(table: pa.Table) -> Any:
    """A `datasets.Dataset` in memory. Raises UsageError without datasets."""
    return _late("datasets").Dataset(table)


def _late(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError as error:
        raise UsageError(f"{package} is not here ({error}): pip install {package}") from error
