"""What turns and records hold beside texts reaches the row as templates read it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastcompat.cli.display import _oddities
from fastcompat.corpus import CorpusSummary, iter_responses, prepare, rows_from_records
from fastcompat.corpus.detection import detect
from fastcompat.corpus.records import NumberList
from fastcompat.rows.message import Message
from fastcompat.rows.response import Response, from_table
from fastcompat.rows.status import Status

WEATHER = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Graz", "unit": None}}}
TOOL = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "default": None, "enum": [1, None]}},
}


def ask(*turns: dict[str, Any], **record: Any) -> Response:
    (row,) = rows_from_records([{"messages": [{"role": "user", "content": "a"}, *turns], **record}])
    return row


def said(*turns: dict[str, Any], **record: Any) -> dict[str, Any]:
    """The last turn of the row, as a template gets it."""
    row = ask(*turns, **record)
    assert row.status is Status.OK, row.detail
    return row.messages[-1].fields


def test_a_call_is_carried_as_it_is() -> None:
    fields = said({"role": "assistant", "content": "", "tool_calls": [WEATHER]})
    assert fields == {"role": "assistant", "content": "", "tool_calls": [WEATHER]}
    assert list(fields["tool_calls"][0]["function"]["arguments"]) == ["city", "unit"]  # templates print them in order


@pytest.mark.parametrize("turn", [{"content": None}, {}])
def test_a_call_without_a_text_has_null_for_one(turn: dict[str, Any]) -> None:
    fields = said({"role": "assistant", "tool_calls": [WEATHER], **turn})
    assert fields == {"role": "assistant", "content": None, "tool_calls": [WEATHER]}


def test_other_keys_are_carried_with_their_types() -> None:
    own = {"name": "Ann", "weight": 1, "score": 0.5, "flag": True, "meta": {"a": [1, None, "x"], "ä": "東"}}
    assert said({"role": "assistant", "content": "b", **own, "none": None}) == {
        "role": "assistant",
        "content": "b",
        **own,
    }
    fields = said({"from": "gpt", "value": "b", "train": False, "id": 7})
    assert fields == {"role": "assistant", "content": "b", "train": False, "id": 7}


def test_numbers_that_json_has_not_are_null() -> None:
    row = ask({"role": "assistant", "content": "b", "p": float("nan"), "q": [float("inf"), 1.5]})
    assert json.loads(row.messages[-1].extra) == {"p": None, "q": [None, 1.5]}


def test_values_of_columnar_files_are_carried() -> None:
    numbers = NumberList(pa.array([[1, 2]]), 0)
    assert said({"role": "assistant", "content": "b", "ids": numbers, "raw": b"x"})["ids"] == [1, 2]


def test_reasoning_is_carried_under_its_own_name() -> None:
    for key in ("reasoning_content", "thinking", "reasoning"):
        assert said({"role": "assistant", "content": "b", key: "hm"}) == {
            "role": "assistant",
            "content": "b",
            key: "hm",
        }


def test_a_turn_that_only_thinks_or_calls_is_not_empty() -> None:
    assert ask({"role": "assistant", "content": "", "reasoning_content": "hm"}).status is Status.OK
    assert ask({"role": "assistant", "content": None, "tool_calls": [WEATHER]}).status is Status.OK
    assert ask({"role": "assistant", "content": "", "tool_calls": []}).status is Status.EMPTY
    assert ask({"role": "assistant", "content": None}).status is Status.EMPTY


@pytest.mark.parametrize(
    "parts",
    [
        [{"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "b"}],
        [{"type": "reasoning", "reasoning": "hm"}, {"type": "text", "text": "b"}],
        [{"type": "reasoning", "text": "hm"}, {"type": "text", "text": "b"}],
    ],
)
def test_thinking_parts_are_reasoning(parts: list[dict[str, Any]]) -> None:
    assert said({"role": "assistant", "content": parts}) == {
        "role": "assistant",
        "content": "b",
        "reasoning_content": "hm",
    }


def test_a_part_that_is_neither_text_nor_thinking_is_told() -> None:
    row = ask({"role": "assistant", "content": [{"type": "image_url", "image_url": {}}]})
    assert (row.status, "a part of type 'image_url'" in row.detail) == (Status.INVALID, True)


CALLED = {"type": "function", "function": {"name": "w", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "function_call": {"name": "w", "arguments": {"x": 1}}},
        {"role": "assistant", "content": None, "function_call": '{"name": "w", "arguments": {"x": 1}}'},
        {"from": "function_call", "value": '{"name": "w", "arguments": {"x": 1}}'},
        {"role": "tool_call", "content": '{"name": "w", "arguments": {"x": 1}}'},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALLED])},
    ],
)
def test_every_spelling_of_a_call_is_a_tool_call(turn: dict[str, Any]) -> None:
    assert said(turn) == {"role": "assistant", "content": None, "tool_calls": [CALLED]}


def test_several_calls_in_one_turn_of_that_role() -> None:
    two = said({"from": "function_call", "value": '[{"name": "w", "arguments": {}}, {"name": "v", "arguments": {}}]'})
    assert [call["function"]["name"] for call in two["tool_calls"]] == ["w", "v"]


def test_a_call_that_is_no_json_is_what_the_assistant_says() -> None:
    assert said({"from": "function_call", "value": "w(x=1)"}) == {"role": "assistant", "content": "w(x=1)"}


def test_a_tools_answer_may_be_an_object() -> None:
    row = ask(
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "tool", "content": {"t": 7}},
        {"from": "observation", "value": [{"t": 8}]},
        {"role": "assistant", "content": "b"},
    )
    assert [message.fields["content"] for message in row.messages] == ["a", None, {"t": 7}, [{"t": 8}], "b"]
    assert [message.role for message in row.messages] == ["user", "assistant", "tool", "tool", "assistant"]


def test_a_developer_is_no_unknown_role() -> None:
    (row,) = rows_from_records([{"messages": [{"role": r, "content": r} for r in ("developer", "user", "assistant")]}])
    assert [message.role for message in row.messages] == ["developer", "user", "assistant"]


@pytest.mark.parametrize(
    "tools",
    [[TOOL], TOOL, json.dumps([TOOL]), [json.dumps(TOOL)]],
    ids=["list", "one", "text", "texts"],
)
def test_tools(tools: object) -> None:
    row = ask({"role": "assistant", "content": "b"}, tools=tools)
    assert json.loads(row.tools) == [TOOL]


def test_no_tools() -> None:
    for tools in (None, [], "", "[]", " "):
        assert ask({"role": "assistant", "content": "b"}, tools=tools).tools == ""


def test_functions_are_tools() -> None:
    row = ask({"role": "assistant", "content": "b"}, functions=[TOOL["function"]])
    assert json.loads(row.tools) == [TOOL]


def test_a_column_of_that_name_that_holds_none_is_not_read_and_named() -> None:
    record = {"prompt": "a", "response": "b", "tools": "a hammer"}
    (row,) = rows_from_records([record])
    assert (row.status, row.tools) == (Status.OK, "")
    assert detect([record]).describe() == "prompt + response; generator from the file's name; not used: tools"


def test_a_row_whose_tools_cannot_be_read_is_told() -> None:
    good = {"prompt": "a", "response": "b", "tools": [TOOL]}
    rows = rows_from_records([good, good | {"tools": "[{"}])
    assert [row.status for row in rows] == [Status.OK, Status.INVALID]
    assert rows[1].detail == "tools is a text that is no JSON"


def test_tools_serve_every_response_of_a_record() -> None:
    record = {"prompt": "a", "chosen": "b", "rejected": "c", "tools": [TOOL]}
    assert [json.loads(row.tools) for row in rows_from_records([record])] == [[TOOL], [TOOL]]
    assert "tools from column `tools`" in detect([record]).describe()


def test_earlier_turns() -> None:
    pairs = [["q1", "a1"], ["q2", "a2"]]
    turns = [{"role": "user", "content": "q1"}, {"from": "gpt", "value": "a1"}]
    record = {"instruction": "q", "input": "", "output": "a", "system": "s", "history": pairs}
    late = {"instruction": "q", "output": "a"}
    rows = rows_from_records(
        [late, record, record | {"history": turns, "system": ""}, record | {"history": json.dumps(pairs)}]
    )
    assert [[message.content for message in row.messages] for row in rows] == [
        ["q", "a"],
        ["s", "q1", "a1", "q2", "a2", "q", "a"],
        ["q1", "a1", "q", "a"],
        ["s", "q1", "a1", "q2", "a2", "q", "a"],
    ]
    assert "history from column `history`" in detect([record]).describe()


def test_a_history_of_another_kind_is_not_read_and_named() -> None:
    record = {"instruction": "q", "output": "a", "history": "seen before"}
    assert detect([record]).describe().endswith("not used: history")


def test_lists_of_lists_are_named() -> None:
    record = {"prompt": "a", "response": "b", "turns": [["c", "d"]], "vector": [0.5], "n": 3}
    assert detect([record]).describe().endswith("not used: turns, vector, n")


def test_reasoning_beside_a_response() -> None:
    record = {"prompt": "a", "response": "b", "reasoning_content": "hm"}
    (row,) = rows_from_records([record])
    assert row.messages[-1].fields == {"role": "assistant", "content": "b", "reasoning_content": "hm"}
    # Whose reasoning a column of another name holds is not certain: a judge's is no part of the response.
    judged = {"prompt": "a", "response": "b", "reasoning": "good"}
    assert rows_from_records([judged])[0].messages[-1] == Message("assistant", "b")
    assert detect([judged]).describe().endswith("not used: reasoning")
    (row,) = rows_from_records([judged], overrides={"reasoning": "reasoning"})
    assert row.messages[-1].fields["reasoning_content"] == "good"


def test_reasoning_and_calls_of_completions_and_structs() -> None:
    completion = {"model": "m", "response": "b", "reasoning_content": "hm"}
    (row,) = rows_from_records([{"instruction": "a", "completions": [completion]}])
    assert row.messages[-1].fields["reasoning_content"] == "hm"
    struct = {"content": None, "tool_calls": [WEATHER]}
    (row,) = rows_from_records([{"instruction": "a", "org/m": struct}])
    assert row.messages[-1].fields["tool_calls"] == [WEATHER]


def test_masks_are_named() -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]
    more = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b", "train": False}]
    assert detect([{"messages": turns}]).describe() == (
        "messages (role/content); turns left out of the loss by `weight`; generator from the file's name"
    )
    assert "left out of the loss by `train`" in detect([{"conversations": more}]).describe()


def test_columns_come_back_without_the_nulls_that_they_put_in(tmp_path: Path) -> None:
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in (
            {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},
            {"type": "function", "function": {"name": "g", "arguments": {"y": "2"}}},
        )
    ]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "rows.parquet")
    calls = [row.messages[-1].fields["tool_calls"][0] for row in iter_responses([tmp_path / "rows.parquet"])]
    assert calls == [record["messages"][1]["tool_calls"][0] for record in records]
    (tmp_path / "rows.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [WEATHER]}]})
    )
    (row,) = iter_responses([tmp_path / "rows.jsonl"])  # what a record itself says is null stays
    assert row.messages[-1].fields["tool_calls"] == [WEATHER]


def test_all_of_it_goes_through_shards(tmp_path: Path) -> None:
    record = {
        "messages": [
            {"role": "user", "content": "a", "name": "Ann"},
            {"role": "assistant", "content": "b", "tool_calls": [WEATHER], "weight": 1},
        ],
        "tools": [TOOL],
    }
    (tmp_path / "rows.jsonl").write_text(json.dumps(record) + "\n")
    summary = prepare([tmp_path / "rows.jsonl"], tmp_path / "out")
    (row,) = from_table(pq.read_table(tmp_path / "out" / summary.shards[0].name))
    assert [message.fields for message in row.messages] == record["messages"]
    assert json.loads(row.tools) == [TOOL]
    assert row == next(iter_responses([tmp_path / "rows.jsonl"]))


def test_a_surrogate_beside_a_text_is_told() -> None:
    row = ask({"role": "assistant", "content": "b", "name": "\ud800"})
    assert (row.status, "unpaired surrogate" in row.detail) == (Status.INVALID, True)
    row = ask({"role": "assistant", "content": "b"}, tools=[{"name": "\ud800"}])
    assert (row.status, "unpaired surrogate" in row.detail) == (Status.INVALID, True)
    json.dumps([message.extra for message in row.messages] + [row.tools], ensure_ascii=False).encode()


@pytest.mark.parametrize("each", [False, True], ids=["all in one", "each for itself"])
def test_turns_that_are_json_text(each: bool) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [WEATHER]}]
    value = [json.dumps(turn) for turn in turns] if each else json.dumps(turns)
    (row,) = rows_from_records([{"messages": value}], columnar=True)
    assert [message.fields for message in row.messages] == turns  # with the null that the text itself has
    assert detect([{"messages": value}]).shape == "messages"


def test_a_tool_may_answer_nothing() -> None:
    row = ask(
        {"role": "assistant", "content": None, "tool_calls": [WEATHER]},
        {"role": "tool", "content": None},
        {"role": "assistant", "content": "b"},
    )
    assert row.messages[2].fields == {"role": "tool", "content": None}


def test_turns_that_datasets_keeps_as_json(tmp_path: Path) -> None:
    """Turns of several shapes are an extension type of JSON texts there, in Parquet and on disk."""
    import datasets

    calls = [
        {"type": "function", "function": {"name": "f", "arguments": arguments}} for arguments in ({"x": 1}, {"y": None})
    ]
    records = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for call in calls
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    cache = str(tmp_path / "cache")
    loaded = datasets.load_dataset("json", data_files=str(tmp_path / "rows.jsonl"), split="train", cache_dir=cache)
    loaded.to_parquet(tmp_path / "rows.parquet")
    loaded.save_to_disk(tmp_path / "saved")
    for place in ("rows.parquet", "saved"):
        rows = list(iter_responses([tmp_path / place]))
        assert [[message.fields for message in row.messages] for row in rows] == [r["messages"] for r in records]


def test_columns_that_come_late_are_named_where_nobody_reads_them(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [{"instruction": f"q{n}", "output": "a"} for n in range(100)]
    records[90] |= {"history": [["q", "a"]], "rationale": "because", "tools": None}
    records[91] |= {"rationale": None, "note": None}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = prepare([tmp_path / "rows.jsonl"], tmp_path / "out")
    assert summary.files[0].late_columns == ("rationale",)
    assert CorpusSummary.from_json(json.loads(json.dumps(summary.to_json()))) == summary
    assert "columns that first records did not have, not used: rationale" in list(_oddities(summary))
