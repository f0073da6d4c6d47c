"""The order of the prompts' hashes, in which any beginning of a run is a random sample of its prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from corpora import prepare_small_units, rows_of, write_jsonl

from fastcompat.corpus import partition, prepare
from fastcompat.errors import RunError
from fastcompat.store.preparing import add_generation
from fastcompat.store.run import Run, shard_name
from fastcompat.store.snapshot import n_prompts


def extended(directory: Path, *, n_prompts: int = 300, n_more: int = 350) -> Run:
    """A run of several shards, and what was added to it: another generator, with more prompts."""
    first = write_jsonl(directory / "a.jsonl", rows_of("a", n_prompts=n_prompts) + rows_of("b", n_prompts=n_prompts))
    run = prepare_small_units(directory / "run", first, target_unit_chars=2000)
    second = write_jsonl(directory / "c.jsonl", rows_of("c", n_prompts=n_more))

    def more(shards: Path, number: int):
        return prepare([str(second)], shards, target_unit_chars=2000, target_shard_bytes=20_000, first_shard=number)

    return add_generation(run.directory, run.generations, more)


def prompts(run: Run, generation: int) -> list[list[str]]:
    """The ids of every unit of a generation, in the units' order."""
    shards = {int(shard.name[6:11]) for shard in run.generations[generation].shards}
    units = [unit for unit in run.units if unit.shard in shards]
    return [run.unit_rows(unit, ["prompt_id"])["prompt_id"].to_pylist() for unit in units]


def test_within_a_generation_ids_ascend_over_all_shards(tmp_path):
    run = extended(tmp_path)
    for generation in (0, 1):
        assert len(run.generations[generation].shards) > 2
        ids = [prompt for unit in prompts(run, generation) for prompt in unit]
        assert ids == sorted(ids)
    assert n_prompts(run) == len({prompt for k in (0, 1) for unit in prompts(run, k) for prompt in unit}) == 350


def test_every_unit_has_its_first_prompt_and_the_generations_are_merged_by_it(tmp_path):
    run = extended(tmp_path)
    first = run.first_prompts()
    assert list(first) == run.units
    assert list(first.values()) == [min(unit) for k in (0, 1) for unit in prompts(run, k)]
    order = run.units_by_prompt()
    assert sorted(order) == sorted(run.units)
    assert [first[unit] for unit in order] == sorted(first.values())
    last = max(unit.shard for unit in run.units)
    # What was added does not come last.
    assert np.mean([unit.shard <= last // 2 for unit in order[: len(order) // 2]]) < 0.8


def test_a_run_of_an_earlier_version_is_ordered_too(tmp_path, monkeypatch):
    by_range = partition.bucket_of
    monkeypatch.setattr(partition, "bucket_of", lambda ids, n: by_range(ids, 1 << 31) % n)
    run = extended(tmp_path)
    ids = [prompt for unit in prompts(run, 0) for prompt in unit]
    assert ids != sorted(ids)
    first = run.first_prompts()
    order = run.units_by_prompt()
    assert [first[unit] for unit in order] == sorted(first.values())
    assert n_prompts(run) == 350


def test_without_statistics_the_column_is_read(tmp_path):
    run = extended(tmp_path)
    first = run.first_prompts()
    for unit in {unit.shard: unit for unit in run.units}.values():
        path = run.directory / "corpus" / shard_name(unit.shard)
        own = [run.unit_rows(other) for other in run.units if other.shard == unit.shard]
        with pq.ParquetWriter(path, own[0].schema, write_statistics=False) as writer:
            for table in own:
                writer.write_table(table)
    assert run.first_prompts() == first


def test_a_shard_that_is_damaged_is_named(tmp_path):
    run = extended(tmp_path, n_prompts=40, n_more=10)
    path = run.directory / "corpus" / shard_name(0)
    path.write_bytes(b"garbage")
    for ask in (run.first_prompts, lambda: n_prompts(run)):
        with pytest.raises(RunError, match=r"shard-00000.parquet is missing or damaged"):
            ask()


def test_buckets_are_ranges_of_equal_size():
    ids = pa.chunked_array([[f"{k << 24:08x}{'0' * 24}" for k in range(256)]])
    assert np.bincount(partition.bucket_of(ids, 16)).tolist() == [16] * 16
    assert pc.min(ids).as_py() == "0" * 32
