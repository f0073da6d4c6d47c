"""Files become shards: every shape and container ends in the same rows, in bounded memory and always the same bytes."""

from __future__ import annotations

import errno
import gzip
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from corpus_shapes import CONTAINERS, SHAPES, lines, parquet
from hypothesis import given
from hypothesis import strategies as st

from fastcompat.corpus import CorpusSummary, PreparationProgress, compare_inputs, iter_responses, preparation, prepare
from fastcompat.corpus.partition import Bucket, Origins, Partition, bucket_of
from fastcompat.corpus.units import UnitSize
from fastcompat.errors import CorpusError, RunError, SchemaError
from fastcompat.rows.response import ROW_SCHEMA, Message, Response, from_table, prompt_id
from fastcompat.rows.status import Status


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes) -> str:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(content)
    return name


def pairs(n: int, *, prompts: int = 10, generator: str = "g", length: int = 10) -> list[dict[str, Any]]:
    return [{"prompt": f"p{i % prompts}", "response": f"{generator} {i} ".ljust(length, "x")} for i in range(n)]


def units(summary: CorpusSummary, directory: str = "out") -> list[list[Response]]:
    """Every unit's rows; what the summary says about shards and units is checked on the way."""
    found = []
    for shard in summary.shards:
        file = pq.ParquetFile(f"{directory}/{shard.name}", page_checksum_verification=True)
        assert file.schema_arrow.equals(ROW_SCHEMA)
        assert tuple(file.metadata.row_group(g).num_rows for g in range(file.num_row_groups)) == shard.units
        assert sum(shard.units) == shard.n_rows > 0
        for group in range(file.num_row_groups):
            table = file.read_row_group(group)
            rows = from_table(table)
            assert table["row_key"].to_pylist() == [row.row_key for row in rows]
            assert table["prompt_id"].to_pylist() == [row.prompt_id for row in rows]
            found.append(rows)
    return found


def rows_of(summary: CorpusSummary, directory: str = "out") -> list[Response]:
    """All rows, in the order of the files."""
    order = {file.label: number for number, file in enumerate(summary.files)}
    every = [row for unit in units(summary, directory) for row in unit]
    assert len({row.row_key for row in every}) == len(every)
    return sorted(every, key=lambda row: (order[row.source], row.row_index, row.response_index))


def shard_bytes(directory: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(directory).iterdir()}


