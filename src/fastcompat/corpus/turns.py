"""Values as corpora spell them -> the messages of one response, with its status.

A turn is `{"role", "content"}`, `{"from", "value"}` or a mixture; a text is a string or a list of text parts. Roles
of all dialects become system, user, assistant and tool; a role that is none of these is kept as it is and counted.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastcompat.response import Message, Status

ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "ai": "assistant",
    "bot": "assistant",
    "chatbot": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
ROLE_KEYS = ("role", "from", "author", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message")

_ASSISTANT = "assistant"
_COUNTED_ROLES = 256
_EMPTY_TURN = Message(_ASSISTANT, "")
# Anthropic's HH data keeps a whole conversation in one string.
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class UnfitError(Exception):
    """A value that is not what its place asks for; the message becomes the row's detail."""


class Reading(NamedTuple):
    """One response of a record. `generator` is None where the record does not name one; `rewards` are (name, value)."""

    messages: tuple[Message, ...]
    generator: str | None
    status: Status = Status.OK
    detail: str = ""
    rewards: tuple[tuple[str, float], ...] = ()


@dataclass(slots=True)
class Tally:
    """What was changed on the way from records to rows, counted per file."""

    dropped_turns: int = 0
    unknown_roles: Counter[str] = field(default_factory=Counter)
    other_shapes: Counter[str] = field(default_factory=Counter)


def kind_of(value: object) -> str:
    """A value's type in a reader's words: "null", "a number", "an object", ..."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, dict):
        return "an object" + (f" with the keys {', '.join(map(str, list(value)[:8]))}" if value else "")
    if isinstance(value, list | tuple):
        return f"a list of {kind_of(value[0]).split(' with ')[0].split(' ')[-1]}s" if value else "an empty list"
    if isinstance(value, str):
        return "a string"
    if isinstance(value, bytes):
        return "bytes that are not UTF-8"
    return (
        repr(value) if type(value).__repr__ is not object.__repr__ and len(repr(value)) < 40 else type(value).__name__
    )


def text_of(value: object, place: str) -> str:
    """A string, or the joined texts of a list of `{"type": "text", "text": ...}` parts; UnfitError for all else."""
    if isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            pass
    elif isinstance(value, list) and value:
        texts = []
        for part in value:
            text = part.get("text") if isinstance(part, dict) else None
            if not isinstance(text, str) or part.get("type", "text") != "text":
                what = (
                    f"a part of type {part['type']!r}" if isinstance(part, dict) and part.get("type") else kind_of(part)
                )
                raise UnfitError(f"{place} has {what} where only text can be scored")
            texts.append(text)
        return "".join(texts)
    raise UnfitError(f"{place} is {kind_of(value)}, not text")


def looks_like_turns(value: object) -> bool:
    """Whether the value is a conversation: a list of turns, or the struct of lists that Arrow makes of one."""
    if isinstance(value, dict):
        return any(isinstance(value.get(key), list) for key in ROLE_KEYS)
    return (
        isinstance(value, list) and bool(value) and isinstance(value[0], dict) and any(k in value[0] for k in ROLE_KEYS)
    )


def turns_of(value: Any, place: str, tally: Tally) -> list[Message]:
    """A conversation's messages, roles normalised. UnfitError where a turn has no role or no text."""
    if isinstance(value, dict):
        value = _rows_of_columns(value)
    if not isinstance(value, list) and (turns := unrolled(value)):
        value = turns
    if not isinstance(value, list):
        raise UnfitError(f"{place} is {kind_of(value)}, not a list of turns")
    messages = []
    for index, turn in enumerate(value):
        try:
            role, content = turn["role"], turn["content"]
        except (KeyError, TypeError):
            role = content = None
        if role is None or content is None:
            if index == 0 and (turns := unrolled(value)):
                return turns_of(turns, place, tally)
            role, content = _role_and_content(turn, f"{place}[{index}]")
        known = ROLES.get(role) if type(role) is str else None
        if known is None:
            known = _role(role, f"{place}[{index}]", tally)
        if type(content) is not str:
            # An assistant that only calls a tool says nothing.
            content = "" if content is None and known == _ASSISTANT else text_of(content, f"{place}[{index}]")
        messages.append(Message(known, content))
    return messages


def unrolled(value: object) -> list[dict[str, Any]] | None:
    """The turns of conversations with another layout, None for all else: texts by turns (LIMA), `{"input", "output"}`
    exchanges (Capybara), and turns as JSON text."""
    if isinstance(value, str):
        if not value.startswith("[{"):
            return None
        try:
            parsed = json.loads(value)
        except (ValueError, RecursionError):
            return None
        return parsed if looks_like_turns(parsed) else None
    if not isinstance(value, list) or not value:
        return None
    if len(value) > 1 and all(isinstance(text, str) for text in value):
        return [{"role": ("user", _ASSISTANT)[index % 2], "content": text} for index, text in enumerate(value)]
    if all(isinstance(turn, dict) and "input" in turn and "output" in turn for turn in value):
        if looks_like_turns(value):
            return None
        sides = (("user", "input"), (_ASSISTANT, "output"))
        return [{"role": role, "content": turn[key]} for turn in value for role, key in sides]
    return None


def filled_key(item: dict[str, Any], keys: Sequence[str]) -> str | None:
    """The first of `keys` that has a value in `item`; failing that, the first that is there."""
    present = [key for key in keys if key in item]
    return next((key for key in present if item[key] is not None), present[0] if present else None)


