"""Workers that claim units: together they compute each once, whoever dies, and none waits for ever."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from corpora import write_corpus
from fake_model import FakeModel, fake_tokenizer
from fake_runs import BUDGET, new_run, parts
from fake_runs import score as score_alone

from fastcompat.errors import RunError
from fastcompat.scoring import claimed_units
from fastcompat.scoring.claimed_units import ClaimedUnits
from fastcompat.scoring.engine import Progress, score_run
from fastcompat.scoring.losses import ResponseScores
from fastcompat.store.claims import TRIES, Claims
from fastcompat.store.parts import ScorerStore, Unit, leave_nothing_out
from fastcompat.store.places import Disk
from fastcompat.store.run import Run, open_run

SECONDS = 60.0  # for what takes a second or two


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(Disk, "patience", 0.02)
    interval = sys.getswitchinterval()
    yield
    # Workers are processes; as threads of one they put back what others have set.
    sys.setswitchinterval(interval)
    os.environ.pop("TOKENIZERS_PARALLELISM", None)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=60)
    return directory


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> dict[str, bytes]:
    run, store = new_run(tmp_path_factory.mktemp("whole") / "run", corpus)
    score_alone(run, store, FakeModel())
    return parts(store)


class Worker(threading.Thread):
    """Claims units of a run and scores them, with a heart of its own."""

    def __init__(self, directory: Path, model: FakeModel, *, lease: float = 30.0, stop=lambda: False) -> None:
        super().__init__(daemon=True)
        self._run = open_run(directory)
        (self.store,) = self._run.scorers()
        self.progress = Progress(n_rows_total=self._run.n_rows)
        self._model, self._lease, self._stopping = model, lease, stop
        self.error: BaseException | None = None

    def run(self) -> None:
        by_name = {unit.name: unit for unit in self._run.units}

        def pending(units: list[Unit]) -> set[Unit]:
            return set(self.store.pending(units, leave_nothing_out))

        def seen(units: list[Unit]) -> None:
            self.progress.n_rows_skipped += sum(unit.n_rows for unit in units)

        try:
            with Claims(self.store.claims, is_done=lambda n: not pending([by_name[n]]), lease=self._lease) as claims:
                source = ClaimedUnits(
                    units=self._run.units, claims=claims, pending=pending, seen=seen, stop=self._stopping
                )
                score_run(
                    self._run,
                    [self.store],
                    self._model,
                    lambda rows: ResponseScores(fake_tokenizer(rows)),
                    token_budget=BUDGET,
                    units=source,
                    progress=self.progress,
                )
        except BaseException as error:
            self.error = error


def work(workers: list[Worker]) -> None:
    for own in workers:
        own.start()
    until = time.monotonic() + SECONDS
    for own in workers:
        own.join(max(0.0, until - time.monotonic()))
        assert not own.is_alive(), "a worker waits for ever"


def commits(run: Run) -> Counter[str]:
    return Counter(line["unit"] for line in run.log.lines() if line["event"] == "commit")


def test_workers_share_a_run_and_nothing_is_computed_twice(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    workers = [Worker(run.directory, FakeModel()) for _ in range(6)]
    work(workers)
    assert [own.error for own in workers] == [None] * 6
    assert parts(store) == whole
    assert commits(run) == dict.fromkeys((unit.name for unit in run.units), 1)
    assert not [line for line in run.log.lines() if line["event"] == "lost"]
    assert sum(own.progress.n_rows for own in workers) == run.n_rows
    for own in workers:
        assert own.progress.n_rows + own.progress.n_rows_skipped == run.n_rows
    assert list(store.claims.directory.iterdir()) == []


def test_small_runs_end_again_and_again(tmp_path, corpus):
    """Two that wait for what the other one holds would hang."""
    for k in range(8):
        run, store = new_run(tmp_path / f"{k}", corpus, target_unit_chars=4000)
        work([Worker(run.directory, FakeModel()) for _ in range(2 + k % 4)])
        assert len(store.finished()) == len(run.units)


def abandoned(store: ScorerStore, unit: Unit) -> None:
    """A worker claims a unit and is never heard of again."""
    store.claims.directory.mkdir(exist_ok=True)
    assert Claims(store.claims, is_done=lambda name: False).take(unit.name)


def test_what_the_dead_had_claimed_is_taken_over(tmp_path, corpus, whole, monkeypatch):
    monkeypatch.setattr("fastcompat.store.claims.is_gone", lambda worker: False)
    run, store = new_run(tmp_path / "run", corpus)
    for unit in run.units[::3]:
        abandoned(store, unit)
    work([Worker(run.directory, FakeModel(), lease=0.5) for _ in range(3)])
    assert parts(store) == whole
    assert list(store.claims.directory.iterdir()) == []


def test_one_that_is_slow_is_left_behind_by_the_others(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    slow = Worker(run.directory, FakeModel(raises=lambda forest: time.sleep(0.05)))
    quick_ones = [Worker(run.directory, FakeModel()) for _ in range(2)]
    work([slow, *quick_ones])
    assert parts(store) == whole
    assert slow.progress.n_rows < run.n_rows / 3


def test_an_error_gives_the_claims_back(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)

    def fail(forest: object) -> None:
        raise RuntimeError("a kernel failed")

    broken = Worker(run.directory, FakeModel(raises=fail))
    work([broken])
    assert isinstance(broken.error, RuntimeError)
    assert list(store.claims.directory.iterdir()) == []
    work([Worker(run.directory, FakeModel())])
    assert parts(store) == whole


def test_a_unit_that_kills_is_left_and_the_others_are_scored(tmp_path, corpus, whole, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus)
    poison = run.units[4]
    monkeypatch.setattr("fastcompat.store.claims.is_gone", lambda worker: True)
    for _ in range(TRIES):
        abandoned(store, poison)
    monkeypatch.setattr("fastcompat.store.claims.is_gone", lambda worker: False)
    work([Worker(run.directory, FakeModel(), lease=0.2) for _ in range(2)])
    assert set(whole) - set(parts(store)) == {f"part-{poison.name}.parquet"}
    assert Claims(store.claims, is_done=lambda name: False).set_aside() == [poison.name]


@pytest.mark.parametrize("which", [0, -1])
def test_a_part_that_cannot_be_written_ends_the_worker(tmp_path, corpus, monkeypatch, which):
    """Also where it was the last one, while the worker only waits to see it there."""
    run, store = new_run(tmp_path / "run", corpus)
    monkeypatch.setattr(claimed_units.random, "randrange", lambda n: 0)
    commit = ScorerStore.commit

    def refuse(self: ScorerStore, unit: Unit, *arguments: object, **options: bool) -> bool:
        if unit == run.units[which]:
            raise RunError("no room on the disk")
        return commit(self, unit, *arguments, **options)

    monkeypatch.setattr(ScorerStore, "commit", refuse)
    worker = Worker(run.directory, FakeModel())
    work([worker])
    assert isinstance(worker.error, RunError)
    assert list(store.claims.directory.iterdir()) == []
