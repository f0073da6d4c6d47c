"""How each known shape of a record is read into responses.

`detection` chooses the shape and its columns from a file's first records; a shape's `read_...` makes of them the
function that turns one record into one `Reading` for each response inside.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from fastcompat.corpus.records import Record
from fastcompat.corpus.sample import COMPLETION_TEXTS, GENERATORS, NOT_GENERATORS, getter
from fastcompat.corpus.turns import (
    Reading,
    Tally,
    UnfitError,
    answer,
    conversation,
    empty,
    hh_turns,
    invalid,
    kind_of,
    prompt_of,
    storable,
    turns_of,
)
from fastcompat.response import Message

Columns: TypeAlias = dict[str, str]
Read: TypeAlias = Callable[[Record, Tally], list[Reading]]


class MissingColumnError(Exception):
    """A record without a column that its mapping needs. `reading` is the row if no other shape fits the record."""

    def __init__(self, column: str, reading: Reading) -> None:
        super().__init__(column)
        self.reading = reading


# --- parts that several shapes share


def _nothing(record: Record) -> None:
    return None


def _optional(columns: Columns, field: str) -> Callable[[Record], Any]:
    if field not in columns:
        return _nothing
    get = getter(columns[field])

    def read(record: Record) -> Any:
        try:
            return get(record)
        except KeyError:
            return None

    return read


def _required(columns: Columns, field: str) -> Callable[[Record], Any]:
    path = columns[field]
    get = getter(path)

    def read(record: Record) -> Any:
        try:
            return get(record)
        except KeyError:
            shown = ", ".join(map(str, list(record)[:12])) or "none"
            detail = storable(f"column `{path}` is missing; this record has: {shown}")
            raise MissingColumnError(path, invalid(detail)) from None

    return read


def _named(value: object) -> str | None:
    """A generator's name; None where the value names none."""
    if isinstance(value, str):
        return value if value.strip() else None
    return None if value is None or isinstance(value, dict | list) else str(value)


def _prompt_reader(columns: Columns) -> Callable[[Record, Tally], list[Message]]:
    """System, prompt and (for instruction data) input -> the messages before the response. Raises UnfitError."""
    system_of = _optional(columns, "system")
    input_of = _optional(columns, "input")
    if "prompt" not in columns:
        return lambda record, tally: _system_turn(system_of(record))
    value_of = _required(columns, "prompt")
    place = columns["prompt"]
    has_system = "system" in columns
    has_input = "input" in columns

    def read(record: Record, tally: Tally) -> list[Message]:
        value = value_of(record)
        if value is None:
            raise MissingColumnError(place, invalid(f"column `{place}` is null"))
        messages = prompt_of(value, place, tally)
        if has_input:
            context = input_of(record)
            if context is not None and not isinstance(context, str):
                raise UnfitError(f"{columns['input']} is {kind_of(context)}, not text")
            if context and not context.isspace():
                messages[-1] = Message(messages[-1].role, f"{messages[-1].content}\n\n{context}")
        if has_system and (not messages or messages[0].role != "system"):
            messages = _system_turn(system_of(record)) + messages
        return messages

    return read


def _system_turn(value: object) -> list[Message]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise UnfitError(f"the system prompt is {kind_of(value)}, not text")
    return [Message("system", value)] if value.strip() else []


# --- the shapes


def read_turns(columns: Columns) -> Read:
    """One conversation per record; its last assistant turn is the response."""
    field = "messages" if "messages" in columns else "conversations"
    turns_in = _required(columns, field)
    system_of = _optional(columns, "system")
    generator_of = _optional(columns, "generator")
    place = columns[field]

    def read(record: Record, tally: Tally) -> list[Reading]:
        value = turns_in(record)
        generator = _named(generator_of(record))
        if value is None:
            raise MissingColumnError(place, empty([], generator, f"{place} is null"))
        try:
            messages = turns_of(value, place, tally)
            if not messages or messages[0].role != "system":
                messages = _system_turn(system_of(record)) + messages
        except UnfitError as error:
            return [invalid(str(error), generator)]
        return [conversation(messages, generator, place, tally)]

    return read


def read_pair(columns: Columns) -> Read:
    """One prompt and one response."""
    prompt_in = _prompt_reader(columns)
    response_in = _required(columns, "response")
    generator_of = _optional(columns, "generator")
    place = columns["response"]

    def read(record: Record, tally: Tally) -> list[Reading]:
        value = response_in(record)
        generator = _named(generator_of(record))
        try:
            prompt = prompt_in(record, tally)
        except UnfitError as error:
            return [invalid(str(error), generator)]
        if type(value) is list and value and type(value[0]) is str:
            return [invalid(f"{place} is a list of strings; read it with --map generations={place}", generator, prompt)]
        return [answer(prompt, value, generator, place, tally)]

    return read


