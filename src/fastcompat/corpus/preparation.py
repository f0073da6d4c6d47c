"""Files -> normalised rows, partitioned by prompt into Parquet shards whose row groups are the units of work.

Two passes, both in memory that does not grow with the corpus. The first streams the files' records, makes rows of
them and partitions the rows by prompt into temporary files; the second sorts one bucket at a time and writes it as a
shard. Equal prompts meet in one shard, whichever files they come from. The same inputs give the same bytes.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import pyarrow.parquet as pq

from fastcompat.corpus.formats import Overrides
from fastcompat.corpus.mapping import parts_of
from fastcompat.corpus.partition import Partition, writing
from fastcompat.corpus.reading import SourceRows
from fastcompat.corpus.rewards import NO_REWARDS
from fastcompat.corpus.sources import Source, find_inputs, find_sources
from fastcompat.corpus.summary import CorpusSummary, FileSummary, ShardSummary
from fastcompat.corpus.units import UnitSize
from fastcompat.errors import CorpusError, SchemaError
from fastcompat.rows import ROW_SCHEMA, Message, Response, Status, prompt_id

Inputs = str | os.PathLike[str] | Iterable[str | os.PathLike[str]]

_TEMPORARY = ".partition"
_SHARD_NAME = re.compile(r"shard-(\d+)\.parquet")
_MAX_BUCKETS = 1024
_STAGE_BYTES = 48 << 20
# Text against bytes on disk, roughly; it only decides the number of buckets.
_EXPANSION = {".gz": 4, ".zst": 4, ".zstd": 4, ".parquet": 3, ".pq": 3}


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
    sources, left_out = find_inputs(inputs, filesystem=filesystem)
    directory = Path(directory)
    temporary = directory / _TEMPORARY
    report = on_progress or (lambda progress: None)
    with writing(directory):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    try:
        n_buckets = _number_of_buckets(sources, target_shard_bytes)
        partition = Partition(temporary, n_buckets=n_buckets, stage_bytes=_STAGE_BYTES)
        files, generators, rewards = _read(sources, partition, overrides, strict, report)
        _check_scorable(files)
        _check_rewards(overrides, rewards)
        labels = [source.label for source in sources]
        partition.finish()
        shards = _write_shards(partition, labels, first_shard, UnitSize(target_unit_chars, max_unit_rows), report)
        with writing(directory):
            _move_in(shards, temporary, directory, first_shard)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return CorpusSummary(
        files=tuple(files),
        shards=tuple(shards),
        generators=generators,
        rewards=rewards,
        overrides=dict(overrides or {}),
        left_out=left_out,
    )


def iter_responses(inputs: Inputs, *, overrides: Overrides | None = None, filesystem: Any = None) -> Iterator[Response]:
    """The rows of the inputs in their order, one by one, without a directory: for looking at a corpus."""
    known = False
    sources = find_sources(inputs, filesystem=filesystem)
    for number, source in enumerate(sources):
        rows = SourceRows(source, overrides)
        for row_index, readings, _ in rows:
            if not known:
                known = _check_schema(rows, sources[number + 1 :], overrides)
            for response_index, reading in enumerate(readings):
                yield reading.response(
                    generator=source.generator,
                    source=source.label,
                    row_index=row_index,
                    response_index=response_index,
                )


def _read(
    sources: list[Source], partition: Partition, overrides: Overrides | None, strict: bool, report: OnProgress
) -> tuple[list[FileSummary], dict[str, int], dict[str, int]]:
    files: list[FileSummary] = []
    generators: Counter[str] = Counter()
    reward_names: Counter[str] = Counter()
    known = False
    total = sum(source.size for source in sources)
    done = 0
    for number, source in enumerate(sources):
        rows = SourceRows(source, overrides)
        reported = -1
        last_prompt: tuple[tuple[Message, ...], str] | None = None
        last_id = ""
        for row_index, readings, position in rows:
            if not known:
                known = _check_schema(rows, sources[number + 1 :], overrides)
            if position != reported:
                reported = position
                mapping = rows.reader.mapping.describe() if rows.reader and rows.reader.mapping else ""
                report(PreparationProgress("reading", done + position, total, partition.n_rows, source.label, mapping))
            for response_index, (messages, generator, status, detail, rewards, tools) in enumerate(readings):
                if strict and status in (Status.INVALID, Status.UNREADABLE):
                    _stop(source, row_index, detail)
                prompt = (messages[:-1], tools)
                # Responses to one prompt often follow one another: hash it once.
                if prompt != last_prompt:
                    last_prompt, last_id = prompt, prompt_id(*prompt)
                generator = generator or source.generator
                partition.add(
                    last_id, number, row_index, response_index, generator, messages, status, detail, rewards, tools
                )
                generators[generator] += 1
                for name, _ in rewards:
                    reward_names[name] += 1
        done += source.size
        files.append(rows.summary())
        rows.close()
    return files, dict(sorted(generators.items())), dict(sorted(reward_names.items()))


def _check_schema(rows: SourceRows, others: list[Source], overrides: Overrides | None) -> bool:
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


def _check_rewards(overrides: Overrides | None, rewards: Mapping[str, int]) -> None:
    """Raises CorpusError where the column that was asked for has not one number in the corpus."""
    asked = parts_of(overrides).get("reward")
    if asked is not None and asked != NO_REWARDS and not rewards:
        raise CorpusError(f"--reward-column {asked}: no record has a number there; leave it out to see what is found")


def _check_scorable(files: list[FileSummary]) -> None:
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


def _stop(source: Source, row_index: int, detail: str) -> NoReturn:
    raise CorpusError(
        f"{source.label}, record {row_index}: {detail}. Mend it, or leave out --strict to keep it as a row."
    )


def _number_of_buckets(sources: list[Source], target_shard_bytes: int) -> int:
    text = 0
    for source in sources:
        suffix = os.path.splitext(source.label)[1].lower()
        text += source.size * _EXPANSION.get(suffix, 1)
    return min(_MAX_BUCKETS, max(1, -(-text // target_shard_bytes)))


def _write_shards(
    partition: Partition,
    labels: list[str],
    first_shard: int,
    unit_size: UnitSize,
    report: OnProgress,
) -> list[ShardSummary]:
    shards: list[ShardSummary] = []
    largest = unit_size.for_corpus(partition.n_chars, partition.n_rows)
    done = n_chars = 0
    report(PreparationProgress("writing", 0, partition.n_rows, partition.n_rows))
    for number in range(partition.n_buckets):
        bucket = partition.bucket(number)
        if bucket.n_rows == 0:
            continue
        name = f"shard-{first_shard + len(shards):05d}.parquet"
        path = partition.directory / name
        units = []
        with (
            writing(partition.directory.parent),
            pq.ParquetWriter(path, ROW_SCHEMA, compression="zstd", write_page_checksum=True) as writer,
        ):
            for rows in bucket.units(largest, n_chars_before=n_chars, n_rows_before=done):
                writer.write_table(bucket.gather(rows, labels), row_group_size=len(rows))
                units.append(len(rows))
        with writing(partition.directory.parent):
            sha256 = _sync_and_hash(path)
        done += bucket.n_rows
        n_chars += bucket.n_chars
        report(PreparationProgress("writing", done, partition.n_rows, partition.n_rows))
        shards.append(ShardSummary(name=name, sha256=sha256, n_rows=bucket.n_rows, units=tuple(units)))
    return shards


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()


def _move_in(shards: list[ShardSummary], temporary: Path, directory: Path, first_shard: int) -> None:
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
