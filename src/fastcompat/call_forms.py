"""The spellings of a tool call that a chat template knows. Corpora have them all, and templates seldom more than one.

Arguments are an object or its JSON text, and a turn without a text has null or "" for one: a template that wants the
other refuses the conversation, or leaves the call out.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any, Self

_MARK = "fastcompat0calls0this"


@dataclass(frozen=True, slots=True)
class CallForms:
    """(whether the text is null, whether arguments are JSON text) of the calls that a template shows."""

    shown: frozenset[tuple[bool, bool]]

    @classmethod
    def shown_by(cls, render: Callable[[Mapping[str, Any]], str]) -> Self:
        """`render` gives the text of a conversation that ends with a turn, "" where the template refuses it."""
        shown = set()
        for is_null, is_text in product((False, True), repeat=2):
            arguments = {"city": _MARK}
            function = {"name": _MARK, "arguments": json.dumps(arguments) if is_text else arguments}
            call = {"id": "call00000", "type": "function", "function": function}  # Mistral's are of nine characters
            if _MARK in render({"role": "assistant", "content": None if is_null else "", "tool_calls": [call]}):
                shown.add((is_null, is_text))
        return cls(frozenset(shown))

    def fitting(self, fields: dict[str, Any]) -> dict[str, Any]:
        """A calling turn's fields as they are where the template shows that, else in the nearest form that it shows."""
        if not self.shown and fields["content"] is None:
            return fields | {"content": ""}  # so that what is missed is the call, and not the text
        is_null, is_text = fields["content"] is None, any(map(_has_text, fields["tool_calls"]))
        speaks = isinstance(fields["content"], str) and bool(fields["content"].strip())
        # What stays as it is first.
        for null, text in sorted(
            self.shown, key=lambda form: (form != (is_null, is_text), form[1] != is_text, form[0] != is_null)
        ):
            if speaks and null:
                continue
            if null != is_null:
                fields = fields | {"content": None if null else ""}
            if text != is_text:
                fields = fields | {"tool_calls": [_spelled(call, text) for call in fields["tool_calls"]]}
            break
        return fields


def _function(call: Any) -> Any:
    own = call.get("function", call) if isinstance(call, dict) else None
    return own if isinstance(own, dict) else {}


def _has_text(call: Any) -> bool:
    return isinstance(_function(call).get("arguments"), str)


def _spelled(call: Any, as_text: bool) -> Any:
    """The call with its arguments as JSON text, or as what that text says."""
    function = _function(call)
    arguments = function.get("arguments")
    if as_text and isinstance(arguments, dict):
        spelled: Any = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        try:
            spelled = json.loads(arguments) if arguments.strip() else {}
        except (ValueError, RecursionError):
            return call
    else:
        return call
    changed = function | {"arguments": spelled}
    return call | {"function": changed} if "function" in call else changed