def _read_several(
    columns: Columns, field: str, each: Callable[[Record, list[Any]], list[tuple[Any, object, str]]]
) -> Read:
    """Several responses per record: `each` gives (response, generator, place) of every one."""
    prompt_in = _prompt_reader(columns)
    list_in = _required(columns, field)
    generator_of = _optional(columns, "generator")
    column = columns[field]

    def read(record: Record, tally: Tally) -> list[Reading]:
        values = list_in(record)
        own = _named(generator_of(record))
        if values is None:
            raise MissingColumnError(column, empty([], own, f"{column} is null"))
        if isinstance(values, dict):
            # Arrow's struct of lists.
            lists = [item for item in values.values() if isinstance(item, list)]
            values = [dict(zip(values, row, strict=False)) for row in zip(*lists, strict=False)] if lists else values
        if not isinstance(values, list):
            return [invalid(f"{column} is {kind_of(values)}, not a list of responses", own)]
        try:
            prompt, flaw = prompt_in(record, tally), ""
        except UnfitError as error:
            prompt, flaw = [], str(error)
        if not values:
            return [empty(prompt, own, f"{column} is an empty list")]
        readings = []
        for value, generator, place in each(record, values):
            name = _named(generator) or own
            if flaw:
                readings.append(invalid(flaw, name))
            elif isinstance(value, UnfitError):
                readings.append(invalid(str(value), name, prompt))
            else:
                readings.append(answer(prompt, value, name, place, tally))
        return readings

    return read


def read_completions(columns: Columns) -> Read:
    """UltraFeedback: `completions` of {model, response, ...}, one row each."""
    column = columns["completions"]

    def each(record: Record, values: list[Any]) -> list[tuple[Any, object, str]]:
        found: list[tuple[Any, object, str]] = []
        for index, item in enumerate(values):
            place = f"{column}[{index}]"
            if not isinstance(item, dict):
                found.append((UnfitError(f"{place} is {kind_of(item)}, not an object with a response"), None, place))
                continue
            key = next((name for name in COMPLETION_TEXTS if name in item), None)
            lack = UnfitError(f"{place} has no response; its keys are {', '.join(map(str, item))}")
            # An override names the generator of every row of the record.
            model = None if "generator" in columns else next((item[n] for n in GENERATORS if item.get(n)), None)
            found.append((lack if key is None else item[key], model, f"{place}.{key}"))
        return found

    return _read_several(columns, "completions", each)


def read_generations(columns: Columns) -> Read:
    """distilabel: `generations`, a list of texts, and beside it a list of their models."""
    column = columns["generations"]
    models_of = _optional(columns, "generators")

    def each(record: Record, values: list[Any]) -> list[tuple[Any, object, str]]:
        models = models_of(record)
        aligned = isinstance(models, list) and len(models) == len(values)
        found = []
        for index, value in enumerate(values):
            place = f"{column}[{index}]"
            found.append((value, models[index] if aligned else None if isinstance(models, list) else models, place))
        return found

    return _read_several(columns, "generations", each)


def read_structs(columns: Columns, structs: tuple[str, ...]) -> Read:
    """Magpie-100K-Generator-Zoo: one struct column per generator, with the response in its `content`."""
    prompt_in = _prompt_reader(columns)
    generator_of = _optional(columns, "generator")
    # JSON lines may bring a generator that the first records did not have.
    known = {*structs, *NOT_GENERATORS, *columns.values()}

    def read(record: Record, tally: Tally) -> list[Reading]:
        own = _named(generator_of(record))
        if not any(name in record for name in structs):
            raise MissingColumnError(
                structs[0], invalid(f"column `{structs[0]}` is missing, and those of all other generators")
            )
        try:
            prompt, flaw = prompt_in(record, tally), ""
        except UnfitError as error:
            prompt, flaw = [], str(error)
        readings = []
        fields = record.items()
        later = [name for name, value in fields if name not in known and isinstance(value, dict) and "content" in value]
        for name in (*structs, *later):
            value = record.get(name)
            if flaw:
                readings.append(invalid(flaw, own or name))
            elif value is None:
                what = "null" if name in record else "missing in this record"
                readings.append(empty(prompt, own or name, f"column `{name}` is {what}"))
            elif not isinstance(value, dict) or "content" not in value:
                readings.append(invalid(f"{name} is {kind_of(value)}, without content", own or name, prompt))
            else:
                readings.append(answer(prompt, value["content"], own or name, f"{name}.content", tally))
        return readings

    return read


def read_preference(columns: Columns) -> Read:
    """A chosen and a rejected response: texts after a prompt, whole conversations, or HH strings."""
    sides = ("chosen", "rejected")
    values_in = [_required(columns, side) for side in sides]
    generators_of = [_optional(columns, f"{side}_generator") for side in sides]
    generator_of = _optional(columns, "generator")
    prompt_in = _prompt_reader(columns)

    def read(record: Record, tally: Tally) -> list[Reading]:
        own = _named(generator_of(record))
        values = [value_in(record) for value_in in values_in]
        if values == [None, None]:
            raise MissingColumnError(columns["chosen"], empty([], own or "chosen", f"{columns['chosen']} is null"))
        readings = []
        for side, value, side_generator in zip(sides, values, generators_of, strict=True):
            name = own or _named(side_generator(record)) or side
            place = columns[side]
            try:
                if isinstance(value, str) and value.startswith("\n\nHuman:"):
                    readings.append(conversation(hh_turns(value), name, place, tally))
                    continue
                if "prompt" not in columns and isinstance(value, str) and value.strip():
                    hh_turns(value)  # raises, and says why
                readings.append(answer(prompt_in(record, tally), value, name, place, tally))
            except UnfitError as error:
                readings.append(invalid(str(error), name))
        return readings

    return read
