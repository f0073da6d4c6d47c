"""The loop: what runs beside the forward pass changes nothing, what ends a run early loses nothing, no memory grows."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import prepare_small_units, rows_of, save_small_model, write_corpus, write_jsonl
from fake_model import FakeModel, fake_tokenizer, sum_alone
from fake_runs import new_run, packs_of, part_path, parts, rows_of_unit, score

from fastcompat.errors import Interrupted, RunError
from fastcompat.scoring.engine import Progress, score_run
from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.passes import Pass, Worker, open_scorer, score_corpus
from fastcompat.scoring.pipeline import THREAD_NAME
from fastcompat.store.parts import ScorerStore
from fastcompat.store.run import Run


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=40)
    return directory


@pytest.fixture
def whole(tmp_path, corpus) -> dict[str, bytes]:
    """The parts of a run that nothing overlapped or disturbed."""
    run, store = new_run(tmp_path / "whole", corpus)
    score(run, store, FakeModel(), ahead=0)
    return parts(store)


def log_of(run: Run) -> list[dict]:
    return run.log.lines()


def committed(run: Run) -> list[str]:
    return [line["unit"] for line in log_of(run) if line["event"] == "commit"]


def assert_nothing_is_left_over(store: ScorerStore, *, begun: int = 0) -> None:
    """No thread, no temporary file, no more beginnings than those."""
    assert not [thread.name for thread in threading.enumerate() if thread.name.startswith(THREAD_NAME)]
    assert not list(store.place.directory.glob(".*"))
    assert len(list(store.place.directory.glob("begun-*"))) == begun


# --- overlap


@pytest.mark.parametrize("ahead", [1, 2])
def test_overlap_changes_no_byte_no_order_and_no_count(tmp_path, corpus, ahead):
    run, store = new_run(tmp_path / "run", corpus)
    plain, plain_store = new_run(tmp_path / "plain", corpus)
    model, plain_model = FakeModel(), FakeModel()
    progress, plain_progress = score(run, store, model, ahead=ahead), score(plain, plain_store, plain_model, ahead=0)
    assert parts(store) == parts(plain_store)
    assert committed(run) == committed(plain) == [unit.name for unit in run.units]
    assert model.sizes == plain_model.sizes
    assert len(model.sizes) > 2 * len(run.units)
    for name in ("n_rows", "n_tokens", "n_unshared_tokens", "n_rows_skipped"):
        assert getattr(progress, name) == getattr(plain_progress, name)
    assert_nothing_is_left_over(store)


def test_every_row_has_the_sum_that_it_has_alone(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    score(run, store, FakeModel())
    rows = [row for unit in run.units for row in rows_of_unit(run, unit)]
    wanted = {row.row_key: sum_alone(sequence) for row, sequence in zip(rows, fake_tokenizer(rows), strict=True)}
    scores = run.scores()
    assert dict(zip(scores["row_key"].to_pylist(), scores["nll_sum"].to_pylist(), strict=True)) == pytest.approx(wanted)


def test_overlap_changes_no_byte_of_a_real_models_run(tmp_path, corpus):
    scorer = Scorer(str(save_small_model(tmp_path / "model")), token_budget=256)
    found = []
    for ahead in (0, 1):
        run = prepare_small_units(tmp_path / f"run-{ahead}", corpus, target_unit_chars=2000)
        store, budget = open_scorer(run, scorer, token_budget=None)
        score_run(
            run,
            [store],
            scorer.model,
            scorer.begin,
            token_budget=budget,
            units=run.pending(store),
            progress=Progress(),
            ahead=ahead,
        )
        assert run.scores()["nll_sum"].null_count == 0
        found.append(parts(store))
    assert len(found[0]) > 3
    assert found[0] == found[1]


def test_units_are_prepared_and_written_by_a_thread_each(tmp_path, corpus, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus)
    seen: dict[str, set[int]] = {"prepare": set(), "write": set(), "notify": set()}
    commit = ScorerStore.commit

    def seen_commit(*arguments, **options):
        seen["write"].add(threading.get_ident())
        return commit(*arguments, **options)

    def seen_tokenizer(rows):
        seen["prepare"].add(threading.get_ident())
        return fake_tokenizer(rows)

    monkeypatch.setattr(ScorerStore, "commit", seen_commit)
    progress = Progress(notify=lambda progress: seen["notify"].add(threading.get_ident()))
    score(run, store, FakeModel(), seen_tokenizer, progress=progress)
    own = threading.get_ident()
    assert seen["notify"] == {own}
    assert len(seen["prepare"]) == len(seen["write"]) == 1
    assert len(seen["prepare"] | seen["write"] | {own}) == 3


def test_a_unit_that_another_process_finishes_is_not_computed(tmp_path, corpus, whole):
    run, store = new_run(tmp_path / "run", corpus)
    second, third = run.units[1:3]
    first_keys = [rows_of_unit(run, unit)[0].row_key for unit in run.units]
    prepared: list[str] = []
    second_is_prepared = threading.Event()

    def tokenizer(rows):
        prepared.append(rows[0].row_key)
        if rows[0].row_key == first_keys[1]:
            second_is_prepared.set()
        return fake_tokenizer(rows)

    def others_finish_two(forest):
        if len(model.sizes) == 1:
            assert second_is_prepared.wait(30)
            for unit in (second, third):
                part_path(store, unit).write_bytes(whole[part_path(store, unit).name])

    model = FakeModel(others_finish_two)
    progress = score(run, store, model, tokenizer)
    assert first_keys[1] in prepared
    assert first_keys[2] not in prepared
    assert committed(run) == [unit.name for unit in run.units if unit not in (second, third)]
    assert len(model.sizes) == sum(packs_of(run, unit) for unit in run.units if unit not in (second, third))
    assert progress.n_rows_skipped == second.n_rows + third.n_rows
    assert progress.n_rows == run.n_rows - progress.n_rows_skipped
    assert parts(store) == whole
    assert_nothing_is_left_over(store)


# --- what ends a run early


def commit_slowly(monkeypatch) -> None:
    commit = ScorerStore.commit

    def slow(*arguments, **options):
        time.sleep(0.2)
        return commit(*arguments, **options)

    monkeypatch.setattr(ScorerStore, "commit", slow)


@pytest.mark.parametrize("ahead", [0, 1, 2])
def test_a_preparation_that_fails_ends_the_run_when_its_turn_comes(tmp_path, corpus, whole, ahead):
    run, store = new_run(tmp_path / "run", corpus)
    error = RunError("a shard is damaged")
    bad = rows_of_unit(run, run.units[3])[0].row_key

    def tokenizer(rows):
        if rows[0].row_key == bad:
            raise error
        return fake_tokenizer(rows)

    with pytest.raises(RunError) as caught:
        score(run, store, FakeModel(), tokenizer, ahead=ahead)
    assert caught.value is error
    assert committed(run) == [unit.name for unit in run.units[:3]]
    assert_nothing_is_left_over(store)
    score(run, store, FakeModel(), ahead=ahead)
    assert parts(store) == whole


def test_a_write_that_fails_ends_the_run_within_a_pack_or_two(tmp_path, corpus, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus, target_unit_chars=96_000)
    assert packs_of(run, run.units[1]) > 8
    error = RunError("no room on the disk")
    failed = threading.Event()
    n_packs_later = 0

    def full_disk(*_, **__):
        failed.set()
        raise error

    def slow(forest):
        nonlocal n_packs_later
        n_packs_later += failed.is_set()
        time.sleep(0.05)

    monkeypatch.setattr(ScorerStore, "commit", full_disk)
    with pytest.raises(RunError) as caught:
        score(run, store, FakeModel(slow))
    assert caught.value is error
    assert n_packs_later <= 4
    assert not parts(store)
    assert_nothing_is_left_over(store)
    monkeypatch.undo()
    score(run, store, FakeModel())
    assert run.scores()["nll_sum"].null_count == 0


@pytest.mark.parametrize("error", [RuntimeError("a kernel failed"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_the_forward_pass_raises_comes_through_and_finished_units_are_kept(
    tmp_path, corpus, whole, monkeypatch, error, ahead
):
    run, store = new_run(tmp_path / "run", corpus)
    n_packs = packs_of(run, run.units[0]) + packs_of(run, run.units[1])

    def raises_in_the_third_unit(forest):
        if len(model.sizes) > n_packs:
            raise error

    commit_slowly(monkeypatch)
    model = FakeModel(raises_in_the_third_unit)
    with pytest.raises(type(error)) as caught:
        score(run, store, model, ahead=ahead)
    assert caught.value is error
    assert committed(run) == [unit.name for unit in run.units[:2]]
    assert_nothing_is_left_over(store)
    monkeypatch.undo()
    score(run, store, FakeModel())
    assert parts(store) == whole


@pytest.mark.parametrize("ahead", [0, 1])
def test_an_interruption_keeps_the_pack_at_hand_and_what_is_still_being_written(
    tmp_path, corpus, whole, monkeypatch, ahead
):
    run, store = new_run(tmp_path / "run", corpus)
    commit_slowly(monkeypatch)
    stops = (1, 1, 2, 5, 9)
    for n_packs in stops:
        model = FakeModel()
        with pytest.raises(Interrupted, match="everything finished is kept"):
            score(run, store, model, stop=lambda model=model, n=n_packs: len(model.sizes) >= n, ahead=ahead)
        assert len(model.sizes) == n_packs
        assert {f"part-{name}.parquet" for name in committed(run)} == set(parts(store))
        assert_nothing_is_left_over(store, begun=1)
    monkeypatch.undo()
    model = FakeModel()
    score(run, store, model, ahead=ahead)
    assert parts(store) == whole
    assert_nothing_is_left_over(store)
    n_packs = sum(packs_of(run, unit) for unit in run.units)
    assert len(model.sizes) == n_packs - sum(stops), "a pack that was kept was computed again"


def test_an_interruption_whose_work_cannot_be_kept_says_so(tmp_path, corpus, monkeypatch):
    run, store = new_run(tmp_path / "run", corpus)

    def full_disk(*_, **__):
        raise RunError("no room on the disk")

    monkeypatch.setattr(ScorerStore, "keep_beginning", full_disk)
    with pytest.raises(RunError, match="no room"):
        score(run, store, FakeModel(), stop=lambda: True)
    assert_nothing_is_left_over(store)


def test_packs_are_counted_as_planned_when_memory_runs_out_which_is_announced_once(tmp_path, corpus, whole, caplog):
    run, store = new_run(tmp_path / "run", corpus)

    def small_device(forest):
        if len(forest.sequences) > 1:
            raise torch.OutOfMemoryError("no room")

    n_planned = 7
    asked = itertools.count(1)  # after every pack as planned, and after every unit
    n_packs = np.cumsum([packs_of(run, unit) for unit in run.units])
    n_units = int(np.searchsorted(n_packs, n_planned))
    with caplog.at_level(logging.WARNING, logger="fastcompat"), pytest.raises(Interrupted):
        score(run, store, FakeModel(small_device), stop=lambda: next(asked) == n_planned + n_units)
    (record,) = caplog.records
    assert "memory ran out on a pack of" in record.getMessage()
    assert "smaller" in record.getMessage()
    # A machine that has the memory goes on where the pack at hand ended.
    model = FakeModel()
    score(run, store, model)
    assert len(model.sizes) == sum(packs_of(run, unit) for unit in run.units) - n_planned
    assert parts(store) == whole


# --- what a run leaves in its log, and in memory


def test_the_log_says_where_the_time_went(tmp_path, corpus):
    scorer = Scorer(str(save_small_model(tmp_path / "model")), token_budget=256)
    run = prepare_small_units(tmp_path / "run", corpus, target_unit_chars=2000)
    score_corpus(run, Pass(base=scorer), token_budget=None, worker=Worker(), progress=Progress())
    (seconds,) = (line["seconds"] for line in log_of(run) if line["event"] == "stop")
    total = seconds.pop("total")
    assert set(seconds) == {"forward", "waiting_for_units", "waiting_for_writes"}
    assert min(seconds.values()) > 0  # it waits for the first unit and for the last commit at least
    assert sum(seconds.values()) <= total


MEMORY = """
import sys
import numpy as np
import torch
from fastcompat.scoring.engine import Progress
from fastcompat.scoring.losses import Scorer
from fastcompat.scoring.passes import Pass, Worker, score_corpus
from fastcompat.store import open_run
torch.set_num_threads(1)
def peak():
    # Not ru_maxrss: that of the process which started this one is its lower bound.
    (line,) = (line for line in open("/proc/self/status") if line.startswith("VmHWM"))
    return int(line.split()[1]) >> 10
