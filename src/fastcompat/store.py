"""The run directory: what is to be scored, what has been scored, and how both survive a kill.

    RUN/manifest.json                      the corpus: its files, fingerprint, shards (written last, by rename)
        corpus/shard-00012.parquet         normalised rows; a row group is one unit of work
        scores/<scorer>/scorer.json        model, tokenizer, template, dtype: every setting that makes a figure
        scores/<scorer>/part-00012-0003.parquet   one unit's scores; its presence is its commit
        log.jsonl                          what was done, when

Everything is written under a temporary name, synced and renamed: a file that is there is whole. Units never share a
pack, so the parts of a killed and resumed run are those of an undisturbed one, byte for byte.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fastcompat.corpus import CorpusSummary
from fastcompat.errors import RunError
from fastcompat.response import ROW_SCHEMA

FORMAT = 1

# One scored row as it lies in a part. `nll_sum` and `loss` are null unless the status is ok or truncated.
SCORE_SCHEMA = pa.schema(
    [
        ("row_key", pa.string()),
        ("source", pa.string()),
        ("row_index", pa.int64()),
        ("response_index", pa.int32()),
        ("prompt_id", pa.string()),
        ("generator", pa.string()),
        ("n_prompt_tokens", pa.int32()),
        ("n_tokens", pa.int32()),
        ("nll_sum", pa.float64()),
        ("loss", pa.float64()),
        ("status", pa.string()),
        ("detail", pa.string()),
    ]
)
# What `Run.scores()` and `Scorer.score()` return: with whose figure it is, without what only keeps the order.
SCORES_SCHEMA = SCORE_SCHEMA.remove(SCORE_SCHEMA.get_field_index("response_index")).insert(
    SCORE_SCHEMA.get_field_index("generator"), pa.field("base_model", pa.string())
)


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class Unit:
    """One row group of one shard: what is computed and committed at once."""

    shard: int
    group: int
    n_rows: int

    @property
    def name(self) -> str:
        return f"{self.shard:05d}-{self.group:04d}"


@dataclass(frozen=True, kw_only=True)
class ScorerStore:
    """scores/<scorer>: the record of one scorer's settings, and the parts that it has finished."""

    directory: Path
    record: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.directory.name

    def part(self, unit: Unit) -> Path:
        return self.directory / f"part-{unit.name}.parquet"

    def finished(self) -> set[str]:
        """Names of the units that are committed."""
        return {path.stem.removeprefix("part-") for path in self.directory.glob("part-*.parquet")}

    def commit(self, unit: Unit, scores: pa.Table) -> None:
        """Make a unit's scores durable, then drop what was kept of its beginning."""
        assert scores.num_rows == unit.n_rows
        write_table(self.part(unit), scores)
        self._beginning(unit).unlink(missing_ok=True)

    def keep_beginning(self, unit: Unit, scores: pa.Table, *, token_budget: int, n_packs: int) -> None:
        """Keep what an interrupted unit has finished: its first `n_packs` packs under `token_budget`."""
        plan = {"token_budget": str(token_budget), "n_packs": str(n_packs)}
        write_table(self._beginning(unit), scores.replace_schema_metadata(plan))

    def beginning(self, unit: Unit, token_budget: int) -> tuple[pa.Table, int] | None:
        """What `keep_beginning` kept of a unit and how many packs that is; None if nothing, or of another budget."""
        path = self._beginning(unit)
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            plan = {key: int(table.schema.metadata[key]) for key in (b"token_budget", b"n_packs")}
        except FileNotFoundError:
            return None
        except (OSError, pa.ArrowException, TypeError, KeyError, ValueError):
            return None  # damaged: its packs are computed again, which is all that is lost
        usable = table.schema.equals(SCORE_SCHEMA) and table.num_rows == unit.n_rows
        return (table, plan[b"n_packs"]) if usable and plan[b"token_budget"] == token_budget else None

    def _beginning(self, unit: Unit) -> Path:
        return self.directory / f"begun-{unit.name}.parquet"


