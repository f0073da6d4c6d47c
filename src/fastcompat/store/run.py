"""The run directory: what is to be scored, what has been scored, and how both survive a kill.

    RUN/manifest.json                      the corpus: its files, fingerprint, shards (written last, by rename)
        corpus/shard-00012.parquet         normalised rows; a row group is one unit of work
        scores/<scorer>/scorer.json        model, tokenizer, template, dtype: every setting that makes a figure
        scores/<scorer>/part-00012-0003.parquet   one unit's scores; its presence is its commit
        scores/<scorer>/begun-00012-0004.parquet  what is kept of a unit that is not finished (`beginnings.py`)
        log/<host>-<process>.jsonl         what was done, when, by each process

Everything is written under a temporary name, synced and renamed: a file that is there is whole. Units never share a
pack, so the parts of a killed and resumed run are those of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcompat.corpus import CorpusSummary
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import FIGURES, ROW_SCHEMA, SCORES_SCHEMA, as_scores, with_later_columns, with_reward
from fastcompat.store import exports
from fastcompat.store.logs import Log, now
from fastcompat.store.parts import LeaveOut, ScorerStore, Unit, labels_of, leave_nothing_out
from fastcompat.store.places import Disk, Place, place_of

FORMAT = 2
MANIFEST = "manifest.json"

# The column of the unit that a row lies in, where it is asked for.
UNIT = "_unit"


class Run:
    """An open run directory. `open_run` opens one; `preparing.prepare_run` makes one."""

    def __init__(self, place: Place, generations: Sequence[CorpusSummary]) -> None:
        self.place = place
        self.generations = tuple(generations)  # the corpus as first prepared, then what --extend added
        self._footers: dict[int, tuple[pq.FileMetaData, int]] = {}

    @property
    def location(self) -> str:
        """Where it lies, as users name it."""
        return str(self.place)

    @property
    def directory(self) -> Path:
        """Its directory. Raises RunError for a run in an object store, which has none."""
        if isinstance(self.place, Disk):
            return self.place.directory
        raise RunError(f"{self.location} is no directory of this machine")

    @cached_property
    def units(self) -> list[Unit]:
        """Every unit of work, in the order in which they are computed."""
        return [
            Unit(shard=number, group=group, n_rows=n_rows)
            for generation in self.generations
            for shard in generation.shards
            for number in [shard_number(shard.name)]  # once a shard: it may have thousands of units
            for group, n_rows in enumerate(shard.units)
        ]

    @property
    def fingerprints(self) -> list[str]:
        """What the corpus is made of now, a fingerprint a generation."""
        return [generation.fingerprint for generation in self.generations]

    @property
    def n_rows(self) -> int:
        """Rows of the corpus, those that cannot be scored included."""
        return sum(unit.n_rows for unit in self.units)

    @property
    def shards(self) -> Place:
        """Where the corpus's rows are."""
        return self.place / "corpus"

    @contextmanager
    def _opened(self, shard: int) -> Iterator[pq.ParquetFile]:
        """A shard, of which some row groups are read. Raises RunError, within the block too, for a damaged one."""
        try:
            footer, size = self._footer(shard)
            with (
                self.shards.open(shard_name(shard), whole=False, size=size) as file,
                pq.ParquetFile(file, metadata=footer, pre_buffer=True, page_checksum_verification=True) as parquet,
            ):
                yield parquet
        except (OSError, KeyError, pa.ArrowException) as error:
            raise self._damaged(shard, error) from error

    def _damaged(self, shard: int, error: Exception) -> RunError:
        path = self.shards.path(shard_name(shard))
        return RunError(f"{path} is missing or damaged ({error}); prepare the corpus again in a new run")

    def unit_rows(self, unit: Unit, columns: Sequence[str] | None = None) -> pa.Table:
        """A unit's normalised rows, `response.ROW_SCHEMA`, or some columns. Raises RunError for a damaged shard."""
        with self._opened(unit.shard) as file:
            there = set(file.schema_arrow.names)
            table = file.read_row_group(unit.group, columns=columns and [name for name in columns if name in there])
            names = columns or ROW_SCHEMA.names
            table = with_later_columns(table, names)
        expected = pa.schema([ROW_SCHEMA.field(name) for name in names])
        if table.num_rows != unit.n_rows or not table.schema.equals(expected):
            path = self.shards.path(shard_name(unit.shard))
            raise RunError(f"{path} is not the shard that manifest.json describes; prepare the corpus in a new run")
        return table

    def _footer(self, shard: int) -> tuple[pq.FileMetaData, int]:
        """A shard's footer, which may be larger than a unit, and its size in bytes: those last asked for are kept."""
        footer = self._footers.pop(shard, None)
        if footer is None:
            with self.shards.open(shard_name(shard), whole=False) as file:
                footer = pq.read_metadata(file), file.size()
        self._footers[shard] = footer
        # Units are read in their order, a few at once.
        while len(self._footers) > 2 * self.place.n_readers:
            self._footers.pop(next(iter(self._footers)), None)
        return footer

    def first_prompts(self) -> dict[Unit, str]:
        """The lowest prompt_id of every unit, from the shards' footers. Raises RunError for a damaged shard."""
        return {
            unit: first
            for generation in self.generations
            for shard in generation.shards
            for unit, first in self._first_prompts(shard_number(shard.name), shard.units)
        }

    def _first_prompts(self, shard: int, sizes: Sequence[int]) -> Iterator[tuple[Unit, str]]:
        try:
            metadata, _ = self._footer(shard)
            column = next(k for k in range(metadata.num_columns) if metadata.schema.column(k).path == "prompt_id")
        except (OSError, StopIteration, pa.ArrowException) as error:
            raise self._damaged(shard, error) from error
        for group, n_rows in enumerate(sizes):
            unit = Unit(shard=shard, group=group, n_rows=n_rows)
            statistics = (
                metadata.row_group(group).column(column).statistics if group < metadata.num_row_groups else None
            )
            if statistics is not None and statistics.has_min_max:
                yield unit, statistics.min
            else:
                yield unit, pc.min(self.unit_rows(unit, ["prompt_id"])["prompt_id"]).as_py()

    def units_by_prompt(self) -> list[Unit]:
        """Every unit of all generations by its first prompt, so that any beginning is a random sample of the prompts:
        a prompt's id is a hash. What `--extend` added lies between what was there; in runs of earlier versions, whose
        shards each span all hashes, the shards' units take turns."""
        first = self.first_prompts()
        return sorted(self.units, key=lambda unit: (first[unit], unit))

    def corpus(self, columns: Sequence[str]) -> pa.Table:
        """Some columns of every row, in the order of `units`; shards are read several at a time."""
        shards = [shard_number(shard.name) for generation in self.generations for shard in generation.shards]
        with ThreadPoolExecutor(self.place.n_readers) as pool:
            return pa.concat_tables(pool.map(partial(self._shard, columns=list(columns)), shards))

    def _shard(self, shard: int, columns: list[str]) -> pa.Table:
        with self._opened(shard) as file:
            there = [name for name in columns if name in file.schema_arrow.names]
            return with_later_columns(file.read(columns=there), columns)

    @property
    def reward_columns(self) -> dict[str, int]:
        """Rewards that came with the corpus: name -> rows that have it."""
        counts: Counter[str] = Counter()
        for generation in self.generations:
            counts.update(generation.rewards)
        return dict(counts)

    def scorers(self) -> list[ScorerStore]:
        """Every scorer of the run, in the order in which they were first used."""
        scores = self.place / "scores"
        places = [scores / name for name in scores.folders() if (scores / name).has("scorer.json")]
        stores = [ScorerStore(place=place, record=_read_record(place)) for place in places]
        return sorted(stores, key=lambda store: (store.record["created"], store.name))

    def scorer(self, name: str, identity: Mapping[str, Any], settings: Callable[[], Mapping[str, Any]]) -> ScorerStore:
        """The scorer of this identity, to work with; one that is new is made, with `settings()` as its record."""
        place = self.place / "scores" / name
        if not place.has("scorer.json"):
            record = {"identity": dict(identity), "settings": dict(settings()), "created": now()}
            place.make()
            # Of workers that start together the first one's settings are everybody's.
            place.put_new_json("scorer.json", record)
        store = ScorerStore(place=place, record=_read_record(place))
        if store.record["identity"] != dict(identity):
            path = place.path("scorer.json")
            raise RunError(f"{path} describes another scorer than its name says; move {place} away")
        store.sweep()
        return store

    def current_scorers(self) -> list[ScorerStore]:
        """Without those that another one, with more columns, has replaced: it has finished all that they have begun,
        and left out nothing that they have scored."""
        stores = self.scorers()
        begun = {store.name: store.begun() for store in stores}
        finished = {store.name: store.finished() for store in stores}

        def hides(new: ScorerStore, old: ScorerStore) -> bool:
            """Whether it has left out what the other one has scored."""
            begun_or_finished = finished[old.name] | begun[old.name]
            shared = [unit for unit in self.units if unit.name in begun_or_finished] if new.leaves_out else []
            return any(new.left_out(unit) - old.left_out(unit) for unit in shared)

        def is_replaced(old: ScorerStore) -> bool:
            return any(
                new.name != old.name
                and new.but_extras == old.but_extras
                and set(new.extras.columns) > set(old.extras.columns)
                and finished[new.name] >= finished[old.name] | begun[old.name]
                and not hides(new, old)
                for new in stores
            )

        return [store for store in stores if not is_replaced(store)]

    def labels(self, current: Sequence[ScorerStore] | None = None) -> dict[str, str]:
        """Scorer name -> what its rows say of it: the model, with the settings in which its scorers differ.

        current: what `current_scorers` gave, where it must not have changed since.
        """
        return labels_of(self.current_scorers() if current is None else current)

    def pending(
        self,
        scorer: ScorerStore,
        *,
        worker: int = 0,
        n_workers: int = 1,
        units: Sequence[Unit] | None = None,
        leave_out: LeaveOut = leave_nothing_out,
    ) -> list[Unit]:
        """Of `units` (None: all), those that fall to this worker and of which something is to be scored: they have no
        part, or one that leaves out a generator which `leave_out` does not name."""
        return scorer.pending((self.units if units is None else units)[worker::n_workers], leave_out)

    def refuse_unscored(self) -> None:
        """UsageError where there is nothing yet to decide with."""
        parts = (store.rows(unit, ["row_key"]) for store in self.scorers() for unit in store.with_rows(self.units))
        if not self.reward_columns and not any(part.num_rows for part in parts):
            raise UsageError(
                f"{self.location} has no scores yet: fastcompat score -o {self.location} --base-model ID_OR_DIR "
                "--reward-model ID_OR_DIR"
            )

    def scores(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All that is known of every response, `SCORES_SCHEMA`: one row per response and scorer, scorers in the order
        of their first use, then the corpus's own rewards (`reward_model` is "column NAME"); rows in input order. What
        base models tell beside the loss (`score --for`) comes in columns after those. Rows that are not scored yet are
        not there; those of a unit that is begun are, as far as they are kept (`ScorerStore.rows`).

        columns: only these are read, and rows come in the order of the units, the same for every scorer: several times
        as fast for who needs no order. UsageError for a column that there is not.
        """
        stores = self.current_scorers()
        schema = pa.unify_schemas([SCORES_SCHEMA, *(pa.schema(store.extras.fields) for store in stores)])
        unknown = [name for name in columns or () if name not in schema.names]
        if unknown:
            raise UsageError(f"no column {', '.join(unknown)} in these scores; there are {', '.join(schema.names)}")
        kept = schema.names if columns is None else columns
        tables = [pa.schema([schema.field(name) for name in kept]).empty_table()]
        for table in self._tables(stores, columns, in_input_order=columns is None):
            tables.append(table.select([name for name in table.column_names if name in kept]))
        # What only some scorers tell is null for the others.
        return pa.concat_tables(tables, promote_options="default").combine_chunks()

    def to_dataset(self, columns: Sequence[str] | None = None) -> Any:
        """`scores()` as a `datasets.Dataset`. Raises UsageError where datasets is not installed."""
        return exports.to_dataset(self.scores(columns))

    def to_pandas(self, columns: Sequence[str] | None = None) -> Any:
        """`scores()` as a pandas frame of Arrow's types, in which a null is no NaN. UsageError without pandas."""
        return exports.to_pandas(self.scores(columns))

    def to_polars(self, columns: Sequence[str] | None = None) -> Any:
        """`scores()` as a polars frame. UsageError without polars."""
        return exports.to_polars(self.scores(columns))

    def scores_by_unit(self, current: Sequence[ScorerStore] | None = None) -> pa.Table:
        """`scores()` without list columns, in the order of the units, with the column `UNIT`: the row's unit, as its
        index in `units`, int32.

        current: as of `labels`.
        """
        stores = self.current_scorers() if current is None else current
        schema = pa.unify_schemas([SCORES_SCHEMA, *(pa.schema(store.extras.fields) for store in stores)])
        columns = [field.name for field in schema if not pa.types.is_list(field.type)]
        empty = SCORES_SCHEMA.empty_table().append_column(UNIT, pa.array([], pa.int32()))
        return pa.concat_tables([empty, *self._tables(stores, [*columns, UNIT])], promote_options="default")

    def _tables(
        self, stores: Sequence[ScorerStore], columns: Sequence[str] | None, *, in_input_order: bool = False
    ) -> Iterator[pa.Table]:
        """The rows of each scorer, then of each reward that came along, in the columns of `as_scores`."""
        labels = self.labels(stores)
        for store in stores:
            # The key too: a table of no column would have no row.
            own = [name for name in store.schema.names if columns is None or name in (*columns, "row_key")]
            rows = self._read(partial(store.rows, columns=own), store.with_rows(self.units), columns)
            rows = pa.concat_tables([store.schema.empty_table().select(own), *rows], promote_options="default")
            yield as_scores(self._in_input_order(rows) if in_input_order else rows, store.kind, labels[store.name])
        if self.reward_columns:
            names = [name for name in ROW_SCHEMA.names if name not in ("messages", "tools")]
            read = partial(self.unit_rows, columns=names)
            rows = pa.concat_tables(self._read(read, self.units, columns))
            rows = self._in_input_order(rows) if in_input_order else rows
            for name in self.reward_columns:
                yield as_scores(with_reward(rows, name), "reward_model", f"column {name}")

    def _read(
        self, read_one: Callable[[Unit], pa.Table], units: Sequence[Unit], columns: Sequence[str] | None
    ) -> list[pa.Table]:
        """Every unit's rows, several units at a time; with the unit's index where the columns ask for it."""
        with ThreadPoolExecutor(self.place.n_readers) as pool:
            parts = list(pool.map(read_one, units))
        if UNIT not in (columns or ()):
            return parts
        index_of = {unit: index for index, unit in enumerate(self.units)}
        return [
            part.append_column(UNIT, pa.array(np.full(part.num_rows, index_of[unit]), pa.int32()))
            for unit, part in zip(units, parts, strict=True)
        ]

    def _in_input_order(self, rows: pa.Table) -> pa.Table:
        sources = [file.label for generation in self.generations for file in generation.files]
        source = pc.index_in(rows["source"], pa.array(sources, pa.string()))
        # Of the last key first; several times as fast as sorting the table.
        keys = [column.to_numpy() for column in (rows["response_index"], rows["row_index"], source)]
        return rows.combine_chunks().take(pa.array(np.lexsort(keys)))

    @cached_property
    def log(self) -> Log:
        """What was done, when, by each process."""
        return Log(self.place)


def open_run(location: str | os.PathLike[str] | Place) -> Run:
    """Open a run for reading: a directory, or s3://bucket/run, gs://, az://. Raises RunError when there is none, or it
    is of another format."""
    place = place_of(location)
    path = place.path(MANIFEST)
    try:
        manifest = place.read_json(MANIFEST)
    except RunError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            how = f"fastcompat score ... -o {place} makes one"
            raise RunError(f"{place} is not a run: it has no manifest.json ({how})") from error
        raise
    if manifest.get("format") != FORMAT:
        raise RunError(f"{path} has format {manifest.get('format')!r}; this fastcompat reads format {FORMAT}")
    try:
        run = Run(place, [CorpusSummary.from_json(generation) for generation in manifest["generations"]])
        _ = run.units  # every shard's name is read here
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); prepare the corpus in a new run") from error
    return run


def _read_record(place: Place) -> dict[str, Any]:
    record = place.read_json("scorer.json")
    whole = {"identity", "settings", "created"} <= set(record) and isinstance(record["settings"], dict)
    known = whole and isinstance(record["identity"], dict) and record["identity"].get("kind") in FIGURES
    if not known or not {"model", "token_budget"} <= set(record["settings"]):
        path = place.path("scorer.json")
        raise RunError(f"{path} is damaged: it does not say which scorer this is; move {place} away")
    return record


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.parquet"


def shard_number(name: str) -> int:
    return int(Path(name).stem.removeprefix("shard-"))