# --- the same rows from every shape and container


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_in_every_container(shape: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records, expected = SHAPES[shape]
    for container, place in CONTAINERS.items():
        home = tmp_path / container
        home.mkdir()
        monkeypatch.chdir(home)
        named, own = place(records, home)
        summary = prepare(named, "out")
        rows = rows_of(summary)
        read = [(row.generator, tuple((role, content) for role, content, _ in row.messages)) for row in rows]
        assert read == [(name or own, turns) for name, turns in expected], container
        assert summary.statuses == {"ok": len(expected)}
        assert summary.generators == Counter(row.generator for row in rows)
        assert sum(file.n_records for file in summary.files) == len(records)
        assert list(iter_responses(named)) == rows
        assert not Path("out/.partition").exists()


# --- bad input


BAD_LINES = [
    (b'{"prompt": "a", "response": "fine"}', "ok"),
    (b'{"prompt": "a", "resp', "invalid"),
    (b'{"prompt": "a", "response": null}', "empty"),
    (b'{"prompt": "a", "response": "  "}', "empty"),
    (b'{"prompt": "a", "response": 5}', "invalid"),
    (b'{"prompt": "a", "response": "x\\ud800"}', "invalid"),
    (b'{"prompt": "a"}', "invalid"),
    (b'{"prompt": "a", "response": "\xff"}', "invalid"),
    (b"[]", "invalid"),
    (b'{"prompt": "a", "response": "' + b"y" * (50 << 20) + b'"}', "ok"),
    (b'{"id": 1, "prompt": "a", "response": "same"}', "ok"),
    (b'{"id": 1, "prompt": "a", "response": "same"}', "ok"),
]


def test_bad_lines_keep_their_place_with_a_status() -> None:
    write("a.jsonl", b"\n\n".join(line for line, _ in BAD_LINES))
    summary = prepare("a.jsonl", "out")
    rows = rows_of(summary)
    assert [(row.row_index, str(row.status)) for row in rows] == [
        (i, status) for i, (_, status) in enumerate(BAD_LINES)
    ]
    assert [bool(row.detail) for row in rows] == [status != "ok" for _, status in BAD_LINES]
    assert len(rows[9].messages[-1].content) == 50 << 20
    (file,) = summary.files
    assert (file.n_records, file.n_rows) == (12, 12)
    assert file.statuses == {"empty": 2, "invalid": 6, "ok": 4}


def test_a_missing_column_in_the_third_of_five_files() -> None:
    for number in range(5):
        records = [{"question": "q", "id": i} for i in range(3)] if number == 2 else pairs(3)
        write(f"d/f{number}.jsonl", lines(records))
    summary = prepare("d", "out")
    assert [dict(file.statuses) for file in summary.files] == [{"ok": 3}] * 2 + [{"invalid": 3}] + [{"ok": 3}] * 2
    assert [bool(file.mapping) for file in summary.files] == [True, True, False, True, True]
    details = {row.detail for row in rows_of(summary) if row.source == "d/f2.jsonl"}
    assert len(details) == 1
    assert "no response column" in (detail := details.pop())
    assert "this record has: question, id" in detail
    with pytest.raises(CorpusError, match=r"d/f2.jsonl, record 0: .*no response column.*--strict"):
        prepare("d", "strict", strict=True)


def test_the_first_file_may_be_the_bad_one() -> None:
    write("a.jsonl", lines([{"x": 1}]))
    write("b.jsonl", lines(pairs(2)))
    assert prepare(["a.jsonl", "b.jsonl"], "out").statuses == {"invalid": 1, "ok": 2}


def test_files_that_end_early_keep_what_they_have() -> None:
    records = [{"prompt": f"p{i}", "response": os.urandom(30).hex()} for i in range(3000)]
    write("d/good.jsonl", lines(records))
    write("d/cut.jsonl.gz", gzip.compress(lines(records), mtime=0)[:-20_000])
    write("d/cut.parquet", parquet(records)[:-100])
    write("d/empty.jsonl", b"")
    summary = prepare("d", "out")
    by_label = {file.label: file for file in summary.files}
    assert by_label["d/good.jsonl"].statuses == {"ok": 3000}
    cut = by_label["d/cut.jsonl.gz"]
    assert cut.statuses == {"ok": cut.n_records, "unreadable": 1}
    assert 2000 < cut.n_records < 3000
    assert by_label["d/cut.parquet"].statuses == {"unreadable": 1}
    assert by_label["d/empty.jsonl"].is_empty
    assert not by_label["d/good.jsonl"].is_empty
    marker = next(row for row in rows_of(summary) if row.status is Status.UNREADABLE and row.source == "d/cut.jsonl.gz")
    assert marker.row_index == cut.n_records
    assert "truncated" in marker.detail
    with pytest.raises(CorpusError, match=r"d/cut.jsonl.gz, record \d+: the gzip data ends early"):
        prepare("d", "strict", strict=True)


def test_unknown_schema_ends_before_the_files_are_read() -> None:
    write("d/a.jsonl", lines([{"x": i} for i in range(5000)]))
    write("d/b.jsonl", lines([{"y": 1}]))
    reports: list[PreparationProgress] = []
    with pytest.raises(
        SchemaError, match=r"d/a.jsonl has no schema(.|\n)*Columns found: x(.|\n)*1 more file"
    ) as caught:
        prepare("d", "out", on_progress=reports.append)
    assert "--map" in str(caught.value)
    assert reports == []
    assert list(Path("out").iterdir()) == []
    with pytest.raises(SchemaError):
        list(iter_responses("d"))


def test_what_was_cut_or_unknown_is_counted() -> None:
    turns = [{"from": role, "value": role} for role in ("human", "narrator", "gpt", "human", "narrator")]
    write("a.jsonl", lines([{"conversations": turns}, {"prompt": "a", "response": "b"}]))
    (file,) = prepare("a.jsonl", "out").files
    assert file.dropped_turns == 2
    assert file.unknown_roles == {"narrator": 2}
    assert file.other_shapes == {"prompt, response": 1}


def test_overrides_reach_every_file() -> None:
    write("a.jsonl", lines([{"prompt": "p", "response": "wrong", "reply": {"text": "right"}}]))
    summary = prepare("a.jsonl", "out", overrides={"response": "reply.text"})
    assert rows_of(summary)[0].messages[-1].content == "right"
    assert summary.overrides == {"response": "reply.text"}
    with pytest.raises(SchemaError, match="no column `nope`; columns found: prompt, response, reply"):
        prepare("a.jsonl", "out", overrides={"response": "nope"})


# --- shards and units


def test_units_hold_whole_prompts_and_equal_prompts_meet() -> None:
    for generator in "abcde":
        write(f"{generator}.jsonl", lines(pairs(200, prompts=100, generator=generator)))
    summary = prepare(
        [f"{g}.jsonl" for g in "abcde"], "out", target_unit_chars=600, max_unit_rows=64, target_shard_bytes=4000
    )
    assert len(summary.shards) > 5
    found = units(summary)
    where = {}
    for number, unit in enumerate(found):
        assert [row.prompt_id for row in unit] == sorted(row.prompt_id for row in unit)
        assert len(unit) <= 64
        for row in unit:
            assert where.setdefault(row.prompt_id, number) == number
            assert len([r for r in unit if r.prompt_id == row.prompt_id]) == 10
    assert len(where) == 100
    # Within a prompt: by file, then by record.
    keys = [(row.source, row.row_index) for row in found[0] if row.prompt_id == found[0][0].prompt_id]
    assert keys == sorted(keys)
    assert Counter(row.source for row in rows_of(summary)) == dict.fromkeys([f"{g}.jsonl" for g in "abcde"], 200)


def test_one_prompt_with_very_many_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "_STAGE_BYTES", 1 << 20)
    write("a.jsonl", lines(pairs(30_000, prompts=1, length=100)))
    summary = prepare("a.jsonl", "out", target_unit_chars=20_000, target_shard_bytes=1 << 20)
    assert len(summary.shards) == 1
    sizes = [sum(len(m.content) for row in unit for m in row.messages) for unit in units(summary)]
    assert max(sizes) <= 20_000
    assert [row.row_index for unit in units(summary) for row in unit] == list(range(30_000))


