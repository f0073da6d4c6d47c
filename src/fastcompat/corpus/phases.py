"""The two phases of a preparation, in tasks that any process may do: pieces are read, then buckets written.

PieceReader    rows of a piece -> runs, in which they lie by bucket, and what is to be said of them
pieces_in_use  which pieces the corpus is read in, as far as those tell that have been read
RowsOnDisk     all pieces' runs -> a shard of each bucket that has rows, then the summary
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pyarrow.parquet as pq

from fastcompat.corpus.accounts import HowRead, added_up, read_as_in_one_go
from fastcompat.corpus.formats import Overrides
from fastcompat.corpus.mapping import parts_of
from fastcompat.corpus.partition import Bucket, Origins, Partition, run_name, writing
from fastcompat.corpus.pieces import Piece, Plan
from fastcompat.corpus.reading import SourceRows, opening_of
from fastcompat.corpus.rewards import NO_REWARDS
from fastcompat.corpus.sources import Source
from fastcompat.corpus.summary import CorpusSummary, FileSummary, ShardSummary
from fastcompat.corpus.units import Indices
from fastcompat.errors import CorpusError
from fastcompat.rows import ROW_SCHEMA, Message, Status, prompt_id


@dataclass(frozen=True, kw_only=True)
class PieceResult:
    """What a piece gave beside its runs.

    files: of each part, in its order; None for a stretch that cannot be read apart from what is before it. rows, chars:
    [buckets].
    """

    files: tuple[FileSummary | HowRead | None, ...]
    rows: Indices
    chars: Indices
    n_runs: int
    generators: Mapping[str, int]
    rewards: Mapping[str, int]

    @property
    def n_rows(self) -> int:
        """Rows of all buckets."""
        return int(self.rows.sum())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {
            "files": [
                {"file": asdict(file)} if isinstance(file, FileSummary) else file and {"stretch": file.to_json()}
                for file in self.files
            ],
            "rows": self.rows.tolist(),
            "chars": self.chars.tolist(),
            "n_runs": self.n_runs,
            "generators": self.generators,
            "rewards": self.rewards,
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> PieceResult:
        """The inverse of `to_json`."""
        return cls(
            files=tuple(map(_file_from_json, value["files"])),
            rows=_compact(value["rows"]),
            chars=_compact(value["chars"]),
            n_runs=value["n_runs"],
            generators=value["generators"],
            rewards=value["rewards"],
        )


def _compact(counts: Sequence[int]) -> Indices:
    # A large corpus has as many of these as pieces.
    return np.array(counts, np.min_scalar_type(max(counts)))


def _file_from_json(value: Mapping[str, Any] | None) -> FileSummary | HowRead | None:
    if value is None:
        return None
    return FileSummary.from_json(value["file"]) if "file" in value else HowRead.from_json(value["stretch"])


class PieceReader:
    """Reads a piece into runs in `directory`. home: the directory that is named where the disk refuses.

    note: is told, batch by batch, the bytes and rows of the piece that were read, the file's label and its mapping.
    has_schema: whether some file has a known schema, asked with each row until one has; it may raise SchemaError.
    """

    def __init__(
        self,
        plan: Plan,
        piece: Piece,
        directory: Path,
        *,
        stage_bytes: int,
        home: Path,
        note: Callable[[int, int, str, str], None],
        has_schema: Callable[[SourceRows, int], bool] | None = None,
    ) -> None:
        self._plan, self._piece = plan, piece
        self._partition = Partition(directory, n_buckets=plan.n_buckets, stage_bytes=stage_bytes, home=home)
        self._note = note
        self._has_schema = has_schema
        self._generators: Counter[str] = Counter()
        self._rewards: Counter[str] = Counter()

    def read(self) -> PieceResult:
        """All of it. Raises CorpusError for the first row that cannot be read, where the plan is `strict`."""
        done = 0
        files = []
        for number in self._piece.parts:
            files.append(self._read_part(number, done))
            done += self._plan.sources[self._plan.parts[number].source].size
        self._partition.finish()
        return PieceResult(
            files=tuple(files),
            rows=self._partition.rows,
            chars=self._partition.chars,
            n_runs=len(self._partition.runs),
            generators=dict(self._generators),
            rewards=dict(self._rewards),
        )

    def _read_part(self, number: int, done: int) -> FileSummary | HowRead | None:
        plan, partition = self._plan, self._partition
        index, stretch = plan.parts[number]
        source = plan.sources[index]
        rows = SourceRows(source, plan.overrides, stretch, opening_of(source, plan.overrides) if stretch else None)
        try:
            reported = -1
            last_prompt: tuple[tuple[Message, ...], str] | None = None
            last_id = ""
            for row_index, readings, position in rows:
                if self._has_schema is not None and self._has_schema(rows, index):
                    self._has_schema = None
                if position != reported:
                    reported = position
                    self._tell(rows, done + position, source)
                for response_index, (messages, generator, status, detail, rewards, tools) in enumerate(readings):
                    if plan.strict and status in (Status.INVALID, Status.UNREADABLE):
                        if stretch is None:
                            _stop(source, row_index, detail)
                        # Which record of the file it is, only reading all of it can tell.
                        return None
                    prompt = (messages[:-1], tools)
                    # Responses to one prompt often follow one another: hash it once.
                    if prompt != last_prompt:
                        last_prompt, last_id = prompt, prompt_id(*prompt)
                    generator = generator or source.generator
                    partition.add(
                        last_id,
                        number,
                        row_index,
                        response_index,
                        generator,
                        messages,
                        status,
                        detail,
                        rewards,
                        tools,
                        rows.at_line,
                    )
                    self._generators[generator] += 1
                    for name, _ in rewards:
                        self._rewards[name] += 1
            if stretch is None:
                return rows.summary()
            how = rows.how_read()
            return how if how.may_be_added else None
        finally:
            rows.close()

    def _tell(self, rows: SourceRows, position: int, source: Source) -> None:
        # Of a stretch, places are those in the file, roughly.
        n_bytes = max(0, min(position - self._piece.begin, self._piece.n_bytes))
        mapping = rows.reader.mapping.describe() if rows.reader and rows.reader.mapping else ""
        self._note(n_bytes, self._partition.n_rows, source.label, mapping)


def pieces_in_use(plan: Plan, results: Mapping[str, PieceResult]) -> list[Piece]:
    """The pieces that the corpus is read in, in its order, as far as the results that are there tell.

    They are the plan's, but a file whose stretches cannot be read apart is read whole instead of them.
    """
    in_use = {piece.name: piece for piece in plan.pieces}
    for index, stretches in plan.stretches.items():
        there = [results[piece.name].files[0] if piece.name in results else None for piece in stretches]
        found = [how if isinstance(how, HowRead) else None for how in there]
        unfit = any(how is None and piece.name in results for how, piece in zip(found, stretches, strict=True))
        if unfit or not read_as_in_one_go(found):
            first, *others = [piece.name for piece in stretches]
            in_use[first] = plan.instead[index]
            for name in others:
                del in_use[name]
    return list(in_use.values())


class RowsOnDisk:
    """The rows of a corpus all of whose pieces in use were read: runs become shards, and the results a summary.

    hashes: of each source that was read in stretches. directory_of: of a piece's runs, by its name.
    Raises CorpusError where nothing in the corpus can be scored, or not one reward is there that was asked for.
    """

    def __init__(
        self,
        plan: Plan,
        results: Mapping[str, PieceResult],
        hashes: Mapping[int, str],
        directory_of: Callable[[str], Path],
    ) -> None:
        self._plan = plan
        pieces = pieces_in_use(plan, results)
        used = [results[piece.name] for piece in pieces]
        self.files = self._files(pieces, used, hashes)
        self.generators = _added(result.generators for result in used)
        self.rewards = _added(result.rewards for result in used)
        _check_scorable(self.files)
        _check_rewards(plan.overrides, self.rewards)
        self._runs = [
            directory_of(piece.name) / run_name(number)
            for piece, result in zip(pieces, used, strict=True)
            for number in range(result.n_runs)
        ]
        rows, chars = np.zeros((2, plan.n_buckets), np.int64)
        for result in used:
            rows += result.rows
            chars += result.chars
        self.n_rows = int(rows.sum())
        self._largest = plan.unit_size.for_corpus(int(chars.sum()), self.n_rows)
        self._rows_before = np.concatenate([[0], np.cumsum(rows)])
        self._chars_before = np.concatenate([[0], np.cumsum(chars)])
        self.buckets: list[int] = np.flatnonzero(rows).tolist()

    def _files(
        self, pieces: Sequence[Piece], used: Sequence[PieceResult], hashes: Mapping[int, str]
    ) -> tuple[FileSummary, ...]:
        plan = self._plan
        files: dict[int, FileSummary] = {}
        stretches: dict[int, list[HowRead]] = {}
        n_records, n_lines = np.zeros((2, len(plan.parts)), np.int64)
        for piece, result in zip(pieces, used, strict=True):
            for number, file in zip(piece.parts, result.files, strict=True):
                index = plan.parts[number].source
                if isinstance(file, FileSummary):
                    files[index] = file
                elif file is not None:
                    before = stretches.setdefault(index, [])
                    n_records[number] = sum(how.account.n_records for how in before)
                    n_lines[number] = sum(how.account.n_lines for how in before)
                    before.append(file)
        for index, hows in stretches.items():
            files[index] = added_up(hows).summary(plan.sources[index], hashes[index])
        labels = [plan.sources[part.source].label for part in plan.parts]
        self._origins = Origins(labels, n_records, n_lines) if stretches else Origins(labels)
        return tuple(files[index] for index in range(len(plan.sources)))

    def n_rows_of(self, bucket: int) -> int:
        """Rows that its shard has."""
        return int(self._rows_before[bucket + 1] - self._rows_before[bucket])

    def shard_name(self, bucket: int) -> str:
        """The file name of a bucket's shard; only `buckets` have one."""
        return f"shard-{self._plan.first_shard + self.buckets.index(bucket):05d}.parquet"

    def write_shard(
        self, bucket: int, path: Path, *, home: Path, note: Callable[[], None] = lambda: None
    ) -> ShardSummary:
        """Write a bucket to `path`; home: the directory that is named where the disk refuses.

        note: is called after every unit.
        """
        units = []
        tables = Bucket.read(self._runs, bucket).tables(
            self._largest,
            self._origins,
            n_chars_before=int(self._chars_before[bucket]),
            n_rows_before=int(self._rows_before[bucket]),
        )
        with writing(home):
            with pq.ParquetWriter(path, ROW_SCHEMA, compression="zstd", write_page_checksum=True) as writer:
                for table in tables:
                    writer.write_table(table, row_group_size=len(table))
                    units.append(len(table))
                    note()
            sha256 = _sync_and_hash(path)
        return ShardSummary(name=self.shard_name(bucket), sha256=sha256, n_rows=sum(units), units=tuple(units))

    def summary(self, shards: Sequence[ShardSummary]) -> CorpusSummary:
        """Of the corpus, with the shards of all `buckets`."""
        return CorpusSummary(
            files=self.files,
            shards=tuple(shards),
            generators=self.generators,
            rewards=self.rewards,
            overrides=self._plan.overrides,
            left_out=self._plan.left_out,
        )


