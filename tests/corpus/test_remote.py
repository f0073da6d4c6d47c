"""Corpora in object stores and on the web give the rows of the same files on a disk."""

from __future__ import annotations

import gzip
import json
import re
import threading
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpora import rows_of
from object_stores import BUCKET, FaultProxy, credentials, s3_server

from fastcompat.corpus import compare_inputs, iter_responses, prepare, remote
from fastcompat.corpus import web as web_files
from fastcompat.corpus.pieces import Plan, plan_whole
from fastcompat.corpus.sources import find_inputs, find_sources
from fastcompat.errors import CorpusError
from fastcompat.rows import ROW_SCHEMA

NAMES = ("a.jsonl", "deep/b.jsonl.gz", "deep/deeper/c.parquet")


def content(name: str) -> bytes:
    rows = rows_of(Path(name).name.split(".")[0], n_prompts=200)
    if name.endswith(".parquet"):
        sink = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=50)
        return sink.getvalue().to_pybytes()
    text = "".join(json.dumps(row) + "\n" for row in rows).encode()
    return gzip.compress(text, mtime=0) if name.endswith(".gz") else text


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("files") / "corpus"
    for name in NAMES:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content(name))
    (directory / "README.md").write_text("no corpus")
    (directory / "deep" / "notes.txt").write_text("none either")
    return directory


@pytest.fixture(scope="module")
def s3(files) -> Iterator[str]:
    obstore = pytest.importorskip("obstore")
    with s3_server() as address:
        config = {name.lower(): value for name, value in credentials(address).items()}
        store = obstore.store.S3Store(BUCKET, config=config, client_options={"allow_http": True})
        for path in files.rglob("*.*"):
            if path.is_file():
                obstore.put(store, f"data/{path.relative_to(files).as_posix()}", path.read_bytes())
        obstore.put(store, "data/.hidden.jsonl", b"{}")
        obstore.put(store, "data/folder/", b"")
        yield address


@pytest.fixture
def in_bucket(s3, monkeypatch) -> str:
    for name, value in credentials(s3).items():
        monkeypatch.setenv(name, value)
    return f"s3://{BUCKET}/data"


def texts(inputs: str | Path | list) -> list[tuple[str, int, str]]:
    rows = iter_responses(inputs)
    return [(row.generator, row.row_index, row.messages[-1].content) for row in rows]


def test_a_folder_of_a_bucket_is_the_directory(files, in_bucket):
    found = find_inputs(in_bucket)
    assert [source.label for source in found.sources] == [f"{in_bucket}/{name}" for name in NAMES]
    assert [source.size for source in found.sources] == [(files / name).stat().st_size for name in NAMES]
    assert all(source.oid for source in found.sources)
    assert texts(in_bucket) == texts(files)
    assert find_sources(in_bucket + "/") == found.sources


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a.jsonl", NAMES[:1]),
        ("*.jsonl", NAMES[:1]),
        ("deep/*", NAMES[1:2]),
        ("**/*.gz", NAMES[1:2]),
        ("**", NAMES),
        ("deep/**/c.parquet", NAMES[2:]),
        ("[ab].jsonl", NAMES[:1]),
    ],
)
def test_names_and_patterns(in_bucket, pattern, names):
    assert [source.label for source in find_sources(f"{in_bucket}/{pattern}")] == [f"{in_bucket}/{n}" for n in names]


def test_the_shards_are_those_of_the_files(files, in_bucket, tmp_path):
    summary = prepare(in_bucket, tmp_path / "bucket")
    here = prepare(str(files), tmp_path / "here")
    assert [file.statuses for file in summary.files] == [file.statuses for file in here.files]
    # Where a row came from is all that may differ.
    columns = [name for name in ROW_SCHEMA.names if name not in ("source", "row_key")]
    for shard in summary.shards:
        tables = [pq.read_table(tmp_path / where / shard.name, columns=columns) for where in ("bucket", "here")]
        assert tables[0].equals(tables[1])


@pytest.mark.parametrize("path", ["nothing", "data/none.jsonl", "data/deep/x*"])
def test_what_is_not_there_is_said(in_bucket, path):
    with pytest.raises(CorpusError, match=r"does not exist|holds no corpus file"):
        find_sources(f"s3://{BUCKET}/{path}")