scorer = Scorer(sys.argv[1], token_budget=1024)
for directory in sys.argv[2:]:
    run = open_run(directory)
    progress = Progress()
    score_corpus(run, Pass(base=scorer), token_budget=None, worker=Worker(), progress=progress)
    print(progress.n_unshared_tokens, peak())
ballast = np.ones(8 << 20)
print(0, peak())
"""


@pytest.mark.long
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_run_of_a_million_tokens_takes_no_more_memory_than_a_short_one(tmp_path):
    tiny = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1)
    model = save_small_model(tmp_path / "model", **tiny)
    directories = []
    # In units of some 4,000 tokens. If a run kept all its packs, that would be 24 MiB; all sequences 21, all rows 16.
    for name, n_prompts, unit_chars in (("short", 250, 20_000), ("long", 4500, 20_000), ("large", 3500, 1 << 20)):
        rows = [row for k in range(4) for row in rows_of(f"generator-{k}", n_prompts=n_prompts, words=60)]
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        directories.append(tmp_path / name)
        prepare_small_units(directories[-1], corpus, target_unit_chars=unit_chars)
    command = [sys.executable, "-c", MEMORY, str(model), *map(str, directories)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    tokens, peaks = np.array([line.split() for line in result.stdout.splitlines()], int).T
    assert 40_000 < tokens[0] < 80_000
    assert tokens[1] > 1_000_000
    short, long, large, with_ballast = peaks
    assert long - short <= 10  # MiB
    assert large - short <= 150  # units as `fastcompat score` makes them: of 250,000 tokens, three at a time
    assert with_ballast - large > 32  # of 64: the peak does move where memory is allocated