def _added(counts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(sorted(total.items()))


def _check_rewards(overrides: Overrides | None, rewards: Mapping[str, int]) -> None:
    """Raises CorpusError where the column that was asked for has not one number in the corpus."""
    asked = parts_of(overrides).get("reward")
    if asked is not None and asked != NO_REWARDS and not rewards:
        raise CorpusError(f"--reward-column {asked}: no record has a number there; leave it out to see what is found")


def _check_scorable(files: Sequence[FileSummary]) -> None:
    """Raises CorpusError, with the most frequent reasons, where not one row of all files can be scored."""
    statuses = {status for file in files for status in file.statuses}
    if Status.OK in statuses:
        return
    shown = [f"  {file.label}: {_reasons(file)}" for file in files[:8]]
    more = [f"  and {len(files) - 8:,} more files"] if len(files) > 8 else []
    what = "the corpus holds no response" if statuses <= {Status.EMPTY} else "nothing in the corpus can be scored"
    raise CorpusError("\n".join([f"{what}:", *shown, *more]))


def _reasons(file: FileSummary) -> str:
    reasons = [f"{reason} ({count:,} row{'s' if count > 1 else ''})" for reason, count in file.reasons.items()]
    return "; ".join(reasons[:3]) or file.problem


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stop(source: Source, row_index: int, detail: str) -> NoReturn:
    raise CorpusError(
        f"{source.label}, record {row_index}: {detail}. Mend it, or leave out --strict to keep it as a row."
    )
