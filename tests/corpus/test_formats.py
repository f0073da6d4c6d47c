"""Every known shape gives the rows it should; what fits none says why; no record goes without a row."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
from corpus_shapes import SHAPES
from hypothesis import given
from hypothesis import strategies as st

from fastcompat.corpus.formats import detect, parse_overrides, rows_from_records
from fastcompat.errors import SchemaError, UsageError
from fastcompat.rows.response import Message, Response, prompt_id
from fastcompat.rows.status import Status

USER, ASSISTANT = "user", "assistant"


def turns(*pairs: tuple[Any, Any]) -> list[dict[str, Any]]:
    return [{"role": role, "content": content} for role, content in pairs]


def read(*records: Any, **settings: Any) -> list[Response]:
    return rows_from_records(records, **settings)


def plain(row: Response) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in row.messages]


@pytest.mark.parametrize("shape", SHAPES)
def test_shape(shape: str) -> None:
    records, expected = SHAPES[shape]
    rows = rows_from_records(records, generator="own")
    read_back = [(row.generator, tuple(plain(row))) for row in rows]
    assert read_back == [(name or "own", messages) for name, messages in expected]
    assert {row.status for row in rows} == {Status.OK}
    assert len({row.row_key for row in rows}) == len(rows)


@pytest.mark.parametrize(
    ("record", "line"),
    [
        (
            {"messages": turns((USER, "a"), (ASSISTANT, "b")), "model": "m"},
            "messages (role/content); generator from column `model`",
        ),
        (
            {"conversation": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            "conversation (from/value); generator from the file's name",
        ),
        ({"question": "a", "answer": "b"}, "question + answer; generator from the file's name"),
        (
            {"instruction": "a", "input": "b", "output": "c"},
            "instruction + input + output; generator from the file's name",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "chosen_model": "m", "system": "s"},
            "prompt + chosen + rejected; system from column `system`; generator from columns `chosen_model`",
        ),
        (
            {"instruction": "a", "context": "b", "response": "c", "category": "d", "id": "1", "n": 5, "hash": "7"},
            "instruction + context + response; generator from the file's name; not used: category, n, id, hash",
        ),
        (
            {"prompt": "a", "response": "b", "model": "m", "model_name": "n"} | {f"c{i}": "x" for i in range(18)},
            "prompt + response; generator from column `model`; not used: model_name, "
            + ", ".join(f"c{i}" for i in range(15))
            + " and 3 more",
        ),
        (
            {"instruction": "a", "m1": {"content": "b"}, "m2": {"content": "c"}},
            "instruction + struct per generator; generator from the names of 2 struct columns (m1, m2)",
        ),
    ],
)
def test_mapping_describes_itself(record: dict[str, Any], line: str) -> None:
    assert detect([record]).describe() == line


# --- conversations


@pytest.mark.parametrize(
    ("spelled", "role"),
    [
        *((name, "user") for name in ("human", "user", "Human", " USER ", "prompter")),
        *((name, "assistant") for name in ("gpt", "chatgpt", "bing", "bard", "assistant", "model", "GPT")),
        *((name, "assistant") for name in ("ai", "bot", "Chatbot")),
        *((name, "tool") for name in ("tool", "function", "observation")),
        ("system", "system"),
        ("narrator", "narrator"),
    ],
)
def test_roles(spelled: str, role: str) -> None:
    (row,) = read({"conversations": [{"from": spelled, "value": "a"}, {"from": "gpt", "value": "b"}]})
    assert plain(row) == [(role, "a"), (ASSISTANT, "b")]


def test_turns_after_the_last_answer_are_cut() -> None:
    (row,) = read(
        {"messages": turns((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d"), (USER, "e"), ("tool", "f"))}
    )
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")]


def test_system_turn_of_the_conversation_wins_over_the_column() -> None:
    (row,) = read({"system": "column", "messages": turns(("system", "turn"), (USER, "a"), (ASSISTANT, "b"))})
    assert plain(row)[0] == ("system", "turn")


def test_struct_of_lists_is_a_conversation() -> None:
    (row,) = read({"messages": {"role": [USER, ASSISTANT], "content": ["a", "b"]}})
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b")]


def test_hh_keeps_every_turn() -> None:
    text = "\n\nHuman: a\n\nAssistant: b\n\nHuman: c: d\n\nAssistant:"
    chosen, rejected = read({"chosen": text + " good", "rejected": text + " bad"})
    assert plain(chosen) == [(USER, "a"), (ASSISTANT, "b"), (USER, "c: d"), (ASSISTANT, "good")]
    assert rejected.prompt_id == chosen.prompt_id
    (row,) = read({"prompt": text, "response": "good"})
    assert row.messages == chosen.messages


def test_prompt_only_messages_beside_a_response() -> None:
    (row,) = read({"messages": turns((USER, "a")), "response": "b"})
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b")]


@pytest.mark.parametrize(
    "record",
    [
        {"conversations": ["a", "b", "c", "d"], "source": "lima"},
        {"conversation": [{"input": "a", "output": "b"}, {"input": "c", "output": "d"}], "source": "capybara"},
        {"messages": json.dumps(turns((USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")))},
        {
            "messages": [
                {**turn, "from": None, "value": None}
                for turn in turns(*zip((USER, ASSISTANT) * 2, "abcd", strict=True))
            ]
        },
        {
            "messages": [
                {"role": None, "content": None, "from": name, "value": text}
                for name, text in zip(("human", "gpt") * 2, "abcd", strict=True)
            ]
        },
    ],
)
def test_layouts_of_a_conversation(record: dict[str, Any]) -> None:
    (row,) = read(record)
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b"), (USER, "c"), (ASSISTANT, "d")]


def test_lists_of_texts_beside_a_response_are_no_conversation() -> None:
    (row,) = read({"prompt": "a", "response": "b", "items": ["x", "y"]})
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b")]


def test_numbered_responses_are_named_after_their_columns() -> None:
    record = {"prompt": "a", "response_0": "b", "response_1": "c", "better_response_id": 1}
    assert [(row.generator, plain(row)[-1][1]) for row in read(record)] == [("response_0", "b"), ("response_1", "c")]
    sources = {"response_0_source": "m", "response_1_source": "n"}
    assert [row.generator for row in read({**record, **sources})] == ["m", "n"]


def test_column_names_in_any_case() -> None:
    (row,) = read({"Instruction": "a", "Input": "b", "Output": "c", "Model": "m"})
    assert (row.generator, plain(row)) == ("m", [(USER, "a\n\nb"), (ASSISTANT, "c")])


# --- what the first records lack, and what is null


@pytest.mark.parametrize("absent", [{}, {"model": None, "system": None, "input": None}])
def test_optional_columns_that_come_late(absent: dict[str, Any]) -> None:
    early = {"instruction": "a", "output": "b", **absent}
    rows = read(*[early] * 100, {"instruction": "a", "output": "b", "model": "m", "system": "s", "input": "i"})
    assert rows[99].generator == "unknown"
    assert (rows[100].generator, plain(rows[100])[:2]) == ("m", [("system", "s"), (USER, "a\n\ni")])


def test_sides_of_a_pair_whose_models_come_late() -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = read(*[pair] * 100, {**pair, "chosen_model": "m", "rejected_model": "n"})
    assert [row.generator for row in rows[-4:]] == ["chosen", "rejected", "m", "n"]


def test_each_record_names_its_generator_as_it_likes() -> None:
    good = {"prompt": "a", "response": "b"}
    names = [{"generator": "g"}, {"model": "m"}, {"generator": None, "model": "n"}, {"generator": " ", "model_id": 7}]
    assert [row.generator for row in read(*({**good, **name} for name in names))] == ["g", "m", "n", "7"]
    assert "column `generator`, else `model`" in detect([{**good, **name} for name in names]).describe()


@pytest.mark.parametrize(("part", "name"), [("generator", "m"), ("input", "unknown"), ("system", "unknown")])
def test_override_of_an_optional_column_that_comes_late(part: str, name: str) -> None:
    early = {"prompt": "a", "response": "b"}
    rows = read(*[early] * 70, {**early, "x": "m"}, overrides={part: "x"})
    assert rows[0].generator == "unknown"
    assert rows[70].generator == name
    assert ("m" in str(plain(rows[70]))) == (part != "generator")
    with pytest.raises(SchemaError, match="has no column `x`"):
        detect([early], overrides={part: "x"}, more_columns=False)


def test_an_override_that_has_found_nothing_yet_says_so() -> None:
    described = detect([{"prompt": "a", "response": "b", "model": "m"}], overrides={"generator": "who"}).describe()
    assert "generator from column `who` (nothing in the first records), else the file's name" in described


def test_a_null_response_is_empty_whatever_stands_beside_it() -> None:
    """It may be a reference solution, and a generator that failed must not be credited with it."""
    assert plain(read({"prompt": "a", "response": None, "output": "b"})[0])[-1] == (ASSISTANT, "b")
    merged = [
        {"prompt": "a", "response": "x", "output": None},
        {"prompt": "a", "response": None, "output": "y"},
        {"prompt": "a", "response": None, "output": None},
    ]
    assert [(plain(row)[-1][1], str(row.status)) for row in read(*merged)] == [
        ("x", "ok"),
        ("", "empty"),
        ("", "empty"),
    ]
    rows = read(
        {"problem": "a", "generation": "b"},
        {"problem": "a", "generation": None, "solution": "gold"},
    )
    assert [str(row.status) for row in rows] == ["ok", "empty"]


def test_a_null_key_does_not_hide_its_sibling_in_a_completion() -> None:
    (row,) = read({"prompt": "a", "completions": [{"model": "m", "response": None, "text": "b"}]})
    assert plain(row)[-1] == (ASSISTANT, "b")


def test_a_null_prompt_is_not_called_a_missing_column() -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    for row in read(good, {**good, "prompt": None})[2:]:
        assert row.status is Status.INVALID
        assert "column" not in row.detail
    row = read({"prompt": "a", "x": "b"}, {"prompt": None, "x": "b"}, overrides={"response": "x"})[1]
    assert (row.status, row.detail) == (Status.INVALID, "column `prompt` is null")


# --- several responses, and what only looks like them


@pytest.mark.parametrize("name", ["answers", "outputs", "candidates", "responses"])
@pytest.mark.parametrize("several", [["x", "y"], [{"text": "x"}, {"text": "y"}]])
def test_lists_do_not_beat_a_response(name: str, several: list[Any]) -> None:
    for record in (
        {"prompt": "a", "response": "b", name: several},
        {"prompt": "a", "output": "b", name: several},
        {"prompt": "a", "messages": turns((USER, "a"), (ASSISTANT, "b")), name: several},
    ):
        (row,) = read(record)
        assert plain(row)[-1] == (ASSISTANT, "b")
    assert [plain(row)[-1][1] for row in read({"prompt": "a", name: several})] == ["x", "y"]


def test_lists_of_objects_without_a_text_are_no_completions() -> None:
    with pytest.raises(SchemaError):
        read({"prompt": "a", "candidates": [{"id": 1}]})
    assert [plain(row)[-1][1] for row in read({"prompt": "a", "outputs": [{"instruction": "x", "output": "b"}]})] == [
        "b"
    ]


def test_a_pair_beats_generations_that_nobody_signed() -> None:
    record = {
        "system": "",
        "input": "a",
        "chosen": "b",
        "rejected": "c",
        "generations": ["c", "b"],
        "order": ["x", "y"],
    }
    assert [(row.generator, plain(row)[-1][1]) for row in read(record)] == [("chosen", "b"), ("rejected", "c")]
    rows = read({**record, "generation_models": ["m", "n"]})
    assert [(row.generator, plain(row)[-1][1]) for row in rows] == [("m", "c"), ("n", "b")]


@pytest.mark.parametrize(
    "several", [{"generations": ["b", "c"]}, {"completions": [{"text": "b", "model": "x"}, {"text": "c"}]}]
)
def test_override_with_a_list_of_generators(several: dict[str, Any]) -> None:
    record = {"prompt": "a", "who": ["m", "n"], **several}
    long = {"prompt": "a", "who": ["m", "n", "o"], **several}
    rows = read(record, long, overrides={"generator": "who"})
    assert [row.generator for row in rows[:2]] == ["m", "n"]
    assert {row.detail for row in rows[:2]} == {""}
    assert {row.status for row in rows} == {Status.OK}
    assert all("the generator column names 3" in row.detail and "has 2 responses" in row.detail for row in rows[2:])


# --- rows that cannot be scored keep their place


@pytest.mark.parametrize("value", [None, "", " \n\t ", []])
def test_empty_response(value: object) -> None:
    row, good = read({"prompt": "a", "response": value}, {"prompt": "c", "response": "d"})
    assert (row.status, plain(row)) == (Status.EMPTY, [(USER, "a"), (ASSISTANT, "")])
    assert row.detail
    assert good.status is Status.OK


@pytest.mark.parametrize(
    "messages",
    [None, [], turns((USER, "a")), turns((USER, "a"), (ASSISTANT, None)), turns((USER, "a"), (ASSISTANT, " "))],
)
def test_conversation_without_answer(messages: object) -> None:
    row = read({"messages": messages}, {"messages": turns((USER, "a"), (ASSISTANT, "b"))})[0]
    assert row.status is Status.EMPTY
    assert plain(row)[-1] == (ASSISTANT, "")


@pytest.mark.parametrize(
    ("record", "detail"),
    [
        ({"prompt": "a", "response": 3}, "response is a number, not text"),
        ({"prompt": "a", "response": True}, "response is a boolean, not text"),
        ({"prompt": "a", "response": {"x": 1}}, "response is an object with the keys x, not text"),
        ({"prompt": "a", "response": ["x", "y"]}, "--map generations=response"),
        ({"prompt": "a", "response": [{"type": "image", "url": "x"}]}, "a part of type 'image'"),
        ({"prompt": 7, "response": "b"}, "prompt is a number, not text"),
        ({"prompt": None, "response": "b"}, "column `prompt` is null"),
        ({"prompt": "a"}, "column `response` is missing; this record has: prompt"),
        ({"response": "a"}, "column `prompt` is missing; this record has: response"),
        ({}, "column `response` is missing; this record has: none"),
        ({"prompt": "a", "response": "b", "system": 1}, "the system prompt is a number, not text"),
        ({"prompt": "a", "response": "x\ud800y"}, "unpaired surrogate"),
        ({"prompt": "\udfff", "response": "y"}, "unpaired surrogate"),
        ({"prompt": "a", "response": "y", "generator": "\ud83d"}, "unpaired surrogate"),
        ("text", "a record is a string, not an object"),
        (None, "a record is null, not an object"),
    ],
)
def test_invalid_record(record: Any, detail: str) -> None:
    good = {"prompt": "a", "response": "b", "generator": "m", "system": "s"}
    before, row, after = read(good, record, good)
    assert (row.status, row.row_index) == (Status.INVALID, 1)
    assert detail in row.detail
    json.dumps([row.messages, row.detail, row.generator], ensure_ascii=False).encode()
    assert before.status is after.status is Status.OK


@pytest.mark.parametrize(
    ("turn", "detail"),
    [
        ({"role": USER, "content": 3}, "messages[0] is a number, not text"),
        ({"role": USER, "content": None}, "messages[0] is null, not text"),
        ({"content": "a"}, "messages[0] names no role"),
        ({"role": USER}, "messages[0] has no text"),
        ({"role": 3, "content": "a"}, "the role of messages[0] is a number"),
        ("a", "messages[0] is a string, not a turn"),
    ],
)
def test_invalid_turn(turn: object, detail: str) -> None:
    good = {"messages": turns((USER, "a"), (ASSISTANT, "b"))}
    _, row = read(good, {"messages": [turn, *turns((ASSISTANT, "b"))]})
    assert row.status is Status.INVALID
    assert detail in row.detail


def test_one_bad_completion_does_not_spoil_its_neighbours() -> None:
    completions = [
        {"model": "m", "response": "a"},
        {"model": "n", "response": 5},
        {"model": "o"},
        "p",
        {"response": None, "model": "q"},
    ]
    rows = read({"instruction": "x", "completions": completions})
    assert [str(row.status) for row in rows] == ["ok", "invalid", "invalid", "invalid", "empty"]
    assert [row.generator for row in rows] == ["m", "n", "o", "unknown", "q"]
    assert [row.response_index for row in rows] == [0, 1, 2, 3, 4]


def test_records_with_several_responses_never_vanish() -> None:
    full = {"instruction": "x", "m": {"content": "a"}, "n": {"content": "b"}}
    rows = read(full, {"instruction": "x", "m": None, "n": {"content": "b"}}, {"instruction": "x", "n": {"reward": 1}})
    assert [(row.row_index, row.generator, str(row.status)) for row in rows] == [
        *((0, "m", "ok"), (0, "n", "ok"), (1, "m", "empty"), (1, "n", "ok"), (2, "m", "empty"), (2, "n", "invalid"))
    ]
    for key, values in (("completions", [[], None]), ("generations", [[], None])):
        good = {"instruction": "x", key: [{"model": "m", "response": "a"}] if key == "completions" else ["a"]}
        rows = read(good, *({"instruction": "x", key: value} for value in values))
        assert [str(row.status) for row in rows] == ["ok", "empty", "empty"]


def test_a_generator_that_comes_late_is_read() -> None:
    records = [{"instruction": "x", "m": {"content": "a"}}] * 100
    rows = read(
        *records, {"instruction": "x", "m": {"content": "a"}, "late": {"content": "b"}, "metadata": {"content": 1}}
    )
    assert [(row.row_index, row.response_index, row.generator) for row in rows[100:]] == [
        (100, 0, "m"),
        (100, 1, "late"),
    ]


def test_half_a_preference_pair() -> None:
    good = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows = read(good, {"prompt": "a", "chosen": None, "rejected": "c"})
    assert [(row.generator, str(row.status)) for row in rows[2:]] == [("chosen", "empty"), ("rejected", "ok")]


def test_records_of_another_shape_are_read_by_it() -> None:
    rows = read(
        {"messages": turns((USER, "a"), (ASSISTANT, "b"))},
        {"prompt": "c", "response": "d"},
        {"messages": None, "prompt": "e", "response": "f"},
        {"conversations": [{"from": "human", "value": "g"}, {"from": "gpt", "value": "h"}]},
    )
    assert [plain(row) for row in rows] == [[(USER, u), (ASSISTANT, a)] for u, a in ("ab", "cd", "ef", "gh")]


def test_columns_that_are_still_null_do_not_decide_the_shape() -> None:
    rows = read({"messages": [], "prompt": "a", "response": "b"}, {"messages": None, "prompt": "c", "response": "d"})
    assert [plain(row)[-1] for row in rows] == [(ASSISTANT, "b"), (ASSISTANT, "d")]


@pytest.mark.parametrize(("value", "name"), [("m", "m"), (None, "own"), ("", "own"), (7, "7"), (["a"], "own")])
def test_generator_column(value: object, name: str) -> None:
    (row, _) = read(
        {"prompt": "a", "response": "b", "model": value},
        {"prompt": "a", "response": "b", "model": "x"},
        generator="own",
    )
    assert row.generator == name


# --- overrides and unknown schemas


@pytest.mark.parametrize(
    ("record", "overrides"),
    [
        ({"x": "a", "y": "b", "response": "wrong"}, {"prompt": "x", "response": "y"}),
        ({"prompt": "a", "answer": {"text": "b"}}, {"response": "answer.text"}),
        ({"instruction": "a", "alt": [{"t": "wrong"}, {"t": "b"}]}, {"output": "alt.1.t"}),
        ({"a.b": "b", "question": "a"}, {"response": "a.b"}),
        ({"messages": [], "dialogue": turns((USER, "a"), (ASSISTANT, "b"))}, {"messages": "dialogue"}),
        ({"deep": {"dialogue": turns((USER, "a"), (ASSISTANT, "b"))}}, {"conversations": "deep.dialogue"}),
        ({"prompt": "a", "several": ["b"]}, {"generations": "several"}),
        ({"prompt": "a", "several": [{"text": "b"}]}, {"completions": "several"}),
        ({"instruction": "a", "alt": [{"t": ["wrong", "b"]}]}, {"output": "alt[0].t[1]"}),
    ],
)
def test_overrides(record: dict[str, Any], overrides: dict[str, str]) -> None:
    (row,) = read(record, overrides=overrides)
    assert plain(row) == [(USER, "a"), (ASSISTANT, "b")]


def test_override_of_the_generator_wins_everywhere() -> None:
    for record in (
        {"instruction": "a", "who": "w", "completions": [{"model": "m", "response": "b"}]},
        {"instruction": "a", "who": "w", "m": {"content": "b"}},
        {"prompt": "a", "who": "w", "model": "m", "response": "b"},
        {"prompt": "a", "who": "w", "chosen": "b", "rejected": "c", "chosen_model": "m"},
    ):
        assert {row.generator for row in read(record, overrides={"generator": "who"})} == {"w"}


def test_override_of_the_response_alone_needs_no_prompt() -> None:
    (row,) = read({"text": "b"}, overrides={"response": "text"})
    assert plain(row) == [(ASSISTANT, "b")]


def test_override_of_a_missing_column_names_those_found() -> None:
    with pytest.raises(SchemaError, match=r"response=reply.*no column `reply`; columns found: prompt, text"):
        read({"prompt": "a", "text": "b"}, overrides={"response": "reply"})


@pytest.mark.parametrize("item", ["response", "=x", "response=", "reply=x"])
def test_malformed_override(item: str) -> None:
    with pytest.raises(UsageError, match="--map"):
        parse_overrides([item])


def test_contradicting_overrides() -> None:
    with pytest.raises(UsageError, match="both `x` and `y`"):
        parse_overrides(["output=x", "response=y"])
    assert parse_overrides(["prompt=x", "response=a=b"]) == {"prompt": "x", "response": "a=b"}


def test_unknown_schema_says_what_was_tried() -> None:
    with pytest.raises(SchemaError) as caught:
        read({"id": 1, "prompt": "a", "reply_text": "b", "answer": {"text": "c"}})
    message = str(caught.value)
    assert "Columns found: id, prompt, reply_text, answer" in message
    for shape in ("messages", "conversations", "completions", "generations", "chosen/rejected", "prompt + response"):
        assert f"  {shape}: " in message
    assert "map a part of it, as in answer.text" in message.split("Shapes tried:")[1].splitlines()[1]
    assert "--map response=COLUMN" in message


# --- what always holds

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(st.characters(), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "text", "type", "model", "response", "x"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=6,
)
_NAMES = ("prompt", "response", "instruction", "input", "output", "messages", "conversations", "completions")
_MORE_NAMES = (
    "generations",
    "chosen",
    "rejected",
    "system",
    "model",
    "generation_models",
    "some_model",
    "score",
    "ratings",
)
_columns = st.sampled_from((*_NAMES, *_MORE_NAMES))


@given(st.lists(st.dictionaries(_columns, _json, max_size=5), max_size=5))
def test_any_record_gives_storable_rows_in_order(records: list[dict[str, Any]]) -> None:
    """Behind a file of good records nothing raises, and every record has its rows."""
    good = {"prompt": "a", "response": "b"}
    rows = rows_from_records([good] * 64 + records)
    assert list(dict.fromkeys(row.row_index for row in rows)) == list(range(64 + len(records)))
    for row in rows:
        json.dumps([row.messages, row.detail, row.generator, row.rewards], ensure_ascii=False).encode()
        assert all(type(value) is float and math.isfinite(value) for _, value in row.rewards)
        if row.status is Status.OK:
            assert row.messages[-1].role == ASSISTANT
            assert row.messages[-1].content.strip()
        else:
            assert row.detail


@given(st.lists(st.tuples(st.text(), st.text(st.characters()))))
def test_prompt_id_is_the_hash_of_plain_json(prompt: list[tuple[str, str]]) -> None:
    import hashlib

    payload = json.dumps([list(turn) for turn in prompt], ensure_ascii=True, separators=(",", ":"))
    expected = hashlib.blake2b(payload.encode("ascii"), digest_size=16).hexdigest()
    assert prompt_id([Message(*turn) for turn in prompt]) == expected
