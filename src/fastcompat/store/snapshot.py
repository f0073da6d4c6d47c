"""What a run holds at one moment, in chunks of whole prompts: however often it is read, the same rows.

Others may go on scoring. Which units are finished is listed once; what is kept of begun units changes every half
minute, so it is read at once and held. Memory holds a chunk, and a unit of every generation beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import product

import pyarrow as pa
import pyarrow.compute as pc

from fastcompat.errors import RunError
from fastcompat.rows import SCORES_SCHEMA, pair, refuse_absent, with_reward
from fastcompat.store.parts import ScorerStore, Unit, part_name
from fastcompat.store.run import Run

# Rows of a chunk, about; a prompt with more is a chunk of its own.
CHUNK_ROWS = 1 << 16


class Snapshot:
    """The figures of `stores`, and the rewards that came with the corpus, in some columns of `SCORES_SCHEMA`."""

    def __init__(self, run: Run, stores: Sequence[ScorerStore], columns: Iterable[str]) -> None:
        self._run = run
        self.columns = [name for name in SCORES_SCHEMA.names if name in {*columns, "prompt_id", "status"}]
        labels = run.labels(stores)
        self._told: dict[str, dict[str, _Told]] = {"base_model": {}, "reward_model": {}}
        for store in stores:
            self._told[store.kind][labels[store.name]] = self._of_scorer(store)
        for name in run.reward_columns:
            self._told["reward_model"][f"column {name}"] = self._of_corpus(name)
        for kind, told in self._told.items():
            self._told[kind] = {label: own for label, own in told.items() if any(map(own.has, run.units))}

    @property
    def n_readers(self) -> int:
        """How many files are read at once."""
        return self._run.place.n_readers

    def _of_scorer(self, store: ScorerStore) -> _Told:
        columns = [name for name in store.schema.names if name in {*self.columns, "row_key"}]
        begun = store.begun()  # listed first: of what is finished in between there is the part
        finished = store.finished()
        unfinished = begun - finished
        rows = {unit.name: store.rows(unit, columns) for unit in self._run.units if unit.name in unfinished}
        return _Told(
            columns=columns,
            finished=finished,
            begun={name: table for name, table in rows.items() if table.num_rows},
            read=partial(_part, store),
        )

    def _of_corpus(self, reward: str) -> _Told:
        there = ("row_key", "source", "row_index", "prompt_id", "generator", "reward", "status")
        return _Told(
            columns=[name for name in there if name in {*self.columns, "row_key"}],
            finished={unit.name for unit in self._run.units},
            begun={},
            read=partial(_rewarded, self._run, reward),
        )

    def pairs(
        self, *, base_model: str | None = None, reward_model: str | None = None
    ) -> Iterator[tuple[tuple[str | None, str | None], PairRows]]:
        """(base model, reward model), by their labels, and their rows: of every two that have told anything, in the
        order of their first use. Where only one kind has, the other is None.

        base_model, reward_model: only this one. UsageError for one that has told nothing.
        """
        asked = {"base_model": base_model, "reward_model": reward_model}
        for kind, model in asked.items():
            refuse_absent(kind, model, list(self._told[kind]))
        found: list[list[str | None]] = [
            [model] if model is not None else [*self._told[kind]] for kind, model in asked.items()
        ]
        if any(found):
            for base, reward in product(*(labels or [None] for labels in found)):
                yield (base, reward), PairRows(self, base, reward)

    def told(self, kind: str, model: str | None) -> _Told | None:
        return None if model is None else self._told[kind][model]

    def chunks(self, has: Callable[[Unit], bool], read: Callable[[Sequence[Unit]], pa.Table]) -> Iterator[pa.Table]:
        """What `read` gives of the units that have something, in chunks of whole prompts."""
        return whole_prompts([unit for unit in self._run.units if has(unit)], lambda: self._first_prompts, read)

    @cached_property
    def _first_prompts(self) -> dict[Unit, str]:
        return self._run.first_prompts()


class PairRows:
    """The rows of one base model and one reward model as `rows.paired` has them, in chunks, as often as is asked.

    Raises RunError where a part or a shard is damaged.
    """

    def __init__(self, snapshot: Snapshot, base_model: str | None, reward_model: str | None) -> None:
        self._snapshot = snapshot
        self._models = (base_model, reward_model)
        self._base = snapshot.told("base_model", base_model)
        self._reward = snapshot.told("reward_model", reward_model)
        self._both = [own for own in (self._base, self._reward) if own is not None]

    def __iter__(self) -> Iterator[pa.Table]:
        with ThreadPoolExecutor(self._snapshot.n_readers) as pool:
            yield from self._snapshot.chunks(
                lambda unit: any(own.has(unit) for own in self._both), partial(self._read, pool)
            )

    def _read(self, pool: Executor, units: Sequence[Unit]) -> pa.Table:
        columns, base, reward = self._snapshot.columns, self._base, self._reward
        keyed = [*columns, "row_key"]
        alike: list[Unit] = []
        others: list[Unit] = []
        for unit in units:
            (alike if all(unit.name in own.finished for own in self._both) else others).append(unit)
        tables = []
        for chosen, names, names_beside in (
            # Every part has the rows of its unit in their order: of what both have finished no key is read.
            (alike, columns, columns if base is None else ["reward", "status"]),
            (others, keyed, keyed),
        ):
            if chosen:
                losses = None if base is None else base.table(chosen, names, pool)
                rewards = None if reward is None else reward.table(chosen, names_beside, pool)
                tables.append(pair(losses, rewards, *self._models).select(columns))
        return pa.concat_tables(tables)


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What one scorer, or the corpus itself, has told: the names of finished units, whose rows `read` gives, and the
    rows of begun ones."""

    columns: Sequence[str]
    finished: AbstractSet[str]
    begun: Mapping[str, pa.Table]
    read: Callable[[Unit, Sequence[str]], pa.Table]

    def has(self, unit: Unit) -> bool:
        return unit.name in self.finished or unit.name in self.begun

    def table(self, units: Sequence[Unit], columns: Sequence[str], pool: Executor) -> pa.Table:
        """Its rows of these units, several units at a time, in those of `columns` that it has."""
        own = [name for name in self.columns if name in columns]
        parts = pool.map(partial(self._rows, own), filter(self.has, units))
        return pa.concat_tables([pa.schema([SCORES_SCHEMA.field(name) for name in own]).empty_table(), *parts])

    def _rows(self, columns: Sequence[str], unit: Unit) -> pa.Table:
        return self.read(unit, columns) if unit.name in self.finished else self.begun[unit.name].select(columns)


