"""Inputs become the right files, and every container gives its records, whole or up to where it breaks."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
import zlib
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_shapes import CONTAINERS, SHAPES, arrow_file, arrow_stream, lines, parquet, saved_dataset, zstd
from fsspec.implementations.memory import MemoryFileSystem
from hypothesis import given
from hypothesis import strategies as st

from fastcompat.corpus.bytestream import ByteStream
from fastcompat.corpus.containers import SourceReader, file_sha256
from fastcompat.corpus.filenames import generator_name
from fastcompat.corpus.jsonrecords import whole_lines
from fastcompat.corpus.records import Broken, Unreadable
from fastcompat.corpus.sources import Source, find_inputs, find_sources
from fastcompat.errors import CorpusError

RECORDS = [{"prompt": f"p{i}", "response": f"r{i} é" * 3} for i in range(2000)]


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(path: str) -> list[Any]:
    (source,) = find_sources(path)
    return [record for batch in SourceReader(source) for record in batch.records]


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def without_nulls(value: Any) -> Any:
    """Arrow fills a struct's missing keys with null."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


@pytest.mark.parametrize("container", CONTAINERS)
def test_container_gives_the_records(container: str, tmp_path: Path) -> None:
    records = SHAPES["completions (UltraFeedback)"][0]
    named, generator = CONTAINERS[container](records, tmp_path)
    sources = find_sources(named)
    found = [record for source in sources for batch in SourceReader(source) for record in batch.records]
    assert without_nulls(found) == records
    assert {source.generator for source in sources} == {generator}


@pytest.mark.parametrize(
    ("name", "content", "container"),
    [
        ("a.jsonl", lines, "jsonl"),
        ("a.jsonl", lambda r: gzip.compress(lines(r), mtime=0), "jsonl.gz"),
        ("a.json.zst", lambda r: zstd(json.dumps(r).encode()), "json.zst"),
        ("a.jsonl", parquet, "parquet"),
        ("a.parquet", arrow_file, "arrow"),
        ("a.feather", arrow_stream, "arrow stream"),
        ("a.parquet", lines, "jsonl"),
        ("a.unknown", lines, "jsonl"),
    ],
)
def test_content_decides_the_container(name: str, content: Any, container: str) -> None:
    (source,) = find_sources(write(name, content(RECORDS[:20])))
    reader = SourceReader(source)
    assert [record for batch in reader for record in batch.records] == RECORDS[:20]
    assert reader.container == container
    assert reader.sha256() == file_sha256(source) != ""


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_empty_file_has_no_records(name: str) -> None:
    assert read(write(name, b"")) == []


def test_empty_contents_have_no_records() -> None:
    assert read(write("a.jsonl.gz", gzip.compress(b"", mtime=0))) == []
    assert read(write("a.jsonl", b"\n \n\t\r\n")) == []
    assert read(write("a.json", b" [ ] ")) == []
    assert read(write("a.parquet", parquet(RECORDS)[:0] + _empty_parquet())) == []


def _empty_parquet() -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"prompt": pa.array([], pa.string())}), sink)
    return sink.getvalue().to_pybytes()


# --- JSON


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a", "resp', "line 3: broken JSON (Unterminated string"),
        (b"not json", "line 3: broken JSON (Expecting value at character 1)"),
        (b'{"a": 1} and more', "line 3: broken JSON"),
        (b"[1, 2]", "line 3: not a JSON object but a list of numbers"),
        (b"17", "line 3: not a JSON object but a number"),
        (b"null", "line 3: not a JSON object but null"),
        (b'{"a": ' + b"[" * 100_000 + b"}", "line 3: "),
    ],
)
def test_a_broken_line_costs_only_itself(line: bytes, reason: str) -> None:
    first, broken, last = read(write("a.jsonl", b'{"a": 1}\n\n' + line + b'\n{"a": 2}'))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, Broken)
    assert broken.reason.startswith(reason)


