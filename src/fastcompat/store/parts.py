"""scores/<scorer> of a run: one scorer's record, the parts that it has finished, and what it has begun."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pyarrow as pa

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
from fastcompat.store.places import Place


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


# There before the first part that leaves rows out, and for good.
_LEFT_OUT_MARK = "left_out.json"


def part_name(unit: Unit) -> str:
    return f"part-{unit.name}.parquet"


def beginning_name(unit: Unit) -> str:
    return f"begun-{unit.name}.parquet"


@dataclass(frozen=True, kw_only=True)
class ScorerStore:
    """scores/<scorer>: the record of one scorer's settings, and the parts that it has finished."""

    place: Place
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.place.name

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

    def has_part(self, unit: Unit) -> bool:
        """Whether a unit is committed."""
        return self.place.has(part_name(unit))

    @property
    def claims(self) -> Place:
        """Where workers say who is at work on what."""
        return self.place / "claims"

    def finished(self) -> set[str]:
        """Names of the units that are committed."""
        return self._named("part-")

    def begun(self) -> set[str]:
        """Names of the units of which a beginning is kept."""
        return self._named("begun-")

    def _named(self, prefix: str) -> set[str]:
        suffix = ".parquet"
        names = self.place.names()
        return {name[len(prefix) : -len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix)}

    def left_out(self, unit: Unit) -> frozenset[str]:
        """The generators of which a committed unit leaves rows out. Raises RunError where its part is damaged."""
        if not self.leaves_out:
            return frozenset()
        name = part_name(unit)
        try:
            return left_out_by(self.place.read_footer(name).metadata)
        except FileNotFoundError:
            return frozenset()
        except (OSError, ValueError, TypeError, pa.ArrowException) as error:
            raise RunError(f"{self.place.path(name)} is damaged ({error}); delete it and score again") from error

    def lacks(self, unit: Unit, leave_out: Collection[str], *, has_part: bool | None = None) -> bool:
        """Whether something of a unit is to be scored, where these generators are left out. has_part: if known."""
        return not (self.has_part(unit) if has_part is None else has_part) or bool(self.left_out(unit) - set(leave_out))

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
        return self.place.has(_LEFT_OUT_MARK)

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
            self.place.put_json(_LEFT_OUT_MARK, {"parts": "some have rows of status left_out"})
        part = scores.replace_schema_metadata(whose(scores, self.name))
        if completes:
            self.place.put_table(part_name(unit), part)
        won = completes or self.place.put_new_table(part_name(unit), part)
        if self.place.may_have(beginning_name(unit)):
            self.place.delete(beginning_name(unit))
        return won

    def keep_beginning(self, unit: Unit, scores: pa.Table, packing: Packing) -> None:
        """Keep what there is of a unit that is not finished."""
        write_beginning(self.place, beginning_name(unit), scores, scorer=self.name, packing=packing)

    def read_beginning(self, unit: Unit, columns: Sequence[str] | None = None) -> Beginning | None:
        """What is kept of a unit, None if nothing. Raises RunError where it cannot be used."""
        if not self.place.may_have(beginning_name(unit)):
            return None
        try:
            return read_beginning(
                self.place,
                beginning_name(unit),
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
        if not self.has_part(unit):
            try:
                beginning = self.read_beginning(unit, columns)
            except RunError as error:
                logging.getLogger("fastcompat").warning(error)
        if beginning is not None:
            return beginning.rows
        # Asked again: another process may just have put the part in the beginning's place.
        if self.has_part(unit):
            return self.read(unit, columns)
        return self.schema.empty_table().select(self.schema.names if columns is None else list(columns))

    def read(self, unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
        """A committed unit's scores, or some columns of them. Raises RunError where they are damaged."""
        path = self.place.path(part_name(unit))
        try:
            table = self.place.read_table(part_name(unit), columns)
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
        self.place.sweep()
        begun = self.begun()
        for name in begun & self.finished():
            self.place.delete(f"begun-{name}.parquet")


# Settings by which two scorers of one model are told apart, if they differ in them.
_TELLING = (
    "output",
    "read_out",
    "template",
    "dtype",
    "turns",
    "score_eos",
    "bos",
    "max_length",
    "truncate",
    "template_options",
    "reasoning",
    "tools",
    "turn_masks",
    "revision",
)
_LATER = {"template_options": {}, "reasoning": "keep", "tools": "keep", "turn_masks": "honour"}


def labels_of(stores: Sequence[ScorerStore]) -> dict[str, str]:
    """Scorer name -> what its rows say of it: the model, with the settings in which these scorers differ."""
    groups: dict[tuple[str, str], list[ScorerStore]] = {}
    for store in stores:
        groups.setdefault((store.kind, str(store.record["settings"]["model"])), []).append(store)
    labels = {}
    for (_, model), alike in groups.items():
        settings = [store.record["settings"] for store in alike]
        # Those of older versions lack what could not be chosen.
        settings = [_LATER | own for own in settings]
        differing = [key for key in _TELLING if len({str(own.get(key)) for own in settings}) > 1]
        for store, own in zip(alike, settings, strict=True):
            labels[store.name] = " · ".join([model, *(f"{key} {own.get(key)}" for key in differing)])
    counts = Counter(labels.values())
    return {name: label if counts[label] == 1 else name for name, label in labels.items()}
