"""A corpus that is read in pieces, in any order, gives the summary and the shards of one that is read in one go."""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from columnar_files import BESIDE, RECORDS, TABLE, arrow, parquet
from corpus_shapes import CONTAINERS, SHAPES, lines
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcompat.corpus import CorpusSummary, prepare
from fastcompat.corpus.containers import SourceReader, Stretch, file_sha256
from fastcompat.corpus.phases import PieceReader, PieceResult, RowsOnDisk, pieces_in_use
from fastcompat.corpus.pieces import Part, Piece, Plan, in_pieces, line_ends, plan_whole
from fastcompat.corpus.reading import opening_of
from fastcompat.corpus.sources import find_sources
from fastcompat.errors import CorpusError

ROW = '{"prompt": "p", "response": "r"}'


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes | str) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def prepare_plan(plan: Plan, home: Path, *, seed: int = 0) -> CorpusSummary:
    """Every task of a plan, in any order, each as if by a process of its own."""
    draw = random.Random(seed)
    home.mkdir()
    runs = home.with_name(f"{home.name} runs")
    results: dict[str, PieceResult] = {}
    while left := [piece for piece in pieces_in_use(plan, results) if piece.name not in results]:
        piece = draw.choice(left)
        own = runs / piece.name
        own.mkdir(parents=True)
        reader = PieceReader(plan, piece, own, stage_bytes=10_000, home=home, note=lambda *_: None)
        results[piece.name] = PieceResult.from_json(json.loads(json.dumps(reader.read().to_json())))
    hashes = {index: file_sha256(plan.sources[index]) for index in plan.instead}
    rows = RowsOnDisk(plan, results, hashes, lambda name: runs / name)
    buckets = draw.sample(rows.buckets, len(rows.buckets))
    shards = {bucket: rows.write_shard(bucket, home / rows.shard_name(bucket), home=home) for bucket in buckets}
    return rows.summary([shards[bucket] for bucket in rows.buckets])