def test_a_name_that_is_there_is_no_pattern(in_bucket):
    store = remote.Bucket(f"s3://{BUCKET}")._store
    for name in ("x[1].jsonl", "x1.jsonl", "y*.jsonl", "y2.jsonl"):
        remote.obstore().put(store, f"literal/{name}", b'{"a": 1}')
    folder = f"s3://{BUCKET}/literal"
    for name, names in (("x[1].jsonl", ["x[1].jsonl"]), ("y*.jsonl", ["y*.jsonl"]), ("x[12].jsonl", ["x1.jsonl"])):
        assert [source.label for source in find_sources(f"{folder}/{name}")] == [f"{folder}/{n}" for n in names]


@pytest.mark.parametrize("key", ["empty/d//x.jsonl", "dot/d/./x.jsonl"])
def test_an_object_that_cannot_be_named_is_shown(in_bucket, s3, key):
    folder = key.partition("/")[0]
    store = remote.Bucket(f"s3://{BUCKET}")._store
    for name in ("d/a.jsonl", "d/deep/b.jsonl"):
        remote.obstore().put(store, f"{folder}/{name}", b'{"a": 1}')
    put = urllib.request.Request(f"{s3}/{BUCKET}/{key}", data=b"{}", method="PUT")
    urllib.request.urlopen(put, timeout=10).close()
    for address in (folder, f"{folder}/d/*.jsonl"):
        with pytest.raises(CorpusError, match=rf"cannot be read: {re.escape(key)}\. Name the files"):
            find_sources(f"s3://{BUCKET}/{address}")
    for address in (f"{folder}/d/a.jsonl", f"{folder}/d/deep"):
        assert len(find_sources(f"s3://{BUCKET}/{address}")) == 1


def test_a_missing_bucket_and_refused_credentials(s3, in_bucket, monkeypatch):
    with pytest.raises(CorpusError, match="bucket does not exist"):
        find_sources("s3://no-such-bucket/x")
    with FaultProxy(s3, lambda method, path, n: 403) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        with pytest.raises(CorpusError, match="with the credentials of this environment"):
            find_sources(in_bucket)


def test_reading_that_fails_is_an_error_and_no_end_of_the_file(s3, in_bucket, monkeypatch):
    refuse = False
    with FaultProxy(s3, lambda method, path, n: 404 if refuse and method == "GET" else "") as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.address)
        sources = find_sources(in_bucket)
        refuse = True
        with pytest.raises(CorpusError, match=r"(reading|cannot open) s3://.*"):
            list(iter_responses(in_bucket + "/a.jsonl")) if not sources else sources[0].open().read()


# --- the web


@contextmanager
def web(
    files: Path,
    *,
    ranges: bool = True,
    breaks_after: int | None = None,
    headers: Callable[[int], dict[str, str]] = lambda n: {"ETag": '"tag"'},
    heeds_conditions: bool = True,
) -> Iterator[tuple[str, Counter]]:
    """A server of these files; breaks_after: it hangs up after so many bytes of every answer; headers(n): of the n-th
    answer, from 0; heeds_conditions: what comes with another If-Range is answered with the whole file.
    """
    seen: Counter[str] = Counter()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = files / unquote(urlsplit(self.path).path.lstrip("/"))
            if not path.is_file():
                self.send_error(404)
                return
            if urlsplit(self.path).query not in ("", "signature=secret"):
                self.send_error(403)
                return
            data = path.read_bytes()
            begin = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
            own = headers(seen.total())
            condition = self.headers.get("If-Range")
            same = condition in (None, own.get("ETag"), own.get("Last-Modified")) or not heeds_conditions
            partial_answer = bool(begin) and ranges and same
            seen["range" if partial_answer else "whole"] += 1
            body = data[begin:] if partial_answer else data
            self.send_response(206 if partial_answer else 200)
            for key, value in ({"Content-Length": str(len(body))} | own).items():
                self.send_header(key, value)
            if partial_answer and "Content-Range" not in own:
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(body if breaks_after is None else body[:breaks_after])
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield "http://{}:{}".format(*server.server_address), seen
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("name", NAMES)
def test_a_file_of_the_web(files, name):
    with web(files) as (address, _):
        (source,) = find_sources(f"{address}/{name}")
        assert (source.label, source.size, source.oid) == (
            f"{address}/{name}",
            (files / name).stat().st_size,
            "tag",
        )
        assert texts(f"{address}/{name}") == texts(files / name)


