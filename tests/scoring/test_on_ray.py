"""Workers on a Ray that runs here: the same bytes whoever dies, errors told once, nobody waited for in vain."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from corpora import prepare_small_units, rows_of, write_jsonl
from fake_workers import FakeScorer, refuse, score_fake

from fastcompat.errors import FastcompatError, Interrupted, ModelError, SetAside
from fastcompat.scoring import on_ray
from fastcompat.scoring.on_ray import Launch, work_on_ray
from fastcompat.scoring.passes import all_is_scored
from fastcompat.store.parts import leave_nothing_out
from fastcompat.store.run import Run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastcompat[ray]'")

SECONDS = 120.0  # for what takes a few
POISON = "zweifellos"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A cluster of two cores, which this process has joined."""
    from ray.cluster_utils import Cluster

    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(path for path in sys.path if path))  # workers know fake_workers
        patch.setenv("RAY_AUTH_MODE", "disabled")  # else a token is written beneath the user's home
        there = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
        ray.init(address=there.address, log_to_driver=False, logging_level=logging.ERROR)
        yield there
        ray.shutdown()
        there.shutdown()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(on_ray, "POLL_SECONDS", 0.1)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [row for name in "abcd" for row in rows_of(name, n_prompts=60)]
    rows[100]["response"] += f" {POISON}"
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, corpus) -> dict[str, bytes]:
    run = new_run(tmp_path_factory.mktemp("whole") / "run", corpus)
    score_fake(run.location, claims=False)
    return parts(run)


def new_run(directory: Path, corpus: Path) -> Run:
    """Of some forty units."""
    return prepare_small_units(directory, corpus, target_unit_chars=1200)


def parts(run: Run) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.directory.glob("scores/*/part-*.parquet")}


def commits(run: Run) -> Counter[str]:
    return Counter(line["unit"] for line in run.log.lines() if line["event"] == "commit")


def at_work(run: Run) -> list[int]:
    """Process ids of workers that have begun to score, the first one first."""
    return list(dict.fromkeys(line["pid"] for line in run.log.lines() if line["event"] == "score"))


def work(run: Run, workers: int = 2, **options: Any) -> Launch:
    """Score with FakeModel; `notify` and `stop` are asked ten times a second."""
    launching = {name: options.pop(name) for name in ("notify", "stop") if name in options}
    device = options.pop("device", "cpu")
    doing = options.pop("doing", None) or partial(score_fake, run.location, **options)
    finished = partial(all_is_scored, run, [FakeScorer()], leave_nothing_out)
    end = time.monotonic() + SECONDS

    def stop() -> bool:
        assert time.monotonic() < end, "it takes for ever"
        return launching.get("stop", lambda: False)()

    return work_on_ray(run, doing, finished=finished, device=device, workers=workers, **launching | {"stop": stop})


def test_workers_are_killed_and_replaced_and_the_bytes_are_those_of_one(tmp_path, cluster, corpus, whole):
    run, draw = new_run(tmp_path / "run", corpus), random.Random(7)
    deaths: list[int] = []

    def disturb(launch: Launch) -> None:
        alive = [pid for pid in at_work(run) if pid not in deaths]
        if len(deaths) < 2 and len(alive) == 2 and len(parts(run)) > 3 * len(deaths):
            time.sleep(draw.uniform(0, 0.2))
            deaths.append(draw.choice(alive))
            os.kill(deaths[-1], signal.SIGKILL)

    launch = work(run, seconds=0.1, notify=disturb)
    assert launch.n_deaths == len(deaths) == 2
    assert len(at_work(run)) in (3, 4)  # the last one may have come when all was done
    assert parts(run) == whole
    assert commits(run) == dict.fromkeys((unit.name for unit in run.units), 1)


def test_a_lost_machine_is_made_up_for_and_nobody_waits_for_who_has_none(
    tmp_path, cluster, corpus, whole, monkeypatch, caplog
):
    monkeypatch.setattr(on_ray, "WAITING_SECONDS", 0.5)
    run = new_run(tmp_path / "run", corpus)
    nodes = [cluster.add_node(num_cpus=1, num_gpus=1)]

    def replace_it(launch: Launch) -> None:
        if len(nodes) == 1 and len(parts(run)) > 2:
            cluster.remove_node(nodes[0], allow_graceful=False)
            nodes.append(cluster.add_node(num_cpus=1, num_gpus=1))

    launch = work(run, workers=2, device="auto", seconds=0.1, notify=replace_it)
    cluster.remove_node(nodes.pop())
    assert launch.n_workers == 2
    assert launch.n_deaths >= 1  # who waited may have been sent to the lost machine before Ray knew
    assert len(at_work(run)) == 2
    assert parts(run) == whole
    assert commits(run) == dict.fromkeys((unit.name for unit in run.units), 1)
    assert "1 of 2 workers wait for a machine: each asks for 1 GPU and 1 CPU" in caplog.text
    # Of a finished run nothing is left to wait for, though there is no GPU now.
    assert work(run, workers=1, device="cuda").n_deaths == 0


def test_a_unit_that_kills_is_set_aside(tmp_path, cluster, corpus, whole):
    run = new_run(tmp_path / "run", corpus)
    with pytest.raises(SetAside, match="3 workers have died over each of the units"):
        work(run, workers=2, poison=POISON)
    assert len(set(whole) - set(parts(run))) == 1
    assert not set(parts(run)) - set(whole)


def test_an_error_of_ours_is_raised_as_it_is_and_nobody_is_started_again(tmp_path, cluster, corpus):
    run = new_run(tmp_path / "run", corpus)
    began = time.monotonic()
    with pytest.raises(ModelError, match=r"^this model has no head$"):
        work(run, doing=refuse)
    assert time.monotonic() - began < 30


def test_workers_that_die_at_once_end_it(tmp_path, cluster, corpus, monkeypatch):
    monkeypatch.setattr(on_ray, "MOST_DEATHS", 0)
    run = new_run(tmp_path / "run", corpus)
    with pytest.raises(FastcompatError, match="2 workers have died one after the other") as raised:
        work(run, workers=1, poison=" ")
    assert "worker process has died" in str(raised.value)


def test_who_is_told_to_stop_keeps_what_it_has(tmp_path, cluster, corpus, whole):
    run = new_run(tmp_path / "run", corpus)
    with pytest.raises(Interrupted):
        work(run, seconds=0.2, stop=lambda: len(parts(run)) > 2)
    assert len(parts(run)) < len(whole)
    assert {line["event"] for line in run.log.lines()} >= {"commit", "stop"}
    assert not list(run.directory.glob("scores/*/claims/*"))
    score_fake(run.location, claims=False)
    assert parts(run) == whole
