"""Several processes of one machine: the same bytes, a dead one replaced, an error told once."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import typer
import warm_processes
from command_line import fail, succeed
from corpora import rows_of, save_small_model, write_jsonl

import fastcompat as fc
from fastcompat.cli import processes
from fastcompat.cli.application import app
from fastcompat.errors import FastcompatError, UsageError
from fastcompat.store import preparing


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    rows = [row for name in "abcd" for row in rows_of(name, n_prompts=400, words=40)]
    return write_jsonl(tmp_path_factory.mktemp("corpus") / "corpus.jsonl", rows)


def parts(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in run.glob("scores/*/part-*.parquet")}


def test_two_processes_give_the_bytes_of_one_though_one_of_them_is_killed(tmp_path, monkeypatch, model, corpus):
    whole, shared = tmp_path / "whole", tmp_path / "shared"
    options = ("--base-model", model, "--token-budget", 256)
    succeed("score", corpus, *options, "-o", whole)
    started: list[Any] = []

    def watched(*arguments: Any, **settings: Any) -> Any:
        started.append(warm_processes.popen(*arguments, **settings))
        return started[-1]

    def kill_the_first_when_there_is_something() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until and not list(shared.glob("scores/*/part-*")):
            time.sleep(0.01)
        started[0].kill()

    monkeypatch.setattr(processes.subprocess, "Popen", watched)
    killer = threading.Thread(target=kill_the_first_when_there_is_something)
    killer.start()
    output = succeed("score", corpus, *options, "--processes", 2, "-o", shared)
    killer.join()
    assert "1,600 figures in" in output
    assert parts(shared) == parts(whole)
    run = fc.open_run(shared)
    commits = [line["unit"] for line in run.log.lines() if line["event"] == "commit"]
    assert len(set(commits)) == len(commits)
    # Who is killed between a part and its line in the log leaves no line.
    unsaid = {unit.name for unit in run.units} - set(commits)
    assert len(unsaid) <= 1
    assert len({line["pid"] for line in run.log.lines()}) >= 2
    budgets = {line["token_budget"] for line in run.log.lines() if line["event"] == "score"}
    assert budgets == {256}
    if started[0].returncode == -9:  # else it was done before it was killed
        assert len(started) == 3
        assert "1 processes died" in output


def test_an_error_of_a_child_is_told_and_nobody_is_started_again(tmp_path, monkeypatch, model, corpus):
    wrong = ["--base-model", "nowhere", "-o", str(tmp_path / "r")]
    monkeypatch.setattr(processes, "arguments_of", lambda context: wrong)
    message = fail(FastcompatError, "score", corpus, "--base-model", model, "--processes", 2, "-o", tmp_path / "r")
    assert "exit code 4" in message
    assert "nowhere" in message


def test_children_get_the_options_that_were_given(tmp_path):
    command = typer.main.get_command(app).commands["score"]  # type: ignore[attr-defined]
    arguments = [str(tmp_path), "--base-model", "a", "--base-model", "b", "--strict", "--no-score-eos", "--bos", "one"]
    arguments += ["--processes", "2", "--map", "response=x", "--until", "winner", "--beta", "2", "-o", "RUN"]
    with command.make_context("score", arguments) as context:
        got = processes.arguments_of(context)
    wanted = "--base-model a --base-model b --no-score-eos --bos one --until winner --beta 2.0 --output RUN"
    assert sorted(got) == sorted(wanted.split())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((2, "all", "auto", "1/1"), "give one of them"),
        ((2, None, "auto", "1/2"), "--worker"),
        ((None, "all", "auto", "auto"), "--worker"),
        ((None, "x", "auto", "1/1"), "--gpus x"),
    ],
)
def test_what_does_not_go_together(monkeypatch, options, message):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0", "1"])
    with pytest.raises(UsageError, match=message):
        processes.environments(*options)


def test_a_process_for_each_gpu(monkeypatch):
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["4", "5", "6"])
    every = [{"CUDA_VISIBLE_DEVICES": own} for own in ("4", "5", "6")]
    assert processes.environments(None, None, "auto", "1/1") == every
    assert processes.environments(None, "all", "auto", "1/1") == every
    assert processes.environments(None, "0,2", "auto", "1/1") == [every[0], every[2]]
    # Who chooses a device or shares by hand is one process; so is who has one GPU.
    assert processes.environments(None, None, "cuda:1", "1/1") == []
    assert processes.environments(None, None, "auto", "auto") == []
    monkeypatch.setattr(processes, "visible_gpus", lambda: ["0"])
    assert processes.environments(None, None, "auto", "1/1") == []
    monkeypatch.setattr(processes, "visible_gpus", list)
    with pytest.raises(UsageError, match="no GPU"):
        processes.environments(None, "all", "auto", "1/1")


def test_several_processes_prepare_a_large_corpus(tmp_path, monkeypatch, model, corpus):
    asked: list[int] = []
    work_in_children = preparing.work_in_children

    def watched(tasks: object, n: int, **options: object) -> bool:
        asked.append(n)
        return work_in_children(tasks, n, **options)

    options = ("--base-model", model, "--token-budget", 256)
    succeed("score", corpus, *options, "-o", tmp_path / "whole")
    monkeypatch.setattr(processes.subprocess, "Popen", warm_processes.popen)
    monkeypatch.setattr(preparing, "work_in_children", watched)
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 0)
    monkeypatch.setattr("fastcompat.corpus.pieces._LEAST_PIECE_BYTES", 50_000)
    succeed("score", corpus, *options, "--processes", 2, "-o", tmp_path / "shared")
    assert asked == [2]
    assert parts(tmp_path / "shared") == parts(tmp_path / "whole")


def test_as_many_prepare_as_there_are_cores_and_memory(tmp_path, monkeypatch):
    cores = processes.usable_cores()
    assert 1 <= cores <= (processes.os.cpu_count() or 1)
    monkeypatch.setattr(processes.os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {100 << 20} kB\n")
    assert processes.preparers(None, "1/1", tmp_path) == 64
    quota = tmp_path / "sys" / "fs" / "cgroup" / "cpu.max"
    quota.parent.mkdir(parents=True)
    for text, expected in {"max 100000": 64, "350000 100000": 3, "50000 100000": 1, "nothing": 64}.items():
        quota.write_text(text)
        assert processes.preparers(None, "1/1", tmp_path) == expected
    (tmp_path / "proc" / "meminfo").write_text(f"MemAvailable: {5 << 20} kB\n")
    assert processes.preparers(None, "1/1", tmp_path) == 10
    # One of several workers has its share of the cores already.
    assert processes.preparers(None, "auto", tmp_path) == processes.preparers(None, "2/3", tmp_path) == 1
    assert processes.preparers(7, "1/1", tmp_path) == 7


def test_processes_share_the_cores(monkeypatch):
    monkeypatch.setattr(processes.os, "cpu_count", lambda: 8)
    assert processes.environments(4, None, "auto", "1/1") == [{"OMP_NUM_THREADS": "2"}] * 4
    assert processes.environments(1, None, "auto", "1/1") == []