def _part(store: ScorerStore, unit: Unit, columns: Sequence[str]) -> pa.Table:
    rows = store.read(unit, columns)
    if rows.num_rows != unit.n_rows:
        raise RunError(
            f"{store.place.path(part_name(unit))} does not hold the rows of its unit; delete it and score again"
        )
    return rows


def _rewarded(run: Run, reward: str, unit: Unit, columns: Sequence[str]) -> pa.Table:
    beside = [name for name in columns if name not in ("reward", "status")]
    return with_reward(run.unit_rows(unit, [*beside, "status", "detail", "rewards"]), reward).select(columns)


def whole_prompts(
    units: Sequence[Unit], first: Callable[[], Mapping[Unit, str]], read: Callable[[Sequence[Unit]], pa.Table]
) -> Iterator[pa.Table]:
    """What `read` gives of these units, in chunks of about `CHUNK_ROWS` rows that ascend by prompt_id: a prompt has all
    of its rows in one of them, be they in units of several generations.

    first: the lowest prompt_id of every unit; asked only where there are several chunks.
    """
    if sum(unit.n_rows for unit in units) <= CHUNK_ROWS:
        if units:
            yield read(units)
        return
    lowest = first()
    ordered = sorted(units, key=lambda unit: (lowest[unit], unit))
    begin, waiting = 0, None
    while begin < len(ordered):
        end, n_rows = begin, 0
        while end < len(ordered) and n_rows < CHUNK_ROWS:
            n_rows += ordered[end].n_rows
            end += 1
        rows = read(ordered[begin:end])
        rows, waiting = rows if waiting is None else pa.concat_tables([waiting, rows]), None
        if end < len(ordered):
            # No unit to come has a prompt below its own lowest, nor the next one's.
            complete = pc.less(rows["prompt_id"], lowest[ordered[end]])
            if not pc.all(complete).as_py():
                rows, waiting = rows.filter(complete), rows.filter(pc.invert(complete))
        begin = end
        if rows.num_rows:
            yield rows


def n_prompts(run: Run) -> int:
    """Different prompts in the corpus. Reads one column of every unit."""

    def read(units: Sequence[Unit]) -> pa.Table:
        with ThreadPoolExecutor(run.place.n_readers) as pool:
            return pa.concat_tables(pool.map(partial(run.unit_rows, columns=["prompt_id"]), units))

    return sum(
        pc.count_distinct(rows["prompt_id"]).as_py() for rows in whole_prompts(run.units, run.first_prompts, read)
    )