def test_a_row_longer_than_a_unit_stands_alone() -> None:
    write("a.jsonl", lines([{"prompt": "p", "response": "x" * n} for n in (10, 5000, 10)]))
    assert [[row.row_index for row in unit] for unit in units(prepare("a.jsonl", "out", target_unit_chars=100))] == [
        [0],
        [1],
        [2],
    ]


def test_buckets_follow_the_hash() -> None:
    ids = [prompt_id([Message("user", str(i))]) for i in range(2000)]
    for n_buckets in (1, 7, 1024):
        buckets = bucket_of(pa.chunked_array([ids]), n_buckets)
        assert buckets.tolist() == [int(text[:8], 16) * n_buckets >> 32 for text in ids]
        assert (np.diff(buckets[np.argsort(ids)]) >= 0).all()
        assert len(set(buckets.tolist())) > 0.8 * n_buckets


def test_same_inputs_same_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    write("d/a.jsonl", lines(pairs(3000, prompts=500)))
    write("d/b.parquet", parquet(pairs(200, generator="b")))
    settings = {"target_shard_bytes": 20_000, "target_unit_chars": 2000}
    first = prepare("d", "one", **settings)
    # Where the memory for staging ends must not show in the shards.
    monkeypatch.setattr(preparation, "_STAGE_BYTES", 10_000)
    monkeypatch.setattr("fastcompat.corpus.partition._BATCH_ROWS", 100)
    second = prepare("d", "two", **settings)
    assert len(first.shards) > 3
    assert first == second
    assert shard_bytes("one") == shard_bytes("two")