class Run:
    """An open run directory. `open_run` opens one; `session.prepare_run` makes one."""

    def __init__(self, directory: Path, generations: Sequence[CorpusSummary]) -> None:
        self.directory = directory
        self.generations = tuple(generations)  # the corpus as first prepared, then what --extend added

    @cached_property
    def units(self) -> list[Unit]:
        """Every unit of work, in the order in which they are computed."""
        return [
            Unit(shard=_shard_number(shard.name), group=group, n_rows=n_rows)
            for generation in self.generations
            for shard in generation.shards
            for group, n_rows in enumerate(shard.units)
        ]

    @property
    def n_rows(self) -> int:
        """Rows of the corpus, those that cannot be scored included."""
        return sum(unit.n_rows for unit in self.units)

    def shard_path(self, shard: int) -> Path:
        return self.directory / "corpus" / f"shard-{shard:05d}.parquet"

    def unit_rows(self, unit: Unit) -> pa.Table:
        """A unit's normalised rows, `response.ROW_SCHEMA`. Raises RunError where the shard is damaged."""
        path = self.shard_path(unit.shard)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read_row_group(unit.group)
        except (OSError, pa.ArrowException) as error:
            raise RunError(f"{path} is missing or damaged ({error}); prepare the corpus again in a new run") from error
        if table.num_rows != unit.n_rows or not table.schema.equals(ROW_SCHEMA):
            raise RunError(f"{path} is not the shard that manifest.json describes; prepare the corpus in a new run")
        return table

    def scorers(self) -> list[ScorerStore]:
        """Every scorer of the run, in the order in which they were first used."""
        records = self.directory.glob("scores/*/scorer.json")
        stores = [ScorerStore(directory=path.parent, record=_read_record(path)) for path in records]
        return sorted(stores, key=lambda store: (store.record["created"], store.name))

    def scorer(self, name: str, identity: Mapping[str, Any], settings: Callable[[], Mapping[str, Any]]) -> ScorerStore:
        """The scorer of this identity, to work with; one that is new is made, with `settings()` as its record."""
        directory = self.directory / "scores" / name
        path = directory / "scorer.json"
        if not path.exists():
            record = {"identity": dict(identity), "settings": dict(settings()), "created": _now()}
            try:
                directory.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise RunError(f"{directory} cannot be made ({error.strerror}); is the run writable?") from error
            write_json(path, record)
        _remove_abandoned(directory)
        store = ScorerStore(directory=directory, record=_read_record(path))
        if store.record["identity"] != dict(identity):
            raise RunError(f"{path} describes another scorer than its name says; move {directory} away")
        return store

    def labels(self) -> dict[str, str]:
        """Scorer name -> what its rows' `base_model` says: the model, or the scorer where one model has several."""
        models = {store.name: str(store.record["settings"]["model"]) for store in self.scorers()}
        alike = Counter(models.values())
        return {name: model if alike[model] == 1 else name for name, model in models.items()}

    def pending(self, scorer: ScorerStore, *, worker: int = 0, n_workers: int = 1) -> list[Unit]:
        """Units that have no part yet, of those that fall to this worker."""
        finished = scorer.finished()
        return [unit for unit in self.units[worker::n_workers] if unit.name not in finished]

    def scores(self) -> pa.Table:
        """All committed scores, one row per response and scorer (`SCORES_SCHEMA`): scorers in the order of their first
        use, rows in input order.
        """
        sources = [file.label for generation in self.generations for file in generation.files]
        tables = []
        labels = self.labels()
        for store in self.scorers():
            finished = store.finished()
            paths = [store.part(unit) for unit in self.units if unit.name in finished]
            table = pa.concat_tables([SCORE_SCHEMA.empty_table(), *(read_part(path) for path in paths)])
            order = pc.index_in(table["source"], pa.array(sources, pa.string()))
            table = table.append_column("_order", order)
            table = table.sort_by([(key, "ascending") for key in ("_order", "row_index", "response_index")])
            model = pa.repeat(pa.scalar(labels[store.name], pa.string()), table.num_rows)
            tables.append(table.append_column("base_model", model).select(SCORES_SCHEMA.names))
        return pa.concat_tables([SCORES_SCHEMA.empty_table(), *tables]).combine_chunks()

    def log(self, event: str, **values: Any) -> None:
        """Append one line to log.jsonl; a single write, so that workers do not cut each other's lines.

        A log that cannot be written stops nothing: what counts is committed elsewhere, and fails there by name.
        """
        line = json.dumps({"time": _now(), "event": event, "host": socket.gethostname(), "pid": os.getpid()} | values)
        with suppress(OSError):
            descriptor = os.open(self.directory / "log.jsonl", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            try:
                os.write(descriptor, (line + "\n").encode())
            finally:
                os.close(descriptor)


def open_run(directory: str | os.PathLike[str]) -> Run:
    """Open a run directory for reading. Raises RunError when there is none, or it is of another format."""
    path = Path(directory) / "manifest.json"
    if not path.is_file():
        raise RunError(
            f"{directory} is not a run: it has no manifest.json (fastcompat score ... -o {directory} makes one)"
        )
    manifest = _read_json(path)
    if manifest.get("format") != FORMAT:
        raise RunError(f"{path} has format {manifest.get('format')!r}; this fastcompat reads format {FORMAT}")
    try:
        run = Run(Path(directory), [CorpusSummary.from_json(generation) for generation in manifest["generations"]])
        _ = run.units  # every shard's name is read here
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(f"{path} is damaged ({error!r}); prepare the corpus in a new run") from error
    return run


def add_generation(
    directory: Path, generations: Sequence[CorpusSummary], prepare: Callable[[Path, int], CorpusSummary]
) -> Run:
    """Prepare more corpus into a run (its first, or an extension) and commit it by writing the manifest.

    `prepare(shard_directory, first_shard)` writes the shards. They come in from a directory of this process's own, so
    that a kill leaves nothing half done and two processes that prepare the same corpus do not disturb each other.
    """
    corpus = directory / "corpus"
    try:
        corpus.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(directory)
        own = directory / _own_name("preparing")
        own.mkdir()
    except OSError as error:
        raise RunError(
            f"{directory}: cannot be written ({error.strerror}); choose another directory with -o"
        ) from error
    try:
        numbers = [_shard_number(shard.name) for generation in generations for shard in generation.shards]
        summary = prepare(own, max(numbers, default=-1) + 1)
        done = [*generations, summary]
        there = open_run(directory).generations if (directory / "manifest.json").exists() else ()
        if [g.fingerprint for g in there] == [g.fingerprint for g in done]:
            return open_run(directory)  # another worker has just prepared the same
        if [g.fingerprint for g in there] != [g.fingerprint for g in generations]:
            raise RunError(f"another process changed {directory} in the meantime; give the same command again")
        for shard in summary.shards:
            (own / shard.name).rename(corpus / shard.name)
        _sync_directory(corpus)
        write_json(directory / "manifest.json", {"format": FORMAT, "generations": [g.to_json() for g in done]})
    finally:
        remove_tree(own)
    return Run(directory, done)


def write_table(path: Path, table: pa.Table) -> None:
    """Write Parquet whole or not at all; pages carry checksums."""
    with replacing(path) as temporary:
        pq.write_table(table, temporary, compression="zstd", write_page_checksum=True)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write JSON whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`, synced and renamed to it at the end. Raises RunError when the disk refuses."""
    temporary = path.parent / _own_name(path.name)
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.rename(path)
        _sync_directory(path.parent)
    except OSError as error:
        raise RunError(
            f"{path} cannot be written ({error.strerror or error}); what was committed before is safe: "
            "make room or fix the permissions, then give the same command again"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def read_part(path: Path, columns: Sequence[str] | None = None) -> pa.Table:
    """A part's scores, or some columns of them. Raises RunError where it is damaged, with what to do."""
    try:
        table = pq.read_table(path, columns=columns, page_checksum_verification=True)
    except (OSError, pa.ArrowException) as error:
        raise RunError(f"{path} is damaged ({error}); delete it and score again: only its unit is computed") from error
    expected = SCORE_SCHEMA if columns is None else pa.schema([SCORE_SCHEMA.field(name) for name in columns])
    if not table.schema.equals(expected):
        raise RunError(f"{path} has other columns than a part of format {FORMAT}; delete it and score again")
    return table


def remove_tree(directory: Path) -> None:
    """Remove a directory of files and directories, if it is there."""
    for path in sorted(directory.rglob("*"), reverse=True) if directory.is_dir() else []:
        path.rmdir() if path.is_dir() else path.unlink(missing_ok=True)
    if directory.is_dir():
        directory.rmdir()


# Containers may share a host name and a disk but not their process ids: what is younger is never taken as abandoned.
ABANDONED_SECONDS = 3600


def _own_name(name: str) -> str:
    """A temporary name of this process's own, which says whose it is."""
    return f".{name}.{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"


def _remove_abandoned(directory: Path) -> None:
    """Remove what killed processes of this host left half done; those of other hosts may still be at work."""
    pattern = re.compile(rf"\..*\.{re.escape(socket.gethostname())}-(\d+)-[0-9a-f]+")
    for path in directory.glob(".*"):
        match = pattern.fullmatch(path.name)
        with suppress(OSError):  # gone in the meantime, or not ours to remove
            if match and not _alive(int(match[1])) and time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                remove_tree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        return True
    return True


def _sync_directory(directory: Path) -> None:
    """Make renames in a directory durable, where the system can (Windows cannot, and need not)."""
    if os.name != "nt":
        descriptor = os.open(directory, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error})") from error
    if not isinstance(value, dict):
        raise RunError(f"{path} does not hold a JSON object")
    return value


def _read_record(path: Path) -> dict[str, Any]:
    record = _read_json(path)
    whole = {"identity", "settings", "created"} <= set(record) and isinstance(record["settings"], dict)
    if not whole or not {"model", "token_budget"} <= set(record["settings"]):
        raise RunError(f"{path} is damaged: it does not say which scorer this is; move {path.parent} away")
    return record


def _shard_number(name: str) -> int:
    return int(Path(name).stem.removeprefix("shard-"))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="microseconds")
