"""Rewards that a corpus brings along: which columns hold them, and how they come with each response.

Where they lie depends on the shape: in a column of the record, in a field of each struct or completion, in a list
beside the responses, or in a column for each side of a pair. A value that is no finite number is no reward.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from decimal import Decimal
from numbers import Real
from typing import Any, NamedTuple, TypeAlias

from fastcompat.corpus.records import NumberList, Record
from fastcompat.corpus.sample import Columns, Sample, getter, rows_of_lists
from fastcompat.corpus.values import storable

Rewards: TypeAlias = tuple[tuple[str, float], ...]
RewardsOf: TypeAlias = Callable[[Record], Rewards]

# As the column in --map reward=COLUMN: take no rewards.
NO_REWARDS = "none"
# Names of rewards that records after the first ones may bring.
_LATE = (
    *("reward", "score", "rating", "overall_score", "fine-grained_score", "reward_score", "rm_score", "quality_score"),
    "instruct_reward",
)
_LATE_LISTS = ("ratings", "rating", "scores", "score", "rewards", "reward")
_LATE_SIDED = ("score", "reward", "rating")
_SIDES = ("chosen", "rejected")
_MARKS = "_-. /"
_MAX_DIGITS = 64
# What stands for a missing number where numbers are text.
_MISSING = frozenset(("", "-", "n/a", "na", "none", "null", "nan"))

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
_REWARD_WORDS = frozenset(("reward", "rewards", "score", "scores", "rating", "ratings"))
# Before one of them: the prompt was judged, as in `input_quality_score`.
_PROMPT_WORDS = frozenset(("prompt", "prompts", "instruction", "instructions", "question", "query", "input"))
# Judgements of something else, or better when they are lower.
_OTHER_WORDS = frozenset(
    (
        *("chosen", "rejected", "accepted", "max", "min", "n", "num", "number", "count", "similarity", "toxicity"),
        *("toxic", "nsfw", "perplexity"),
        *("ppl", "loss", "difficulty", "confidence", "uncertainty", "lang", "language", "bm", "rouge", "bleu", "dedup"),
    )
)
_BOOKKEEPING_WORDS = frozenset(
    (
        *("id", "ids", "idx", "index", "indices", "uid", "uuid", "guid", "hash", "md", "sha", "seed", "seeds", "row"),
        *("time", "timestamp", "date", "datetime", "created", "updated", "version", "versions", "revision", "year"),
        *("length", "lengths", "len", "size", "token", "tokens", "char", "chars", "character", "characters", "word"),
        *("words", "bytes", "n", "num", "number", "count", "counts", "latency", "duration", "elapsed", "seconds"),
        *("secs", "ms", "cost", "price", "usd", "temperature", "top", "step", "steps", "epoch", "turn", "turns"),
        *("rank", "ranks", "ranking", "position", "order", "offset", "attempt", "attempts", "retries", "std", "var"),
        *("logprob", "logprobs", "label", "labels", "class", "category"),
    )
)


class RewardColumn(NamedTuple):
    """One place that a reward is read from.

    `where` is "record" (a column of the record), "field" (inside each struct or completion), "list" (a column with a
    list, as long as the responses), "chosen" or "rejected" (a column of that side). `told` says whether it has a
    number in the first records, `late` whether they lack it, `asked` whether the user named it.
    """

    name: str
    path: str
    where: str
    told: bool = False
    late: bool = False
    asked: bool = False


def number_of(value: object) -> float | None:
    """A finite number, also one that is spelled as text; None for all else, booleans included."""
    kind = type(value)
    if kind is str:
        if len(value) > _MAX_DIGITS or "_" in value:  # type: ignore[arg-type, operator]
            return None
    elif kind is not float and (isinstance(value, bool) or not isinstance(value, Real | Decimal)):
        return None
    try:
        number = float(value)  # type: ignore[arg-type]
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def find_rewards(
    sample: Sample, shape: str, columns: Columns, structs: Sequence[str], *, more_columns: bool
) -> tuple[RewardColumn, ...]:
    """The columns whose names, and among the fields of structs whose values, say that they hold rewards.

    With `more_columns` also the usual ones that the first records lack.
    """
    taken = {path for paths in columns.values() for path in paths}
    names = [name for name in sample.names if isinstance(name, str) and name not in taken]
    if shape == "chosen/rejected":
        found, late = _sided(sample, names, _aliases(columns))
    elif shape == "struct per generator":
        found = list(_fields(_holders(sample, columns, structs), any_name=True))
        late = [RewardColumn(name, name, "field", late=True) for name in _LATE]
    elif shape in ("completions", "generations"):
        found, late = _columns(sample, names, "list", {"list", "texts", "null"}, _LATE_LISTS)
        if shape == "completions":
            found += _fields(_holders(sample, columns, structs), any_name=False)
            late += [RewardColumn(name, name, "field", late=True) for name in _LATE]
    else:
        found, late = _columns(sample, names, "record", {"other", "text", "null"}, _LATE)
    if more_columns:
        there = {column.path for column in found}
        found += [column for column in late if column.path not in there and not sample.has(column.path)]
    return tuple(found)


def asked_reward(
    sample: Sample, asked: str, shape: str, columns: Columns, structs: Sequence[str]
) -> tuple[tuple[RewardColumn, ...], bool]:
    """The places of the one reward that the user names, and whether the first records have any of them."""
    where = {"struct per generator": ("field",), "completions": ("field", "list"), "generations": ("list",)}
    if shape == "chosen/rejected":
        places = _asked_sides(sample, asked, _aliases(columns))
    else:
        places = [RewardColumn(storable(asked), asked, each) for each in where.get(shape, ("record",))]
    holders = _holders(sample, columns, structs)
    there = []
    for place in places:
        inside = place.where == "field"
        path = place.path if inside else sample.spelled(place.path)
        if values := list(_values_at(holders, path)) if inside else sample.values(path):
            told = _has_number(_items(values) if place.where == "list" else values)
            there.append(place._replace(path=path, told=told))
    return tuple(place._replace(asked=True) for place in there or places), bool(there)


def field_names(sample: Sample, columns: Columns, structs: Sequence[str]) -> list[str]:
    """Those of the fields inside structs and completions, where the shape has such."""
    return list(dict.fromkeys(str(name) for holder in _holders(sample, columns, structs) for name in holder))


def _columns(
    sample: Sample, names: Sequence[str], where: str, forms: set[str], late: Sequence[str]
) -> tuple[list[RewardColumn], list[RewardColumn]]:
    """Columns of the records that are named like rewards and hold values of these forms; and those that may come."""
    found = []
    for name in names:
        if is_reward_name(name) and sample.forms(name) & forms:
            values = sample.values(name)
            told = _has_number(_items(values) if where == "list" else values)
            found.append(RewardColumn(storable(name), name, where, told))
    return found, [RewardColumn(name, name, where, late=True) for name in late]


def _fields(holders: Sequence[Record], *, any_name: bool) -> Iterator[RewardColumn]:
    """Fields named like rewards; with `any_name` also those of numbers whose names are no bookkeeping."""
    for name in dict.fromkeys(name for holder in holders for name in holder if isinstance(name, str)):
        values = [holder[name] for holder in holders if name in holder]
        other = any_name and name != "content" and _BOOKKEEPING_WORDS.isdisjoint(_words(name))
        if is_reward_name(name) or (other and _all_numbers(values)):
            yield RewardColumn(storable(name), name, "field", _has_number(values))


def is_reward_name(name: str) -> bool:
    """Whether a column is named like a judgement of the response: `reward`, `overall_score`, `Skywork-Reward-8B`."""
    words = _words(name)
    if not _OTHER_WORDS.isdisjoint(words):
        return False
    if words and words[-1] in _REWARD_WORDS:
        judged = [word for word in words[:-1] if word != "quality"]
        return not (judged and judged[-1] in _PROMPT_WORDS)
    # Named after their reward model: ArmoRM-Llama3-8B-v0.1.
    return ("reward" in words or "RM" in _WORD.findall(name)) and _BOOKKEEPING_WORDS.isdisjoint(words)


def _words(name: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(name)]


def _has_number(values: Iterable[object]) -> bool:
    return any(number_of(value) is not None for value in values)


def _all_numbers(values: Sequence[object]) -> bool:
    """Whether all values are numbers or missing. Where all are text and whole numbers, they would be labels."""
    there = [value for value in values if not (value is None or (isinstance(value, str) and _is_missing(value)))]
    if not all(isinstance(value, float) or number_of(value) is not None for value in there):
        return False
    spelled = [value for value in there if isinstance(value, str)]
    return len(spelled) < len(there) or not there or any("." in value for value in spelled)


def _is_missing(text: str) -> bool:
    return text.strip().lower() in _MISSING


def _items(values: Iterable[object]) -> Iterator[object]:
    return (item for value in values for item in _listed(value))


def _listed(value: object) -> Sequence[Any]:
    if isinstance(value, NumberList):
        return value.unfolded()
    return value if isinstance(value, list) else ()


def _holders(sample: Sample, columns: Columns, structs: Sequence[str]) -> list[Record]:
    """The structs of generators, or the completions: what has a response and its rewards inside."""
    lists = [rows_of_lists(value) for path in columns.get("completions", ())[:1] for value in sample.values(path)]
    inside = [value for name in structs for value in sample.values(name)]
    return [item for item in (*inside, *_items(lists)) if isinstance(item, dict)]


def _values_at(holders: Iterable[Record], path: str) -> Iterator[Any]:
    get = getter(path)
    for holder in holders:
        try:
            yield get(holder)
        except KeyError:
            continue


def _aliases(columns: Columns) -> list[tuple[str, str]]:
    """How the names of the sides' rewards tell them apart: by the columns, "chosen" and "rejected", 0 and 1."""
    chosen, rejected = (columns[side][0] for side in _SIDES)
    numbers = [(chosen[-1], rejected[-1])] if chosen[-2:-1] == rejected[-2:-1] == "_" else []
    return list(dict.fromkeys([_SIDES, (chosen, rejected), *numbers]))


