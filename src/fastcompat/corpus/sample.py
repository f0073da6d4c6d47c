"""The names under which the parts of a record go, and the questions that detection asks a file's first records."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any, TypeAlias

from fastcompat.corpus.records import NumberList, Record
from fastcompat.corpus.turns import CONTENT_KEYS, ROLE_KEYS, ROLES, filled_key, looks_like_turns, unrolled
from fastcompat.corpus.values import UnfitError
from fastcompat.rows import masking_key

# A part's columns, the likeliest first: the first that has a value in a record is read. A file's first records need
# not have them all, since later ones may.
Columns: TypeAlias = dict[str, tuple[str, ...]]

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
    ),
    *("solution", "assistant", "targets"),
)
# What a task in words is about; Dolly calls it `context`.
INPUTS = ("input", "context")
TASKS = ("instruction", "question", "prompt")
SYSTEMS = ("system", "system_prompt", "system_message")
# The turns before an instruction (Alpaca's layout of a longer conversation), and the tools that it could call.
HISTORIES = ("history",)
TOOLS = ("tools", "functions")
# Reasoning beside a response. Columns called `reasoning` or `thinking` may be a judge's: those the user has to name.
REASONINGS = ("reasoning_content",)
GENERATORS = (
    *("generator", "model", "model_name", "generation_model", "source_model", "generator_model", "response_model"),
    *("generator_name", "model_id"),
)
GENERATOR_LISTS = ("generation_models", "generators", "models", "model_names", *GENERATORS)
COMPLETIONS = ("completions", "generations")
GENERATIONS = ("generations", "completions")
# Several responses only where nothing plainer is there: beside a response these are references or choices.
FALLBACKS = ("responses", "candidates", "outputs", "answers")
CONVERSATIONS = ("conversations", "conversation", "dialogue", "dialog", "chat", "items")
PREFERENCES = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("accepted", "rejected"),
    ("response_0", "response_1"),
)
# Keys of one completion, besides those of RESPONSES.
COMPLETION_TEXTS = ("response", "content", "text", *RESPONSES[1:])
NOT_GENERATORS = frozenset((*PROMPTS, *RESPONSES, *SYSTEMS, *GENERATORS, *TOOLS, "metadata", "meta", "message"))


# Names of columns that are no text for a response, whatever type they have.
_BOOKKEEPING = re.compile(
    r"(.*[-_ ])?(id|ids|idx|index|uid|uuid|guid|hash|md5|sha\d*|urls?|time|timestamp|date|created_at|version"
    r"|scores?|ratings?|rewards?)",
    re.IGNORECASE,
)
_POSITION = re.compile(r"\[(-?\d+)\]")


class Sample:
    """The first records of a file, asked about their columns. A column's path may lead inwards: `answer.text`."""

    def __init__(self, records: Sequence[Record]) -> None:
        self._records = records
        self.names = list(dict.fromkeys(name for record in records for name in record))
        self._by_lower_case = {str(name).lower(): name for name in reversed(self.names)}
        self._forms: dict[str, set[str]] = {}

    def spelled(self, path: str) -> str:
        """The path as the records spell it, whose columns may be upper case."""
        head, dot, rest = path.partition(".")
        if path in self.names or head in self.names:
            return path
        return f"{self._by_lower_case.get(head.lower(), head)}{dot}{rest}"

    def has(self, path: str) -> bool:
        """Whether any record has the column."""
        return bool(self.forms(path))

    def values(self, path: str) -> list[Any]:
        """Those of the records that have the column."""
        get = getter(self.spelled(path))
        found = []
        for record in self._records:
            try:
                found.append(get(record))
            except KeyError:
                continue
        return found

    def forms(self, path: str) -> set[str]:
        """Of the column's values: "text", "turns", "texts", "objects", "object", "null", "list", "other"."""
        if path not in self._forms:
            self._forms[path] = {form_of(value) for value in self.values(path)}
        return self._forms[path]

    def first(self, names: Sequence[str], forms: set[str]) -> str | None:
        """The first of `names` that has values of these forms; failing that, the first that has only nulls."""
        present = [name for name in names if self.has(name)]
        usable = [name for name in present if self.forms(name) & forms]
        nulls = [name for name in present if self.forms(name) <= {"null", "list", "other"}]
        return next(iter(usable or nulls), None)

    def may_hold(self, path: str, forms: set[str]) -> bool:
        """Whether the column has values of these forms, or none so far: later records may bring them."""
        return bool(self.forms(path) & forms) or self.forms(path) <= {"null"}

    def told(self, paths: Sequence[str], tells: Callable[[Any], object]) -> tuple[str, ...]:
        """Those of `paths` that are the first with a value, as `tells` has it, in some record."""
        getters = [(path, getter(path)) for path in paths]
        found = set()
        for record in self._records:
            for path, get in getters:
                try:
                    value = get(record)
                except KeyError:
                    continue
                if value is not None and tells(value) is not None:
                    found.add(path)
                    break
        return tuple(path for path in paths if path in found)

    def unused(self, used: Sequence[str]) -> tuple[str, ...]:
        """Columns with a value that are none of `used`: what may have been meant first, plain bookkeeping last."""
        roots = {path if path in self.names else path.partition(".")[0].partition("[")[0] for path in used}
        left = [str(name) for name in self.names if name not in roots and self.forms(str(name)) - {"null"}]
        texts = {"text", "turns", "texts", "parts", "objects", "object", "list"}

        def order(name: str) -> int:
            return 2 if _BOOKKEEPING.fullmatch(name) else 0 if self.forms(name) & texts else 1

        return tuple(sorted(left, key=order))

    def can_be(self, path: str, reads: Callable[[Any], object]) -> bool:
        """Whether `reads` takes a value of the column, and raises no UnfitError, or there is none so far."""
        values = [value for value in self.values(path) if value not in (None, "", [])]
        for value in values:
            try:
                reads(value)
            except UnfitError:
                continue
            return True
        return not values

    def masks(self, path: str) -> tuple[str, ...]:
        """The keys by which turns in the column are left out of the loss."""
        found: dict[str, None] = {}
        for value in self.values(path):
            for turn in rows_of_lists(value) if isinstance(value, dict) else value if isinstance(value, list) else ():
                if isinstance(turn, dict) and (key := masking_key(turn)):
                    found[key] = None
        return tuple(found)

    def answered(self, path: str) -> bool:
        """Whether any conversation in the column has an assistant turn."""
        for value in self.values(path):
            roles = value if isinstance(value, list) else [value]
            for turn in roles:
                role = next((turn[key] for key in ROLE_KEYS if key in turn), None) if isinstance(turn, dict) else None
                spelled = role if isinstance(role, list) else [role]
                if any(isinstance(r, str) and ROLES.get(r.strip().lower()) == "assistant" for r in spelled):
                    return True
        return False

    def unrolls(self, path: str) -> bool:
        """Whether the column holds conversations that are not lists of turns with a role each."""
        return any(unrolled(value) is not None for value in self.values(path))

    def has_keys(self, path: str, keys: Sequence[str]) -> bool:
        """Whether any object in the column's lists has one of the keys."""
        for value in self.values(path):
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, dict) and not item.keys().isdisjoint(keys) for item in items):
                return True
        return False

    def turn_keys(self, path: str) -> str:
        """How the column's turns name role and text: "role/content", "from/value", ..."""
        for value in self.values(path):
            turn = value[0] if isinstance(value, list) and value else value
            if isinstance(turn, dict):
                if "input" in turn and "output" in turn:
                    return "input/output"
                return "/".join(filled_key(turn, names) or "?" for names in (ROLE_KEYS, CONTENT_KEYS))
            if isinstance(turn, str) and isinstance(value, list):
                return "user and assistant by turns"
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
    """Reads a column, or a value inside one, as in `a.b.0.c` or `a.b[0].c`. Raises KeyError where absent."""
    parts = _POSITION.sub(r".\1", path).split(".")
    if len(parts) == 1:
        return itemgetter(path)

    def get(record: Record) -> Any:
        if path in record:
            return record[path]
        value: Any = record
        for part in parts:
            if isinstance(value, NumberList):
                value = value.unfolded()
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


def rows_of_lists(value: Any) -> Any:
    """The list of objects that Arrow's struct of lists stands for; anything else as it is."""
    lists = {key: item for key, item in value.items() if isinstance(item, list)} if isinstance(value, dict) else {}
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=False)] if lists else value


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
    if isinstance(value, NumberList):
        return "list"
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
