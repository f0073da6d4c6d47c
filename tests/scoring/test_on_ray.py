"""Workers on a Ray that runs here: the same bytes whoever dies, errors told once, nobody waits for who is not there."""

from __future__ import annotations

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from corpora import prepare_small_units, rows_of, save_small_model, write_jsonl
from fake_workers import FakeScorer, refuse, score_fake

import fastcompat as fc
from fastcompat.errors import FastcompatError, Interrupted, ModelError, SetAside, UsageError
from fastcompat.scoring import on_ray
from fastcompat.scoring.on_ray import Launch, reach, resources, work_on_ray
from fastcompat.scoring.passes import all_is_scored
from fastcompat.store import forget
from fastcompat.store.parts import leave_nothing_out
from fastcompat.store.run import Run

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fastcompat[ray]'")

SECONDS = 120.0  # for what takes a few
POISON = "zweifellos"
NODE = {"Alive": True, "Resources": {"CPU": 8.0, "GPU": 2.0}}


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


def test_a_worker_is_killed_and_replaced_and_the_bytes_are_those_of_one(tmp_path, cluster, corpus, whole, monkeypatch):
    run, draw = new_run(tmp_path / "run", corpus), random.Random(7)
    dead: list[int] = []
    forgotten: list[str] = []
    monkeypatch.setattr(on_ray, "forget", lambda claims, process: forgotten.append(process) or forget(claims, process))

    def kill_one(launch: Launch) -> None:
        if not dead and len(parts(run)) > 2:
            time.sleep(draw.uniform(0, 0.3))
            dead.append(draw.choice(at_work(run)))
            os.kill(dead[0], signal.SIGKILL)

    launch = work(run, seconds=0.1, notify=kill_one)
    assert launch.n_deaths == len(dead) == 1
    assert [name.rpartition("-")[2] for name in forgotten] == [str(dead[0])]
    assert len(at_work(run)) >= 2
    assert parts(run) == whole
    assert set(commits(run).values()) == {1}


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
    assert len(at_work(run)) >= 2
    assert parts(run) == whole
    assert set(commits(run).values()) == {1}
    assert "of 2 workers wait for a machine: each asks for 1 GPU and 1 CPU" in caplog.text
    # Of a finished run nothing is left to wait for, though there is no GPU now.
    assert work(run, workers=1, device="cuda").n_deaths == 0


@pytest.mark.long
def test_a_unit_that_kills_is_set_aside(tmp_path, cluster, corpus, whole):
    run = new_run(tmp_path / "run", corpus)
    with pytest.raises(SetAside, match="3 workers have died over each of the units"):
        work(run, workers=1, poison=POISON)
    assert len(set(whole) - set(parts(run))) == 1
    assert not set(parts(run)) - set(whole)


@pytest.mark.long
def test_an_error_of_ours_is_raised_as_it_is_and_nobody_is_started_again(tmp_path, cluster, corpus):
    run, asked = new_run(tmp_path / "run", corpus), tmp_path / "asked"
    with pytest.raises(ModelError, match=r"^this model has no head$"):
        work(run, workers=1, doing=partial(refuse, asked))
    assert asked.read_text() == "once "


class DyingRay:
    """A Ray whose workers all end with one error."""

    exceptions = ray.exceptions

    def __init__(self, error: Exception) -> None:
        self._error = error
        self.started, self.killed = 0, []

    def is_initialized(self) -> bool:
        return True

    def nodes(self) -> list[dict[str, Any]]:
        return [NODE]

    def remote(self, kind: type) -> SimpleNamespace:
        return SimpleNamespace(options=lambda **options: SimpleNamespace(remote=self._start))

    def _start(self) -> SimpleNamespace:
        self.started += 1
        methods = ("begin", "work", "stop")
        return SimpleNamespace(**{name: SimpleNamespace(remote=lambda *_: object()) for name in methods})

    def wait(self, refs: list[object], **_: object) -> tuple[list[object], list[object]]:
        return refs[:1], refs[1:]

    def get(self, ref: object, timeout: float | None = None) -> None:
        raise self._error

    def kill(self, actor: object) -> None:
        self.killed.append(actor)


NO_MODULE = ray.exceptions.RayTaskError("__init__", "Traceback\nNo module named 'fastcompat'", ImportError(), "", 1, "")


@pytest.mark.parametrize(
    ("error", "message", "n_started"),
    [
        (ray.exceptions.ActorDiedError(), "5 workers have died .* died unexpectedly", 6),
        (ray.exceptions.ActorUnavailableError("no answer", None), "5 workers have died .* no answer", 6),
        (ray.exceptions.RuntimeEnvSetupError("no room"), "Ray cannot start workers: .*no room", 2),
        (ray.exceptions.ActorDiedError(NO_MODULE), "cannot work .*No module named 'fastcompat'.: each needs", 2),
    ],
)
def test_what_ends_a_launch(tmp_path, corpus, monkeypatch, error, message, n_started):
    there = DyingRay(error)
    monkeypatch.setattr(on_ray, "import_ray", lambda: there)
    monkeypatch.setattr(on_ray, "MOST_DEATHS", 2)
    with pytest.raises(FastcompatError, match=f"(?s){message}"):
        work(new_run(tmp_path / "run", corpus), workers=2)
    assert there.started == n_started
    assert len(there.killed) >= n_started - 1