def _around(name: str, alias: str) -> tuple[str, str] | None:
    """What stands before and after the side in `score_chosen` and `chosen_score`; None where it is not named so."""
    head, tail = name[: -len(alias)], name[len(alias) :]
    if name.lower().startswith(alias.lower()) and len(tail) > 1 and tail[0] in _MARKS:
        return "", tail
    if name.lower().endswith(alias.lower()) and len(head) > 1 and head[-1] in _MARKS:
        return head, ""
    return None


def _sided(
    sample: Sample, names: Sequence[str], aliases: Sequence[tuple[str, str]]
) -> tuple[list[RewardColumn], list[RewardColumn]]:
    found: dict[str, RewardColumn] = {}
    for name in names:
        for side, alias in ((side, alias) for pair in aliases for side, alias in zip(_SIDES, pair, strict=True)):
            if (around := _around(name, alias)) and is_reward_name(rest := around[0][:-1] or around[1][1:]):
                told = _has_number(sample.values(name))
                found.setdefault(name, RewardColumn(storable(rest), name, side, told))
    spelled = [(name, side, path) for name in _LATE_SIDED for side in _SIDES for path in _spellings(name, side, "_")]
    return list(found.values()), [RewardColumn(name, path, side, late=True) for name, side, path in spelled]


def _spellings(name: str, alias: str, marks: str = _MARKS) -> list[str]:
    return [path for mark in marks for path in (f"{name}{mark}{alias}", f"{alias}{mark}{name}")]


