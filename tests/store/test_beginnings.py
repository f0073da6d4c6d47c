"""Units that are not finished: their rows count as soon as they are kept, once, and whatever else may lie there."""

from __future__ import annotations

import itertools
import logging
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from corpora import prepare_small_units, write_corpus, write_jsonl
from fake_model import FakeModel, fake_tokenizer
from fake_runs import BUDGET, new_run, packs_of, part_path, parts, rows_of_unit, score

from fastcompat.errors import Interrupted
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.scoring import engine
from fastcompat.store.parts import ScorerStore
from fastcompat.store.run import UNIT, Run
from fastcompat.store.verification import find_damage, pending_rows, scorer_progress
from fastcompat.tokens.conversations import TokenSequence


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=40)
    return directory


def score_packs(run: Run, store: ScorerStore, n_packs: int, tokenizer=fake_tokenizer) -> None:
    """One session that is interrupted after so many packs."""
    model = FakeModel()
    with pytest.raises(Interrupted):
        score(run, store, model, tokenizer, stop=lambda: len(model.sizes) >= n_packs)


def large_units(directory: Path, corpus: Path) -> tuple[Run, ScorerStore]:
    """One or two units a shard, of many packs; the first packs are those of the first unit."""
    run, store = new_run(directory, corpus, target_unit_chars=1 << 20)
    assert packs_of(run, run.units[0]) > 12
    return run, store


def by_key(table: pa.Table) -> dict[str, dict]:
    rows = table.to_pylist()
    found = {row["row_key"]: row for row in rows}
    assert len(found) == len(rows), "a row is there twice"
    return found


# --- what is read of them


def test_after_every_pack_the_rows_scored_so_far_are_there_once_as_they_will_be(tmp_path, corpus):
    whole, whole_store = new_run(tmp_path / "whole", corpus)
    score(whole, whole_store, FakeModel())
    final = by_key(whole.scores())
    run, store = new_run(tmp_path / "run", corpus)
    assert run.scores().num_rows == 0
    n_packs, counts = sum(packs_of(run, unit) for unit in run.units), [0]
    for _ in range(n_packs):
        score_packs(run, store, 1)
        found = by_key(run.scores())
        assert all(row == final[key] for key, row in found.items())
        assert by_key(run.scores(["row_key", "loss"])) == {
            key: {"row_key": key, "loss": row["loss"]} for key, row in found.items()
        }
        progress = scorer_progress(run, store)
        assert progress.n_rows == len(found) == sum(progress.statuses.values())
        finished = sum(unit.n_rows for unit in run.units if part_path(store, unit).exists())
        assert progress.n_begun_rows == len(found) - finished
        assert progress.n_begun_units == len(store.begun()) <= 1
        assert pending_rows(run, store).n_rows == run.n_rows - len(found)
        counts.append(len(found))
    assert counts == sorted(counts)
    # The last pack of the last unit was kept, and only its commit is missing.
    assert counts[-1] == run.n_rows
    assert len(set(counts)) > n_packs / 2
    score(run, store, FakeModel())
    assert parts(store) == parts(whole_store)
    assert run.scores().equals(whole.scores())


def test_rows_that_cannot_be_scored_are_there_with_the_first_pack_of_their_unit(tmp_path, corpus):
    def tokenizer(rows: list[Response]) -> list[TokenSequence]:
        nothing = np.zeros(0, np.int32)
        empty = TokenSequence(input_ids=nothing, scored=nothing.astype(bool), status=Status.EMPTY, detail="blank")
        return [empty if k % 5 == 3 else sequence for k, sequence in enumerate(fake_tokenizer(rows))]

    run, store = large_units(tmp_path / "run", corpus)
    score_packs(run, store, 2, tokenizer)
    progress = scorer_progress(run, store)
    unit = run.units[0]
    assert progress.statuses["empty"] == len(range(3, unit.n_rows, 5))
    assert 0 < progress.statuses["ok"] < unit.n_rows - progress.statuses["empty"]


def test_most_prompts_that_are_begun_are_finished(tmp_path, corpus):
    run, store = large_units(tmp_path / "run", corpus)
    n_rows = {row.prompt_id: 4 for unit in run.units for row in rows_of_unit(run, unit)}
    for _ in range(12):
        score_packs(run, store, 1)
        counts = run.scores()["prompt_id"].value_counts().to_pylist()
        split = [count["values"] for count in counts if count["counts"] < n_rows[count["values"]]]
        # Packs are neighbours in the order of the sequences: only one prompt can go on in the next.
        assert len(split) <= 1
        assert pending_rows(run, store).n_split_prompts == len(split)


