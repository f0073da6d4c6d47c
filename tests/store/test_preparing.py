"""Large corpora, prepared in tasks: the bytes of one process, whoever works, dies, is interrupted or comes late."""

from __future__ import annotations

import contextlib
import functools
import gzip
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import rows_of, write_jsonl
from fsspec.implementations.memory import MemoryFileSystem

from fastcompat.corpus import CorpusSummary, pieces, plan_whole, prepare
from fastcompat.errors import CorpusError, Interrupted, RunError, SchemaError
from fastcompat.store import claims, open_run, preparers, preparing
from fastcompat.store.claims import TRIES, Claims
from fastcompat.store.places import Disk
from fastcompat.store.preparing import CorpusSettings, prepare_run
from fastcompat.store.tasks import Tasks

SIZES = {"target_shard_bytes": 30_000, "target_unit_chars": 3000}
PLAIN = CorpusSettings()
SECONDS = 120

# What the fixture below does, in a process of its own.
SCRIPT = f"""
import functools, sys
from fastcompat.corpus import pieces
from fastcompat.store import preparing
preparing._SMALL_BYTES = 0
pieces._LEAST_PIECE_BYTES = pieces._MOST_PIECE_BYTES = 4000
preparing.plan_whole = functools.partial(preparing.plan_whole, **{SIZES})
"""
PREPARE = """
from pathlib import Path
settings = preparing.CorpusSettings(strict="strict" in sys.argv)
preparing.prepare_run(Path(sys.argv[1]), [sys.argv[2]], settings, processes=int(sys.argv[3]))
"""


@pytest.fixture(autouse=True)
def _every_corpus_is_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 0)
    monkeypatch.setattr(pieces, "_LEAST_PIECE_BYTES", 4000)
    monkeypatch.setattr(pieces, "_MOST_PIECE_BYTES", 4000)
    monkeypatch.setattr(preparing, "plan_whole", functools.partial(plan_whole, **SIZES))


def write_corpus(directory: Path) -> Path:
    """Files of all kinds, with broken lines."""
    directory.mkdir()
    for name in "abc":
        write_jsonl(directory / f"{name}.jsonl", rows_of(name, n_prompts=150))
    with (directory / "b.jsonl").open("ab") as file:
        file.write(b"{broken\n" * 3 + b'{"prompt": "p", "response": null}\n')
    lines = "".join(json.dumps(row) + "\n" for row in rows_of("d", n_prompts=150))
    (directory / "d.jsonl.gz").write_bytes(gzip.compress(lines.encode(), mtime=0))
    pq.write_table(pa.Table.from_pylist(rows_of("e", n_prompts=150)), directory / "e.parquet", row_group_size=20)
    return directory


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_corpus(tmp_path_factory.mktemp("corpus") / "files")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, corpus: Path) -> tuple[CorpusSummary, dict[str, bytes]]:
    """What one process makes of the corpus in one go."""
    directory = tmp_path_factory.mktemp("alone")
    return prepare([str(corpus)], directory, **SIZES), shards(directory)


def shards(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.glob("shard-*")}


def check(directory: Path, alone: tuple[CorpusSummary, dict[str, bytes]]) -> None:
    """That a run is prepared as one process does it, and that nothing else is left."""
    assert list(open_run(directory).generations) == [alone[0]]
    assert shards(directory / "corpus") == alone[1]
    assert sorted(path.name for path in directory.iterdir()) == ["corpus", "manifest.json"]


def work_of(directory: Path) -> Path:
    (work,) = directory.glob(".preparing-*")
    return work


def finished(directory: Path) -> dict[str, tuple[int, int]]:
    """The tasks that have results, with what changes when a result is written again."""
    found = {}
    for work in directory.glob(".preparing-*"):
        for path in [*work.glob("[a-z]*-*/result.json"), *work.glob("[a-z]*-*.json")]:
            with contextlib.suppress(FileNotFoundError):  # all of it is gone when the run is there
                status = path.stat()
                found[str(path.relative_to(work))] = (status.st_mtime_ns, status.st_ino)
    return found