def test_a_signature_is_sent_and_kept_nowhere(files):
    with web(files) as (address, _):
        (source,) = find_sources(f"{address}/a.jsonl?signature=secret")
        assert source.label == f"{address}/a.jsonl"
        assert len(texts(f"{address}/a.jsonl?signature=secret")) == 200
        with pytest.raises(CorpusError, match="answers 403") as raised:
            find_sources(f"{address}/a.jsonl?signature=wrong")
        assert "wrong" not in str(raised.value)


def test_what_is_added_can_be_prepared_and_shows_no_signature(files, tmp_path):
    with web(files) as (address, _):
        before = prepare(str(files / "a.jsonl"), tmp_path / "before")
        signed = f"{address}/deep/b.jsonl.gz?signature=secret"
        difference = compare_inputs(before, [str(files / "a.jsonl"), signed])
        assert difference.added == (signed,)
        assert difference.describe() == f"  new: {address}/deep/b.jsonl.gz"
        assert prepare(difference.added, tmp_path / "added").n_rows == 200
        assert not compare_inputs([before, prepare(signed, tmp_path / "again")], [str(files / "a.jsonl"), signed])


@pytest.mark.parametrize("secret", ["user:hush", "hush", "user:hu/sh", "user:hu?sh"])
def test_credentials_in_a_web_address_are_refused_and_not_shown(secret):
    with pytest.raises(CorpusError, match="credentials do not belong into an address") as raised:
        find_sources(f"https://{secret}@127.0.0.1:9/x.jsonl")
    assert "hu" not in str(raised.value)
    assert "user" not in str(raised.value)


def test_a_transfer_that_breaks_off_is_taken_up(files, monkeypatch):
    monkeypatch.setattr(web_files.time, "sleep", lambda seconds: None)
    with web(files, breaks_after=3000) as (address, seen):
        assert texts(f"{address}/a.jsonl") == texts(files / "a.jsonl")
        assert seen["range"] > 2


# The answers: one to list, one to look at the head or to read, then those that take it up.
@pytest.mark.parametrize("heeds", [True, False])
@pytest.mark.parametrize(
    "headers",
    [
        lambda n: {"ETag": '"old"' if n < 2 else '"new"'},
        lambda n: {"ETag": 'W/"old"' if n < 2 else 'W/"new"'},
        lambda n: {
            "Last-Modified": f"Mon, 02 Jan 2023 00:00:0{min(n, 2)} GMT" if n else "Mon, 02 Jan 2023 00:00:01 GMT"
        },
        lambda n: {"Content-Range": "bytes 1-2/12345"} if n >= 2 else {},
    ],
)
def test_two_versions_are_not_mixed(files, monkeypatch, headers, heeds):
    with web(files, breaks_after=3000, headers=headers, heeds_conditions=heeds) as (address, seen):
        monkeypatch.setattr(web_files.time, "sleep", lambda seconds: None)
        (source,) = find_sources(f"{address}/a.jsonl")
        with pytest.raises(CorpusError, match=r"reading http.*a\.jsonl failed: it changed while it was read"):
            for _ in iter(partial(source.open().read, 1 << 20), b""):
                pass
        assert seen.total() == 3


@pytest.mark.parametrize(
    ("headers", "condition"),
    [
        ({"ETag": '"tag"', "Last-Modified": "then"}, '"tag"'),
        ({"ETag": 'W/"tag"', "Last-Modified": "then"}, "then"),
        ({"ETag": 'W/"tag"'}, None),
    ],
)
def test_a_part_is_asked_for_of_one_version(files, monkeypatch, headers, condition):
    monkeypatch.setattr(web_files.time, "sleep", lambda seconds: None)
    asked = []
    make = urllib.request.Request

    def noting(*args, **settings) -> urllib.request.Request:
        asked.append(make(*args, **settings))
        return asked[-1]

    monkeypatch.setattr(urllib.request, "Request", noting)
    with web(files, breaks_after=3000, headers=lambda n: headers) as (address, _):
        texts(f"{address}/a.jsonl")
    parts = [request for request in asked if request.has_header("Range")]
    assert {request.get_header("If-range") for request in parts} == {condition}


