"""Which known shape the records of a file have, found from the first of them.

The `Mapping` is chosen from the union of the keys of the first records; overrides (`--map response=answer`) bend it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeAlias

from fastcompat.corpus.beside import history_of, tools_of
from fastcompat.corpus.mapping import COMMON, OPTIONAL, Given, Mapping, Overrides, parts_of
from fastcompat.corpus.records import Record
from fastcompat.corpus.rewards import NO_REWARDS, asked_reward, field_names, find_rewards
from fastcompat.corpus.sample import (
    COMPLETION_TEXTS,
    COMPLETIONS,
    CONVERSATIONS,
    FALLBACKS,
    GENERATIONS,
    GENERATOR_LISTS,
    GENERATORS,
    HISTORIES,
    INPUTS,
    PREFERENCES,
    PROMPTS,
    REASONINGS,
    RESPONSES,
    SYSTEMS,
    TASKS,
    TOOLS,
    Columns,
    Sample,
)
from fastcompat.corpus.shapes import named
from fastcompat.corpus.turns import Tally, turns_of
from fastcompat.corpus.values import storable
from fastcompat.errors import SchemaError

# Shapes whose generator column may be a list, with one for each of a record's responses.
_LISTED = ("completions", "generations")


class Lack(NamedTuple):
    """Why a shape does not fit. `near` is how many of its parts are there: the nearest shape is shown first."""

    reason: str
    near: int = 0


Fit: TypeAlias = "Callable[[Sample, Given], Mapping | Lack]"


def detect(
    records: Sequence[Record],
    *,
    overrides: Overrides | None = None,
    label: str = "the records",
    more_columns: bool = True,
) -> Mapping:
    """The mapping that fits these records. Raises SchemaError: the columns, the shapes tried, what each lacks.

    `more_columns` is False where later records cannot have columns that these lack.
    """
    sample = Sample(records)
    given = parts_of(overrides)
    found = ", ".join(map(str, sample.names)) or "none"
    for part, column in given.items():
        # Where a reward lies depends on the shape, which is not known yet.
        if part != "reward" and not (sample.has(column) or (more_columns and part in OPTIONAL)):
            raise _no_column(part, column, label, sample)
    lacks: dict[str, Lack] = {}
    hollow: Mapping | None = None
    asked = set(given) - COMMON
    for shape, parts, fit in _SHAPES:
        if not asked <= parts:
            lack = Lack("does not have " + " and ".join(sorted(asked - parts)) + ", which --map sets", -1)
        elif isinstance(fitted := fit(sample, given), Mapping):
            if _filled(fitted, sample):
                return _rewarded(_finished(fitted, sample), sample, given.get("reward"), label, more_columns)
            # Its column is there, but null or empty so far: any shape that has something comes first.
            hollow = hollow or fitted
            continue
        else:
            lack = fitted
        if shape not in lacks or lack.near > lacks[shape].near:
            lacks[shape] = lack
    if hollow is not None:
        return _rewarded(_finished(hollow, sample), sample, given.get("reward"), label, more_columns)
    # The nearest first: its lack is most likely what the user can mend. If none is near, the plainest.
    tried = sorted(lacks.items(), key=lambda item: (-item[1].near, item[0] != "prompt + response"))
    raise SchemaError(
        storable(
            f"{label} has no schema that is known. Columns found: {found}.\nShapes tried:\n"
            + "\n".join(f"  {shape}: {lack.reason}" for shape, lack in tried)
            + "\nSay which column is what, for example: --map prompt=COLUMN --map response=COLUMN"
        )
    )


def _no_column(part: str, column: str, label: str, sample: Sample, where: str = "") -> SchemaError:
    found = ", ".join(map(str, sample.names)) or "none"
    return SchemaError(
        storable(f"--map {part}={column}: {label} has no column `{column}`{where}; columns found: {found}.")
    )


def _finished(mapping: Mapping, sample: Sample) -> Mapping:
    """With the columns as the records spell them, none of them in two parts, and what the first records say of them."""
    taken: set[str] = set()
    columns: Columns = {}
    for part in sorted(mapping.columns, key=lambda part: part in OPTIONAL):
        spelled = [sample.spelled(path) for path in mapping.columns[part]]
        if own := tuple(path for path in spelled if path not in taken or len(spelled) == 1):
            columns[part] = own
        taken.update(spelled)
    told = {
        part: sample.told(paths, _given if mapping.shape in _LISTED or not part.endswith("generator") else named)
        for part, paths in columns.items()
    }
    used = [path for part, paths in columns.items() for path in (told[part] or (paths if part not in OPTIONAL else ()))]
    unused = sample.unused([*used, *mapping.structs])
    turns = columns.get("messages") or columns.get("conversations") or ()
    masks = sample.masks(turns[0]) if turns else ()
    return replace(mapping, columns=columns, told=told, masks=masks, unused=unused)


def _rewarded(mapping: Mapping, sample: Sample, asked: str | None, label: str, more_columns: bool) -> Mapping:
    """With the columns that hold rewards. Raises SchemaError where the one that is asked for cannot be there."""
    shape, columns, structs = mapping.shape, mapping.columns, mapping.structs
    if asked == NO_REWARDS:
        return mapping
    if asked is None:
        rewards = find_rewards(sample, shape, columns, structs, more_columns=more_columns)
    else:
        rewards, there = asked_reward(sample, asked, shape, columns, structs)
        if not (there or more_columns):
            fields = field_names(sample, columns, structs)
            where = f", nor is it one of the fields inside ({', '.join(fields)})" if fields else ""
            sides = " of the chosen and the rejected response" if shape == "chosen/rejected" else ""
            raise _no_column("reward", asked, label, sample, where or sides)
    others = sample.unused([column.path for column in rewards if column.told and column.where != "field"])
    return replace(mapping, rewards=rewards, unused=tuple(name for name in mapping.unused if name in others))


def _given(value: object) -> object:
    return value


def _filled(mapping: Mapping, sample: Sample) -> bool:
    parts = ("messages", "conversations", "completions", "generations", "chosen", "rejected", "response")
    columns = [path for part in parts for path in mapping.columns.get(part, ())]
    return bool(mapping.structs) or any(sample.forms(column) - {"null", "list"} for column in columns)


def _candidates(sample: Sample, given: Given, part: str, names: Sequence[str], forms: set[str]) -> Columns:
    """The part with its columns: the one that the user gave, else all that hold it or may come to."""
    paths = (given[part],) if part in given else tuple(name for name in names if sample.may_hold(name, forms))
    return {part: paths} if paths else {}


def _common(sample: Sample, given: Given, generators: Sequence[str] = GENERATORS) -> Columns:
    return {
        **_candidates(sample, given, "generator", generators, {"text", "texts", "other"}),
        **_candidates(sample, given, "system", SYSTEMS, {"text"}),
        **_readable(sample, given, "tools", TOOLS, lambda value: tools_of(value, "")),
    }


def _readable(sample: Sample, given: Given, part: str, names: Sequence[str], reads: Callable[[Any], object]) -> Columns:
    """The part with its column: the one that the user gave, else the first whose values are of that kind."""
    if part in given:
        return {part: (given[part],)}
    fitting = [name for name in names if sample.can_be(name, reads)]
    column = next((name for name in fitting if sample.forms(name) - {"null"}), next(iter(fitting), None))
    return {part: (column,)} if column else {}


def _read_earlier(value: Any) -> object:
    return history_of(value, "", lambda turns: turns_of(turns, "", Tally()))


def _prompt(sample: Sample, given: Given) -> Columns | Lack:
    conversations = [name for name in ("messages", *CONVERSATIONS) if "turns" in sample.forms(name)]
    forms = {"text", "turns", "parts"}
    prompt = given.get("prompt") or sample.first(PROMPTS, forms) or next(iter(conversations), None)
    if "prompt" not in given and sample.has("instruction") and sample.has("input"):
        prompt = "instruction"
    if prompt is None:
        return Lack(sample.lacking(PROMPTS, "no prompt column"))
    inputs = INPUTS if prompt in TASKS else ()
    return {
        "prompt": (prompt,),
        **_candidates(sample, given, "input", inputs, {"text"}),
        **_readable(sample, given, "history", HISTORIES, _read_earlier),
    }


def _fit_turns(part: str) -> Fit:
    def fit(sample: Sample, given: Given) -> Mapping | Lack:
        names = (part,) if part == "messages" else CONVERSATIONS
        column = given.get(part) or next((name for name in names if "turns" in sample.forms(name)), None)
        elsewhere = part not in given and sample.first(RESPONSES, {"text"})
        if column is None and not elsewhere:
            column = next((name for name in names if sample.unrolls(name)), None)
        unrolled = column is not None and sample.unrolls(column)
        column = column or part
        forms = sample.forms(column)
        if not forms:
            return Lack(f"no column `{column}`")
        if not (unrolled or forms & {"turns"} or forms <= {"null", "list"} or part in given):
            return Lack(f"`{column}` holds no list of turns with a role and a text", 1)
        if "turns" in forms and elsewhere and not sample.answered(column):
            return Lack(f"`{column}` holds no assistant turn, the response is elsewhere", 1)
        columns = {part: (column,), **_common(sample, given)}
        return Mapping(shape=part, columns=columns, turn_keys=sample.turn_keys(column))

    return fit


def _fit_pair(sample: Sample, given: Given) -> Mapping | Lack:
    prompt = _prompt(sample, given)
    taken = () if isinstance(prompt, Lack) else (*prompt["prompt"], *prompt.get("input", ()))
    names = [name for name in RESPONSES if name not in taken]
    forms = {"text", "turns", "parts", "texts"}
    response = given.get("response") or sample.first(names, forms)
    if response is None:
        return Lack(sample.lacking(names, "no response column"), 0 if isinstance(prompt, Lack) else 1)
    if isinstance(prompt, Lack):
        # A response that the user names may stand without a prompt; one that was guessed may not.
        if "response" not in given:
            return prompt._replace(near=1)
        prompt = {}
    # One column only: what stands beside a null response may be a reference solution, and a generator that failed must
    # not be credited with it.
    columns = {**prompt, "response": (response,), **_common(sample, given)}
    return Mapping(
        shape="prompt + response",
        columns=columns | _candidates(sample, given, "reasoning", REASONINGS, {"text"}),
    )


def _fit_several(part: str, names: Sequence[str], form: str) -> Fit:
    texts = COMPLETION_TEXTS if form == "objects" else ()

    def fit(sample: Sample, given: Given) -> Mapping | Lack:
        found = [name for name in names if form in sample.forms(name)]
        column = given.get(part) or next((n for n in found if not texts or sample.has_keys(n, texts)), None)
        if column is None and part in names and sample.forms(part) and sample.forms(part) <= {"null", "list"}:
            column = part
        prompt = _prompt(sample, given)
        if column is None:
            what = "objects with a model and a response" if form == "objects" else "texts"
            return Lack(f"no column `{part}` with a list of {what}")
        if isinstance(prompt, Lack):
            return prompt._replace(near=1)
        columns = {part: (column,), **prompt, **_common(sample, given, GENERATOR_LISTS)}
        lists = [name for name in columns.get("generator", ()) if "texts" in sample.forms(name)]
        if part == "generations" and part not in given and not lists and _pair(sample):
            return Lack(f"nothing says which generator made which of `{column}`, and there is a pair of responses", 1)
        # Each completion names its model; the record's own column is only asked for by the user.
        if part == "completions" and "generator" not in given:
            columns.pop("generator", None)
        return Mapping(shape=part, columns=columns)

    return fit


def _pair(sample: Sample) -> tuple[str, str] | None:
    """The columns of a chosen and a rejected response, or None."""
    return next((pair for pair in PREFERENCES if all(sample.has(name) for name in pair)), None)


def _fit_preference(sample: Sample, given: Given) -> Mapping | Lack:
    chosen, rejected = _pair(sample) or (None, None)
    chosen, rejected = given.get("chosen") or chosen, given.get("rejected") or rejected
    if chosen is None or rejected is None:
        near = sum(sample.has(name) for name in ("chosen", "rejected"))
        return Lack("no pair of columns `chosen` and `rejected`", near)
    if "object" in sample.forms(chosen) | sample.forms(rejected):
        return Lack(f"`{chosen}` or `{rejected}` is an object; map a part of it, as in chosen={chosen}.text", 1)
    columns: Columns = {"chosen": (chosen,), "rejected": (rejected,)}
    prompt = _prompt(sample, given)
    if not isinstance(prompt, Lack):
        columns |= prompt
    for side, column in (("chosen", chosen), ("rejected", rejected)):
        names = [f"{side}{mark}{name}" for name in ("model", "generator", "model_name") for mark in "_-"]
        names += [f"model_{side}", f"generator_{side}", f"{column}_model", f"{column}_source"]
        columns |= _candidates(sample, given, f"{side}_generator", list(dict.fromkeys(names)), {"text"})
    common = _common(sample, given)
    # A record's own `model` column does not say which of the two it made.
    if "generator" not in given:
        common.pop("generator", None)
    return Mapping(shape="chosen/rejected", columns={**columns, **common})


def _fit_structs(sample: Sample, given: Given) -> Mapping | Lack:
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


def _with_prompt(*names: str) -> frozenset[str]:
    return frozenset((*names, "prompt", "input", "history"))


# In the order tried: what holds several responses comes before the one that also stands alone beside them.
_SHAPES: tuple[tuple[str, frozenset[str], Fit], ...] = (
    ("completions", _with_prompt("completions"), _fit_several("completions", COMPLETIONS, "objects")),
    ("generations", _with_prompt("generations"), _fit_several("generations", GENERATIONS, "texts")),
    ("chosen/rejected", _with_prompt("chosen", "rejected"), _fit_preference),
    ("messages", frozenset(("messages",)), _fit_turns("messages")),
    ("conversations", frozenset(("conversations",)), _fit_turns("conversations")),
    ("prompt + response", _with_prompt("response", "reasoning"), _fit_pair),
    ("completions", _with_prompt("completions"), _fit_several("completions", FALLBACKS, "objects")),
    ("generations", _with_prompt("generations"), _fit_several("generations", FALLBACKS, "texts")),
    ("struct per generator", _with_prompt(), _fit_structs),
)
