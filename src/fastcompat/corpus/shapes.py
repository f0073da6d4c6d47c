"""How each known shape of a record is read into responses.

`detection` chooses the shape and its columns from a file's first records; a shape's `read_...` makes of them the
function that turns one record into one `Reading` for each response inside.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from fastcompat.corpus.beside import history_of, plain, said_in
from fastcompat.corpus.records import Record
from fastcompat.corpus.rewards import RewardColumn, Rewards, no_rewards, rewards_at, rewards_of_each
from fastcompat.corpus.sample import COMPLETION_TEXTS, GENERATORS, NOT_GENERATORS, Columns, getter, rows_of_lists
from fastcompat.corpus.turns import (
    Reading,
    Tally,
    answer,
    conversation,
    empty,
    filled_key,
    hh_turns,
    invalid,
    prompt_of,
    turns_of,
)
from fastcompat.corpus.values import UnfitError, kind_of, storable
from fastcompat.rows import REASONING_KEYS, Message, dumped

Read: TypeAlias = Callable[[Record, Tally], list[Reading]]


_NUMBERED = re.compile(r"_\d$")


class MissingColumnError(Exception):
    """A record without a column that its mapping needs. `reading` is the row if no other shape fits the record."""

    def __init__(self, column: str, reading: Reading) -> None:
        super().__init__(column)
        self.reading = reading


def named(value: object) -> str | None:
    """A generator's name; None where the value names none."""
    if isinstance(value, str):
        return value if value.strip() else None
    return None if value is None or isinstance(value, dict | list) else str(value)


def _nothing(record: Record) -> None:
    return None


def optional(columns: Columns, part: str, tells: Callable[[Any], Any] | None = None) -> Callable[[Record], Any]:
    """The first value in the part's columns that is not null, nor is what `tells` makes of it; else None."""
    paths = columns.get(part, ())
    if not paths:
        return _nothing
    if len(paths) == 1:
        get = getter(paths[0])

        def read_one(record: Record) -> Any:
            try:
                value = get(record)
            except KeyError:
                return None
            return tells(value) if tells else value

        return read_one
    # Several are names of columns, never paths. Most records have none of them: one call tells.
    names = frozenset(paths)

    def read(record: Record) -> Any:
        if names.isdisjoint(record):
            return None
        for name in paths:
            value = record.get(name)
            if value is not None and tells:
                value = tells(value)
            if value is not None:
                return value
        return None

    return read


def _required(columns: Columns, part: str) -> Callable[[Record], Any]:
    path, *others = columns[part]
    get = getter(path)
    instead = optional({part: tuple(others)}, part)

    def read(record: Record) -> Any:
        try:
            value = get(record)
        except KeyError:
            shown = ", ".join(map(str, list(record)[:12])) or "none"
            detail = storable(f"column `{path}` is missing; this record has: {shown}")
            raise MissingColumnError(path, invalid(detail)) from None
        return instead(record) if value is None else value

    return read


def _prompt_reader(columns: Columns) -> Callable[[Record, Tally], list[Message]]:
    """System, prompt and (for instruction data) input -> the messages before the response. Raises UnfitError."""
    system_of = optional(columns, "system")
    input_of = optional(columns, "input")
    if "prompt" not in columns:
        return lambda record, tally: _system_turn(system_of(record))
    value_of = _required(columns, "prompt")
    place = columns["prompt"][0]
    has_system = "system" in columns
    has_input = "input" in columns
    earlier_of = _earlier_turns(columns)

    def read(record: Record, tally: Tally) -> list[Message]:
        value = value_of(record)
        if value is None:
            raise MissingColumnError(place, invalid(f"column `{place}` is null"))
        messages = prompt_of(value, place, tally)
        if has_input:
            context = input_of(record)
            if context is not None and not isinstance(context, str):
                raise UnfitError(f"{columns['input'][0]} is {kind_of(context)}, not text")
            if context and not context.isspace():
                messages[-1] = messages[-1]._replace(content=f"{messages[-1].content}\n\n{context}")
        if earlier := earlier_of(record, tally):
            messages = earlier + messages
        if has_system and (not messages or messages[0].role not in ("system", "developer")):
            messages = _system_turn(system_of(record)) + messages
        return messages

    return read


