"""Calls, reasoning and tools under the chat templates of real models: rendered as transformers renders them and scored
whole, or refused with the reason. The templates are those that TRL brings along.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trl
from transformers.utils.chat_template_utils import render_jinja_template

from fastcompat.corpus import rows_from_records
from fastcompat.rows.message import Message
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.tokens.built_in_templates import BUILT_IN_TEMPLATES
from fastcompat.tokens.templates import ChatTemplate, ConversationRefusedError, RenderedConversation

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
NAMES = sorted(path.stem for path in TEMPLATES.glob("*.jinja") if not path.stem.endswith("_training"))
VARIABLES = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
SPECIAL = [
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|im_start|>",
    "<|eot_id|>",
    "<end_of_turn>",
    "<turn|>",
    "<|return|>",
    "<|call|>",
]
SPECIAL += [
    "<|end|>",
    "<｜end▁of▁sentence｜>",
    "<|END_OF_TURN_TOKEN|>",
    "<|eot|>",
    "<end_of_utterance>",
    "</tool_call>",
]


def call(name: str = "weather", **arguments: object) -> dict[str, Any]:
    return {
        "type": "function",
        "id": "call00001",
        "function": {"name": name, "arguments": arguments or {"city": "Graz"}},
    }


def turn(role: str, content: object = "", **others: object) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": f"Gives the {name}.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string", "description": "Which."}}},
        },
    }
    for name in ("weather", "time")
]
ASKS = turn("user", "How warm is it?")
ANSWER = [
    ASKS,
    turn("assistant", "", tool_calls=[call()]),
    turn("tool", '{"t": 7}', name="weather"),
    turn("assistant", "Seven."),
]
CASES: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]] | None]] = {
    "text": ([ASKS, turn("assistant", "Seven.")], None),
    "system": ([turn("system", "Be brief."), ASKS, turn("assistant", "Seven.")], None),
    "developer": ([turn("developer", "Be brief."), ASKS, turn("assistant", "Seven.")], None),
    "several turns": (
        [ASKS, turn("assistant", "Seven."), turn("user", "Why?"), turn("assistant", "It is winter.")],
        None,
    ),
    "answer after a call": (ANSWER, TOOLS),
    "call": ([ASKS, turn("assistant", "", tool_calls=[call()])], TOOLS),
    "call without a text": ([ASKS, turn("assistant", None, tool_calls=[call()])], TOOLS),
    "call after a text": ([ASKS, turn("assistant", "Let me look.", tool_calls=[call()])], TOOLS),
    "two calls": ([ASKS, turn("assistant", "", tool_calls=[call(), call("time", city="Linz")])], TOOLS),
    "reasoning": ([ASKS, turn("assistant", "Seven.", reasoning_content="Six and one.")], None),
    "thinking": ([ASKS, turn("assistant", "Seven.", thinking="Six and one.")], None),
    "reasoning and call": (
        [ASKS, turn("assistant", "", reasoning_content="I look it up.", tool_calls=[call()])],
        TOOLS,
    ),
    "think block": ([ASKS, turn("assistant", "<think>\nSix and one.\n</think>\n\nSeven.")], None),
    "tools": ([ASKS, turn("assistant", "Seven.")], TOOLS),
}
# What of the scored turn must stand in the scored characters, where they are told.
SAID = {
    "call after a text": ("Let me look.", "weather", "Graz"),
    "two calls": ("weather", "Graz", "time", "Linz"),
    "call": ("weather", "Graz"),
    "call without a text": ("weather", "Graz"),
    "reasoning and call": ("I look it up.", "weather", "Graz"),
    "think block": ("Six and one.", "Seven."),
    **dict.fromkeys(("reasoning", "thinking"), ("Six and one.", "Seven.")),
}


def row_of(turns: Sequence[dict[str, Any]], tools: object = None) -> Response:
    (row,) = rows_from_records([{"messages": turns, "tools": tools}])
    assert row.status is Status.OK
    return row


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, description="it", variables=VARIABLES, special_tokens=SPECIAL)


def theirs(template: ChatTemplate, turns: list[dict[str, Any]], tools: object) -> str | None:
    """What `apply_chat_template` gives, None where it refuses. It takes keys out whose value is None."""
    given = [{key: value for key, value in turn.items() if value is not None} for turn in turns]
    try:
        texts, _ = render_jinja_template(conversations=[given], tools=tools, chat_template=template.source, **VARIABLES)
    except Exception:
        return None
    return texts[0]


def found_or_refused(template: ChatTemplate, row: Response) -> RenderedConversation | ConversationRefusedError:
    try:
        return template.scored_text(row.messages, tools=row.tools)
    except ConversationRefusedError as refusal:
        return refusal


@pytest.mark.parametrize("name", NAMES)
def test_every_real_template(name: str) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    for case, (turns, tools) in CASES.items():
        row = row_of(turns, tools)
        rendered = theirs(template, turns, tools)
        found = found_or_refused(template, row)
        if isinstance(found, ConversationRefusedError):
            # It is told what: a refusal of theirs, or something that is said and does not show.
            assert found.status is Status.TEMPLATE, (case, found.detail)
            assert rendered is None or "leaves out" in found.detail, (case, found.detail)
            continue
        (span,) = found.spans
        scored = found.text[slice(*span)]
        if rendered is not None and turns[0]["role"] != "developer":
            assert found.text == rendered, case
        wanted = SAID.get(case, (turns[-1]["content"],))
        assert all(text in scored for text in wanted), (case, scored)
        assert not any(text in scored for text in ("How warm is it?", "Be brief.", '{"t": 7}')), (case, scored)
        # To the end of what is rendered, but for blanks and what closes the whole text.
        rest = found.text[span[1] :].strip()
        assert rest in ("", *VARIABLES.values()), (case, rest)
        assert found.text[: span[0]].count("How warm is it?") == 1, case


@pytest.mark.parametrize(
    ("name", "case", "what"),
    [
        ("llama3", "call", "tool call 0 of turn 1"),
        ("gemma3", "call without a text", "tool call 0 of turn 1"),
        ("gptoss", "two calls", "tool call 1 of turn 1"),
        ("llama3_1", "call after a text", "the text of turn 1"),
        ("phi3", "reasoning", "the reasoning of the response"),
        ("deepseek_r1_distill", "think block", "the reasoning of the response"),
        ("gemma3", "tools", "the tools"),
    ],
)
def test_what_a_template_leaves_out_is_told(name: str, case: str, what: str) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    row = row_of(*CASES[case])
    with pytest.raises(ConversationRefusedError, match=f"the chat template leaves out {what}") as refusal:
        template.whole_text(row.messages, tools=row.tools)
    assert refusal.value.status is Status.TEMPLATE


def test_reasoning_of_earlier_turns_may_go() -> None:
    """Qwen3 and others leave it out of what follows by design; so do those who train with their templates."""
    template = template_of((TEMPLATES / "qwen3.jinja").read_text())
    turns = [
        *(ASKS, turn("assistant", "Seven.", reasoning_content="Six and one.")),
        *(turn("user", "Why?"), turn("assistant", "It is winter.", reasoning_content="January.")),
    ]
    found = template.scored_text(row_of(turns).messages)
    assert "Six and one." not in found.text
    assert found.text[slice(*found.spans[0])] == "<think>\nJanuary.\n</think>\n\nIt is winter.<|im_end|>"


def test_a_developer_is_a_system_where_the_template_does_not_know_it() -> None:
    (developer, _), (system, _) = CASES["developer"], CASES["system"]
    qwen = template_of((TEMPLATES / "qwen3.jinja").read_text())
    assert qwen.render(row_of(developer).messages) == qwen.render(row_of(system).messages)
    chatml = template_of("{% for m in messages %}{{ '<|im_start|>' + m.role + ' ' + m.content }}{% endfor %}")
    assert "<|im_start|>developer Be brief." in chatml.render(row_of(developer).messages)


@pytest.mark.parametrize("arguments", [{"city": "Graz"}, '{"city": "Graz"}'], ids=["object", "text"])
@pytest.mark.parametrize("content", ["", None])
def test_a_call_goes_in_the_form_that_the_template_shows(arguments: object, content: str | None) -> None:
    """DeepSeek's wants null and JSON text, Qwen3-Coder's an object; a corpus has one of them."""
    wants_text = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}"
    wants_text += "{% endfor %}{{ m.content or '' }}|{% endfor %}"
    wants_null = "{% for m in messages %}{% if m.content is none %}{{ m.tool_calls[0].function.name }}"
    wants_null += "{{ m.tool_calls[0].function.arguments | tojson }}{% else %}{{ m.content }}{% endif %}|{% endfor %}"
    wants_object = "{% for m in messages %}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
    wants_object += "{% for k, v in c.function.arguments.items() %}{{ k + '=' + v }}{% endfor %}{% endfor %}"
    wants_object += "{{ m.content or '' }}|{% endfor %}"
    function = {"name": "weather", "arguments": arguments}
    row = row_of([ASKS, turn("assistant", content, tool_calls=[{"type": "function", "function": function}])])
    assert template_of(wants_text).whole_text(row.messages) == 'How warm is it?|weather{"city": "Graz"}|'
    assert template_of(wants_object).whole_text(row.messages) == "How warm is it?|weathercity=Graz|"
    shown = template_of(wants_null).whole_text(row.messages)
    assert shown == f"How warm is it?|weather{json.dumps(arguments)}|"  # a form that it shows stays as it is


@pytest.mark.parametrize("name", ["plain", "chatml", "alpaca"])
def test_the_built_in_templates_show_all_of_it(name: str) -> None:
    template = template_of(BUILT_IN_TEMPLATES[name])
    for case, (turns, tools) in CASES.items():
        row = row_of(turns, tools)
        found = template.scored_text(row.messages, tools=row.tools)
        scored = found.text[slice(*found.spans[0])]
        assert all(text in scored for text in SAID.get(case, (turns[-1]["content"],))), (case, scored)
        assert "None" not in found.text, case
    row = row_of(*CASES["reasoning and call"])
    found = template.scored_text(row.messages, tools=row.tools)
    scored = found.text[slice(*found.spans[0])]
    assert scored.startswith("<think>\nI look it up.\n</think>\n\n<tool_call>\n")
    assert '{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call>' in scored


def test_all_turns_with_calls() -> None:
    template = template_of((TEMPLATES / "qwen3.jinja").read_text())
    row = row_of(*CASES["answer after a call"])
    found = template.scored_text(row.messages, tools=row.tools, turns="all")
    texts = [found.text[slice(*span)] for span in found.spans]
    assert texts[0] == '<tool_call>\n{"name": "weather", "arguments": {"city": "Graz"}}\n</tool_call><|im_end|>'
    assert texts[1].endswith("Seven.<|im_end|>")
    without = template.scored_text(row.messages, tools=row.tools, turns="all", score_eos=False)
    assert [found.text[slice(*span)] for span in without.spans] == [text.removesuffix("<|im_end|>") for text in texts]


def test_a_call_that_ends_in_another_way_than_a_text() -> None:
    template = template_of((TEMPLATES / "gptoss.jinja").read_text())
    row = row_of(*CASES["call"])
    found = template.scored_text(row.messages, tools=row.tools)
    assert found.text[slice(*found.spans[0])].endswith('<|message|>{"city": "Graz"}<|call|>')
    found = template.scored_text(row.messages, tools=row.tools, score_eos=False)
    assert found.text[slice(*found.spans[0])].endswith('<|message|>{"city": "Graz"}')


def test_masked_turns_are_not_scored() -> None:
    chatml = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    generation = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
        "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}"
        "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    turns = [Message("user", "Q"), Message("assistant", "bad"), Message("user", "R"), Message("assistant", "good")]
    for source in (chatml, generation):
        template = template_of(source)
        found = template.scored_text(turns, turns="all", masked={1})
        assert [found.text[slice(*span)] for span in found.spans] == ["good<|im_end|>"]
        found = template.scored_text(turns, turns="all", masked={3})
        assert [found.text[slice(*span)] for span in found.spans] == ["bad<|im_end|>"]
        with pytest.raises(ConversationRefusedError) as refusal:
            template.scored_text(turns, masked={3})
        assert refusal.value.status is Status.MASKED


# --- what a review found


QWEN3 = (TEMPLATES / "qwen3.jinja").read_text()


def test_the_verdict_on_a_row_does_not_depend_on_the_rows_before() -> None:
    template = template_of((TEMPLATES / "llama3.jinja").read_text())
    blank = row_of([ASKS, turn("assistant", "Seven.", reasoning_content="")])
    thinks = row_of([ASKS, turn("assistant", "Seven.", reasoning_content="Six and one.")])
    assert template.whole_text(blank.messages)
    with pytest.raises(ConversationRefusedError, match="leaves out the reasoning"):
        template.whole_text(thinks.messages)
    assert template.whole_text(blank.messages)


@pytest.mark.parametrize("content", [{"t": "RES1"}, [{"t": "RES1"}]], ids=["object", "list"])
@pytest.mark.parametrize("name", ["qwen3", "glm4moe", "gemma4_v5", "lfm2_2_5", "qwen2_5"])
def test_an_answer_that_is_no_text_shows(name: str, content: object) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    turns = [ASKS, turn("assistant", "", tool_calls=[call()]), turn("tool", content, name="weather")]
    row = row_of([*turns, turn("assistant", "Seven.")], TOOLS)
    found = found_or_refused(template, row)
    assert isinstance(found, ConversationRefusedError) or "RES1" in found.text


@pytest.mark.parametrize("name", ["qwen3_5_think", "qwen3_8", "lfm2_v2", "nemotron_3_nano", "qwen3"])
def test_arguments_show_by_whatever_name_they_go(name: str) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    for given in ({"parameters": {"c": "ARG1"}}, {"arguments": {"c": "ARG1"}}, {"arguments": ["ARG1"]}):
        called = {"type": "function", "function": {"name": "weather", **given}}
        found = found_or_refused(template, row_of([ASKS, turn("assistant", "", tool_calls=[called])]))
        assert isinstance(found, ConversationRefusedError) or "ARG1" in found.text[slice(*found.spans[0])]


@pytest.mark.parametrize("name", ["gemma4_v5", "qwen3", "glm4moe", "gptoss"])
def test_answers_are_never_scored_with_all_turns(name: str) -> None:
    template = template_of((TEMPLATES / f"{name}.jinja").read_text())
    row = row_of(
        [ASKS, turn("assistant", "", tool_calls=[call()]), turn("tool", "RES1"), turn("assistant", "AONE")], TOOLS
    )
    found = template.scored_text(row.messages, tools=row.tools, turns="all")
    assert all("RES1" not in found.text[slice(*span)] for span in found.spans)
    assert "AONE" in found.text[slice(*found.spans[-1])]


def test_stretches_around_a_think_tag_are_told() -> None:
    template = template_of(QWEN3)
    for text in ("First I say this. <think>x</think> Then that.", "<think>a</think> middle </think> end"):
        with pytest.raises(ConversationRefusedError, match="leaves out the text of turn 1"):
            template.whole_text(row_of([ASKS, turn("assistant", text)]).messages)


def test_reasoning_that_is_no_text() -> None:
    template = template_of(QWEN3)
    for thought in ([{"type": "thinking", "thinking": "abc"}], ["abc"], {"text": "abc"}):
        found = template.scored_text(row_of([ASKS, turn("assistant", "Seven.", reasoning_content=thought)]).messages)
        assert found.text[slice(*found.spans[0])] == "<think>\nabc\n</think>\n\nSeven.<|im_end|>"


def test_no_call_is_made_of_nothing() -> None:
    for nothing in (
        {"function_call": {"name": None, "arguments": None}},
        {"tool_calls": "None"},
        {"tool_calls": "null"},
    ):
        row = row_of([ASKS, turn("assistant", "Seven.", **nothing)])
        assert row.messages[-1] == Message("assistant", "Seven.")
    for calls in ([json.dumps(call())], call(), json.dumps([call()])):
        assert row_of([ASKS, turn("assistant", "", tool_calls=calls)]).messages[-1].others["tool_calls"] == [call()]


def test_bare_tools_and_calls_go_into_a_function_where_only_that_shows() -> None:
    template = template_of((TEMPLATES / "gptoss.jinja").read_text())
    bare = {"name": "weather", "arguments": {"city": "Graz"}}
    tools = [tool["function"] for tool in TOOLS]
    row = row_of([ASKS, turn("assistant", "", tool_calls=[bare])], tools)
    found = template.scored_text(row.messages, tools=row.tools)
    assert "Gives the weather." in found.text
    assert "Graz" in found.text[slice(*found.spans[0])]


def test_built_in_templates_give_no_arguments_an_empty_object() -> None:
    template = template_of(BUILT_IN_TEMPLATES["chatml"])
    called = {"type": "function", "function": {"name": "now", "arguments": ""}}
    text = template.whole_text(row_of([ASKS, turn("assistant", "", tool_calls=[called])]).messages)
    assert '{"name": "now", "arguments": {}}' in text