def test_what_only_one_value_lacks_costs_only_that_value() -> None:
    """Bytes that are no UTF-8 become unpaired surrogates, for which the row is marked where it needs the text."""
    data = b'{"a": "\xff\xfe", "b": 1}\n{"a": ' + b"9" * 5000 + b', "b": 2}\n{"a": NaN, "b": 3}\n'
    records = read(write("a.jsonl", data))
    assert [record["b"] for record in records] == [1, 2, 3]
    assert records[0]["a"] == "\udcff\udcfe"


def test_several_records_on_one_line() -> None:
    assert read(write("a.jsonl", b'{"a": 1} {"b": 2}\n{"a": 3}\n')) == [{"a": 1}, {"b": 2}, {"a": 3}]


def test_broken_first_lines_do_not_change_the_layout() -> None:
    for start in (b"[INFO] started\n", b'{"prompt": "a", \n', b"# comment\n"):
        for name in ("a.jsonl", "a.json"):
            if name == "a.json" and start.startswith(b"["):
                continue  # there a bracket does begin an array
            broken, good = read(write(name, start + b'{"a": 1}\n'))
            assert isinstance(broken, Broken)
            assert good == {"a": 1}


@pytest.mark.parametrize(
    ("text", "n_before", "reason"),
    [
        ('[{"a": 0}, {"a": 1}, {"a": }, {"a": 3}]', 2, "broken JSON in record 2"),
        ('[{"a": 0}, {"a": 1}', 2, "the array ends early"),
        ('[{"a": 0}, {"a": "x', 1, "the file ends within it"),
        ('[{"a": 0}] trailing', 1, "more text after the array's end"),
        ('{\n "a": 0\n}\n{\n "a": 1', 1, "the file ends within it"),
    ],
)
def test_a_broken_document_costs_its_rest(text: str, n_before: int, reason: str) -> None:
    *before, marker = read(write("a.json", text.encode()))
    assert before == [{"a": i} for i in range(n_before)]
    assert isinstance(marker, Unreadable)
    assert reason in marker.reason


def test_elements_that_are_no_objects_keep_their_place() -> None:
    found = read(write("a.json", b'[{"a": 1}, 12345, "x", null, {"a": 2}]'))
    assert [isinstance(record, Broken) for record in found] == [False, True, True, True, False]


def test_documents_are_read_in_pieces() -> None:
    """A long array with values across every block boundary, in memory that the array does not decide."""
    records = [{"i": i, "text": "é" * (i % 5000)} for i in range(8000)]
    path = write("a.json", json.dumps(records, ensure_ascii=False).encode())
    assert read(path) == records
    tracemalloc.start()
    (source,) = find_sources(path)
    assert sum(len(batch.records) for batch in SourceReader(source)) == len(records)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert source.size > 32e6
    assert peak < 26e6  # one batch of 4 Mi characters and one window, twice for the batch being built


@given(st.lists(st.binary(max_size=12)), st.integers(1, 7))
def test_lines_are_whole_wherever_blocks_end(texts: list[bytes], size: int) -> None:
    data = b"\n".join(texts)
    blocks: Any = [data[i : i + size] for i in range(0, len(data), size)]
    chunks = list(whole_lines(blocks))
    assert b"".join(chunk for chunk in chunks if chunk) == data
    assert all(chunk is not None and chunk.endswith(b"\n") for chunk in chunks[:-1])


def test_a_line_beyond_the_limit_is_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat.corpus.jsonrecords.MAX_RECORD_BYTES", 3 << 20)
    long = json.dumps({"a": "x" * (8 << 20)}).encode()
    first, broken, last = read(write("a.jsonl", b'{"a": 1}\n' + long + b'\n{"a": 2}\n'))
    assert (first, last) == ({"a": 1}, {"a": 2})
    assert isinstance(broken, Broken)
    assert "line 2: longer than 3 MiB" in broken.reason
    assert [type(record) for record in read(write("b.jsonl", long))] == [Broken]


def test_a_line_of_50_mb() -> None:
    text = "é" * (25 << 20)
    before, long, after = read(write("a.jsonl", lines([{"a": 1}, {"a": text}, {"a": 2}])))
    assert long["a"] == text
    assert (before, after) == ({"a": 1}, {"a": 2})


# --- files that end early