def _earlier_turns(columns: Columns) -> Callable[[Record, Tally], list[Message]]:
    """The turns of a conversation whose last instruction stands in a column of its own. Raises UnfitError."""
    if "history" not in columns:
        return lambda record, tally: []
    value_of = optional(columns, "history")
    place = columns["history"][0]

    def read(record: Record, tally: Tally) -> list[Message]:
        value = value_of(record)
        return history_of(value, place, lambda turns: turns_of(turns, place, tally)) if value else []

    return read


def _system_turn(value: object) -> list[Message]:
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        raise UnfitError(f"the system prompt is {kind_of(value)}, not text")
    return [Message("system", value)] if value.strip() else []


def _rewarded(reading: Reading, rewards: Rewards) -> Reading:
    return reading._replace(rewards=rewards) if rewards else reading


def _with_rewards(read: Read, rewards: Sequence[RewardColumn]) -> Read:
    """The reader of a shape with one response per record, with the rewards of the record's columns."""
    rewards_of = rewards_at(rewards, "record")
    if rewards_of is no_rewards:
        return read

    def read_both(record: Record, tally: Tally) -> list[Reading]:
        readings = read(record, tally)
        found = rewards_of(record)
        return [_rewarded(reading, found) for reading in readings] if found else readings

    return read_both


def read_turns(columns: Columns, rewards: Sequence[RewardColumn] = ()) -> Read:
    """One conversation per record; its last assistant turn is the response."""
    field = "messages" if "messages" in columns else "conversations"
    turns_in = _required(columns, field)
    system_of = optional(columns, "system")
    generator_of = optional(columns, "generator", named)
    place = columns[field][0]

    def read(record: Record, tally: Tally) -> list[Reading]:
        value = turns_in(record)
        generator = generator_of(record)
        if value is None:
            raise MissingColumnError(place, empty([], generator, f"{place} is null"))
        try:
            messages = turns_of(value, place, tally)
            if not messages or messages[0].role not in ("system", "developer"):
                messages = _system_turn(system_of(record)) + messages
        except UnfitError as error:
            return [invalid(str(error), generator)]
        return [conversation(messages, generator, place, tally)]

    return _with_rewards(read, rewards)


def read_pair(columns: Columns, rewards: Sequence[RewardColumn] = ()) -> Read:
    """One prompt and one response."""
    prompt_in = _prompt_reader(columns)
    response_in = _required(columns, "response")
    generator_of = optional(columns, "generator", named)
    reasoning_of = optional(columns, "reasoning")
    place = columns["response"][0]

    def read(record: Record, tally: Tally) -> list[Reading]:
        value = response_in(record)
        generator = generator_of(record)
        reasoning = reasoning_of(record)
        said = dumped({REASONING_KEYS[0]: plain(reasoning)}) if reasoning else ""
        try:
            prompt = prompt_in(record, tally)
        except UnfitError as error:
            return [invalid(str(error), generator)]
        if type(value) is list and value and type(value[0]) is str:
            return [invalid(f"{place} is a list of strings; read it with --map generations={place}", generator, prompt)]
        return [answer(prompt, value, generator, place, tally, said)]

    return _with_rewards(read, rewards)


def _read_several(
    columns: Columns,
    part: str,
    rewards: Sequence[RewardColumn],
    each: Callable[[list[Any]], list[tuple[Any, object, str]]],
) -> Read:
    """Several responses per record: `each` gives (response, its own generator, place) of every one. A response that is
    an object's text may have reasoning and calls beside it.

    The generator column names one for all, or is a list with one for each.
    """
    prompt_in = _prompt_reader(columns)
    list_in = _required(columns, part)
    generators_of = optional(columns, "generator")
    rewards_of = rewards_of_each(rewards)
    column = columns[part][0]

    def read(record: Record, tally: Tally) -> list[Reading]:
        values = rows_of_lists(list_in(record))
        told = generators_of(record)
        own = named(told)
        if values is None:
            raise MissingColumnError(column, empty([], own, f"{column} is null"))
        if not isinstance(values, list):
            return [invalid(f"{column} is {kind_of(values)}, not a list of responses", own)]
        try:
            prompt, flaw = prompt_in(record, tally), ""
        except UnfitError as error:
            prompt, flaw = [], str(error)
        if not values:
            return [empty(prompt, own, f"{column} is an empty list")]
        names = told if isinstance(told, list) and told else [own] * len(values)
        unnamed = ""
        if len(names) != len(values):
            unnamed = f"the generator column names {len(names)}, but {column} has {len(values)} responses"
            names = [None] * len(values)
        readings = []
        for item, (value, generator, place), name_beside in zip(values, each(values), names, strict=True):
            name = named(name_beside) or named(generator)
            if flaw:
                readings.append(invalid(flaw, name))
            elif isinstance(value, UnfitError):
                readings.append(invalid(str(value), name, prompt))
            else:
                said = said_in(item, null_is_absent=tally.null_is_absent) if isinstance(item, dict) else ""
                reading = answer(prompt, value, name, place, tally, said)
                readings.append(reading._replace(detail=unnamed) if unnamed and not reading.detail else reading)
        return list(map(_rewarded, readings, rewards_of(record, values)))

    return read


