"""A turn beside its text: what it says, what of it counts as a prompt, and what takes it out of the loss."""

from __future__ import annotations

import pyarrow as pa
import pytest

from fastcompat.rows.message import (
    Message,
    dumped,
    inline_reasoning,
    is_masked,
    masking_key,
    prompt_id,
    says_something,
    spoken,
    without_reasoning,
)
from fastcompat.rows.response import MESSAGE_TYPE, ROW_SCHEMA, Response, from_table, to_table, with_later_columns

CALL = '{"tool_calls":[{"function":{"name":"f"}}]}'


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ("<think>\nhm\n</think>\n\nYes.", ("\nhm\n", "Yes.")),
        ("  <think>hm</think>Yes.", ("hm", "Yes.")),
        ("<think>cut off", ("cut off", "")),
        ("hm\n</think>\n\nYes.", ("hm\n", "Yes.")),  # the generation prompt opened the block
        ("Yes.", ("", "Yes.")),
        ("Yes. <think> is a tag, </think> too.", ("", "Yes. <think> is a tag, </think> too.")),
    ],
)
def test_reasoning_in_the_text(content: str, found: tuple[str, str]) -> None:
    assert inline_reasoning(content) == found


def test_without_reasoning() -> None:
    turn = Message("assistant", "A", '{"name":"x","reasoning_content":"a","thinking":"b","reasoning":"c"}')
    assert without_reasoning(turn) == Message("assistant", "A", '{"name":"x"}')
    assert without_reasoning(Message("assistant", "<think>hm</think>\nA")) == Message("assistant", "A")
    asks = Message("user", "<think>hm</think>\nA", '{"thinking":"b"}')
    assert without_reasoning(asks) == asks
    assert without_reasoning(Message("assistant", "A", CALL)) == Message("assistant", "A", CALL)


@pytest.mark.parametrize(
    ("fields", "key"),
    [
        ({"weight": 0}, "weight"),
        ({"weight": 0.0}, "weight"),
        ({"weight": 1}, None),
        ({"weight": 0.5}, None),
        ({"weight": None}, None),
        ({"train": False}, "train"),
        ({"train": True}, None),
        ({"training": False}, "training"),
        ({"loss": False}, "loss"),
        ({"loss": 0}, "loss"),
        ({"mask": True}, "mask"),
        ({"mask": 1}, "mask"),
        ({"mask": False}, None),
        ({"mask": "User"}, None),
        ({"weight": "0"}, "weight"),
        ({"train": "False"}, "train"),
        ({"loss_mask": 0}, "loss_mask"),
        ({"weight": "heavy"}, None),
        ({}, None),
    ],
)
def test_what_takes_a_turn_out_of_the_loss(fields: dict[str, object], key: str | None) -> None:
    assert masking_key(fields) == key


def test_masked_turns() -> None:
    assert is_masked(Message("assistant", "A", '{"weight":0}'))
    assert not is_masked(Message("assistant", "A", '{"weight":1}'))
    assert not is_masked(Message("assistant", "A"))


@pytest.mark.parametrize(
    ("turn", "says"),
    [
        (Message("assistant", "A"), True),
        (Message("assistant", " \n"), False),
        (Message("assistant", "", CALL), True),
        (Message("assistant", "", '{"thinking":"hm"}'), True),
        (Message("assistant", "", '{"thinking":" "}'), False),
        (Message("assistant", "", '{"weight":1}'), False),
    ],
)
def test_what_says_something(turn: Message, says: bool) -> None:
    assert says_something(turn) is says


def test_spoken() -> None:
    assert spoken(Message("assistant", "A", '{"weight":1}')) == "A"
    turn = Message("assistant", "A", '{"reasoning":"hm","tool_calls":[{"function":{"name":"f"}}]}')
    assert spoken(turn) == "hmA" + '{"tool_calls":[{"function":{"name":"f"}}]}'


def test_prompts_are_told_apart_by_what_is_said_and_by_nothing_else() -> None:
    plain = [Message("user", "a"), Message("assistant", "b")]
    of = {
        "plain": prompt_id(plain),
        "call": prompt_id([plain[0], Message("assistant", "b", CALL)]),
        "reasoning": prompt_id([plain[0], Message("assistant", "b", '{"reasoning":"hm"}')]),
        "name": prompt_id([Message("user", "a", '{"name":"x"}'), plain[1]]),
        "tools": prompt_id(plain, '[{"name":"f"}]'),
    }
    assert len(set(of.values())) == len(of)
    stamped = [Message("user", "a", '{"id":7,"timestamp":"2024"}'), plain[1]]
    assert prompt_id(stamped) == of["plain"]


def test_prompt_ids_of_texts_are_what_they_were() -> None:
    assert prompt_id([Message("user", "Grüße")]) == "372afac0ac185c9d4826ce66e990b2db"


def test_rows_go_through_a_table() -> None:
    row = Response(
        messages=(Message("user", "a"), Message("assistant", "", CALL)),
        generator="g",
        source="s",
        row_index=3,
        tools='[{"name":"f"}]',
    )
    assert from_table(to_table([row])) == [row]


def test_shards_without_the_later_columns_are_read() -> None:
    row = Response(messages=(Message("user", "a"), Message("assistant", "b")), generator="g", source="s", row_index=0)
    silent = Response(messages=(), generator="g", source="s", row_index=1)
    table = to_table([row, silent, row])
    former = pa.list_(pa.struct([field for field in MESSAGE_TYPE if field.name != "extra"]))
    turns = [[{"role": m.role, "content": m.content} for m in own.messages] for own in (row, silent, row)]
    place = table.column_names.index("messages")
    old = table.set_column(place, "messages", pa.array(turns, former)).drop_columns("tools")
    assert from_table(with_later_columns(old, ROW_SCHEMA.names)) == [row, silent, row]
    assert from_table(with_later_columns(old.slice(2), ROW_SCHEMA.names)) == [row]
    with pytest.raises(KeyError):
        with_later_columns(old.drop_columns("status"), ROW_SCHEMA.names)


def test_prompts_are_the_same_however_they_are_spelt() -> None:
    def of(**others: object) -> str:
        return prompt_id([Message("user", "a"), Message("assistant", "b", dumped(others))])

    def called(**own: object) -> dict[str, object]:
        return {"tool_calls": [{"type": "function", **own}]}

    function = {"name": "f", "arguments": {"x": 1, "y": 2}}
    spelt = [
        called(function=function),
        called(function=function, id="1", index=0),
        called(function={"arguments": {"y": 2, "x": 1}, "name": "f"}, id="2"),
        called(function={"name": "f", "arguments": '{"x": 1, "y": 2}'}),
    ]
    assert len({of(**each) for each in spelt}) == 1
    assert len({of(**{key: "hm"}) for key in ("reasoning_content", "thinking", "reasoning")}) == 1
    assert of(reasoning_content="", name="", tool_calls=[]) == of()
    assert of(**called(function={"name": "f", "arguments": {"x": 2}})) != of(**spelt[0])
