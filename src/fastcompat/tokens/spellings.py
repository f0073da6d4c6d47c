"""The spellings of calls, answers and tools that a chat template shows. Corpora have them all, templates seldom.

A calling turn has no text, an empty one or null; arguments are an object or its JSON text; a call stands in a
`function` or bare, and so does a tool; an answer is a text or an object. A template that wants another spelling
refuses the conversation, leaves something out, or writes "None". What it shows stays as it is, else the nearest is
given to it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal, NamedTuple, Self, get_args

_MARK, _VALUE = "fastcompat0calls0this", "fastcompat0with0this"

Text = Literal["absent", "empty", "null"]
Turn = Mapping[str, Any]
# The text of a conversation with these tools, "" where the template refuses it.
Render = Callable[[Sequence[Turn], Sequence[Any] | None], str]


class CallForm(NamedTuple):
    """How a calling turn is spelt."""

    text: Text
    is_json: bool  # the arguments are JSON text
    is_bare: bool  # name and arguments are the call's own keys


@dataclass(frozen=True, slots=True)
class Spellings:
    """What a template shows. answers: of "dict" and "list", which types it shows as a tool's answer. bare_tools,
    nested_tools: whether it shows tools that are functions themselves, or have one."""

    calls: frozenset[CallForm]
    answers: frozenset[str]
    bare_tools: bool
    nested_tools: bool

    @classmethod
    def shown_by(cls, render: Render) -> Self:
        """Found out by conversations that are made for it."""
        user = {"role": "user", "content": "Hello"}
        calls = set()
        for text, is_json, is_bare in product(get_args(Text), (False, True), (False, True)):
            form = CallForm(text, is_json, is_bare)
            shown = render([user, _calling(form)], None)
            if _MARK in shown and _VALUE in shown and "None" not in shown.partition(_MARK)[0][-64:]:
                calls.add(form)
        answers = set()
        calling = _calling(min(calls)) if calls else _calling(CallForm("empty", False, False))
        for content in ({"said": _MARK}, [{"said": _MARK}]):
            answer = {"role": "tool", "name": _MARK[:9], "tool_call_id": "call00000", "content": content}
            # Once more without it: the call itself may be shown again beside its answer.
            bare = render([user, calling, answer | {"content": "x"}], None)
            if render([user, calling, answer], None).count(_MARK) > bare.count(_MARK):
                answers.add(type(content).__name__)
        tool = {"name": _MARK, "description": "d", "parameters": {"type": "object", "properties": {}}}
        bare_tools = _MARK in render([user], [tool])
        nested_tools = _MARK in render([user], [{"type": "function", "function": tool}])
        return cls(frozenset(calls), frozenset(answers), bare_tools, nested_tools)

    def call(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A calling turn's fields, its text absent where it is null, in the nearest spelling that is shown."""
        calls = fields["tool_calls"]
        if not isinstance(calls, list) or not calls:
            return fields
        own = CallForm(_text_of(fields), any(map(_has_json, calls)), any(map(_is_bare, calls)))
        speaks = isinstance(fields.get("content"), str) and bool(fields["content"].strip())
        if not self.calls or own in self.calls:
            # Where no call shows at all, that is what is to be told, and not the missing text.
            return fields if self.calls or "content" in fields else fields | {"content": ""}
        fitting = [form for form in self.calls if not speaks or form.text == "empty"]
        if not fitting:
            return fields
        # What stays as it is first.
        nearest = min(
            fitting,
            key=lambda form: (form.is_bare != own.is_bare, form.is_json != own.is_json, form.text != own.text, form),
        )
        changed = {key: value for key, value in fields.items() if key != "content"}
        if speaks:
            changed["content"] = fields["content"]
        elif nearest.text != "absent":
            changed["content"] = "" if nearest.text == "empty" else None
        changed["tool_calls"] = [_spelt(call, nearest) for call in calls]
        return changed

    def shows_answer(self, content: Any) -> bool:
        """Whether a tool's answer that is no text shows."""
        return type(content).__name__ in self.answers

    def tools(self, tools: list[Any]) -> list[Any]:
        """Tools in the spelling that is shown."""
        if self.nested_tools and not self.bare_tools:
            return [t if "function" in t else {"type": "function", "function": t} for t in tools]
        if self.bare_tools and not self.nested_tools:
            return [t["function"] if isinstance(t.get("function"), dict) else t for t in tools]
        return tools


def _calling(form: CallForm) -> Turn:
    arguments: Any = {"city": _VALUE}
    function: dict[str, Any] = {"name": _MARK, "arguments": json.dumps(arguments) if form.is_json else arguments}
    call: dict[str, Any] = function if form.is_bare else {"type": "function", "function": function}
    texts: dict[str, dict[str, Any]] = {"absent": {}, "empty": {"content": ""}, "null": {"content": None}}
    # Mistral's ids are of nine characters.
    return {"role": "assistant", **texts[form.text], "tool_calls": [{"id": "call00000", **call}]}


def _text_of(fields: Mapping[str, Any]) -> Text:
    if "content" not in fields:
        return "absent"
    return "null" if fields["content"] is None else "empty"


def _is_bare(call: Any) -> bool:
    return isinstance(call, dict) and not isinstance(call.get("function"), dict)


def _function(call: Any) -> dict[str, Any]:
    own = call.get("function", call) if isinstance(call, dict) else None
    return own if isinstance(own, dict) else {}


def _has_json(call: Any) -> bool:
    return isinstance(_function(call).get("arguments"), str)


def _spelt(call: Any, form: CallForm) -> Any:
    function = dict(_function(call))
    if not function:
        return call
    arguments = function.get("arguments")
    if form.is_json and isinstance(arguments, dict | list):
        function["arguments"] = json.dumps(arguments, ensure_ascii=False)
    elif not form.is_json and isinstance(arguments, str):
        try:
            function["arguments"] = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return call
    beside = {key: value for key, value in call.items() if key not in ("function", *function)}
    if form.is_bare:
        return beside | function
    return {"type": "function"} | beside | {"function": function}
