"""A preparation as tasks on a disk that several workers share: what is done, what is left, and the doing of it.

    .preparing-<digest>/plan.json             the pieces, as whoever came first has cut the corpus
                        piece-00012/          runs of a piece's rows, and result.json beside them
                        whole-00003/          the same of a file whose stretches could not be read apart
                        hash-00003.json       SHA-256 of a file that is read in stretches
                        bucket-00007.parquet  a shard, by its bucket, and bucket-00007.json
                        claims/               who is at work on which task (claims.py)

What is there is whole and counts, whoever made it. The digest is that of the corpus and of how it is read: the same
command finds what another worker, or itself before a kill, has finished, and another corpus does not.
"""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from fastcompat.corpus import (
    PieceReader,
    PieceResult,
    Plan,
    PreparationProgress,
    RowsOnDisk,
    ShardSummary,
    check_schema,
    file_sha256,
    in_pieces,
    pieces_in_use,
)
from fastcompat.store.durable import creating, own_name, remove_tree, sync_directory
from fastcompat.store.places import Disk

_PLAN = "plan.json"
_RESULT = "result.json"
# Who has nothing to do looks again after this long, and after so many times as long as looking takes: a large
# preparation has many results.
WAIT_SECONDS = 0.2
_WAITS_A_LOOK = 20
# Bytes are hashed so many times faster than they are read.
_HASHING_SPEED = 16


class Task(NamedTuple):
    """A task by its name, and how much it is; the files that it is about, for the user."""

    name: str
    size: int
    about: str


class At(NamedTuple):
    """How far a task is: bytes and rows of it, in which file, and how that is read."""

    n_bytes: int = 0
    n_rows: int = 0
    source: str = ""
    mapping: str = ""


