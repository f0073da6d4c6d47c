"""Whose responses are chosen among, and whether all of them are there."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import UsageError
from fastcompat.store import Run, races_of, unscored_generators


def refuse_raced(run: Run, generators: Sequence[str] | None) -> None:
    """UsageError where a race has left so much unscored that a prompt's best response may not be there."""
    if not races_of(run):
        return
    lacking = unscored_generators(run)
    if generators is not None:
        lacking &= set(generators)
    if lacking:
        names = ", ".join(sorted(lacking)[:4]) + (" ..." if len(lacking) > 4 else "")
        raise UsageError(
            f"a race has stopped {run.location}: not all responses of {names} are scored, so the best of a prompt is "
            "not known. Score the rest with the same command without --until; or those of one generator with --only "
            "NAME instead, and choose among them with --generator NAME"
        )


def only_of(table: pa.Table, generators: Sequence[str]) -> pa.Table:
    if "generator" not in table.column_names:
        raise UsageError("generators needs a column generator")
    there = pc.unique(table["generator"].drop_null()).to_pylist()
    unknown = [name for name in generators if name not in there]
    if unknown:
        raise UsageError(f"generator {unknown[0]} is not in the scores; there are {', '.join(sorted(there)[:12])}")
    return table.filter(pc.is_in(table["generator"], value_set=pa.array(generators, pa.string())))
