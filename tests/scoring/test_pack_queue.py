"""Packs queued behind each other, as on a GPU: the order of everything stays, and what one meets costs no other."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from corpora import write_corpus
from fake_model import FakeModel, sequence_of
from fake_runs import new_run, packs_of, parts, score

from fastcompat.errors import Interrupted
from fastcompat.rows.status import Status
from fastcompat.scoring.losses import ResponseScores
from fastcompat.scoring.packs import PackQueue, pack_sequences, plan_packs, score_all
from fastcompat.scoring.token_budget import PackLimit, out_of_memory

CUDA = torch.device("cuda")  # `FakeModel` computes on the CPU all the same


def drawn(n: int) -> list:
    generator = np.random.default_rng(3)
    return [sequence_of(generator.integers(90, size=int(length)), 2) for length in generator.integers(4, 30, size=n)]


class Logged(ResponseScores):
    def add(self, forest, computed):
        self.log.append(("added", forest.n_tokens))
        return super().add(forest, computed)


def logged(n: int, model: FakeModel) -> tuple[Logged, list[tuple[str, int]]]:
    """Scores, and a log of what was queued and added."""
    scores = Logged(drawn(n))
    raises, scores.log = model.raises, []

    def queued(forest):
        scores.log.append(("queued", forest.n_tokens))
        raises(forest)

    model.raises = queued
    return scores, scores.log


def assert_all_scored(scores: ResponseScores) -> None:
    want = ResponseScores(scores.sequences)
    score_all(FakeModel(), want, token_budget=64)
    np.testing.assert_array_equal(scores.nll_sum, want.nll_sum)
    assert set(scores.status) == {Status.OK}


def test_the_next_pack_is_queued_before_a_result_is_taken():
    model = FakeModel(device=CUDA)
    scores, log = logged(40, model)
    score_all(model, scores, token_budget=64)
    assert [what for what, _ in log[:5]] == ["queued", "queued", "added", "queued", "added"]
    queued, added = ([size for what, size in log if what == wanted] for wanted in ("queued", "added"))
    assert queued == added
    assert len(added) > 5
    assert_all_scored(scores)


@pytest.mark.parametrize("most", [50, 30])
def test_a_pack_that_runs_out_of_memory_when_it_is_queued_costs_no_other(most):
    def small_device(forest):
        if forest.n_tokens > most:
            raise torch.OutOfMemoryError("no room")

    model = FakeModel(small_device, device=CUDA)
    scores, _ = logged(60, model)
    score_all(model, scores, token_budget=64)
    assert max(model.sizes) > most
    assert_all_scored(scores)


def test_a_pack_that_runs_out_of_memory_when_its_result_is_fetched_is_computed_again(monkeypatch):
    from fastcompat.scoring import packs

    fetched = itertools.count()

    class Arrays(packs.Arrays):
        def numpy(self):
            if next(fetched) in (1, 2, 7):
                raise RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling cublasCreate(handle)")
            return super().numpy()

    monkeypatch.setattr(packs, "Arrays", Arrays)
    model = FakeModel(device=CUDA)
    scores, log = logged(60, model)
    score_all(model, scores, token_budget=64)
    assert sum(what == "queued" for what, _ in log) > sum(what == "added" for what, _ in log)
    assert_all_scored(scores)


@pytest.mark.parametrize("status", ["ALLOC_FAILED", "NOT_INITIALIZED"])
def test_cublas_without_memory_for_a_handle_or_a_workspace(status):
    assert out_of_memory(RuntimeError(f"CUDA error: CUBLAS_STATUS_{status} when calling `cublasCreate(handle)`"))
    assert not out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"))


def test_an_error_spares_what_is_under_way_and_ends_what_follows_itself():
    done = []

    def broken(forest):
        if len(model.sizes) == 3:
            raise ValueError("broken")

    model = FakeModel(broken, device=CUDA)
    scores = ResponseScores(drawn(40))
    planned = list(plan_packs(model, scores, pack_sequences(model, scores, token_budget=64)))

    def queue_all(then):
        with PackQueue(model, PackLimit(64)) as queue:
            for k, pack in enumerate(planned):
                queue.put(pack, scores, lambda k=k: then(k))
                queue.then(lambda k=k: done.append(f"after {k}"))

    with pytest.raises(ValueError, match="broken"):
        queue_all(done.append)
    assert done == [0, "after 0", 1, "after 1"]

    def refuse(k):
        raise KeyError("what follows a pack")

    model = FakeModel(device=CUDA)
    done.clear()
    with pytest.raises(KeyError):
        queue_all(refuse)
    assert done == []


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("corpus")
    write_corpus(directory, generators=4, n_prompts=40)
    return directory


def test_a_run_has_the_bytes_that_it_has_without(tmp_path, corpus):
    plain, plain_store = new_run(tmp_path / "plain", corpus)
    score(plain, plain_store, FakeModel())
    run, store = new_run(tmp_path / "run", corpus)
    n_packs = sum(packs_of(run, unit) for unit in run.units)
    stops = (1, 2, 3, packs_of(run, run.units[0]) + 1)
    for n in stops:
        model = FakeModel(device=CUDA)
        with pytest.raises(Interrupted):
            score(run, store, model, stop=lambda model=model, n=n: len(model.sizes) >= n)
        # What was queued is kept: at most one more than when it was asked.
        assert len(model.sizes) in (n, n + 1)
        n_packs -= len(model.sizes)
        assert len(list(store.place.directory.glob("begun-*"))) <= 1
    model = FakeModel(device=CUDA)
    score(run, store, model)
    assert len(model.sizes) == n_packs, "a pack that was kept was computed again"
    assert parts(store) == parts(plain_store)
    lines = [line["unit"] for line in run.log.lines() if line["event"] == "commit"]
    assert lines == [unit.name for unit in run.units]


def test_a_run_that_is_stopped_after_its_last_pack_says_so(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    n_packs = sum(packs_of(run, unit) for unit in run.units)
    model = FakeModel(device=CUDA)
    with pytest.raises(Interrupted):
        score(run, store, model, stop=lambda: len(model.sizes) == n_packs)
    score(run, store, FakeModel())
    plain, plain_store = new_run(tmp_path / "plain", corpus)
    score(plain, plain_store, FakeModel())
    assert parts(store) == parts(plain_store)


def test_a_run_that_is_stopped_before_a_pause_does_not_wait(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)
    model = FakeModel(device=CUDA)

    def units():
        yield run.units[0]
        yield None
        raise AssertionError("it was asked for more")

    with pytest.raises(Interrupted):
        score(run, store, model, units=units(), stop=lambda: bool(model.sizes))
    score(run, store, model, units=iter(run.units[:1]))
    assert len(parts(store)) == 1


def test_units_before_a_pause_are_committed_first(tmp_path, corpus):
    run, store = new_run(tmp_path / "run", corpus)

    def units():
        for k, unit in enumerate(run.units, start=1):
            yield unit
            yield None
            assert len(parts(store)) == k

    score(run, store, FakeModel(device=CUDA), units=units())
    assert len(parts(store)) == len(run.units)
