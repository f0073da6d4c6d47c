"""The names under which the parts of a record go, and the questions that detection asks a file's first records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from fastcompat.corpus.records import Record
from fastcompat.corpus.turns import CONTENT_KEYS, ROLE_KEYS, ROLES, looks_like_turns

# Names under which the parts of a record go, the likeliest first.
PROMPTS = ("prompt", "instruction", "question", "query", "problem", "user", "inputs", "input")
RESPONSES = (
    *(
        "response",
        "completion",
        "answer",
        "output",
        "generation",
        "generated_text",
        "model_output",
        "reply",
        "solution",
    ),
    *("solution", "assistant", "targets"),
)
SYSTEMS = ("system", "system_prompt", "system_message")
GENERATORS = (
    *("generator", "model", "model_name", "generation_model", "source_model", "generator_model", "response_model"),
    *("generator_name", "model_id"),
)
GENERATOR_LISTS = ("generation_models", "generators", "models", "model_names", *GENERATORS)
COMPLETIONS = ("completions", "responses", "answers", "generations", "candidates", "outputs")
GENERATIONS = ("generations", "responses", "completions", "outputs", "answers", "candidates")
CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "chat", "items")
PREFERENCES = (("chosen", "rejected"), ("chosen_response", "rejected_response"), ("accepted", "rejected"))
# Keys of one completion, besides those of RESPONSES.
COMPLETION_TEXTS = ("response", "content", "text", *RESPONSES[1:])
NOT_GENERATORS = frozenset((*PROMPTS, *RESPONSES, *SYSTEMS, *GENERATORS, "metadata", "meta", "message"))


class Sample:
    """The first records of a file, asked about their columns. A column's path may lead inwards: `answer.text`."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.names = list(dict.fromkeys(name for record in records for name in record))
        self._forms: dict[str, set[str]] = {}

    def has(self, path: str) -> bool:
        """Whether any record has the column."""
        return bool(self.forms(path))

    def forms(self, path: str) -> set[str]:
        """Of the column's values: "text", "turns", "texts", "objects", "object", "null", "list", "other"."""
        if path not in self._forms:
            get = getter(path)
            forms = set()
            for record in self._records:
                try:
                    forms.add(form_of(get(record)))
                except KeyError:
                    continue
            self._forms[path] = forms
        return self._forms[path]

    def first(self, names: Sequence[str], forms: set[str]) -> str | None:
        """The first of `names` that has values of these forms; failing that, the first that has only nulls."""
        present = [name for name in names if self.has(name)]
        usable = [name for name in present if self.forms(name) & forms]
        nulls = [name for name in present if self.forms(name) <= {"null", "list", "other"}]
        return next(iter(usable or nulls), None)

    def answered(self, path: str) -> bool:
        """Whether any conversation in the column has an assistant turn."""
        get = getter(path)
        for record in self._records:
            try:
                value = get(record)
            except KeyError:
                continue
            roles = value if isinstance(value, list) else [value]
            for turn in roles:
                role = next((turn[key] for key in ROLE_KEYS if key in turn), None) if isinstance(turn, dict) else None
                spelled = role if isinstance(role, list) else [role]
                if any(isinstance(r, str) and ROLES.get(r.strip().lower()) == "assistant" for r in spelled):
                    return True
        return False

    def turn_keys(self, path: str) -> str:
        """How the column's turns name role and text: "role/content", "from/value", ..."""
        get = getter(path)
        for record in self._records:
            try:
                value = get(record)
            except KeyError:
                continue
            turn = value[0] if isinstance(value, list) and value else value
            if isinstance(turn, dict):
                keys = [next((key for key in names if key in turn), "?") for names in (ROLE_KEYS, CONTENT_KEYS)]
                return "/".join(keys)
        return "role/content"

    def structs(self) -> tuple[str, ...]:
        """Columns that hold an object with `content` and whose names are not those of a record's known parts."""
        found = []
        for name in self.names:
            values = [record[name] for record in self._records if isinstance(record.get(name), dict)]
            if values and name not in NOT_GENERATORS and any("content" in value for value in values):
                found.append(name)
        return tuple(found)

    def lacking(self, names: Sequence[str], what: str) -> str:
        """ "no response column", and where a candidate exists in a form that cannot be used, that."""
        for name in names:
            if "object" in self.forms(name):
                return f"{what}: `{name}` is an object, not text; map a part of it, as in {name}.text"
        return f"{what} (looked for {', '.join(names[:5])})"


def getter(path: str) -> Callable[[Record], Any]:
    """Reads a column, or a value inside one: keys and list positions joined by dots. Raises KeyError where absent."""
    parts = path.split(".")
    if len(parts) == 1:
        return itemgetter(path)

    def get(record: Record) -> Any:
        if path in record:
            return record[path]
        value: Any = record
        for part in parts:
            if isinstance(value, dict):
                value = value[part]
            elif isinstance(value, list) and part.lstrip("-").isdigit():
                try:
                    value = value[int(part)]
                except IndexError:
                    return None
            elif value is None:
                return None
            else:
                raise KeyError(path)
        return value

    return get


def form_of(value: object) -> str:
    """What a value looks like; the words are those of `Sample.forms`."""
    if value is None:
        return "null"
    if isinstance(value, str | bytes):
        return "text"
    if looks_like_turns(value):
        return "turns"
    if isinstance(value, dict):
        return "object"
    if isinstance(value, list):
        if not value:
            return "list"
        first = next((item for item in value if item is not None), None)
        if isinstance(first, str):
            return "texts"
        if isinstance(first, dict):
            return "parts" if first.get("type") == "text" and "text" in first else "objects"
        return "texts" if looks_like_turns(first) else "list"
    return "other"