def start(*arguments: object, before: str = "") -> subprocess.Popen[str]:
    """A preparer in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT + before + PREPARE, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def kill_all(pid: int) -> None:
    """A process and its children, before any of them can say goodbye."""
    pids = [pid, *map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]
    for sent in (signal.SIGSTOP, signal.SIGKILL):
        for each in pids:
            os.kill(each, sent)


def wait_for(what: Callable[[], object], process: subprocess.Popen[str] | None = None) -> None:
    until = time.monotonic() + SECONDS
    while not what() and (process is None or process.poll() is None):
        assert time.monotonic() < until
        time.sleep(0.002)


def ended(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=SECONDS)
    return output


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_gives_the_bytes_of_one(tmp_path, corpus, alone, processes):
    reports = []
    run, summary = prepare_run(tmp_path / "run", [str(corpus)], PLAIN, processes=processes, on_progress=reports.append)
    assert summary == alone[0] == run.generations[-1]
    assert len(summary.shards) > 3
    check(tmp_path / "run", alone)
    n_bytes = sum(path.stat().st_size for path in corpus.iterdir())
    reading = [report for report in reports if report.phase == "reading"]
    assert {report.total for report in reading} == {n_bytes}
    assert max(report.done for report in reading) <= n_bytes
    last = reports[-1]
    assert (last.phase, last.done, last.total) == ("writing", summary.n_rows, summary.n_rows)


def test_a_child_that_is_killed_is_replaced(tmp_path, corpus, alone, monkeypatch):
    started: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def watched(*arguments, **options):
        started.append(popen(*arguments, **options))
        return started[-1]

    def kill_one_at_work() -> None:
        directory = tmp_path / "run"
        wait_for(lambda: list(directory.glob(".preparing-*/.piece-*")))
        pids = {int(path.name.split("-")[-2]) for path in directory.glob(".preparing-*/.piece-*")}
        for child in started:
            if child.pid in pids:
                child.kill()
                return

    monkeypatch.setattr(preparers.subprocess, "Popen", watched)
    killer = threading.Thread(target=kill_one_at_work)
    killer.start()
    prepare_run(tmp_path / "run", [str(corpus)], PLAIN, processes=2)
    killer.join()
    check(tmp_path / "run", alone)
    codes = [child.returncode for child in started]
    assert len(started) == 2 + codes.count(-signal.SIGKILL)
    assert all(code is not None for code in codes)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("processes", [1, 2])
def test_after_a_kill_of_all_what_is_finished_is_not_done_again(tmp_path, corpus, alone, monkeypatch, processes):
    directory = tmp_path / "run"
    process = start(directory, corpus, processes)
    wait_for(lambda: len(finished(directory)) > 6, process)
    kill_all(process.pid)
    ended(process)
    before = finished(directory)
    assert len(before) > 6
    done: list[str] = []
    do = Tasks.do

    def watched(tasks, task, note):
        do(tasks, task, note)
        done.append(task.name)
        assert before.items() <= finished(directory).items()

    monkeypatch.setattr(Tasks, "do", watched)
    prepare_run(directory, [str(corpus)], PLAIN)
    check(directory, alone)
    assert len(set(done)) == len(done) > 0
    assert not {name.split("/")[0].removesuffix(".json") for name in before} & set(done)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs Linux's /proc")
def test_children_end_with_their_parent_and_give_back_what_they_have_claimed(tmp_path, corpus, alone):
    directory = tmp_path / "run"
    process = start(directory, corpus, 2)
    wait_for(lambda: len(finished(directory)) > 6, process)
    children = list(map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()))
    process.kill()
    ended(process)
    wait_for(lambda: not any(map(alive, children)))
    assert len(children) == 2
    assert list((work_of(directory) / "claims").iterdir()) == []
    prepare_run(directory, [str(corpus)], PLAIN)
    check(directory, alone)


def alive(pid: int) -> bool:
    """A process that has ended may still be listed, without its command."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes() != b""
    return False


def test_preparers_that_come_together_share_the_work(tmp_path, corpus, alone):
    directory = tmp_path / "run"
    processes = [start(directory, corpus, n) for n in (1, 1, 2)]
    for process in processes:
        output = ended(process)
        assert process.returncode == 0, output
    check(directory, alone)


def test_who_comes_when_another_has_finished_goes_on(tmp_path, corpus, alone):
    """The work is gone under its hands, and the run is there."""
    directory = tmp_path / "run"
    others = []

    def another(progress: object) -> None:
        if not others:
            others.append(True)
            prepare_run(directory, [str(corpus)], PLAIN)

    run, summary = prepare_run(directory, [str(corpus)], PLAIN, on_progress=another)
    assert others
    assert summary == alone[0]
    check(directory, alone)
    assert run.generations == open_run(directory).generations
    assert prepare_run(directory, [str(corpus)], PLAIN)[1] is None


def test_who_finds_another_corpus_prepared_meanwhile_is_told(tmp_path, corpus):
    directory = tmp_path / "run"
    other = write_jsonl(tmp_path / "other.jsonl", rows_of("x", n_prompts=100))
    others = []

    def another(progress: object) -> None:
        if not others:
            others.append(True)
            prepare_run(directory, [str(other)], PLAIN)

    with pytest.raises(RunError, match="another process changed"):
        prepare_run(directory, [str(corpus)], PLAIN, on_progress=another)
    assert open_run(directory).n_rows == 100


