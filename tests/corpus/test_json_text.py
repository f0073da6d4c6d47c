"""JSON as programs write it by hand, and documents that hold the records inside, of any length."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from fastcompat.corpus import iter_responses, jsondocuments, prepare
from fastcompat.corpus.containers import SourceReader
from fastcompat.corpus.records import AMBIGUOUS, Broken, Opaque, Unreadable
from fastcompat.corpus.sources import find_sources
from fastcompat.errors import CorpusError, SchemaError
from fastcompat.rows.status import Status


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write(name: str, content: bytes | str) -> str:
    Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
    return name


def read(path: str) -> list[Any]:
    (source,) = find_sources(path)
    return [record for batch in SourceReader(source) for record in batch.records]


ROW = '{"prompt": "p", "response": "r"}'


def row(more: str) -> str:
    return ROW[:-1] + f", {more}}}"


# --- values that cost only themselves


@pytest.mark.parametrize(
    "more",
    [
        '"reward": NaN',
        '"reward": nan',
        '"meta": {"x": NaN, "y": [Infinity, -Infinity, {"z": NaN}]}',
        '"meta": {"x": -nan, "y": [inf, -inf, Inf, +Infinity, {"z": nan}]}, "said": "nan inf"',
        '"x": 1e400, "y": -1e999',
        '"x": ' + "9" * 5000,
        '"x": [' + "9" * 5000 + ", nan]",
        '"x": "\\ud800", "\\udc00": 1',
        '"x": "a\tb\x01c"',
        '"x": ' + "[" * 300 + "]" * 300,
        '"x": 1, "x": 2',
        '"meta": {"k": 1, "k": 2}',
        '"prompt": "p"',
    ],
)
def test_a_value_that_nobody_needs_does_not_cost_its_row(more: str) -> None:
    for text in (f"{row(more)}\n{ROW}\n", f"[{row(more)},\n{ROW}]", f"{{\n{row(more)[1:]}\n{ROW}\n"):
        rows = list(iter_responses(write("a.json", text)))
        assert [(r.status, [message.content for message in r.messages]) for r in rows] == [(Status.OK, ["p", "r"])] * 2
        assert all(r.rewards == () for r in rows)


def test_bytes_that_are_no_text_do_not_cost_their_row() -> None:
    lines = [row('"x": "\xe9"'), '{"prompt": "\xe9", "response": "r"}', ROW]
    rows = list(iter_responses(write("a.jsonl", "\n".join(lines).encode("latin-1"))))
    assert [r.status for r in rows] == [Status.OK, Status.INVALID, Status.OK]
    assert "not UTF-8, in the user turn" in rows[1].detail


def test_what_is_not_finite_is_no_reward() -> None:
    rewards = ["NaN", "1.5", "nan", "-Infinity", "9" * 400, "2"]
    rows = list(iter_responses(write("a.jsonl", "\n".join(row(f'"reward": {text}') for text in rewards))))
    assert [r.rewards for r in rows] == [(), (("reward", 1.5),), (), (), (), (("reward", 2.0),)]


def test_a_list_of_what_is_not_finite_is_not_read_for_ever() -> None:
    (broken,) = read(write("a.jsonl", row(f'"x": [{", ".join(["nan"] * 100_000)}]')))
    assert isinstance(broken, Broken)


# --- names twice


def test_a_name_twice_matters_where_the_values_differ_and_are_read() -> None:
    twice = '{"prompt": "p", "response": "r", "response": "s"}'
    for text in (f"{twice}\n{ROW}\n", f"[{twice}, {ROW}]"):
        assert read(write("a.json", text)) == [{"prompt": "p", "response": AMBIGUOUS}, json.loads(ROW)]
    with pytest.raises(CorpusError, match="response is two values under one name, not text"):
        prepare(write("a.jsonl", twice + "\n"), "out")


def test_names_twice_are_looked_for_all_the_way_where_the_beginning_has_them() -> None:
    twice = '{"prompt": "p", "response": "r", "response": "s"}\n'
    filler = "x" * (3 << 20)
    found = read(write("a.jsonl", twice + row(f'"x": "{filler}"') + "\n" + twice))
    assert [isinstance(record["response"], Opaque) for record in found] == [True, False, True]


# --- what stands between records


@pytest.mark.parametrize(
    "text",
    [
        f"{ROW}\r\n{ROW}\r\n{ROW}",
        f"{ROW}\r{ROW}\r{ROW}\r",
        f"{ROW}{ROW}{ROW}",
        f"{ROW} {ROW}\n{ROW}",
        f"{ROW},\n{ROW},\n{ROW},\n",
        f"{ROW}\n,{ROW}\n,{ROW}",
        f"[{ROW},\n{ROW},{ROW},]",
        f"\ufeff{ROW}\n\ufeff{ROW}\n\ufeff{ROW}\n",
        f"\ufeff[{ROW},{ROW},{ROW}]",
        f"[{ROW},{ROW}][{ROW}]",
        f"[{ROW}]\n[{ROW}]\n[{ROW}]\n",
        f"\x1e{ROW}\n\x1e{ROW}\n\x1e{ROW}\n",
        "\n".join(ROW.replace("{", "{\n") for _ in range(3)),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_records_in_a_row(text: str, name: str) -> None:
    assert read(write(name, text)) == [json.loads(ROW)] * 3


@pytest.mark.parametrize(
    ("lines", "reasons"),
    [
        ([ROW, "{'prompt': 'p', 'response': None}", ROW], ["line 2: Python's notation and not JSON; write it with"]),
        ([ROW, "\0" * 100, ROW + "\0" * 9], ["line 2: bytes of zero, as a crash", "line 3: bytes of zero, as a crash"]),
        (["\0" * 100 + ROW, ROW], ["line 1: bytes of zero, as a crash leaves them"]),
        ([ROW, ROW + '{"prompt": "cut', ROW], ["line 2: broken JSON (Unterminated string starting at character 44)"]),
        ([ROW, ROW + " and more"], ["line 2: broken JSON (more text after the record, at character 34)"]),
        ([ROW, row('"x": ' + "[" * 5000)], ["line 2: JSON that is nested too deeply"]),
    ],
)
def test_what_is_broken_in_a_line_is_told(lines: list[str], reasons: list[str]) -> None:
    found = read(write("a.jsonl", "\n".join(lines)))
    broken = [record.reason for record in found if isinstance(record, Broken)]
    assert [got.startswith(reason) for got, reason in zip(broken, reasons, strict=True)] == [True] * len(reasons)
    n_good = sum(ROW in line for line in lines) - any("and more" in line for line in lines)
    assert [record for record in found if isinstance(record, dict)] == [json.loads(ROW)] * n_good


# --- documents

RECORDS = [{"prompt": f"p{i}", "response": f"r{i} é"} for i in range(40)]
KEYED = {f"id-{i}": record for i, record in enumerate(RECORDS)}
FRAME = pd.DataFrame(RECORDS)

DOCUMENTS: dict[str, tuple[Any, str]] = {
    "keyed": (KEYED, "the objects under each key: "),
    "keyed, inside": ({"data": KEYED}, "the objects under each key of `data`: "),
    "keyed, beside a version": ({"version": 1, "rows": KEYED}, "the objects under each key of `rows`: "),
    "a list, deep inside": ({"result": {"data": {"train": RECORDS}}}, "the list `result.data.train`: "),
    "a list beside others": ({"features": [{"name": "prompt"}], "rows": RECORDS}, "the list `rows`: "),
    "a table inside": ({"version": 2, "table": FRAME.to_dict("list")}, "a table of columns in `table`: "),
    **{
        f"pandas, {orient}": (json.loads(FRAME.to_json(orient=orient)), where)
        for orient, where in {
            "index": "the objects under each key: ",
            "columns": "a table of columns: ",
            "split": "a table of columns: ",
            "table": "the list `data`: ",
        }.items()
    },
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize(("document", "where"), DOCUMENTS.values(), ids=DOCUMENTS)
def test_where_a_document_holds_its_records(document: Any, where: str, indent: int | None) -> None:
    (file,) = prepare(write("a.json", json.dumps(document, indent=indent)), "out").files
    assert file.statuses == {"ok": 40}
    assert file.mapping.startswith(f"{where}prompt + response")
    rows = list(iter_responses("a.json"))
    assert [(r.messages[0].content, r.messages[1].content) for r in rows] == [(*record.values(),) for record in RECORDS]


def test_a_record_in_a_keyed_document_keeps_its_place() -> None:
    document = {"a": RECORDS[0], "b": {"prompt": "p"}, "c": RECORDS[1]}
    rows = list(iter_responses(write("a.json", json.dumps(document))))
    assert [r.status for r in rows] == [Status.OK, Status.INVALID, Status.OK]


@pytest.mark.parametrize(
    ("document", "places"),
    [
        ({"train": RECORDS, "test": RECORDS[:1]}, r"the list `train` \(40 records\), the list `test` \(1 record\)"),
        (
            {"data": {"a": KEYED, "b": RECORDS}},
            r"each key of `data.a` \(40 records\), the list `data.b` \(40 records\)",
        ),
    ],
)
def test_records_in_several_places_are_refused_by_name(document: Any, places: str) -> None:
    write("a.json", json.dumps(document))
    message = rf"a.json: the document holds records in several places: .*{places}; write what is meant"
    with pytest.raises(SchemaError, match=message) as caught:
        prepare("a.json", "out")
    assert "\n" not in str(caught.value)
    write("good.jsonl", ROW)
    bad, _ = prepare(["a.json", "good.jsonl"], "out").files
    assert bad.problem.startswith("the document holds records in several places")


# --- documents that are longer than what is read at a time


@pytest.fixture
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsondocuments, "_LARGE_OBJECT", 1000)
    monkeypatch.setattr("fastcompat.corpus.bytestream.BLOCK_BYTES", 256)


LARGE = {
    "keyed": (KEYED, "the objects under each key"),
    "keyed, inside": ({"meta": {"a": 1}, "data": KEYED}, "the objects in `data`"),
    "a list": ({"version": 1, "data": RECORDS, "end": [1, 2]}, "the list `data`"),
    "a list, deep inside": ({"info": {"b": {}}, "result": {"train": RECORDS}}, "the list `result.train`"),
    "the hub's viewer": (
        {"features": [{"name": "prompt"}], "rows": [{"row_idx": i, "row": r} for i, r in enumerate(RECORDS)]},
        "the list `rows`",
    ),
}


@pytest.mark.usefixtures("_small_pieces")
@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(("document", "where"), LARGE.values(), ids=LARGE)
def test_long_documents_are_read_in_pieces(document: Any, where: str, indent: int | None) -> None:
    path = write("a.json", json.dumps(document, indent=indent))
    # A line of its own is told from a long document by more than the head.
    reader = SourceReader(find_sources(path)[0])
    records = [record for batch in reader for record in batch.records]
    if indent:
        assert (reader.inside, records) == (where, RECORDS)
        (file,) = prepare(path, "out").files
        assert file.mapping.startswith(f"{where}: prompt + response")
    else:
        assert records == [document]


@pytest.mark.usefixtures("_small_pieces")
def test_a_long_document_that_ends_early_keeps_what_it_has() -> None:
    text = json.dumps(KEYED, indent=1)
    *before, marker = read(write("a.json", text[: text.index('"id-30"') + 30]))
    assert before == RECORDS[:30]
    assert isinstance(marker, Unreadable)
    *before, marker = read(write("a.json", json.dumps({"data": RECORDS}, indent=1)[:-30]))
    assert before == RECORDS[:-1]
    assert isinstance(marker, Unreadable)


@pytest.mark.usefixtures("_small_pieces")
def test_a_long_document_with_more_lists_of_records_says_so() -> None:
    *records, marker = read(write("a.json", json.dumps({"train": RECORDS, "test": RECORDS[:2]}, indent=1)))
    assert records == RECORDS
    assert marker.reason == "the document holds records in `test` too, which were not read"


@pytest.mark.usefixtures("_small_pieces")
def test_a_long_record_is_no_document() -> None:
    turns = [{"role": "user", "content": "p" * 3000}, {"role": "assistant", "content": "r" * 3000}]
    record = {"id": 1, "messages": turns}
    assert read(write("a.json", json.dumps(record, indent=1))) == [record]
    table = {"prompt": ["p" * 2000] * 3, "response": ["r"] * 3}
    assert read(write("b.json", json.dumps(table, indent=1))) == [table]


def test_memory_of_a_long_document(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsondocuments, "_LARGE_OBJECT", 1 << 20)
    document = {f"id-{i}": {"prompt": f"p{i}", "response": "r" * 4000} for i in range(8000)}
    (source,) = find_sources(write("a.json", json.dumps(document)))
    del document
    tracemalloc.start()
    n_records = sum(len(batch.records) for batch in SourceReader(source))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert n_records == 8000
    assert source.size > 32e6
    assert peak < 26e6  # as for an array of records
