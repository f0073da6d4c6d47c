"""scores/<scorer> of a run: one scorer's record, the parts that it has finished, and what it has begun."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from fastcompat.errors import RunError
from fastcompat.rows import FIGURES, Extras, part_schema
from fastcompat.store.beginnings import (
    Beginning,
    Packing,
    left_out_by,
    left_out_in,
    read_beginning,
    whose,
    write_beginning,
)
from fastcompat.store.durable import create_table, remove_abandoned, write_json, write_table


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Unit:
    """One row group of one shard: what is computed and committed at once."""

    shard: int
    group: int
    n_rows: int

    @property
    def name(self) -> str:
        return f"{self.shard:05d}-{self.group:04d}"


# Of a unit: the generators whose responses are not scored -> why, for people.
LeaveOut: TypeAlias = Callable[[Unit], Mapping[str, str]]


def leave_nothing_out(unit: Unit) -> Mapping[str, str]:
    """Every response is scored."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ScorerStore:
    """scores/<scorer>: the record of one scorer's settings, and the parts that it has finished."""

    directory: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def kind(self) -> str:
        """base_model or reward_model."""
        return str(self.record["identity"]["kind"])

    @property
    def schema(self) -> pa.Schema:
        """Of its parts."""
        return part_schema(self.kind, self.extras)

    @property
    def extras(self) -> Extras:
        """What its parts tell beside the figure."""
        return Extras.of(self.record["identity"].get("extras", ()))

    @property
    def but_extras(self) -> dict[str, Any]:
        """Its identity without them: equal for scorers whose figures are the same."""
        return {**self.record["identity"], "extras": None}

    def part(self, unit: Unit) -> Path:
        return self.directory / f"part-{unit.name}.parquet"

    def beginning(self, unit: Unit) -> Path:
        return self.directory / f"begun-{unit.name}.parquet"

    @property
    def claims(self) -> Path:
        """Where workers say who is at work on what."""
        return self.directory / "claims"

    def finished(self) -> set[str]:
        """Names of the units that are committed."""
        return self._named("part-")

    def begun(self) -> set[str]:
        """Names of the units of which a beginning is kept."""
        return self._named("begun-")

    def _named(self, prefix: str) -> set[str]:
        # One scan, without a pattern: there may be 100,000 parts.
        suffix = ".parquet"
        with os.scandir(self.directory) as entries:
            names = [entry.name for entry in entries]
        return {name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix)}

    def left_out(self, unit: Unit) -> frozenset[str]:
        """The generators of which a committed unit leaves rows out. Raises RunError where its part is damaged."""
        if not self.leaves_out:
            return frozenset()
        path = self.part(unit)
        try:
            return left_out_by(pq.read_metadata(path).metadata)
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise RunError(f"{path} is damaged ({error}); delete it and score again") from error

    def lacks(self, unit: Unit, leave_out: Collection[str]) -> bool:
        """Whether something of a unit is to be scored, where these generators are left out."""
        return not self.part(unit).exists() or bool(self.left_out(unit) - set(leave_out))

    def pending(self, units: Sequence[Unit], leave_out: LeaveOut) -> list[Unit]:
        """Of these units, those without a part, or with one that leaves out whom `leave_out` does not name."""
        if len(units) == 1:
            return [unit for unit in units if self.lacks(unit, leave_out(unit))]
        finished = self.finished()
        if not self.leaves_out:
            return [unit for unit in units if unit.name not in finished]
        return [unit for unit in units if unit.name not in finished or self.lacks(unit, leave_out(unit))]

    @property
    def leaves_out(self) -> bool:
        """Whether there may be parts with rows left out; where there are none, no footer needs to be read."""
        # The mark is there before the first such part and stays for good: no kill and no other process can come
        # between the two, and what is asked for after a part was seen is never too old.
        return self._left_out_mark.exists()

    @property
    def _left_out_mark(self) -> Path:
        return self.directory / "left_out.json"

    def with_rows(self, units: Sequence[Unit]) -> list[Unit]:
        """The units of which something is scored, finished or begun."""
        # A unit that is finished between the two has its part: beginnings are listed first.
        names = self.begun()
        names |= self.finished()
        return [unit for unit in units if unit.name in names]

    def commit(self, unit: Unit, scores: pa.Table, *, completes: bool = False) -> bool:
        """Make a unit's scores durable, then drop what was kept of its beginning.

        completes: in place of a part that has left rows out. Else the first process wins, and the others get False.
        """
        assert scores.num_rows == unit.n_rows
        if left_out_in(scores) and not self.leaves_out:
            write_json(self._left_out_mark, {"parts": "some have rows of status left_out"})
        part = scores.replace_schema_metadata(whose(scores, self.name))
        if completes:
            write_table(self.part(unit), part)
        won = completes or create_table(self.part(unit), part)
        self.beginning(unit).unlink(missing_ok=True)
        return won

    def keep_beginning(self, unit: Unit, scores: pa.Table, packing: Packing) -> None:
        """Keep what there is of a unit that is not finished."""
        write_beginning(self.beginning(unit), scores, scorer=self.name, packing=packing)

    def read_beginning(self, unit: Unit, columns: Sequence[str] | None = None) -> Beginning | None:
        """What is kept of a unit, None if nothing. Raises RunError where it cannot be used."""
        try:
            return read_beginning(
                self.beginning(unit),
                scorer=self.name,
                schema=self.schema,
                figure=FIGURES[self.kind],
                n_rows=unit.n_rows,
                columns=columns,
            )
        except FileNotFoundError:
            return None

    def rows(self, unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
        """The rows of a unit that are scored so far: its part's, else those of its beginning that are done.

        A beginning that cannot be used is warned of, and has none. Raises RunError where the part is damaged.
        """
        beginning = None
        if not self.part(unit).exists():
            try:
                beginning = self.read_beginning(unit, columns)
            except RunError as error:
                logging.getLogger("fastcompat").warning(error)
        if beginning is not None:
            return beginning.rows
        # Asked again: another process may just have put the part in the beginning's place.
        if self.part(unit).exists():
            return self.read(unit, columns)
        return self.schema.empty_table().select(self.schema.names if columns is None else list(columns))

    def read(self, unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
        """A committed unit's scores, or some columns of them. Raises RunError where they are damaged."""
        path = self.part(unit)
        try:
            table = pq.read_table(path, columns=columns, page_checksum_verification=True)
        except (OSError, pa.ArrowException) as error:
            raise RunError(
                f"{path} is damaged ({error}); delete it and score again: only its unit is computed"
            ) from error
        expected = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        if not table.schema.equals(expected):
            raise RunError(f"{path} has other columns than the parts of its scorer; delete it and score again")
        if (table.schema.metadata or {}).get(b"scorer") != self.name.encode():
            raise RunError(f"{path} is another scorer's; delete it and score again")
        return table.replace_schema_metadata(None)

    def sweep(self) -> None:
        """Remove what killed processes left: half-written files, and beginnings of units that are finished."""
        remove_abandoned(self.directory)
        begun = self.begun()
        for name in begun & self.finished():
            (self.directory / f"begun-{name}.parquet").unlink(missing_ok=True)
