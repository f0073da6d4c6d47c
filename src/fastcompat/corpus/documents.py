"""A JSON document that is no record itself but holds the records: in a list of its own, or column by column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fastcompat.corpus.records import Broken, Record
from fastcompat.corpus.values import kind_of


class Inside(NamedTuple):
    """The records of a document, and where in it they are, for the user."""

    where: str
    records: list[Record | Broken]


def records_inside(document: Record, fits: Callable[[Sequence[Record]], bool]) -> Inside | None:
    """`{"data": [{...}, ...]}`, `{"rows": [{"row": {...}}, ...]}` or `{"prompt": [...], "response": [...]}`, else None.

    `fits` says whether records have a known shape; a list that is all there is in the document need not.
    """
    table = _table(document)
    if table is not None and fits(table):
        return Inside("a table of columns", list(table))
    lists = [Inside(f"the list `{name}`", _elements(value)) for name, value in document.items() if _has_objects(value)]
    if len(document) > 1:
        lists = [inside for inside in lists if fits([item for item in inside.records if isinstance(item, dict)])]
    return lists[0] if len(lists) == 1 else None


def _has_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _elements(values: list[object]) -> list[Record | Broken]:
    # The hub's viewer gives every record a number and a wrapper.
    wrapped = all(isinstance(item, dict) and isinstance(item.get("row"), dict) for item in values)
    return [
        (item["row"] if wrapped else item) if isinstance(item, dict) else Broken(f"not an object but {kind_of(item)}")
        for item in values
    ]


def _table(document: Record) -> list[Record] | None:
    columns = list(document.values())
    if len(columns) < 2 or not all(isinstance(column, list) for column in columns):
        return None
    if not columns[0] or len({len(column) for column in columns}) > 1:
        return None
    if not any(all(isinstance(value, str) for value in column) for column in columns):
        return None
    return [dict(zip(document, row, strict=True)) for row in zip(*columns, strict=True)]
