"""A run in chunks of whole prompts against its table in one piece: the same ranking, in memory that does not grow."""

from __future__ import annotations

import os
import shutil
import tracemalloc
from collections import Counter
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from corpora import write_jsonl
from fake_runs import part_path
from random_runs import add_race, add_random_scores, random_run

from fastcompat.corpus import partition, prepare
from fastcompat.decisions import RankingSettings, rank, rank_paired, unfinished_pairs
from fastcompat.decisions.ranking import counted
from fastcompat.decisions.ranking.counted import CountedResponses
from fastcompat.errors import RunError, UsageError
from fastcompat.rows import paired
from fastcompat.store import Run, ScorerStore, Snapshot, Unit, snapshot
from fastcompat.store.places import Disk
from fastcompat.store.preparing import add_generation

COLUMNS = ["row_key", "source", "prompt_id", "generator", "base_model", "reward_model"]
COLUMNS += ["n_tokens", "nll_sum", "loss", "reward", "status"]


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nobody kills these runs, of some hundred parts each."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def in_one_piece(run: Run, by: str = "generator", **options: Any) -> pa.Table:
    """All rows in memory, as whoever has a table of scores ranks them."""
    defaults = {"betas": (0.0, 3.0), "average": "response", "reward_shift": 0.0, "leave_out": "response"}
    settings = RankingSettings(**{**defaults, "sort_by": None, "draws": 40, "seed": 0, **options})
    return rank_paired(paired(run.scores(COLUMNS)), by, settings, unfinished_pairs(run, settings))


def assert_same(found: pa.Table, wanted: pa.Table) -> None:
    assert found.num_rows == wanted.num_rows
    assert found.column_names == wanted.column_names
    for row, other in zip(found.to_pylist(), wanted.to_pylist(), strict=True):
        close = {k: pytest.approx(x, rel=1e-11, abs=1e-13) if isinstance(x, float) else x for k, x in other.items()}
        assert row == close


def outcome(ranking: Any) -> pa.Table | str:
    try:
        return ranking()
    except UsageError as error:
        return str(error)


def compare(run: Run, monkeypatch: pytest.MonkeyPatch, *sizes: tuple[int, int], **options: Any) -> pa.Table | str:
    """sizes: rows of a chunk, bytes that are kept for the second reading."""
    wanted = outcome(lambda: in_one_piece(run, **options))
    asked = {"beta": [0.0, 3.0], "draws": 40} | options
    for chunk_rows, kept_bytes in sizes:
        monkeypatch.setattr(snapshot, "CHUNK_ROWS", chunk_rows)
        monkeypatch.setattr(counted, "KEPT_BYTES", kept_bytes)
        found = outcome(lambda: rank(run, **asked))
        if isinstance(wanted, str) or isinstance(found, str):
            assert found == wanted
        else:
            assert_same(found, wanted)
    return wanted


@pytest.mark.parametrize("seed", range(8))
def test_any_run_in_chunks_of_any_size(seed, tmp_path, monkeypatch):
    draw = np.random.default_rng(seed)
    if seed % 4 == 3:  # a run of an earlier version, whose shards each span all hashes
        by_range = partition.bucket_of
        monkeypatch.setattr(partition, "bucket_of", lambda ids, n: by_range(ids, 1 << 31) % n)
    run = random_run(tmp_path, draw, n_generations=1 + seed % 3, rewards=seed % 3 != 1)
    # Of each kind none, one or two; not all are finished, and some lack a generator.
    for kind, models in (("base_model", (seed + 1) % 3), ("reward_model", seed % 2 + (seed == 4))):
        for k in range(models):
            add_random_scores(
                run,
                draw,
                kind,
                f"{kind}-{k}",
                finished=float(draw.choice([0.6, 0.9, 1.0])),
                begun=float(draw.choice([0.0, 0.1])),
                lacking=str(draw.choice(["none", "a", "c"])),
                left_out=str(draw.choice(["none", "none", "b"])),
            )
    ranked = [
        compare(run, monkeypatch, (1, 0)),
        compare(run, monkeypatch, (int(draw.integers(2, 60)), 0), average="token", sort_by="loss"),
        compare(run, monkeypatch, (int(draw.choice([1, 9, 1 << 30])), 1 << 20), leave_out="prompt"),
        compare(run, monkeypatch, (int(draw.integers(2, 60)), 0), by="source", reward_shift=1.0),
    ]
    assert any(isinstance(table, pa.Table) and table.num_rows for table in ranked)


