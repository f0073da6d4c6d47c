"""A JSON document that is no record itself but holds the records: in a list, under keys of their own, or in columns."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

from fastcompat.corpus.records import Broken, Record
from fastcompat.corpus.values import kind_of

Fits: TypeAlias = "Callable[[Sequence[Record]], bool]"

# Names that lead to the records: {"result": {"data": {"train": [...]}}}.
_MOST_NAMES = 3
_SEEN_ROWS = 64


class Inside(NamedTuple):
    """The records of a document, and where in it they are, for the user."""

    where: str
    records: list[Record | Broken]


def records_inside(document: Record, fits: Fits) -> list[Inside]:
    """Every place in the document whose records have a known shape, as `fits` says; a list that is all there is in the
    document need not. More than one: nothing says which is meant.

    `{"data": [{...}, ...]}`, `{"rows": [{"row": {...}}, ...]}`, `{"id1": {...}, "id2": {...}}`, `{"prompt": [...],
    "response": [...]}`, and what pandas makes of a table: the columns' values under their row's index, or apart.
    """
    found = list(_inside(document, fits, ()))
    if not found and len(document) == 1:
        ((name, value),) = document.items()
        if _has_objects(value):
            return [_in_list(value, (name,))]
    return found


def row_of_viewer(value: object) -> object:
    """The row in the wrapper with its number that the hub's viewer gives; anything else as it is."""
    if isinstance(value, dict) and "row_idx" in value and isinstance(value.get("row"), dict):
        return value["row"]
    return value


def _inside(document: Record, fits: Fits, names: tuple[str, ...]) -> Iterator[Inside]:
    place = f" `{'.'.join(names)}`" if names else ""
    for table in (_columns(document), _split_table(document)):
        if table and fits(table):
            yield Inside(f"a table of columns{place and f' in{place}'}", list(table))
            return
    # Bookkeeping may stand beside the records; then one object alone is bookkeeping too.
    fewest = 1 if len(document) == 1 else 2
    under_keys = [value for value in document.values() if isinstance(value, dict)]
    if not any(isinstance(value, list) for value in document.values()):
        if len(under_keys) >= fewest and fits(under_keys):
            yield Inside(f"the objects under each key{place and f' of{place}'}", list(under_keys))
            return
        if (table := _indexed_columns(document)) and fits(table):
            yield Inside(f"a table of columns{place and f' in{place}'}", list(table))
            return
    for name, value in document.items():
        inner = (*names, str(name))
        if _has_objects(value):
            found = _in_list(value, inner)
            if fits([record for record in found.records if isinstance(record, dict)]):
                yield found
        elif isinstance(value, dict) and len(inner) < _MOST_NAMES:
            yield from _inside(value, fits, inner)


def _has_objects(value: object) -> bool:
    return isinstance(value, list) and any(isinstance(item, dict) for item in value)


def _in_list(values: Iterable[object], names: tuple[str, ...]) -> Inside:
    rows = map(row_of_viewer, values)
    records = [row if isinstance(row, dict) else Broken(f"not an object but {kind_of(row)}") for row in rows]
    return Inside(f"the list `{'.'.join(names)}`", records)


def _columns(document: Record) -> list[Record] | None:
    columns = list(document.values())
    if len(columns) < 2 or not all(isinstance(column, list) for column in columns):
        return None
    return _rows(list(document), list(zip(*columns, strict=True))) if len(set(map(len, columns))) == 1 else None


def _split_table(document: Record) -> list[Record] | None:
    """pandas, orient="split": the names in `columns`, a list for each row in `data`."""
    names, rows = document.get("columns"), document.get("data")
    if not isinstance(names, list) or not isinstance(rows, list) or document.keys() - {"columns", "data", "index"}:
        return None
    return _rows(names, rows) if all(isinstance(row, list) and len(row) == len(names) for row in rows) else None


def _indexed_columns(document: Record) -> list[Record] | None:
    """pandas, orient="columns": each column an object with a value under every row's index."""
    columns = list(document.values())
    if len(columns) < 2 or not all(isinstance(column, dict) for column in columns):
        return None
    index = columns[0].keys()
    if any(column.keys() != index for column in columns):
        return None
    return _rows(list(document), [[column[key] for column in columns] for key in index])


def _rows(names: Sequence[str], rows: Sequence[Sequence[object]]) -> list[Record] | None:
    # A table that holds responses has a column of texts.
    if not any(isinstance(value, str) for row in rows[:_SEEN_ROWS] for value in row):
        return None
    return [dict(zip(names, row, strict=True)) for row in rows]