def read_completions(columns: Columns, rewards: Sequence[RewardColumn] = ()) -> Read:
    """UltraFeedback: `completions` of {model, response, ...}, one row each."""
    column = columns["completions"][0]

    def each(values: list[Any]) -> list[tuple[Any, object, str]]:
        found: list[tuple[Any, object, str]] = []
        for index, item in enumerate(values):
            place = f"{column}[{index}]"
            if not isinstance(item, dict):
                found.append((UnfitError(f"{place} is {kind_of(item)}, not an object with a response"), None, place))
                continue
            key = filled_key(item, COMPLETION_TEXTS)
            lack = UnfitError(f"{place} has no response; its keys are {', '.join(map(str, item))}")
            model = next((item[name] for name in GENERATORS if item.get(name)), None)
            found.append((lack if key is None else item[key], model, f"{place}.{key}"))
        return found

    return _read_several(columns, "completions", rewards, each)


def read_generations(columns: Columns, rewards: Sequence[RewardColumn] = ()) -> Read:
    """distilabel: `generations`, a list of texts, and beside it a list of their models."""
    column = columns["generations"][0]

    def each(values: list[Any]) -> list[tuple[Any, object, str]]:
        return [(value, None, f"{column}[{index}]") for index, value in enumerate(values)]

    return _read_several(columns, "generations", rewards, each)


def read_structs(columns: Columns, structs: tuple[str, ...], rewards: Sequence[RewardColumn] = ()) -> Read:
    """Magpie-100K-Generator-Zoo: one struct column per generator, with the response in its `content`."""
    prompt_in = _prompt_reader(columns)
    generator_of = optional(columns, "generator", named)
    rewards_of = rewards_at(rewards, "field")
    # JSON lines may bring a generator that the first records did not have.
    known = {*structs, *NOT_GENERATORS, *(path for paths in columns.values() for path in paths)}

    def read(record: Record, tally: Tally) -> list[Reading]:
        own = generator_of(record)
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
                said = said_in(value, null_is_absent=tally.null_is_absent)
                reading = answer(prompt, value["content"], own or name, f"{name}.content", tally, said)
                readings.append(_rewarded(reading, rewards_of(value)))
        return readings

    return read


def read_preference(columns: Columns, rewards: Sequence[RewardColumn] = ()) -> Read:
    """A chosen and a rejected response: texts after a prompt, whole conversations, or HH strings."""
    sides = ("chosen", "rejected")
    values_in = [_required(columns, side) for side in sides]
    generators_of = [optional(columns, f"{side}_generator", named) for side in sides]
    rewards_of = [rewards_at(rewards, side) for side in sides]
    generator_of = optional(columns, "generator", named)
    prompt_in = _prompt_reader(columns)
    places = [columns[side][0] for side in sides]
    # PKU's `response_0` and `response_1` are named after the column: neither is said to be the better.
    labels = [place if _NUMBERED.search(place) else side for place, side in zip(places, sides, strict=True)]

    def read(record: Record, tally: Tally) -> list[Reading]:
        own = generator_of(record)
        values = [value_in(record) for value_in in values_in]
        if values == [None, None]:
            raise MissingColumnError(places[0], empty([], own or labels[0], f"{places[0]} is null"))
        readings = []
        for label, value, side_generator, place in zip(labels, values, generators_of, places, strict=True):
            name = own or side_generator(record) or label
            try:
                if isinstance(value, str) and value.startswith("\n\nHuman:"):
                    readings.append(conversation(hh_turns(value), name, place, tally))
                    continue
                if "prompt" not in columns and isinstance(value, str) and value.strip():
                    hh_turns(value)  # raises, and says why
                readings.append(answer(prompt_in(record, tally), value, name, place, tally))
            except UnfitError as error:
                readings.append(invalid(str(error), name))
        return [_rewarded(reading, of(record)) for reading, of in zip(readings, rewards_of, strict=True)]

    return read