def test_another_version_than_the_listed_is_not_opened(files):
    with web(files, headers=lambda n: {"ETag": f'"{n}"'}) as (address, _):
        (source,) = find_sources(f"{address}/a.jsonl")
        with pytest.raises(CorpusError, match=r"cannot open .*it changed"):
            source.open()


def test_who_opens_it_by_a_plan_knows_the_version_that_was_listed(files):
    with web(files, headers=lambda n: {"ETag": f'"{n}"'}) as (address, _):
        plan = plan_whole(f"{address}/a.jsonl")
        told = Plan.from_json(json.loads(json.dumps(plan.to_json())))
        assert told == plan
        assert told.digest == plan.digest
        with pytest.raises(CorpusError, match=r"cannot open .*it changed"):
            told.sources[0].open()


def test_weak_tags_and_no_tags_are_taken_up_too(files, monkeypatch):
    monkeypatch.setattr(web_files.time, "sleep", lambda seconds: None)
    date = "Mon, 02 Jan 2023 00:00:00 GMT"
    for headers in ({"ETag": 'W/"tag"'}, {"ETag": 'W/"tag"', "Last-Modified": date}, {"Last-Modified": date}, {}):
        with web(files, breaks_after=3000, headers=lambda n, own=headers: own) as (address, seen):
            assert texts(f"{address}/a.jsonl") == texts(files / "a.jsonl")
            assert seen["range"] > 2


def test_a_server_without_ranges(files, monkeypatch):
    monkeypatch.setattr(web_files.time, "sleep", lambda seconds: None)
    with web(files, ranges=False) as (address, _):
        # A stream needs none, but it is read twice: once for a look at its head.
        assert texts(f"{address}/a.jsonl") == texts(files / "a.jsonl")
        with pytest.raises(CorpusError, match="does not give parts of a file"):
            texts(f"{address}/deep/deeper/c.parquet")


def test_names_that_are_not_ascii(files, tmp_path):
    (tmp_path / "ein Körper 100%.jsonl").write_bytes((files / "a.jsonl").read_bytes())
    with web(tmp_path) as (address, _):
        for name in ("ein Körper 100%25.jsonl", "ein%20K%C3%B6rper%20100%25.jsonl"):
            (source,) = find_sources(f"{address}/{name}")
            assert source.label == f"{address}/{name}"
            assert [text for _, _, text in texts(source.path)] == [text for _, _, text in texts(files / "a.jsonl")]


@pytest.mark.parametrize(
    "address",
    [
        "https://[::1/x.jsonl",
        f"http://{'a' * 70}.example/x",
        "http://ä..b/x",
        "http://host:abc/x",
        "https:///x",
        "http://",
    ],
)
def test_web_addresses_that_are_none(address):
    with pytest.raises(CorpusError, match="cannot read http"):
        find_sources(address)


@pytest.mark.parametrize("length", ["abc", "-5", "1_0"])
def test_a_size_that_is_none(files, length):
    with (
        web(files, headers=lambda n: {"Content-Length": length}) as (address, _),
        pytest.raises(CorpusError, match="its size is no number"),
    ):
        find_sources(f"{address}/a.jsonl")


def test_what_the_web_has_not(files):
    with web(files) as (address, _), pytest.raises(CorpusError, match=r"cannot read http://.*none.jsonl.*answers 404"):
        find_sources(f"{address}/none.jsonl")
    with pytest.raises(CorpusError, match="cannot read http://127"):
        find_sources("http://127.0.0.1:9/x.jsonl")


def test_other_addresses_are_refused():
    with pytest.raises(CorpusError, match="ftp://host/x: only hf://"):
        find_sources("ftp://host/x")
