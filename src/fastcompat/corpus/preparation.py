"""Files -> normalised rows, partitioned by prompt into Parquet shards whose row groups are the units of work.

Two phases, both in memory that does not grow with the corpus. The first streams the files' records, makes rows of
them and partitions the rows by prompt into temporary files; the second sorts one bucket at a time and writes it as a
shard. Equal prompts meet in one shard, whichever files they come from. The same inputs give the same bytes, whether one
process does it all, as here, or several do the phases' tasks.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fastcompat.corpus.formats import Overrides
from fastcompat.corpus.partition import writing
from fastcompat.corpus.phases import PieceReader, RowsOnDisk
from fastcompat.corpus.pieces import Inputs, Plan, plan_whole
from fastcompat.corpus.reading import SourceRows
from fastcompat.corpus.sources import Source, find_sources
from fastcompat.corpus.summary import CorpusSummary, ShardSummary
from fastcompat.errors import SchemaError
from fastcompat.rows import Response

_TEMPORARY = ".partition"
_SHARD_NAME = re.compile(r"shard-(\d+)\.parquet")
_STAGE_BYTES = 48 << 20


class PreparationProgress(NamedTuple):
    """How far a preparation is: `done` of `total` (bytes of the inputs while reading, rows while writing).

    `source` and `mapping` name the file being read and how ("" before its first records); `rows` counts all so far.
    """

    phase: str
    done: int
    total: int
    rows: int
    source: str = ""
    mapping: str = ""


OnProgress = Callable[[PreparationProgress], None]


def prepare(
    inputs: Inputs,
    directory: str | os.PathLike[str],
    *,
    overrides: Overrides | None = None,
    strict: bool = False,
    filesystem: Any = None,
    target_unit_chars: int = 1 << 20,
    max_unit_rows: int = 4096,
    target_shard_bytes: int = 64 << 20,
    first_shard: int = 0,
    on_progress: OnProgress | None = None,
) -> CorpusSummary:
    """Write `directory/shard-00000.parquet` ... (numbered from `first_shard`, `ROW_SCHEMA`) and say what they hold.

    A row group is a unit of work: at most about `target_unit_chars` characters of text and `max_unit_rows` rows, the
    first ones much smaller (`units.py`); a prompt's rows are split only where they alone are more.
    `target_shard_bytes` is the text of a shard, roughly.
    Shards appear by rename once all are written; those of this number or higher that a killed preparation left are
    replaced. `filesystem` is an fsspec filesystem for hf:// inputs.

    Raises CorpusError (no such input, no row that can be scored, with `strict` the first row that cannot be read),
    SchemaError (no file has a known schema), UsageError (an override of nothing), RunError (the directory cannot be
    written).
    """
    plan = plan_whole(
        inputs,
        overrides=overrides,
        strict=strict,
        filesystem=filesystem,
        target_unit_chars=target_unit_chars,
        max_unit_rows=max_unit_rows,
        target_shard_bytes=target_shard_bytes,
        first_shard=first_shard,
    )
    return prepare_whole(plan, Path(directory), on_progress=on_progress)


def prepare_whole(plan: Plan, directory: Path, *, on_progress: OnProgress | None = None) -> CorpusSummary:
    """What `prepare` does once its inputs are found: a plan in one piece, in this process."""
    report = on_progress or (lambda progress: None)
    temporary = directory / _TEMPORARY
    (piece,) = plan.pieces

    def note(n_bytes: int, n_rows: int, source: str, mapping: str) -> None:
        report(PreparationProgress("reading", n_bytes, plan.n_bytes, n_rows, source, mapping))

    def has_schema(rows: SourceRows, index: int) -> bool:
        return _has_schema(rows, plan.sources[index + 1 :], plan.overrides)

    with writing(directory):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        result = PieceReader(
            plan, piece, temporary, stage_bytes=_STAGE_BYTES, home=directory, note=note, has_schema=has_schema
        ).read()
        rows = RowsOnDisk(plan, {piece.name: result}, {}, lambda _: temporary)
        shards: list[ShardSummary] = []
        done = 0
        report(PreparationProgress("writing", 0, rows.n_rows, rows.n_rows))
        for bucket in rows.buckets:
            shards.append(rows.write_shard(bucket, temporary / rows.shard_name(bucket), home=directory))
            done += shards[-1].n_rows
            report(PreparationProgress("writing", done, rows.n_rows, rows.n_rows))
        with writing(directory):
            _move_in(shards, temporary, directory, plan.first_shard)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return rows.summary(shards)


def iter_responses(inputs: Inputs, *, overrides: Overrides | None = None, filesystem: Any = None) -> Iterator[Response]:
    """The rows of the inputs in their order, one by one, without a directory: for looking at a corpus."""
    known = False
    sources = find_sources(inputs, filesystem=filesystem)
    for number, source in enumerate(sources):
        rows = SourceRows(source, overrides)
        for row_index, readings, _ in rows:
            if not known:
                known = _has_schema(rows, sources[number + 1 :], overrides)
            for response_index, reading in enumerate(readings):
                yield reading.response(
                    generator=source.generator,
                    source=source.label,
                    row_index=row_index,
                    response_index=response_index,
                )


def check_schema(plan: Plan) -> None:
    """Raises SchemaError where no file has a known schema, so that a hopeless corpus ends before it is read."""
    for number, source in enumerate(plan.sources):
        rows = SourceRows(source, plan.overrides)
        try:
            if next(iter(rows), None) is not None and _has_schema(rows, plan.sources[number + 1 :], plan.overrides):
                return
        finally:
            rows.close()


def _has_schema(rows: SourceRows, others: Sequence[Source], overrides: Overrides | None) -> bool:
    """Whether some file has a known schema; asked at the first file's first row, so that a hopeless corpus ends soon.

    Raises the first file's SchemaError where neither it nor any other has one.
    """
    assert rows.reader is not None
    if rows.reader.mapping is not None:
        return True
    if rows.reader.error is None or not rows.n_valid:
        return False
    for source in others:
        other = SourceRows(source, overrides)
        next(iter(other), None)
        other.close()
        if other.reader is not None and other.reader.mapping is not None:
            return True
    more = f"\n({len(others)} more files have none either.)" if others else ""
    raise SchemaError(f"{rows.reader.error}{more}")


def _move_in(shards: Sequence[ShardSummary], temporary: Path, directory: Path, first_shard: int) -> None:
    for path in directory.iterdir():
        match = _SHARD_NAME.fullmatch(path.name)
        if match and int(match[1]) >= first_shard:
            path.unlink()
    for shard in shards:
        (temporary / shard.name).rename(directory / shard.name)
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