def test_the_report_reads_them_with_their_unit(tmp_path, corpus):
    run, store = large_units(tmp_path / "run", corpus)
    score_packs(run, store, 3)
    table = run.scores_by_unit()
    assert set(table["row_key"].to_pylist()) == set(run.scores()["row_key"].to_pylist())
    assert set(table[UNIT].to_pylist()) == {0}


def test_whoever_reads_while_they_are_replaced_sees_whole_rows_and_ever_more_of_them(tmp_path, corpus, monkeypatch):
    whole, whole_store = new_run(tmp_path / "whole", corpus)
    score(whole, whole_store, FakeModel())
    final = by_key(whole.scores())
    run, store = new_run(tmp_path / "run", corpus)
    monkeypatch.setattr(engine, "KEEP_SECONDS", -1.0)  # after every pack
    counts: list[int] = []
    failures: list[BaseException] = []
    ended = threading.Event()

    def read() -> None:
        try:
            while not ended.is_set():
                found = by_key(run.scores())
                assert all(row == final[key] for key, row in found.items())
                counts.append(len(found))
        except BaseException as failure:  # for the test's own thread
            failures.append(failure)

    reader = threading.Thread(target=read)
    reader.start()
    try:
        score(run, store, FakeModel(lambda forest: threading.Event().wait(0.01)))
    finally:
        ended.set()
        reader.join()
    assert not failures, failures
    assert counts == sorted(counts)
    assert len(set(counts)) > 5
    assert parts(store) == parts(whole_store)


def test_a_part_wins_over_the_beginning_beside_it_which_goes_with_the_next_session(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    score_packs(run, store, 1)
    (begun,) = store.place.directory.glob("begun-*")
    content = begun.read_bytes()
    score(run, store, FakeModel())
    begun.write_bytes(content)  # as a process leaves it that was killed between the two, or came too late
    assert by_key(run.scores()).keys() == {row.row_key for unit in run.units for row in rows_of_unit(run, unit)}
    progress = scorer_progress(run, store)
    assert (progress.n_rows, progress.n_begun_rows, progress.n_begun_units) == (run.n_rows, 0, 0)
    assert pending_rows(run, store).n_rows == 0
    assert find_damage(run) == []
    run.scorer("fake", {"kind": "base_model"}, dict)
    assert not begun.exists()


# --- what cannot be used


def without_scorer(path: Path) -> None:
    table = pq.read_table(path)
    metadata = {key: value for key, value in table.schema.metadata.items() if key != b"scorer"}
    pq.write_table(table.replace_schema_metadata(metadata), path)


def with_metadata(path: Path, **values: str) -> None:
    table = pq.read_table(path)
    there = {key.decode(): value for key, value in table.schema.metadata.items()}
    pq.write_table(table.replace_schema_metadata(there | values), path)


def flipped(path: Path) -> None:
    """One bit of the figures, which every reader reads."""
    group = pq.read_metadata(path).row_group(0)
    (figures,) = (column for k in range(group.num_columns) if (column := group.column(k)).path_in_schema == "nll_sum")
    data = bytearray(path.read_bytes())
    begin = figures.dictionary_page_offset or figures.data_page_offset
    data[begin + figures.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


UNUSABLE = {
    "garbage": (lambda path: path.write_bytes(b"garbage"), "damaged"),
    "nothing": (lambda path: path.write_bytes(b""), "damaged"),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-20]), "damaged"),
    "flipped": (flipped, "damaged"),
    "older": (without_scorer, "another version"),
    "no number": (lambda path: with_metadata(path, n_packs="many"), "another version"),
    "another scorer's": (lambda path: with_metadata(path, scorer="other"), "another scorer's"),
    "fewer rows": (lambda path: pq.write_table(pq.read_table(path).slice(1), path), "other rows"),
    "fewer columns": (lambda path: pq.write_table(pq.read_table(path).drop(["detail"]), path), "other rows or columns"),
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_one_that_cannot_be_used_is_told_and_left_out_and_its_unit_scored_again(tmp_path, corpus, kind, caplog):
    whole, whole_store = new_run(tmp_path / "whole", corpus)
    score(whole, whole_store, FakeModel())
    run, store = new_run(tmp_path / "run", corpus)
    score_packs(run, store, sum(packs_of(run, unit) for unit in run.units[:3]) + 1)
    finished = [row.row_key for unit in run.units[:3] for row in rows_of_unit(run, unit)]
    (begun,) = store.place.directory.glob("begun-*")
    assert find_damage(run) == []
    assert run.scores().num_rows > len(finished)
    damage, why = UNUSABLE[kind]
    damage(begun)
    with caplog.at_level(logging.WARNING, logger="fastcompat"):
        assert sorted(run.scores()["row_key"].to_pylist()) == sorted(finished)
    (record,) = caplog.records
    assert begun.name in record.getMessage()
    assert why in record.getMessage()
    assert scorer_progress(run, store).n_rows == len(finished)
    assert pending_rows(run, store).n_rows == run.n_rows - len(finished)
    (line,) = find_damage(run)
    assert begun.name in line
    model = FakeModel()
    score(run, store, model)
    assert len(model.sizes) == sum(packs_of(run, unit) for unit in run.units[3:])
    assert parts(store) == parts(whole_store)
    assert not begun.exists()


