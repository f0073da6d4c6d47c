"""Which known shape the records of a file have, found from the first of them.

A `Mapping` is the choice for one file: a shape and the columns that fill it. It is chosen from the union of the
keys of the first records, is printable (`describe()`), and a user bends it with overrides (`--map response=answer`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

from fastcompat.corpus.records import Record
from fastcompat.corpus.sample import (
    COMPLETIONS,
    CONVERSATIONS,
    GENERATIONS,
    GENERATOR_LISTS,
    GENERATORS,
    PREFERENCES,
    PROMPTS,
    RESPONSES,
    SYSTEMS,
    Sample,
)
from fastcompat.corpus.shapes import (
    Columns,
    Read,
    read_completions,
    read_generations,
    read_pair,
    read_preference,
    read_structs,
    read_turns,
)
from fastcompat.corpus.turns import storable
from fastcompat.errors import SchemaError, UsageError

Overrides: TypeAlias = AbstractMapping[str, str]


class Lack(NamedTuple):
    """Why a shape does not fit. `near` is how many of its parts are there: the nearest shape is shown first."""

    reason: str
    near: int = 0


Fit: TypeAlias = "Callable[[Sample, Columns], Mapping | Lack]"

# What may stand left of `=` in --map, and the part of a shape that it fills.
CANONICAL = {
    "prompt": "prompt",
    "instruction": "prompt",
    "question": "prompt",
    "input": "input",
    "response": "response",
    "output": "response",
    "completion": "response",
    "answer": "response",
    "messages": "messages",
    "conversations": "conversations",
    "conversation": "conversations",
    "completions": "completions",
    "generations": "generations",
    "chosen": "chosen",
    "rejected": "rejected",
    "chosen_generator": "chosen_generator",
    "rejected_generator": "rejected_generator",
    "generator": "generator",
    "model": "generator",
    "system": "system",
    "system_prompt": "system",
}
# Parts that any shape may have, so an override of them does not choose the shape.
_COMMON = frozenset(("generator", "system", "chosen_generator", "rejected_generator"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """How a file's records become responses: the shape's name and the column (or path) of each of its parts."""

    shape: str
    columns: Columns
    structs: tuple[str, ...] = ()
    turn_keys: str = ""

    def describe(self) -> str:
        """One line for the user: `messages (role/content); generator from column `model``."""
        generator = self.columns.get("generator") or self.columns.get("generators")
        if generator:
            source = f"column `{generator}`"
        elif self.shape == "completions":
            source = "each completion's model, else the file's name"
        elif self.shape == "struct per generator":
            shown = ", ".join(self.structs[:3]) + (", ..." if len(self.structs) > 3 else "")
            source = f"the names of {len(self.structs)} struct columns ({shown})"
        elif self.shape == "chosen/rejected":
            sides = [self.columns.get(f"{side}_generator") for side in ("chosen", "rejected")]
            source = (
                f"columns {' and '.join(f'`{c}`' for c in sides if c)}"
                if any(sides)
                else "the side (chosen or rejected)"
            )
        else:
            source = "the file's name"
        system = f"; system from column `{self.columns['system']}`" if "system" in self.columns else ""
        return f"{self._parts()}{system}; generator from {source}"

    def _parts(self) -> str:
        columns = self.columns
        if self.turn_keys:
            return f"{columns.get('messages') or columns.get('conversations')} ({self.turn_keys})"
        names = ("prompt", "input", "response", "completions", "generations", "chosen", "rejected")
        parts = " + ".join(columns[name] for name in names if name in columns)
        return f"{parts} + struct per generator" if self.structs else parts

    def reader(self) -> Read:
        """The function that turns a record into one `Reading` per response."""
        if self.shape == "struct per generator":
            return read_structs(self.columns, self.structs)
        return _READERS[self.shape](self.columns)


_READERS = {
    "completions": read_completions,
    "generations": read_generations,
    "chosen/rejected": read_preference,
    "messages": read_turns,
    "conversations": read_turns,
    "prompt + response": read_pair,
}


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """`["response=answer"]` -> `{"response": "answer"}`. Raises UsageError for anything else."""
    overrides = {}
    for item in items:
        name, equals, column = item.partition("=")
        if not (equals and name.strip() and column.strip()):
            raise UsageError(f"--map {item}: write it as NAME=COLUMN, for example --map response=answer.")
        overrides[name.strip()] = column.strip()
    _parts_of(overrides)
    return overrides


def _parts_of(overrides: Overrides | None) -> Columns:
    """Overrides with their names replaced by the parts that they fill."""
    parts: Columns = {}
    for name, column in (overrides or {}).items():
        if name not in CANONICAL:
            raise UsageError(
                f"--map {name}={column}: there is no part `{name}`; known are {', '.join(sorted(CANONICAL))}."
            )
        part = CANONICAL[name]
        if parts.setdefault(part, column) != column:
            raise UsageError(f"--map sets the {part} to both `{parts[part]}` and `{column}`; keep one of them.")
    return parts


def detect(records: Sequence[Record], *, overrides: Overrides | None = None, label: str = "the records") -> Mapping:
    """The mapping that fits these records. Raises SchemaError: the columns, the shapes tried, what each lacks."""
    sample = Sample(records)
    given = _parts_of(overrides)
    found = ", ".join(map(str, sample.names)) or "none"
    for part, column in given.items():
        if not sample.has(column):
            raise SchemaError(
                storable(f"--map {part}={column}: {label} has no column `{column}`; columns found: {found}.")
            )
    lacks: dict[str, Lack] = {}
    hollow: Mapping | None = None
    asked = set(given) - _COMMON
    for shape, (parts, fit) in _SHAPES.items():
        if not asked <= parts:
            lacks[shape] = Lack("does not have " + " and ".join(sorted(asked - parts)) + ", which --map sets", -1)
            continue
        fitted = fit(sample, given)
        if isinstance(fitted, Lack):
            lacks[shape] = fitted
        elif _filled(fitted, sample):
            return fitted
        else:
            # Its column is there, but null or empty so far: any shape that has something comes first.
            hollow = hollow or fitted
    if hollow is not None:
        return hollow
    # The nearest first: its lack is most likely what the user can mend. If none is near, the plainest.
    tried = sorted(lacks.items(), key=lambda item: (-item[1].near, item[0] != "prompt + response"))
    raise SchemaError(
        storable(
            f"{label} has no schema that is known. Columns found: {found}.\nShapes tried:\n"
            + "\n".join(f"  {shape}: {lack.reason}" for shape, lack in tried)
            + "\nSay which column is what, for example: --map prompt=COLUMN --map response=COLUMN"
        )
    )


def _filled(mapping: Mapping, sample: Sample) -> bool:
    parts = ("messages", "conversations", "completions", "generations", "chosen", "rejected", "response")
    columns = [mapping.columns[part] for part in parts if part in mapping.columns]
    return bool(mapping.structs) or any(sample.forms(column) - {"null", "list"} for column in columns)


# --- which columns each shape takes


def _common(sample: Sample, given: Columns) -> Columns:
    columns = {}
    if generator := given.get("generator") or sample.first(GENERATORS, {"text", "other"}):
        columns["generator"] = generator
    if system := given.get("system") or sample.first(SYSTEMS, {"text"}):
        columns["system"] = system
    return {name: path for name, path in columns.items() if name in given or sample.forms(path) != {"null"}}


def _prompt(sample: Sample, given: Columns) -> Columns | Lack:
    conversations = [name for name in ("messages", *CONVERSATIONS) if "turns" in sample.forms(name)]
    forms = {"text", "turns", "parts"}
    prompt = given.get("prompt") or sample.first(PROMPTS, forms) or next(iter(conversations), None)
    if "prompt" not in given and {"instruction", "input"} <= set(sample.names):
        prompt = "instruction"
    if prompt is None:
        return Lack(sample.lacking(PROMPTS, "no prompt column"))
    columns = {"prompt": prompt}
    context = given.get("input") or ("input" if prompt == "instruction" and sample.has("input") else None)
    if context:
        columns["input"] = context
    return columns


def _fit_turns(part: str) -> Fit:
    def fit(sample: Sample, given: Columns) -> Mapping | Lack:
        names = (part,) if part == "messages" else CONVERSATIONS
        column = given.get(part) or next((name for name in names if "turns" in sample.forms(name)), part)
        forms = sample.forms(column)
        if not forms:
            return Lack(f"no column `{column}`")
        if not (forms & {"turns"} or forms <= {"null", "list"} or part in given):
            return Lack(f"`{column}` holds no list of turns with a role and a text", 1)
        if part not in given and "turns" in forms and not sample.answered(column) and sample.first(RESPONSES, {"text"}):
            return Lack(f"`{column}` holds no assistant turn, the response is elsewhere", 1)
        columns = {part: column, **_common(sample, given)}
        return Mapping(shape=part, columns=columns, turn_keys=sample.turn_keys(column))

    return fit


def _fit_pair(sample: Sample, given: Columns) -> Mapping | Lack:
    prompt = _prompt(sample, given)
    taken = () if isinstance(prompt, Lack) else tuple(prompt.values())
    names = [name for name in RESPONSES if name not in taken]
    response = given.get("response") or sample.first(names, {"text", "turns", "parts", "texts"})
    if response is None:
        return Lack(sample.lacking(names, "no response column"), 0 if isinstance(prompt, Lack) else 1)
    if isinstance(prompt, Lack):
        # A response that the user names may stand without a prompt; one that was guessed may not.
        if "response" not in given:
            return prompt._replace(near=1)
        prompt = {}
    return Mapping(shape="prompt + response", columns={**prompt, "response": response, **_common(sample, given)})


def _fit_several(part: str, names: Sequence[str], form: str) -> Fit:
    def fit(sample: Sample, given: Columns) -> Mapping | Lack:
        column = given.get(part) or next((name for name in names if form in sample.forms(name)), None)
        if column is None and sample.forms(part) and sample.forms(part) <= {"null", "list"}:
            column = part
        prompt = _prompt(sample, given)
        if column is None:
            what = "objects with a model and a response" if form == "objects" else "texts"
            return Lack(f"no column `{part}` with a list of {what}")
        if isinstance(prompt, Lack):
            return prompt._replace(near=1)
        columns = {part: column, **prompt, **_common(sample, given)}
        if part == "completions":
            # Each completion names its model; the record's own column is only asked for by the user.
            if "generator" not in given:
                columns.pop("generator", None)
        elif "generator" not in given:
            models = next((name for name in GENERATOR_LISTS if sample.forms(name) & {"texts", "text"}), None)
            columns.pop("generator", None)
            if models:
                columns["generators"] = models
        return Mapping(shape=part, columns=columns)

    return fit


def _fit_preference(sample: Sample, given: Columns) -> Mapping | Lack:
    pairs = [pair for pair in PREFERENCES if all(sample.has(name) for name in pair)]
    chosen = given.get("chosen") or (pairs[0][0] if pairs else None)
    rejected = given.get("rejected") or (pairs[0][1] if pairs else None)
    if chosen is None or rejected is None:
        near = sum(sample.has(name) for name in ("chosen", "rejected"))
        return Lack("no pair of columns `chosen` and `rejected`", near)
    if "object" in sample.forms(chosen) | sample.forms(rejected):
        return Lack(f"`{chosen}` or `{rejected}` is an object; map a part of it, as in chosen={chosen}.text", 1)
    columns = {"chosen": chosen, "rejected": rejected}
    prompt = _prompt(sample, given)
    if not isinstance(prompt, Lack):
        columns |= prompt
    for side in ("chosen", "rejected"):
        names = [f"{side}{mark}{name}" for name in ("model", "generator", "model_name") for mark in "_-"]
        names += [f"model_{side}", f"generator_{side}"]
        if name := given.get(f"{side}_generator") or sample.first(names, {"text"}):
            columns[f"{side}_generator"] = name
    common = _common(sample, given)
    # A record's own `model` column does not say which of the two it made.
    if "generator" not in given:
        common.pop("generator", None)
    return Mapping(shape="chosen/rejected", columns={**columns, **common})


def _fit_structs(sample: Sample, given: Columns) -> Mapping | Lack:
    structs = sample.structs()
    if not structs:
        return Lack("no struct column with `content`")
    prompt = _prompt(sample, given)
    if isinstance(prompt, Lack):
        return prompt._replace(near=1)
    common = _common(sample, given)
    if "generator" not in given:
        common.pop("generator", None)
    return Mapping(shape="struct per generator", columns={**prompt, **common}, structs=structs)


# In the order tried: what holds several responses comes before the one that also stands alone beside them.
_SHAPES: dict[str, tuple[frozenset[str], Fit]] = {
    "completions": (frozenset(("completions", "prompt", "input")), _fit_several("completions", COMPLETIONS, "objects")),
    "generations": (frozenset(("generations", "prompt", "input")), _fit_several("generations", GENERATIONS, "texts")),
    "chosen/rejected": (frozenset(("chosen", "rejected", "prompt", "input")), _fit_preference),
    "messages": (frozenset(("messages",)), _fit_turns("messages")),
    "conversations": (frozenset(("conversations",)), _fit_turns("conversations")),
    "prompt + response": (frozenset(("prompt", "response", "input")), _fit_pair),
    "struct per generator": (frozenset(("prompt", "input")), _fit_structs),
}
