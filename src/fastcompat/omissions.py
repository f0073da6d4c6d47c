"""What a conversation says and a chat template leaves out: found by changing it, and looking at the render.

A template that does not know a role, tool calls or reasoning mostly drops them without a word, and the model would be
scored on a conversation that nobody had.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from fastcompat.message import REASONING_KEYS, Message, dumped, inline_reasoning, reasoning_of

Render = Callable[[Sequence[Message], str], str]

_MARK = "fastcompat0said0this"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Something that is said: in the turn `index`, None for the tools. `kind` is content, reasoning, calls or tools."""

    kind: str
    index: int | None
    what: str  # in words
    hint: str = ""
    call: int = 0  # which of the turn's calls

    def __str__(self) -> str:
        return self.what + (f": {self.hint}" if self.hint else "")


def structure(messages: Sequence[Message], tools: str) -> tuple[object, ...]:
    """What a template's choices follow: roles, which turns have a text, what else they have; hashable."""
    return (bool(tools), *((role, bool(content.strip()), _kinds(content, extra)) for role, content, extra in messages))


def _kinds(content: str, extra: str) -> object:
    thinks = "</think>" in content or "<think>" in content
    if not extra:
        return thinks
    others: dict[str, Any] = json.loads(extra)
    calls = others.get("tool_calls")
    return (thinks, *sorted(others), len(calls) if isinstance(calls, list) else 0)


def find_omission(messages: Sequence[Message], tools: str, text: str, render: Render) -> str | None:
    """What of the conversation its render `text` does not show, in words; None where all of it counts.

    Counts the text and the calls of every turn, the reasoning of the last one (templates leave that of earlier turns
    out by design), and the tools. `render` may raise.
    """
    pieces = list(_pieces(messages, tools))
    # All marked at once, which a template mostly renders like the conversation itself.
    marked, marked_tools = list(messages), tools
    for number, piece in enumerate(pieces):
        marked, marked_tools = _marked(marked, marked_tools, piece, f"{_MARK}{number}x")
    try:
        shown = render(marked, marked_tools)
    except Exception:
        shown = ""
    for number, piece in enumerate(pieces):
        if f"{_MARK}{number}x" in shown:
            continue
        try:
            changed = render(*_marked(list(messages), tools, piece, _MARK))
        except Exception:
            continue  # what makes the template refuse is not ignored
        if changed == text:
            return str(piece)
    return None


def _pieces(messages: Sequence[Message], tools: str) -> Iterator[_Piece]:
    for index, message in enumerate(messages):
        whose = f"turn {index} ({message.role})"
        if message.content.strip():
            yield _Piece("content", index, f"the text of {whose}")
        calls = message.others.get("tool_calls") or ()
        for number in range(len(calls) if isinstance(calls, list) else 0):
            yield _Piece("calls", index, f"tool call {number} of {whose}", call=number)
    if messages and messages[-1].role == "assistant":
        last = messages[-1]
        if reasoning_of(last.others) is not None or inline_reasoning(last.content)[0].strip():
            hint = "drop it with --reasoning drop (a reward model's: --reward-reasoning drop), or give another template"
            yield _Piece("reasoning", len(messages) - 1, "the reasoning of the response", hint)
    if tools:
        yield _Piece("tools", None, "the tools", "leave them out with --tools drop, or give another template")


def _marked(messages: list[Message], tools: str, piece: _Piece, mark: str) -> tuple[list[Message], str]:
    """The conversation with `mark` in the place of a piece, or of the names in it."""
    if piece.index is None:
        named = json.loads(tools)
        for tool in named:
            own = tool["function"] if isinstance(tool.get("function"), dict) else tool
            own["name"] = mark
        return messages, json.dumps(named, ensure_ascii=False)
    role, content, extra = messages[piece.index]
    others: dict[str, Any] = json.loads(extra) if extra else {}
    if piece.kind == "content":
        if "content" in others:
            others["content"] = mark
        # What has been marked in it already stays.
        content = f"{content}{mark}" if _MARK in content else mark
    elif piece.kind == "calls":
        calls = list(others["tool_calls"])
        calls[piece.call] = _named(calls[piece.call], mark)
        others["tool_calls"] = calls
    else:
        others |= {key: mark for key in REASONING_KEYS if key in others}
        inline, _ = inline_reasoning(content)
        if inline.strip():
            content = content.replace(inline, mark, 1)
        elif _MARK in content and reasoning_of(others) is None:
            content = f"<think>{mark}</think>{content}"
    changed = list(messages)
    changed[piece.index] = Message(role, content, dumped(others))
    return changed, tools


def _named(call: Any, mark: str) -> Any:
    if not isinstance(call, dict):
        return mark
    if isinstance(call.get("function"), dict):
        return call | {"function": call["function"] | {"name": mark}}
    return call | {"name": mark}