def test_other_packs_are_not_taken_up_but_their_rows_count(tmp_path, corpus):
    """Another token budget, or packs that another version cut elsewhere: the figures are the same."""
    whole, whole_store = large_units(tmp_path / "whole", corpus)
    score(whole, whole_store, FakeModel())
    for k, change in enumerate([{"token_budget": "128"}, {"n_stores": "2"}, {"n_packs": "9"}]):
        run, store = large_units(tmp_path / f"run-{k}", corpus)
        score_packs(run, store, 4)
        rows = run.scores()
        (begun,) = store.place.directory.glob("begun-*")
        with_metadata(begun, **change)
        assert run.scores().equals(rows)
        assert find_damage(run) == []
        model = FakeModel()
        score(run, store, model)
        assert len(model.sizes) == sum(packs_of(run, unit) for unit in run.units)
        assert parts(store) == parts(whole_store)


def test_verify_tells_a_beginning_of_other_rows_and_of_no_unit(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    score_packs(run, store, 1)
    (begun,) = store.place.directory.glob("begun-*")
    alone = begun.with_name("begun-00099-0000.parquet")
    alone.write_bytes(begun.read_bytes())
    assert find_damage(run) == [f"{alone} belongs to no unit of this run"]
    alone.unlink()
    table = pq.read_table(begun)

    def with_column(name: str, values: pa.ChunkedArray) -> None:
        pq.write_table(table.set_column(table.column_names.index(name), name, values), begun)

    with_column("row_key", table["row_key"].take(pa.array(range(len(table)))[::-1]))
    (line,) = find_damage(run)
    assert "does not hold the rows of its unit" in line
    with_column("status", pc.replace_substring(table["status"], "ok", "oom"))
    (line,) = find_damage(run)
    assert "without its status" in line


def test_two_workers_each_have_one(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    for worker in (0, 1):
        units = run.pending(store, worker=worker, n_workers=2)
        model = FakeModel()
        with pytest.raises(Interrupted):
            score(run, store, model, units=units, stop=lambda model=model: len(model.sizes) >= 1)
    progress = scorer_progress(run, store)
    assert progress.n_begun_units == 2
    assert progress.n_rows == progress.n_begun_rows == run.scores().num_rows > 2


def test_a_scorer_with_more_columns_hides_no_row_that_only_the_other_has_begun(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    richer = {"kind": "base_model", "extras": ["entropy_sum"]}
    run.scorer("richer", richer, lambda: {"model": "fake", "token_budget": BUDGET})
    assert [own.name for own in run.current_scorers()] == ["richer"]
    score_packs(run, store, 1)
    assert run.scores().num_rows > 0


def test_a_unit_whose_packs_are_all_done_is_not_finished_before_it_is_committed(tmp_path):
    corpus = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "p", "response": "a list", "generator": "g"}])
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=1000)
    store = run.scorer("fake", {"kind": "base_model"}, lambda: {"model": "fake", "token_budget": BUDGET})
    asked = itertools.count()
    with pytest.raises(Interrupted):
        score(run, store, FakeModel(), stop=lambda: next(asked) == 0)
    assert run.scores().num_rows == 1
    assert not store.finished()
    progress = scorer_progress(run, store)
    assert (progress.n_rows, progress.n_begun_rows, progress.n_begun_units) == (1, 1, 1)