def shard_bytes(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def check(inputs: Any, *, piece_bytes: int = 50, least_stretches: int = 0, seed: int = 0, **options: Any) -> Plan:
    """That a corpus is the same in pieces; how it was cut."""
    shards, pieces = Path(f"whole-{seed}"), Path(f"pieces-{seed}")
    sizes = {
        "target_shard_bytes": 1 + sum(source.size for source in find_sources(inputs)) // 4,
        "target_unit_chars": 200,
    }
    whole = prepare(inputs, shards, **sizes, **options)
    plan = in_pieces(plan_whole(inputs, **sizes, **options), piece_bytes)
    assert sum(map(len, plan.stretches.values())) >= least_stretches
    assert sum(piece.n_bytes for piece in plan.pieces) == plan.n_bytes
    cut = Plan.from_json(json.loads(json.dumps(plan.to_json())))
    assert cut == plan
    assert prepare_plan(cut, pieces, seed=seed) == whole
    assert shard_bytes(pieces) == shard_bytes(shards)
    return plan


def read_whole(plan: Plan) -> bool:
    """Whether the only file's stretches turn out not to give what it gives in one go."""
    results = {}
    for piece in plan.pieces:
        own = Path("again", piece.name)
        own.mkdir(parents=True, exist_ok=True)
        reader = PieceReader(plan, piece, own, stage_bytes=1 << 20, home=own, note=lambda *_: None)
        results[piece.name] = reader.read()
    return [piece.name for piece in pieces_in_use(plan, results)] == ["whole-00000"]


# --- every shape and container


CUT = ("jsonl", "jsonl, escaped, with BOM and CRLF", "parquet")


@pytest.mark.parametrize(
    ("shape", "container"),
    [*((shape, container) for shape in SHAPES for container in CUT), *(("messages", name) for name in CONTAINERS)],
)
def test_every_shape_in_every_container(shape: str, container: str, tmp_path: Path) -> None:
    records, _ = SHAPES[shape]
    named, _ = CONTAINERS[container](records, tmp_path)
    lined = container in ("jsonl", "ndjson", "json lines named json", "jsonl, escaped, with BOM and CRLF")
    stretches = 3 if lined else 2 if container == "parquet" and len(records) > 4 else 0
    check(named, piece_bytes=100 if lined else 300, least_stretches=stretches)


def test_files_large_and_small_side_by_side() -> None:
    draw = random.Random(0)
    for k in range(12):
        records = [{"prompt": f"p{draw.randrange(20)}", "response": f"{k} {i}"} for i in range(draw.choice((1, 90)))]
        packed = gzip.compress(lines(records), mtime=0)
        write(f"d/{k:02}.jsonl{'.gz' if k % 3 == 0 else ''}", packed if k % 3 == 0 else lines(records))
    write("d/b.json", json.dumps([{"prompt": "p1", "response": "in a list"}] * 30))
    table = pa.Table.from_pylist([{"prompt": f"p{i % 7}", "response": f"{i}"} for i in range(99)])
    parquet("d/c.parquet", table, row_group_size=20)
    write("d/empty.jsonl", b"")
    numbers = [len(check("d", piece_bytes=n, seed=n).pieces) for n in (1, 200, 1500, 5000, 1 << 20)]
    assert numbers == sorted(set(numbers), reverse=True)
    assert numbers[0] > 200
    assert numbers[-1] == 1


@pytest.mark.parametrize("options", [{"overrides": {"response": "answer"}}, {"first_shard": 3}, {"max_unit_rows": 2}])
def test_with_options(options: dict[str, Any]) -> None:
    records = [{"prompt": f"p{i % 5}", "response": f"r{i}", "answer": f"a{i}"} for i in range(50)]
    check(write("a.jsonl", lines(records)), least_stretches=20, **options)


# --- JSON lines, cut anywhere


def cut_at(whole: Plan, places: Iterable[int]) -> Plan:
    """The plan of one file, cut at these ends of lines."""
    (source,) = whole.sources
    bounds = [0, *places, source.size]
    parts = [Part(0, Stretch("jsonl", begin, end)) for begin, end in pairwise(bounds)]
    pieces = [Piece(f"piece-{k:05d}", (k,), end - begin, begin) for k, (begin, end) in enumerate(pairwise(bounds))]
    instead = {0: Piece("whole-00000", (len(parts),), source.size)}
    return replace(whole, parts=(*parts, Part(0)), pieces=tuple(pieces), instead=instead)


ODD_LINES = [
    ROW,
    '{"prompt": "p", "response": "é🐈"}',
    '{"prompt": "p", "resp',
    "[]",
    "  \t",
    '{"prompt": "p", "response": null}',
    f"{ROW}{ROW}",
    f"{ROW},",
    "\0\0\0",
    '{"prompt": "p", "response": "r", "late": 1}',
    '{"prompt": "p", "response": "r", "response": "s"}',
    '{"prompt": "a\tb", "prompt": "c", "response": "r"}',
    '{"instruction": "p", "output": "r", "score": 7}',
    '{"messages": [{"role": "narrator", "content": "x"}, {"role": "assistant", "content": "y"}]}',
    '{"messages": [{"role": "user", "content": "x"}], "query": "p", "answer": "r"}',
    '{"messages": [{"role": "assistant", "content": "x"}], "query": "p", "answer": "r"}',
    '{"response": 5, "prompt": "p"}',
    '{"x": 1}',
]
LINE_ENDS = [b"\n", b"\r\n", b"\n\n", b"\r", b"\n\xef\xbb\xbf"]


@given(
    head=st.sampled_from([b"", b"\xef\xbb\xbf", b"\n"]),
    found=st.lists(
        st.tuples(
            st.sampled_from(LINE_ENDS),
            st.one_of(st.sampled_from(ODD_LINES).map(str.encode), st.binary(max_size=9)),
        ),
        max_size=9,
    ),
    tail=st.sampled_from([b"", b"\n"]),
    small_blocks=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_random_lines_cut_at_every_byte(
    tmp_path_factory: pytest.TempPathFactory,
    head: bytes,
    found: list[tuple[bytes, bytes]],
    tail: bytes,
    small_blocks: bool,
) -> None:
    content = head + ROW.encode() + b"".join(end + line for end, line in found) + tail
    directory = tmp_path_factory.mktemp("lines")
    path = directory / "a.jsonl"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        if small_blocks:  # in which names twice are looked for in the first lines only
            patch.setattr("fastcompat.corpus.bytestream.BLOCK_BYTES", 40)
        (source,) = find_sources(path)
        if SourceReader(source).container != "jsonl" or opening_of(source, None) is None:
            return
        whole = outcome(lambda: prepare(path, directory / "whole"), directory / "whole")
        places = {end for place in range(len(content) + 1) for end in line_ends(source, [place])}
        for name, cuts in [("all", sorted(places)), *((str(place), [place]) for place in places)]:
            plan = cut_at(plan_whole(path), cuts)
            assert outcome(lambda: prepare_plan(plan, directory / name), directory / name) == whole  # noqa: B023


def outcome(prepared: Callable[[], CorpusSummary], shards: Path) -> tuple[object, dict[str, bytes]]:
    """The summary, or what is wrong with the corpus, and the shards."""
    try:
        return prepared(), shard_bytes(shards)
    except CorpusError as error:
        return str(error), shard_bytes(shards)


@pytest.mark.parametrize("place", range(130))
def test_lines_begin_behind_line_ends_only(place: int) -> None:
    content = b"\xef\xbb\xbfab\r\n\n" + "é🐈".encode() * 9 + b"\ncd\r\n" + b"x" * 30 + b"\n"
    (source,) = find_sources(write("a.jsonl", content))
    starts = [k for k in range(1, len(content)) if content[k - 1 : k] == b"\n"]
    assert line_ends(source, [place]) == [k for k in starts if k >= place][:1]
    every = line_ends(source, range(place, len(content)))
    assert every == [k for k in starts if k >= place]


@pytest.mark.parametrize("seed", range(8))
def test_lines_longer_than_what_is_read_at_a_time_and_than_what_is_read_at_all(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line is too long by the blocks that it fills, which are those of the whole file."""
    monkeypatch.setattr("fastcompat.corpus.bytestream.BLOCK_BYTES", 100)
    monkeypatch.setattr("fastcompat.corpus.jsonrecords.MAX_RECORD_BYTES", 1000)
    draw = random.Random(seed)
    sizes = [draw.choice((10, 90, 300, 1000, 1080, 1100, 1150, 2500)) for _ in range(40)]
    records = [{"prompt": f"p{i % 5}", "response": "x" * draw.randint(size - 9, size)} for i, size in enumerate(sizes)]
    plan = check(
        write("a.jsonl", lines([{"prompt": "p", "response": "r"}, *records])), piece_bytes=draw.randint(50, 900)
    )
    assert not read_whole(plan)
    (file,) = prepare("a.jsonl", "out").files
    assert any("longer than" in reason for reason in file.reasons)


def test_a_long_line_over_several_stretches() -> None:
    records = [{"prompt": "p", "response": "x" * size} for size in (9, 2_500_000, 9, 9, 1_200_000, 9)]
    check(write("a.jsonl", lines(records)), piece_bytes=500_000, least_stretches=3)


# --- what a stretch cannot know


def without_names_twice(n_bytes: int) -> bytes:
    """Lines of so many bytes, about."""
    line = json.dumps({"prompt": "p", "response": "r" * 5000}).encode() + b"\n"
    return line * -(-n_bytes // len(line))


TWICE = b'{"prompt": "p", "response": "r", "response": "s"}\n'
CONTROL = b'{"prompt": "a\tb", "response": "r", "response": "s"}\n'


@pytest.mark.parametrize(
    ("late", "is_whole"),
    [
        (TWICE * 9 + without_names_twice(700_000) + TWICE, False),
        (CONTROL + TWICE * 9 + without_names_twice(700_000) + TWICE, True),
        # What is found in the last stretch decides of nothing behind it.
        (TWICE + without_names_twice(700_000) + CONTROL + TWICE, False),
    ],
)
def test_names_twice_that_are_first_found_late(late: bytes, is_whole: bool) -> None:
    # Past the first lines, in which they are looked for.
    content = without_names_twice(1_200_000) + late
    plan = check(write("a.jsonl", content), piece_bytes=600_000, least_stretches=3)
    assert read_whole(plan) is is_whole


def test_records_whose_form_was_read_otherwise_before() -> None:
    asked = b'{"messages": [{"role": "user", "content": "x"}], "query": "p", "answer": "r"}\n'
    answered = b'{"messages": [{"role": "assistant", "content": "x"}], "query": "p", "answer": "r"}\n'
    plain = lines([{"prompt": "p", "response": f"r{i}"} for i in range(70)])
    for seed, (content, is_whole) in enumerate(
        [(asked + plain + asked, False), (asked + plain + answered, True), (answered + plain + asked, True)]
    ):
        plan = check(write("a.jsonl", plain + content), piece_bytes=500, least_stretches=5, seed=seed)
        assert read_whole(plan) is is_whole


def test_more_forms_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat.corpus.formats.REMEMBERED_FORMS", 5)
    monkeypatch.setattr("fastcompat.corpus.accounts.REMEMBERED_FORMS", 5)
    records = [{"instruction": "p", "output": "r", f"k{i % 7}": "x"} for i in range(30)]
    plain = [{"prompt": "p", "response": f"r{i}"} for i in range(70)]
    for seed, n_forms in enumerate((5, 7)):
        content = lines([*plain, *[{"instruction": "p", "output": "r", f"k{i % n_forms}": "x"} for i in range(30)]])
        plan = check(write("a.jsonl", content), piece_bytes=300, least_stretches=5, seed=seed)
        assert read_whole(plan) is (n_forms == 7)
    assert records


def test_what_is_counted_is_that_of_the_file() -> None:
    """Few reasons, roles and columns are named: the first ones, in the order of the file."""
    draw = random.Random(1)
    found: list[Any] = [{"prompt": "p", "response": f"r{i}"} for i in range(80)]
    for _ in range(300):
        found.append({"prompt": "p", "response": {"k" * draw.randrange(1, 30): 1}})
        found.append({"prompt": "p", "response": "r", f"late {draw.randrange(200)}": draw.choice((None, 1))})
        turns = [{"role": f"role {draw.randrange(300)}", "content": "x"}, {"role": "assistant", "content": "x"}]
        found.append({"messages": [*turns, *turns[:1]]})
    content = lines(found) + b'{"prompt": "p"\n' * 20 + b"[1]\n" * 5
    plan = check(write("a.jsonl", content), piece_bytes=2000, least_stretches=20)
    assert not read_whole(plan)
    (file,) = prepare("a.jsonl", "out").files
    assert len(file.reasons) == 9
    assert len(file.unknown_roles) > 150
    assert len(file.late_columns) == 64


def test_a_struct_for_a_generator_that_comes_late() -> None:
    records = [{"instruction": f"p{i}", "g": {"content": "r"}} for i in range(80)]
    records[70]["h"] = {"content": "late"}
    records[75]["h"] = {"content": "late"}
    records[76]["x"] = 5  # type: ignore[assignment]
    plan = check(write("a.jsonl", lines(records)), piece_bytes=300, least_stretches=9)
    assert not read_whole(plan)


def test_the_first_line_that_is_broken_is_named_by_its_number() -> None:
    content = lines([{"prompt": "p", "response": f"r{i}"} for i in range(80)]) + b"\n\n{broken\n" * 9
    check(write("a.jsonl", content), least_stretches=20)
    (file,) = prepare("a.jsonl", "out").files
    assert next(iter(file.reasons)).startswith("line 83: broken JSON")


def test_with_strict_the_record_is_named_that_reading_the_file_in_one_go_names() -> None:
    content = lines([{"prompt": "p", "response": f"r{i}"} for i in range(80)]) + b"\n{broken\n{broken\n"
    with pytest.raises(CorpusError) as first:
        prepare(write("a.jsonl", content), "out", strict=True)
    plan = in_pieces(plan_whole("a.jsonl", strict=True), 50)
    assert len(plan.stretches[0]) > 20
    with pytest.raises(CorpusError) as second:
        prepare_plan(plan, Path("pieces"))
    assert str(second.value) == str(first.value)
    assert "a.jsonl, record 80: line 82" in str(first.value)


def test_a_file_that_cannot_be_cut_is_whole() -> None:
    short = ROW.encode() * 99
    for name, content in {
        "a.jsonl": short,  # one line
        "b.jsonl": lines([{"x": 1}]) + b"\n" * 999,  # the only record may be a document
        "c.jsonl": gzip.compress(lines(RECORDS), mtime=0),
        "d.json": json.dumps(RECORDS).encode(),
    }.items():
        write(name, content)
        assert in_pieces(plan_whole(name), 50).instead == {}


# --- Parquet


def test_row_groups_of_every_type() -> None:
    columns = {name: TABLE[name] for name in TABLE.column_names}
    for name in ("json", "map", "view", "decimal", "fixed bytes", "embedding", "fields twice", "times", "bad text"):
        columns[name.replace(" ", "_")] = BESIDE[name]
    parquet("a.parquet", pa.table(columns), row_group_size=7)
    plan = check("a.parquet", piece_bytes=2000, least_stretches=10)
    assert not read_whole(plan)


def test_a_damaged_row_group_is_read_with_the_whole_file() -> None:
    texts = [random.Random(i).randbytes(500).hex() for i in range(400)]
    table = pa.Table.from_pylist([{"prompt": f"p{i}", "response": text} for i, text in enumerate(texts)])
    plain = {"use_dictionary": False, "compression": "none", "data_page_size": 4000, "write_batch_size": 4}
    parquet("a.parquet", table, row_group_size=50, write_page_checksum=True, **plain)
    data = bytearray(Path("a.parquet").read_bytes())
    place = data.index(texts[150].encode())
    data[place : place + 10] = b"x" * 10
    Path("a.parquet").write_bytes(data)
    plan = check("a.parquet", piece_bytes=60_000, least_stretches=5)
    assert read_whole(plan)


def test_columnar_files_that_are_cut_off_or_foreign_are_whole() -> None:
    parquet("a.parquet", TABLE, row_group_size=7)
    Path("a.parquet").write_bytes(Path("a.parquet").read_bytes()[:-100])
    arrow("b.arrow", TABLE)
    write("c.jsonl", lines(RECORDS))
    plan = check(["a.parquet", "b.arrow", "c.jsonl"], piece_bytes=300)
    assert list(plan.instead) == [2]


# --- reading that fails


class Failing:
    """A file that cannot be read beyond a place."""

    def __init__(self, path: str, place: int) -> None:
        self._file = open(path, "rb", buffering=0)  # noqa: SIM115
        self._place = place

    def read(self, size: int) -> bytes:
        if self._file.tell() + size > self._place:
            raise OSError(5, "Input/output error")
        return self._file.read(size)

    def seek(self, place: int) -> int:
        return self._file.seek(place)

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Failing:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def test_a_disk_that_fails_in_one_of_the_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastcompat.corpus.bytestream.BLOCK_BYTES", 100)
    write("a.jsonl", lines(RECORDS))
    plan = in_pieces(plan_whole("a.jsonl", target_shard_bytes=5000), 500)
    assert len(plan.stretches[0]) > 10
    monkeypatch.setattr("fastcompat.corpus.sources.Source.open", lambda source: Failing(source.path, 5000))
    whole = prepare("a.jsonl", "whole", target_shard_bytes=5000)
    assert whole.statuses["unreadable"] == 1
    assert prepare_plan(plan, Path("pieces")) == whole
    assert shard_bytes(Path("pieces")) == shard_bytes(Path("whole"))