def _asked_sides(sample: Sample, asked: str, aliases: Sequence[tuple[str, str]]) -> list[RewardColumn]:
    for pair in aliases:
        for alias in pair:
            if around := _around(asked, alias):
                name = storable(around[0][:-1] or around[1][1:])
                return [
                    RewardColumn(name, around[0] + each + around[1], side)
                    for side, each in zip(_SIDES, pair, strict=True)
                ]
    name = storable(asked)
    there = [
        RewardColumn(name, path, side)
        for pair in aliases
        for side, alias in zip(_SIDES, pair, strict=True)
        for path in _spellings(asked, alias)
        if sample.has(path)
    ]
    return there or [RewardColumn(name, path, side) for side in _SIDES for path in _spellings(asked, side, "_")]


def no_rewards(holder: Record) -> Rewards:
    """What is read where no column holds rewards."""
    return ()


def rewards_at(columns: Sequence[RewardColumn], where: str) -> RewardsOf:
    """Reads the rewards that lie there from a record, struct or completion."""
    here = [column for column in columns if column.where == where]
    always = [(column.name, getter(column.path)) for column in here if not column.late]
    late = {column.path: column.name for column in here if column.late}
    names = frozenset(late)
    if not here:
        return no_rewards

    def read(holder: Record) -> Rewards:
        if not always and names.isdisjoint(holder):
            return ()
        found: dict[str, float] = {}
        for name, get in always:
            try:
                number = number_of(get(holder))
            except KeyError:
                continue
            if number is not None:
                found.setdefault(name, number)
        for path, name in late.items():
            if path in holder and (number := number_of(holder[path])) is not None:
                found.setdefault(name, number)
        return tuple(found.items())

    return read


def rewards_of_each(columns: Sequence[RewardColumn]) -> Callable[[Record, Sequence[Any]], list[Rewards]]:
    """Reads the rewards of a record's several responses, from fields of each and from lists beside them."""
    fields = rewards_at(columns, "field")
    lists = [(column.name, getter(column.path)) for column in columns if column.where == "list"]

    def read(record: Record, responses: Sequence[Any]) -> list[Rewards]:
        found = [dict(fields(item)) if type(item) is dict else {} for item in responses]
        for name, get in lists:
            try:
                values = _listed(get(record))
            except KeyError:
                continue
            # A list of another length does not say which response each number is of.
            if len(values) == len(responses):
                for own, value in zip(found, values, strict=True):
                    if (number := number_of(value)) is not None:
                        own.setdefault(name, number)
        return [tuple(own.items()) for own in found]

    return read
