"""Claims: one worker a unit, takeover of the dead by the watcher's own clock, units that kill set aside."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from fastcompat.store import claims as module
from fastcompat.store import durable
from fastcompat.store.claims import TRIES, Claims, forget, forget_dead
from fastcompat.store.durable import process_name
from fastcompat.store.places import Disk

UNIT = "00000-0003"


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def alive(monkeypatch) -> dict[str, bool]:
    """Nobody can see that a worker is gone, as if it were on another host."""
    state = {"gone": False}
    monkeypatch.setattr(module, "is_gone", lambda worker: state["gone"])
    return state


def worker(directory: Path, clock: Clock, *, done: tuple[str, ...] = (), lease: float = 60.0) -> Claims:
    """A worker whose heart beats when the test says so."""
    directory.mkdir(exist_ok=True)
    return Claims(Disk(directory), is_done=lambda name: name in done, lease=lease, clock=clock)


def test_one_of_many_takes_a_unit(tmp_path, clock):
    workers = [worker(tmp_path / "claims", clock) for _ in range(16)]
    names = [f"00000-{k:04d}" for k in range(40)]
    with ThreadPoolExecutor(16) as pool:
        taken = list(pool.map(lambda own: [name for name in names if own.take(name)], workers))
    counts = Counter(name for own in taken for name in own)
    assert counts == dict.fromkeys(names, 1)


def test_nobody_waits_for_a_worker_that_is_known_to_be_dead(tmp_path, clock, monkeypatch):
    names = [UNIT, "00000-0004", "00000-0005"]
    dead, other = (worker(tmp_path / "claims", clock) for _ in range(2))
    with monkeypatch.context() as patch:
        patch.setattr(durable.os, "getpid", lambda: 12345)
        elsewhere = worker(tmp_path / "claims", clock)
    assert [dead.take(names[0]), elsewhere.take(names[1]), dead.take(names[2])] == [1, 1, 1]
    assert [other.take(name) for name in names] == [0, 0, 0]
    forget(Disk(tmp_path / "claims"), durable.process_name())
    # Who looks learns it by the listing that it makes anyway; a claim of another process stays.
    assert other.set_aside() == []
    assert [other.take(name) for name in names] == [2, 0, 2]
    other.release(names[2])
    assert not [file for file in os.listdir(tmp_path / "claims") if file.startswith(names[2])]
    # That it has died counts as ever.
    for attempt in (3, 0):
        forget(Disk(tmp_path / "claims"), durable.process_name())
        other = worker(tmp_path / "claims", clock)
        other.set_aside()
        assert other.take(names[0]) == attempt
    assert other.set_aside() == [UNIT]


def test_a_live_worker_keeps_its_unit_and_a_silent_one_loses_it(tmp_path, clock):
    first, second, third = (worker(tmp_path / "claims", clock) for _ in range(3))
    assert first.take(UNIT) == 1
    for _ in range(5):
        assert second.take(UNIT) == 0
        clock.now += 40
        first.beat()
    assert second.take(UNIT) == third.take(UNIT) == 0
    clock.now += 61
    assert second.take(UNIT) == 2
    # The other one has watched as long, but somebody was first.
    assert third.take(UNIT) == 0
    first.beat()
    assert first.mine == set()
    assert second.mine == {UNIT}
    second.release(UNIT)
    assert os.listdir(tmp_path / "claims") == []


def test_who_begins_to_watch_waits_a_whole_lease(tmp_path, clock):
    first, second = (worker(tmp_path / "claims", clock) for _ in range(2))
    first.take(UNIT)
    clock.now += 1000  # whatever happened before
    assert second.take(UNIT) == 0
    clock.now += 59
    assert second.take(UNIT) == 0
    clock.now += 2
    assert second.take(UNIT) == 2


def test_a_worker_that_is_seen_to_be_gone_is_not_waited_for(tmp_path, clock, alive):
    first, second = (worker(tmp_path / "claims", clock) for _ in range(2))
    first.take(UNIT)
    assert second.take(UNIT) == 0
    alive["gone"] = True
    assert second.take(UNIT) == 2


def test_a_unit_that_kills_its_workers_is_set_aside(tmp_path, clock, alive):
    alive["gone"] = True
    attempts = [worker(tmp_path / "claims", clock).take(UNIT) for _ in range(TRIES + 2)]
    assert attempts == [*range(1, TRIES + 1), 0, 0]
    last = worker(tmp_path / "claims", clock)
    assert last.set_aside() == [UNIT]


def test_what_is_done_is_given_back_at_the_next_beat_and_the_rest_at_the_end(tmp_path, clock):
    done: list[str] = []
    with Claims(Disk(tmp_path / "claims"), is_done=lambda name: name in done, lease=1e9, clock=clock) as own:
        own.take(UNIT)
        own.take("00000-0004")
        own.beat()
        assert own.mine == {UNIT, "00000-0004"}
        done.append(UNIT)
        own.beat()
        assert own.mine == {"00000-0004"}
    assert os.listdir(tmp_path / "claims") == []


def test_the_heart_beats_by_itself(tmp_path):
    with Claims(Disk(tmp_path / "claims"), is_done=lambda name: False, lease=0.03) as own:
        own.take(UNIT)
        path = tmp_path / "claims" / f"{UNIT}.json"
        until = time.monotonic() + 60
        while json.loads(path.read_text())["beat"] < 3:
            assert time.monotonic() < until
            time.sleep(0.005)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"nonce": 1}'])
def test_a_claim_that_was_written_half_is_a_dead_workers(tmp_path, clock, text):
    own = worker(tmp_path / "claims", clock)
    (tmp_path / "claims" / f"{UNIT}.json").write_text(text)
    assert own.take(UNIT) == 0
    clock.now += 61
    assert own.take(UNIT) == 2


def test_a_disk_without_hard_links(tmp_path, clock, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    first, second = (worker(tmp_path / "claims", clock) for _ in range(2))
    assert (first.take(UNIT), second.take(UNIT)) == (1, 0)


def die_taking_over(heir: Claims, monkeypatch) -> None:
    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Disk, "put", die)
        with pytest.raises(KeyboardInterrupt):
            heir.take(UNIT)


def test_a_worker_that_dies_as_it_takes_over_leaves_the_unit_to_others(tmp_path, clock, monkeypatch):
    """Between the file that says so and the claim itself: the heir of the heir goes on."""
    first, second, third, fourth = (worker(tmp_path / "claims", clock) for _ in range(4))
    assert first.take(UNIT) == 1
    for heir in (second, third):
        assert heir.take(UNIT) == 0
        clock.now += 61
        die_taking_over(heir, monkeypatch)
    assert fourth.take(UNIT) == 0
    clock.now += 59
    assert fourth.take(UNIT) == 0
    clock.now += 2
    # Three have died over it.
    assert fourth.take(UNIT) == 0
    assert fourth.set_aside() == [UNIT]


def test_what_was_taken_over_on_the_way_is_settled_with_the_unit(tmp_path, clock, monkeypatch):
    first, second, third = (worker(tmp_path / "claims", clock) for _ in range(3))
    first.take(UNIT)
    second.take(UNIT)
    clock.now += 61
    die_taking_over(second, monkeypatch)
    third.take(UNIT)
    clock.now += 61
    assert third.take(UNIT) == 3
    first.beat()
    assert first.mine == set()
    third.beat()
    assert third.mine == {UNIT}
    third.release(UNIT)
    assert os.listdir(tmp_path / "claims") == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="Linux tells of those that nobody has waited for")
def test_who_has_ended_is_gone_though_nobody_has_waited_for_it():
    ended = subprocess.Popen([sys.executable, "-c", "pass"])
    here, _, nonce = durable.own_name("").strip(".").rsplit("-", 2)
    try:
        os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
        assert durable.is_gone(f"{here}-{ended.pid}-{nonce}")
    finally:
        ended.wait()


def test_of_hosts_that_share_a_name_one_does_not_judge_the_others_processes(monkeypatch):
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    here, process, nonce = durable.own_name("").strip(".").rsplit("-", 2)
    assert durable.is_gone(f"{here}-{gone.pid}-{nonce}")
    assert not durable.is_gone(f"{here}-{process}-{nonce}")
    elsewhere = here.rpartition("~")[0] + "~01234567"
    assert not durable.is_gone(f"{elsewhere}-{gone.pid}-{nonce}")


def test_the_dead_of_this_host_are_forgotten_and_the_living_are_not(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "is_gone", durable.is_gone)
    place = Disk(tmp_path)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead = process_name().rpartition("-")[0] + f"-{gone.pid}-0123abcd"
    for name, worker in (("one", dead), ("two", f"{process_name()}-0123abcd"), ("three", "elsewhere~0-1-0123abcd")):
        claim = {"worker": worker, "nonce": name, "beat": 0, "attempt": 3}
        place.put(f"{name}.json", json.dumps(claim).encode())
    place.put("one.taken-x", b"{}")
    place.put("four.aside.json", b"{}")
    place.put("four.taken-y", b"{}")
    place.put("five.json", b"half written")
    forget_dead(place)
    assert place.names() == {"two.json", "three.json", "five.json"}