def test_extension_goes_on_counting() -> None:
    write("a.jsonl", lines(pairs(300, prompts=300)))
    first = prepare("a.jsonl", "out", target_shard_bytes=2000)
    before = shard_bytes("out")
    write("b.jsonl", lines(pairs(300, prompts=300, generator="b")))
    second = prepare("b.jsonl", "out", target_shard_bytes=2000, first_shard=len(first.shards))
    assert [shard.name for shard in first.shards + second.shards] == [
        f"shard-{i:05d}.parquet" for i in range(len(first.shards) + len(second.shards))
    ]
    after = shard_bytes("out")
    assert {name: after[name] for name in before} == before
    assert len(rows_of(first)) == len(rows_of(second)) == 300


def test_a_killed_preparation_leaves_nothing_that_stays() -> None:
    write("a.jsonl", lines(pairs(100)))
    write("out/.partition/run-00000.arrow", b"half written")
    write("out/shard-00007.parquet", b"moved in before the kill")
    summary = prepare("a.jsonl", "out")
    assert set(shard_bytes("out")) == {shard.name for shard in summary.shards}


def test_a_failed_preparation_leaves_earlier_shards_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    write("a.jsonl", lines(pairs(100)))
    prepare("a.jsonl", "out")
    before = shard_bytes("out")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("fastcompat.corpus.partition.pa.OSFile", full)
    with pytest.raises(RunError, match=r"out cannot be written: No space left on device. Preparing needs"):
        prepare("a.jsonl", "out")
    assert shard_bytes("out") == before


def test_a_directory_that_cannot_be_made() -> None:
    write("a.jsonl", lines(pairs(1)))
    write("file", b"")
    with pytest.raises(RunError, match="file cannot be written: Not a directory"):
        prepare("a.jsonl", "file")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "holds no response:\n  a.jsonl: the file holds no record"),
        ("a.jsonl", lines([{"prompt": "a", "response": None}] * 3), r"holds no response:\n.*is null \(3 rows\)"),
        ("a.csv", b"prompt,response\na,b\n", "a.csv: neither JSON lines, JSON, Parquet nor Arrow; convert it"),
        ("a.csv.gz", gzip.compress(b"prompt,response\na,b\n", mtime=0), "a.csv.gz: neither JSON lines"),
        ("a.jsonl", '{"prompt": "a", "response": "b"}'.encode("utf-16"), "the text is UTF-16"),
        ("a.jsonl", b"{broken\n" * 4, r"nothing in the corpus can be scored:\n  a.jsonl: line 1: .*\(4 rows\)"),
        (
            "a.jsonl",
            lines([{"prompt": "a", "response": 1}, {"prompt": "a", "response": ""}]),
            "is empty.*a number|number",
        ),
    ],
)
def test_a_corpus_that_cannot_be_scored_is_refused(name: str, content: bytes, message: str) -> None:
    write(name, content)
    with pytest.raises(CorpusError, match=message):
        prepare(name, "out")
    assert list(Path("out").iterdir()) == []
    # One row that can be scored, and everything keeps its place.
    write("good.jsonl", lines(pairs(1)))
    summary = prepare([name, "good.jsonl"], "out")
    assert summary.statuses["ok"] == 1
    # An extension is a corpus like any other.
    with pytest.raises(CorpusError, match=message):
        prepare(name, "out", first_shard=len(summary.shards))
    assert [path.name for path in Path("out").iterdir()] == [shard.name for shard in summary.shards]


