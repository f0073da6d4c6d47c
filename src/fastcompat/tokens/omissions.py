"""What a conversation says and a chat template leaves out: found by changing it, and looking at the render.

A template that does not know a role, tool calls or reasoning mostly drops them without a word, and the model would be
scored on a conversation that nobody had.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastcompat.rows import REASONING_KEYS, Message, dumped, inline_reasoning, reasoning_of

Render = Callable[[Sequence[Message], str], str]

_MARK = "fastcompat0said0this"
_THINK_TAG = re.compile(r"(</?think>)")
_HINT = "drop it with --reasoning drop (a reward model's: --reward-reasoning drop), or give another template"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Something that is said, in words, and the conversation with a mark in its place."""

    what: str
    mark: Callable[[list[Message], str, str], tuple[list[Message], str]]


def structure(messages: Sequence[Message], tools: str) -> tuple[object, ...]:
    """What a template's choices follow: roles, which stretches of text there are, the other keys and what kind of value
    each has; hashable."""
    return (_tools_shape(tools), *((role, _stretches(text), _extra_shape(extra)) for role, text, extra in messages))


def _stretches(content: str) -> object:
    if "think>" not in content:
        return bool(content.strip())
    return tuple(part if _THINK_TAG.fullmatch(part) else bool(part.strip()) for part in _THINK_TAG.split(content))


def _extra_shape(extra: str) -> object:
    return _shape(json.loads(extra), 4) if extra else None


def _tools_shape(tools: str) -> object:
    return _shape(json.loads(tools)[0], 2) if tools else None


