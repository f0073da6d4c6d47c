"""A file is there whole or not at all, whatever fails while it is written."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcompat.errors import RunError
from fastcompat.store import durable
from fastcompat.store.durable import own_name, remove_abandoned, remove_tree, replacing
from fastcompat.store.places import Disk


def test_what_is_written_is_there_and_nothing_else_is(tmp_path):
    Disk(tmp_path).put_json("a.json", {"ä": [1, None]})
    Disk(tmp_path).put_table("a.parquet", pa.table({"x": [1, 2]}))
    assert Disk(tmp_path).read_json("a.json") == {"ä": [1, None]}
    with pq.ParquetFile(tmp_path / "a.parquet", page_checksum_verification=True) as file:
        assert file.read().to_pydict() == {"x": [1, 2]}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.parquet"]


def test_a_failure_leaves_the_former_file_and_no_other(tmp_path):
    path = tmp_path / "a.json"
    Disk(tmp_path).put_json(path.name, {"version": 1})
    with pytest.raises(ZeroDivisionError), replacing(path) as temporary:  # noqa: PT012
        temporary.write_text("half")
        raise ZeroDivisionError
    with pytest.raises(TypeError):
        Disk(tmp_path).put_json(path.name, {"version": object()})
    assert Disk(tmp_path).read_json(path.name) == {"version": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_what_the_disk_refuses_is_said_with_the_way_out(tmp_path, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with pytest.raises(RunError, match=r"a\.json cannot be written \(No space left on device\).*same command again"):
        Disk(tmp_path).put_json("a.json", {})
    assert list(tmp_path.iterdir()) == []
    monkeypatch.undo()
    with pytest.raises(RunError, match="No such file or directory"):
        (Disk(tmp_path) / "nowhere").put_json("a.json", {})


@pytest.mark.parametrize(("text", "message"), [("{", "cannot be read"), ("[1]", "does not hold")])
def test_what_is_no_record_is_named(tmp_path, text, message):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunError, match=message):
        Disk(tmp_path).read_json("a.json")
    with pytest.raises(RunError, match="cannot be read"):
        Disk(tmp_path).read_json("b.json")


def test_of_many_writers_the_first_wins(tmp_path):
    table = pa.table({"writer": [0]})
    with ThreadPoolExecutor(16) as pool:
        for k in range(50):
            write = partial(Disk(tmp_path).put_new_table, f"{k}.parquet")
            won = list(pool.map(lambda w, write=write: write(table.set_column(0, "writer", [[w]])), range(16)))
            assert won.count(True) == 1
            assert pq.read_table(tmp_path / f"{k}.parquet")["writer"].to_pylist() == [won.index(True)]
    assert not list(tmp_path.glob(".*"))


def test_a_disk_without_hard_links_keeps_what_is_there(tmp_path, monkeypatch):
    def refuse(source, target):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    assert Disk(tmp_path).put_new_json("a.json", {"first": True})
    assert not Disk(tmp_path).put_new_json("a.json", {"first": False})
    assert Disk(tmp_path).read_json("a.json") == {"first": True}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_only_what_a_dead_process_left_long_ago_is_removed(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    process.wait()
    host = own_name("x").removeprefix(".x.").rpartition("-")[0].rpartition("-")[0]
    names = {
        "old": f".a.json.{host}-{process.pid}-00000000",
        "young": f".b.json.{host}-{process.pid}-00000000",
        "living": f".c.json.{host}-{os.getpid()}-00000000",
        "elsewhere": f".d.json.another-{process.pid}-00000000",
        "forgotten": f".e.json.another-{process.pid}-00000000",
        "not_ours": ".gitignore",
    }
    for kind, name in names.items():
        path = tmp_path / name
        path.write_text(kind)
        if kind == "elsewhere":
            os.utime(path, (time.time() - 7200, time.time() - 7200))
        elif kind != "young":
            os.utime(path, (0, 0))
    directory = tmp_path / f".corpus.{host}-{process.pid}-00000000"
    (directory / "deeper").mkdir(parents=True)
    (directory / "deeper" / "file").write_text("x")
    os.utime(directory, (0, 0))
    remove_abandoned(tmp_path)
    assert sorted(path.read_text() for path in tmp_path.iterdir()) == ["elsewhere", "living", "not_ours", "young"]


def test_a_tree_goes_whole(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").write_text("x")
    remove_tree(tmp_path / "a")
    remove_tree(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_killed_writer_leaves_the_former_file(tmp_path):
    """Killed between the write and the rename, at which the new file begins to exist."""
    path = tmp_path / "a.json"
    Disk(tmp_path).put_json(path.name, {"version": 1})
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom fastcompat.store.durable import replacing\n"
        "with replacing(Path(sys.argv[1])) as temporary:\n"
        "    temporary.write_text('{}')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == -9
    assert json.loads(Path(path).read_text()) == {"version": 1}