def prompt_of(value: object, place: str, tally: Tally) -> list[Message]:
    """The messages of a prompt: one user turn, a list of turns, or an HH string that ends where the answer begins."""
    if type(value) is str:
        if value.startswith("\n\nHuman:") and value.rstrip().endswith("\n\nAssistant:"):
            return hh_turns(value)[:-1]
        return [Message("user", value)]
    if looks_like_turns(value):
        return turns_of(value, place, tally)
    return [Message("user", text_of(value, place))]


def hh_turns(text: str) -> list[Message]:
    """The turns of "\\n\\nHuman: ...\\n\\nAssistant: ..."; UnfitError where the text does not begin so."""
    pieces = _HH_TURN.split(text)
    if pieces[0].strip() or len(pieces) < 3:
        raise UnfitError('the text has no "\\n\\nHuman:" and "\\n\\nAssistant:" turns and there is no prompt')
    roles = ["user" if name == "Human" else _ASSISTANT for name in pieces[1::2]]
    return [Message(role, content.strip()) for role, content in zip(roles, pieces[2::2], strict=True)]


def answer(prompt: list[Message], value: object, generator: str | None, place: str, tally: Tally) -> Reading:
    """The response `value` to `prompt`: a text, turns that go on from the prompt, or the whole conversation."""
    if type(value) is str:
        if not value or value.isspace():
            return empty(prompt, generator, f"{place} is empty" if not value else f"{place} has only white space")
        return checked((*prompt, Message(_ASSISTANT, value)), generator)
    if value is None or value == []:
        return empty(prompt, generator, f"{place} is {kind_of(value)}")
    try:
        if looks_like_turns(value):
            turns = turns_of(value, place, tally)
            # Turns that begin before the answer repeat the prompt.
            whole = turns and turns[0].role in ("system", "user")
            system = prompt[:1] if whole and turns[0].role != "system" and prompt and prompt[0].role == "system" else []
            return conversation([*system, *turns] if whole else [*prompt, *turns], generator, place, tally)
        return answer(prompt, text_of(value, place), generator, place, tally)
    except UnfitError as error:
        return invalid(str(error), generator, prompt)


def conversation(messages: list[Message], generator: str | None, place: str, tally: Tally) -> Reading:
    """The last assistant turn as the response; turns after it are cut and counted."""
    last = len(messages) - 1
    while last >= 0 and messages[last].role != _ASSISTANT:
        last -= 1
    if last < 0:
        return empty(messages, generator, f"{place} has no assistant turn")
    if last < len(messages) - 1:
        tally.dropped_turns += len(messages) - 1 - last
        del messages[last + 1 :]
    if not messages[last].content or messages[last].content.isspace():
        return empty(messages[:last], generator, f"the last assistant turn of {place} is empty")
    return checked(tuple(messages), generator)


def checked(
    messages: tuple[Message, ...], generator: str | None, status: Status = Status.OK, detail: str = ""
) -> Reading:
    """The reading, or an invalid one with storable texts where something has an unpaired surrogate."""
    for message in messages:
        # isascii() is a flag of the string: almost every text costs nothing here.
        if not (message.content.isascii() and message.role.isascii()) and not _storable(message):
            texts = tuple(Message(storable(role), storable(content)) for role, content in messages)
            place = f"the {storable(message.role)} turn"
            return Reading(
                texts, generator, Status.INVALID, f"an unpaired surrogate, or bytes that are not UTF-8, in {place}"
            )
    return Reading(messages, generator, status, detail)


def empty(prompt: list[Message], generator: str | None, detail: str) -> Reading:
    """A response without characters: the prompt and an empty assistant turn."""
    return checked((*prompt, _EMPTY_TURN), generator, Status.EMPTY, detail)


def invalid(detail: str, generator: str | None = None, prompt: list[Message] | None = None) -> Reading:
    """A response that cannot be read; the prompt is kept where there is one."""
    reading = checked((*prompt, _EMPTY_TURN), generator) if prompt else Reading((), generator)
    return reading._replace(status=Status.INVALID, detail=storable(detail))


def storable(text: str) -> str:
    """The text with U+FFFD for what UTF-8 cannot hold."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _storable(message: Message) -> bool:
    try:
        message.content.encode()
        message.role.encode()
    except UnicodeEncodeError:
        return False
    return True


def _role_and_content(turn: object, place: str) -> tuple[object, object]:
    if not isinstance(turn, dict):
        raise UnfitError(f"{place} is {kind_of(turn)}, not a turn with a role and a text")
    role_key = filled_key(turn, ROLE_KEYS)
    content_key = filled_key(turn, CONTENT_KEYS)
    if role_key is None:
        raise UnfitError(f"{place} names no role (looked for {', '.join(ROLE_KEYS)})")
    if content_key is None:
        # Tool calls may come without any content.
        if "tool_calls" in turn:
            return turn[role_key], None
        raise UnfitError(f"{place} has no text (looked for {', '.join(CONTENT_KEYS)})")
    return turn[role_key], turn[content_key]


def _role(role: object, place: str, tally: Tally) -> str:
    if not isinstance(role, str):
        raise UnfitError(f"the role of {place} is {kind_of(role)}, not text")
    known = ROLES.get(role.strip().lower())
    if known is None:
        # Data with a name for every character would fill the summary.
        name = storable(role)
        full = len(tally.unknown_roles) >= _COUNTED_ROLES and name not in tally.unknown_roles
        tally.unknown_roles["(others)" if full else name] += 1
        return role
    return known


def _rows_of_columns(value: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
    lists = {key: column for key, column in value.items() if isinstance(column, list)}
    if not lists or len({len(column) for column in lists.values()}) != 1:
        return value
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