class NoRay:
    """A Ray that joins nothing, and whose SIGTERM ends the process."""

    exceptions = ray.exceptions

    def is_initialized(self) -> bool:
        return False

    def init(self, **_: object) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise ConnectionError("Could not find any running Ray instance. Please")


@pytest.mark.parametrize(
    ("address", "variable", "message"),
    [
        ("auto", None, "no Ray cluster is found here .Could not find any running Ray instance. Please."),
        ("auto", "ray://head:10001", "ray://head:10001: .* by ray job submit"),
        ("ray://head:10001", None, "has to run in the cluster"),
        ("head", None, "Ray at head cannot be joined .it is not HOST:PORT"),
        ("auto", "127.0.0.1:1", "Ray at 127.0.0.1:1 cannot be joined"),
    ],
)
def test_where_there_is_no_cluster_it_is_said_at_once(monkeypatch, address, variable, message):
    monkeypatch.setattr(on_ray, "import_ray", NoRay)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(UsageError, match=message):
        reach(address)
    assert signal.getsignal(signal.SIGTERM) is handler


@pytest.mark.long
def test_a_command_on_ray_is_interrupted_and_the_library_goes_on(tmp_path, cluster, monkeypatch):
    monkeypatch.chdir(tmp_path)  # workers are elsewhere
    corpus = write_jsonl(
        Path("corpus.jsonl"), [row for name in "abcd" for row in rows_of(name, n_prompts=400, words=40)]
    )
    save_small_model(tmp_path / "model")
    (tmp_path / "own.jinja").write_text("{% for message in messages %}{{ message['content'] }}\n{% endfor %}")
    whole = fc.score(corpus, "whole", base_model="model", token_budget=64, base_settings={"template": "own.jinja"})
    command = [sys.executable, "-m", "fastcompat", "score", str(corpus), "--base-model", "model", "-o", "run"]
    command += ["--template", "own.jinja", "--token-budget", "64", "--ray", "local", "--workers", "1"]
    path = os.pathsep.join(path for path in sys.path if path)
    with subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        end = time.monotonic() + SECONDS
        while process.poll() is None and not any(tmp_path.glob("run/scores/*/part-*")) and time.monotonic() < end:
            time.sleep(0.02)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
        output, _ = process.communicate(timeout=SECONDS)
    assert process.returncode == Interrupted.exit_code, output
    assert "every response scored so far is kept" in output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    run = fc.open_run("run")
    assert {line["event"] for line in run.log.lines()} >= {"commit", "stop"}
    assert 0 < len(parts(run)) < len(parts(whole))
    run = fc.score(
        [], "run", base_model="model", base_settings={"template": "own.jinja"}, engine="ray", workers=1, device="cpu"
    )
    assert parts(run) == parts(whole)
    assert commits(run) == dict.fromkeys((unit.name for unit in run.units), 1)
    assert {line["token_budget"] for line in run.log.lines() if line["event"] == "score"} == {64}


@pytest.mark.parametrize(
    ("nodes", "device", "workers", "expected"),
    [
        ([NODE, NODE], "auto", None, (4, 1, 1)),
        ([NODE, NODE | {"Alive": False}], "auto", None, (2, 1, 1)),
        ([NODE], "cuda", 5, (5, 1, 1)),
        ([], "cuda", 3, (3, 1, 1)),
        ([NODE, NODE], "cpu", None, (2, 0, 8)),
        ([NODE, NODE], "cpu", 3, (3, 0, 4)),
        ([NODE], "cpu", 20, (20, 0, 1)),
        (
            [{"Alive": True, "Resources": {"CPU": 2.0}}, {"Alive": True, "Resources": {"CPU": 4.0}}],
            "auto",
            2,
            (2, 0, 2),
        ),
    ],
)
def test_what_a_worker_asks_for(nodes, device, workers, expected):
    n_workers, options = resources(nodes, device, workers)
    assert (n_workers, options.get("num_gpus", 0), options["num_cpus"]) == expected
    threads = {} if options.get("num_gpus") else {"OMP_NUM_THREADS": str(options["num_cpus"])}
    assert options.get("runtime_env", {}).get("env_vars", {}) == threads


@pytest.mark.parametrize(("device", "message"), [("cuda", "no GPU now: say how many"), ("auto", "no CPU now")])
def test_what_cannot_be_asked_for(device, message):
    with pytest.raises(UsageError, match=message):
        resources([], device, None)
