"""Values as corpora spell them -> the messages of one response, with its status.

A turn is `{"role", "content"}`, `{"from", "value"}` or a mixture; a text is a string or a list of text parts. Roles
of all dialects become system, user, assistant and tool; a role that is none of these is kept as it is and counted.
What a turn holds beside its text is carried as it is (`beside` reads it).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastcompat.corpus.beside import CALL_ROLES, message_of
from fastcompat.corpus.records import from_json
from fastcompat.corpus.values import UnfitError, kind_of, storable, text_of
from fastcompat.rows import SAID_KEYS, Message, Response, Status, says_something

ROLES = {
    "system": "system",
    "developer": "developer",
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
    "tool_response": "tool",
    "function_response": "tool",
    **dict.fromkeys(CALL_ROLES, "assistant"),
}
ROLE_KEYS = ("role", "from", "author", "speaker")
CONTENT_KEYS = ("content", "value", "text", "message")

_ASSISTANT = "assistant"
_SYSTEMS = ("system", "developer")
COUNTED_ROLES = 256
_EMPTY_TURN = Message(_ASSISTANT, "")
# Anthropic's HH data keeps a whole conversation in one string.
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


class Reading(NamedTuple):
    """One response of a record. `generator` is None where the record does not name one; `rewards` are (name, value);
    `tools` is JSON."""

    messages: tuple[Message, ...]
    generator: str | None
    status: Status = Status.OK
    detail: str = ""
    rewards: tuple[tuple[str, float], ...] = ()
    tools: str = ""

    def response(self, *, generator: str, source: str, row_index: int, response_index: int) -> Response:
        """The row; `generator` is the name of one that names none itself."""
        return Response(
            messages=self.messages,
            generator=self.generator or generator,
            source=source,
            row_index=row_index,
            response_index=response_index,
            status=self.status,
            detail=self.detail,
            rewards=self.rewards,
            tools=self.tools,
        )


@dataclass(slots=True)
class Tally:
    """What was changed on the way from records to rows, counted per file.

    null_is_absent: the file is columnar: every object in it has every key that any of them has, null where it has not.
    """

    null_is_absent: bool = False
    dropped_turns: int = 0
    unknown_roles: Counter[str] = field(default_factory=Counter)
    other_shapes: Counter[str] = field(default_factory=Counter)

    def count_role(self, name: str, n: int = 1) -> None:
        """Count turns with a role that is not known; the first names are kept."""
        # Data with a name for every character would fill the summary.
        full = len(self.unknown_roles) >= COUNTED_ROLES and name not in self.unknown_roles
        self.unknown_roles["(others)" if full else name] += n


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
        role_key, content_key = "role", "content"
        try:
            role, content = turn["role"], turn["content"]
        except (KeyError, TypeError):
            role = content = None
        if role is None or content is None:
            if index == 0 and (turns := unrolled(value)):
                return turns_of(turns, place, tally)
            role_key, content_key = _keys_of(turn, f"{place}[{index}]")
            role, content = turn[role_key], turn.get(content_key)
        known = ROLES.get(role) if type(role) is str else None
        if known is None:
            known = _role(role, f"{place}[{index}]", tally)
        # Most turns are a role and a text and nothing else.
        if type(content) is str and len(turn) == 2 and role not in CALL_ROLES:
            messages.append(Message(known, content))
            continue
        others = {str(key): item for key, item in turn.items() if key not in (role_key, content_key)}
        messages.append(
            message_of(
                known,
                content,
                others,
                f"{place}[{index}]",
                is_call=role.strip().lower() in CALL_ROLES,
                null_is_absent=tally.null_is_absent,
            )
        )
    return messages


def unrolled(value: object) -> list[dict[str, Any]] | None:
    """The turns of conversations with another layout, None for all else: texts by turns (LIMA), `{"input", "output"}`
    exchanges (Capybara), and turns as JSON text, all in one or each for itself."""
    if isinstance(value, str):
        return _parsed_turns([value], lambda parsed: parsed[0]) if value.lstrip().startswith("[") else None
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str) and value[0].lstrip().startswith("{") and all(isinstance(text, str) for text in value):
        turns = _parsed_turns(value, lambda parsed: parsed)
        if turns is not None:
            return turns
    if len(value) > 1 and all(isinstance(text, str) for text in value):
        return [{"role": ("user", _ASSISTANT)[index % 2], "content": text} for index, text in enumerate(value)]
    if all(isinstance(turn, dict) and "input" in turn and "output" in turn for turn in value):
        if looks_like_turns(value):
            return None
        sides = (("user", "input"), (_ASSISTANT, "output"))
        return [{"role": role, "content": turn[key]} for turn in value for role, key in sides]
    return None


def _parsed_turns(texts: list[str], turns_in: Callable[[list[Any]], Any]) -> list[dict[str, Any]] | None:
    try:
        turns = turns_in([from_json(text) for text in texts])
    except (ValueError, RecursionError):
        return None
    return turns if looks_like_turns(turns) else None


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


def answer(
    prompt: list[Message], value: object, generator: str | None, place: str, tally: Tally, said: str = ""
) -> Reading:
    """The response `value` to `prompt`: a text, turns that go on from the prompt, or the whole conversation.

    said: what the response says beside a text, as the `extra` of its turn.
    """
    if said and (value is None or type(value) is str):
        turn = Message(_ASSISTANT, value or "", said)
        if says_something(turn):
            return checked((*prompt, turn), generator)
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
            whole = turns and turns[0].role in (*_SYSTEMS, "user")
            system = (
                prompt[:1] if whole and turns[0].role not in _SYSTEMS and prompt and prompt[0].role in _SYSTEMS else []
            )
            return conversation([*system, *turns] if whole else [*prompt, *turns], generator, place, tally)
        return answer(prompt, text_of(value, place), generator, place, tally, said)
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
    if not says_something(messages[last]):
        return empty(messages[:last], generator, f"the last assistant turn of {place} is empty")
    return checked(tuple(messages), generator)


def checked(
    messages: tuple[Message, ...], generator: str | None, status: Status = Status.OK, detail: str = ""
) -> Reading:
    """The reading, or an invalid one with storable texts where something has an unpaired surrogate."""
    for message in messages:
        # isascii() is a flag of the string: almost every text costs nothing here.
        role, content, extra = message
        if not (content.isascii() and role.isascii() and extra.isascii()) and not _storable(message):
            texts = tuple(Message(*map(storable, turn)) for turn in messages)
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


def _storable(message: Message) -> bool:
    try:
        "".join(message).encode()
    except UnicodeEncodeError:
        return False
    return True


def _keys_of(turn: object, place: str) -> tuple[str, str]:
    """The keys of a turn's role and of its text."""
    if not isinstance(turn, dict):
        raise UnfitError(f"{place} is {kind_of(turn)}, not a turn with a role and a text")
    role_key = filled_key(turn, ROLE_KEYS)
    content_key = filled_key(turn, CONTENT_KEYS)
    if role_key is None:
        raise UnfitError(f"{place} names no role (looked for {', '.join(ROLE_KEYS)})")
    if content_key is None:
        # A turn may come without any text where it calls a tool, or has only been thought.
        if any(turn.get(key) for key in (*SAID_KEYS[1:], "function_call")):
            return role_key, CONTENT_KEYS[0]
        raise UnfitError(f"{place} has no text (looked for {', '.join(CONTENT_KEYS)})")
    return role_key, content_key


def _role(role: object, place: str, tally: Tally) -> str:
    if not isinstance(role, str):
        raise UnfitError(f"the role of {place} is {kind_of(role)}, not text")
    known = ROLES.get(role.strip().lower())
    if known is None:
        tally.count_role(storable(role))
        return role
    return known


def _rows_of_columns(value: dict[str, Any]) -> list[dict[str, Any]] | dict[str, Any]:
    lists = {key: column for key, column in value.items() if isinstance(column, list)}
    if not lists or len({len(column) for column in lists.values()}) != 1:
        return value
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)]
