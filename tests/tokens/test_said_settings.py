"""What a scorer does with reasoning, tools, masks and template variables, by its settings."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizer_makers import CHATML, make_tokenizer, row, scored_text, tokenize

from fastcompat.cli.options import parse_template_options
from fastcompat.errors import UsageError
from fastcompat.rows.message import Message, dumped
from fastcompat.rows.response import Response
from fastcompat.rows.status import Status
from fastcompat.scoring.losses import _bytes_of
from fastcompat.tokens.conversations import ConversationTokenizer
from fastcompat.tokens.reward import ReadOut, RewardTokenizer
from fastcompat.tokens.settings import TokenizationSettings

# ChatML with the reasoning, the calls and the tools, and a switch.
SAYS_ALL = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.reasoning_content and thinking is not false %}"
    "{{ '<think>' + m.reasoning_content + '</think>' }}{% endif %}"
    "{{ m.content }}{% if m.tool_calls %}{{ m.tool_calls[0].function.name }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TOOLS = '[{"name":"weather"}]'


def thinker(content: str = "Seven.", tools: str = "", **extra: Any) -> Response:
    messages = (Message("user", "Two"), Message("assistant", content, dumped(extra)))
    return Response(messages=messages, generator="g", source="s", row_index=0, tools=tools)


def scored(tokenizer: Any, response: Response, **settings: Any) -> str:
    (sequence,) = tokenize(tokenizer, response, **settings)
    assert sequence.status is Status.OK, sequence.detail
    return scored_text(tokenizer, sequence)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer("byte_level", SAYS_ALL)


def test_reasoning_is_scored_or_left_out(tokenizer: Any) -> None:
    response = thinker(reasoning_content="Six and one.")
    assert scored(tokenizer, response) == "<think>Six and one.</think>Seven.<|im_end|>"
    assert scored(tokenizer, response, reasoning="drop") == "Seven.<|im_end|>"
    inline = thinker("<think>\nSix and one.\n</think>\n\nSeven.")
    assert scored(tokenizer, inline).startswith("<think>\nSix and one.")
    assert scored(tokenizer, inline, reasoning="drop") == "Seven.<|im_end|>"


def test_a_response_that_only_thinks_is_empty_without_it(tokenizer: Any) -> None:
    for response in (thinker("", thinking="hm"), thinker("<think>hm</think>\n"), thinker("<think>cut off")):
        assert tokenize(tokenizer, response)[0].status is Status.OK
        assert tokenize(tokenizer, response, reasoning="drop")[0].status is Status.EMPTY


def test_tools_are_given_or_left_out(tokenizer: Any) -> None:
    response = thinker(tools=TOOLS)
    (given,), (left_out,) = tokenize(tokenizer, response), tokenize(tokenizer, response, tools="drop")
    assert tokenizer.decode(given.input_ids).startswith("<|im_start|>system\n" + json.dumps(json.loads(TOOLS)))
    assert (
        tokenizer.decode(left_out.input_ids)
        == "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"
    )
    (refused,) = tokenize(make_tokenizer("byte_level", CHATML), response)
    assert (refused.status, "leaves out the tools" in refused.detail) == (Status.TEMPLATE, True)
    assert tokenize(make_tokenizer("byte_level", CHATML), response, tools="drop")[0].status is Status.OK


def test_masks_are_honoured_or_ignored(tokenizer: Any) -> None:
    turns = [
        ("user", "Q", {}),
        ("assistant", "bad", {"weight": 0}),
        ("user", "R", {}),
        ("assistant", "good", {"weight": 1}),
    ]
    messages = tuple(Message(role, content, dumped(extra)) for role, content, extra in turns)
    response = Response(messages=messages, generator="g", source="s", row_index=0)
    assert scored(tokenizer, response, turns="all") == "good<|im_end|>"
    assert scored(tokenizer, response, turns="all", turn_masks="ignore") == "bad<|im_end|>good<|im_end|>"
    masked = thinker(train=False)
    for which in ("last", "all"):
        assert tokenize(tokenizer, masked, turns=which)[0].status is Status.MASKED
        assert scored(tokenizer, masked, turns=which, turn_masks="ignore") == "Seven.<|im_end|>"


def test_template_options(tokenizer: Any) -> None:
    response = thinker(reasoning_content="Six and one.")
    (sequence,) = tokenize(tokenizer, response, template_options={"thinking": False})
    assert (sequence.status, "leaves out the reasoning" in sequence.detail) == (Status.TEMPLATE, True)
    assert scored(tokenizer, response, template_options={"thinking": True}).startswith("<think>")


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "chat_template"])
def test_what_every_template_is_given_is_no_option(name: str) -> None:
    with pytest.raises(UsageError, match=name):
        TokenizationSettings(template_options={name: 1})


def test_settings_are_checked() -> None:
    for name in ("reasoning", "tools", "turn_masks"):
        with pytest.raises(UsageError, match=f"{name}='maybe' is not one of"):
            TokenizationSettings(**{name: "maybe"})


def test_template_options_of_the_command_line() -> None:
    given = ["enable_thinking=false", "effort=high", "n=3", "x=null", 'l=["a"]', "flag=True", "text=a=b"]
    read = parse_template_options(given)
    assert read == dict(enable_thinking=False, effort="high", n=3, x=None, l=["a"], flag=True, text="a=b")
    for wrong in ("enable_thinking", "=false", "a b=1"):
        with pytest.raises(UsageError, match="write NAME=VALUE"):
            parse_template_options([wrong])
    with pytest.raises(UsageError, match="twice"):
        parse_template_options(["a=1", "a=2"])


def test_fingerprints_follow_and_stay(tokenizer: Any) -> None:
    def fingerprint(**settings: Any) -> str:
        return ConversationTokenizer(tokenizer, TokenizationSettings(**settings), context_length=64).fingerprint()

    usual = fingerprint()
    others: list[dict[str, Any]] = [
        *({"reasoning": "drop"}, {"tools": "drop"}, {"turn_masks": "ignore"}),
        *({"template_options": {"thinking": True}}, {"template_options": {"thinking": False}}),
    ]
    assert len({usual, *(fingerprint(**settings) for settings in others)}) == len(others) + 1
    assert fingerprint(template_options={}, reasoning="keep", tools="keep", turn_masks="honour") == usual


def test_bytes_are_those_of_what_is_scored() -> None:
    response = thinker("Grüße", reasoning_content="hm", tool_calls=[{"function": {"name": "f"}}])
    call = '{"tool_calls":[{"function":{"name":"f"}}]}'
    assert _bytes_of(response, TokenizationSettings()) == len(("hm" + "Grüße" + call).encode())
    assert _bytes_of(response, TokenizationSettings(reasoning="drop")) == len(("Grüße" + call).encode())
    assert _bytes_of(row("Q", "A", "R", "BC"), TokenizationSettings(turns="all")) == 3
    assert _bytes_of(thinker("A", weight=0), TokenizationSettings(turns="all")) == 0


def test_a_reward_model_reads_all_or_says_what_it_does_not(tokenizer: Any) -> None:
    read_out = ReadOut(rule="last", pad_id=None)
    response = thinker(tools=TOOLS, reasoning_content="Six and one.")
    (whole,) = RewardTokenizer(tokenizer, read_out)([response])
    assert "<think>Six and one.</think>Seven." in tokenizer.decode(whole.input_ids)
    (bare,) = RewardTokenizer(tokenizer, read_out, reasoning="drop", tools="drop")([response])
    assert (
        tokenizer.decode(bare.input_ids) == "<|im_start|>user\nTwo<|im_end|>\n<|im_start|>assistant\nSeven.<|im_end|>\n"
    )
    plain = make_tokenizer("byte_level", CHATML)
    (refused,) = RewardTokenizer(plain, read_out)([thinker(reasoning_content="Six and one.")])
    assert (refused.status, "--reward-reasoning drop" in refused.detail) == (Status.TEMPLATE, True)
    assert RewardTokenizer(plain, read_out, truncate=True)([response])[0].status is Status.TEMPLATE
    # A weight is about training: a judge reads the response all the same.
    assert RewardTokenizer(plain, read_out)([thinker(weight=0)])[0].status is Status.OK