def test_a_figure_that_only_the_last_prompts_have(tmp_path, monkeypatch):
    """All that was summed of the losses before is dropped, and so is what was refused there."""
    run = random_run(tmp_path, np.random.default_rng(0), n_prompts=60, n_generations=1, rewards=False)
    draw, order = np.random.default_rng(1), run.units_by_prompt()
    add_random_scores(run, draw, "base_model", "m")
    rewards = add_random_scores(run, draw, "reward_model", "r")
    for unit in order[: len(order) // 2]:
        rows = rewards.read(unit)
        for name, value in (
            ("reward", pa.nulls(unit.n_rows, pa.float64())),
            ("status", pa.array(["oom"] * unit.n_rows)),
        ):
            rows = rows.set_column(rows.column_names.index(name), name, value)
        part_path(rewards, unit).unlink()
        rewards.commit(unit, rows)
    late = compare(run, monkeypatch, (1, 1 << 20), (50, 0), leave_out="prompt", average="token")
    assert isinstance(late, pa.Table)
    alone = rank(run)
    assert sum(alone["n"].to_pylist()) < 0.7 * run.n_rows
    assert alone["p_best"].null_count == 0


def test_a_generator_that_only_the_last_prompts_know(tmp_path, monkeypatch):
    """Prompts are to be answered by all: those before it came up are not."""
    run = random_run(tmp_path, np.random.default_rng(0), n_prompts=80, rewards=False)
    last = run.first_prompts()[run.units_by_prompt()[-20]]
    store = add_random_scores(run, np.random.default_rng(1), "base_model", "m")
    for unit in run.units:
        rows = store.read(unit)
        early = pc.and_(pc.equal(rows["generator"], "b"), pc.less(rows["prompt_id"], last))
        for name in ("loss", "nll_sum"):
            kept = pc.if_else(early, None, rows[name])
            rows = rows.set_column(rows.column_names.index(name), name, kept)
        part_path(store, unit).unlink()
        store.commit(unit, rows)
    whole = compare(run, monkeypatch, (1, 1 << 20), (50, 0), leave_out="prompt")
    assert isinstance(whole, pa.Table)
    assert 0 < whole["n_prompts_total"][0].as_py() < 30


def test_nothing_is_left_of_prompts_that_no_two_share(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(0), n_generations=1)
    store = add_random_scores(run, np.random.default_rng(1), "base_model", "m")
    for unit in run.units:
        rows = store.read(unit)
        even = pc.match_substring_regex(rows["prompt_id"], "[02468ace]$")
        mine = pc.xor(pc.equal(rows["generator"], "a"), even)
        kept = pc.if_else(mine, None, rows["loss"])
        part_path(store, unit).unlink()
        store.commit(unit, rows.set_column(rows.column_names.index("loss"), "loss", kept))
    told = compare(run, monkeypatch, (1, 1 << 20), (50, 0), leave_out="prompt")
    assert isinstance(told, str)
    assert "answered the fewest" in told


@pytest.mark.parametrize("by", ["generator", "source"])
def test_a_run_that_a_race_stopped(by, tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(2), n_prompts=60, rewards=False)
    draw = np.random.default_rng(3)
    add_random_scores(run, draw, "base_model", "m", finished=0.8)
    add_random_scores(run, draw, "reward_model", "r", left_out="d")
    add_race(run, "base_model-m", "reward_model-r", n_prompts=60)
    found = compare(run, monkeypatch, (1, 0), (30, 1 << 20), by=by)
    assert isinstance(found, pa.Table)
    stopped = [row["stopped_after"] for row in found.to_pylist() if row["reward_model"] == "r" and row["n"]]
    assert (max(stopped) == 40) if by == "generator" else stopped
    assert "repeated" in found["interval"].to_pylist()


def test_models_that_are_asked_for(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(4))
    for kind, model in (("base_model", "m1"), ("base_model", "m2"), ("reward_model", "r")):
        add_random_scores(run, np.random.default_rng(5), kind, model, finished=0.9)
    pairs = [("m1", "r"), ("m1", "column reward"), ("m2", "r"), ("m2", "column reward")]
    table = rank(run, draws=1)
    told = zip(table["base_model"].to_pylist(), table["reward_model"].to_pylist(), strict=True)
    assert list(dict.fromkeys(told)) == pairs
    one = rank(run, draws=1, base_model="m2", reward_model="r")
    mine = [row for row in table.to_pylist() if (row["base_model"], row["reward_model"]) == ("m2", "r")]
    assert_same(one, pa.Table.from_pylist(mine, table.schema))
    with pytest.raises(UsageError, match="--base-model m3: not in the scores; there are m1, m2"):
        rank(run, base_model="m3")
    with pytest.raises(UsageError, match="--by status: not a column of groups; there are source, generator"):
        rank(run, by="status")
    monkeypatch.setattr(counted, "MAX_GROUPS", 3)
    with pytest.raises(UsageError, match="--by generator: more than 3 different values"):
        rank(run)


def test_a_run_without_scores_has_an_empty_ranking(tmp_path):
    rows = [{"prompt": f"Question {k}?", "response": "Yes.", "generator": "a"} for k in range(3)]
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    run = add_generation(tmp_path / "run", [], lambda into, first: prepare([str(file)], into, first_shard=first))
    assert rank(run).num_rows == 0


def test_a_prompt_has_all_its_rows_in_one_chunk(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(6), n_generations=3, rewards=False)
    add_random_scores(run, np.random.default_rng(7), "base_model", "m", begun=0.2, finished=0.7)
    store = run.scorers()[0]
    there = Counter(prompt for unit in run.units if store.with_rows([unit]) for prompt in prompts_of(store, unit))
    for chunk_rows in (1, 25):
        monkeypatch.setattr(snapshot, "CHUNK_ROWS", chunk_rows)
        ((models, rows),) = Snapshot(run, [store], []).pairs()
        chunks = [chunk["prompt_id"].to_pylist() for chunk in rows]
        assert models == ("m", None)
        assert len(chunks) > 5
        assert Counter(prompt for chunk in chunks for prompt in chunk) == there
        for earlier, later in pairwise(chunks):
            assert max(earlier) < min(later)


def prompts_of(store: ScorerStore, unit: Unit) -> list[str]:
    prompts: list[str] = store.rows(unit, ["prompt_id"])["prompt_id"].to_pylist()
    return prompts


def test_others_go_on_scoring_while_a_run_is_ranked(tmp_path, monkeypatch):
    """What was there when the rows were listed is ranked, at every reading: parts and beginnings that come do not
    count."""
    run = random_run(tmp_path, np.random.default_rng(8), n_generations=1)
    draw = np.random.default_rng(9)
    store = add_random_scores(run, draw, "base_model", "m", finished=0.7, begun=0.2)
    wanted = in_one_piece(run)
    monkeypatch.setattr(snapshot, "CHUNK_ROWS", 20)
    monkeypatch.setattr(counted, "KEPT_BYTES", 0)
    read, n_read = snapshot.PairRows._read, 0

    def read_and_score(self: Any, pool: Any, units: Any) -> pa.Table:
        nonlocal n_read
        rows = read(self, pool, units)
        n_read += 1
        if n_read == 3:
            add_random_scores(run, draw, "base_model", "m")
        return rows

    monkeypatch.setattr(snapshot.PairRows, "_read", read_and_score)
    assert len(store.finished()) < len(run.units)
    assert_same(rank(run, beta=[0.0, 3.0], draws=40), wanted)
    assert len(store.finished()) == len(run.units)


def test_a_part_that_is_completed_between_two_readings_is_told(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(8), n_generations=1)
    draw = np.random.default_rng(9)
    store = add_random_scores(run, draw, "base_model", "m", left_out="b")
    chunks, seen = CountedResponses._again, 0

    def completed(self: Any, rows: pa.Table) -> Any:
        nonlocal seen
        seen += 1
        if seen == 1:
            whole = add_random_scores(run, draw, "base_model", "other")
            for unit in run.units:
                store.commit(unit, whole.read(unit), completes=True)
        return chunks(self, rows)

    monkeypatch.setattr(snapshot, "CHUNK_ROWS", 20)
    monkeypatch.setattr(counted, "KEPT_BYTES", 0)
    monkeypatch.setattr(CountedResponses, "_again", completed)
    with pytest.raises(RunError, match="completed while they were read"):
        rank(run)


def test_parts_are_read_once_and_large_runs_twice(tmp_path, monkeypatch):
    run = random_run(tmp_path, np.random.default_rng(10))
    draw = np.random.default_rng(11)
    stores = [add_random_scores(run, draw, kind, kind[0]) for kind in ("base_model", "reward_model")]
    monkeypatch.setattr(snapshot, "CHUNK_ROWS", 20)
    parts, footers = Counter[str](), Counter[str]()
    read, opened = ScorerStore.read, Disk.open

    def reading(self: ScorerStore, unit: Unit, columns: list[str]) -> pa.Table:
        parts[unit.name] += 1
        assert not {"row_key", "nll_sum", "detail"} & set(columns)
        return read(self, unit, columns)

    def opening(self: Disk, name: str, *, whole: bool = True, size: int | None = None) -> pa.NativeFile:
        # Whose footer is known has its size known.
        footers[name] += not whole and size is None
        return opened(self, name, whole=whole, size=size)

    monkeypatch.setattr(ScorerStore, "read", reading)
    monkeypatch.setattr(Disk, "open", opening)
    for kept_bytes, times in ((1 << 20, 1), (0, 2)):
        monkeypatch.setattr(counted, "KEPT_BYTES", kept_bytes)
        parts.clear()
        footers.clear()
        rank(run, reward_model="r")
        assert parts == {unit.name: times * len(stores) for unit in run.units}
        assert set((+footers).values()) == {1}


def test_a_part_without_the_rows_of_its_unit_is_told(tmp_path):
    run = random_run(tmp_path, np.random.default_rng(10))
    store = add_random_scores(run, np.random.default_rng(11), "base_model", "m")
    unit = next(unit for unit in run.units if unit.n_rows > 1)
    other = next(other for other in run.units if other.n_rows != unit.n_rows)
    shutil.copy(part_path(store, other), part_path(store, unit))
    with pytest.raises(RunError, match=f"part-{unit.name}.parquet does not hold the rows of its unit"):
        rank(run)


def peak_bytes(run: Run) -> int:
    """The most that a ranking holds at once, of NumPy's memory and of Arrow's."""
    pool, usual = pa.proxy_memory_pool(pa.default_memory_pool()), pa.default_memory_pool()
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        rank(run, draws=50)
        return int(pool.max_memory() + tracemalloc.get_traced_memory()[1])
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(usual)


def test_memory_does_not_grow_with_the_corpus(tmp_path, monkeypatch):
    monkeypatch.setattr(counted, "KEPT_BYTES", 0)
    peaks = {}
    for n_prompts in (200, 800):
        (tmp_path / str(n_prompts)).mkdir()
        draw = np.random.default_rng(0)
        run = random_run(tmp_path / str(n_prompts), draw, n_prompts=n_prompts, rewards=False, max_unit_rows=60)
        for kind, model in (("base_model", "m"), ("reward_model", "r")):
            add_random_scores(run, draw, kind, model)
        for chunk_rows in (400, 1 << 30):
            monkeypatch.setattr(snapshot, "CHUNK_ROWS", chunk_rows)
            if not peaks:
                rank(run, draws=1)  # what is made once and kept
            peaks[n_prompts, chunk_rows] = peak_bytes(run)
    assert peaks[800, 400] < 1.2 * peaks[200, 400], peaks
    assert peaks[800, 1 << 30] > 2 * peaks[200, 1 << 30], peaks
