"""What a turn or a record holds beside its text, as chat templates read it: calls, reasoning, tools, earlier turns.

Keys and values are carried as they are. Three spellings are turned into the one that templates know: a `function_call`
(OpenAI before tools, ShareGPT's turns of that name) is a tool call, a thinking part of a content is reasoning, and
`functions` are tools.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from fastcompat.corpus.records import FromJson, NumberList, from_json
from fastcompat.corpus.values import UnfitError, kind_of, text_of
from fastcompat.rows import REASONING_KEYS, SAID_KEYS, Message, dumped

# Roles of turns whose text is a call, as JSON.
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
# Texts by which frames write that there is nothing.
_NOTHING = frozenset(("", "none", "null", "nan"))
# Where a part of a content that is the assistant's thinking has its text, by the part's type.
_THINKING_PARTS = {"thinking": ("thinking", "text"), "reasoning": ("reasoning", "text", "content")}


def message_of(
    role: str, content: Any, others: dict[str, Any], place: str, *, is_call: bool = False, null_is_absent: bool = False
) -> Message:
    """The turn of a role with this content and these other keys, "role" and "content" not among them.

    is_call: the content is a call. null_is_absent: as in `Tally`. UnfitError where the content is neither a text nor
    something else that this role may have for one.
    """
    own = {key: plain(value, null_is_absent) for key, value in others.items() if value is not None}
    for key in REASONING_KEYS:
        if not isinstance(own.get(key, ""), str):
            own[key] = _thought(own[key])
    text = content
    if role == "assistant":
        _put_calls_right(own)
        if is_call:
            calls = _calls_in(content)
            if calls:
                own["tool_calls"] = [*own.get("tool_calls", ()), *calls]
                text = content = None
        if isinstance(content, list):
            text, reasoning = _text_and_reasoning(content, place)
            if reasoning:
                own.setdefault(REASONING_KEYS[0], reasoning)
        elif content is None:
            text = ""
            if "tool_calls" in own:
                own["content"] = None  # templates tell it from an empty text
    if role == "tool" and not isinstance(text, str) and not _has_text(text):
        own["content"] = plain(text, null_is_absent)
        text = "" if text is None else json.dumps(own["content"], ensure_ascii=False)
    return Message(role, text if type(text) is str else text_of(text, place), dumped(own))


def said_in(item: dict[str, Any], *, null_is_absent: bool = False) -> str:
    """What a completion says beside its text, as the `extra` of its turn."""
    own = {key: plain(item[key], null_is_absent) for key in SAID_KEYS if key != "name" and item.get(key) is not None}
    _put_calls_right(own)
    return dumped(own)


def tools_of(value: Any, place: str, *, null_is_absent: bool = False) -> str:
    """The JSON array of the tools that a record names, "" where it names none. UnfitError for what cannot be tools."""
    if isinstance(value, str):
        value = None if value.strip().lower() in _NOTHING else _parsed(value, place)
    if isinstance(value, dict):
        value = [value]
    if not value:
        return ""
    if not isinstance(value, list):
        raise UnfitError(f"{place} is {kind_of(value)}, not a list of tools")
    tools = [_parsed(tool, place) if isinstance(tool, str) else tool for tool in value]
    for tool in tools:
        named = isinstance(tool, dict) and (_is_named(tool) or isinstance(tool.get("type"), str))
        if not (named or (isinstance(tool, dict) and isinstance(tool.get("function"), dict))):
            raise UnfitError(f"{place} holds {kind_of(tool)}, not a tool with a name and parameters")
    tools = [plain(tool, null_is_absent) for tool in tools]
    if place.rpartition(".")[2] == "functions":
        tools = [tool if "function" in tool else {"type": "function", "function": tool} for tool in tools]
    return json.dumps(tools, ensure_ascii=False, separators=(",", ":"))


def history_of(value: Any, place: str, turns_of: Callable[[Any], list[Message]]) -> list[Message]:
    """The turns before an instruction: pairs of an instruction and its response (Alpaca), or turns with roles.

    turns_of: reads the latter. UnfitError for all else.
    """
    if isinstance(value, str):
        value = _parsed(value, place) if value.strip() else None
    if not value:
        return []
    if not isinstance(value, list):
        raise UnfitError(f"{place} is {kind_of(value)}, not a list of earlier turns")
    if isinstance(value[0], dict):
        return turns_of(value)
    messages = []
    for index, pair in enumerate(value):
        if not (isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)):
            raise UnfitError(f"{place}[{index}] is {kind_of(pair)}, not an instruction and its response")
        messages += [Message("user", pair[0]), Message("assistant", pair[1])]
    return messages


def plain(value: Any, null_is_absent: bool = False) -> Any:
    """The value in JSON's types; numbers that JSON does not have are null."""
    if value is None or type(value) in (str, int, bool):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        null_is_absent = null_is_absent and not isinstance(value, FromJson)
        return {
            str(key): plain(item, null_is_absent)
            for key, item in value.items()
            if not (null_is_absent and item is None)
        }
    if isinstance(value, list | tuple):
        return [plain(item, null_is_absent) for item in value]
    if isinstance(value, NumberList):
        return plain(value.unfolded(), null_is_absent)
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _put_calls_right(own: dict[str, Any]) -> None:
    """`tool_calls` that are JSON text become what they say, none at all no key, a `function_call` one of them."""
    calls = _read(own.get("tool_calls"))
    if calls:
        calls = [_call(_read(call)) for call in (calls if isinstance(calls, list) else [calls])]
        own["tool_calls"] = calls
    else:
        own.pop("tool_calls", None)
    if own.get("function_call") and not calls:
        if called := _calls_in(own.pop("function_call")):
            own["tool_calls"] = called
    elif "function_call" in own and not own["function_call"]:
        del own["function_call"]


