"""One turn of a conversation: its text, and whatever else the corpus says of it, as it says it.

A turn can hold more than text: tool calls, reasoning, a name, a weight. All of it is carried as JSON beside the text,
so that a chat template reads what it would read from the corpus itself. No template is known here; `templates`
renders.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from hashlib import blake2b
from typing import Any, NamedTuple

# Under which names corpora keep what an assistant thought before it answered. transformers gives a template the first
# two, whichever of the three a message has.
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
# What a turn says beside its text, and who says it: together with the text it tells one prompt from another.
SAID_KEYS = ("name", "tool_calls", *REASONING_KEYS)

# Reasoning in the text itself: R1's tags, whose first one a generation prompt may have opened already.
_THINK_OPEN, _THINK_CLOSE = "<think>", "</think>"
_BLANK_THEN_OPEN = re.compile(r"\s*<think>")


class Message(NamedTuple):
    """One turn. `role` is "system", "user", "assistant" or whatever the corpus says; `content` is its text.

    `extra` is a JSON object of the turn's other keys, "" where there are none. A key "content" in it stands in for the
    text: null for a turn without any, or a tool's answer that is no text.
    """

    role: str
    content: str
    extra: str = ""

    @property
    def fields(self) -> dict[str, Any]:
        """Role, content and all other keys, as the corpus has them."""
        own: dict[str, Any] = {"role": self.role, "content": self.content}
        return own | self.others

    @property
    def others(self) -> dict[str, Any]:
        """What `extra` says."""
        found: dict[str, Any] = json.loads(self.extra) if self.extra else {}
        return found


def reasoning_of(fields: dict[str, Any]) -> str | None:
    """The reasoning that a turn's fields name, None where they name none."""
    found = (fields[key] for key in REASONING_KEYS if isinstance(fields.get(key), str))
    return next((reasoning for reasoning in found if reasoning.strip()), None)


def inline_reasoning(content: str) -> tuple[str, str]:
    """(reasoning, rest) of a text that begins with a <think> block; ("", the text) where it does not."""
    opened = _BLANK_THEN_OPEN.match(content)
    if opened is None and (_THINK_CLOSE not in content or _THINK_OPEN in content):
        return "", content
    before, closed, after = content[opened.end() if opened else 0 :].partition(_THINK_CLOSE)
    return before, after.lstrip() if closed else ""


def says_something(message: Message) -> bool:
    """Whether a turn has a text that is not blank, a tool call, or reasoning."""
    if message.content and not message.content.isspace():
        return True
    if not message.extra:
        return False
    others = message.others
    return bool(others.get("tool_calls")) or reasoning_of(others) is not None


def without_reasoning(message: Message) -> Message:
    """The turn without what its assistant thought, in keys of its own or in a <think> block at the text's beginning."""
    if message.role != "assistant":
        return message
    reasoning, content = inline_reasoning(message.content)
    others = message.others
    kept = {key: value for key, value in others.items() if key not in REASONING_KEYS}
    if not reasoning and kept == others:
        return message
    return Message(message.role, content if reasoning else message.content, dumped(kept))


def is_masked(message: Message) -> bool:
    """Whether the corpus leaves a turn out of the loss: weight 0 (OpenAI, Axolotl), train, training or trainable false
    (Axolotl), loss false or 0 (ms-swift), loss_mask 0, mask true; also as texts."""
    if not message.extra:
        return False
    return masking_key(message.others) is not None


def masking_key(fields: dict[str, Any]) -> str | None:
    """The key that takes a turn out of the loss, None where none does."""
    for key in ("weight", "train", "training", "trainable", "loss", "loss_mask"):
        if _said_as_number(fields.get(key)) == 0:
            return key
    return "mask" if _said_as_number(fields.get("mask")) == 1 else None


def _said_as_number(value: Any) -> float | None:
    if isinstance(value, str):
        return {"0": 0.0, "0.0": 0.0, "false": 0.0, "1": 1.0, "1.0": 1.0, "true": 1.0}.get(value.strip().lower())
    return float(value) if isinstance(value, bool | int | float) else None


def spoken(message: Message) -> str:
    """All that a turn says, as one text: its reasoning, its text and its calls. For counting bytes."""
    if not message.extra:
        return message.content
    others = message.others
    calls = dumped({"tool_calls": others["tool_calls"]}) if others.get("tool_calls") else ""
    return (reasoning_of(others) or "") + message.content + calls


def dumped(fields: dict[str, Any]) -> str:
    """JSON text of an object, "" of an empty one; keys keep their order, which templates print."""
    return json.dumps(fields, ensure_ascii=False, separators=(",", ":")) if fields else ""


def prompt_id(prompt: Sequence[Message], tools: str = "") -> str:
    """BLAKE2b-128 of the prompt's roles, texts, calls and tools, in hexadecimal; the same on every machine."""
    # The JSON of a list of [role, content] lists, put together by hand: json.dumps takes a quarter of the reading.
    turns = [f"[{_quoted(role)},{_quoted(content)}{_said(extra) if extra else ''}]" for role, content, extra in prompt]
    payload = "[" + ",".join(turns) + "]" + tools
    return blake2b(payload.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


_quoted = json.encoder.encode_basestring_ascii


def _said(extra: str) -> str:
    """What of a turn's other keys tells prompts apart, however it is spelt: neither ids nor the order of keys."""
    others: dict[str, Any] = json.loads(extra)
    calls = others.get("tool_calls")
    said = {
        "name": others.get("name"),
        "reasoning": reasoning_of(others),
        "calls": [_called(call) for call in calls] if isinstance(calls, list) else calls,
    }
    kept = {key: value for key, value in said.items() if value not in (None, "", [])}
    return f",{json.dumps(kept, ensure_ascii=False, sort_keys=True)}" if kept else ""


def _called(call: Any) -> Any:
    """A call's name and arguments."""
    function = call.get("function", call) if isinstance(call, dict) else call
    if not isinstance(function, dict):
        return function
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments)
    return [function.get("name"), arguments]
