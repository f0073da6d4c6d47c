"""What was chosen for a file: a shape and the columns that fill it, printable, and bent by overrides."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from collections.abc import Mapping as AbstractMapping
from dataclasses import dataclass, field
from typing import TypeAlias

from fastcompat.corpus.beside import tools_of
from fastcompat.corpus.records import Record
from fastcompat.corpus.rewards import RewardColumn
from fastcompat.corpus.sample import Columns
from fastcompat.corpus.shapes import (
    Read,
    optional,
    read_completions,
    read_generations,
    read_pair,
    read_preference,
    read_structs,
    read_turns,
)
from fastcompat.corpus.turns import Reading, Tally
from fastcompat.corpus.values import UnfitError, storable
from fastcompat.errors import UsageError
from fastcompat.rows import Status

Overrides: TypeAlias = AbstractMapping[str, str]
# What may stand beside a conversation, in the order in which it is said.
_BESIDE = ("system", "history", "reasoning", "tools")
# Columns that are not used, and are named.
_SHOWN = 16
# Overrides by the part that each fills.
Given: TypeAlias = dict[str, str]

# What may stand left of `=` in --map, and the part of a shape that it fills.
CANONICAL = {
    "prompt": "prompt",
    "instruction": "prompt",
    "question": "prompt",
    "input": "input",
    "context": "input",
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
    "reward": "reward",
    "tools": "tools",
    "functions": "tools",
    "history": "history",
    "reasoning": "reasoning",
    "reasoning_content": "reasoning",
}
# Parts that any shape may have, so an override of them does not choose the shape.
COMMON = frozenset(("generator", "system", "chosen_generator", "rejected_generator", "reward", "tools"))
# Parts that a record may do without, so that columns which the first records lack may still come.
OPTIONAL = COMMON | {"input", "history", "reasoning"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """How a file's records become responses: the shape's name and the columns (or paths) of each of its parts.

    `told` are those of `columns` that have a value in the first records, `rewards` what rewards are read from,
    `masks` the keys that leave turns out of the loss, `unused` the columns that play no part.
    """

    shape: str
    columns: Columns
    structs: tuple[str, ...] = ()
    turn_keys: str = ""
    told: Columns = field(default_factory=dict)
    rewards: tuple[RewardColumn, ...] = ()
    masks: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    inside: str = ""

    def describe(self) -> str:
        """One line for the user: `messages (role/content); generator from column `model`; not used: category`."""
        beside = "".join(f"; {part} from {_alternatives(told)}" for part in _BESIDE if (told := self.told.get(part)))
        masks = f"; turns left out of the loss by {', '.join(f'`{key}`' for key in self.masks)}" if self.masks else ""
        more = f" and {len(self.unused) - _SHOWN} more" if len(self.unused) > _SHOWN else ""
        unused = f"; not used: {', '.join(self.unused[:_SHOWN])}{more}" if self.unused else ""
        inside = f"{self.inside}: " if self.inside else ""
        generator = f"; generator from {self._generator()}"
        return storable(f"{inside}{self._parts()}{beside}{masks}{generator}{self._rewards()}{unused}")

    def _rewards(self) -> str:
        told = list(dict.fromkeys(column.path for column in self.rewards if column.told))
        if told:
            columns = ", ".join(f"`{path}`" for path in told[:4])
            more = f" and {len(told) - 4} more" if len(told) > 4 else ""
            return f"; rewards from column{'s' if len(told) > 1 else ''} {columns}{more}"
        # One that is asked for may come later.
        awaited = next((column.name for column in self.rewards if column.asked), "")
        return f"; rewards from column `{awaited}` (nothing in the first records)" if awaited else ""

    def _generator(self) -> str:
        if told := self.told.get("generator"):
            return _alternatives(told)
        if self.shape == "completions":
            source = "each completion's model, else the file's name"
        elif self.shape == "struct per generator":
            shown = ", ".join(self.structs[:3]) + (", ..." if len(self.structs) > 3 else "")
            source = f"the names of {len(self.structs)} struct columns ({shown})"
        elif self.shape == "chosen/rejected":
            sides = [path for side in ("chosen", "rejected") for path in self.told.get(f"{side}_generator", ())]
            source = (
                f"columns {' and '.join(f'`{path}`' for path in sides)}" if sides else "the side (chosen or rejected)"
            )
        else:
            source = "the file's name"
        # One that is asked for may come later.
        awaited = self.columns.get("generator", ())
        return f"column `{awaited[0]}` (nothing in the first records), else {source}" if len(awaited) == 1 else source

    def _parts(self) -> str:
        columns = {part: " / ".join(self.told.get(part) or paths[:1]) for part, paths in self.columns.items()}
        if self.turn_keys:
            return f"{columns.get('messages') or columns.get('conversations')} ({self.turn_keys})"
        if not self.told.get("input"):
            columns.pop("input", None)
        names = ("prompt", "input", "response", "completions", "generations", "chosen", "rejected")
        parts = " + ".join(columns[name] for name in names if name in columns)
        return f"{parts} + struct per generator" if self.structs else parts

    def reader(self) -> Read:
        """The function that turns a record into one `Reading` per response."""
        if self.shape == "struct per generator":
            read = read_structs(self.columns, self.structs, self.rewards)
        else:
            read = _READERS[self.shape](self.columns, self.rewards)
        return _with_tools(read, self.columns)


_READERS = {
    "completions": read_completions,
    "generations": read_generations,
    "chosen/rejected": read_preference,
    "messages": read_turns,
    "conversations": read_turns,
    "prompt + response": read_pair,
}


def _with_tools(read: Read, columns: Columns) -> Read:
    """The reader of any shape, with the tools that a record names for all of its responses."""
    if "tools" not in columns:
        return read
    value_of = optional(columns, "tools")
    place = columns["tools"][0]

    def read_both(record: Record, tally: Tally) -> list[Reading]:
        readings = read(record, tally)
        value = value_of(record)
        if not value:
            return readings
        try:
            tools = tools_of(value, place, null_is_absent=tally.null_is_absent)
            tools.encode()
        except (UnfitError, UnicodeEncodeError) as error:
            why = str(error) if isinstance(error, UnfitError) else f"an unpaired surrogate in {place}"
            return [reading._replace(status=Status.INVALID, detail=storable(why)) for reading in readings]
        return [reading._replace(tools=tools) for reading in readings] if tools else readings

    return read_both


def _alternatives(paths: Sequence[str]) -> str:
    return "column " + ", else ".join(f"`{path}`" for path in paths)


def parse_overrides(items: Iterable[str]) -> dict[str, str]:
    """`["response=answer"]` -> `{"response": "answer"}`. Raises UsageError for anything else."""
    overrides = {}
    for item in items:
        name, equals, column = item.partition("=")
        if not (equals and name.strip() and column.strip()):
            raise UsageError(f"--map {item}: write it as NAME=COLUMN, for example --map response=answer.")
        overrides[name.strip()] = column.strip()
    parts_of(overrides)
    return overrides


def parts_of(overrides: Overrides | None) -> Given:
    """Overrides with their names replaced by the parts that they fill."""
    parts: Given = {}
    for name, column in (overrides or {}).items():
        if name not in CANONICAL:
            raise UsageError(
                f"--map {name}={column}: there is no part `{name}`; known are {', '.join(sorted(CANONICAL))}."
            )
        part = CANONICAL[name]
        if parts.setdefault(part, column) != column:
            raise UsageError(f"--map sets the {part} to both `{parts[part]}` and `{column}`; keep one of them.")
    return parts
