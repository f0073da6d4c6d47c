"""The threads beside the loop: in order, bounded, with the errors they meet, and of low priority."""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import closing

import pytest

from fastcompat.errors import RunError
from fastcompat.scoring.pipeline import NICENESS, SWITCH_SECONDS, Stopwatch, Writer, prefetch, sharing_processor


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_keeps_the_order_and_goes_no_further_ahead(ahead):
    started: list[int] = []

    def square(item: int) -> int:
        started.append(item)
        return item * item

    with closing(prefetch(square, range(12), ahead=ahead, waited=Stopwatch())) as results:
        for item, result in enumerate(results):
            assert result == item * item
            allowed = min(item + 1 + ahead, 12)
            deadline = time.monotonic() + 30
            while len(started) < allowed and time.monotonic() < deadline:
                time.sleep(0.001)
            time.sleep(0.005)  # time enough to go too far
            assert started == list(range(allowed))


def test_a_closed_prefetch_finishes_what_it_is_at_and_begins_nothing_more():
    begun, finished = threading.Event(), threading.Event()
    n_calls = 0

    def slow(item: int) -> int:
        nonlocal n_calls
        n_calls += 1
        if item == 1:
            begun.set()
            time.sleep(0.1)
            finished.set()
        return item

    results = prefetch(slow, range(10), ahead=3, waited=Stopwatch())
    assert next(results) == 0
    assert begun.wait(30)
    results.close()
    assert finished.is_set()
    assert n_calls == 2


def test_the_writer_holds_no_more_than_it_may_and_loses_nothing():
    written: list[int] = []
    proceed = threading.Semaphore(0)

    def write(item: int) -> None:
        assert proceed.acquire(timeout=30)
        written.append(item)

    waited = Stopwatch()
    with Writer(behind=2, waited=waited) as writer:
        writer.submit(write, 0)
        writer.submit(write, 1)
        assert written == []
        release = threading.Timer(0.1, proceed.release)
        release.start()
        writer.submit(write, 2)  # waits for the first
        release.join()
        assert written == [0]
        assert waited.seconds > 0.05
        proceed.release(2)
    assert written == [0, 1, 2]


def fails(error: Exception) -> None:
    raise error


def test_the_writer_raises_what_a_call_raised_as_itself():
    error = RunError("no room on the disk")
    written: list[int] = []

    proceed = threading.Event()

    def write_all() -> None:
        with Writer(behind=3, waited=Stopwatch()) as writer:
            writer.submit(proceed.wait, 30)
            writer.submit(fails, error)
            writer.submit(written.append, 1)
            proceed.set()

    with pytest.raises(RunError) as caught:
        write_all()
    assert caught.value is error
    assert written == [1]


def test_what_the_block_raises_goes_before_what_a_call_raised():
    written: list[int] = []

    proceed = threading.Event()

    def write_some() -> None:
        with Writer(behind=3, waited=Stopwatch()) as writer:
            writer.submit(proceed.wait, 30)
            writer.submit(fails, RunError("no room on the disk"))
            writer.submit(written.append, 1)
            proceed.set()
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_some()
    assert written == [1]


def test_check_raises_without_waiting():
    proceed = threading.Event()
    with Writer(behind=3, waited=Stopwatch()) as writer:
        writer.submit(proceed.wait, 30)
        writer.submit(fails, RunError("no room on the disk"))
        writer.check()
        proceed.set()
        with pytest.raises(RunError, match="no room"):
            writer.finish()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
def test_the_threads_give_way_and_the_caller_keeps_its_priority():
    def priority(_: object = None) -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    own = priority()
    found: list[int] = []
    with Writer(behind=1, waited=Stopwatch()) as writer:
        writer.submit(lambda: found.append(priority()))
    assert list(prefetch(priority, [0], ahead=1, waited=Stopwatch())) == found == [min(own + NICENESS, 19)]
    assert priority() == own


def test_what_the_process_shares_is_put_back(monkeypatch):
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    interval = sys.getswitchinterval()
    for with_forward_pass, inside in ((True, "false"), (False, None)):
        with sharing_processor(with_forward_pass=with_forward_pass):
            assert os.environ.get("TOKENIZERS_PARALLELISM") == inside
            assert sys.getswitchinterval() == pytest.approx(SWITCH_SECONDS)
        assert "TOKENIZERS_PARALLELISM" not in os.environ
        assert sys.getswitchinterval() == interval


def test_what_the_user_has_set_for_tokenizers_stays(monkeypatch):
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    with sharing_processor(with_forward_pass=True):
        assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"
