"""Files that are not what their names say: pointers, pages and error messages are an error before anything is
prepared; other formats are one `unreadable` row that says what to do.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest
from corpora import save_small_model
from corpus_shapes import lines
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from fastcompat.cli.application import app
from fastcompat.cli.display import show_corpus
from fastcompat.corpus import compare_inputs, iter_responses, prepare
from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.content import stand_in
from fastcompat.corpus.records import Unreadable
from fastcompat.corpus.sources import find_sources
from fastcompat.errors import CorpusError

GOOD = lines([{"prompt": f"p{i}", "response": "r"} for i in range(5)])
LFS = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
STAND_INS: dict[str, tuple[bytes, str, str]] = {
    "LFS": (LFS, "a Git LFS pointer", "Fetch the files with `git lfs pull`."),
    "LFS, CRLF": (LFS.replace(b"\n", b"\r\n"), "a Git LFS pointer", "git lfs pull"),
    "LFS before its name": (LFS.replace(b"git-lfs.github", b"hawser.github"), "a Git LFS pointer", "git lfs pull"),
    "annex": (b"/annex/objects/SHA256E-s10--0123.jsonl\n", "a git-annex pointer", "git annex get"),
    "Xet": (b"# xet version 0\nfilesize = 123\nhash = 'abc'\n", "a Xet pointer", "git xet checkout"),
    "page": (b"<!DOCTYPE html>\n<html><head>" + b"x" * 10_000, "a web page", "Download them again"),
    "page without type": (b"\n  <html lang='en'>", "a web page", "Download them again"),
    "bucket": (
        b'\xef\xbb\xbf<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>AccessDenied</Code><Message>x</Message>',
        r"the error of a storage bucket \(AccessDenied\)",
        "Download them again",
    ),
    "hub": (b'{"error":"Invalid username or password."}', r"an error message \(Invalid username", "Download"),
    "GitHub": (
        b'{"message": "Not Found", "documentation_url": "https://docs", "status": "404"}\n',
        r"an error message \(Not Found\)",
        "Download",
    ),
    "service": (b'{"detail": "Unauthorized"}', r"an error message \(Unauthorized\)", "Download"),
    "words": (b"Entry not found", r"an error message \(Entry not found\)", "Download"),
    "raw": (b"404: Not Found", r"an error message \(404: Not Found\)", "Download"),
    "gated": (b"Access to dataset org/name is restricted. Please log in.", "an error message", "logged in"),
}


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


@pytest.mark.parametrize(("content", "what", "remedy"), STAND_INS.values(), ids=STAND_INS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.json.gz", "a.arrow", "a.jsonl.zst"])
def test_what_stands_for_a_file_is_an_error(name: str, content: bytes, what: str, remedy: str) -> None:
    write("d/good.jsonl", GOOD)
    write(f"d/{name}", content)
    for named in ("d", "d/*", ["d/good.jsonl", f"d/{name}"]):
        with pytest.raises(
            CorpusError, match=rf"1 file is not the data that was meant:\n  d/{name}: {what}.*\n.*{remedy}"
        ):
            prepare(named, "out")
        with pytest.raises(CorpusError):
            next(iter_responses(named))
    # Before anything is prepared.
    assert not Path("out").exists()


def test_all_of_them_are_listed() -> None:
    for number in range(30):
        write(f"d/{number:02}.jsonl", LFS)
    write("d/page.parquet", b"<html>")
    os.symlink("../.git/annex/objects/x/y.jsonl", "d/annexed.jsonl")
    os.symlink("nowhere.jsonl", "d/linked.jsonl")
    with pytest.raises(CorpusError) as caught:
        find_sources("d")
    first, *listed, last = str(caught.value).splitlines()
    assert first == "33 files are not the data that was meant:"
    assert listed[:30] == [f"  d/{number:02}.jsonl: a Git LFS pointer" for number in range(30)]
    assert listed[30:] == [
        "  d/annexed.jsonl: a git-annex link without its content",
        "  d/linked.jsonl: a link to nowhere.jsonl, which is not there",
        "  d/page.parquet: a web page (of a login or an error?)",
    ]
    assert last == (
        "Fetch the files with `git lfs pull`; fetch the files with `git annex get`; mend the links, or fetch what they "
        "lead to; download them again (logged in, where that is asked for)."
    )


@pytest.mark.parametrize("named", ["d", "d/*", "d/**/*.jsonl", "d/linked.jsonl"])
def test_links_to_nothing_are_not_passed_over(named: str) -> None:
    write("d/good.jsonl", GOOD)
    os.symlink("nowhere.jsonl", "d/linked.jsonl")
    with pytest.raises(
        CorpusError, match=r"1 file is not the data that was meant:\n  d/linked.jsonl: a link to nowhere"
    ):
        find_sources(named)


def test_a_command_ends_with_what_is_missing() -> None:
    write("d/good.jsonl", GOOD)
    write("d/bad.parquet", LFS)
    save_small_model(Path("model"))
    result = CliRunner().invoke(app, ["score", "d", "--base-model", "model", "-o", "run"])
    assert isinstance(result.exception, CorpusError)
    assert result.exception.exit_code == 3
    summary = prepare("d/good.jsonl", "out")
    with pytest.raises(CorpusError, match="git lfs pull"):
        compare_inputs(summary, "d")


@pytest.mark.parametrize(
    "content",
    [
        GOOD,
        b"",
        b'{"error": "rate limit"}\n{"error": "rate limit"}\n',
        b'{"error": "e", "prompt": "a", "response": "b"}',
        b'{"message": "hello"}',
        b"version 1 of the file\n",
        b'<p>{"prompt": "a"}',
        b"Not Found is what I said",
        b'{"error": "' + b"x" * 5000 + b'"}',
    ],
)
def test_what_only_looks_like_it_is_read(content: bytes) -> None:
    assert stand_in(content) is None
    assert len(find_sources(write("a.jsonl", content))) == 1


def test_what_a_hub_or_a_compressed_file_holds_is_a_row() -> None:
    """There is no need to open remote files twice: their first bytes are looked at where they are read."""
    filesystem = MemoryFileSystem()
    filesystem.store.clear()
    filesystem.pipe("/datasets/org/name/a.parquet", b"<!doctype HTML><html>")
    filesystem.pipe("/datasets/org/name/b.jsonl", GOOD)
    summary = prepare("hf://datasets/org/name", "out", filesystem=filesystem)
    assert summary.statuses == {"ok": 5, "unreadable": 1}
    assert summary.files[0].problem.startswith("this is a web page (of a login or an error?); download them again")
    (source,) = find_sources(write("c.jsonl.gz", gzip.compress(LFS, mtime=0)))
    (marker,) = (record for batch in SourceReader(source) for record in batch.records)
    assert marker == Unreadable("this is a Git LFS pointer; fetch the files with `git lfs pull`")


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("a.jsonl")
        member.size = len(GOOD)
        archive.addfile(member, io.BytesIO(GOOD))
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"PK\x03\x04rest", "this is a zip archive; unpack it and name the files in it"),
        (_tar(), "this is a tar archive; unpack it and name the files in it"),
        (gzip.compress(_tar(), mtime=0), "this is a tar archive; unpack it and name the files in it"),
        (b"7z\xbc\xaf\x27\x1crest", "this is a 7z archive; unpack it"),
        (b"\x04\x22\x4d\x18rest", "this is lz4 data; unpack it (lz4 -d FILE)"),
        (b"SQLite format 3\0", "this is an SQLite database; export its table as JSON lines"),
        (b"\x89HDF\r\n", "this is an HDF5 file; convert it"),
        (b"Obj\x01\x04", "this is an Avro file; convert it"),
        (b"\x93NUMPY\x01", "this is a NumPy file; convert it"),
        (b"\x80\x04\x95\x10", "this is a Python pickle; load it"),
        (b"%PDF-1.7", "this is a PDF file; extract its text"),
        (b"<?xml version='1.0'?><rows>", "this is XML; convert it to JSON lines"),
        (GOOD.decode().encode("utf-16"), "the text is UTF-16; save it as UTF-8"),
        (GOOD.decode().encode("utf-16-le"), "the text is UTF-16; save it as UTF-8"),
        (GOOD.decode().encode("utf-16-be"), "the text is UTF-16; save it as UTF-8"),
        (
            gzip.compress(b"PAR1 and so on", mtime=0),
            "a compressed Parquet or Arrow file cannot be read in pieces; unpack it",
        ),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.jsonl.gz"])
def test_formats_that_are_not_read(name: str, content: bytes, reason: str) -> None:
    write("good.jsonl", GOOD)
    file, _ = prepare([write(name, content), "good.jsonl"], "out").files
    assert file.statuses == {"unreadable": 1}
    assert file.problem.startswith(reason)


def test_what_gives_nothing_is_shown_first(capsys: pytest.CaptureFixture[str]) -> None:
    write("d/cut.jsonl.gz", gzip.compress(GOOD * 9000, mtime=0)[:-20])
    write("d/good.jsonl", GOOD + b'{"prompt": "p", "response": null}\n' * 3 + b"{broken\n")
    write("d/null.jsonl", b'{"prompt": "p", "response": null}\n' * 4)
    write("d/empty.jsonl", b"")
    write("d/other.jsonl", b'{"x": 1}\n')
    write("d/zip.parquet", b"PK\x03\x04rest")
    summary = prepare("d", "out")
    show_corpus(summary, 1.0)
    shown = capsys.readouterr().out.splitlines()
    assert shown[1:5] == [
        "d/empty.jsonl gives nothing: the file holds no record",
        "d/null.jsonl gives nothing: not one of its rows can be scored: response is null (4 of 4)",
        "d/other.jsonl gives nothing: no known schema; closest: prompt + response: no response column "
        "(looked for response, completion, answer, output, generation)",
        "d/zip.parquet gives nothing: this is a zip archive; unpack it and name the files in it",
    ]
    assert shown[5] == "d/cut.jsonl.gz: the gzip data ends early: the file is truncated"
    assert shown[6].startswith("not scored: response is null (3 rows); line 9: broken JSON (")
    assert " from 6 files (4 of which give nothing), prepared in 0:00:01 · ok " in shown[7]
    assert json.loads(json.dumps(summary.to_json()))["files"][0]["problem"].startswith("the gzip data")