@pytest.mark.parametrize("kept", [0.05, 0.5, 0.99])
@pytest.mark.parametrize("compress", [gzip.compress, zstd])
def test_truncated_compression_gives_all_before_the_break(compress: Any, kept: float) -> None:
    # Random text, so that the amount of data before the break can be told from the amount of the file.
    records = [{"a": os.urandom(60).hex()} for _ in range(20_000)]
    data = compress(lines(records))
    *before, marker = read(write("a.jsonl.x", data[: int(len(data) * kept)]))
    assert before == records[: len(before)]
    assert len(before) >= 20_000 * kept - 3000
    assert isinstance(marker, Unreadable)
    assert "truncated" in marker.reason


def test_damaged_compression_gives_all_before_the_break() -> None:
    records = [{"a": os.urandom(60).hex()} for _ in range(20_000)]
    data = bytearray(gzip.compress(lines(records), mtime=0))
    data[len(data) // 2 : len(data) // 2 + 200] = bytes(200)
    *before, marker = read(write("a.jsonl.gz", bytes(data)))
    assert isinstance(marker, Unreadable)
    assert "damaged" in marker.reason
    assert len(before) > 9_000
    assert before[:9_000] == records[:9_000]
    good = gzip.compress(lines(records[:10]), mtime=0)
    *before, marker = read(write("b.jsonl.gz", good + b"something else"))
    assert before == records[:10]
    assert isinstance(marker, Unreadable)


def test_gzip_that_unfolds_a_thousandfold_stays_small() -> None:
    member = zlib.compressobj(9, wbits=31)
    blank = b" " * (1 << 20)
    data = b"".join([*(member.compress(blank) for _ in range(200)), member.compress(b'\n{"a": 1}\n'), member.flush()])
    (source,) = find_sources(write("a.jsonl.gz", data))
    tracemalloc.start()
    sizes = [len(block) for block in ByteStream(source)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(sizes) == (200 << 20) + 10
    assert peak < 24e6
    assert read("a.jsonl.gz") == [{"a": 1}]


def test_truncated_parquet_is_one_marker() -> None:
    (marker,) = read(write("a.parquet", parquet(RECORDS)[:-40]))
    assert isinstance(marker, Unreadable)
    assert "Parquet" in marker.reason


def test_damage_in_parquet_costs_the_row_groups_that_have_it() -> None:
    data = bytearray(parquet(RECORDS))
    place = data.index(b"p1000")
    data[place - 60 : place] = bytes(60)
    found = read(write("a.parquet", bytes(data)))
    markers = [index for index, record in enumerate(found) if isinstance(record, Unreadable)]
    assert markers == [998, 999]  # of two rows each
    assert found[:998] + found[1000:] == RECORDS[:998] + RECORDS[1002:]
    assert "2 of the 2 rows of row group 499 cannot be read" in found[998].reason


@pytest.mark.parametrize("content", [arrow_file, arrow_stream])
def test_truncated_arrow_gives_the_batches_before(content: Any) -> None:
    data = content(RECORDS)
    *before, marker = read(write("a.arrow", data[: len(data) // 2]))
    assert isinstance(marker, Unreadable)
    assert before == RECORDS[: len(before)]
    assert len(before) > 500


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("a.jsonl", "{}".encode("utf-16"), "UTF-16"),
        ("a.zip", b"PK\x03\x04rest", "zip archive"),
        ("a.parquet.gz", gzip.compress(b"PAR1 and so on", mtime=0), "unpack it from .gz"),
        ("a.csv", b"prompt,response\na,b\n", "convert it to JSON lines"),
        ("a.csv.gz", gzip.compress(b"prompt,response\na,b\n", mtime=0), "convert it to JSON lines"),
        ("a.bin", bytes(100), "binary data"),
        ("a.parquet", b"garbage" * 10, "Parquet"),
    ],
)
def test_foreign_content_is_one_marker(name: str, content: bytes, reason: str) -> None:
    (marker,) = read(write(name, content))
    assert isinstance(marker, Unreadable)
    assert reason in marker.reason


def test_times_without_an_equivalent_in_python_cost_nothing() -> None:
    turn = pa.struct([("role", pa.string()), ("content", pa.string()), ("timestamp", pa.timestamp("ns", "Mars/Base"))])
    table = pa.table(
        {
            "messages": pa.array([[{"role": "user", "content": "a", "timestamp": None}]], pa.list_(turn)),
            "at": pa.array([10**18 + 1], pa.int64()).cast(pa.timestamp("ns", "Mars/Base")),
            "day": pa.array([5], pa.date32()),
            "price": pa.array([1], pa.decimal128(4, 2)),
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    (record,) = read(write("a.arrow", bytes(sink.getvalue())))
    assert record["messages"] == [{"role": "user", "content": "a", "timestamp": None}]
    assert (record["at"], record["day"]) == (10**18 + 1, 5)


def test_columns_of_numbers_are_not_unfolded_and_bad_text_costs_its_row() -> None:
    texts = pa.StringArray.from_buffers(3, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc"))
    table = pa.table({"text": texts, "embedding": [[0.5] * 4] * 3})
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    records = read(write("a.arrow", sink.getvalue().to_pybytes()))
    assert [record["text"] for record in records] == ["a", "\udcff", "c"]
    assert {repr(record["embedding"]) for record in records} == {"a list of numbers"}


# --- inputs


def labels(*inputs: str) -> list[str]:
    return [source.label for source in find_sources(inputs)]


def test_labels_are_paths_as_given(tmp_path: Path) -> None:
    for name in ("d/b.jsonl", "d/a.jsonl", "d/x/c.parquet", "d/x/.git/z.jsonl", "d/state.json", "d/readme.md"):
        write(name, b"{}")
    write("d/_delta_log/00000000000000000000.json", b'{"commitInfo": {}}')
    assert labels("d") == ["d/a.jsonl", "d/b.jsonl", "d/x/c.parquet"]
    assert labels("d/x/../a.jsonl") == ["d/x/../a.jsonl"]
    assert labels("d/b.jsonl", "d/a.jsonl") == ["d/b.jsonl", "d/a.jsonl"]
    assert labels(str(tmp_path / "d" / "a.jsonl")) == [(tmp_path / "d" / "a.jsonl").as_posix()]
    assert labels("d/*.jsonl") == ["d/a.jsonl", "d/b.jsonl"]
    assert labels("d/**/*.parquet", "d/**/*") == ["d/x/c.parquet", "d/a.jsonl", "d/b.jsonl"]
    assert labels("d/*") == ["d/a.jsonl", "d/b.jsonl", "d/x/c.parquet"]
    assert labels("*/*.md") == ["d/readme.md"]


def test_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    write("d/a.jsonl", b"{}")
    assert labels("d", "d/*.jsonl", "./d/a.jsonl", "d/../d/a.jsonl", str(tmp_path / "d")) == ["d/a.jsonl"]


def test_names_with_glob_characters_are_meant_literally() -> None:
    write("a[1].jsonl", b"{}")
    write("a1.jsonl", b"{}")
    assert labels("a[1].jsonl") == ["a[1].jsonl"]


def test_links_to_directories_are_followed_without_loops() -> None:
    write("d/x/a.jsonl", b"{}")
    os.symlink("..", "d/x/up")
    os.symlink("d/x", "link")
    assert labels("d") == ["d/x/a.jsonl"]
    assert labels("link") == ["link/a.jsonl"]


def test_a_file_that_a_dataset_misses_is_reported() -> None:
    saved_dataset(RECORDS[:4], Path("ds"))
    os.unlink("ds/data-00001-of-00002.arrow")
    with pytest.raises(CorpusError, match=r"ds/data-00001-of-00002.arrow: missing, though state.json names it"):
        find_sources("ds")


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ("aplaca.jsonl", r"aplaca.jsonl does not exist. Did you mean alpaca.jsonl\?"),
        ("nowhere/a.jsonl", "there is no directory nowhere"),
        ("*.parquet", r"no file matches \*.parquet"),
        ("hollow", "the directory hollow holds no corpus file; known endings: .jsonl"),
        ("ftp://bucket/a.jsonl", "only hf://, s3://, gs://, az:// and https:// addresses and local paths"),
        ("hf://org/name", "hf://datasets/ORG/NAME"),
        ("hf://datasets/org/name", "cannot list hf://datasets/org/name: .*download the files"),
        ("pipe", "not a regular file"),
    ],
)
def test_inputs_that_name_nothing(named: str, message: str) -> None:
    write("alpaca.jsonl", b"{}")
    write("hollow/notes.txt", b"")
    os.mkfifo("pipe")
    with pytest.raises(CorpusError, match=message) as caught:
        find_sources(named)
    assert "\n" not in str(caught.value)


def test_no_inputs() -> None:
    with pytest.raises(CorpusError, match="no input"):
        find_sources([])


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("a/llama-3.1.jsonl", "llama-3.1"),
        ("qwen2.5-7b.jsonl.gz", "qwen2.5-7b"),
        ("a/gemma.json.zst", "gemma"),
        ("x/train.jsonl", "x"),
        ("zoo/llama/data-00000-of-00001.arrow", "llama"),
        ("zoo/llama/train/data-00003-of-00012.arrow", "llama"),
        ("zoo/llama/train-00000-of-00010.parquet", "llama"),
        ("zoo/qwen-00000-of-00010.parquet", "qwen"),
        ("train/data-00000-of-00001.arrow", "train"),
        ("hf://datasets/org/name@main/data/train-00000-of-00010.parquet", "name"),
        ("notes", "notes"),
        ("train.jsonl", "train"),
        ("./data/train.jsonl", "data"),
        ("gpt-4-0613.jsonl", "gpt-4-0613"),
        ("claude-3-5-sonnet-20240620.jsonl", "claude-3-5-sonnet-20240620"),
        ("checkpoint-500.jsonl", "checkpoint-500"),
        ("step-1000/train.jsonl", "step-1000"),
        ("gA/train-00000-of-00002-4746b8785c874cc7.parquet", "gA"),
        ("hf://datasets/org/name@refs%2Fconvert%2Fparquet/default/train/0000.parquet", "name"),
        ("default/train/0000.parquet", "train"),
        ("gA/data/part-00000.parquet", "gA"),
        ("gA/part-00000-5f2c-c000.snappy.parquet", "gA"),
        ("gA/train-0.jsonl", "gA"),
        ("gpt4/train.jsonl", "gpt4"),
        ("gpt4/responses.jsonl.gz", "gpt4"),
        ("gA/part-00000.snappy.parquet", "gA"),
        ("gA/384f2db278544945a92fc1b5dd715431-0.parquet", "gA"),
        ("gA/split=train/384f2db278544945a92fc1b5dd715431-0.parquet", "gA"),
        ("all/model=Qwen%2FQwen3/part-0.parquet", "Qwen/Qwen3"),
    ],
)
def test_generator_names(label: str, name: str) -> None:
    assert generator_name(label) == name


@pytest.mark.parametrize(
    ("names", "generators"),
    [
        (["llama-000", "llama-001", "llama-002"], {"llama"}),
        (["llama-001", "llama-002"], {"llama"}),
        (["llama-001", "llama-003"], {"llama-001", "llama-003"}),
        (["llama-1", "llama-2", "llama-3"], {"llama-1", "llama-2", "llama-3"}),
        (["gpt-4-0613", "gpt-4-1106"], {"gpt-4-0613", "gpt-4-1106"}),
        (["llama-000"], {"llama-000"}),
    ],
)
def test_numbers_are_those_of_shards_where_they_make_a_series(names: list[str], generators: set[str]) -> None:
    for name in names:
        write(f"d/{name}.jsonl", b"{}")
    assert {source.generator for source in find_sources("d")} == generators
    # One that is named alone, as an extension does it, is called as it would be among the others.
    assert {find_sources(f"d/{name}.jsonl")[0].generator for name in names} == generators


def test_what_may_be_data_is_not_left_out_in_silence(hub: MemoryFileSystem) -> None:
    for name in (
        "a.jsonl",
        "b.jsonl.7z",
        "c/x.csv",
        "README",
        "LICENSE.rst",
        "notes.txt",
        ".hidden.csv",
        "state.json",
    ):
        write(f"d/{name}", b"{}")
    assert find_inputs("d").left_out == ("d/b.jsonl.7z", "d/c/x.csv")
    assert find_inputs("d/*").left_out == ("d/b.jsonl.7z", "d/c/x.csv")
    assert find_inputs(["d/*.jsonl*", "d/b.jsonl.7z"]).left_out == ()
    assert find_inputs("d/a.jsonl").left_out == ()
    hub.pipe("/datasets/org/name/x.csv", b"a,b")
    assert find_inputs("hf://datasets/org/name", filesystem=hub).left_out == ("hf://datasets/org/name/x.csv",)


# --- the hub, through a filesystem in memory


@pytest.fixture
def hub() -> MemoryFileSystem:
    filesystem = MemoryFileSystem()
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]
    filesystem.pipe("/datasets/org/name/README.md", b"text")
    filesystem.pipe("/datasets/org/name/.cache/x.jsonl", b"{}")
    filesystem.pipe("/datasets/org/name/data/train-00000-of-00002.parquet", parquet(RECORDS[:3]))
    filesystem.pipe("/datasets/org/name/data/train-00001-of-00002.parquet", parquet(RECORDS[3:5]))
    filesystem.pipe("/datasets/org/name/more/llama.jsonl.zst", zstd(lines(RECORDS[5:7])))
    filesystem.pipe("/datasets/org/name/more/qwen.arrow", arrow_file(RECORDS[7:9]))
    filesystem.pipe("/datasets/org/name@v2/new.jsonl", lines(RECORDS[9:10]))
    return filesystem


@pytest.mark.parametrize(
    ("address", "first", "last"),
    [
        ("hf://datasets/org/name", 0, 9),
        ("hf://datasets/org/name/", 0, 9),
        ("hf://datasets/org/name/data", 0, 5),
        ("hf://datasets/org/name/data/*-00001-*.parquet", 3, 5),
        ("hf://datasets/org/name/more/*.jsonl.zst", 5, 7),
        ("hf://datasets/org/name/more/qwen.arrow", 7, 9),
        ("hf://datasets/org/name@v2", 9, 10),
    ],
)
def test_hub_addresses(hub: MemoryFileSystem, address: str, first: int, last: int) -> None:
    sources = find_sources(address, filesystem=hub)
    readers = [SourceReader(source) for source in sources]
    assert [record for reader in readers for batch in reader for record in batch.records] == RECORDS[first:last]
    assert all(len(reader.sha256()) == 64 for reader in readers)
    assert all(source.label.startswith("hf://datasets/org/name") and source.size for source in sources)


def test_hub_addresses_that_name_nothing(hub: MemoryFileSystem) -> None:
    for address in ("hf://datasets/org/none", "hf://datasets/org/name/none.jsonl"):
        with pytest.raises(CorpusError, match="does not exist on the hub"):
            find_sources(address, filesystem=hub)
    with pytest.raises(CorpusError, match="holds no corpus file"):
        find_sources("hf://datasets/org/name/*.csv", filesystem=hub)


def test_a_network_that_fails_is_no_damaged_file(hub: MemoryFileSystem) -> None:
    class Cut:
        def __init__(self, file: Any) -> None:
            self._file = file

        def read(self, size: int = -1) -> bytes:
            if self._file.tell() > 16:
                raise ConnectionResetError("connection reset")
            return self._file.read(min(size, 16) if size > 0 else size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self._file, name)

    class Flaky(MemoryFileSystem):
        cachable = False

        def open(self, path: str, mode: str = "rb", **settings: Any) -> Any:
            return Cut(super().open(path, mode, **settings))

    for name in ("more/llama.jsonl.zst", "more/qwen.arrow"):
        (source,) = find_sources(f"hf://datasets/org/name/{name}", filesystem=Flaky())
        with pytest.raises(CorpusError, match=rf"reading .*{name[5:]} failed: connection reset. Run the command again"):
            list(SourceReader(source))


def test_the_hubs_own_hash_is_taken_for_columnar_files(hub: MemoryFileSystem) -> None:
    (source,) = find_sources("hf://datasets/org/name/more/qwen.arrow", filesystem=hub)
    known = Source(label=source.label, path=source.path, generator="q", size=source.size, oid="0" * 64, filesystem=hub)
    reader = SourceReader(known)
    list(reader)
    assert reader.sha256() == "0" * 64