def test_a_summary_says_what_is_wrong_with_each_file() -> None:
    write("d/a.jsonl", lines(pairs(2)))
    write("d/b.jsonl", lines([{"question": "q", "x": 1}] * 3))
    write("d/c.parquet", b"garbage" * 9)
    write("d/e.jsonl", lines([{"prompt": "a", "response": i} for i in (5, None, None)]) + b"{\n[\n{}x\n")
    write("d/f.jsonl", b"")
    write("d/g.csv", b"a,b")
    summary = prepare("d", "out")
    problems = {file.label: file.problem for file in summary.files}
    assert problems["d/a.jsonl"] == ""
    assert problems["d/e.jsonl"] == "not one of its rows can be scored: response is null (2 of 6)"
    assert "no known schema; closest: prompt + response: no response column" in problems["d/b.jsonl"]
    assert "the Parquet file is truncated or damaged" in problems["d/c.parquet"]
    assert problems["d/f.jsonl"] == "the file holds no record"
    (reasons,) = (file.reasons for file in summary.files if file.label == "d/e.jsonl")
    assert list(reasons.items())[:2] == [("response is null", 2), ("response is a number, not text", 1)]
    assert len(reasons) == 5
    assert summary.left_out == ("d/g.csv",)


def test_reasons_are_few_whatever_the_rows_say() -> None:
    records = [{"prompt": "a", "response": {f"{'k' * i}": 1}} for i in range(30)]
    write("a.jsonl", lines(pairs(1) + records) + b"{broken\n" * 20)
    (file,) = prepare("a.jsonl", "out").files
    assert len(file.reasons) == 9
    assert sum(file.reasons.values()) == 50
    assert file.reasons["other"] >= 20


def test_columns_that_come_late_in_any_container() -> None:
    early = [{"prompt": f"p{i}", "response": "r", "generator": None} for i in range(99)]
    records = [*early, {"prompt": "p", "response": "r", "generator": "g"}]
    write("own.parquet", parquet(records))
    assert prepare("own.parquet", "out").generators == {"own": 99, "g": 1}
    write("own.jsonl", lines([*early, {"prompt": "p", "response": "r", "model": "m"}]))
    assert prepare("own.jsonl", "out", overrides={"generator": "model"}).generators == {"own": 99, "m": 1}
    with pytest.raises(SchemaError, match="no column `model`; columns found: prompt, response, generator"):
        prepare("own.parquet", "out", overrides={"generator": "model"})