def _shape(value: Any, depth: int) -> object:
    """Types, keys and which texts are blank, down to a depth: deeper lie arguments, which are written as they are."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return tuple(sorted((key, _shape(item, depth - 1)) for key, item in value.items())) if depth else "object"
    if isinstance(value, list):
        return tuple(_shape(item, depth - 1) for item in value) if depth else "list"
    return type(value).__name__


def find_omission(messages: Sequence[Message], tools: str, text: str, render: Render) -> str | None:
    """What of the conversation its render `text` does not show, in words; None where all of it counts.

    Counts the texts and the calls of every turn, the reasoning of the last one (templates leave that of earlier turns
    out by design), and the tools. `render` may raise.
    """
    pieces = list(_pieces(messages, tools))
    # All marked at once, which a template mostly renders like the conversation itself.
    marked, marked_tools = list(messages), tools
    for number, piece in enumerate(pieces):
        marked, marked_tools = piece.mark(marked, marked_tools, f"{_MARK}{number}x")
    try:
        shown = render(marked, marked_tools)
    except Exception:
        shown = ""
    for number, piece in enumerate(pieces):
        if f"{_MARK}{number}x" in shown:
            continue
        try:
            changed = render(*piece.mark(list(messages), tools, _MARK))
        except Exception:
            continue  # what makes the template refuse is not ignored
        if changed == text:
            return piece.what
    return None


def _pieces(messages: Sequence[Message], tools: str) -> Iterator[_Piece]:
    for index, message in enumerate(messages):
        whose = f"turn {index} ({message.role})"
        is_last = index == len(messages) - 1
        others = message.others
        if others.get("content") is not None:
            yield _Piece(f"the answer of {whose}", _in_answer(index))
        else:
            yield from _text_pieces(message, index, is_last)
        calls = others.get("tool_calls")
        calls = calls if isinstance(calls, list) else []
        for number in range(len(calls)):
            yield _Piece(f"tool call {number} of {whose}", _in_call(index, number, arguments=False))
            if _arguments(calls[number]):
                what = f"the arguments of tool call {number} of {whose}"
                yield _Piece(what, _in_call(index, number, arguments=True))
        if is_last and reasoning_of(others) is not None:
            yield _Piece(f"the reasoning of the response: {_HINT}", _in_reasoning(index))
    if tools:
        yield _Piece(
            "the tools: leave them out with --tools drop (a reward model's: --reward-tools drop), or give another "
            "template",
            _in_tools,
        )


def _text_pieces(message: Message, index: int, is_last: bool) -> Iterator[_Piece]:
    """The stretches of a text between <think> tags; reasoning at its beginning counts in the last turn only."""
    parts = _THINK_TAG.split(message.content) if "think>" in message.content else [message.content]
    thinks = message.role == "assistant" and bool(inline_reasoning(message.content)[0].strip())
    closed = next((n for n, part in enumerate(parts) if part == "</think>"), len(parts)) if thinks else 0
    for number, part in enumerate(parts):
        if not part.strip() or _THINK_TAG.fullmatch(part):
            continue
        if number < closed and not is_last:
            continue
        text = f"the text of turn {index} ({message.role})"
        what = f"the reasoning of the response: {_HINT}" if number < closed else text
        yield _Piece(what, _in_text(index, number))


def _changed(messages: list[Message], index: int, message: Message) -> list[Message]:
    return [*messages[:index], message, *messages[index + 1 :]]


def _in_text(index: int, number: int) -> Callable[[list[Message], str, str], tuple[list[Message], str]]:
    def mark(messages: list[Message], tools: str, mark: str) -> tuple[list[Message], str]:
        parts = _THINK_TAG.split(messages[index].content) if "think>" in messages[index].content else None
        parts = parts or [messages[index].content]
        parts[number] = mark
        return _changed(messages, index, messages[index]._replace(content="".join(parts))), tools

    return mark


def _in_others(
    index: int, change: Callable[[dict[str, Any], str], None]
) -> Callable[[list[Message], str, str], tuple[list[Message], str]]:
    def mark(messages: list[Message], tools: str, mark: str) -> tuple[list[Message], str]:
        others = messages[index].others
        change(others, mark)
        content = messages[index].content
        if "content" in others and others["content"] is not None:
            content = json.dumps(others["content"], ensure_ascii=False)
        return _changed(messages, index, Message(messages[index].role, content, dumped(others))), tools

    return mark


def _in_answer(index: int) -> Callable[[list[Message], str, str], tuple[list[Message], str]]:
    def change(others: dict[str, Any], mark: str) -> None:
        others["content"] = _with(others["content"], mark)

    return _in_others(index, change)


def _in_call(
    index: int, number: int, *, arguments: bool
) -> Callable[[list[Message], str, str], tuple[list[Message], str]]:
    def change(others: dict[str, Any], mark: str) -> None:
        call = others["tool_calls"][number]
        if not isinstance(call, dict):
            others["tool_calls"][number] = mark
            return
        function = call["function"] if isinstance(call.get("function"), dict) else call
        if arguments:
            function["arguments"] = _with(function["arguments"], mark)
        else:
            function["name"] = mark

    return _in_others(index, change)


def _in_reasoning(index: int) -> Callable[[list[Message], str, str], tuple[list[Message], str]]:
    def change(others: dict[str, Any], mark: str) -> None:
        others.update({key: mark for key in REASONING_KEYS if key in others})

    return _in_others(index, change)


def _in_tools(messages: list[Message], tools: str, mark: str) -> tuple[list[Message], str]:
    named = json.loads(tools)
    for tool in named:
        own = tool["function"] if isinstance(tool.get("function"), dict) else tool
        own["name"] = mark
    return messages, json.dumps(named, ensure_ascii=False)


def _arguments(call: Any) -> Any:
    function = call.get("function", call) if isinstance(call, dict) else None
    return function.get("arguments") if isinstance(function, dict) else None


def _with(value: Any, mark: str) -> Any:
    """A value of the same type with the mark in it."""
    if isinstance(value, dict):
        return value | {"said": mark}
    if isinstance(value, list):
        return [*value, mark]
    if isinstance(value, str):
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return mark
        return json.dumps(_with(parsed, mark), ensure_ascii=False) if isinstance(parsed, dict | list) else mark
    return mark