class Tasks:
    """The tasks of a preparation, as one worker sees them; it is `busy` while it does one, and may be interrupted.

    Raises what reading a corpus raises.
    """

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.directory = directory
        self.plan = plan
        self._pieces = {piece.name: piece for piece in [*plan.pieces, *plan.instead.values()]}
        self._of_plan = {piece.name for piece in plan.pieces}
        self._results: dict[str, PieceResult] = {}
        self._hashes: dict[int, str] = {}
        self._shards: dict[int, ShardSummary] = {}
        self._rows: RowsOnDisk | None = None
        # Of the plan's pieces that have results.
        self._bytes_read = self._rows_read = 0
        self._looking_seconds = 0.0
        self._place = random.random()
        self.busy = False

    @classmethod
    def open(cls, directory: Path, plan: Plan | None = None) -> Tasks:
        """Those in a directory; plan: of the corpus in one piece, from which they are made where nobody has."""
        path = directory / _PLAN
        if plan is not None and not path.exists():
            check_schema(plan)
            _create_json(path, in_pieces(plan).to_json())
        # Of several that cut the corpus at the same time, the first one's pieces are everybody's.
        return cls(directory, Plan.from_json(_read_json(path)))

    @property
    def rows(self) -> RowsOnDisk | None:
        """The rows, once all of them have been read."""
        return self._rows

    @property
    def shards(self) -> list[tuple[Path, ShardSummary]]:
        """Those that have been written, in their order, and where they lie."""
        return [(self.directory / f"{_bucket(k)}.parquet", self._shards[k]) for k in sorted(self._shards)]

    def is_done(self, name: str) -> bool:
        """Whether a task of this name has been done."""
        path = self.directory / name
        return (path.with_suffix(".json") if name.startswith(("hash", "bucket")) else path).exists()

    def left(self) -> list[Task]:
        """The tasks that can be done now, and have not been: none when all shards are there."""
        began = time.monotonic()
        try:
            return self._left()
        finally:
            self._looking_seconds = time.monotonic() - began

    def in_order(self, tasks: Sequence[Task]) -> list[Task]:
        """The large ones first, so that none of them comes last. Among equals each worker begins at a place of its own
        and goes round: few want the same, and neighbours, which may be of one file, stay together.
        """
        found: list[Task] = []
        for _, group in groupby(sorted(tasks, key=_size_class), key=_size_class):
            equals = list(group)
            begin = int(self._place * len(equals))
            found += equals[begin:] + equals[:begin]
        return found

    def wait(self) -> None:
        """Until it is worth to look again."""
        time.sleep(max(WAIT_SECONDS, _WAITS_A_LOOK * self._looking_seconds))

    def _left(self) -> list[Task]:
        done = set(os.listdir(self.directory))
        if self._rows is None:
            if reading := self._left_to_read(done):
                return reading
            self._rows = RowsOnDisk(self.plan, self._results, self._hashes, lambda name: self.directory / name)
        for bucket in self._rows.buckets:
            if bucket not in self._shards and f"{_bucket(bucket)}.json" in done:
                value = _read_json(self.directory / f"{_bucket(bucket)}.json")
                self._shards[bucket] = ShardSummary(**{**value, "units": tuple(value["units"])})
        return [
            Task(_bucket(bucket), self._rows.n_rows_of(bucket), f"shard {self._rows.shard_name(bucket)}")
            for bucket in self._rows.buckets
            if bucket not in self._shards
        ]

    def _left_to_read(self, done: set[str]) -> list[Task]:
        for name in self._pieces.keys() & done - self._results.keys():
            self._results[name] = PieceResult.from_json(_read_json(self.directory / name / _RESULT))
            if name in self._of_plan:
                self._bytes_read += self._pieces[name].n_bytes
                self._rows_read += self._results[name].n_rows
        in_use = pieces_in_use(self.plan, self._results)
        left = [
            Task(piece.name, piece.n_bytes, ", ".join(self.plan.labels(piece)[:4]))
            for piece in in_use
            if piece.name not in self._results
        ]
        names = {piece.name for piece in in_use}
        for index, whole in self.plan.instead.items():
            name = f"hash-{index:05d}"
            if whole.name in names or index in self._hashes:
                continue
            if f"{name}.json" in done:
                self._hashes[index] = str(_read_json(self.directory / f"{name}.json")["sha256"])
            else:
                source = self.plan.sources[index]
                left.append(Task(name, source.size // _HASHING_SPEED, source.label))
        return left

    def do(self, task: Task, note: Callable[[At], None]) -> None:
        """Do a task and commit what it gives; note: is told from time to time how far it is."""
        kind, _, number = task.name.partition("-")
        self.busy = True
        try:
            if kind == "hash":
                sha256 = file_sha256(self.plan.sources[int(number)], lambda: note(At()))
                _create_json(self.directory / f"{task.name}.json", {"sha256": sha256})
            elif kind == "bucket":
                self._write_shard(int(number), lambda: note(At()))
            else:
                self._read_piece(task.name, note)
        finally:
            self.busy = False

    def _read_piece(self, name: str, note: Callable[[At], None]) -> None:
        own = self.directory / own_name(name)
        own.mkdir()
        try:
            result = PieceReader(
                self.plan,
                self._pieces[name],
                own,
                stage_bytes=self.plan.stage_bytes,
                home=self.directory.parent,
                note=lambda *at: note(At(*at)),
            ).read()
            (own / _RESULT).write_text(json.dumps(result.to_json()), encoding="utf-8")
            for path in own.iterdir():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
            sync_directory(own)
            try:
                own.rename(self.directory / name)
            except OSError:
                # Where another worker came first, its runs are the same.
                if not self.is_done(name):
                    raise
            sync_directory(self.directory)
        finally:
            remove_tree(own)

    def _write_shard(self, bucket: int, note: Callable[[], None]) -> None:
        assert self._rows is not None
        path = self.directory / f"{_bucket(bucket)}.parquet"
        own = self.directory / own_name(path.name)
        try:
            summary = self._rows.write_shard(bucket, own, home=self.directory.parent, note=note)
            own.rename(path)
            _create_json(path.with_suffix(".json"), asdict(summary))
        finally:
            own.unlink(missing_ok=True)

    def progress(self, under_way: Mapping[str, At]) -> PreparationProgress:
        """Of all workers, as far as tasks are done, and of those whose state is given, by the tasks' names."""
        total = self.plan.n_bytes
        if self._rows is not None:
            n_rows = self._rows.n_rows
            done = sum(shard.n_rows for shard in self._shards.values())
            return PreparationProgress("writing", done, n_rows, n_rows)
        done, n_rows = self._bytes_read, self._rows_read
        last = At()
        for name, at in under_way.items():
            if name not in self._results and name in self._of_plan:
                done += at.n_bytes
                n_rows += at.n_rows
                last = at
        return PreparationProgress("reading", min(done, total), total, n_rows, last.source, last.mapping)


def _size_class(task: Task) -> int:
    return -task.size.bit_length()


def _bucket(number: int) -> str:
    return f"bucket-{number:05d}"


def _read_json(path: Path) -> dict[str, Any]:
    return Disk(path.parent).read_json(path.name)


def _create_json(path: Path, value: Mapping[str, Any]) -> None:
    # Names of files and columns may have unpaired surrogates, which only escapes can say.
    with suppress(FileExistsError), creating(path) as temporary:
        temporary.write_text(json.dumps(value), encoding="utf-8")