@pytest.mark.parametrize(
    ("document", "where"),
    [
        ({"data": [{"prompt": "a", "response": "b"}, 5, {"prompt": "c", "response": "d"}]}, "the list `data`: "),
        (
            {"version": "1", "train": [{"prompt": "a", "response": "b"}, {}, {"prompt": "c", "response": "d"}]},
            "the list `train`: ",
        ),
        (
            {
                "features": [{"feature_idx": 0, "name": "prompt"}],
                "rows": [
                    {"row_idx": 0, "row": row}
                    for row in ({"prompt": "a", "response": "b"}, {}, {"prompt": "c", "response": "d"})
                ],
            },
            "the list `rows`: ",
        ),
        ({"prompt": ["a", None, "c"], "response": ["b", "x", "d"]}, "a table of columns: "),
        ({"question": ["a", "x", "c"], "answer": ["b", None, "d"]}, "a table of columns: "),
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_documents_that_hold_the_records(document: dict[str, Any], where: str, indent: int | None) -> None:
    write("a.json", json.dumps(document, indent=indent).encode())
    summary = prepare("a.json", "out")
    first, bad, last = rows_of(summary)
    assert [message.content for row in (first, last) for message in row.messages] == ["a", "b", "c", "d"]
    assert bad.status in (Status.INVALID, Status.EMPTY)
    (file,) = summary.files
    assert file.mapping.startswith(where)
    assert (file.n_records, file.n_rows) == (3, 3)


def test_a_record_with_a_list_is_no_document() -> None:
    write("a.json", json.dumps({"prompt": "a", "outputs": [{"instruction": "x", "output": "b"}]}).encode())
    (row,) = rows_of(prepare("a.json", "out"))
    assert [message.content for message in row.messages] == ["a", "b"]
    write("b.json", json.dumps({"data": [{"x": "a", "y": "b"}]}).encode())
    with pytest.raises(SchemaError, match=r"b.json, the list `data`, has no schema(.|\n)*Columns found: x, y"):
        prepare("b.json", "out")
    write(
        "c.json",
        json.dumps({"train": [{"prompt": "a", "response": "b"}], "test": [{"prompt": "a", "response": "b"}]}).encode(),
    )
    with pytest.raises(SchemaError, match=r"in several places: the list `train` \(1 record\), the list `test`"):
        prepare("c.json", "out")


def test_progress_reaches_its_total() -> None:
    write("a.jsonl", lines(pairs(5000)))
    write("b.parquet", parquet(pairs(300)))
    reports: list[PreparationProgress] = []
    prepare(["a.jsonl", "b.parquet"], "out", on_progress=reports.append)
    reading = [report for report in reports if report.phase == "reading"]
    assert [report.done for report in reading] == sorted(report.done for report in reading)
    assert reading[-1].done == reading[-1].total == sum(os.path.getsize(name) for name in ("a.jsonl", "b.parquet"))
    assert reading[0].mapping.startswith("prompt + response")
    assert (reports[-1].phase, reports[-1].done, reports[-1].total) == ("writing", 5300, 5300)


@given(st.lists(st.tuples(st.text(st.characters(codec="utf-8"), max_size=3), st.integers(0, 3)), max_size=40))
def test_partition_returns_every_row(tmp_path_factory: pytest.TempPathFactory, rows: list[tuple[str, int]]) -> None:
    """Prompts and answers of any text, over several runs and buckets, come back as they went in."""
    directory = tmp_path_factory.mktemp("p")
    partition = Partition(directory, n_buckets=3, stage_bytes=1, home=directory)
    for index, (text, response_index) in enumerate(rows):
        messages = (Message("user", text), Message("assistant", f"{index}"))
        partition.add(prompt_id(messages[:-1]), 0, index, response_index, text, messages, Status.OK, "")
        if index % 7 == 6:
            partition._to_batch()
    partition.finish()
    found = []
    for number in range(3):
        bucket = Bucket.read(partition.runs, number)
        assert bucket.n_rows == partition.rows[number]
        units = list(bucket.tables(UnitSize(10, 5), Origins(["s"])))
        assert [len(unit) for unit in units] == [len(unit) for unit in bucket.units(UnitSize(10, 5))]
        found += [row for unit in units for row in from_table(unit)]
    expected = [
        Response(
            messages=(Message("user", t), Message("assistant", f"{i}")),
            generator=t,
            source="s",
            row_index=i,
            response_index=k,
        )
        for i, (t, k) in enumerate(rows)
    ]
    assert sorted(found, key=lambda row: row.row_index) == expected


# --- summaries


def test_summary_survives_json() -> None:
    write("d/a.jsonl", lines([*pairs(10), {"prompt": "a", "response": None}]))
    write("d/b.jsonl", lines(SHAPES["conversations"][0]))
    summary = prepare("d", "out", overrides=None)
    text = json.dumps(summary.to_json())
    assert CorpusSummary.from_json(json.loads(text)) == summary
    # Runs from before these were kept.
    older = json.loads(text)
    del older["left_out"]
    for file in older["files"]:
        del file["problem"], file["reasons"]
    assert CorpusSummary.from_json(older).fingerprint == summary.fingerprint
    assert json.loads(text)["fingerprint"] == summary.fingerprint


def test_fingerprint_is_that_of_the_contents() -> None:
    write("a.jsonl", lines(pairs(10)))
    write("b.jsonl", lines(pairs(10, generator="b")))
    both = prepare(["a.jsonl", "b.jsonl"], "out").fingerprint
    assert prepare(["b.jsonl", "a.jsonl"], "out").fingerprint == both
    os.utime("a.jsonl", (1, 1))
    assert prepare(["a.jsonl", "b.jsonl"], "out", target_unit_chars=5).fingerprint == both
    assert prepare(["a.jsonl"], "out").fingerprint != both
    assert (
        prepare(["a.jsonl", "b.jsonl"], "out", overrides={"response": "prompt", "prompt": "response"}).fingerprint
        != both
    )
    write("a.jsonl", lines(pairs(10, generator="c")))
    assert prepare(["a.jsonl", "b.jsonl"], "out").fingerprint != both


def test_inputs_are_compared_by_content() -> None:
    for name in ("a", "b", "c"):
        write(f"d/{name}.jsonl", lines(pairs(10, generator=name)))
    summary = prepare("d", "out")
    assert not compare_inputs(summary, "d", overrides={})
    os.utime("d/a.jsonl", (1, 1))
    assert not compare_inputs(summary, ["d/c.jsonl", "d/b.jsonl", "d/a.jsonl"])
    write("d/a.jsonl", lines(pairs(10, generator="x")))
    write("d/d.jsonl", lines(pairs(1)))
    os.unlink("d/b.jsonl")
    difference = compare_inputs(summary, "d", overrides={"response": "reply"})
    assert difference
    assert (difference.added, difference.removed, difference.changed) == (
        ("d/d.jsonl",),
        ("d/b.jsonl",),
        ("d/a.jsonl",),
    )
    assert difference.describe().splitlines() == [
        "  new: d/d.jsonl",
        "  no longer there: d/b.jsonl",
        "  changed: d/a.jsonl",
        "  columns: the corpus was read with no --map, now with --map response=reply",
    ]
    extension = prepare(difference.added, "out", first_shard=len(summary.shards))
    assert compare_inputs([summary, extension], "d").added == ()


def test_the_same_files_by_another_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write(f"d/{name}.jsonl", lines(pairs(10, generator=name)))
    summary = prepare("d", "out")
    assert not compare_inputs(summary, str(tmp_path / "d"))
    monkeypatch.chdir("d")
    assert not compare_inputs(summary, ["b.jsonl", "a.jsonl"])
    # Equal size is not equal content, and equal content under another name is another generator's.
    write("x/a.jsonl", lines(pairs(10, generator="c")))
    os.rename("b.jsonl", "y.jsonl")
    difference = compare_inputs(summary, ["x/a.jsonl", "y.jsonl"])
    assert (difference.added, difference.removed) == (("x/a.jsonl", "y.jsonl"), ("d/a.jsonl", "d/b.jsonl"))


# --- memory

_MEMORY_SCRIPT = """
import sys
from fastcompat.corpus import prepare, preparation
preparation._STAGE_BYTES = 4 << 20
def anonymous():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("RssAnon"))
before = anonymous()
peak = 0
def sample(progress):
    global peak
    peak = max(peak, anonymous())
summary = prepare(sys.argv[1], "out", target_shard_bytes=4 << 20, target_unit_chars=1 << 18, on_progress=sample)
print(summary.n_rows, len(summary.shards), peak - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_does_not_grow_with_the_corpus() -> None:
    growth = []
    for n_rows in (50_000, 200_000):
        write("a.jsonl", lines(pairs(n_rows, prompts=n_rows // 20, length=500)))
        result = subprocess.run(
            [sys.executable, "-c", _MEMORY_SCRIPT, "a.jsonl"], capture_output=True, text=True, check=True, timeout=120
        )
        rows, shards, kilobytes = map(int, result.stdout.split())
        assert rows == n_rows
        assert shards >= n_rows // 10_000
        growth.append(kilobytes / 1024)
    # 100 MB of text pass through; the stage, a batch and some units are what is held.
    assert growth[1] < 110
    assert growth[1] < growth[0] + 25