@pytest.mark.parametrize("processes", [1, 2])
def test_an_interruption_ends_the_children_and_keeps_what_is_finished(tmp_path, corpus, alone, monkeypatch, processes):
    directory = tmp_path / "run"
    started = []
    popen = subprocess.Popen
    monkeypatch.setattr(preparers.subprocess, "Popen", lambda *a, **o: started.append(popen(*a, **o)) or started[-1])

    def interrupt(progress: object) -> None:
        if len(finished(directory)) > 5:
            raise Interrupted("enough")

    with pytest.raises(Interrupted, match="enough"):
        prepare_run(directory, [str(corpus)], PLAIN, processes=processes, on_progress=interrupt)
    assert len(started) == (processes if processes > 1 else 0)
    assert all(child.returncode is not None for child in started)
    # Nobody has died: no claim is left, and no attempt counts.
    assert list((work_of(directory) / "claims").iterdir()) == []
    before = finished(directory)
    assert len(before) > 5
    seen = []
    prepare_run(directory, [str(corpus)], PLAIN, on_progress=lambda progress: seen.append(finished(directory)))
    assert before.items() <= seen[0].items()
    check(directory, alone)


@pytest.mark.parametrize("processes", [1, 2])
def test_what_is_wrong_with_the_corpus_is_told_as_by_one_process(tmp_path, corpus, processes):
    with pytest.raises(CorpusError) as expected:
        prepare(str(corpus), tmp_path / "out", strict=True)
    with pytest.raises(CorpusError) as found:
        prepare_run(tmp_path / "run", [str(corpus)], CorpusSettings(strict=True), processes=processes)
    assert str(found.value) == str(expected.value)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["corpus"]
    unknown = write_jsonl(tmp_path / "unknown.jsonl", [{"x": i} for i in range(1000)])
    with pytest.raises(SchemaError, match="Columns found: x"):
        prepare_run(tmp_path / "run", [str(unknown)], PLAIN, processes=processes)
    empty = write_jsonl(tmp_path / "empty.jsonl", [{"prompt": "a", "response": None}] * 1000)
    with pytest.raises(CorpusError, match=r"no response(.|\n)*null \(1,000 rows\)"):
        prepare_run(tmp_path / "run", [str(empty)], PLAIN, processes=processes)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["corpus"]


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, resource.RLIM_INFINITY))
"""


def test_a_disk_that_refuses_ends_all_and_keeps_what_is_finished(tmp_path, corpus, alone):
    directory = tmp_path / "run"
    process = start(directory, corpus, 2, before=FULL)
    output = ended(process)
    assert process.returncode == 1
    assert f"{directory} cannot be written: " in output.splitlines()[-1]
    assert "File too large" in output
    before = finished(directory)
    seen = []
    prepare_run(directory, [str(corpus)], PLAIN, on_progress=lambda progress: seen.append(finished(directory)))
    assert before.items() <= seen[0].items()
    check(directory, alone)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_file_over_which_workers_died_is_named(tmp_path, corpus, monkeypatch, processes):
    directory = tmp_path / "run"
    with pytest.raises(Interrupted):
        prepare_run(directory, [str(corpus)], PLAIN, on_progress=interrupted_at_once)
    work = work_of(directory)
    with monkeypatch.context() as patch:
        patch.setattr(claims, "is_gone", lambda worker: True)
        for _ in range(TRIES + 1):
            Claims(Disk(work) / "claims", is_done=lambda name: False).take("piece-00000")
    with pytest.raises(RunError, match=rf"died again and again .*a\.jsonl.*remove {work}"):
        prepare_run(directory, [str(corpus)], PLAIN, processes=processes)


def interrupted_at_once(progress: object) -> None:
    raise Interrupted("at once")


def test_another_corpus_does_not_take_up_what_was_begun(tmp_path, monkeypatch):
    directory, corpus = tmp_path / "run", write_corpus(tmp_path / "files")

    def interrupt(progress: object) -> None:
        if len(finished(directory)) > 5:
            raise Interrupted("enough")

    with pytest.raises(Interrupted):
        prepare_run(directory, [str(corpus)], PLAIN, on_progress=interrupt)
    first = work_of(directory)
    with (corpus / "a.jsonl").open("a") as file:
        file.write('{"prompt": "one", "response": "more"}\n')
    # Somebody may be at work in the first one, who has been heard of lately.
    with pytest.raises(Interrupted):
        prepare_run(directory, [str(corpus)], PLAIN, on_progress=interrupted_at_once)
    assert len(list(directory.glob(".preparing-*"))) == 2
    monkeypatch.setattr(preparing, "_IDLE_SECONDS", -1)
    with pytest.raises(Interrupted):
        prepare_run(directory, [str(corpus)], PLAIN, on_progress=interrupted_at_once)
    assert work_of(directory) != first
    _, summary = prepare_run(directory, [str(corpus)], PLAIN)
    expected = prepare(str(corpus), tmp_path / "out", **SIZES)
    check(directory, (expected, shards(tmp_path / "out")))
    assert summary == expected


def test_what_is_added_later_is_prepared_in_the_same_way(tmp_path):
    corpus = write_corpus(tmp_path / "files")
    directory = tmp_path / "run"
    prepare_run(directory, [str(corpus)], PLAIN, processes=2)
    before = shards(directory / "corpus")
    later = write_jsonl(corpus / "later.jsonl", rows_of("later", n_prompts=300))
    run, summary = prepare_run(directory, [str(corpus)], PLAIN, extend=True, processes=2)
    expected = prepare(str(later), tmp_path / "out", first_shard=len(before), **SIZES)
    assert summary == expected
    assert shards(directory / "corpus") == before | shards(tmp_path / "out")
    assert run.n_rows == sum(generation.n_rows for generation in run.generations)
    assert prepare_run(directory, [str(corpus)], PLAIN, extend=True)[1] is None


def test_a_worker_that_dies_while_it_commits_is_followed_by_another(tmp_path, corpus, alone, monkeypatch):
    directory = tmp_path / "run"
    rename = Path.rename

    def dies(path: Path, goal: Path) -> Path:
        if Path(goal).name == "shard-00002.parquet":
            raise KeyboardInterrupt
        return rename(path, goal)

    def prepare_and_die(directory: Path) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(Path, "rename", dies)
            with pytest.raises(KeyboardInterrupt):
                prepare_run(directory, [str(corpus)], PLAIN)

    prepare_and_die(directory)
    assert len(shards(directory / "corpus")) == 2
    assert not (directory / "manifest.json").exists()
    prepare_run(directory, [str(corpus)], PLAIN)
    check(directory, alone)
    prepare_and_die(tmp_path / "other")
    (tmp_path / "other" / "corpus" / "shard-00000.parquet").write_bytes(b"of something else")
    with pytest.raises(RunError, match=r"bucket-00000.parquet is gone; remove"):
        prepare_run(tmp_path / "other", [str(corpus)], PLAIN)


def test_files_behind_a_network_are_read_whole_and_from_the_hub(tmp_path, corpus, monkeypatch):
    filesystem = MemoryFileSystem()
    filesystem.store.clear()
    for path in corpus.iterdir():
        filesystem.pipe(f"/datasets/org/name/{path.name}", path.read_bytes())
    for module in ("remote", "sources"):
        monkeypatch.setattr(f"fastcompat.corpus.{module}.filesystem_of", lambda *_: MemoryFileSystem())
    done: list[str] = []
    do = Tasks.do
    monkeypatch.setattr(Tasks, "do", lambda tasks, task, note: done.append(task.name) or do(tasks, task, note))
    _, summary = prepare_run(tmp_path / "run", ["hf://datasets/org/name"], PLAIN)
    expected = prepare("hf://datasets/org/name", tmp_path / "out", filesystem=filesystem, **SIZES)
    assert summary == expected
    check(tmp_path / "run", (expected, shards(tmp_path / "out")))
    assert len([name for name in done if name.startswith("piece")]) == len(list(corpus.iterdir()))


def test_small_corpora_start_no_process_and_leave_no_tasks(tmp_path, corpus, alone, monkeypatch):
    monkeypatch.setattr(preparing, "_SMALL_BYTES", 1 << 20)
    monkeypatch.setattr(preparers.subprocess, "Popen", None)
    monkeypatch.setattr(Tasks, "do", None)
    prepare_run(tmp_path / "run", [str(corpus)], PLAIN, processes=4)
    check(tmp_path / "run", alone)


def test_what_earlier_versions_left_half_done_is_removed(tmp_path, corpus, alone):
    directory = tmp_path / "run"
    old = directory / f".preparing.{os.uname().nodename}-999999999-0123abcd"
    (old / ".partition").mkdir(parents=True)
    (old / ".partition" / "run-00000.arrow").write_bytes(b"half")
    for path in (old / ".partition", old):
        os.utime(path, (1, 1))
    prepare_run(directory, [str(corpus)], PLAIN)
    check(directory, alone)