def _calls_in(value: Any) -> list[dict[str, Any]]:
    """The calls that a value, or its JSON, is; none where it is something else."""
    if isinstance(value, str):
        try:
            value = from_json(value)
        except (ValueError, RecursionError):
            return []
    calls = value if isinstance(value, list) else [value]
    if not all(isinstance(call, dict) and (_is_named(call) or "function" in call) for call in calls):
        return []
    return [_call(call if "function" in call else {"type": "function", "function": call}) for call in calls]


def _read(value: Any) -> Any:
    """What a JSON text says, or a word for nothing; anything else as it is."""
    if not isinstance(value, str):
        return value
    if value.strip().lower() in _NOTHING:
        return None
    with suppress(ValueError, RecursionError):
        return from_json(value)
    return value


def _call(call: Any) -> Any:
    """A call whose function is no text, and whose arguments go by that name."""
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), str):
        call = call | {"function": _read(call["function"])}
    own = call["function"] if isinstance(call.get("function"), dict) else call
    if "parameters" in own and "arguments" not in own:
        own = {"arguments" if key == "parameters" else key: value for key, value in own.items()}
        call = call | {"function": own} if isinstance(call.get("function"), dict) else own
    return call


def _is_named(value: dict[str, Any]) -> bool:
    return isinstance(value.get("name"), str) and bool(value["name"].strip())


def _thought(value: Any) -> str:
    """Reasoning that is no text, as one: the texts of its parts, or its JSON."""
    if not value:
        return ""
    parts = value if isinstance(value, list) else [value]
    texts = [part if isinstance(part, str) else _text_of_thought(part) for part in parts]
    if all(text is not None for text in texts):
        return "\n\n".join(str(text) for text in texts)
    return json.dumps(value, ensure_ascii=False)


def _text_of_thought(part: Any) -> str | None:
    keys = ("thinking", "reasoning", "text", "content")
    return next((part[key] for key in keys if isinstance(part.get(key), str)), None) if isinstance(part, dict) else None


def _text_and_reasoning(parts: list[Any], place: str) -> tuple[str, str]:
    """The text of an assistant's parts, and its thinking. UnfitError where another part is not text."""
    texts, thoughts = [], []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        keys = _THINKING_PARTS.get(kind, ()) if isinstance(kind, str) else ()
        thought = next((part[key] for key in keys if isinstance(part.get(key), str)), None)
        if keys and thought is None and not any(part.get(key) for key in keys):
            continue  # nothing was thought
        if thought is None:
            texts.append(part)
        else:
            thoughts.append(thought)
    return text_of(texts, place) if texts else "", "\n\n".join(thoughts)


def _has_text(value: Any) -> bool:
    try:
        text_of(value, "")
    except UnfitError:
        return False
    return True


def _parsed(text: str, place: str) -> Any:
    try:
        return from_json(text)
    except (ValueError, RecursionError):
        raise UnfitError(f"{place} is a text that is no JSON") from None
